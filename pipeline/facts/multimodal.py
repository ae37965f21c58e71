"""Models that see or hear: where their language model and their towers are, and what a checkpoint must have of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.facts import sizes
from pipeline.facts.family import FAMILIES, Family, Shape
from pipeline.facts.vision import expected as expected_of_vision, read_vision
from pipeline.runtime import audio_tower


@dataclass(frozen=True)
class Layout:
    """Paths of modules: the decoder without its head, the head, and the towers in front of them, if there are any."""

    text: str = "model"
    head: str = "lm_head"
    towers: tuple[str, ...] = ()


_SEEING = Layout("model.language_model", towers=("model.visual",))
_SEEING_FIRST = Layout(towers=("visual",))  # the names that Qwen2-VL and Qwen2.5-VL were published with
_HEARING = Layout("language_model.model", "language_model.lm_head", ("audio_tower", "multi_modal_projector"))


def in_memory(family: Family) -> Layout:
    """Where things are in the class that transformers loads."""
    return _SEEING if family.sees else _HEARING if family.hears else Layout()


def in_files(family: Family, names: Collection[str]) -> Layout:
    """Where they are in a checkpoint whose tensors have ``names``."""
    layout = in_memory(family)
    if family.sees and not any(name.startswith(f"{layout.text}.") for name in names):
        return _SEEING_FIRST
    return layout


def expected(
    config: Mapping[str, Any], shape: Shape, layout: Layout, where: str
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight of the towers that a ``config.json`` describes.

    Raises:
        CheckpointError: a tower is of a kind that is not supported.
    """
    family = FAMILIES[shape.model_type]
    if family.sees:
        for name, dims in expected_of_vision(read_vision(config, shape, where)):
            yield f"{layout.towers[0]}.{name}", dims
    if family.hears:
        yield from audio_tower.read(config, where).expected(shape.hidden)


def tower(config: Mapping[str, Any], shape: Shape, where: str) -> sizes.Tower | None:
    """The sizes of the tower that a ``config.json`` describes, as estimates take them; raises as `expected`."""
    family = FAMILIES[shape.model_type]
    if family.sees:
        seen = read_vision(config, shape, where)
        merged = seen.width * seen.merged
        gated = 3 if seen.kind == "qwen2_5_vl" else 2
        mergers = 1 + len(seen.deepstack)
        return sizes.Tower(seen.depth, seen.width, seen.intermediate, gated, merged, seen.output, mergers)
    if family.hears:
        heard = audio_tower.read(config, where)
        width = heard.width
        return sizes.Tower(heard.layers, width, heard.intermediate, 2, width, shape.hidden, square=False)
    return None
