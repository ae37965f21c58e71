"""How well a package hears, against transformers: spectrograms, prompts, the tower's features, and answers on sounds.

The sounds are made here, so that they need no licence and are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.checkpoint.reference import Reference
from pipeline.errors import StageError
from pipeline.fidelity import media_agreement
from pipeline.fidelity.agreement import Tally
from pipeline.fidelity.media_agreement import Asked
from pipeline.graph import edits as graph
from pipeline.package import replay
from pipeline.runtime import chat, generate, mel
from pipeline.runtime.session import Session

if TYPE_CHECKING:
    import numpy.typing as npt

    from pipeline.artifact import Progress

    Floats = npt.NDArray[np.float32]

# What the graph of the tower may lose by computing in another order, in float32 on any processor.
MEL_DIFFERENCE = 1e-4
COSINE = 0.9999
# And with weights of 8 bits, which kept 0.9988 and 0.9997 of two towers of random weights; 4 bits kept 0.95.
QUANTIZED_COSINE = 0.995


@dataclass(frozen=True)
class Question:
    """A question about sounds, by their names in `sounds`."""

    name: str
    clips: tuple[str, ...]
    text: str


QUESTIONS = (
    Question("rising tone", ("chirp",), "What do you hear?"),
    Question("knocks", ("knocks",), "How many sounds are there, and what makes them?"),
    Question("two sounds", ("notes", "chirp"), "Which of the two is longer?"),
)


def sounds() -> dict[str, Floats]:
    """Mono samples at 16 kHz: a rising tone, knocks of noise that fade, and three notes with overtones."""

    def seconds(length: float) -> npt.NDArray[np.float64]:
        return np.arange(int(length * mel.SAMPLE_RATE)) / mel.SAMPLE_RATE

    rising = seconds(1.0)
    chirp = 0.5 * np.sin(2 * np.pi * (200 * rising + 1900 * rising**2))
    knock = seconds(0.4)
    noise = np.random.default_rng(0).uniform(-1.0, 1.0, len(knock))
    knocks = np.tile(0.7 * noise * np.exp(-30 * knock), 4)
    tone = seconds(0.25)
    notes = [
        0.3 * sum(np.sin(2 * np.pi * pitch * order * tone) / order for order in (1, 2, 3)) for pitch in (262, 330, 392)
    ]
    made = {"chirp": chirp, "knocks": knocks, "notes": np.concatenate(notes)}
    return {name: samples.astype(np.float32) for name, samples in made.items()}


def measure(
    torch_model: Reference, session: Session, checkpoint: Path, limit: int, progress: Progress
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask both about sounds.

    Args:
        checkpoint: directory of the reference.
        limit: most tokens of an answer.

    Returns:
        the section ``audio`` of the validation: ``tower``, float32 or quantized; ``mel_difference`` (largest, of
        log-mel values); ``feature_cosine`` (least, of a token's features); `media_agreement.figures`; and entries for
        the golden transcript.

    Raises:
        ValueError: the logits have NaN or infinite values.
        StageError: transformers has no processor of the checkpoint.
    """
    processor = _processor(torch_model.tokenizer, checkpoint)
    tokenizer, made, tally = chat.load(session.package), sounds(), Tally()
    answers: list[dict[str, Any]] = []
    golden: list[dict[str, Any]] = []
    difference, cosine = 0.0, 1.0
    tower = media_agreement.tower(session, "speech")
    for index, question in enumerate(QUESTIONS):
        progress(index / len(QUESTIONS), f"sound {question.name}")
        clips = [made[name] for name in question.clips]
        messages = [{"role": "user", "content": chat.content(question.text, sounds=len(clips))}]
        prompt, media = generate.attach(session, tokenizer.encode_chat(messages), clips=clips)
        assert media is not None
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        given = dict(processor(text=text, audio=clips, sampling_rate=mel.SAMPLE_RATE, return_tensors="pt"))
        agrees = given.pop("input_ids")[0].tolist() == prompt
        del given["attention_mask"]  # of all tokens, as `Reference` has it
        difference = max(difference, _mel_difference(media.arrays, given["input_features"].numpy()))
        if agrees:
            found = _features(tower, media.arrays)
            wanted = _reference_features(torch_model, prompt, given, media.tokens)
            cosine = min(cosine, media_agreement.least_cosine(found, wanted))
        entry = {"sounds": replay.pack(media.arrays)}
        asked = Asked(f"sound {question.name}", question.text, prompt, agrees, media, given, entry)
        described, own = media_agreement.answer(torch_model, session, asked, limit, tally)
        answers.append(described)
        golden.append(own)
    operators = graph.operators(graph.load(session.package / session.config["model"]["speech"]["filename"]))
    measured = {
        "tower": "quantized" if operators.get("MatMulNBits") else "float32",
        "mel_difference": float(f"{difference:.3g}"),
        "feature_cosine": round(cosine, 7),
    }
    return {**measured, **media_agreement.figures(tally, answers)}, golden


def bounds(found: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """Metric, bound, max or min, of what is no choice of a recipe."""
    cosine = COSINE if found["tower"] == "float32" else QUANTIZED_COSINE
    return [("mel_difference", MEL_DIFFERENCE, "max"), ("feature_cosine", cosine, "min")]


def _processor(tokenizer: Any, checkpoint: Path) -> Any:
    from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

    try:
        extractor = WhisperFeatureExtractor.from_pretrained(checkpoint, local_files_only=True)
        template = (checkpoint / "chat_template.jinja").read_text(encoding="utf-8")
        return Qwen2AudioProcessor(extractor, tokenizer, chat_template=template)
    except (OSError, ValueError) as error:
        raise StageError("transformers has no processor of the checkpoint", why=str(error)) from error


def _mel_difference(arrays: replay.Arrays, wanted: Floats) -> float:
    """The largest over the frames that are sound."""
    rows = zip(arrays["audio_embeds"], wanted, arrays["audio_sizes_frames"], strict=True)
    return max(float(np.abs(row[:, :count] - theirs[:, :count]).max()) for row, theirs, count in rows)


def _reference_features(
    torch_model: Reference, ids: Sequence[int], given: Mapping[str, Any], tokens: Sequence[int]
) -> Floats:
    """What the reference's tower makes of the sounds ``[N, H]``."""
    kept: list[Any] = []
    hook = torch_model.model.multi_modal_projector.register_forward_hook(lambda *parts: kept.append(parts[2]))
    try:
        torch_model.logits(ids, **given)
    finally:
        hook.remove()
    found: Floats = np.concatenate([clip[:count].float().numpy() for clip, count in zip(kept[0], tokens, strict=True)])
    return found


def _features(tower: Any, arrays: replay.Arrays) -> Floats:
    """What the package's tower makes of the sounds, ``[N, H]``."""
    wanted = {value.name for value in tower.get_inputs()}
    found: Floats = tower.run(None, {name: values for name, values in arrays.items() if name in wanted})[0]
    return found
