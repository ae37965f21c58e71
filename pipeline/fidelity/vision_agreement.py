"""How close a package's answers about pictures are to the reference's, and what it makes of the pictures themselves.

Shapes in this module:
    N: patches, R: features, F: channels of a feature, T: tokens of an answer, V: vocabulary.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.checkpoint.reference import Reference
from pipeline.errors import StageError
from pipeline.facts.family import read_shape
from pipeline.facts.vision import Vision, read_vision
from pipeline.fidelity import media_agreement, pictures
from pipeline.fidelity.agreement import Tally
from pipeline.fidelity.media_agreement import Asked
from pipeline.fidelity.pictures import Drawn
from pipeline.runtime import chat, generate, images
from pipeline.runtime.session import Session

if TYPE_CHECKING:
    import numpy.typing as npt

    from pipeline.artifact import Progress

# Pixels are normalized: one step of 255 is 0.008 or more. The runtime computes in float32, transformers in float64.
MAX_PIXEL_ERROR = 1e-5
# Of 8-bit towers the directions of features keep 0.999 and more; a wrong picture has less than 0.9.
MIN_COSINE = 0.99


def measure(
    torch_model: Reference, session: Session, checkpoint: Path, limit: int, progress: Progress
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask both about each picture, and about two of different sizes.

    Args:
        checkpoint: directory of the reference.
        limit: most tokens of an answer.

    Returns:
        the section ``images`` of the validation: ``pixel_error`` (largest difference of a normalized pixel),
        ``feature_cosine`` (least over features), the figures of a tally over the tokens of the reference's answers
        and what follows them, ``greedy``, ``answers``; and entries for the golden transcript.

    Raises:
        ValueError: the logits have NaN or infinite values.
        StageError: no picture can be drawn for this processor.
    """
    settings = json.loads((checkpoint / "config.json").read_bytes())
    vision = read_vision(settings, read_shape(settings, "config.json"), "config.json")
    processor = _processor(session.package)
    try:
        drawn = pictures.draw(vision.patch * vision.merge, processor["min_pixels"], processor["max_pixels"])
    except ValueError as error:
        raise StageError("the package cannot be asked about pictures", why=str(error)) from None
    tokenizer, tally = chat.load(session.package), Tally()
    answers: list[dict[str, Any]] = []
    golden: list[dict[str, Any]] = []
    pixel_error, cosine = 0.0, 1.0
    groups = [*([one] for one in drawn), [drawn[1], drawn[2]]]
    tower = media_agreement.tower(session, "vision")
    for index, group in enumerate(groups):
        name, question = " and ".join(one.name for one in group), group[0].question
        progress(index / len(groups), f"picture {name}")
        messages = [{"role": "user", "content": chat.content(question, len(group))}]
        prompt = tokenizer.encode_chat(messages)
        wanted = torch_model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        full, media = generate.attach(session, prompt, [images.check(one.png) for one in group])
        assert media is not None
        given = _given(group, vision, processor)
        pixel_error = max(pixel_error, _largest(media.arrays["pixel_values"], given["pixel_values"]))
        cosine = min(cosine, *_cosines(torch_model, tower, given))
        entry = {"images": [base64.b64encode(one.png).decode() for one in group]}
        asked = Asked(f"image {name}", question, full, prompt == wanted, media, given, entry)
        described, own = media_agreement.answer(torch_model, session, asked, limit, tally)
        answers.append(described)
        golden.append(own)
    measured = {"pixel_error": float(f"{pixel_error:.3g}"), "feature_cosine": round(cosine, 6)}
    return {**measured, **media_agreement.figures(tally, answers)}, golden


def bounds(found: Mapping[str, Any]) -> list[tuple[str, float, str]]:  # noqa: ARG001 - those of sounds depend on it
    """Metric, bound, max or min, of what is no choice of a recipe."""
    return [("pixel_error", MAX_PIXEL_ERROR, "max"), ("feature_cosine", MIN_COSINE, "min")]


def _processor(package: Path) -> dict[str, Any]:
    """The options of all transforms of a package's pictures."""
    config = json.loads((package / "processor_config.json").read_bytes())
    transforms = config["processor"]["transforms"]
    return {key: value for entry in transforms for key, value in entry["operation"].get("attrs", {}).items()}


def _given(group: Sequence[Drawn], vision: Vision, processor: Mapping[str, Any]) -> dict[str, Any]:
    """Pictures as the reference takes them."""
    import torch

    made = [pictures.patches(one.pixels, vision, processor) for one in group]
    return {
        "pixel_values": torch.from_numpy(np.concatenate([values for values, _ in made])),
        "image_grid_thw": torch.from_numpy(np.concatenate([grid for _, grid in made])),
    }


def _largest(found: npt.NDArray[np.float32], wanted: Any) -> float:
    """Infinite where there are more or fewer patches."""
    return float(np.abs(found - wanted.numpy()).max()) if found.shape == wanted.shape else float("inf")


def _cosines(torch_model: Reference, tower: Any, given: Mapping[str, Any]) -> list[float]:
    """Between the features of both, the least of each picture."""
    import torch

    with torch.inference_mode():
        features, *deep = _flat(torch_model.model.model.visual(given["pixel_values"], grid_thw=given["image_grid_thw"]))
    wanted = torch.cat([features, *deep], dim=-1).numpy()
    found, at, least = [], 0, []
    for grid in given["image_grid_thw"].numpy():
        count = int(grid.prod())
        feeds = {"pixel_values": given["pixel_values"].numpy()[at : at + count], "image_grid_thw": grid[None]}
        found.append(tower.run(None, feeds)[0])
        at += count
    start = 0
    for rows in found:
        least.append(media_agreement.least_cosine(rows, wanted[start : start + len(rows)]))
        start += len(rows)
    return least


def _flat(features: Any) -> list[Any]:
    """Qwen3-VL's tower gives its features, and a list of those for the decoder's first layers."""
    return [features[0], *features[1]] if isinstance(features, tuple) else [features]
