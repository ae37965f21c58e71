"""Named edits on ONNX graphs whose weights stay on disk.

A graph is an ``onnx.ModelProto`` loaded without its external data; weights are read one at a time as
memory maps, and written one at a time by `ExternalDataWriter`, so that peak memory is bounded by the
largest weight and not by the model.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import blockwise
from pipeline.errors import StageError
from pipeline.scheme import WeightScheme

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

MICROSOFT = "com.microsoft"

# ONNX Runtime maps external data from the file; on a page boundary it needs no copy.
_ALIGNMENT = 4096

# Smaller tensors stay inside the model file, where shape inference can see them.
_INLINE_BYTES = 1024


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
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise StageError(f"{path.name} cannot be read as an ONNX model", where=str(path), why=str(error)) from error


def read_tensor(tensor: onnx.TensorProto, folder: Path) -> npt.NDArray[Any]:
    """The values of an initializer, as a read-only memory map where they are external data."""
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return onnx.numpy_helper.to_array(tensor)
    external = {entry.key: entry.value for entry in tensor.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(
        folder / external["location"], dtype, "r", offset=int(external.get("offset", 0)), shape=tuple(tensor.dims)
    )


class ExternalDataWriter:
    """Writes initializers one after the other into a single external-data file.

    Two runs over the same tensors write the same bytes: padding is zero, the order is the caller's.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")

    def __enter__(self) -> ExternalDataWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, name: str, values: npt.NDArray[Any], data_type: int | None = None) -> onnx.TensorProto:
        """Append ``values`` and return the initializer that refers to them (inline when it is tiny)."""
        import onnx

        kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype) if data_type is None else data_type
        tensor = onnx.TensorProto(name=name, data_type=kind, dims=values.shape)
        if values.nbytes < _INLINE_BYTES:
            tensor.raw_data = np.ascontiguousarray(values).tobytes()
            return tensor
        self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
        offset = self._file.tell()
        np.ascontiguousarray(values).tofile(self._file)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", self._path.name), ("offset", offset), ("length", values.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


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
    schemes: dict[str, WeightScheme],
    accuracy_level: int,
    share_embedding: bool,
    progress: Any = None,
) -> dict[str, float]:
    """Replace MatMul and Gather weights by block-quantized ones, and move all others to ``writer``.

    Args:
        model: edited in place; its external data lies in the folder ``source``.
        schemes: for each `Weight.path` its scheme; weights without an entry keep their type.
        accuracy_level: ``MatMulNBits`` attribute: 0 unset, 1 float32, 4 int8 activations.
        share_embedding: gather from the quantized head instead of storing the embedding.
        progress: called with (weights done, weights in all, path) after each weight.

    Returns:
        For each quantized path its relative squared error.

    Raises:
        StageError: the embedding cannot be shared, or a weight has NaN or infinite values.
    """
    import onnx

    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    todo = weights(model)
    head = next((weight for weight in todo if weight.role == "head"), None)
    embedding = next((weight for weight in todo if weight.role == "embedding"), None)
    if share_embedding:
        _check_shareable(head, embedding, schemes)
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
            quantized = blockwise.quantize(values, scheme.bits, scheme.block_size, scheme.symmetric)
        except ValueError as error:
            raise StageError(f"weight {weight.path} cannot be quantized", why=str(error)) from error
        errors[weight.path] = quantized.relative_error
        _replace(node, name, weight, scheme, accuracy_level, quantized, writer, written)
        if progress is not None:
            progress(done + 1, len(todo), weight.path)
    if share_embedding:
        assert head is not None and embedding is not None
        _gather_from_head(model, head, embedding, schemes[head.path], written)
    used = {name for node in model.graph.node for name in node.input}
    for tensor in model.graph.initializer:
        if tensor.name in used and tensor.name not in written:
            written[tensor.name] = writer.write(tensor.name, read_tensor(tensor, source), tensor.data_type)
    del model.graph.initializer[:]
    model.graph.initializer.extend(written[name] for name in sorted(written))
    if not any(entry.domain == MICROSOFT for entry in model.opset_import):
        model.opset_import.add(domain=MICROSOFT, version=1)
    return errors


def _check_shareable(head: Weight | None, embedding: Weight | None, schemes: dict[str, WeightScheme]) -> None:
    scheme = schemes.get(head.path) if head else None
    if head is None or embedding is None or scheme is None:
        raise StageError(
            "the embedding cannot share the head's weight",
            why="the graph has no quantized head, or no embedding",
            fix="set `embedding` to a scheme of its own",
        )
    if (head.rows, head.columns) != (embedding.rows, embedding.columns):
        raise StageError(
            "the embedding cannot share the head's weight",
            why=f"their shapes differ: {embedding.rows}x{embedding.columns} and {head.rows}x{head.columns}",
            fix="set `embedding` to a scheme of its own",
        )
    if head.columns % scheme.block_size:
        raise StageError(
            "the embedding cannot share the head's weight",
            why=f"the hidden size {head.columns} is no multiple of the head's block size {scheme.block_size}",
            fix="choose a block size for the head that divides the hidden size",
        )


