"""Gates: what is measured is held against the recipe, and a refusal says which, how much and what to try."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.builds import report
from pipeline.errors import StageError
from pipeline.facts import texts
from pipeline.facts.recipe import Gates, Validate
from pipeline.fidelity import metrics, parity, text_agreement
from pipeline.fidelity.agreement import Tally
from pipeline.runtime.session import Session
from pipeline.stages import validate

WANTED = Gates(mean_kl=0.05, p99_kl=0.5, top1=0.9, perplexity_ratio=1.05, greedy=0.5)
FIGURES = {"mean_kl": 0.04, "p99_kl": 0.4, "top1": 0.95, "perplexity_ratio": 1.02, "perplexity": 9.0}
GOOD: dict[str, Any] = {
    "finite": True,
    "prefill": {**FIGURES, "domains": {}},
    "decode": {**FIGURES, "domains": {"code": FIGURES}},
    "greedy": {
        "agreement": 0.7,
        "tokens": 8,
        "answers": [{"name": "a", "reference_ended": True, "ended": True, "first_divergence": None}],
    },
    "eos": {"ids": [1, 2], "reference_ids": [1, 2]},
    "tokenizer": {"runtime": [{"name": "decomposed accents", "reason": "known"}], "served": []},
    "chat_template": {"runtime": [], "served": []},
    "reference": {"runtime": "torch", "dtype": "float32"},
    "candidate": {
        "runtime": "genai",
        "provider": "CPUExecutionProvider",
        "executed_on": "CPUExecutionProvider",
        "device": "the processor",
    },
}


def _report(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    data = copy.deepcopy(GOOD)
    change(data)
    data["gates"] = validate.gates(data, WANTED)
    return data


def test_a_model_within_its_gates_passes() -> None:
    data = _report(lambda _: None)
    assert all(gate["passed"] for gate in data["gates"])
    shown = report.validation(data)
    assert "FAIL" not in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert len(shown.splitlines()) <= 30


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "divergence": (lambda d: d["decode"].update(mean_kl=1.873), "mean_kl (decode) is 1.873, the gate is at most 0.05"),
    "tail": (lambda d: d["prefill"].update(p99_kl=9.5), "p99_kl (prefill) is 9.5, the gate is at most 0.5"),
    "ranking": (lambda d: d["prefill"].update(top1=0.496), "top1 (prefill) is 0.496, the gate is at least 0.9"),
    "perplexity": (lambda d: d["decode"].update(perplexity_ratio=5.9), "perplexity_ratio (decode) is 5.9"),
    "answers": (lambda d: d["greedy"].update(agreement=0.1), "greedy (decode) is 0.1, the gate is at least 0.5"),
    "no end": (lambda d: d["greedy"]["answers"][0].update(ended=False), "runaway_answers (decode) is 1"),
    "other end tokens": (lambda d: d["eos"].update(ids=[1]), "eos_mismatches is 1"),
    "tokenizer": (lambda d: d["tokenizer"]["served"].append({"name": "x"}), "tokenizer_mismatches (served) is 1"),
    "template": (lambda d: d["chat_template"]["runtime"].append({"name": "x"}), "chat_template_mismatches (runtime)"),
    "NaN": (lambda d: d.update(finite=False, failure="logits have NaN"), "logits have NaN; finite is 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_each_failure_is_named_with_value_and_gate(case: str) -> None:
    change, text = BAD[case]
    data = _report(change)
    assert sum(not gate["passed"] for gate in data["gates"]) == 1
    error = validate._refusal(data, {"algorithm": "dynamic"})
    assert error.exit_code == 8
    assert text in str(error)
    assert "reduce_range: true" in str(error)
    assert "FAIL" in report.validation(data)


def test_a_figure_that_is_no_number_fails_its_gate() -> None:
    data = _report(lambda d: d["decode"].update(mean_kl=float("nan"), top1=float("nan")))
    failed = [(gate["metric"], gate["path"]) for gate in data["gates"] if not gate["passed"]]
    assert failed == [("mean_kl", "decode"), ("top1", "decode")]


def test_a_gate_that_the_recipe_leaves_out_is_not_asked() -> None:
    data = copy.deepcopy(GOOD)
    found = validate.gates(data, Gates(mean_kl=0.05, top1=0.9, perplexity_ratio=1.05))
    assert "p99_kl" not in {gate["metric"] for gate in found}
    assert {gate["path"] for gate in found if gate["metric"] == "mean_kl"} == {"prefill", "decode"}


def test_one_answer_may_run_on_where_the_recipe_says_so_but_not_all_of_them() -> None:
    data = copy.deepcopy(GOOD)
    data["greedy"]["answers"] *= 2
    data["greedy"]["answers"][0] = {**data["greedy"]["answers"][0], "ended": False}
    wanted = WANTED.model_copy(update={"runaway": 1})

    def passed() -> bool:
        return next(gate["passed"] for gate in validate.gates(data, wanted) if gate["metric"] == "runaway_answers")

    assert passed()
    data["greedy"]["answers"][1] = data["greedy"]["answers"][0]
    assert not passed()


def test_all_failures_are_told_together_with_advice_for_the_algorithm() -> None:
    data = _report(lambda d: (d["decode"].update(mean_kl=1.0), d["greedy"].update(agreement=0.0)))
    error = validate._refusal(data, {"algorithm": "gptq"})
    assert error.why.count(";") == 1
    assert "smaller block_size" in error.fix
    assert "reduce_range" not in error.fix


def test_differences_of_the_served_tokenizer_are_never_excused() -> None:
    """What the runtime's own tokenizer is known for does not excuse ours, nor the runtime elsewhere."""
    for name in parity.KNOWN:
        assert name in texts.TOKENIZER_PROBES or name in {entry.name for entry in texts.conversations(True)}
        assert parity._reason("runtime", name)["reason"]
        assert parity._reason("served", name) == {}
    assert parity._reason("runtime", "plain") == {}


