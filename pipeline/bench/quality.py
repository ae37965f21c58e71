"""How close every subject of a benchmark is to the checkpoint, on the tokens that the package was validated on."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipeline.artifact import VALIDATION, read_manifest
from pipeline.bench import peers, processes as bench_process, run as bench_run
from pipeline.bench.peers import RUN, Progress, Subject
from pipeline.builds.store import Store
from pipeline.errors import PackageError, StageError, UsageError
from pipeline.facts import texts
from pipeline.fidelity.agreement import Tally


def check(packages: Sequence[Path], store: Store) -> None:
    """Refuse what cannot be compared.

    Raises:
        UsageError: the packages were not built from one checkpoint, it is not in the store, or the first one was
            validated on another text.
        PackageError: the first one's validation cannot be read.
    """
    origins = {read_manifest(package).data["steps"].get("checkpoint", {}).get("digest") for package in packages}
    if len(origins) > 1:
        raise UsageError(
            "the packages were built from different checkpoints",
            why="distances to one of them say nothing of the others",
            fix="leave --quality out, or give packages of one checkpoint",
        )
    text = _validated_on(packages[0])
    if text["sha256"] != texts.EVALUATION.sha256:
        raise UsageError(
            f"{packages[0]} was validated on another text than this version has", fix="build it again, then compare"
        )
    try:
        peers.reference(packages[0], store)
    except peers.Absent as reason:
        raise UsageError("there is nothing to measure quality against", why=str(reason)) from None


def measure(subjects: Sequence[Subject], store: Store, threads: int, progress: Progress) -> dict[str, dict[str, float]]:
    """``mean_kl`` (nats) and ``perplexity_ratio`` of every subject by name, fed token by token as answers are.

    The reference is the checkpoint in float32 by PyTorch, on the windows that the first subject, a package, was
    validated on. Its log-probabilities are kept on disk meanwhile: 0.6 MB a token at Qwen's vocabulary.

    Raises:
        StageError: a subject or the reference failed, or gave logits that are no numbers.
        ResourceError: a process was killed.
    """
    checkpoint, text = peers.reference(subjects[0].path, store), _validated_on(subjects[0].path)
    name = f"quality-{checkpoint.key[:16]}"
    with (
        store.lock(name, lambda: progress("another process measures it, waiting")),
        tempfile.TemporaryDirectory(prefix=f"{name}.", dir=store.root / "tmp") as kept,
    ):
        progress("quality: the reference")
        size = {"count": text["windows"], "length": text["window_tokens"]}
        job: dict[str, Any] = {"reference": str(checkpoint.path), "out": kept, **size}
        bench_process.call(RUN, job, "the reference", bench_process.nothing)
        windows = json.loads((Path(kept) / bench_run.WINDOWS).read_bytes())
        found = {}
        for subject in subjects:
            progress(f"quality: {subject.name}")
            job = {**subject.job, "windows": [window["ids"] for window in windows], "threads": threads}
            take = partial(_tally, windows, Path(kept))
            try:
                tally = bench_process.call(subject.command, job, f"the quality of {subject.name}", take)
            except ValueError as error:
                raise StageError(f"{subject.name} does not compute", why=str(error)) from None
            figures = tally.figures()
            # A divergence is never negative; that of equals is, by rounding.
            kl = max(0.0, figures["mean_kl"])
            found[subject.name] = {"mean_kl": kl, "perplexity_ratio": figures["perplexity_ratio"]}
    return found


def _tally(windows: Sequence[dict[str, Any]], reference: Path, answer: IO[bytes]) -> Tally:
    """Compare logits as they come, a window at a time."""
    tally = Tally()
    for index, window in enumerate(windows):
        wanted = np.load(reference / f"{index}.npy")
        data = answer.read(wanted.nbytes)
        if len(data) < wanted.nbytes:
            raise EOFError
        tally.add(window["domain"], wanted, np.frombuffer(data, np.float32).reshape(wanted.shape), window["ids"])
    return tally


def _validated_on(package: Path) -> dict[str, Any]:
    try:
        text: dict[str, Any] = json.loads((package / VALIDATION).read_bytes())["text"]
        return {key: text[key] for key in ("sha256", "windows", "window_tokens")}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise PackageError(f"{VALIDATION} cannot be read", where=str(package), why=repr(error)) from None
