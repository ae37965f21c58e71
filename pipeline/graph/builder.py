"""Writing an ONNX graph node by node, its weights straight to disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.graph.external_data import INLINE_BYTES, ExternalDataWriter

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

MICROSOFT = "com.microsoft"


class GraphBuilder:
    """Collects nodes, whose outputs are called like them, and constants.

    Args:
        writer: takes the constants that are not tiny; without it all are kept in the model.
    """

    def __init__(self, writer: ExternalDataWriter | None = None) -> None:
        self._writer = writer
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def constant(self, name: str, values: npt.NDArray[Any]) -> str:
        """An initializer, written once."""
        import onnx

        if name not in self._constants:
            values = np.asarray(values, order="C")  # ascontiguousarray would make a scalar a vector
            if self._writer is not None and values.nbytes >= INLINE_BYTES:
                self._constants[name] = self._writer.write(name, values)
            else:
                self._constants[name] = onnx.numpy_helper.from_array(values, name)
        return name

    def constant_of_parts(self, name: str, dtype: type, dims: Sequence[int], parts: Iterable[npt.NDArray[Any]]) -> str:
        """An initializer that is written part by part, and need not fit into memory."""
        if self._writer is None:
            return self.constant(name, np.concatenate([part.reshape(-1) for part in parts]).reshape(dims))
        self._constants[name] = self._writer.write_parts(name, dtype, dims, parts)
        return name

    def ints(self, *values: int) -> str:
        """An int64 vector."""
        return self.constant("ints." + "_".join(map(str, values)), np.array(values, np.int64))

    def node(
        self,
        kind: str,
        inputs: Sequence[str],
        name: str,
        outputs: Sequence[str] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """A node called ``name/kind``; returns its first output, ``name`` unless ``outputs`` are given."""
        import onnx

        outputs = outputs or [name]
        made = onnx.helper.make_node(kind, inputs, outputs, name=f"{name}/{kind}", domain=domain, **attributes)
        self._nodes.append(made)
        return outputs[0]

    def input(self, name: str, dtype: type, shape: Sequence[int | str]) -> str:
        self._inputs.append(_declared(name, dtype, shape))
        return name

    def output(self, name: str, dtype: type, shape: Sequence[int | str]) -> None:
        self._outputs.append(_declared(name, dtype, shape))

    def model(self, name: str, opset: int) -> onnx.ModelProto:
        import onnx

        graph = onnx.helper.make_graph(self._nodes, name, self._inputs, self._outputs, list(self._constants.values()))
        opsets = [onnx.helper.make_opsetid("", opset)]
        if any(node.domain == MICROSOFT for node in self._nodes):
            opsets.append(onnx.helper.make_opsetid(MICROSOFT, 1))
        return onnx.helper.make_model(graph, opset_imports=opsets, producer_name="qwen-onnx", ir_version=10)


def _declared(name: str, dtype: type, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    import onnx

    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
