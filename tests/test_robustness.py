"""The robustness table: every case is run against the real program, and the page of the docs has what the table has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import robustness
from robustness_cases import Bench, Case, as_expected

NAMES = [f"{case.row}-{case.case}" for case in robustness.TABLE]


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(tmp_path_factory.mktemp("robustness"), request.getfixturevalue, stack)


@pytest.mark.slow
@pytest.mark.parametrize("case", robustness.TABLE, ids=NAMES)
def test_the_table(case: Case, bench: Bench, record_property: Callable[[str, object], None]) -> None:
    observed = case.provoke(bench)
    record_property(robustness.OBSERVED, (case.row, case.case, case.expected, observed))
    assert as_expected(case.expected, observed), observed


def test_the_page_has_the_cases_of_the_table() -> None:
    published = [row[:3] for row in robustness.published()]
    assert published == [(str(case.row), case.case, case.expected) for case in robustness.TABLE]


def test_no_row_is_left_out() -> None:
    assert {case.row for case in robustness.TABLE} >= set(range(1, 32))
    assert len(set(NAMES)) == len(NAMES)
