"""The processes of a benchmark: each is given a job (JSON) on standard input, and answers on standard output.

What goes wrong stands last on standard error: an error of ours as JSON, or whatever another program says.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, TypeVar

from pipeline.errors import ERRORS, QwenOnnxError, ResourceError, StageError, from_dict

_T = TypeVar("_T")
_KILLED = -9


def call(command: Sequence[str], job: Mapping[str, Any], what: str, take: Callable[[IO[bytes]], _T]) -> _T:
    """Run a job to its end, and return what ``take`` reads of its answer.

    Args:
        what: names the job where it fails.
        take: raises `EOFError` when the answer is too short.

    Raises:
        QwenOnnxError: as the process said.
        ResourceError: it was killed.
        StageError: it ended in another way, or without its answer.
    """
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:
        given.write(json.dumps(job).encode())
        given.seek(0)
        short = False
        with subprocess.Popen(command, stdin=given, stdout=subprocess.PIPE, stderr=said) as process:
            assert process.stdout is not None
            try:
                answer = take(process.stdout)
                process.stdout.read()
            except EOFError:
                short = True
            except BaseException:
                process.kill()
                raise
        if process.returncode or short:
            said.seek(0)
            raise _failure(process.returncode, said.read().decode("utf-8", errors="replace").strip(), what)
        return answer


def one_object(answer: IO[bytes]) -> dict[str, Any]:
    """For `call`: the JSON object that is the whole answer."""
    line = answer.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    value: dict[str, Any] = json.loads(line)
    return value


def nothing(answer: IO[bytes]) -> None:
    """For `call`: the job's answer is that it ends well."""


def _failure(code: int, said: str, what: str) -> QwenOnnxError:
    last = said.rpartition("\n")[2]
    if code in {kind.exit_code for kind in ERRORS.values()} and last.startswith("{"):
        return from_dict(json.loads(last))
    if code == _KILLED:
        return ResourceError(
            f"{what} was killed", why="most likely for want of memory", fix="close other programs, or leave it out"
        )
    return StageError(f"{what} failed", why=last or f"it ended with exit code {code}")
