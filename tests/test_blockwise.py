"""Block-wise quantization: no worse than rounding, honest about its error, and what ONNX Runtime computes with."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from pipeline.quantization import blockwise

Floats = np.ndarray[Any, np.dtype[np.float32]]
RANDOM = np.random.default_rng(7)


def with_outlier(weight: Floats) -> Floats:
    changed = weight.copy()
    changed[:, 5] = 100.0
    return changed


NORMAL = RANDOM.standard_normal((24, 256)).astype(np.float32)
WEIGHTS: dict[str, Floats] = {
    "normal": NORMAL,
    "heavy-tailed": RANDOM.standard_t(2, (24, 256)).astype(np.float32),
    "all positive": np.abs(NORMAL) + 1,
    "tiny": NORMAL * np.float32(1e-20),
    "constant": np.full((4, 64), 0.3, np.float32),
    "negative constant": np.full((4, 64), -0.3, np.float32),
    "zero": np.zeros((4, 64), np.float32),
    "one outlier": with_outlier(NORMAL),
    "columns that fill no block": NORMAL[:, :203],
}


def rounded_to_nearest(weight: Floats, bits: int, block: int, symmetric: bool) -> Floats:
    """Plain min-max rounding, written down independently: symmetric codes take the signed maximum as their end."""
    padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % block))).astype(np.float64).reshape(len(weight), -1, block)
    low, high = padded.min(-1, keepdims=True), padded.max(-1, keepdims=True)
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    if symmetric:
        scale, zero = np.where(high > -low, high, low) / -middle, np.full_like(low, middle)
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scale = (high - low) / top
        zero = np.round(-low / np.where(scale == 0, 1, scale))
    codes = np.clip(np.round(padded / np.where(scale == 0, 1, scale) + zero), 0, top)
    return ((codes - zero) * scale).reshape(len(weight), -1)[:, : weight.shape[1]].astype(np.float32)


def squared_error(weight: Floats, other: Floats) -> float:
    return float(((weight.astype(np.float64) - other) ** 2).sum())


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "symmetric"), list(product((4, 8), (True, False))))
@pytest.mark.parametrize("name", WEIGHTS)
def test_no_weight_is_worse_off_than_by_rounding_and_the_error_is_the_real_one(
    name: str, bits: int, symmetric: bool
) -> None:
    weight = WEIGHTS[name]
    energy = squared_error(weight, np.zeros_like(weight))
    for block in (16, 32, 128):
        quantized = blockwise.quantize(weight, bits, block, symmetric)
        restored = blockwise.dequantize(quantized, bits, weight.shape[1])
        assert restored.shape == weight.shape
        error = squared_error(weight, restored)
        bound = squared_error(weight, rounded_to_nearest(weight, bits, block, symmetric))
        assert error <= bound * (1 + 1e-5) + 1e-12 * energy  # float32 has its own rounding
        assert quantized.relative_error == pytest.approx(error / energy if energy else 0.0, rel=1e-2, abs=1e-6)


@pytest.mark.slow
def test_least_squares_scales_gain_what_they_are_for() -> None:
    for symmetric, most in ((True, 0.93), (False, 0.97)):
        error = squared_error(NORMAL, blockwise.dequantize(blockwise.quantize(NORMAL, 4, 32, symmetric), 4, 256))
        assert error < most * squared_error(NORMAL, rounded_to_nearest(NORMAL, 4, 32, symmetric))


@pytest.mark.slow
def test_the_result_does_not_depend_on_how_much_is_worked_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = blockwise.quantize(NORMAL, 4, 32, False)
    monkeypatch.setattr(blockwise, "_CHUNK", 5 * 256)
    parts = blockwise.quantize(NORMAL, 4, 32, False)
    assert (parts.packed == whole.packed).all()
    np.testing.assert_allclose(parts.scale, whole.scale, rtol=1e-6)  # sums of other shapes may round differently
    assert parts.zero_point is not None
    assert (parts.zero_point == whole.zero_point).all()
    assert parts.relative_error == pytest.approx(whole.relative_error)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(bad: float) -> None:
    weight = NORMAL.copy()
    weight[3, 100] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        blockwise.quantize(weight, 4, 32, True)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "block"), [(3, 32), (4, 8), (4, 48), (2, 32)])
def test_what_no_kernel_computes_with_is_refused(bits: int, block: int) -> None:
    with pytest.raises(ValueError, match="MatMulNBits takes 4 or 8"):
        blockwise.quantize(NORMAL, bits, block, True)


def run_node(
    op_type: str, inputs: dict[str, Any], constants: dict[str, Any], columns: int, **attributes: int
) -> Floats:
    """The output of one ``com.microsoft`` node in ONNX Runtime."""
    import onnx
    import onnxruntime

    node = onnx.helper.make_node(op_type, [], ["out"], domain="com.microsoft", **attributes)
    order = {"MatMulNBits": ("a", "packed", "scale", "zero"), "GatherBlockQuantized": ("packed", "a", "scale", "zero")}
    node.input.extend(name for name in order[op_type] if name in inputs or name in constants)
    kind = onnx.helper.np_dtype_to_tensor_dtype(inputs["a"].dtype)
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [onnx.helper.make_tensor_value_info("a", kind, inputs["a"].shape)],
        [onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [len(inputs["a"]), columns])],
        [onnx.numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: Floats = session.run(None, inputs)[0]
    return result


@pytest.mark.slow
@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize(("bits", "symmetric"), list(product((4, 8), (True, False))))
def test_onnx_runtime_reads_the_packed_layout_as_dequantize_does(bits: int, symmetric: bool, block: int) -> None:
    weight = RANDOM.standard_normal((20, 384)).astype(np.float32) + 0.4  # at block 128, 3 zero points: an odd number
    quantized = blockwise.quantize(weight, bits, block, symmetric)
    restored = blockwise.dequantize(quantized, bits, 384)
    zero = {} if quantized.zero_point is None else {"zero": quantized.zero_point}

    a = RANDOM.standard_normal((3, 384)).astype(np.float32)
    constants = {"packed": quantized.packed, "scale": quantized.scale, **zero}
    product_ = run_node(
        *("MatMulNBits", {"a": a}, constants, 20), K=384, N=20, bits=bits, block_size=block, accuracy_level=1
    )
    np.testing.assert_allclose(product_, a @ restored.T, rtol=1e-4, atol=1e-3)

    indices = np.array([0, 19, 7, 7], np.int64)
    constants["packed"] = quantized.packed.reshape(20, -1)
    rows = run_node(
        *("GatherBlockQuantized", {"a": indices}, constants, 384),
        bits=bits,
        block_size=block,
        gather_axis=0,
        quantize_axis=1,
    )
    np.testing.assert_allclose(rows, restored[indices], rtol=1e-6, atol=1e-7)
