"""How long this machine's kernel takes to multiply a quantized weight with one token, which is what decoding does."""

from __future__ import annotations

import statistics
import time
from functools import cache

import numpy as np

from pipeline.facts.scheme import WeightScheme
from pipeline.graph.edits import MICROSOFT
from pipeline.quantization import blockwise
from pipeline.runtime.session import available_threads

_WARM, _RUNS = 3, 15


@cache
def seconds(rows: int, columns: int, scheme: WeightScheme, accuracy_level: int) -> float:
    """Median time of a ``MatMulNBits`` with weight ``[rows, columns]`` and one token; the values do not matter."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    groups = -(-columns // scheme.block_size)
    parts = {
        "codes": random.integers(0, 256, (rows, groups, scheme.block_size * scheme.bits // 8), np.uint8),
        "scales": random.random((rows, groups), np.float32) * np.float32(0.01),
    }
    if not scheme.symmetric:
        zero = random.integers(0, 1 << scheme.bits, (rows, groups), np.uint8)
        parts["zero_points"] = blockwise.pack(zero, scheme.bits)
    node = helper.make_node(
        "MatMulNBits",
        ["x", *parts],
        ["y"],
        domain=MICROSOFT,
        N=rows,
        K=columns,
        bits=scheme.bits,
        block_size=scheme.block_size,
        accuracy_level=accuracy_level,
    )
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, columns])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, rows])
    constants = [numpy_helper.from_array(values, name) for name, values in parts.items()]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(MICROSOFT, 1)]
    model: onnx.ModelProto = helper.make_model(
        helper.make_graph([node], "product", [given], [result], constants), opset_imports=opsets, ir_version=10
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    token = {"x": random.standard_normal((1, columns)).astype(np.float32)}
    taken = []
    for _ in range(_WARM + _RUNS):
        start = time.perf_counter()
        session.run(None, token)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[_WARM:])
