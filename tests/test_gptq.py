"""GPTQ loses less than rounding, on the inputs that it was shown; the Hessians are those of the model's own run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.checkpoint import reference
from pipeline.errors import StageError
from pipeline.facts import texts
from pipeline.quantization import blockwise, calibration, gptq

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

    made = gptq.quantize(weight, gptq.factor([hessian]), 4, block_size, symmetric)
    assert error(made) < 0.8 * error(blockwise.quantize(weight, 4, block_size, symmetric))
    assert torch.equal(hessian, kept)
    real = np.square(blockwise.dequantize(made, 4, K) - weight).sum() / np.square(weight).sum()
    assert made.relative_error == pytest.approx(real, rel=1e-4)


def test_a_wide_weight_is_quantized_by_diagonal_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as if it were a weight of its own."""
    import torch

    inputs = torch.from_numpy(_inputs(256))
    weight = np.random.default_rng(1).standard_normal((N, K)).astype(np.float32)
    monkeypatch.setattr(gptq, "_WIDTH", 96)
    hessian = gptq.hessian(inputs)
    assert [block.shape[0] for block in hessian] == [96, 32]
    whole = gptq.quantize(weight, gptq.factor(hessian), 4, 32, False)
    restored = blockwise.dequantize(whole, 4, K)
    for block, columns in zip(hessian, (slice(0, 96), slice(96, 128)), strict=True):
        torch.testing.assert_close(block, inputs[:, columns].t() @ inputs[:, columns])
        part = gptq.quantize(weight[:, columns], gptq.factor([block]), 4, 32, False)
        width = weight[:, columns].shape[1]
        np.testing.assert_array_equal(blockwise.dequantize(part, 4, width), restored[:, columns])


def test_rows_do_not_depend_on_how_many_are_worked_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    inputs = _inputs(256)
    weight = np.random.default_rng(1).standard_normal((N, K)).astype(np.float32)
    hessian = torch.from_numpy(inputs.T @ inputs)
    whole = gptq.quantize(weight, gptq.factor([hessian]), 4, 32, False)
    monkeypatch.setattr(gptq, "_ROWS", 16)
    parts = gptq.quantize(weight, gptq.factor([hessian]), 4, 32, False)
    assert np.mean(whole.packed != parts.packed) < 0.01  # a matrix product may round differently by its shape


@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_that_do_not_correlate_leave_plain_rounding(symmetric: bool) -> None:
    import torch

    weight = np.random.default_rng(1).standard_normal((N, K)).astype(np.float32)
    made = gptq.quantize(weight, gptq.factor([7 * torch.eye(K)]), 4, 32, symmetric)
    plain = blockwise.quantize(weight, 4, 32, symmetric)
    np.testing.assert_allclose(made.scale, plain.scale, rtol=1e-5)
    if made.zero_point is None or plain.zero_point is None:
        assert made.zero_point is plain.zero_point
        zero = np.full(made.scale.shape, 8)
    else:
        np.testing.assert_array_equal(made.zero_point, plain.zero_point)
        zero = blockwise.unpack(made.zero_point, 4)
    wanted = np.rint(weight.reshape(N, -1, 32) / made.scale[..., None] + zero[..., None]).clip(0, 15)
    np.testing.assert_array_equal(blockwise.unpack(made.packed, 4), wanted)


def test_what_cannot_be_quantized_is_refused() -> None:
    import torch

    weight = np.zeros((2, 48), np.float32)
    with pytest.raises(ValueError, match="no multiple of the block size 32"):
        gptq.quantize(weight, gptq.factor([torch.eye(48)]), 4, 32, True)
    for bad in (np.nan, np.inf):
        weight = np.ones((2, 64), np.float32)
        weight[1, 63] = bad
        with pytest.raises(ValueError, match="NaN or infinite"):
            gptq.quantize(weight, gptq.factor([torch.eye(64)]), 4, 32, True)


CONFIGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "short context": {"max_position_embeddings": 64},
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_hessians_are_those_of_an_ordinary_run(
    model_type: str, config: str, checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    import torch

    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint_of(model_type), folder)
    settings = json.loads((folder / "config.json").read_bytes()) | CONFIGS[config]
    (folder / "config.json").write_text(json.dumps(settings))
    loaded = reference.load(folder)
    decoder = loaded.model.model
    watched = {}
    for index, layer in enumerate(decoder.layers):
        watched[f"layers.{index}.attention"] = layer.self_attn.q_proj
        watched[f"layers.{index}.heads"] = layer.self_attn.o_proj
        watched[f"layers.{index}.mlp"] = layer.mlp.gate_proj
        watched[f"layers.{index}.gated"] = layer.mlp.down_proj
    watched["head"] = loaded.model.lm_head
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def add(module: object, arguments: tuple[torch.Tensor, ...]) -> None:
            flat = arguments[0].reshape(-1, arguments[0].shape[-1])
            sums[name] = sums.get(name, 0) + flat.t() @ flat

        return add

    for name, module in watched.items():
        module.register_forward_pre_hook(watch(name))
    length = min(512, settings["max_position_embeddings"])
    texts_read = [loaded.tokenizer(text, verbose=False)["input_ids"] for text in texts.CALIBRATION.read().values()]
    with torch.inference_mode():
        loaded.model(torch.tensor([ids[:length] for ids in texts_read[:3]]))

    found = calibration.Hessians(folder, 3)
    assert not found.of("model.embed_tokens")
    names = {  # both exporters' names
        "attention": ("attn.qkv_proj", "attn.q_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "heads": ("attn.o_proj", "self_attn.o_proj"),
        "mlp": ("mlp.gate_proj", "mlp.up_proj"),
        "gated": ("mlp.down_proj",),
    }
    for index in range(len(decoder.layers)):
        for kind, paths in names.items():
            for path in paths:
                (hessian,) = found.of(f"model.layers.{index}.{path}")
                torch.testing.assert_close(hessian, sums[f"layers.{index}.{kind}"], rtol=1e-3, atol=2e-2)
    torch.testing.assert_close(found.of("lm_head")[0], sums["head"], rtol=1e-3, atol=2e-2)
    with pytest.raises(StageError, match="comes too late"):
        found.of("model.layers.1.mlp.up_proj")


def test_a_layer_may_be_left_out(checkpoint_of: Callable[..., Path]) -> None:
    import torch

    folder = checkpoint_of("qwen2")
    every, last = calibration.Hessians(folder, 2), calibration.Hessians(folder, 2)
    every.of("model.layers.0.mlp.down_proj")
    path = "model.layers.1.mlp.down_proj"
    assert torch.equal(last.of(path)[0], every.of(path)[0])


def test_what_follows_a_replaced_weight_sees_it(checkpoint_of: Callable[..., Path]) -> None:
    """The second walk goes over a model whose weights were other ones from the start."""
    import torch

    folder = checkpoint_of("qwen2")
    changed = calibration.Hessians(folder, 2)
    layer = reference.load(folder).model.model.layers[0]
    fused = torch.cat([getattr(layer.self_attn, f"{name}_proj").weight for name in "qkv"]).detach()
    rounded = (fused * 8).round() / 8
    plain = changed.of("model.layers.0.attn.qkv_proj")[0].clone()
    changed.replace("model.layers.0.attn.qkv_proj", rounded.numpy)
    changed.replace("model.layers.0.mlp.down_proj", lambda: np.zeros_like(layer.mlp.down_proj.weight.detach().numpy()))

    model = reference.load(folder).model
    attention = model.model.layers[0].self_attn
    parts = rounded.split([attention.q_proj.out_features, *[attention.k_proj.out_features] * 2])
    for name, part in zip("qkv", parts, strict=True):
        getattr(attention, f"{name}_proj").weight.data = part
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    seen: list[torch.Tensor] = []
    model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].flatten(0, 1).clone())
    )
    with torch.inference_mode():
        model(torch.tensor(calibration.windows(folder, 2)))
    (found,) = changed.of("model.layers.1.attn.qkv_proj")
    torch.testing.assert_close(found, seen[0].t() @ seen[0], rtol=1e-3, atol=2e-2)
    assert not torch.allclose(found, calibration.Hessians(folder, 2).of("model.layers.1.attn.qkv_proj")[0], rtol=1e-2)
    assert torch.equal(plain, calibration.Hessians(folder, 2).of("model.layers.0.attn.qkv_proj")[0])
    with pytest.raises(StageError, match="comes too late"):
        changed.replace("model.layers.0.mlp.up_proj", rounded.numpy)


def test_the_domains_take_turns_until_their_text_ends(checkpoint_of: Callable[..., Path]) -> None:
    tokenizer = reference.load(checkpoint_of("qwen2")).tokenizer
    corpus = [tokenizer(text, verbose=False)["input_ids"] for text in texts.CALIBRATION.read().values()]
    rows = calibration._read(tokenizer, 6).tolist()
    assert rows == [ids[:512] for ids in corpus] + [ids[512:1024] for ids in corpus[:2]]
    assert len(calibration._read(tokenizer, 1000)) == sum(len(ids) // 512 for ids in corpus)
