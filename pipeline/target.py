"""The hardware targets: one literal table of what is true of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A kind of hardware that packages are built for.

    Attributes:
        name: as recipes spell it.
        provider: ONNX Runtime execution provider.
        io_dtype: type of activations between kernels.
        bits: weight widths that the provider's kernels compute with; 32 and 16 are unquantized.
        missing: why it cannot be built by this version; empty when it can.
    """

    name: str
    provider: str
    io_dtype: str
    bits: tuple[int, ...]
    missing: str = ""


_LATER = "this version of qwen-onnx builds for cpu only; the {} export and its validation are not there yet"

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("cpu", "CPUExecutionProvider", "float32", (4, 8, 32)),
        Target("cuda", "CUDAExecutionProvider", "float16", (4, 16), _LATER.format("CUDA")),
        Target("directml", "DmlExecutionProvider", "float16", (4, 16), _LATER.format("DirectML")),
        Target("npu", "QNNExecutionProvider", "uint16", (4, 8), _LATER.format("NPU (Qualcomm QNN)")),
    )
}
