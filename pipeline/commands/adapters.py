"""The verbs of LoRA adapters that are kept apart from the weights."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands import arguments
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.package.adapter_files import Described


def add(root: Any) -> None:
    """Add the commands to the command line."""
    parser = arguments.command(
        root,
        "adapter",
        convert,
        "convert a LoRA adapter for a package with slots, without building it again",
    )
    parser.add_argument("package", type=Path)
    parser.add_argument("adapter", type=Path, metavar="PEFT_DIR", help="directory that peft saved")
    parser.add_argument("--name", required=True, help="how it is called")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: NAME.onnx_adapter)")
    parser.add_argument("--license", metavar="SPDX", help="identifier of its licence")
    arguments.json(parser)


def chosen(package: Path, given: str, trust: bool) -> Path:
    """The file of an adapter by its name or path, checked unless it is part of a trusted package.

    Raises:
        UsageError, PackageError: there is none, or it does not fit.
    """
    from pipeline.runtime import adapters

    found = adapters.find(package, given)
    if not trust or found.parent.resolve() != package.resolve():
        adapters.check(package, found)
    return found


def convert(options: argparse.Namespace) -> int:
    from pipeline.lora import convert as lora
    from pipeline.package import adapter_files, verify

    manifest = verify.package(options.package)
    known = adapter_files.slots(options.package)
    if not known:
        raise UsageError(
            f"{options.package} takes no adapters",
            why="its graph has no slots",
            fix="build it from a recipe with `adapters`; an empty mapping will do",
        )
    if not adapter_files.NAME.fullmatch(options.name) or options.name.endswith(adapter_files.ENDING):
        raise UsageError(f"`{options.name}` cannot be the name of an adapter", why="names are letters, digits and ._-")
    out = options.out or Path(f"{options.name}{adapter_files.ENDING}")
    if out.suffix != adapter_files.ENDING or out.parent.resolve() == options.package.resolve():
        raise UsageError(
            f"the adapter cannot be written to {out}",
            why=f"its name should end in {adapter_files.ENDING}, and a package is sealed",
            fix="give another place with --out",
        )
    base = adapter_files.base_of(manifest)
    described = lora.convert(options.adapter, options.package, known, out, options.name, base, options.license or "")
    print(json.dumps({"file": str(out), **asdict(described)}) if options.json else _converted(out, described))
    return 0


def _converted(out: Path, described: Described) -> str:
    trained = f", trained on {described.trained_on}" if described.trained_on else ""
    return (
        f"{out} and {out.name}.json: {len(described.ranks)} slots, largest rank {max(described.ranks.values())}"
        f"{trained}\n"
        "It fits by modules and shapes. Whether it was trained on this very checkpoint it cannot tell, and nothing was "
        "measured:\nput it into the recipe to have it validated."
    )
