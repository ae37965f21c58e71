"""What models that see and models that hear are measured by alike: answers to questions about pictures or sounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.checkpoint.reference import Reference
from pipeline.fidelity import metrics
from pipeline.fidelity.agreement import Tally, gate
from pipeline.package import replay
from pipeline.package.replay import Media
from pipeline.runtime import generate
from pipeline.runtime.session import Session

if TYPE_CHECKING:
    import numpy.typing as npt

    from pipeline.facts.recipe import Gates

    Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Asked:
    """A question to both.

    Attributes:
        name, question: of it.
        prompt: token ids, with room for each feature.
        agrees: whether the reference's own tokenizer or processor makes the same ids of it.
        media: what the package's tower is given.
        given: what the reference's model is given, by its names.
        entry: what the golden transcript has besides.
    """

    name: str
    question: str
    prompt: list[int]
    agrees: bool
    media: Media
    given: Mapping[str, Any]
    entry: Mapping[str, Any]


def answer(
    torch_model: Reference, session: Session, asked: Asked, limit: int, tally: Tally
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answers of both, and the package's for the golden transcript.

    Args:
        limit: most tokens of an answer.
        tally: to which the tokens of the reference's answer are added, and what follows them.

    Raises:
        ValueError: the logits have NaN or infinite values.
    """
    wanted, ended = torch_model.greedy(asked.prompt, limit, **asked.given)
    found = list(generate.stream(session, asked.prompt, limit, media=asked.media))
    rows = torch_model.logits([*asked.prompt, *wanted], **asked.given)[len(asked.prompt) - 1 :]
    taught = [*wanted, int(rows[-1].argmax())]
    # Rows stand before each token here, a tally takes rows that stand after each.
    own = generate.answer_logits(session, asked.prompt, taught, asked.media)
    tally.add(asked.name, metrics.log_softmax(rows), own, [asked.prompt[-1], *taught])
    described = {
        "name": asked.name,
        "question": asked.question,
        "prompt_agrees": asked.agrees,
        "agreement": round(metrics.greedy_agreement(wanted, found[: max(len(wanted), 1)]), 4),
        "first_divergence": metrics.first_divergence(wanted, found),
        "reference_ended": ended,
        "ended": len(found) < generate.room(session, len(asked.prompt), limit),
        "reference": torch_model.tokenizer.decode(wanted),
        "answer": torch_model.tokenizer.decode(found),
    }
    _, logprobs = replay.scores(session.model, asked.prompt, found, media=asked.media)
    golden = {"name": asked.name, **asked.entry, "prompt": asked.prompt, "tokens": found}
    return described, {**golden, "logprobs": [round(value, 5) for value in logprobs]}


def figures(tally: Tally, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Those of `Tally.figures`, ``greedy`` (mean agreement), and the ``answers``."""
    mean = sum(float(entry["agreement"]) for entry in answers) / len(answers)
    return {**tally.figures(), "greedy": round(mean, 4), "answers": list(answers)}


def tower(session: Session, section: str) -> Any:
    """The graph of a package's tower, opened with onnxruntime alone."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = session.threads
    path = session.package / session.config["model"][section]["filename"]
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def least_cosine(found: Floats, wanted: Floats) -> float:
    """The least of all rows ``[N, F]``; 0 where there are more or fewer."""
    if found.shape != wanted.shape:
        return 0.0
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    return float(((found * wanted).sum(axis=1) / np.maximum(lengths, 1e-30)).min())


def gates(
    found: Mapping[str, Any], bounds: Sequence[tuple[str, float, str]], path: str, wanted: Gates
) -> list[dict[str, Any]]:
    """The recipe's gates for answers, and those for pictures or sounds themselves, which are no choice.

    Args:
        found: the section of a validation.
        bounds: metric, bound, and ``max`` or ``min``, of what is no choice.
    """
    made = [gate(metric, path, found[metric], bound, sense) for metric, bound, sense in bounds]
    for metric, sense in (("mean_kl", "max"), ("top1", "min"), ("greedy", "min")):
        if (bound := getattr(wanted, metric)) is not None:
            made.append(gate(metric, path, found[metric], bound, sense))
    prompts = sum(not entry["prompt_agrees"] for entry in found["answers"])
    return [*made, gate("chat_template_mismatches", path, prompts, 0, "max")]
