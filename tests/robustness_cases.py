"""What a case of the robustness table is made of, and how what was seen is put into words that are always the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from test_server import KEY, Server, key, serving

from pipeline.errors import QwenOnnxError
from pipeline.serve.web import security

if TYPE_CHECKING:
    from builds import Project


@dataclass
class Bench:
    """What the cases share, each part made when it is first asked for.

    Attributes:
        root: a folder for what the cases write.
        part: gets a session fixture by its name.
    """

    root: Path
    part: Callable[[str], Any]
    stack: ExitStack
    numbers: Iterator[int] = field(default_factory=itertools.count)
    running: Server | None = None

    def folder(self) -> Path:
        """A new empty folder."""
        made = self.root / f"case {next(self.numbers)}"
        made.mkdir()
        return made

    def built(self) -> Project:
        """A copy of the one tiny project, to be damaged at will."""
        project: Project = self.part("built")()
        return project.copy(self.folder())

    def server(self) -> Server:
        """The one server of the tiny model, which asks for a key; started again after a case that stopped it."""
        if self.running is None or self.running.process.poll() is not None:
            options = ("--max-body", "1MB", "--queue", "8", "--parallel", "2", "--write-seconds", "1")
            context = serving(self.part("tiny_package"), *options, environment={security.VARIABLE: f"one:{KEY}"})
            self.running = self.stack.enter_context(context)
            self.running.headers = key()
        return self.running


@dataclass(frozen=True)
class Case:
    """A row of the table, or one of several cases of it.

    Attributes:
        row: number in the table; cases of one row have it in common.
        expected: what is observed, or the part of it before a colon that a reason follows.
        how: what is run.
        provoke: runs it, and returns what was observed: no times, no paths.
    """

    row: int
    case: str
    expected: str
    how: str
    provoke: Callable[[Bench], str]


def as_expected(expected: str, observed: str) -> bool:
    return observed == expected or observed.startswith(f"{expected}: ")


def told(code: int, what: str, folder: Path, state: str) -> str:
    """An end of a command: its code, in which state it left things, and its reason without the folder."""
    reason = what.replace(f"{folder}/", "").replace(str(folder), "the folder").strip().splitlines()
    return f"exit {code}, {state}: {reason[0] if reason else 'nothing was said'}"


def refusal(run: Callable[[], object]) -> tuple[int, str]:
    """Exit code and first words of the error that ``run`` ends with; 0 where there is none."""
    try:
        run()
    except QwenOnnxError as error:
        reason = "; ".join(part for part in (error.what, error.why) if part)
        return error.exit_code, " ".join(reason.split())
    return 0, "nothing was refused"


def need(condition: object, what: str) -> None:
    """End a case whose own premises do not hold."""
    if not condition:
        pytest.fail(f"the case could not be provoked: {what}")
