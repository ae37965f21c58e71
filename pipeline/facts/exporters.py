"""Which exporter writes the graph of a model for a target."""

from __future__ import annotations

from pipeline.facts import sizes
from pipeline.facts.family import FAMILIES, HELD_WHOLE, Shape
from pipeline.facts.target import Target

NATIVE = "native"


def resolve(
    wanted: str | None, target: Target, shape: Shape | None, options: bool = False, generates: bool = True
) -> str:
    """The exporter that a recipe names, or else the first one of the model's family that the target takes graphs of.

    Of a model that would fill the memory it is our own, which holds a weight at a time, where that one can be used.

    Args:
        wanted: what the recipe says; it is kept, whether or not it can be used.
        shape: ``None`` when it is not known yet.
        options: whether there are options of an Olive pass, which our own exporter has not.
        generates: whether the package generates text; other graphs are made from the genai exporter's.
    """
    if wanted:
        return wanted
    family = FAMILIES.get(shape.model_type) if shape else None
    written = family.exporters if family else target.exporters
    taken = [name for name in written if name in target.exporters]
    large = shape is not None and sizes.float_bytes(shape) > HELD_WHOLE
    if family and large and NATIVE in taken and generates and not options:
        return NATIVE
    return (taken or written)[0]
