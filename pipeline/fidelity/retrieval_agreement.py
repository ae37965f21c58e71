"""How well a package that embeds or ranks agrees with the PyTorch reference, text by text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.artifact import Progress
from pipeline.checkpoint.reference import Reference
from pipeline.facts import texts
from pipeline.fidelity.agreement import gate
from pipeline.package import retrieval_replay
from pipeline.runtime import retrieval
from pipeline.runtime.retrieval import Retriever
from pipeline.task import Task

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

# A batch is computed by other kernels than one text, and 8-bit activations round otherwise where sums differ: smallest
# cosine, and largest difference of scores, of texts in one padded batch and alone.
_BATCH = {"batch_cosine": 0.999, "batch_score_error": 0.01}
# Results that are recorded for the replay, and texts of the batch that is padded.
_GOLDEN, _BATCH_SIZE = 16, 4


def measure(
    torch_model: Reference, package: Path, task: Task, windows: Sequence[Sequence[int]], progress: Progress
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compute the results of both for the project's queries and documents, and for ``windows`` of other text (ids).

    Returns:
        the report's ``retrieval``, ``tokenizer`` and ``finite``, and the entries of ``golden.jsonl``.

    Raises:
        PackageError: the runtime cannot load the model.
    """
    opened = retrieval.open_package(package)
    named = _pairs(opened) if task.labels else _texts(opened, windows)
    ids = [row for _, row in named]
    progress(0.1, f"{len(ids)} texts, by the package")
    found = opened.run(ids)
    wanted = np.empty_like(found)
    for index, row in enumerate(ids):
        progress(0.2 + 0.6 * index / len(ids), f"text {index + 1} of {len(ids)}, by the reference")
        wanted[index] = _reference(torch_model, row, list(opened.config["labels"].values()))
    finite = bool(np.isfinite(found).all())
    report = _labels(named, wanted, found) if task.labels else _vectors(named, wanted, found)
    progress(0.85, "a padded batch")
    report |= _batch(opened, ids[:_BATCH_SIZE], found[:_BATCH_SIZE], bool(task.labels))
    probes = texts.TOKENIZER_PROBES
    wrong = [name for name, probe in probes.items() if opened.tokenizer.encode(probe) != _ids(torch_model, probe)]
    golden = [
        {"name": name, "ids": row, "values": [round(float(value), 6) for value in values]}
        for (name, row), values in zip(named[:_GOLDEN], found, strict=False)
    ]
    tokenizer = {"probes": len(probes), "served": [{"name": name} for name in wrong]}
    return {"finite": finite, "retrieval": report, "tokenizer": tokenizer}, golden


def gates(report: Mapping[str, Any], bounds: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """Every gate with what was measured, as `agreement.gate` gives it; ``bounds`` are those of the recipe."""
    figures = report["retrieval"]
    found = [gate("finite", "", float(report["finite"]), 1.0, "min")]
    always = {name: bound for name, bound in _BATCH.items() if name in figures}
    for metric, bound in {**bounds, **always}.items():
        if bound is not None:
            found.append(gate(metric, "", figures[metric], bound, "max" if metric.endswith("error") else "min"))
    return [*found, gate("tokenizer_mismatches", "served", len(report["tokenizer"]["served"]), 0, "max")]


def _texts(opened: Retriever, windows: Sequence[Sequence[int]]) -> list[tuple[str, list[int]]]:
    """Queries first, then documents, then windows; with their names."""
    named = [(f"query {index}", opened.ids("query", query=query)) for index, query in enumerate(texts.QUERIES, 1)]
    named += [
        (f"document {index}", opened.ids("document", document=text)) for index, text in enumerate(texts.DOCUMENTS, 1)
    ]
    around = opened.config["before"], opened.config["after"]
    room = opened.config["context_length"] - sum(map(len, around))
    return named + [
        (f"window {index}", [*around[0], *window[:room], *around[1]]) for index, window in enumerate(windows, 1)
    ]


def _pairs(opened: Retriever) -> list[tuple[str, list[int]]]:
    """Every query with every document, the queries taking turns, so that the first few are of all of them."""
    return [
        (f"query {query + 1}, document {document + 1}", opened.ids("pair", query=asked, document=text))
        for document, text in enumerate(texts.DOCUMENTS)
        for query, asked in enumerate(texts.QUERIES)
    ]


def _reference(torch_model: Reference, ids: Sequence[int], labels: Sequence[int]) -> Floats:
    """The result for one text: logits of ``labels``, or without any the normalized last hidden state."""
    import torch

    given = torch.tensor([list(ids)])
    with torch.inference_mode():
        if labels:
            last = torch_model.model(given).logits[0, -1, list(labels)]
        else:
            last = torch.nn.functional.normalize(torch_model.model.base_model(given).last_hidden_state[0, -1], dim=0)
        result: Floats = last.float().numpy()
    return result


def _ids(torch_model: Reference, text: str) -> list[int]:
    found: list[int] = torch_model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def _vectors(named: Sequence[tuple[str, Any]], wanted: Floats, found: Floats) -> dict[str, Any]:
    cosines = retrieval_replay.cosines(wanted, found)
    split = len(texts.QUERIES)
    documents = slice(split, split + len(texts.DOCUMENTS))
    rows = zip(named, cosines, strict=True)
    orders = (vectors[:split] @ vectors[documents].T for vectors in (wanted, found))
    return {
        "texts": len(named),
        "cosine": round(float(cosines.mean()), 6),
        "min_cosine": round(float(cosines.min()), 6),
        "ranking": round(concordance(*orders), 4),
        "rows": [{"name": name, "value": round(float(value), 6)} for (name, _), value in rows],
    }


def _labels(named: Sequence[tuple[str, Any]], wanted: Floats, found: Floats) -> dict[str, Any]:
    expected, given = retrieval_replay.scores(wanted), retrieval_replay.scores(found)
    shape = (len(texts.DOCUMENTS), len(texts.QUERIES))
    differences = np.abs(expected - given)
    return {
        "texts": len(named),
        "score_error": round(float(differences.max()), 6),
        "mean_score_error": round(float(differences.mean()), 6),
        "ranking": round(concordance(expected.reshape(shape).T, given.reshape(shape).T), 4),
        "rows": [
            {"name": name, "reference": round(float(left), 6), "value": round(float(right), 6)}
            for (name, _), left, right in zip(named, expected, given, strict=True)
        ],
    }


def concordance(wanted: npt.NDArray[Any], found: npt.NDArray[Any]) -> float:
    """The share of pairs of documents that both put in the same order, over all queries.

    Args:
        wanted, found: how near each document is to each query, ``[queries, documents]``.
    """
    pairs = list(combinations(range(wanted.shape[1]), 2))
    same = [np.sign(wanted[:, i] - wanted[:, j]) == np.sign(found[:, i] - found[:, j]) for i, j in pairs]
    return float(np.mean(same))


def _batch(opened: Retriever, ids: Sequence[list[int]], alone: Floats, labels: bool) -> dict[str, float]:
    """The same texts, of different lengths, at once: padded on the right and on the left."""
    batches = [retrieval_replay.run(opened.session, opened.config["output"], ids, left) for left in (False, True)]
    if labels:
        wanted = retrieval_replay.scores(alone)
        worst = max(float(np.abs(retrieval_replay.scores(batch) - wanted).max()) for batch in batches)
        return {"batch_score_error": round(worst, 6)}
    return {"batch_cosine": round(min(float(retrieval_replay.cosines(alone, batch).min()) for batch in batches), 6)}
