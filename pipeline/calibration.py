"""What the weights of the reference see while it reads the calibration text: one Hessian for each kind of input.

Layers are walked one at a time, so that one layer's Hessians are held and not the model's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import reference, rotation, texts
from pipeline.errors import StageError

if TYPE_CHECKING:
    import torch

WINDOW_TOKENS = 512

# Projections that read the same input, by the last part of their path; `qkv_proj` is how the genai builder fuses three.
_INPUT = {
    "qkv_proj": "attention",
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "o_proj": "heads",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "gated",
    "lm_head": "head",
}


class Hessians:
    """Hessians of the projections, to be asked for in the order of the layers.

    Args:
        checkpoint: directory of the reference.
        windows: how many windows of `WINDOW_TOKENS` to read, the domains taking turns.
        rotate: whether the weights are those of the rotated model.
    """

    def __init__(self, checkpoint: Path, windows: int, rotate: bool = False) -> None:
        loaded = reference.load(checkpoint)
        if rotate:
            rotation.rotate(loaded.model)
        context = loaded.model.config.max_position_embeddings
        self._count = len(loaded.model.model.layers)
        self._layers = _walk(loaded.model, _read(loaded.tokenizer, windows, min(WINDOW_TOKENS, context)))
        self._at = -1
        self._now: dict[str, torch.Tensor] = {}

    def of(self, path: str) -> torch.Tensor | None:
        """``sum(x xᵀ)`` (``[K, K]`` float32) over the inputs of a weight; ``None`` for the embedding.

        Raises:
            StageError: the layer has been passed already.
        """
        parts = path.split(".")
        kind = _INPUT.get(parts[-1])
        if kind is None:
            return None
        layer = next((int(part) for part in parts if part.isdigit()), self._count)
        if layer < self._at:
            raise StageError(
                f"{path} comes after layer {self._at}", why="the graph's weights are not in the layers' order"
            )
        while self._at < layer:
            self._now = next(self._layers)
            self._at += 1
        return self._now[kind]


def windows(checkpoint: Path, count: int) -> list[list[int]]:
    """Token ids of ``count`` windows of calibration text, the domains taking turns."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    context = AutoConfig.from_pretrained(checkpoint, local_files_only=True).max_position_embeddings
    found: list[list[int]] = _read(tokenizer, count, min(WINDOW_TOKENS, context)).tolist()
    return found


def _read(tokenizer: Any, windows: int, length: int = WINDOW_TOKENS) -> torch.Tensor:
    """Token ids ``[windows, length]``; the text is short, so there may be fewer windows."""
    import torch

    corpus = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts.CALIBRATION.read().values()]
    rows: list[list[int]] = []
    for turn in range(windows):
        start = turn * length
        rows += [ids[start : start + length] for ids in corpus if len(ids) >= start + length]
    return torch.tensor(rows[:windows])


def _walk(model: Any, ids: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    """Run the decoder layer by layer; yields each layer's Hessians by kind of input, and last the head's."""
    import torch

    decoder = model.model
    with torch.inference_mode():
        hidden = decoder.embed_tokens(ids)
        positions = torch.arange(ids.shape[1])[None]
        rotary = decoder.rotary_emb(hidden, positions)
        for layer in decoder.layers:
            found: dict[str, torch.Tensor] = {}
            watched = {
                "attention": layer.self_attn.q_proj,
                "heads": layer.self_attn.o_proj,
                "mlp": layer.mlp.gate_proj,
                "gated": layer.mlp.down_proj,
            }
            hooks = [module.register_forward_pre_hook(_adder(found, kind)) for kind, module in watched.items()]
            for row in range(len(hidden)):
                out = layer(hidden[row : row + 1], position_ids=positions, position_embeddings=rotary)
                hidden[row] = out[0] if isinstance(out, tuple) else out
            for hook in hooks:
                hook.remove()
            yield found
        inputs = decoder.norm(hidden).reshape(-1, hidden.shape[-1])
        yield {"head": inputs.t() @ inputs}


def _adder(found: dict[str, torch.Tensor], kind: str) -> Any:
    def add(module: Any, arguments: tuple[Any, ...]) -> None:  # noqa: ARG001
        inputs = arguments[0].reshape(-1, arguments[0].shape[-1])
        if kind in found:
            found[kind].addmm_(inputs.t(), inputs)
        else:
            found[kind] = inputs.t() @ inputs

    return add
