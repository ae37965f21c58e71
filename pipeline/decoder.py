"""The decoder of a checkpoint, one layer in memory at a time: a walk over a model needs no more than that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import reference, rotation
from pipeline.errors import CheckpointError, StageError

if TYPE_CHECKING:
    import torch

_WEIGHTS = "model.safetensors"


class Decoder:
    """The parts of a ``ForCausalLM`` in float32, read from safetensors as they are asked for.

    Args:
        checkpoint: directory of the reference.
        rotate: whether the weights are those of the rotated model (`pipeline.rotation`), which is held whole.

    Raises:
        CheckpointError: its configuration or its weights cannot be read.
    """

    def __init__(self, checkpoint: Path, rotate: bool = False) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        self._whole = rotate
        if rotate:
            model = reference.load(checkpoint).model
            rotation.rotate(model)
        else:
            self._files = _files(checkpoint)
            config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        self._model = model
        self.config = model.config
        # Its frequencies are computed when it is made, which a meta device does not.
        self._rotary = type(model.model.rotary_emb)(model.config)

    @property
    def count(self) -> int:
        """Number of layers."""
        return len(self._model.model.layers)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings ``[W, T, H]`` of ids ``[W, T]``."""
        return self._call("model.embed_tokens", ids)

    def rotary(self, hidden: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the positions before ``length``, in the dtype of ``hidden``."""
        import torch

        found: tuple[torch.Tensor, torch.Tensor] = self._rotary(hidden, torch.arange(length)[None])
        return found

    def layers(self) -> Iterator[Any]:
        """The layers, each of which holds its weights until the next is asked for."""
        for index in range(self.count):
            layer = self._load(f"model.layers.{index}")
            yield layer
            self._drop(layer)

    def last_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head reads."""
        return self._call("model.norm", hidden)

    def _call(self, path: str, given: torch.Tensor) -> torch.Tensor:
        module = self._load(path)
        found: torch.Tensor = module(given)
        self._drop(module)
        return found

    def _load(self, path: str) -> Any:
        module = self._model.get_submodule(path)
        if not self._whole:
            module.load_state_dict(self._read(f"{path}."), assign=True)
        return module

    def _drop(self, module: Any) -> None:
        if not self._whole:
            module.to("meta")

    def _read(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors below ``prefix``, copied, so that no file stays mapped."""
        import torch
        from safetensors import safe_open

        found: dict[str, torch.Tensor] = {}
        for path in sorted({file for name, file in self._files.items() if name.startswith(prefix)}):
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    if name.startswith(prefix):
                        found[name.removeprefix(prefix)] = opened.get_tensor(name).to(torch.float32, copy=True)
        return found


def tensors(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The name and the float32 values of each tensor of a checkpoint, one in memory at a time.

    Raises:
        CheckpointError: the weights cannot be read.
    """
    import torch
    from safetensors import safe_open

    named = _files(checkpoint)
    for path in sorted(set(named.values())):
        with safe_open(path, framework="pt") as opened:
            for name in sorted(name for name, file in named.items() if file == path):
                yield name, opened.get_tensor(name).to(torch.float32)


def _files(checkpoint: Path) -> dict[str, Path]:
    """For each tensor of a checkpoint the file that holds it.

    Raises:
        CheckpointError: there is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    index = checkpoint / f"{_WEIGHTS}.index.json"
    try:
        if index.is_file():
            names = json.loads(index.read_bytes())["weight_map"]
            return {name: checkpoint / file for name, file in names.items()}
        with safe_open(checkpoint / _WEIGHTS, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), checkpoint / _WEIGHTS)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            "the checkpoint's weights cannot be read", where=str(checkpoint), why=str(error)
        ) from None


_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}  # as the genai builder fuses them


def layer_of(path: str) -> int | None:
    """The index of the layer that a weight belongs to, by its path; ``None`` for head and embedding."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def projections(layer: Any, path: str) -> list[Any]:
    """The modules of a layer whose weights, one after the other, are the weight at ``path`` of a graph.

    Raises:
        StageError: the layer has no such module.
    """
    name = path.rpartition(".")[2]
    found = []
    for part in _FUSED.get(name, (name,)):
        owner = next((owner for owner in (layer.self_attn, layer.mlp) if hasattr(owner, part)), None)
        if owner is None:
            raise StageError(f"a decoder layer has no {part}", where=path)
        found.append(getattr(owner, part))
    return found
