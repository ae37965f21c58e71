"""A rotated model is the same function, in a basis where no channel stands out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.checkpoint import reference
from pipeline.quantization import rotation

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_logits_stay_and_gains_are_gone(model_type: str, tied: bool, checkpoint_of: Callable[..., Path]) -> None:
    import torch

    loaded = reference.load(checkpoint_of(model_type, tied))
    ids = list(range(3, 60))
    wanted = torch.from_numpy(loaded.logits(ids))
    embedding = loaded.model.model.embed_tokens.weight.clone()
    rotation.rotate(loaded.model)
    torch.testing.assert_close(
        torch.from_numpy(loaded.logits(ids)), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())
    )
    decoder = loaded.model.model
    assert not torch.allclose(decoder.embed_tokens.weight, embedding, atol=0.1)
    norms = [decoder.norm, *(layer.input_layernorm for layer in decoder.layers)]
    assert all(bool((norm.weight == 1).all()) for norm in norms)
    assert loaded.model.lm_head.weight is not decoder.embed_tokens.weight


@pytest.mark.parametrize("size", [2, 24, 64, 96, 896])
def test_a_rotation_spreads_a_single_channel_over_all(size: int) -> None:
    import torch

    matrix = rotation.orthogonal(size, torch.Generator().manual_seed(1))
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(matrix.abs().max()) <= (2 / size) ** 0.5 + 1e-12


def test_a_layer_with_unknown_parts_is_refused(checkpoint_of: Callable[..., Path]) -> None:
    import torch

    loaded = reference.load(checkpoint_of("qwen2"))
    loaded.model.model.layers[1].extra_norm = torch.nn.LayerNorm(64)
    with pytest.raises(ValueError, match="extra_norm"):
        rotation.rotate(loaded.model)
