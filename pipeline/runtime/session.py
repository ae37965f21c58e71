"""Opening a package with onnxruntime-genai."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifact import read_manifest
from pipeline.errors import PackageError, RuntimeMissing
from pipeline.package.replay import chatter_aside, configure, graphs_of, provider_of, unrunnable


@dataclass(frozen=True)
class Session:
    """A loaded package: the runtime's model, and the facts of its ``genai_config.json`` that callers need.

    ``provider`` is the runtime's name of what computes: ``cpu``, ``cuda``, ``dml``… ``adapter`` is the name of the LoRA
    adapter that its generators have (`pipeline.runtime.adapters`), and ``adapters`` the runtime's container of it.
    """

    package: Path
    model: Any
    config: dict[str, Any]
    threads: int
    provider: str
    adapter: str = ""
    adapters: Any = None

    @property
    def context_length(self) -> int:
        """Largest number of tokens, prompt and answer together."""
        return int(self.config["model"]["context_length"])

    @property
    def eos(self) -> tuple[int, ...]:
        """Ids of the tokens that end an answer."""
        eos = self.config["model"]["eos_token_id"]
        return tuple(eos) if isinstance(eos, list) else (eos,)

    @property
    def window(self) -> int:
        """Tokens of a prompt that a static model takes at a time; 1 for all others."""
        return int(self.config["model"]["decoder"].get("sliding_window", {}).get("window_size", 1))

    @property
    def rewinds(self) -> bool:
        """Whether what a generator has read can be taken back in part, and read on; not where lengths are fixed."""
        return "filename" in self.config["model"]["decoder"] and self.window == 1

    @property
    def repetition_penalty(self) -> float:
        """What the package's settings ask for where a request does not."""
        return float(self.config.get("search", {}).get("repetition_penalty", 1.0))

    def padded(self, tokens: int) -> int:
        """How many tokens of the context a prompt takes: the runtime fills up the last window."""
        return -(-tokens // self.window) * self.window

    @property
    def image_token(self) -> int | None:
        """Id of the token that stands for a feature of a picture; none of a model that does not see."""
        model = self.config["model"]
        return int(model["image_token_id"]) if "vision" in model and "speech" not in model else None

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self.config["model"]["vocab_size"])


def runtime() -> Any:
    """The onnxruntime_genai module, with telemetry off.

    Raises:
        RuntimeMissing: it is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise RuntimeMissing(
            "onnxruntime-genai cannot be loaded", why=str(error), fix="pip install '.[serve]'"
        ) from None
    return onnxruntime_genai


def available_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_package(package: Path, threads: int | None = None, provider: str = "") -> Session:
    """Load a package.

    ONNX Runtime guesses one thread on many virtual machines, where hyper-threads look like one core;
    the number of usable cores is therefore set at load time (not in the package: it is a fact of the machine).

    Args:
        provider: ``cpu`` runs a package for other hardware on the processor; the package's own when left out.

    Raises:
        PackageError: the configuration or the model cannot be loaded.
        RuntimeMissing: onnxruntime-genai is not installed, or has not the provider.
    """
    og = runtime()
    threads = threads or available_threads()
    try:
        config = json.loads((package / "genai_config.json").read_bytes())
        facts = [config["model"][name] for name in ("context_length", "vocab_size", "eos_token_id")]
        own = provider_of(config)
        graphs = graphs_of(config)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise PackageError(f"{package} has no readable genai_config.json", why=repr(error)) from None
    if None in facts:
        raise PackageError(f"{package} has no readable genai_config.json", why="a size or the end token is null")
    if absent := [name for name in graphs if not (package / name).is_file()]:
        raise PackageError(f"{package} cannot be loaded", why=f"{', '.join(absent)} is not there")
    if problem := unrunnable(package, config, provider):
        raise RuntimeMissing(f"{package} cannot be run here", why=problem, fix="run it on the chip it is compiled for")
    try:
        settings = og.Config(str(package))
        configure(og, settings, config, provider == "cpu", threads)
        with chatter_aside():
            model = og.Model(settings)
    except Exception as error:  # the binding raises bare exceptions of the C++ side
        why = str(error).split("\n")[0]
        if provider == "cpu" and re.search("not supported in this build|No OpenVINO devices", why):
            text = f"{package} is run on the processor by OpenVINO alone, which is not to be had here"
            raise RuntimeMissing(text, why=why, fix=_install(package)) from None
        if own != "cpu" and provider != "cpu":
            raise RuntimeMissing(
                f"{package} is for the provider {own}, which is not to be had here",
                why=why,
                fix=f"on a machine with that hardware: {_install(package)}; "
                "`--provider cpu` runs the package on the processor, slowly",
            ) from None
        raise PackageError(f"{package} cannot be loaded by onnxruntime-genai", why=why) from None
    return Session(package, model, config, threads, provider or own)


def _install(package: Path) -> str:
    try:
        return str(read_manifest(package).data["runtime"].get("install", "install the runtime of its provider"))
    except PackageError:
        return "install the runtime of its provider"
