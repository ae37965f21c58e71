"""What this machine can execute: which provider stands behind a target here, and why not the target's own."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from pipeline.target import CPU, TARGETS, Target


@dataclass(frozen=True)
class Execution:
    """How packages of a target run on this machine.

    Attributes:
        provider: the execution provider that runs them; empty when none can.
        device: what the provider computes on, in words.
        missing: what the target's own provider lacks here; empty when it is the one that runs.
    """

    provider: str
    device: str
    missing: str = ""

    def label(self) -> str:
        """For reports: ``CPUExecutionProvider (the processor)``."""
        return f"{self.provider} ({self.device})"


def execution(target: Target) -> Execution:
    """How packages of ``target`` run here; cheap, nothing heavy is imported."""
    missing = _PROBES[target.name](target) if target.name in _PROBES else ""
    if missing:
        return Execution(CPU, "the processor", missing)
    return Execution(target.provider, _DEVICES.get(target.name, target.title))


def runtime_distribution() -> str:
    """The installed distribution that provides ``onnxruntime_genai``; the plain one when none is installed."""
    names = dict.fromkeys(target.runtime.package for target in TARGETS.values())
    return next((name for name in names if name != "onnxruntime-genai" and _installed(name)), "onnxruntime-genai")


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _needs(target: Target) -> str:
    package = target.runtime.package
    return (
        "" if _installed(package) else f"{package} is not installed: pip install '{package}=={target.runtime.minimum}'"
    )


def _cuda(target: Target) -> str:
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda)"
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "an NVIDIA driver, but no GPU that it can use"
    return _needs(target)


def _windows(target: Target) -> str:
    return _needs(target) if sys.platform == "win32" else f"{target.option} runs on Windows only"


def _unbundled(target: Target) -> str:
    return f"the installed onnxruntime-genai has no {target.provider}"


_PROBES: dict[str, Callable[[Target], str]] = {
    "cuda": _cuda,
    "directml": _windows,
    "webgpu": _unbundled,
    "tensorrt-rtx": _windows,
}
_DEVICES = {"cpu": "the processor"}
