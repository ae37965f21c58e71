"""The environment of its own in which OpenVINO's tools run: what is pinned there, and where it is."""

from __future__ import annotations

import os
import re
import sys
from importlib import metadata
from pathlib import Path

from pipeline.errors import RuntimeMissing

VARIABLE = "QWEN_ONNX_OPENVINO"
DEFAULT = ".venv-openvino"
PINNED = Path(__file__).parent.parent / "data" / "constraints-openvino.txt"
# What has a say in the bytes that come out.
TOOLS = ("nncf", "numpy", "olive-ai", "openvino", "optimum", "optimum-intel", "torch", "transformers")


def pins() -> dict[str, str]:
    """The pinned version of each of `TOOLS`."""
    rows = (line.partition("==") for line in PINNED.read_text(encoding="utf-8").splitlines())
    every = {name: version for name, _, version in rows if version}
    return {name: every[name] for name in TOOLS}


def programs() -> Path:
    """The folder with the environment's ``python``.

    Raises:
        RuntimeMissing: there is no such environment, or it has other versions than the pinned ones.
    """
    home = Path(os.environ.get(VARIABLE) or DEFAULT)
    windows = sys.platform == "win32"
    folder = home / ("Scripts" if windows else "bin")
    fix = f"`make {DEFAULT}`, or let {VARIABLE} name an environment that {PINNED.name} was installed into"
    if not any(folder.glob("python*")):
        why = "OpenVINO's tools do not fit beside those of the other targets"
        raise RuntimeMissing(f"there is no environment for OpenVINO at {home}", why=why, fix=fix)
    site = [str(path) for path in home.glob("Lib/site-packages" if windows else "lib/python3*/site-packages")]
    found = {_plain(entry.name): entry.version.partition("+")[0] for entry in metadata.distributions(path=site)}
    wrong = [
        f"{name} is {found.get(name, 'missing')}, not {wanted}"
        for name, wanted in pins().items()
        if found.get(name) != wanted
    ]
    if wrong:
        raise RuntimeMissing(f"{home} is not the pinned environment for OpenVINO", why="; ".join(wrong), fix=fix)
    return folder.absolute()


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
