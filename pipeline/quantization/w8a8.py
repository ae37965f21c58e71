"""8-bit weights and 8-bit activations for the CPU: projections become integer matrix products.

Shapes in this module:
    N: output channels, K: input channels, S: tokens, B: channels mixed with one another.

A projection ``y = x Wᵀ`` is computed as follows, without calibration and for any model:

1. The channels of ``x`` are mixed in blocks of ``B`` by a Hadamard matrix, and so are those of ``W``: the product is
   the same, but a channel's outliers are spread over its block (QuaRot does so for whole rows).
2. Every token is divided by its largest magnitude and rounded to a fixed grid over [-1, 1] (``QuantizeLinear``): it has
   a scale of its own, and what it yields does not depend on the tokens that it is computed with.
3. ``MatMulIntegerToFloat`` multiplies with int8 weights, one scale per output channel.

On processors without VNNI the kernels add two products of uint8 and int8 in a 16-bit register that saturates
(``vpmaddubsw``): ``2 * 255 * LIMIT`` must not exceed 32767. With 7-bit weights all processors compute the same.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import StageError
from pipeline.graph import edits as graph
from pipeline.graph.external_data import ExternalDataWriter, read_tensor

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

    from pipeline.artifact import Progress

# Largest magnitude of a stored weight: 2 * 255 * 64 = 32640. With 65, AVX2 sums saturate.
LIMIT = 64

# Channels mixed with one another. 256 lost no less on Qwen2.5-0.5B; its square root, 8, divides exactly.
BLOCK = 64

# Fractions of a channel's largest magnitude that are tried as its range.
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)

# Elements worked on at once, so that peak memory does not grow with the weight.
_CHUNK = 1 << 21


@dataclass(frozen=True)
class ChannelQuantized:
    """One weight, quantized by output channel.

    Attributes:
        codes: ``[K, N]`` int8 in ``[-LIMIT, LIMIT]``, the layout of the operators.
        scale: ``[N]`` float32.
        relative_error: ``||w - codes * scale||² / ||w||²``.
    """

    codes: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float32]
    relative_error: float


def hadamard(size: int) -> npt.NDArray[np.float32]:
    """The symmetric orthogonal Hadamard matrix ``[size, size]`` of a power of two: its own inverse."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(math.sqrt(size))


def block_of(columns: int) -> int:
    """How many of ``columns`` channels are mixed: the largest power of two up to `BLOCK` that divides them."""
    return math.gcd(columns, BLOCK)


def quantize(weight: npt.NDArray[np.float32], block: int) -> ChannelQuantized:
    """Mix the input channels of ``weight`` (``[N, K]``) in blocks; quantize each output channel.

    Of a few clipped ranges, the scale of each refitted by least squares, the one of least squared error is kept.

    Raises:
        ValueError: the weight has NaN or infinite values.
    """
    rows, columns = weight.shape
    matrix = hadamard(block)
    codes = np.empty((columns, rows), np.int8)
    scale = np.empty(rows, np.float32)
    error = total = 0.0
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = np.ascontiguousarray(weight[start : start + step], np.float32)
        mixed = (part.reshape(-1, block) @ matrix).reshape(part.shape)
        energy = np.square(mixed).sum(1)
        if not np.isfinite(energy).all():
            raise ValueError("the weight has NaN or infinite values")
        q, s, e = _quantize_rows(mixed, energy)
        codes[:, start : start + step] = q.T
        scale[start : start + step] = s
        error += float(e.sum(dtype=np.float64))
        total += float(energy.sum(dtype=np.float64))
    return ChannelQuantized(codes, scale, error / total if total else 0.0)


