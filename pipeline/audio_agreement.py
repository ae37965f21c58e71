"""How well a package hears, against transformers: spectrograms, prompts, the tower's features, and answers on sounds.

The sounds are made here, so that they need no licence and are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import audio_prompt, chat, checkpoint_files, generate, graph, mel, metrics, replay
from pipeline.errors import StageError
from pipeline.reference import Reference
from pipeline.session import Session

if TYPE_CHECKING:
    import numpy.typing as npt

    from pipeline.recipe import Gates

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


def applies(checkpoint: Path) -> bool:
    """Whether the checkpoint is of a model that hears."""
    return checkpoint_files.family_of(checkpoint).hears


def measure(
    torch_model: Reference, session: Session, checkpoint: Path, limit: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask the package and the reference about sounds.

    Args:
        limit: tokens of the answers.

    Returns:
        figures: ``tower``, float32 or quantized; ``mel_difference`` (largest, of log-mel values);
        ``prompt_mismatches``; ``cosine`` (smallest, of a token's features); ``mean_kl`` and ``top1`` along the answers
        of the reference; ``agreement`` and ``answers`` of the package's own. And entries for the golden transcript.

    Raises:
        ValueError: the logits have NaN or infinite values.
        StageError: transformers has no processor of the checkpoint.
    """
    processor = _processor(torch_model.tokenizer, checkpoint)
    tokenizer, tower, made = chat.load(session.package), audio_prompt.read_tower(session.package), sounds()
    answers, golden, mismatches = [], [], []
    differences, cosines, divergence, agreement = [], [], [], []
    for question in QUESTIONS:
        clips = [made[name] for name in question.clips]
        messages = [audio_prompt.ask(question.text, len(clips))]
        prompt = audio_prompt.of_chat(tokenizer, tower, messages, clips)
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        given = dict(processor(text=text, audio=clips, sampling_rate=mel.SAMPLE_RATE, return_tensors="pt"))
        ids = given.pop("input_ids")[0].tolist()
        if ids != prompt.ids:
            mismatches.append({"name": question.name, "wanted": ids, "found": prompt.ids})
        frames = prompt.media["audio_sizes_frames"]
        for row, wanted, count in zip(
            prompt.media["audio_embeds"], given["input_features"].numpy(), frames, strict=True
        ):
            differences.append(float(np.abs(row[:, :count] - wanted[:, :count]).max()))
        wanted_features, answer, ended = _reference_answer(torch_model, ids, limit, given, prompt.media["audio_sizes"])
        cosines.append(float(_cosines(_features(session, prompt.media), wanted_features).min()))
        whole = [*ids, *answer]
        rows = torch_model.logits(whole, **{**given, "attention_mask": _ones(whole)})[len(ids) - 1 :]
        wanted_rows = metrics.log_softmax(rows)
        fed = [*answer, 0]  # what comes after the answer is asked for, too
        found_rows = metrics.log_softmax(generate.answer_logits(session, prompt.ids, fed, prompt.media))
        divergence.append(metrics.kl_divergence(wanted_rows, found_rows))
        agreement.append(metrics.top1_agreement(wanted_rows, found_rows))
        found = list(generate.stream(session, prompt.ids, limit, prepared=prompt.media))
        answers.append(
            {
                "name": question.name,
                "agreement": round(metrics.greedy_agreement(answer, found[: max(len(answer), 1)]), 4),
                "first_divergence": metrics.first_divergence(answer, found),
                "reference_ended": ended,
                "ended": len(found) < limit,
                "reference": torch_model.tokenizer.decode(answer),
                "answer": torch_model.tokenizer.decode(found),
            }
        )
        _, logprobs = replay.scores(session.model, prompt.ids, found, prepared=prompt.media)
        entry = {"name": question.name, "prompt": prompt.ids, "tokens": found, "sounds": replay.pack(prompt.media)}
        golden.append({**entry, "logprobs": [round(value, 5) for value in logprobs]})
    operators = graph.operators(graph.load(session.package / session.config["model"]["speech"]["filename"]))
    figures = {
        "tower": "quantized" if operators.get("MatMulNBits") else "float32",
        "positions": sum(map(len, divergence)),
        "mean_kl": round(float(np.concatenate(divergence).mean()), 6),
        "top1": round(float(np.concatenate(agreement).mean()), 6),
        "mel_difference": max(differences),
        "prompt_mismatches": mismatches,
        "cosine": round(min(cosines), 7),
        "agreement": round(sum(float(entry["agreement"]) for entry in answers) / len(answers), 4),
        "answers": answers,
    }
    return figures, golden


def bounds(found: Mapping[str, Any], wanted: Gates) -> list[tuple[str, float, float, str]]:
    """(metric, value, bound, max or min) of each gate; those of answers are the recipe's own for text."""
    gates = [
        ("mel_difference", found["mel_difference"], MEL_DIFFERENCE, "max"),
        ("prompt_mismatches", len(found["prompt_mismatches"]), 0, "max"),
        ("cosine", found["cosine"], COSINE if found["tower"] == "float32" else QUANTIZED_COSINE, "min"),
        ("mean_kl", found["mean_kl"], wanted.mean_kl, "max"),
        ("top1", found["top1"], wanted.top1, "min"),
        ("greedy", found["agreement"], wanted.greedy, "min"),
    ]
    return [(metric, float(value), float(bound), sense) for metric, value, bound, sense in gates]


def _processor(tokenizer: Any, checkpoint: Path) -> Any:
    from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

    try:
        extractor = WhisperFeatureExtractor.from_pretrained(checkpoint, local_files_only=True)
        template = (checkpoint / "chat_template.jinja").read_text(encoding="utf-8")
        return Qwen2AudioProcessor(extractor, tokenizer, chat_template=template)
    except (OSError, ValueError) as error:
        raise StageError("transformers has no processor of the checkpoint", why=str(error)) from error


def _ones(ids: Sequence[int]) -> Any:
    import torch

    return torch.ones(1, len(ids), dtype=torch.long)


def _reference_answer(
    torch_model: Reference, ids: Sequence[int], limit: int, given: Mapping[str, Any], tokens: npt.NDArray[np.int64]
) -> tuple[Floats, list[int], bool]:
    """What the reference's tower makes of the sounds ``[N, H]``, its greedy answer, and whether that ended."""
    kept: list[Any] = []
    hook = torch_model.model.multi_modal_projector.register_forward_hook(lambda *parts: kept.append(parts[2]))
    try:
        answer, ended = torch_model.greedy(ids, limit, **given)
    finally:
        hook.remove()
    features = np.concatenate([clip[:count].float().numpy() for clip, count in zip(kept[0], tokens, strict=True)])
    return features, answer, ended


def _features(session: Session, media: replay.Arrays) -> Floats:
    """What the package's tower makes of the sounds, ``[N, H]``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = session.threads
    path = session.package / session.config["model"]["speech"]["filename"]
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    wanted = {value.name for value in opened.get_inputs()}
    found: Floats = opened.run(None, {name: values for name, values in media.items() if name in wanted})[0]
    return found


def _cosines(left: Floats, right: Floats) -> Floats:
    """Of each row; 0 where the shapes differ."""
    if left.shape != right.shape:
        return np.zeros(1, np.float32)
    length = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    found: Floats = (left * right).sum(axis=1) / np.maximum(length, 1e-30)
    return found
