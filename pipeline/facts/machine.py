"""What this machine can execute: which provider stands behind a target here, and why not the target's own."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from pipeline.facts.target import CPU, Target


@dataclass(frozen=True)
class Execution:
    """How packages of a target run on this machine.

    Attributes:
        provider: the execution provider that runs them; empty when none can.
        device: what the provider computes on, in words.
        missing: what the target's own provider or its device lacks here; empty when those are what runs.
    """

    provider: str
    device: str
    missing: str = ""

    def label(self) -> str:
        """For reports: ``CPUExecutionProvider (the processor)``."""
        return f"{self.provider} ({self.device})"


def elsewhere(provider: str, executed_on: str, missing: str) -> str:
    """What a result was not got on: the provider, or the NPU where the provider has another device; mostly empty."""
    return (provider if executed_on != provider else "the NPU") if missing else ""


def execution(target: Target) -> Execution:
    """How packages of ``target`` run here; cheap, nothing heavy is imported."""
    missing = _PROBES[target.name](target) if target.name in _PROBES else ""
    if target.name == "openvino":  # no other provider reads its graphs, and its own has a device for processors
        return Execution("", "nothing", missing) if missing else _OPENVINO
    if missing:
        return Execution(CPU, "the processor", missing)
    return Execution(target.provider, _DEVICES.get(target.name, target.title))


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
    return _needs(target) or (_plugin(target) if target.runtime.plugin else "")


def _plugin(target: Target) -> str:
    plugin = target.runtime.plugin
    return "" if _installed(plugin.partition("==")[0]) else f"its plugin {plugin} is not installed"


def _webgpu(target: Target) -> str:
    """The plugin takes a software driver only when it is told to; a real GPU is not looked for, that takes seconds."""
    if os.environ.get("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER") == "1":
        return _plugin(target)
    return "no GPU was looked for; ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER=1 runs it on a software Vulkan driver"


def _directml(target: Target) -> str:
    return _needs(target) if sys.platform == "win32" else "DirectML runs on Windows only"


_PROBES: dict[str, Callable[[Target], str]] = {
    "cuda": _cuda,
    "directml": _directml,
    "webgpu": _webgpu,
    "tensorrt-rtx": _cuda,
    "npu": _plugin,
    "openvino": _plugin,
}
_OPENVINO = Execution(
    "OpenVINOExecutionProvider",
    "OpenVINO's CPU device, float32",
    "none is looked for, since it gives logits of the last token only; OpenVINO's CPU device computes the same graph",
)
_DEVICES = {
    "cpu": "the processor",
    "webgpu": "a software Vulkan driver",
    "npu": "HTP emulator" if platform.machine() in ("x86_64", "AMD64") else "HTP",
}
