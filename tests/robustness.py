"""The robustness table; ``python tests/robustness.py --write`` runs all cases and writes its page in the docs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from robustness_builds import BUILDS
from robustness_cases import Case, as_expected
from robustness_inputs import FILES
from robustness_serving import SERVING

PAGE = Path(__file__).parents[1] / "docs" / "robustness.md"
OBSERVED = "robustness"  # the property of a test's report that has the row
HEAD = "| # | case | expected | observed |"
TABLE: list[Case] = sorted([*FILES, *BUILDS, *SERVING], key=lambda case: case.row)
Row = tuple[int, str, str, str]

_INTRODUCTION = """\
# Robustness

What was done to the program, what it should do, and what it did. Written by `python tests/robustness.py --write`, which
runs every case against the real commands, stages and server on tiny models; `pytest tests/test_robustness.py` runs them
again and compares. `exit N` is the exit code, as the README lists them; what stands before a colon is expected, what
follows is the reason that the program gave. Codes of packages are those of [verify.md](verify.md).

"""


def observed_rows(reports: Iterable[Any]) -> list[Row]:
    """The rows of test reports, in the order of the table."""
    rows = [value for report in reports for name, value in report.user_properties if name == OBSERVED]
    return sorted(rows, key=lambda row: row[0])


def summary(rows: list[Row]) -> list[str]:
    """Lines to print: of each case what was expected and observed, and how many are as expected."""
    lines = [
        f"{row:>3}  {case}\n     expected  {expected}\n     observed  {seen}" for row, case, expected, seen in rows
    ]
    good = sum(as_expected(expected, seen) for _, _, expected, seen in rows)
    return [*lines, f"{len(rows)} cases, {good} as expected"]


def page(rows: list[Row]) -> str:
    ways = {(case.row, case.case): case.how for case in TABLE}
    lines = [f"| {row} | {_cell(case)} | {_cell(expected)} | {_cell(seen)} |" for row, case, expected, seen in rows]
    how: dict[str, set[int]] = {}
    for row, case, _, _ in rows:
        how.setdefault(ways[row, case], set()).add(row)
    provoked = [f"| {', '.join(map(str, sorted(numbers)))} | {_cell(text)} |" for text, numbers in how.items()]
    parts = [HEAD, "| ---: | --- | --- | --- |", *lines, "", summary(rows)[-1] + ".", "", "## What is run", ""]
    return _INTRODUCTION + "\n".join([*parts, "| # | how |", "| --- | --- |", *provoked]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def published() -> list[tuple[str, str, str, str]]:
    """The rows of the page: number, case, expected and observed."""
    lines = PAGE.read_text(encoding="utf-8").partition(HEAD)[2].partition("\n\n")[0].splitlines()[2:]
    rows = [line.strip("|").replace("\\|", "\0").split("|") for line in lines]
    return [tuple(cell.strip().replace("\0", "|") for cell in row) for row in rows]  # type: ignore[misc]


class _Recorder:
    """A plugin of pytest that keeps the reports of what was run."""

    def __init__(self) -> None:
        self.reports: list[Any] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call":
            self.reports.append(report)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run every case of the robustness table.")
    parser.add_argument("--write", action="store_true", help="then write docs/robustness.md")
    options = parser.parse_args()
    recorder = _Recorder()
    test = f"{Path(__file__).with_name('test_robustness.py')}::test_the_table"
    quiet = ("-q", "-W", "ignore::pytest.PytestAssertRewriteWarning")  # some modules are imported here already
    code = int(pytest.main([test, *quiet], plugins=[recorder]))
    rows = observed_rows(recorder.reports)
    if code or len(rows) != len(TABLE):
        print(f"the page stays as it was: {len(rows)} of {len(TABLE)} cases ran, pytest ended with {code}")
        return 1
    if options.write:
        PAGE.write_text(page(rows), encoding="utf-8")
        print(f"wrote {PAGE.relative_to(Path.cwd()) if PAGE.is_relative_to(Path.cwd()) else PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
