"""The one loop that times every subject of a benchmark, whatever runs it: standard library only.

It is imported here, and loaded by its path from the environments of other tools (`data/llamacpp_runner.py`), so that
all subjects do the same work in the same order.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

PREFILL = (128, 512, 2048)
DECODE = (16, 512, 1500)
"""Prompt lengths and depths of context, in tokens, that are timed unless others are asked for."""
DECODED = 64
"""Tokens that each decoding speed is taken over."""
_WARM_UP = 16


class Engine(Protocol):
    """A loaded model, and one sequence of tokens that it has in its cache."""

    vocabulary: int
    context_length: int

    def start(self, length: int) -> None:
        """Begin an empty sequence with room for ``length`` tokens: what a request costs before its prompt is read."""

    def feed(self, ids: Sequence[int]) -> None:
        """Append tokens and compute the logits after the last of them."""

    def rewind(self, length: int) -> None:
        """Forget all tokens but the first ``length``."""

    def next_token(self) -> int:
        """The most likely token after those that were fed last; nothing but `start` or `rewind` may follow."""

    def logits(self) -> bytes:
        """The logits ``[vocabulary]`` float32 after the token that was fed last."""


def time_run(engine: Engine, prefill: Sequence[int], decode: Sequence[int]) -> dict[str, Any]:
    """Time an engine once, after a warm-up.

    Every prompt length is a sequence of its own. The longest one is then rewound (or filled up) to each depth, so that
    no prompt is read twice. The tokens are fixed: all engines do the same work whatever they would answer.

    Args:
        prefill: prompt lengths in tokens.
        decode: depths in tokens at which `DECODED` tokens are fed one by one.

    Returns:
        ``prefill`` and ``decode``, tokens per second by length and by depth; ``time_to_first_token``, seconds from an
        empty sequence to the first token of an answer, for the middle one of the prompt lengths.
    """
    lengths, depths = sorted(set(prefill)), sorted(set(decode))
    draw = random.Random(0)  # noqa: S311 - which tokens it is does not matter, as long as they are the same
    most = max([*lengths, *depths])
    last = min(engine.vocabulary, 100_000)
    ids = [draw.randrange(min(100, last - 1), last) for _ in range(most + DECODED)]
    engine.start(_WARM_UP + 8)
    engine.feed(ids[:_WARM_UP])
    for token in ids[_WARM_UP : _WARM_UP + 8]:
        engine.feed([token])
    result: dict[str, Any] = {"prefill": {}, "decode": {str(depth): 0.0 for depth in depths}}
    for length in lengths:
        asked = time.perf_counter()
        engine.start(max(length, *depths) + DECODED + 1 if length == lengths[-1] else length + 1)
        begin = time.perf_counter()
        engine.feed(ids[:length])
        result["prefill"][str(length)] = length / (time.perf_counter() - begin)
        if length == lengths[len(lengths) // 2]:
            engine.next_token()
            result["time_to_first_token"] = time.perf_counter() - asked
    fed = lengths[-1]
    for depth in reversed(depths):
        engine.rewind(min(fed, depth))
        if depth > fed:
            engine.feed(ids[fed:depth])
        begin = time.perf_counter()
        for token in ids[depth : depth + DECODED]:
            engine.feed([token])
        result["decode"][str(depth)] = DECODED / (time.perf_counter() - begin)
        fed = depth
    return result


def room(prefill: Sequence[int], decode: Sequence[int]) -> int:
    """Tokens of context that `time_run` takes."""
    return max([*prefill, *decode]) + DECODED + 1


def write_logits(engine: Engine, windows: Sequence[Sequence[int]], out: IO[bytes]) -> None:
    """Feed each window from the beginning, one token at a time, and write the logits after each token."""
    for ids in windows:
        engine.start(len(ids) + 1)
        for token in ids:
            engine.feed([token])
            out.write(engine.logits())
    out.flush()


def serve(engine: Engine, load: float, job: Mapping[str, Any], out: IO[bytes]) -> None:
    """Do a job with an engine that took ``load`` seconds to load: logits of ``windows``, or a run as a JSON object."""
    if "windows" in job:
        write_logits(engine, job["windows"], out)
        return
    run = {**time_run(engine, job["prefill"], job["decode"]), "load": load, "peak_memory": peak_memory()}
    out.write(json.dumps(run).encode() + b"\n")
    out.flush()


def peak_memory() -> int:
    """Most bytes of memory that this process had resident, mapped files included."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: what getrusage tells there begins with what the parent process had
        rows = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return 1024 * int(rows["VmHWM"].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def results() -> IO[bytes]:
    """Where results go: standard output, which libraries can no longer write to after this."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return out


def die_with_parent() -> None:
    """Ask the kernel (Linux) to end this process when the benchmark dies, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
