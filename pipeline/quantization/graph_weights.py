"""Edits of a graph's weights, one weight at a time: quantize them, share them, pack them into one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import StageError
from pipeline.facts.scheme import WeightScheme
from pipeline.graph import edits as graph
from pipeline.graph.edits import MICROSOFT, Weight
from pipeline.graph.external_data import ExternalDataWriter, read_tensor
from pipeline.quantization import blockwise, expert_weights
from pipeline.quantization.expert_weights import QuantizeWeight

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

    from pipeline.artifact import Progress


def quantize_weights(
    model: onnx.ModelProto,
    source: Path,
    writer: ExternalDataWriter,
    schemes: Mapping[str, WeightScheme],
    *,
    accuracy_level: int = 0,
    share_embedding: bool = False,
    form: str = "nbits",
    quantize: QuantizeWeight = lambda _, values, scheme: blockwise.quantize(
        values, scheme.bits, scheme.block_size, scheme.symmetric
    ),
    progress: Progress | None = None,
    kept: Mapping[str, onnx.TensorProto] | None = None,
) -> dict[str, float]:
    """Replace weights of MatMul, Gather and MoE by block-quantized ones, and move all others to ``writer``.

    Args:
        model: edited in place; its external data lies in the folder ``source``.
        schemes: for each `Weight.path` its scheme; weights without an entry keep their type.
        accuracy_level: ``MatMulNBits`` attribute: 0 unset, 1 float32, 4 int8 activations.
        share_embedding: gather from the quantized head instead of storing the embedding.
        form: ``nbits`` (``MatMulNBits``) or ``qdq`` (``DequantizeLinear`` before ``MatMul``: 4 bits, symmetric).
        quantize: given a path, its values ``[N, K]`` and its scheme, the quantized weight.
        progress: called after each weight, with its path.
        kept: initializers that ``writer`` has written before.

    Returns:
        For each quantized path, and for each expert below one, its relative squared error.

    Raises:
        StageError: the embedding cannot be shared, experts have no such form, or a weight has NaN or infinite values.
    """
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    todo = graph.weights(model)
    head = next((weight for weight in todo if weight.role == "head"), None)
    embedding = next((weight for weight in todo if weight.role == "embedding"), None)
    shared = _shareable(head, embedding, schemes) if share_embedding else None
    written: dict[str, onnx.TensorProto] = dict(kept or {})
    errors: dict[str, float] = {}
    inserted: list[tuple[onnx.NodeProto, onnx.NodeProto]] = []
    for done, weight in enumerate(todo):
        scheme = schemes.get(weight.path)
        if scheme is None or (share_embedding and weight is embedding):
            continue
        node = model.graph.node[weight.node]
        try:
            if weight.role == "experts":
                _check_form(form, weight)
                place = (initializers, source, writer, written)
                errors |= expert_weights.become_quantized(node, weight, scheme, accuracy_level, *place, quantize)
                inserted += [(added, node) for added in expert_weights.router_weights(node)]
            else:
                name = node.input[1 if node.op_type == "MatMul" else 0]
                values = read_tensor(initializers[name], source)
                quantized = quantize(weight.path, values.T if node.op_type == "MatMul" else values, scheme)
                errors[weight.path] = quantized.relative_error
                if form == "qdq":
                    made = _dequantizer(node, name, quantized, weight, scheme, writer, written)
                    inserted.append((made, node))
                else:
                    _become_nbits(node, name, quantized, weight, scheme, accuracy_level, writer, written)
        except ValueError as error:
            raise StageError(f"weight {weight.path} cannot be quantized", why=str(error)) from error
        if progress is not None:
            progress((done + 1) / len(todo), weight.path)
    if shared:
        _gather_from_head(model, *shared, written)
    nodes = list(model.graph.node)
    for added, node in reversed(inserted):
        model.graph.node.insert(nodes.index(node), added)
    _move_rest(model, source, writer, written)
    if not any(entry.domain == MICROSOFT for entry in model.opset_import):
        model.opset_import.add(domain=MICROSOFT, version=1)
    return errors


def _check_form(form: str, weight: Weight) -> None:
    if form != "nbits":
        why = f"fused experts have no form {form}"
        raise StageError(f"weight {weight.path} cannot be quantized", why=why, fix="set `export.experts: dense`")


def _become_nbits(
    node: onnx.NodeProto,
    name: str,
    quantized: blockwise.BlockQuantized,
    weight: Weight,
    scheme: WeightScheme,
    accuracy_level: int,
    writer: ExternalDataWriter,
    written: dict[str, onnx.TensorProto],
) -> None:
    """Make ``node`` a ``MatMulNBits`` or a ``GatherBlockQuantized``."""
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


def _dequantizer(
    node: onnx.NodeProto,
    name: str,
    quantized: blockwise.BlockQuantized,
    weight: Weight,
    scheme: WeightScheme,
    writer: ExternalDataWriter,
    written: dict[str, onnx.TensorProto],
) -> onnx.NodeProto:
    """A ``DequantizeLinear`` of a symmetric 4-bit weight, whose output ``node`` (a MatMul) now reads.

    Raises:
        StageError: the scheme has no such form.
    """
    import onnx

    if scheme.bits != 4 or not scheme.symmetric or node.op_type != "MatMul":
        raise StageError(f"weight {weight.path} has no QDQ form", why="that is for symmetric 4-bit weights of a MatMul")
    values = np.ascontiguousarray(blockwise.unpack(quantized.packed, 4).reshape(weight.rows, -1)[:, : weight.columns].T)
    signed = np.bitwise_xor(values, 8, dtype=np.uint8)  # a code less its zero point of 8, in two's complement of 4 bits
    packed = blockwise.pack(signed.reshape(1, -1), 4)[0]
    dims = (weight.columns, weight.rows)
    parts = (f"{name}_Q4", f"{name}_scales")
    written[parts[0]] = writer.write(parts[0], packed, onnx.TensorProto.INT4, dims)
    written[parts[1]] = writer.write(parts[1], np.ascontiguousarray(quantized.scale.T))
    made = onnx.helper.make_node(
        "DequantizeLinear",
        list(parts),
        [f"{name}_DQ"],
        name=node.name.rsplit("/", 1)[0] + "/DequantizeLinear",
        axis=0,
        block_size=scheme.block_size,
    )
    node.input[1] = made.output[0]
    return made


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
    """Point the embedding at the head's bytes."""
    nodes = model.graph.node
    _gather_from(nodes[embedding.node], nodes[head.node], head, scheme, written)