def _quantize_rows(
    part: npt.NDArray[np.float32], energy: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Codes like ``part``; scale and squared error of each row."""
    reach = np.abs(part).max(1) / LIMIT
    error = np.full(len(part), np.inf, np.float32)
    codes = np.zeros(part.shape, np.int8)
    scale = np.zeros(len(part), np.float32)
    for shrink in _SHRINK:
        tried = reach * np.float32(shrink)
        inverse = np.divide(1.0, tried, out=np.zeros_like(tried), where=tried > 0)
        rounded = np.clip(np.rint(part * inverse[:, None]), -LIMIT, LIMIT)
        norm = np.einsum("nk,nk->n", rounded, rounded)
        projection = np.einsum("nk,nk->n", part, rounded)
        fitted = np.divide(projection, norm, out=np.zeros_like(norm), where=norm > 0)
        found = np.maximum(energy - fitted * projection, 0.0)
        better = found < error
        error = np.where(better, found, error)
        scale = np.where(better, fitted, scale)
        codes[better] = rounded[better].astype(np.int8)
    return codes, scale, error


def quantize_projections(
    model: onnx.ModelProto,
    source: Path,
    writer: ExternalDataWriter,
    paths: Collection[str],
    progress: Progress | None = None,
) -> tuple[dict[str, onnx.TensorProto], dict[str, float]]:
    """Replace MatMul nodes by integer products.

    Args:
        model: edited in place; its external data lies in the folder ``source``.
        writer: takes the quantized weights.
        paths: the `graph.Weight.path` of the projections.
        progress: called after each weight, with its path.

    Returns:
        The initializers written, by name, which the model does not hold yet; and of each path its relative squared
        error.

    Raises:
        StageError: a weight has NaN or infinite values.
    """
    if not paths:
        return {}, {}
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    todo = [weight for weight in graph.weights(model) if weight.path in paths]
    written: dict[str, onnx.TensorProto] = {}
    errors: dict[str, float] = {}
    rewriter = _Rewriter(model)
    for done, weight in enumerate(todo):
        name = model.graph.node[weight.node].input[1]
        block = block_of(weight.columns)
        try:
            quantized = quantize(read_tensor(initializers[name], source).T, block)
        except ValueError as error:
            raise StageError(f"weight {weight.path} cannot be quantized", why=str(error)) from error
        errors[weight.path] = quantized.relative_error
        codes, scale = f"{name}_codes", f"{name}_scale"
        written[codes] = writer.write(codes, quantized.codes)
        written[scale] = writer.write(scale, quantized.scale)
        rewriter.replace(weight.node, codes, scale, block)
        if progress is not None:
            progress((done + 1) / len(todo), weight.path)
    written |= {name: writer.write(name, values) for name, values in rewriter.finish().items()}
    if not any(entry.domain == graph.MICROSOFT for entry in model.opset_import):
        model.opset_import.add(domain=graph.MICROSOFT, version=1)
    return written, errors


class _Rewriter:
    """Collects the nodes that replace MatMul nodes; those that read the same tensor share its mixing and scaling."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._nodes = model.graph.node
        self._scaled: dict[str, tuple[str, str]] = {}
        self._instead: dict[int, list[onnx.NodeProto]] = {}
        self._constants: dict[str, npt.NDArray[Any]] = {
            "w8a8/axes": np.array([-1], np.int64),
            "w8a8/tiny": np.array(1e-20, np.float32),  # a token of zeros must not be divided by zero
            "w8a8/step": np.array(1 / 127, np.float32),
            "w8a8/zero": np.array(128, np.uint8),
        }

    def replace(self, index: int, codes: str, scale: str, block: int) -> None:
        """Let the MatMul at ``index`` multiply with ``codes`` (``[K, N]``) and ``scale`` (``[N]``)."""
        import onnx

        make = onnx.helper.make_node
        node = self._nodes[index]
        source, result = node.input[0], node.output[0]
        nodes = self._instead.setdefault(index, [])
        if source not in self._scaled:
            self._scaled[source] = self._scale(nodes, source, block)
        rows, reach = self._scaled[source]
        product = f"{result}/scaled"
        inputs = [rows, codes, "w8a8/step", scale, "w8a8/zero"]
        nodes.append(make("MatMulIntegerToFloat", inputs, [product], node.name, domain=graph.MICROSOFT))
        nodes.append(make("Mul", [product, reach], [result], f"{node.name}/Unscale"))

    def _scale(self, nodes: list[onnx.NodeProto], source: str, block: int) -> tuple[str, str]:
        """Names of ``source`` mixed and rounded to uint8, and of each token's largest magnitude (``[..., S, 1]``)."""
        import onnx

        def add(op_type: str, inputs: list[str], **attributes: int) -> str:
            result = f"{source}/w8a8/{op_type}{len(nodes)}"
            nodes.append(onnx.helper.make_node(op_type, inputs, [result], result, **attributes))
            return result

        mixed = source
        if block > 1:
            matrix, apart = f"w8a8/hadamard{block}", f"w8a8/blocks{block}"
            self._constants[matrix] = hadamard(block)
            self._constants[apart] = np.array([-1, block], np.int64)
            blocks = add("MatMul", [add("Reshape", [source, apart]), matrix])
            mixed = add("Reshape", [blocks, add("Shape", [source])])
        peak = add("ReduceMax", [add("Abs", [mixed]), "w8a8/axes"], keepdims=1)
        reach = add("Max", [peak, "w8a8/tiny"])
        return add("QuantizeLinear", [add("Div", [mixed, reach]), "w8a8/step", "w8a8/zero"]), reach

    def finish(self) -> dict[str, npt.NDArray[Any]]:
        """Put the nodes in place; the constants that they read."""
        ordered = [new for index, node in enumerate(self._nodes) for new in self._instead.get(index, [node])]
        del self._nodes[:]
        self._nodes.extend(ordered)
        return self._constants
