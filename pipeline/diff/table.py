"""The difference of two releases as a table for people."""

from __future__ import annotations

import io
import json
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.diff.releases import Diff
from pipeline.diff.rules import BREAKING, COMPATIBLE, REVIEW, RULES

_STYLES = {BREAKING: "bold red", REVIEW: "yellow", COMPATIBLE: "green"}
_WIDTH = 60  # characters of a value
_ROWS = 8  # of a rule, unless all are asked for


def text(diff: Diff, everything: bool = False, width: int | None = None) -> str:
    """Verdict, then the findings, the worst first; with ``everything`` all of a rule that is found often."""
    out = io.StringIO()
    plain = Console().is_terminal
    console = Console(file=out, width=width or max(100, Console().width), force_terminal=plain, highlight=False)
    names = [str(manifest.data["name"]) for manifest in (diff.old, diff.new)]
    console.print(Text(f"{names[0]} ({diff.old.digest[:12]}) and {names[1]} ({diff.new.digest[:12]})"))
    table = Table(box=box.SIMPLE, pad_edge=False)
    for title in ("VERDICT", "ABOUT", "WHAT", "OLD", "NEW"):
        table.add_column(title, overflow="fold")
    shown: dict[str, int] = {}
    for finding in diff.findings:
        shown[finding.rule] = shown.get(finding.rule, 0) + 1
        if shown[finding.rule] <= _ROWS or everything:
            row = (RULES[finding.rule].topic, finding.item, _value(finding.old), _value(finding.new))
            table.add_row(Text(finding.verdict, _STYLES[finding.verdict]), *map(Text, row))
    if diff.findings:
        console.print(table)
    if not everything and (more := sum(max(0, count - _ROWS) for count in shown.values())):
        console.print(f"and {more} more of the same kinds; --all shows them")
    for rule in dict.fromkeys(finding.rule for finding in diff.findings if finding.verdict == diff.verdict):
        if diff.verdict != COMPATIBLE:
            console.print(Text(f"{RULES[rule].topic}: {RULES[rule].when}: {RULES[rule].why}"))
    console.print(Text.assemble("verdict: ", (diff.verdict, _STYLES[diff.verdict])))
    return out.getvalue().rstrip()


def _value(value: Any) -> str:
    """A value in a few characters; what could reach a terminal as a command is escaped."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    written = written if written.isprintable() else ascii(written)
    return written if len(written) <= _WIDTH else f"{written[: _WIDTH - 3]}..."
