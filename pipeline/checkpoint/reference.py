"""The PyTorch reference: the float32 model that a package must reproduce."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint.files import family_of
from pipeline.checkpoint.tensors import Tensors
from pipeline.errors import CheckpointError
from pipeline.facts import multimodal
from pipeline.facts.family import FAMILIES, HELD_WHOLE

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class Reference:
    """A loaded checkpoint; ``eos`` are the ids that end an answer.

    Pictures and sounds are given by name as the model takes them: ``pixel_values``, ``image_grid_thw``;
    ``input_features``, ``feature_attention_mask``.
    """

    model: Any
    tokenizer: Any
    eos: tuple[int, ...]

    @property
    def text(self) -> Any:
        """The language model with its head: all of ``model``, but where that has it apart from a tower."""
        head = multimodal.in_memory(FAMILIES[self.model.config.model_type]).head
        return self.model.get_submodule(head.rpartition(".")[0])

    @property
    def decoder(self) -> Any:
        """The language model without its head."""
        return self.model.get_submodule(multimodal.in_memory(FAMILIES[self.model.config.model_type]).text)

    def logits(self, ids: Sequence[int], **media: Any) -> npt.NDArray[np.float32]:
        """Logits ``[T, V]`` float32 after each of ``ids`` (``[T]``)."""
        import torch

        with torch.inference_mode():
            given = torch.tensor([list(ids)])
            out = self.model(given, **_masked(given, media))
            result: npt.NDArray[np.float32] = out.logits[0].float().numpy()
        return result

    def greedy(self, prompt: Sequence[int], limit: int, **media: Any) -> tuple[list[int], bool]:
        """The most likely continuation of ``prompt``, and whether it ended (the end token is left out)."""
        import torch

        answer: list[int] = []
        given, cache = torch.tensor([list(prompt)]), None
        media = _masked(given, media)
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
        inner = getattr(self.model, "model", None)
        return {"cache_position": torch.tensor([seen])} if seen and hasattr(inner, "rope_deltas") else {}


def _masked(ids: Any, media: Mapping[str, Any]) -> dict[str, Any]:
    """Pictures or sounds, and that all tokens are attended to, which a model that hears wants to be told."""
    import torch

    return {**media, "attention_mask": torch.ones_like(ids)} if media else {}


@contextmanager
def adapted(reference: Reference, adapter: Path) -> Iterator[Reference]:
    """The reference with the LoRA adapter that peft saved in the directory ``adapter``, which peft itself applies.

    The reference is used up meanwhile, and is as it was at the end.

    Raises:
        CheckpointError: peft cannot load it.
    """
    from peft import PeftModel

    try:
        wrapped = PeftModel.from_pretrained(reference.model, str(adapter), local_files_only=True).eval()
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError("peft cannot load the adapter", where=str(adapter), why=str(error)[:500]) from error
    try:
        yield replace(reference, model=wrapped)
    finally:
        wrapped.unload()


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
    layout = multimodal.in_memory(family_of(checkpoint))
    names = [f"{layout.text}.{name}" for name in ("embed_tokens", "norm", "rotary_emb")]
    kept = dict.fromkeys([*names, layout.head, *layout.towers], "cpu")
    # The folder would take copies of tensors that are no safetensors: there are none.
    return {"device_map": {**kept, f"{layout.text}.layers": "disk"}, "offload_folder": str(checkpoint)}
