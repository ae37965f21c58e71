"""Benchmarks: packages against one another and against peers, in interleaved runs, each in a process of its own.

Machines are noisy: what counts is the median of the ratios of runs of the same round.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.bench import peers, processes as bench_process, quality as bench_quality
from pipeline.bench.peers import Progress, Subject
from pipeline.bench_loop import DECODE, PREFILL
from pipeline.builds.store import Store
from pipeline.errors import ResourceError, UsageError
from pipeline.runtime import session

SCHEMA_VERSION = 1
SCALARS = ("time_to_first_token", "load", "peak_memory")
_PATHS = ("prefill", "decode")
_DISTURBED = 0.1  # cores; a system at rest takes less


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        rounds: runs of each subject.
        prefill: prompt lengths, in tokens.
        decode: depths of context at which decoding is timed, in tokens.
        threads: processor threads of every subject; 0 for all cores that may be used.
        quality: also measure how far each subject is from the checkpoint.
    """

    rounds: int = 5
    prefill: tuple[int, ...] = PREFILL
    decode: tuple[int, ...] = DECODE
    threads: int = 0
    quality: bool = False

    def __post_init__(self) -> None:
        if not self.threads:
            object.__setattr__(self, "threads", session.available_threads())


def measure(
    packages: Mapping[str, Path], against: Sequence[str], settings: Settings, store: Store, progress: Progress
) -> dict[str, Any]:
    """Time packages (by name) and peers of the first of them; returns the `document`.

    Raises:
        UsageError: the tokens do not fit a package, its speed here would say nothing, or quality was asked for where
            there is no one reference.
        QwenOnnxError: whatever made a run, or a peer that is to be had, fail.
    """
    first = next(iter(packages.values()))
    subjects = [peers.package(name, path) for name, path in packages.items()]
    if settings.quality:
        bench_quality.check(list(packages.values()), store)
    absent = {}
    for name in dict.fromkeys(against):
        try:
            subjects.append(peers.prepare(name, first, store, progress))
        except peers.Absent as reason:
            absent[name] = str(reason)
            progress(f"{name} is absent: {reason}")
    quality = bench_quality.measure(subjects, store, settings.threads, progress) if settings.quality else {}
    return document(subjects, compare(subjects, settings, progress), settings, quality, absent)


def compare(subjects: Sequence[Subject], settings: Settings, progress: Progress) -> dict[str, list[dict[str, Any]]]:
    """Runs (`pipeline.bench_loop.serve`) of every subject by name, taking turns.

    Raises:
        UsageError: the tokens do not fit a package, or its speed here would say nothing.
        RuntimeMissing: a package's provider is not to be had here.
        StageError: a run failed.
    """
    lengths = {"prefill": settings.prefill, "decode": settings.decode, "threads": settings.threads}
    runs: dict[str, list[dict[str, Any]]] = {subject.name: [] for subject in subjects}
    others = Others()
    for turn in range(settings.rounds):
        for subject in subjects:
            progress(f"round {turn + 1} of {settings.rounds}: {subject.name}")
            job = {**subject.job, **lengths}
            run = bench_process.call(subject.command, job, f"timing {subject.name}", bench_process.one_object)
            runs[subject.name].append(run)
    if (cores := others.cores()) > _DISTURBED:
        progress(f"other programs took {cores:.1f} cores meanwhile: the figures are noise; run it again when they rest")
    return runs


class Others:
    """What other programs compute while something is timed, those of other guests of the machine included."""

    def __init__(self) -> None:
        self._begin = self._now()

    def cores(self) -> float:
        """How many cores they took on average since this was made."""
        wall, all_of_them, own = (now - then for now, then in zip(self._now(), self._begin, strict=True))
        return max(0.0, (all_of_them - own) / wall)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: on the wall, of processor time in all, and of that what this process and its ended children took."""
        import psutil

        every = psutil.cpu_times()
        taken = sum(getattr(every, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
        return time.monotonic(), taken, sum(os.times()[:4])


def document(
    subjects: Sequence[Subject],
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    settings: Settings,
    quality: Mapping[str, Mapping[str, float]],
    absent: Mapping[str, str],
) -> dict[str, Any]:
    """What is written to ``bench.json``, schema version `SCHEMA_VERSION`.

    Speeds are tokens per second, times seconds, sizes bytes: medians over the rounds. ``ratios`` are the first
    subject's figure over this one's, the median over the rounds.

    Args:
        quality: ``mean_kl`` (nats) and ``perplexity_ratio`` by subject, as far as they were measured.
        absent: why each peer that was asked for is missing.
    """
    first = runs[subjects[0].name]
    entries = []
    for subject in subjects:
        own = runs[subject.name]
        middle = {name: statistics.median(values) for name, values in _columns(own)}
        pairs = zip(_columns(first), _columns(own), strict=True)
        ratios = {
            name: round(statistics.median(a / b for a, b in zip(left, right, strict=True)), 4)
            for (name, left), (_, right) in pairs
        }
        found = quality.get(subject.name, {})
        entries.append(
            {
                "name": subject.name,
                "kind": subject.kind,
                "version": subject.version,
                "bytes": subject.bytes,
                **{path: {length: round(middle[f"{path}_{length}"], 2) for length in own[0][path]} for path in _PATHS},
                "time_to_first_token": round(middle["time_to_first_token"], 4),
                "load": round(middle["load"], 3),
                "peak_memory": int(middle["peak_memory"]),
                "mean_kl": found.get("mean_kl"),
                "perplexity_ratio": found.get("perplexity_ratio"),
                "ratios": ratios if subject is not subjects[0] else {},
            }
        )
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": machine(settings.threads),
        "rounds": settings.rounds,
        "subjects": entries,
        "absent": [{"name": name, "why": why} for name, why in absent.items()],
    }


def _columns(runs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[float]]]:
    """Every figure of a run, by a flat name such as ``prefill_512``, over the runs."""
    for path in _PATHS:
        for length in runs[0][path]:
            yield f"{path}_{length}", [run[path][length] for run in runs]
    for name in SCALARS:
        yield name, [run[name] for run in runs]


def machine(threads: int) -> dict[str, Any]:
    """What the figures were measured on."""
    listed = Path("/proc/cpuinfo")
    rows = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    named = [row.partition(":")[2].strip() for row in rows if row.startswith("model name")]
    processor = named[0] if named else platform.processor() or platform.machine()
    return {"processor": processor, "threads": threads, "system": f"{platform.system()} {platform.machine()}"}


def check_place(path: Path) -> None:
    """Refuse a place that cannot be written, before minutes are spent.

    Raises:
        UsageError: its folder is missing or read-only, or it is a folder itself.
    """
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"{path} cannot be written", fix="name another file with --out")


def write(data: Mapping[str, Any], path: Path) -> None:
    """Write the document, all at once.

    Raises:
        ResourceError: the disk does not take it.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ResourceError(f"{path} cannot be written", why=str(error), fix="name another file with --out") from None
    finally:
        temporary.unlink(missing_ok=True)
