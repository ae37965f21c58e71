"""Experts in integers: ``MoE`` nodes become ``QMoE`` nodes, an expert in memory at a time.

Shapes in this module:
    E: experts of a layer, N: output channels, K: input channels, B: block size.

Of each of its two weights ``QMoE`` (ONNX Runtime, docs/ContribOperators.md) takes the codes ``[E, N, K * bits / 8]``,
the scales ``[E, N, K / B]`` and, unless symmetric, the zero points, packed like the codes: the layout of
`pipeline.quantization.blockwise`, an expert after the other. The weights of the chosen experts it normalizes, unless it
is given the router's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import StageError
from pipeline.facts.scheme import WeightScheme
from pipeline.graph import edits as graph
from pipeline.graph.edits import MICROSOFT, Weight
from pipeline.graph.external_data import ExternalDataWriter, read_tensor
from pipeline.quantization import blockwise

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

QuantizeWeight = Callable[[str, "npt.NDArray[Any]", WeightScheme], blockwise.BlockQuantized]

# Inputs of a QMoE node: of its first and its second weight the codes, the scales and the zero points.
_CODES, _SCALES, _ZEROS = (2, 5), (3, 6), (11, 12)
ROUTER_WEIGHTS = 14
PARTS = ("gate_up_proj", "down_proj")  # what the two weights of an expert are called, below its path
_KEPT = ("k", "activation_type", "swiglu_fusion", "activation_alpha", "activation_beta", "normalize_routing_weights")


def become_quantized(
    node: onnx.NodeProto,
    weight: Weight,
    scheme: WeightScheme,
    accuracy_level: int,
    initializers: Mapping[str, onnx.TensorProto],
    source: Path,
    writer: ExternalDataWriter,
    written: dict[str, onnx.TensorProto],
    quantize: QuantizeWeight,
) -> dict[str, float]:
    """Make ``node`` (a ``MoE``) a ``QMoE``, which may need the node of `router_weights`.

    Args:
        initializers: of the model, whose external data lies in ``source``.
        written: gets the new ones.
        quantize: given the path of an expert's weight (``….experts.3.down_proj``), its values and its scheme.

    Returns:
        The relative squared error of each expert, and their mean, by their paths.

    Raises:
        StageError: blocks do not divide the input channels.
        ValueError: a weight has NaN or infinite values.
    """
    lost = np.zeros(weight.count // 3)
    total = np.zeros(weight.count // 3)
    inputs = [node.input[0], node.input[1], *[""] * 13]
    for place, part in enumerate(PARTS):
        name = node.input[graph.EXPERT_WEIGHTS[place]]
        values = read_tensor(initializers[name], source)
        experts, rows, columns = values.shape
        if columns % scheme.block_size:
            raise StageError(
                f"weight {weight.path} cannot be quantized",
                why=f"its {columns} input channels are no multiple of the block size {scheme.block_size}",
                fix="choose a block size that divides the hidden size and the inner size of an expert",
            )
        scales = np.empty((experts, rows, columns // scheme.block_size), values.dtype)
        zeros: list[npt.NDArray[np.uint8]] = []

        def codes(
            part: str = part,
            values: npt.NDArray[Any] = values,
            scales: npt.NDArray[Any] = scales,
            zeros: list[npt.NDArray[np.uint8]] = zeros,
        ) -> Iterator[npt.NDArray[np.uint8]]:
            for expert, matrix in enumerate(values):
                made = quantize(f"{weight.path}.{expert}.{part}", matrix, scheme)
                scales[expert] = made.scale
                if made.zero_point is not None:
                    zeros.append(made.zero_point)
                energy = float(np.square(matrix, dtype=np.float32).sum(dtype=np.float64))
                lost[expert] += made.relative_error * energy
                total[expert] += energy
                yield made.packed

        stored = f"{name}_Q{scheme.bits}"
        dims = (experts, rows, columns * scheme.bits // 8)
        written[stored] = writer.write_parts(stored, np.uint8, dims, codes())
        inputs[_CODES[place]] = stored
        inputs[_SCALES[place]] = f"{name}_scales"
        written[f"{name}_scales"] = writer.write(f"{name}_scales", scales)
        if zeros:
            inputs[_ZEROS[place]] = f"{name}_zero_point"
            written[f"{name}_zero_point"] = writer.write(f"{name}_zero_point", np.stack(zeros))
    if any(attribute.name == "normalize_routing_weights" and not attribute.i for attribute in node.attribute):
        inputs[ROUTER_WEIGHTS] = f"{node.output[0]}/router_weights"
    while not inputs[-1]:
        inputs.pop()
    _become(node, inputs, scheme, accuracy_level)
    errors = np.divide(lost, total, out=np.zeros_like(lost), where=total > 0)
    each = {f"{weight.path}.{expert}": float(error) for expert, error in enumerate(errors)}
    return {**each, weight.path: float(errors.mean())}


def _become(node: onnx.NodeProto, inputs: list[str], scheme: WeightScheme, accuracy_level: int) -> None:
    import onnx

    kept = [attribute for attribute in node.attribute if attribute.name in _KEPT]
    made: dict[str, int] = {
        "expert_weight_bits": scheme.bits,
        "block_size": scheme.block_size,
        "weights_prepacked": 0,  # the layout is that of all providers, not one provider's own
    }
    if accuracy_level:
        made["accuracy_level"] = accuracy_level
    attributes = [*kept, *(onnx.helper.make_attribute(key, value) for key, value in made.items())]
    del node.attribute[:]
    node.attribute.extend(sorted(attributes, key=lambda attribute: attribute.name))
    node.op_type, node.domain = "QMoE", MICROSOFT
    node.input[:] = inputs


def router_weights(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The node, to be put before ``node`` (a ``QMoE``), that makes the router's weights, if it needs them.

    The operator ignores that weights are not to be normalized, unless it is given them. Where they are, not all
    providers take them.
    """
    import onnx

    if len(node.input) <= ROUTER_WEIGHTS:
        return []
    name = f"{node.name.rpartition('/')[0]}/router_weights/Softmax"
    return [onnx.helper.make_node("Softmax", [node.input[1]], [node.input[ROUTER_WEIGHTS]], name=name, axis=-1)]


def scheme_of(node: onnx.NodeProto) -> WeightScheme:
    """How the weights of a ``QMoE`` are quantized."""
    values = {attribute.name: attribute.i for attribute in node.attribute}
    return WeightScheme(
        bits=values["expert_weight_bits"],
        block_size=values["block_size"],
        symmetric=len(node.input) <= _ZEROS[0] or not node.input[_ZEROS[0]],
    )
