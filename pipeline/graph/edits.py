"""Named edits on ONNX graphs whose weights stay on disk.

A graph is an ``onnx.ModelProto`` loaded without its external data; edits read and write weights one at a time
(`pipeline.graph.external_data`).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import StageError
from pipeline.package.onnx_references import LAST_LOGITS

if TYPE_CHECKING:
    import onnx


MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Weight:
    """A constant matrix that a node multiplies with or gathers from, or the matrices of all experts of a layer.

    Attributes:
        path: the checkpoint-like name that scheme patterns match, such as ``model.layers.0.mlp.up_proj``.
        node: index of the consuming node in ``graph.node``.
        role: ``body``, ``head``, ``embedding``, ``router`` (chooses experts or weighs them) or ``experts``.
        rows, columns: output and input channels (vocabulary and hidden size for an embedding); of an expert the inner
            size and the hidden size.
        count: of such matrices: of experts three each.
    """

    path: str
    node: int
    role: str
    rows: int
    columns: int
    count: int = 1

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.count * self.rows * self.columns


EXPERT_WEIGHTS = (2, 4)  # the inputs of a MoE node that are weights, see `pipeline.export.expert_graph`
ROUTERS = ("gate", "shared_expert_gate")  # as the modules of a checkpoint are called


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
    """The constant matrices of MatMul, Gather and MoE nodes, in graph order."""
    inputs = {value.name for value in model.graph.input}  # whose initializers are defaults, and no constants
    initializers = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name not in inputs}
    outputs = {value.name for value in model.graph.output}
    found = []
    for index, node in enumerate(model.graph.node):
        if node.op_type == "MatMul" and node.input[1] in initializers:
            tensor = initializers[node.input[1]]
            if len(tensor.dims) == 2:
                path = path_of(node, tensor.name)
                router = path.rpartition(".")[2] in ROUTERS
                role = "head" if node.output[0] in outputs else "router" if router else "body"
                found.append(Weight(path, index, role, tensor.dims[1], tensor.dims[0]))
        elif node.op_type == "MoE" and node.input[EXPERT_WEIGHTS[1]] in initializers:
            tensor = initializers[node.input[EXPERT_WEIGHTS[1]]]
            experts, hidden, inner = tensor.dims
            found.append(Weight(path_of(node, tensor.name), index, "experts", inner, hidden, 3 * experts))
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
    while parts and parts[-1].startswith(("MatMul", "Gather", "MoE")):
        parts.pop()
    return ".".join(parts) or tensor


_PRUNING = "/lm_head/last_token"


def prune_head(model: onnx.ModelProto, tokens: int = 1) -> None:
    """Let the head see the last tokens of a prompt only: ``logits`` become ``[batch, 1, vocabulary]``, the last one's.

    Generation needs no others, and 152 k float32 logits a token make prefill slow and large. The runtime takes logits
    of one token or of all; with ``tokens`` above 1, those of the last ``min(tokens, sequence)`` go to an output of
    their own, `LAST_LOGITS`, with which a draft can be verified in one forward.

    Raises:
        StageError: the graph has no output head.
    """
    head = _head(model)
    logits = head.output[0]
    head.input[0] = _slice(model, head.input[0], f"{_PRUNING}/output_0", "Slice", -tokens, before=head)
    _set_length(model, logits, 1)
    if tokens > 1:
        head.output[0] = LAST_LOGITS
        _slice(model, LAST_LOGITS, logits, "Slice_1", -1)
        model.graph.output.append(next(value for value in model.graph.output if value.name == logits))
        model.graph.output[-1].name = LAST_LOGITS
        _set_length(model, LAST_LOGITS, "last_sequence_length")


def _slice(
    model: onnx.ModelProto, source: str, result: str, name: str, start: int, before: onnx.NodeProto | None = None
) -> str:
    """Add a node that takes the tokens (axis 1) of ``source`` from ``start`` on; returns ``result``, its output."""
    import onnx

    inputs = [source]
    for suffix, value in (("starts", start), ("ends", 2**63 - 1), ("axes", 1)):
        inputs.append(f"{_PRUNING}/{name}/{suffix}")
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value]), inputs[-1]))
    node = onnx.helper.make_node("Slice", inputs, [result], name=f"{_PRUNING}/{name}")
    nodes = model.graph.node
    nodes.insert(list(nodes).index(before) if before is not None else len(nodes), node)
    return result


def unprune_head(model: onnx.ModelProto) -> bool:
    """Undo `prune_head`, whatever passes have made of the head since; ``False`` when it already sees all tokens."""
    nodes = {node.name: node for node in model.graph.node if node.name.startswith(f"{_PRUNING}/")}
    if f"{_PRUNING}/Slice" not in nodes:
        return False
    before, after = nodes[f"{_PRUNING}/Slice"], nodes.get(f"{_PRUNING}/Slice_1")
    for reader in model.graph.node:  # a quantizer may stand between it and the head
        reader.input[:] = [before.input[0] if item == before.output[0] else item for item in reader.input]
    logits = _pruned_logits(model)
    if after is not None:
        for value in [value for value in model.graph.output if value.name == after.input[0]]:
            model.graph.output.remove(value)
        for node in model.graph.node:
            node.output[:] = [logits if item == after.input[0] else item for item in node.output]
        model.graph.node.remove(after)
    model.graph.node.remove(before)
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name.startswith(f"{_PRUNING}/")]:
        model.graph.initializer.remove(tensor)
    _set_length(model, logits, "sequence_length")
    return True


def _pruned_logits(model: onnx.ModelProto) -> str:
    """The output for one token; caches have four dimensions."""
    shapes: dict[str, Any] = {value.name: value.type.tensor_type.shape.dim for value in model.graph.output}
    return next(name for name, dims in shapes.items() if len(dims) == 3 and dims[1].dim_value == 1)


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
