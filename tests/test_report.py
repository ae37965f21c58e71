"""What people see fits a screen and names everything; what machines see is one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import errors
from pipeline.artifact import Artifact, Estimate, Need, Step
from pipeline.builds import report

STEP = Step("quantize", "f" * 64, {}, (), {}, Estimate(10**9, 10**8, 60))
ARTIFACT = Artifact(
    "quantize", "f" * 64, "d" * 64, Path("x"), {"a": (5_000_000, "0")}, {"bits_per_weight": 4.5}, 61.2, 2 * 10**9
)
LONG = "a path with ünïcode/" * 20


def _tell(told: report.Reporter) -> None:
    told.start(STEP)
    told.progress("quantize", 0.12345678, "layer 1\nof 2, [red]")
    told.note(LONG)
    told.done(ARTIFACT)
    told.hit(ARTIFACT)
    told.close()


def test_events_are_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    _tell(report.Events())
    report.show_error(errors.StageError("what\nhappened", where=LONG, why="why", fix="fix"), True)
    shown = capsys.readouterr()
    events = [json.loads(line) for line in shown.out.splitlines()]
    assert [event["event"] for event in events] == ["start", "progress", "note", "done", "hit", "error"]
    assert events[3]["facts"] == {"bits_per_weight": 4.5}
    assert events[3]["bytes"] == 5_000_000
    assert (events[5]["exit_code"], events[5]["what"], events[5]["where"]) == (7, "what\nhappened", LONG)
    assert shown.err == ""


def test_lines_say_what_a_step_took(capsys: pytest.CaptureFixture[str]) -> None:
    _tell(report.Lines())
    shown = capsys.readouterr().out
    assert "61 s" in shown
    assert "4.50 bits/weight" in shown
    assert "cached" in shown


def test_without_a_terminal_there_are_no_bars() -> None:
    assert isinstance(report.reporter(False), report.Lines)
    assert isinstance(report.reporter(True), report.Events)


@pytest.mark.parametrize("kind", errors.ERRORS.values())
def test_an_error_says_what_where_why_and_what_next(
    kind: type[errors.QwenOnnxError], capsys: pytest.CaptureFixture[str]
) -> None:
    error = kind("it failed", where="file:3", why="a cause", fix="do this")
    report.show_error(error, False)
    assert capsys.readouterr().err == "error: it failed\n  where: file:3\n  why: a cause\n  next: do this\n"
    assert vars(errors.from_dict(error.as_dict())) == vars(error)
    report.show_error(kind("it failed"), False)
    assert capsys.readouterr().err == "error: it failed\n"


def _validation(finite: bool) -> dict[str, Any]:
    """A report as large as they get: every gate, all domains, all failed."""
    names = ("mean_kl", "p99_kl", "perplexity_ratio", "top1")
    gates = [
        {"metric": name, "path": path, "value": 123.456789, "bound": 0.05, "sense": "max", "passed": False}
        for path in ("prefill", "decode")
        for name in names
    ]
    gates += [{**gates[0], "metric": "chat_template_mismatches", "path": f"runtime{index}"} for index in range(8)]
    domains = {name: {"mean_kl": 0.123456} for name in ("code", "english", "chinese", "math")}
    return {
        "gates": gates,
        "finite": finite,
        "reference": {"runtime": "torch 2.13.0+cpu", "dtype": "float32"},
        "candidate": {
            "runtime": "onnxruntime-genai 0.14.1",
            "provider": "NvTensorRTRTXExecutionProvider",
            "executed_on": "CPUExecutionProvider",
            "device": "the processor",
            "not_executed_on_target": "onnxruntime-genai-winml is not installed",
        },
        "greedy": {"answers": [{"name": "a", "first_divergence": None}, {"name": "b", "first_divergence": 0}]},
    } | ({"decode": {"domains": domains}} if finite else {})


@pytest.mark.parametrize("finite", [True, False])
def test_a_validation_fits_a_screen(finite: bool) -> None:
    lines = report.validation(_validation(finite)).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("FAIL") for line in lines) == 16
    assert "1 of 2" in lines[-1]
    assert any("NOT on NvTensorRTRTXExecutionProvider" in line for line in lines)


def test_a_plan_shows_needs_beside_what_the_machine_has() -> None:
    needed = Need(memory=3 * 10**9, disk=10**9, seconds=60, free_memory=2 * 10**9, free_disk=5 * 10**9)
    shown = report.plan("name", [STEP], {"quantize": None}, needed)
    assert "to do" in shown
    assert all(text in shown for text in ("3.0 GB", "2.0 free", "5.0 free"))
    assert "cached" in report.plan("name", [STEP], {"quantize": ARTIFACT}, needed)
