"""The processes that steps run in, so that a crash, a leak or a kill of one leaves the build standing.

Most of a short step's time goes into importing torch, transformers and Olive. So steps that need these are forked from
one process that has imported them and done nothing else (Python's own fork server); it ends with the build.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import reduction
from pathlib import Path
from typing import Any

# The others import little, or read settings of the network when they do.
FORKED = ("export", "quantize", "compile", "validate")
# Systems take 103 bytes or more for the path of a socket, of which Python's own names in the folder are 32.
_LONGEST = 70


@dataclass(frozen=True)
class Process:
    """A started step: ``wait`` returns its exit code, negative when a signal ended it."""

    pid: int
    wait: Callable[[], int]

    def kill(self) -> None:
        """End it and all that it started."""
        for kill in (os.killpg, os.kill):  # it becomes the leader of a group of its own when it starts
            try:
                kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            return


def start(stage: str, job_file: Path, log: Path, events: int, lock: int) -> Process:
    """Run `pipeline.builds.worker` on a job.

    Args:
        log: takes what the process prints.
        events: descriptor that it writes events to.
        lock: descriptor that it keeps open, so that a lock is held until it is gone too.
    """
    if stage in FORKED and _forks():
        return _forked(job_file, log, events, lock)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.builds.worker", str(job_file), str(events), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(events, lock),
            start_new_session=True,
        )
    return Process(process.pid, process.wait)


def prepare() -> None:
    """Start importing now, beside what runs already."""
    if _forks():
        from multiprocessing import forkserver

        _context()
        forkserver.ensure_running()


def _forks() -> bool:
    """Whether there can be a fork server: its socket lies among temporary files, at a path of limited length."""
    folder = len(os.fsencode(tempfile.gettempdir()))
    return "forkserver" in multiprocessing.get_all_start_methods() and folder <= _LONGEST


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.builds.preloaded"])
    return context


def _forked(job_file: Path, log: Path, events: int, lock: int) -> Process:
    process = _context().Process(target=_Job(job_file, log, events, lock))
    process.start()

    def wait() -> int:
        process.join()
        code = process.exitcode
        assert code is not None  # it has been waited for
        return int(code)

    return Process(process.pid, wait)


class _Job:
    """What a forked process does; descriptors are handed over when it is pickled."""

    def __init__(self, job_file: Path, log: Path, events: int, lock: int) -> None:
        self._arguments = (job_file, log, Path.cwd(), dict(os.environ))
        self._descriptors = (events, lock)

    def __getstate__(self) -> tuple[Any, ...]:
        return self._arguments, tuple(map(reduction.DupFd, self._descriptors))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._arguments, descriptors = state
        self._descriptors = tuple(descriptor.detach() for descriptor in descriptors)

    def __call__(self) -> None:
        from pipeline.builds import worker

        job_file, log, folder, environment = self._arguments
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        os.close(output)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.exit(worker.main(str(job_file), self._descriptors[0]))
