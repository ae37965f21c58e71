"""Time packages against one another: prefill and decode, in interleaved runs, each in a process of its own.

Machines are noisy: what counts is the median of the ratios of runs that followed one another.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.artifact import read_manifest
from pipeline.errors import ERRORS, QwenOnnxError, StageError, UsageError, from_dict
from pipeline.store import Store

_DECODED = 64
PEERS = ("plain-olive",)


@dataclass(frozen=True)
class Run:
    """One run: tokens per second of both paths, seconds to load, bytes of peak resident memory."""

    prefill: float
    decode: float
    load: float
    peak_memory: int


def measure(package: Path, prompt_tokens: int, threads: int | None) -> Run:
    """Load a package in this process and time it once, after a warm-up."""
    import resource

    import numpy as np

    from pipeline import generate, session

    begin = time.perf_counter()
    opened = session.open_package(package, threads)
    loaded = time.perf_counter() - begin
    if opened.window > 1:
        raise UsageError(f"{package} is compiled for an NPU", why="an emulator's speed says nothing of the chip's")
    random = np.random.default_rng(0)
    prompt, decoded = (
        random.integers(100, min(opened.vocabulary, 100_000), count).tolist() for count in (prompt_tokens, _DECODED)
    )
    if prompt_tokens + _DECODED >= opened.context_length:
        raise UsageError(
            f"{prompt_tokens} prompt tokens and {_DECODED} more do not fit {package}",
            why=f"its context holds {opened.context_length}",
        )
    list(generate.stream(opened, prompt[:16], 8))
    generator = generate.start(opened, prompt_tokens + _DECODED + 1)
    begin = time.perf_counter()
    generator.append_tokens(np.asarray(prompt, np.int32))
    generator.get_logits()
    middle = time.perf_counter()
    for token in decoded:  # fixed tokens: both sides do the same work whatever they would answer
        generator.append_tokens(np.asarray([token], np.int32))
        generator.get_logits()
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Run(prompt_tokens / (middle - begin), _DECODED / (end - middle), loaded, peak)


def compare(packages: Mapping[str, Path], rounds: int, prompt_tokens: int, threads: int | None) -> dict[str, list[Run]]:
    """Runs of every package, by name, ``rounds`` of each, taking turns.

    Raises:
        StageError: a run failed.
        UsageError: the prompt does not fit a package, or its speed here would say nothing.
        RuntimeMissing: a package's provider is not to be had here.
    """
    runs: dict[str, list[Run]] = {name: [] for name in packages}
    for _ in range(rounds):
        for name, path in packages.items():
            job = json.dumps({"package": str(path), "prompt_tokens": prompt_tokens, "threads": threads})
            command = [sys.executable, "-m", "pipeline.bench", job]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode in {kind.exit_code for kind in ERRORS.values()}:
                raise from_dict(json.loads(done.stdout.splitlines()[-1]))
            if done.returncode:
                raise StageError(f"{path} could not be timed", why=done.stderr.strip().split("\n")[-1])
            runs[name].append(Run(**json.loads(done.stdout.splitlines()[-1])))
    return runs


def summary(runs: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, Any]]:
    """Medians of each package, and the median of the ratios of the first to each other one, pair by pair."""
    first = next(iter(runs))
    result: dict[str, dict[str, Any]] = {}
    for name, entries in runs.items():
        result[name] = {
            field: statistics.median(getattr(run, field) for run in entries) for field in asdict(entries[0])
        }
        if name != first:
            for path in ("prefill", "decode"):
                pairs = zip(runs[first], entries, strict=True)
                result[name][f"{path}_ratio"] = statistics.median(getattr(a, path) / getattr(b, path) for a, b in pairs)
    return result


def peer(name: str, package: Path, store: Store) -> Path:
    """What another tool makes of the checkpoint that a package was built from, built once per store.

    ``plain-olive`` is Olive's ModelBuilder at its INT4 defaults.

    Raises:
        UsageError: the peer is unknown, or the store does not hold the package's checkpoint.
    """
    from pipeline import exporter

    if name not in PEERS:
        raise UsageError(f"there is no peer {name}", fix=f"known: {', '.join(PEERS)}")
    key = read_manifest(package).data["steps"]["checkpoint"]["key"]
    checkpoint = store.get("checkpoint", key)
    if checkpoint is None:
        raise UsageError(
            "the package's checkpoint is not in this store", fix="build the package here first, or name its --store"
        )
    folder = store.root / "peers" / f"{name}-{key[:16]}"
    with store.lock(f"{name}-{key}"):
        if not (folder / "genai_config.json").is_file():
            exporter.export_plain_int4(checkpoint.path, folder)
    return folder


if __name__ == "__main__":
    _job = json.loads(sys.argv[1])
    try:
        print(json.dumps(asdict(measure(Path(_job["package"]), _job["prompt_tokens"], _job["threads"]))))
    except QwenOnnxError as _error:
        print(json.dumps(_error.as_dict()))
        sys.exit(_error.exit_code)
