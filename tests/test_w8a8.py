"""W8A8: integer products that lose little, do not depend on the tokens beside, and are the same on every processor."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.quantization import w8a8

RNG = np.random.default_rng(7)


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_mixing_is_its_own_inverse(size: int) -> None:
    matrix = w8a8.hadamard(size)
    np.testing.assert_allclose(matrix @ matrix, np.eye(size), atol=1e-6)
    np.testing.assert_array_equal(matrix, matrix.T)


@pytest.mark.parametrize(("columns", "block"), [(896, 64), (4864, 64), (96, 32), (7, 1)])
def test_blocks_divide_the_channels(columns: int, block: int) -> None:
    assert w8a8.block_of(columns) == block


@pytest.mark.parametrize("block", [1, 16])
def test_codes_stand_for_the_mixed_weight(block: int) -> None:
    weight = RNG.standard_normal((40, 64)).astype(np.float32) * np.float32(0.02)
    weight[3] = 0.0
    weight[5, 7] = 3.0  # an outlier
    made = w8a8.quantize(weight, block)
    assert np.abs(made.codes).max() == w8a8.LIMIT
    mixed = (weight.reshape(-1, block) @ w8a8.hadamard(block)).reshape(weight.shape)
    stored = made.codes.T * made.scale[:, None]
    error = np.square(stored - mixed).sum() / np.square(mixed).sum()
    np.testing.assert_allclose(made.relative_error, error, rtol=1e-3)
    assert error < (1e-3 if block > 1 else 0.02)  # unmixed, the outlier costs its whole channel
    assert not stored[3].any()


def test_no_sum_of_two_products_leaves_16_bits() -> None:
    """What processors without VNNI add two products of uint8 and int8 in."""
    assert 2 * 255 * w8a8.LIMIT <= 2**15 - 1 < 2 * 255 * (w8a8.LIMIT + 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weight = np.ones((4, 16), np.float32)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        w8a8.quantize(weight, 16)


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "tied"), [("qwen2", False), ("qwen2", True), ("qwen3", False)])
def test_a_model_of_integer_products_is_near_its_reference(
    model_type: str, tied: bool, checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    from pipeline.checkpoint import reference
    from pipeline.export import exporter
    from pipeline.facts.scheme import Scheme
    from pipeline.fidelity import metrics
    from pipeline.graph import edits as graph
    from pipeline.quantization import quantizer
    from pipeline.runtime import generate, session

    checkpoint = checkpoint_of(model_type, tied)
    exporter.export_genai(checkpoint, tmp_path / "float", {}, "CPUExecutionProvider", "float32")
    scheme = Scheme.model_validate(
        {
            "algorithm": "w8a8",
            "body": {"bits": 8, "block_size": -1, "symmetric": True},
            "head": {"bits": 8, "block_size": 32, "symmetric": True},
            "embedding": "shared" if tied else "float",
        }
    )
    assert not scheme.problems()
    out = tmp_path / "w8a8"
    out.mkdir()
    facts = quantizer.quantize(tmp_path / "float", checkpoint, out, scheme, lambda *_: None)
    body = sum(weight.role == "body" for weight in graph.weights(graph.load(tmp_path / "float" / "model.onnx")))
    assert facts["operators"]["MatMulIntegerToFloat"] == body > 0
    shutil.copyfile(tmp_path / "float" / "genai_config.json", out / "genai_config.json")
    model, opened = reference.load(checkpoint), session.open_package(out)
    ids = [int(token) for token in np.random.default_rng(3).integers(3, 250, 40)]
    wanted = metrics.log_softmax(model.logits(ids))
    whole, single = generate.prefill_logits(opened, ids), generate.decode_logits(opened, ids)
    for found in (whole, single):
        assert float(metrics.kl_divergence(wanted, metrics.log_softmax(found)).mean()) < 0.05
    # A token's scale is its own: what stands beside it changes nothing but the order of sums, and with it a rounding.
    assert float(metrics.kl_divergence(metrics.log_softmax(whole), metrics.log_softmax(single)).mean()) < 1e-3
