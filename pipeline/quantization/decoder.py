"""The decoder of a checkpoint, one layer in memory at a time: a walk over a model needs no more than that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint import reference
from pipeline.checkpoint.files import family_of
from pipeline.checkpoint.tensors import Tensors
from pipeline.errors import StageError
from pipeline.facts import multimodal
from pipeline.quantization import rotation

if TYPE_CHECKING:
    import torch


class Decoder:
    """The parts of a text model, or of that inside a model that sees, in float32, read from safetensors when asked for.

    Args:
        checkpoint: directory of the reference.
        rotate: whether the weights are those of the rotated model (`pipeline.quantization.rotation`), which is held
            whole.

    Raises:
        CheckpointError: its configuration or its weights cannot be read.
    """

    def __init__(self, checkpoint: Path, rotate: bool = False) -> None:
        import torch
        import transformers

        family = family_of(checkpoint)
        self._whole = rotate
        layout = multimodal.in_memory(family)
        if rotate:
            model = reference.load(checkpoint).model
            rotation.rotate(model)
            self._prefix = layout.text
        else:
            self._tensors = Tensors(checkpoint)
            config = transformers.AutoConfig.from_pretrained(checkpoint, local_files_only=True)
            with torch.device("meta"):
                model = getattr(transformers, family.architecture)._from_config(config, dtype=torch.float32).eval()
            self._prefix = multimodal.in_files(family, list(self._tensors)).text
        self._text = model.get_submodule(layout.text)
        # A text has one position a token; models that see take it for all three of theirs.
        self._axes = (3, 1) if family.sees else (1,)
        self.config = self._text.config
        # Its frequencies are computed when it is made, which a meta device does not.
        self._rotary = type(self._text.rotary_emb)(self.config)

    @property
    def count(self) -> int:
        """Number of layers."""
        return len(self._text.layers)

    def kinds(self, index: int) -> tuple[str, ...]:
        """The inputs of a layer's projections, in the order of computation: `pipeline.quantization.calibration`."""
        mlp = self._text.layers[index].mlp
        if not hasattr(mlp, "experts"):
            return ("attention", "heads", "mlp", "gated")
        return ("attention", "heads", *(("mlp", "gated") if hasattr(mlp, "shared_expert") else ()), "experts")

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings ``[W, T, H]`` of ids ``[W, T]``."""
        return self._call("embed_tokens", ids)

    def rotary(self, hidden: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the positions before ``length``, in the dtype of ``hidden``."""
        import torch

        found: tuple[torch.Tensor, torch.Tensor] = self._rotary(
            hidden, torch.arange(length).expand(*self._axes, length)
        )
        return found

    def layers(self) -> Iterator[Any]:
        """The layers, each of which holds its weights until the next is asked for."""
        for index in range(self.count):
            layer = self._load(f"layers.{index}")
            yield layer
            self._drop(layer)

    def last_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head reads."""
        return self._call("norm", hidden)

    def _call(self, path: str, given: torch.Tensor) -> torch.Tensor:
        module = self._load(path)
        found: torch.Tensor = module(given)
        self._drop(module)
        return found

    def _load(self, path: str) -> Any:
        module = self._text.get_submodule(path)
        if not self._whole:
            module.load_state_dict(self._tensors.below(f"{self._prefix}.{path}."), assign=True)
        return module

    def _drop(self, module: Any) -> None:
        if not self._whole:
            module.to("meta")


# As the genai builder fuses them, and as `MoE` nodes have them: the latter's rows are in turns.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def layer_of(path: str) -> int | None:
    """The index of the layer that a weight belongs to, by its path; ``None`` for head and embedding."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def projections(layer: Any, path: str) -> list[Any]:
    """The modules of a layer whose weights, one after the other, are the weight at ``path`` of a graph.

    Raises:
        StageError: the layer has no such module.
    """
    parts = path.split(".")
    owners: tuple[Any, ...] = (layer.self_attn, layer.mlp)
    if "experts" in parts:
        owners = (layer.mlp.experts[expert_of(path)],)
    elif "shared_expert" in parts:
        owners = (layer.mlp.shared_expert,)
    found = []
    for part in _FUSED.get(parts[-1], (parts[-1],)):
        owner = next((owner for owner in owners if hasattr(owner, part)), None)
        if owner is None:
            raise StageError(f"a decoder layer has no {part}", where=path)
        found.append(getattr(owner, part))
    return found


def expert_of(path: str) -> int:
    """The index of the expert that a weight (``….experts.3.down_proj``) belongs to."""
    parts = path.split(".")
    return int(parts[parts.index("experts") + 1])
