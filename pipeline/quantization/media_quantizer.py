"""Quantizing a model that sees or hears: its decoder as any other, and the graphs beside it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import StageError
from pipeline.facts.scheme import Scheme, WeightScheme
from pipeline.graph import edits as graph
from pipeline.graph.external_data import ExternalDataWriter, stored_bits
from pipeline.quantization import graph_weights, quantizer

if TYPE_CHECKING:
    from pipeline.artifact import Progress

EMBEDDING = "embedding.onnx"
TOWERS = {"vision": "vision.onnx", "audio": "speech.onnx"}
"""The graph of each tower, by the key of its scheme."""


def quantize(source: Path, checkpoint: Path, out_dir: Path, scheme: Scheme, progress: Progress) -> dict[str, Any]:
    """Quantize ``model.onnx``, ``embedding.onnx`` and the tower of ``source`` into ``out_dir``.

    A shared embedding gathers from the head in ``model.onnx.data``. Of the tower only products are quantized.

    Returns:
        facts of `quantizer.quantize`, of the decoder and its embedding, and under the tower's key (`TOWERS`): bits per
        weight and the mean relative error of its products.

    Raises:
        RecipeError, StageError: as `quantizer.quantize`.
    """
    model = graph.load(source / EMBEDDING)
    (embedding,) = graph.weights(model)
    head = next((weight for weight in graph.weights(graph.load(source / "model.onnx")) if weight.role == "head"), None)
    facts = quantizer.quantize(source, checkpoint, out_dir, scheme, progress, outside=[embedding])
    given = scheme.of_weight(embedding.path, "embedding") if scheme.block_wise else None
    if scheme.block_wise and scheme.embedding == "shared":
        import onnx

        if head is None:
            raise StageError("the embedding cannot share the head's weight", why="the decoder has no head")
        graph_weights.share_across(model, embedding, graph.load(out_dir / "model.onnx"), head)
        onnx.save(model, str(out_dir / EMBEDDING))
    else:
        _write(source, out_dir, EMBEDDING, {embedding.path: given} if given else {}, scheme)
    kind = next(key for key in reversed(TOWERS) if (source / TOWERS[key]).is_file())
    progress(0.95, f"the {kind} tower")
    asked, file = getattr(scheme, kind), TOWERS[kind]
    tower = asked if isinstance(asked, WeightScheme) else None
    products = [weight for weight in graph.weights(graph.load(source / file)) if weight.role == "body"]
    errors = _write(source, out_dir, file, {weight.path: tower for weight in products} if tower else {}, scheme)
    made = graph.load(out_dir / file)
    for path in source.glob("*.onnx"):
        if not (out_dir / path.name).exists():  # one without weights
            shutil.copyfile(path, out_dir / path.name)
    found = {
        "bits_per_weight": round(stored_bits(made, out_dir) / sum(weight.size for weight in products), 3),
        "relative_error": round(sum(errors.values()) / len(errors), 6) if errors else None,
    }
    return {**facts, kind: found}


def _write(
    source: Path, out_dir: Path, name: str, schemes: dict[str, WeightScheme], scheme: Scheme
) -> dict[str, float]:
    """One graph with its data; returns the relative error of each weight that has a scheme."""
    import onnx

    if not schemes:
        for part in (name, f"{name}.data"):
            if (source / part).is_file():
                shutil.copyfile(source / part, out_dir / part)
        return {}
    model = graph.load(source / name)
    before = graph.interface(model)
    with ExternalDataWriter(out_dir / f"{name}.data") as writer:
        errors = graph_weights.quantize_weights(model, source, writer, schemes, accuracy_level=scheme.accuracy_level)
    if graph.interface(model) != before or graph_weights.quantized_schemes(model) != schemes:
        raise StageError(f"{name} was not quantized as the scheme says")
    onnx.save(model, str(out_dir / name))
    return errors
