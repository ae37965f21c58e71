"""Named edits on ONNX graphs whose weights stay on disk.

A graph is an ``onnx.ModelProto`` loaded without its external data; edits read and write weights one at a time
(`pipeline.external_data`).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import StageError

if TYPE_CHECKING:
    import onnx


MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Weight:
    """A constant matrix that a node multiplies with or gathers from.

    Attributes:
        path: the checkpoint-like name that scheme patterns match, such as ``model.layers.0.mlp.up_proj``.
        node: index of the consuming node in ``graph.node``.
        role: ``body``, ``head`` or ``embedding``.
        rows, columns: output and input channels (vocabulary and hidden size for an embedding).
    """

    path: str
    node: int
    role: str
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.rows * self.columns


def load(path: Path) -> onnx.ModelProto:
    """The graph in ``path`` without its external data.

    Raises:
        StageError: the file is missing or is not an ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise StageError(f"{path.name} cannot be read as an ONNX model", where=str(path), why=str(error)) from error


def weights(model: onnx.ModelProto) -> list[Weight]:
    """The constant matrices of MatMul and Gather nodes, in graph order."""
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    outputs = {value.name for value in model.graph.output}
    found = []
    for index, node in enumerate(model.graph.node):
        if node.op_type == "MatMul" and node.input[1] in initializers:
            tensor = initializers[node.input[1]]
            if len(tensor.dims) == 2:
                role = "head" if node.output[0] in outputs else "body"
                found.append(Weight(path_of(node, tensor.name), index, role, tensor.dims[1], tensor.dims[0]))
        elif node.op_type == "Gather" and node.input[0] in initializers:
            tensor = initializers[node.input[0]]
            if len(tensor.dims) == 2 and _gathers_rows(node) and "cache" not in tensor.name:
                found.append(Weight(path_of(node, tensor.name), index, "embedding", *tensor.dims))
    return found


def _gathers_rows(node: onnx.NodeProto) -> bool:
    return all(attribute.i == 0 for attribute in node.attribute if attribute.name == "axis")


def path_of(node: onnx.NodeProto, tensor: str) -> str:
    """Node names follow the modules (``/model/layers.0/mlp/up_proj/MatMul``) in both exporters."""
    parts = [part for part in re.sub(r"_Q[48]$", "", node.name).split("/") if part]
    while parts and parts[-1].startswith(("MatMul", "Gather")):
        parts.pop()
    return ".".join(parts) or tensor


_PRUNING = "/lm_head/last_token"


def prune_head(model: onnx.ModelProto) -> None:
    """Let the head see the last token of a prompt only: logits become ``[batch, 1, vocabulary]``.

    Generation needs no others, and 152 k float32 logits a token make prefill slow and large.

    Raises:
        StageError: the graph has no output head.
    """
    import onnx

    head = _head(model)
    for suffix, value in (("starts", [-1]), ("ends", [2**63 - 1]), ("axes", [1])):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), f"{_PRUNING}/{suffix}"))
    inputs = [head.input[0], *(f"{_PRUNING}/{suffix}" for suffix in ("starts", "ends", "axes"))]
    node = onnx.helper.make_node("Slice", inputs, [f"{_PRUNING}/output_0"], name=f"{_PRUNING}/Slice")
    model.graph.node.insert(list(model.graph.node).index(head), node)
    head.input[0] = node.output[0]
    _set_length(model, head.output[0], 1)


def unprune_head(model: onnx.ModelProto) -> bool:
    """Undo `prune_head`, whatever passes have made of the head since; ``False`` when it already sees all tokens."""
    for node in model.graph.node:
        if node.name == f"{_PRUNING}/Slice":
            for reader in model.graph.node:  # a quantizer may stand between it and the head
                reader.input[:] = [node.input[0] if item == node.output[0] else item for item in reader.input]
            model.graph.node.remove(node)
            for tensor in [tensor for tensor in model.graph.initializer if tensor.name.startswith(f"{_PRUNING}/")]:
                model.graph.initializer.remove(tensor)
            for value in model.graph.output:
                dims = value.type.tensor_type.shape.dim
                if len(dims) == 3 and dims[1].dim_value == 1:  # the logits; caches have four dimensions
                    _set_length(model, value.name, "sequence_length")
                    break
            return True
    return False


def _set_length(model: onnx.ModelProto, logits: str, length: int | str) -> None:
    """Declare how many tokens the logits are for: the runtime allocates them by it."""
    for value in model.graph.output:
        if value.name == logits:
            dim = value.type.tensor_type.shape.dim[1]
            dim.Clear()
            if isinstance(length, int):
                dim.dim_value = length
            else:
                dim.dim_param = length


def _head(model: onnx.ModelProto) -> onnx.NodeProto:
    outputs = {value.name for value in model.graph.output}
    for node in model.graph.node:
        if node.op_type in ("MatMul", "MatMulNBits") and outputs.intersection(node.output):
            return node
    raise StageError("the graph has no output head", why="no MatMul writes a graph output")


def interface(model: onnx.ModelProto) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the graph's inputs and outputs."""
    return tuple(value.name for value in model.graph.input), tuple(value.name for value in model.graph.output)


def restore_outputs(model: onnx.ModelProto, wanted: tuple[str, ...]) -> None:
    """Give renamed graph outputs (Olive's RTN pass makes ``logits`` ``logits_Q4``) their names back."""
    names = {value.name for value in model.graph.output}
    for name in wanted:
        renamed = [other for other in names if other.startswith(f"{name}_Q")]
        if name in names or len(renamed) != 1:
            continue
        for node in model.graph.node:
            node.input[:] = [name if item == renamed[0] else item for item in node.input]
            node.output[:] = [name if item == renamed[0] else item for item in node.output]
        for value in model.graph.output:
            value.name = name if value.name == renamed[0] else value.name


def operators(model: onnx.ModelProto) -> dict[str, int]:
    """How often each operator occurs, most frequent first; ``com.microsoft`` operators by their bare name."""
    return dict(Counter(node.op_type for node in model.graph.node).most_common())
