"""The PyTorch reference: the float32 model that a package must reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import audio_tower
from pipeline.checkpoint_files import family_of
from pipeline.errors import CheckpointError
from pipeline.family import HELD_WHOLE
from pipeline.tensors import Tensors

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class Reference:
    """A loaded checkpoint; ``eos`` are the ids that end an answer.

    Pictures and sounds are given by name as the model takes them: ``pixel_values``, ``image_grid_thw``;
    ``input_features``, ``feature_attention_mask``, ``attention_mask``.
    """

    model: Any
    tokenizer: Any
    eos: tuple[int, ...]

    @property
    def text(self) -> Any:
        """The language model, with its head: all of ``model`` but where that also hears."""
        return self.model.language_model if self.model.config.model_type == audio_tower.MODEL_TYPE else self.model

    def logits(self, ids: Sequence[int], **media: Any) -> npt.NDArray[np.float32]:
        """Logits ``[T, V]`` float32 after each of ``ids`` (``[T]``)."""
        import torch

        with torch.inference_mode():
            result: npt.NDArray[np.float32] = self.model(torch.tensor([list(ids)]), **media).logits[0].float().numpy()
        return result

    def greedy(self, prompt: Sequence[int], limit: int, **media: Any) -> tuple[list[int], bool]:
        """The most likely continuation of ``prompt``, and whether it ended (the end token is left out)."""
        import torch

        answer: list[int] = []
        given, cache = torch.tensor([list(prompt)]), None
        with torch.inference_mode():
            for _ in range(limit):
                out = self.model(given, past_key_values=cache, use_cache=True, **self._positions(cache), **media)
                media = {}  # they are in the cache now
                token = int(out.logits[0, -1].argmax())
                if token in self.eos:
                    return answer, True
                answer.append(token)
                given, cache = torch.tensor([[token]]), out.past_key_values
        return answer, False

    def _positions(self, cache: Any) -> dict[str, Any]:
        """Where the next token is, which models that see ask for: their positions are not numbers of tokens."""
        import torch

        seen = cache.get_seq_length() if cache is not None else 0
        return (
            {"cache_position": torch.tensor([seen])}
            if seen and hasattr(getattr(self.model, "model", None), "rope_deltas")
            else {}
        )


def load(checkpoint: Path, held_whole: int = HELD_WHOLE) -> Reference:
    """Load a checkpoint directory in float32 on the CPU.

    Of a model that would fill the memory the layers stay on the disk: each is read when its turn comes, and dropped.

    Args:
        held_whole: largest model that is loaded whole, in bytes of float32 weights.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    import torch
    import transformers

    family = family_of(checkpoint)
    kind = getattr(transformers, family.architecture) if family.multimodal else transformers.AutoModelForCausalLM
    try:
        model = kind.from_pretrained(
            checkpoint, dtype=torch.float32, local_files_only=True, **_placement(checkpoint, held_whole)
        ).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            "transformers cannot load the checkpoint", where=str(checkpoint), why=str(error)
        ) from error
    eos = model.generation_config.eos_token_id
    eos = eos if eos is not None else model.config.get_text_config(decoder=True).eos_token_id
    return Reference(model, tokenizer, tuple(eos) if isinstance(eos, list) else (eos,))


def _placement(checkpoint: Path, held_whole: int) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that leave the layers of a large model on the disk."""
    if 4 * Tensors(checkpoint).elements() <= held_whole:
        return {}
    family = family_of(checkpoint)
    text, head, towers = "model", "lm_head", list[str]()
    if family.sees:
        text, towers = "model.language_model", ["model.visual"]
    elif family.hears:
        text, head = f"{audio_tower.PREFIX}model", f"{audio_tower.PREFIX}lm_head"
        towers = ["audio_tower", "multi_modal_projector"]
    names = [f"{text}.{name}" for name in ("embed_tokens", "norm", "rotary_emb")]
    kept = dict.fromkeys([*names, head, *towers], "cpu")
    # The folder would take copies of tensors that are no safetensors: there are none.
    return {"device_map": {**kept, f"{text}.layers": "disk"}, "offload_folder": str(checkpoint)}
