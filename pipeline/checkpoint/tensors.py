"""The weights of a checkpoint, read from its safetensors one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import CheckpointError, StageError

if TYPE_CHECKING:
    import torch

_WEIGHTS = "model.safetensors"
_COMPARED = 4096  # rows
_ROUNDINGS = 0.25  # two roundings to 2 bits are nearer to each other


class Tensors:
    """A checkpoint's tensors by name; nothing is read before it is asked for, and no file stays mapped.

    Raises:
        CheckpointError: there is no safetensors file.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._files = _files(checkpoint)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def elements(self) -> int:
        """How many values there are in all; read from headers alone."""
        from safetensors import safe_open

        count = 0
        for path in sorted(set(self._files.values())):
            with safe_open(path, framework="pt") as opened:
                count += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
        return count

    def read(self, name: str) -> torch.Tensor:
        """One tensor's values, float32, copied."""
        return next(self._read([name]))[1]

    def rows(self, name: str, count: int) -> torch.Tensor:
        """The first rows of a matrix, float32; the rest of it is not read."""
        import torch
        from safetensors import safe_open

        with safe_open(self._files[name], framework="pt") as opened:
            found: torch.Tensor = opened.get_slice(name)[:count]
        return found.to(torch.float32)

    def below(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose names start with ``prefix``, which is left out."""
        found = self._read(name for name in self._files if name.startswith(prefix))
        return {name.removeprefix(prefix): values for name, values in found}

    def all(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every name with its values, one in memory at a time."""
        return self._read(self._files)

    def _read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        import torch
        from safetensors import safe_open

        by_file: dict[Path, list[str]] = {}
        for name in sorted(names):
            by_file.setdefault(self._files[name], []).append(name)
        for path, inside in sorted(by_file.items()):
            with safe_open(path, framework="pt") as opened:
                for name in inside:
                    yield name, opened.get_tensor(name).to(torch.float32, copy=True)


def check_one_matrix(weights: Tensors, embedding: str, head: str) -> None:
    """Refuse to store one matrix for head and embedding where they are two.

    Two roundings of one matrix pass, as GGUF files have them: those of Qwen2.5-Coder-0.5B are 0.045 apart.

    Args:
        embedding, head: names of their weights; a checkpoint without ``head`` ties them.

    Raises:
        StageError: they are further apart than roundings are.
    """
    if head not in weights:
        return
    one, other = weights.rows(embedding, _COMPARED), weights.rows(head, _COMPARED)
    apart = float((other - one).norm() / one.norm())
    if apart > _ROUNDINGS:
        raise StageError(
            "head and embedding are two matrices, and cannot be stored as one",
            where="quantize.embedding: shared",
            why=f"their first {_COMPARED} rows differ by {apart:.2f} of their length",
            fix="give the embedding a scheme of its own, such as {bits: 8, block_size: 128, symmetric: true}",
        )


def _files(checkpoint: Path) -> Mapping[str, Path]:
    """For each tensor of a checkpoint the file that holds it."""
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