def _gather_from(
    gather: onnx.NodeProto,
    product: onnx.NodeProto,
    head: Weight,
    scheme: WeightScheme,
    written: dict[str, onnx.TensorProto],
) -> None:
    """Make ``gather`` read the weight of ``product``: initializers of other dims at the same file offsets."""
    import onnx

    parts = list(product.input)[1:]
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
    _become_gather(gather, names, scheme)


def share_across(model: onnx.ModelProto, embedding: Weight, decoder: onnx.ModelProto, head: Weight) -> None:
    """Let an embedding in a graph of its own gather from the quantized head of ``decoder``: the same bytes of its file.

    Args:
        model: the embedding's graph, edited in place.
        embedding: in ``model``.
        decoder: whose head has become ``MatMulNBits``.
        head: as the float decoder had it.

    Raises:
        StageError: the head cannot be shared.
    """
    head, embedding, scheme = _shareable(_find_again(decoder, head), embedding, quantized_schemes(decoder))
    written = {tensor.name: tensor for tensor in decoder.graph.initializer}
    table = model.graph.node[embedding.node].input[0]
    _gather_from(model.graph.node[embedding.node], decoder.graph.node[head.node], head, scheme, written)
    kept = [tensor for tensor in model.graph.initializer if tensor.name != table]
    parts = set(model.graph.node[embedding.node].input)
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, *(tensor for name, tensor in written.items() if name in parts)])
    if not any(entry.domain == MICROSOFT for entry in model.opset_import):
        model.opset_import.add(domain=MICROSOFT, version=1)


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
        if node.op_type == "QMoE":
            found[graph.path_of(node, node.input[0])] = expert_weights.scheme_of(node)
        elif node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            values = {attribute.name: attribute.i for attribute in node.attribute}
            found[graph.path_of(node, node.input[0])] = WeightScheme(
                bits=values["bits"],
                block_size=values["block_size"],
                symmetric=len(node.input) < 4,
            )
        elif node.op_type == "DequantizeLinear":
            size = next((attribute.i for attribute in node.attribute if attribute.name == "block_size"), 0)
            if size:
                path = graph.path_of(node, "").removesuffix(".DequantizeLinear")
                found[path] = WeightScheme.model_validate({"bits": 4, "block_size": size, "symmetric": True})
    return found


def _find_again(model: onnx.ModelProto, weight: Weight) -> Weight:
    """The same weight in a model whose nodes a pass has renamed and reordered."""
    for index, node in enumerate(model.graph.node):
        if graph.path_of(node, "") == weight.path:
            return Weight(weight.path, index, weight.role, weight.rows, weight.columns)
    raise StageError(f"weight {weight.path} is gone", why="a pass has renamed or removed its node")


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