def test_tallies_are_the_metrics_over_all_windows() -> None:
    random = np.random.default_rng(0)
    tally = Tally()
    divergences, agreements = [], []
    for domain in ("code", "math", "code"):
        wanted = metrics.log_softmax(random.standard_normal((6, 11)).astype(np.float32))
        logits = random.standard_normal((6, 11)).astype(np.float32)
        tally.add(domain, wanted, logits, list(range(6)))
        other = metrics.log_softmax(logits)
        divergences.append(metrics.kl_divergence(wanted, other))
        agreements.append(metrics.top1_agreement(wanted, other))
    figures = tally.figures()
    assert figures["positions"] == 18
    assert figures["mean_kl"] == pytest.approx(np.concatenate(divergences).mean(), abs=1e-6)
    assert figures["top1"] == pytest.approx(np.concatenate(agreements).mean(), abs=1e-6)
    assert tally.figures("math")["mean_kl"] == pytest.approx(divergences[1].mean(), abs=1e-6)


def characters(text: str, **_: Any) -> dict[str, list[int]]:
    return {"input_ids": list(range(len(text)))}


def test_windows_take_turns_and_do_not_overlap() -> None:
    windows = text_agreement.cut(characters, 8, 20)
    assert [window.domain for window in windows] == ["code", "english", "chinese", "math"] * 2
    assert windows[0].ids[-1] + 1 == windows[4].ids[0]


def test_more_windows_than_there_is_text_are_refused() -> None:
    with pytest.raises(StageError, match="fewer than 64 windows of 2048 tokens"):
        text_agreement.cut(characters, 64, 2048)


def _extended(folder: Path, **spec: int) -> dict[str, int]:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 320, "rope_scaling": scaling}))
    session = Session(folder, None, {"model": {"context_length": 1024}}, 1, "cpu")
    return validate._extended(folder, session, Validate(gates=WANTED, **spec))


def test_what_is_measured_of_an_extended_context_is_told(tmp_path: Path) -> None:
    assert _extended(tmp_path, window_tokens=128) == {"original": 256, "context": 1024, "measured": 128}
    assert _extended(tmp_path, long_tokens=320) == {"original": 256, "context": 1024, "measured": 320}
    with pytest.raises(StageError, match=r"319 tokens ends within the window of 256[\s\S]*ask for 320 or more"):
        _extended(tmp_path, long_tokens=319)
    with pytest.raises(StageError, match=r"1024 tokens does not fit the context of 1024[\s\S]*ask for 1023"):
        _extended(tmp_path, long_tokens=1024)


def test_the_end_of_a_long_text_has_a_gate() -> None:
    data = _report(lambda d: d.update(long={**FIGURES, "tokens": 400, "mean_kl": 0.06}))
    assert [(gate["metric"], gate["path"]) for gate in data["gates"] if not gate["passed"]] == [("mean_kl", "long")]
    assert "mean_kl (long) is 0.06" in str(validate._refusal(data, {"algorithm": "gptq"}))
