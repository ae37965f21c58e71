"""The process in which one step runs: a crash, a leak or a kill of it leaves the build standing.

Reads a job (JSON) from the file that is named on the command line; writes events, one JSON object a line, to the
descriptor that the job names. What libraries print goes to a log.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from pipeline import stages
from pipeline.artifact import Artifact, Step
from pipeline.errors import QwenOnnxError, ResourceError, StageError


def main(job_file: str) -> int:
    """Run the job in ``job_file``; returns the exit code of the process."""
    job = json.loads(Path(job_file).read_bytes())
    _die_with_parent(job["parent"])
    _quiet_libraries()
    step = Step.from_dict(job["step"])
    inputs = {name: Artifact(**{**data, "path": Path(data["path"])}) for name, data in job["inputs"].items()}
    with os.fdopen(job["events"], "w", buffering=1) as events:

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
            send({"event": "error", **_explain(error, step.stage).as_dict()})
            traceback.print_exc()
            return 1
        send({"event": "result", "facts": result.facts, "refused": result.refused})
    return 0


def _explain(error: BaseException, stage: str) -> QwenOnnxError:
    """The error to show for any exception; libraries report a full disk in many ways."""
    if isinstance(error, QwenOnnxError):
        return error
    text = f"{type(error).__name__}: {error}"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in text:
        return ResourceError(
            f"the disk filled up during {stage}",
            why=text,
            fix="free some space (`qwen-onnx store gc`) and run the same command again",
        )
    if isinstance(error, MemoryError):
        return ResourceError(
            f"{stage} ran out of memory", why=text, fix="close other programs, or use a larger machine"
        )
    return StageError(f"{stage} failed", why=text)


def _die_with_parent(parent: int) -> None:
    """Ask the kernel (Linux) to end this process when its parent dies, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
        if os.getppid() != parent:
            sys.exit(1)


def _quiet_libraries() -> None:
    """No telemetry; no network but where a stage asks for it."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "OLIVE_DISABLE_TELEMETRY", "ORT_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
