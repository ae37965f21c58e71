"""Slots for LoRA adapters in a graph, quantized or not: what a projection gives, plus a product that starts out empty.

Every projection gets two more inputs, whose defaults have rank 0: a product over nothing is zero, and what the base
model computes stays the same, bit by bit.

Shapes in this module:
    I, O: inputs and outputs of a projection, R: rank.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import StageError
from pipeline.graph import edits as graph
from pipeline.package.adapter_files import PARTS, Slot, tensor_name

if TYPE_CHECKING:
    import onnx

_PROJECTION = re.compile(r"model\.layers\.(\d+)\.(attn|self_attn|mlp)\.(\w+_proj)")
_LEAST_IR = 4  # from this version of the format on, an initializer may be the default of an input


def add_slots(model: onnx.ModelProto, dtype: str) -> dict[str, Slot]:
    """Give every projection of attention and MLP a slot, and return them by module name.

    Projections that the exporter has packed into one (``qkv_proj``) have one slot. The product is added after the bias,
    which the runtime fuses with the projection.

    Args:
        model: edited in place.
        dtype: of the activations: ``float32`` or ``float16``.

    Raises:
        StageError: the graph has no projection that this function knows.
    """
    import onnx

    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    uses: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            uses.setdefault(name, []).append(node)
    slots: dict[str, Slot] = {}
    after: dict[str, list[onnx.NodeProto]] = {}  # output of a node → what follows it
    for node in model.graph.node:
        match = _PROJECTION.fullmatch(graph.path_of(node, "")) if node.op_type in ("MatMul", "MatMulNBits") else None
        if not match:
            continue
        name = f"model.layers.{match[1]}.{'mlp' if match[2] == 'mlp' else 'self_attn'}.{match[3]}"
        slots[name] = Slot(*_widths(node, initializers), dtype)
        last, users = node, uses.get(node.output[0], [])
        if len(users) == 1 and users[0].op_type == "Add" and any(value in initializers for value in users[0].input):
            last = users[0]
        result = last.output[0]
        last.output[0] = f"{result}/base"
        after[last.output[0]] = _branch(node.input[0], f"{result}/base", result, name)
    if not slots or model.ir_version < _LEAST_IR:
        raise StageError(
            "the graph has no place for adapters",
            why=f"its operators are {graph.operators(model)}, its format version is {model.ir_version}",
            fix="export with genai, optimum or native, and leave out `adapters` otherwise",
        )
    nodes = [item for node in model.graph.node for item in (node, *after.get(next(iter(node.output), ""), ()))]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    for name, slot in slots.items():
        _add_inputs(model, name, slot)
    return slots


def _widths(node: onnx.NodeProto, initializers: dict[str, onnx.TensorProto]) -> tuple[int, int]:
    if node.op_type == "MatMul":
        inputs, outputs = initializers[node.input[1]].dims
        return int(inputs), int(outputs)
    given = {attribute.name: int(attribute.i) for attribute in node.attribute}
    return given["K"], given["N"]


def _branch(source: str, base: str, result: str, name: str) -> list[onnx.NodeProto]:
    """Nodes for ``base + (source @ A) @ B``."""
    import onnx

    path, value = "/" + name.replace(".", "/"), source
    nodes = []
    for part in PARTS:
        output = f"{path}/{part}/output_0"
        nodes.append(
            onnx.helper.make_node("MatMul", [value, tensor_name(name, part)], [output], name=f"{path}/{part}/MatMul")
        )
        value = output
    return [*nodes, onnx.helper.make_node("Add", [base, value], [result], name=f"{path}/lora/Add")]


def _add_inputs(model: onnx.ModelProto, name: str, slot: Slot) -> None:
    """Inputs of ranks that no other slot shares, for an adapter may leave projections out, and their defaults."""
    import onnx

    rank = f"{name}.rank"
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(slot.dtype))
    for part, dims, empty in zip(
        PARTS, ((slot.inputs, rank), (rank, slot.outputs)), ((slot.inputs, 0), (0, slot.outputs)), strict=True
    ):
        full = tensor_name(name, part)
        model.graph.input.append(onnx.helper.make_tensor_value_info(full, kind, dims))
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(empty, slot.dtype), full))
