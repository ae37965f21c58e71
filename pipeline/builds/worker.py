"""The process in which one step runs: a crash, a leak or a kill of it leaves the build standing.

Reads a job (JSON) from the file that is named on the command line; writes events, one JSON object a line, to the
descriptor named behind it. What libraries print goes to a log.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import stages
from pipeline.artifact import Artifact, Step
from pipeline.bench_loop import peak_memory
from pipeline.errors import QwenOnnxError, ResourceError, StageError

# Bytes; a step that fails with less than that left on the disk most likely failed for it.
_FULL = 1_000_000
# What numpy says when a file cannot be written to its end, without telling why.
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")


def main(job_file: str, descriptor: int, parent: int = 0) -> int:
    """Run the job in ``job_file``, and tell its events to ``descriptor``; returns the exit code of the process.

    Args:
        parent: the process that has started this one, where it is known.
    """
    _die_with_parent(parent)
    job = json.loads(Path(job_file).read_bytes())
    quiet_libraries()
    step = Step.from_dict(job["step"])
    inputs = {name: Artifact(**{**data, "path": Path(data["path"])}) for name, data in job["inputs"].items()}
    with os.fdopen(descriptor, "w", buffering=1) as events:

        def send(event: dict[str, Any]) -> None:
            print(json.dumps(event), file=events)

        try:
            result = stages.STAGES[step.stage](
                step,
                inputs,
                Path(job["out_dir"]),
                lambda part, what: send({"event": "progress", "part": part, "what": what}),
            )
        except BaseException as error:
            send({"event": "error", **_explain(error, step.stage, Path(job["out_dir"])).as_dict()})
            traceback.print_exc()
            return 1
        # Of processes that it started and that have ended, the largest counts too.
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        peak = max(peak_memory(), children)
        send({"event": "result", "facts": result.facts, "refused": result.refused, "peak_memory": peak})
    return 0


def _explain(error: BaseException, stage: str, out_dir: Path) -> QwenOnnxError:
    """The error to show for any exception."""
    if isinstance(error, QwenOnnxError) and not isinstance(error, StageError):
        return error
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, StageError):
        text = error.why or error.what
    numbers = {cause.errno for cause in _chain(error) if isinstance(cause, OSError)}
    if numbers & {errno.ENOSPC, errno.EDQUOT} or "No space left" in text or _is_full(out_dir):
        return ResourceError(
            f"the disk filled up during {stage}",
            why=text,
            fix="free some space (`qwen-onnx store gc`) and run the same command again",
        )
    if errno.EFBIG in numbers or "File too large" in text or _SHORT_WRITE.search(text):
        return ResourceError(
            f"the disk does not take a file of {stage}",
            why=f"{text}: it may be larger than the file system, a quota or `ulimit -f` allows",
            fix="choose another disk with --store, or raise the limit, and run the same command again",
        )
    if isinstance(error, StageError):
        return error
    if isinstance(error, MemoryError):
        return ResourceError(
            f"{stage} ran out of memory", why=text, fix="close other programs, or use a larger machine"
        )
    return StageError(f"{stage} failed", why=text)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_full(folder: Path) -> bool:
    """Whether a write may have failed for want of space: libraries report that in many ways, and some not at all."""
    try:
        return shutil.disk_usage(folder).free < _FULL
    except OSError:
        return False


def _die_with_parent(parent: int) -> None:
    """Ask the kernel (Linux) to end this process when its parent dies, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
        if os.getppid() != parent if parent else os.getppid() == 1:  # it has died already
            sys.exit(1)


def quiet_libraries() -> None:
    """No telemetry; no network but where a stage asks for it; no spinning beside others."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "OLIVE_DISABLE_TELEMETRY", "ORT_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads that wait spin for microseconds instead of milliseconds: it costs nothing alone, and beside another
        # program that uses all cores a build is not slowed down a hundredfold.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
