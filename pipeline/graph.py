"""Named edits on ONNX graphs whose weights stay on disk.

A graph is an ``onnx.ModelProto`` loaded without its external data; edits read and write weights one at a time
(`pipeline.external_data`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import blockwise
from pipeline.errors import StageError
from pipeline.external_data import ExternalDataWriter, read_tensor
from pipeline.scheme import WeightScheme

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

    from pipeline.artifact import Progress

MICROSOFT = "com.microsoft"

QuantizeWeight = Callable[[str, "npt.NDArray[np.float32]", WeightScheme], blockwise.BlockQuantized]


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
                found.append(Weight(_path(node, tensor.name), index, role, tensor.dims[1], tensor.dims[0]))
        elif node.op_type == "Gather" and node.input[0] in initializers:
            tensor = initializers[node.input[0]]
            if len(tensor.dims) == 2 and _gathers_rows(node) and "cache" not in tensor.name:
                found.append(Weight(_path(node, tensor.name), index, "embedding", *tensor.dims))
    return found


def _gathers_rows(node: onnx.NodeProto) -> bool:
    return all(attribute.i == 0 for attribute in node.attribute if attribute.name == "axis")


def _path(node: onnx.NodeProto, tensor: str) -> str:
    """Node names follow the modules (``/model/layers.0/mlp/up_proj/MatMul``) in both exporters."""
    parts = [part for part in re.sub(r"_Q[48]$", "", node.name).split("/") if part]
    while parts and parts[-1].startswith(("MatMul", "Gather")):
        parts.pop()
    return ".".join(parts) or tensor


def quantize_weights(
    model: onnx.ModelProto,
    source: Path,
    writer: ExternalDataWriter,
    schemes: Mapping[str, WeightScheme],
    *,
    accuracy_level: int = 0,
    share_embedding: bool = False,
    quantize: QuantizeWeight = lambda _, values, scheme: blockwise.quantize(
        values, scheme.bits, scheme.block_size, scheme.symmetric
    ),
    progress: Progress | None = None,
) -> dict[str, float]:
    """Replace MatMul and Gather weights by block-quantized ones, and move all others to ``writer``.

    Args:
        model: edited in place; its external data lies in the folder ``source``.
        schemes: for each `Weight.path` its scheme; weights without an entry keep their type.
        accuracy_level: ``MatMulNBits`` attribute: 0 unset, 1 float32, 4 int8 activations.
        share_embedding: gather from the quantized head instead of storing the embedding.
        quantize: given a path, its values ``[N, K]`` and its scheme, the quantized weight.
        progress: called after each weight, with its path.

    Returns:
        For each quantized path its relative squared error.

    Raises:
        StageError: the embedding cannot be shared, or a weight has NaN or infinite values.
    """
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    todo = weights(model)
    head = next((weight for weight in todo if weight.role == "head"), None)
    embedding = next((weight for weight in todo if weight.role == "embedding"), None)
    shared = _shareable(head, embedding, schemes) if share_embedding else None
    written: dict[str, onnx.TensorProto] = {}
    errors: dict[str, float] = {}
    for done, weight in enumerate(todo):
        scheme = schemes.get(weight.path)
        if scheme is None or (share_embedding and weight is embedding):
            continue
        node = model.graph.node[weight.node]
        name = node.input[1 if node.op_type == "MatMul" else 0]
        values = read_tensor(initializers[name], source)
        values = values.T if node.op_type == "MatMul" else values
        try:
            quantized = quantize(weight.path, values, scheme)
        except ValueError as error:
            raise StageError(f"weight {weight.path} cannot be quantized", why=str(error)) from error
        errors[weight.path] = quantized.relative_error
        packed = quantized.packed.reshape(weight.rows, -1) if node.op_type == "Gather" else quantized.packed
        parts: dict[str, npt.NDArray[Any]] = {f"{name}_Q{scheme.bits}": packed, f"{name}_scales": quantized.scale}
        if quantized.zero_point is not None:
            parts[f"{name}_zero_point"] = quantized.zero_point
        for part, stored in parts.items():
            written[part] = writer.write(part, stored)
        if node.op_type == "MatMul":
            _become_matmul(node, list(parts), weight, scheme, accuracy_level)
        else:
            _become_gather(node, list(parts), scheme)
        if progress is not None:
            progress((done + 1) / len(todo), weight.path)
    if shared:
        _gather_from_head(model, *shared, written)
    _move_rest(model, source, writer, written)
    if not any(entry.domain == MICROSOFT for entry in model.opset_import):
        model.opset_import.add(domain=MICROSOFT, version=1)
    return errors


def _move_rest(
    model: onnx.ModelProto, source: Path, writer: ExternalDataWriter, written: dict[str, onnx.TensorProto]
) -> None:
    """Move the initializers that are used and not ``written`` yet; drop the unused, and sort them all by name."""
    used = {name for node in model.graph.node for name in node.input}
    for tensor in model.graph.initializer:
        if tensor.name in used and tensor.name not in written:
            written[tensor.name] = writer.write(tensor.name, read_tensor(tensor, source), tensor.data_type)
    del model.graph.initializer[:]
    model.graph.initializer.extend(written[name] for name in sorted(written))


def _shareable(
    head: Weight | None, embedding: Weight | None, schemes: Mapping[str, WeightScheme]
) -> tuple[Weight, Weight, WeightScheme]:
    """Head, embedding and the head's scheme, if one can be stored for both.

    Raises:
        StageError: it cannot.
    """
    what = "the embedding cannot share the head's weight"
    scheme = schemes.get(head.path) if head else None
    if head is None or embedding is None or scheme is None:
        raise StageError(
            what,
            why="the graph has no quantized head, or no embedding",
            fix="set `embedding` to a scheme of its own",
        )
    if (head.rows, head.columns) != (embedding.rows, embedding.columns):
        raise StageError(
            what,
            why=f"their shapes differ: {embedding.rows}x{embedding.columns} and {head.rows}x{head.columns}",
            fix="set `embedding` to a scheme of its own",
        )
    if head.columns % scheme.block_size:
        raise StageError(
            what,
            why=f"the hidden size {head.columns} is no multiple of the head's block size {scheme.block_size}",
            fix="choose a block size for the head that divides the hidden size",
        )
    return head, embedding, scheme


def _gather_from_head(
    model: onnx.ModelProto,
    head: Weight,
    embedding: Weight,
    scheme: WeightScheme,
    written: dict[str, onnx.TensorProto],
) -> None:
    """Point the embedding at the head's bytes: initializers of other dims at the same file offsets."""
    import onnx

    parts = list(model.graph.node[head.node].input)[1:]
    groups = head.columns // scheme.block_size
    dims = (head.columns * scheme.bits // 8, groups, -(-groups * scheme.bits // 8))
    names = []
    for part, columns in zip(parts, dims, strict=False):
        alias = onnx.TensorProto()
        alias.CopyFrom(written[part])
        alias.name = f"embedding.{part}"
        alias.dims[:] = [head.rows, columns]
        written[alias.name] = alias
        names.append(alias.name)
    _become_gather(model.graph.node[embedding.node], names, scheme)


def repack(
    model: onnx.ModelProto,
    source: Path,
    writer: ExternalDataWriter,
    share: tuple[Weight, Weight] | None = None,
) -> None:
    """Move all weights to ``writer``; with ``share`` = (head, embedding), gather from the head's quantized weight.

    Args:
        model: edited in place; its external data lies in the folder ``source``.
        share: the float model's head and embedding; the head has become ``MatMulNBits`` since.

    Raises:
        StageError: the embedding cannot be shared.
    """
    written: dict[str, onnx.TensorProto] = {}
    if share:
        found = quantized_schemes(model)
        head, embedding, scheme = _shareable(_find_again(model, share[0]), _find_again(model, share[1]), found)
        initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        for name in model.graph.node[head.node].input[1:]:
            tensor = initializers[name]
            written[name] = writer.write(name, read_tensor(tensor, source), tensor.data_type)
        _gather_from_head(model, head, embedding, scheme, written)
    _move_rest(model, source, writer, written)


def quantized_schemes(model: onnx.ModelProto) -> dict[str, WeightScheme]:
    """The schemes of the block-quantized weights of a graph, by `Weight.path`."""
    found = {}
    for node in model.graph.node:
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            values = {attribute.name: attribute.i for attribute in node.attribute}
            found[_path(node, node.input[0])] = WeightScheme(
                bits=values["bits"],
                block_size=values["block_size"],
                symmetric=len(node.input) < 4,
            )
    return found


def _find_again(model: onnx.ModelProto, weight: Weight) -> Weight:
    """The same weight in a model whose nodes a pass has renamed and reordered."""
    for index, node in enumerate(model.graph.node):
        if _path(node, "") == weight.path:
            return Weight(weight.path, index, weight.role, weight.rows, weight.columns)
    raise StageError(f"weight {weight.path} is gone", why="a pass has renamed or removed its node")


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


def _become_matmul(
    node: onnx.NodeProto, parts: list[str], weight: Weight, scheme: WeightScheme, accuracy_level: int
) -> None:
    attributes = {"K": weight.columns, "N": weight.rows, "bits": scheme.bits, "block_size": scheme.block_size}
    if accuracy_level:
        attributes["accuracy_level"] = accuracy_level
    _become(node, "MatMulNBits", [node.input[0], *parts], attributes)


def _become_gather(node: onnx.NodeProto, parts: list[str], scheme: WeightScheme) -> None:
    attributes = {"bits": scheme.bits, "block_size": scheme.block_size, "gather_axis": 0, "quantize_axis": 1}
    _become(node, "GatherBlockQuantized", [parts[0], node.input[1], *parts[1:]], attributes)


def _become(node: onnx.NodeProto, op_type: str, inputs: list[str], attributes: dict[str, int]) -> None:
    import onnx

    node.op_type, node.domain = op_type, MICROSOFT
    node.input[:] = inputs
    del node.attribute[:]
    node.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in sorted(attributes.items()))
