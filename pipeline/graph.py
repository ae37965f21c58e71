"""Named edits on ONNX graphs whose weights stay on disk.

A graph is an ``onnx.ModelProto`` loaded without its external data; weights are read one at a time as
memory maps, and written one at a time by `ExternalDataWriter`, so that peak memory is bounded by the
largest weight and not by the model.
"""

from __future__ import annotations

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
    parts = [part for part in node.name.split("/") if part]
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
    names = []
    for part in parts:
        alias = onnx.TensorProto()
        alias.CopyFrom(written[part])
        alias.name = f"embedding.{part}"
        if part == parts[0]:
            alias.dims[:] = [head.rows, head.columns * scheme.bits // 8]
        written[alias.name] = alias
        names.append(alias.name)
    node = model.graph.node[embedding.node]
    attributes = {"bits": scheme.bits, "block_size": scheme.block_size, "gather_axis": 0, "quantize_axis": 1}
    _become(node, "GatherBlockQuantized", [names[0], node.input[1], *names[1:]], attributes)


def _become(node: onnx.NodeProto, op_type: str, inputs: list[str], attributes: dict[str, int]) -> None:
    import onnx

    node.op_type, node.domain = op_type, MICROSOFT
    node.input[:] = inputs
    del node.attribute[:]
    node.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in sorted(attributes.items()))


def operators(model: onnx.ModelProto) -> dict[str, int]:
    """How often each operator occurs, most frequent first; ``com.microsoft`` operators by their bare name."""
    return dict(Counter(node.op_type for node in model.graph.node).most_common())
