"""GPTQ loses less than rounding, on the inputs that it was shown; the Hessians are those of the model's own run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline import blockwise, calibration, gptq, reference
from pipeline.errors import StageError

pytestmark = pytest.mark.slow

N, K = 48, 128


def _inputs(samples: int, dead: int | None = None) -> np.ndarray:
    """Correlated inputs ``[samples, K]``, as activations are."""
    random = np.random.default_rng(0)
    mixing = random.standard_normal((K // 4, K)) * np.linspace(0.1, 3.0, K)
    found = (random.standard_normal((samples, K // 4)) @ mixing + 0.1 * random.standard_normal((samples, K))).astype(
        np.float32
    )
    if dead is not None:
        found[:, dead] = 0
    return found


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize(("samples", "dead"), [(512, None), (512, 5), (20, None)])
def test_the_output_error_is_smaller_than_by_rounding(
    symmetric: bool, block_size: int, samples: int, dead: int | None
) -> None:
    import torch

    inputs = _inputs(samples, dead)
    weight = np.random.default_rng(1).standard_normal((N, K)).astype(np.float32)
    hessian = torch.from_numpy(inputs.T @ inputs)
    kept = hessian.clone()

    def error(quantized: blockwise.BlockQuantized) -> float:
        return float(np.linalg.norm(inputs @ (blockwise.dequantize(quantized, 4, K) - weight).T))

    made = gptq.quantize(weight, hessian, 4, block_size, symmetric)
    assert error(made) < 0.8 * error(blockwise.quantize(weight, 4, block_size, symmetric))
    assert torch.equal(hessian, kept)
    real = np.square(blockwise.dequantize(made, 4, K) - weight).sum() / np.square(weight).sum()
    assert made.relative_error == pytest.approx(real, rel=1e-4)


def test_rows_do_not_depend_on_how_many_are_worked_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    inputs = _inputs(256)
    weight = np.random.default_rng(1).standard_normal((N, K)).astype(np.float32)
    hessian = torch.from_numpy(inputs.T @ inputs)
    whole = gptq.quantize(weight, hessian, 4, 32, False)
    monkeypatch.setattr(gptq, "_ROWS", 16)
    parts = gptq.quantize(weight, hessian, 4, 32, False)
    assert np.mean(whole.packed != parts.packed) < 0.01  # a matrix product may round differently by its shape


def test_what_cannot_be_quantized_is_refused() -> None:
    import torch

    weight = np.zeros((2, 48), np.float32)
    with pytest.raises(ValueError, match="no multiple of the block size 32"):
        gptq.quantize(weight, torch.eye(48), 4, 32, True)
    weight = np.full((2, 64), np.nan, np.float32)
    with pytest.raises(ValueError, match="NaN"):
        gptq.quantize(weight, torch.eye(64), 4, 32, True)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("attention", ["attn.qkv_proj", "self_attn.k_proj"])
def test_hessians_are_those_of_an_ordinary_run(
    model_type: str, attention: str, checkpoint_of: Callable[..., Path]
) -> None:
    import torch

    folder = checkpoint_of(model_type)
    loaded = reference.load(folder)
    decoder = loaded.model.model
    watched = {}
    for index, layer in enumerate(decoder.layers):
        watched[f"model.layers.{index}.{attention}"] = layer.self_attn.q_proj
        watched[f"model.layers.{index}.attn.o_proj"] = layer.self_attn.o_proj
        watched[f"model.layers.{index}.mlp.up_proj"] = layer.mlp.gate_proj
        watched[f"model.layers.{index}.mlp.down_proj"] = layer.mlp.down_proj
    watched["lm_head"] = loaded.model.lm_head
    sums: dict[str, torch.Tensor] = {}

    def watch(path: str) -> Callable[..., None]:
        def add(module: object, arguments: tuple[torch.Tensor, ...]) -> None:
            flat = arguments[0].reshape(-1, arguments[0].shape[-1])
            sums[path] = sums.get(path, 0) + flat.t() @ flat

        return add

    for path, module in watched.items():
        module.register_forward_pre_hook(watch(path))
    with torch.inference_mode():
        loaded.model(calibration._read(loaded.tokenizer, 3))
    found = calibration.Hessians(folder, 3)
    assert found.of("model.embed_tokens") is None
    for path in watched:
        torch.testing.assert_close(found.of(path), sums[path], rtol=2e-4, atol=1e-3)
    with pytest.raises(StageError, match="not in the layers' order"):
        found.of("model.layers.0.mlp.up_proj")