def _replace(
    node: onnx.NodeProto,
    name: str,
    weight: Weight,
    scheme: WeightScheme,
    accuracy_level: int,
    quantized: blockwise.BlockQuantized,
    writer: ExternalDataWriter,
    written: dict[str, onnx.TensorProto],
) -> None:
    packed, scale, zero = quantized.packed, quantized.scale, quantized.zero_point
    names = [f"{name}_Q{scheme.bits}", f"{name}_scales", f"{name}_zero_point"]
    if node.op_type == "Gather":
        packed = packed.reshape(weight.rows, -1)
    for part, values in zip(names, (packed, scale, zero), strict=True):
        if values is not None:
            written[part] = writer.write(part, values)
    parts = names if zero is not None else names[:2]
    if node.op_type == "MatMul":
        attributes = {"K": weight.columns, "N": weight.rows, "bits": scheme.bits, "block_size": scheme.block_size}
        if accuracy_level:
            attributes["accuracy_level"] = accuracy_level
        _become(node, "MatMulNBits", [node.input[0], *parts], attributes)
    else:
        attributes = {"bits": scheme.bits, "block_size": scheme.block_size, "gather_axis": 0, "quantize_axis": 1}
        _become(node, "GatherBlockQuantized", [parts[0], node.input[1], *parts[1:]], attributes)


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
    node = model.graph.node[embedding.node]
    attributes = {"bits": scheme.bits, "block_size": scheme.block_size, "gather_axis": 0, "quantize_axis": 1}
    _become(node, "GatherBlockQuantized", [names[0], node.input[1], *names[1:]], attributes)


def repack(model: onnx.ModelProto, source: Path, writer: ExternalDataWriter, share: tuple[Weight, Weight] | None) -> None:
    """Move all weights to ``writer``; with ``share`` = (head, embedding), gather from the head's quantized weight.

    Args:
        model: edited in place; its external data lies in the folder ``source``.
        share: the float model's head and embedding; the head has become ``MatMulNBits`` since.

    Raises:
        StageError: the embedding cannot be shared.
    """
    scheme = None
    if share:
        head, embedding = (_find_again(model, weight) for weight in share)
        scheme = _scheme_of(model.graph.node[head.node])
        _check_shareable(head, embedding, {head.path: scheme} if scheme else {})
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    used = {name for node in model.graph.node for name in node.input}
    if share:
        used -= {model.graph.node[embedding.node].input[0]}
    written = {
        name: writer.write(name, read_tensor(tensor, source), tensor.data_type)
        for name, tensor in initializers.items()
        if name in used
    }
    if share and scheme:
        _gather_from_head(model, head, embedding, scheme, written)
    del model.graph.initializer[:]
    model.graph.initializer.extend(written[name] for name in sorted(written))


def _find_again(model: onnx.ModelProto, weight: Weight) -> Weight:
    """The same weight in a model whose nodes a pass has renamed and reordered."""
    for index, node in enumerate(model.graph.node):
        if _path(node, "") == weight.path:
            return Weight(weight.path, index, weight.role, weight.rows, weight.columns)
    raise StageError(f"weight {weight.path} is gone", why="a pass has renamed or removed its node")


def _scheme_of(node: onnx.NodeProto) -> WeightScheme | None:
    if node.op_type != "MatMulNBits":
        return None
    values = {attribute.name: attribute.i for attribute in node.attribute}
    return WeightScheme(bits=values["bits"], block_size=values["block_size"], symmetric=len(node.input) < 4)


_LAST_TOKEN = "/lm_head/last_token"


def prune_head(model: onnx.ModelProto) -> None:
    """Let the head see the last token of a prompt only: logits become ``[batch, 1, vocabulary]``.

    Generation needs no others, and 152 k float32 logits a token make prefill slow and large.

    Raises:
        StageError: the graph has no output head.
    """
    import onnx

    head = _head(model)
    for suffix, value in (("starts", [-1]), ("ends", [2**63 - 1]), ("axes", [1])):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), f"{_LAST_TOKEN}/{suffix}"))
    inputs = [head.input[0], *(f"{_LAST_TOKEN}/{suffix}" for suffix in ("starts", "ends", "axes"))]
    node = onnx.helper.make_node("Slice", inputs, [f"{_LAST_TOKEN}/output_0"], name=f"{_LAST_TOKEN}/Slice")
    model.graph.node.insert(list(model.graph.node).index(head), node)
    head.input[0] = node.output[0]


def unprune_head(model: onnx.ModelProto) -> bool:
    """Undo `prune_head`; ``False`` when the head already sees all tokens."""
    for node in model.graph.node:
        if node.name == f"{_LAST_TOKEN}/Slice":
            _head(model).input[0] = node.input[0]
            model.graph.node.remove(node)
            return True
    return False


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


def stored_bits(model: onnx.ModelProto, folder: Path) -> int:
    """Bits of all weights as stored, shared bytes counted once."""
    import onnx

    extents: set[tuple[str, int, int]] = set()
    inline = 0
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = {item.key: item.value for item in tensor.external_data}
            length = int(entry.get("length", (folder / entry["location"]).stat().st_size))
            extents.add((entry["location"], int(entry.get("offset", 0)), length))
        else:
            inline += tensor.ByteSize()
    return 8 * (inline + sum(length for _, _, length in extents))


def _become(node: onnx.NodeProto, op_type: str, inputs: list[str], attributes: dict[str, int]) -> None:
    import onnx

    node.op_type, node.domain = op_type, MICROSOFT
    node.input[:] = inputs
    del node.attribute[:]
    node.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in sorted(attributes.items()))


def operators(model: onnx.ModelProto) -> dict[str, int]:
    """How often each operator occurs, most frequent first; ``com.microsoft`` operators by their bare name."""
    return dict(Counter(node.op_type for node in model.graph.node).most_common())
