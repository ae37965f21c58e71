"""Two releases of a package: every rule is found by a change that it is about, and by nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_package

from pipeline import cli
from pipeline.diff import releases as release_diff, rules as diff_rules, table as diff_report
from pipeline.errors import PackageError
from pipeline.package import onnx_references

DOCUMENT = Path(__file__).parent.parent / "docs" / "diff.md"
Change = Callable[[Path], dict[str, Any]]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_package.write(tmp_path_factory.mktemp("old") / "tiny")


def facts(**changes: Any) -> Change:
    """Other fields of the manifest; an object is merged into what is there."""
    return lambda _: {
        key: {**tiny_package.FACTS[key], **value} if isinstance(tiny_package.FACTS.get(key), dict) else value
        for key, value in changes.items()
    }


def edited(name: str, edit: Callable[[Any], Any]) -> Change:
    """Another content of a JSON file."""

    def change(folder: Path) -> dict[str, Any]:
        data = json.loads((folder / name).read_bytes())
        edit(data)
        (folder / name).write_text(json.dumps(data))
        return {}

    return change


def text(name: str, content: str) -> Change:
    def change(folder: Path) -> dict[str, Any]:
        (folder / name).write_text(content)
        return {}

    return change


def without(name: str) -> Change:
    def change(folder: Path) -> dict[str, Any]:
        (folder / name).unlink()
        return {}

    return change


def graph(*operators: str, **options: Any) -> Change:
    def change(folder: Path) -> dict[str, Any]:
        (folder / "model.onnx").write_bytes(tiny_package.graph(*operators, **options).SerializeToString())
        return {}

    return change


def bench(*subjects: tuple[str, float, int], processor: str = "x") -> str:
    shown = [
        {"name": name, "kind": "package", "version": "1", "bytes": 1, "prefill": {"8": 50.0}, "decode": {"8": rate}}
        | {"time_to_first_token": 1.0, "load": 1.0, "peak_memory": memory}
        for name, rate, memory in subjects
    ]
    machine = {"processor": processor, "threads": 2, "system": "Linux"}
    return json.dumps({"schema_version": 1, "machine": machine, "rounds": 1, "subjects": shown, "absent": []})


def measured(rate: float, memory: int = 100) -> Change:
    def change(folder: Path) -> dict[str, Any]:
        found = bench(("tiny", 20.0, 100), (folder.name, rate, memory))
        folder.with_name(f"{folder.name}.bench.json").write_text(found)
        return {}

    return change


def golden(*entries: Any) -> Change:
    return text("golden.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))


def _worse(data: Any) -> None:
    data["decode"]["mean_kl"] = 0.03


def _better(data: Any) -> None:
    data["decode"]["top1"] = 0.95


# Change → the rules that it breaks, beside "speed.unmatched", "size.changed" and what every change of a file brings.
CHANGES: dict[str, tuple[Change, set[str]]] = {
    "another base": (facts(source={"base_model": "Qwen/Other"}), {"base"}),
    "another checkpoint": (facts(source={"sha256": "bb"}), {"checkpoint"}),
    "other languages": (facts(source={"languages": ["en"]}), {"languages"}),
    "another licence": (facts(source={"license": "MIT"}), {"licence"}),
    "another text of the licence": (text("LICENSE", "Do not."), {"licence.text"}),
    "more layers": (
        facts(recipe={"architecture": {"model_type": "qwen2", "layers": 3}}),
        {"architecture"},
    ),
    "another scheme": (facts(recipe={"quantize": {"algorithm": "rtn"}}), {"scheme"}),
    "other tools": (facts(tools={"onnx": "2.0"}), {"tools"}),
    "a newer runtime": (facts(runtime={"minimum": "0.15.0"}), {"runtime.raised"}),
    "a runtime of two digits": (facts(runtime={"minimum": "0.9.9"}), {"runtime.lowered"}),
    "another runtime": (facts(runtime={"name": "other"}), {"runtime"}),
    "another provider": (facts(target={"provider": "CUDAExecutionProvider"}), {"provider"}),
    "other activations": (facts(target={"dtype": "float16"}), {"target"}),
    "another tolerance": (facts(replay={"top1": 0.8}), {"replay"}),
    "another type": (edited("genai_config.json", lambda c: c["model"].update(type="llama")), {"config.type"}),
    "less context": (
        edited("genai_config.json", lambda c: c["model"].update(context_length=32)),
        {"config.context.less"},
    ),
    "more context": (
        edited("genai_config.json", lambda c: c["model"].update(context_length=128)),
        {"config.context.more"},
    ),
    "another end": (edited("genai_config.json", lambda c: c["model"].update(eos_token_id=[257])), {"config.tokens"}),
    "the same ends": (edited("genai_config.json", lambda c: c["model"].update(eos_token_id=[256, 257])), set()),
    "another temperature": (
        edited("genai_config.json", lambda c: c["search"].update(temperature=0.1)),
        {"config.search"},
    ),
    "threads": (
        edited("genai_config.json", lambda c: c["model"]["decoder"]["session_options"].update(intra_op_num_threads=2)),
        {"config.other"},
    ),
    "a new control token": (
        text("tokenizer.json", tiny_package.tokenizer(("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|x|>"))),
        {"tokenizer.added", "tokenizer.special"},
    ),
    "control tokens in another order": (
        text("tokenizer.json", tiny_package.tokenizer(("<|im_end|>", "<|endoftext|>", "<|im_start|>"))),
        {"tokenizer.moved", "tokenizer.special", "tokenizer.probes"},
    ),
    "a merge that is gone": (
        text("tokenizer.json", tiny_package.tokenizer(merged=False)),
        {"tokenizer.moved", "tokenizer.merges", "tokenizer.special", "tokenizer.probes"},
    ),
    "another normalizer": (
        edited("tokenizer.json", lambda t: t.update(normalizer={"type": "Lowercase"})),
        {"tokenizer.steps", "tokenizer.probes"},
    ),
    "another template": (text("chat_template.jinja", tiny_package.TEMPLATE + " "), {"template"}),
    "another output": (graph("Identity", "Abs", output="scores"), {"graph.interface"}),
    "another operator": (graph("Identity", "Neg"), {"graph.operators", "graph.counts"}),
    "more operators": (graph("Identity", "Abs", "Abs"), {"graph.counts"}),
    "a newer opset": (graph("Identity", "Abs", opset=22), {"graph.opset"}),
    "worse": (edited("validation.json", _worse), {"quality.worse"}),
    "hardly worse": (edited("validation.json", lambda v: v["decode"].update(mean_kl=0.0215)), set()),
    "better": (edited("validation.json", _better), {"quality.better"}),
    "other texts": (edited("validation.json", lambda v: v["text"].update(sha256="f0")), {"quality.unmatched"}),
    "a figure that is gone": (edited("validation.json", lambda v: v["decode"].pop("top1")), {"quality.unmatched"}),
    "a looser gate": (edited("validation.json", lambda v: v["gates"][0].update(bound=0.1)), {"quality.gate"}),
    "a tighter gate": (edited("validation.json", lambda v: v["gates"][0].update(bound=0.03)), set()),
    "a gate that is gone": (edited("validation.json", lambda v: v["gates"].clear()), {"quality.gate"}),
    "another answer": (
        golden({**tiny_package.GOLDEN[0], "tokens": [3, 9]}, tiny_package.GOLDEN[1]),
        {"golden.changed"},
    ),
    "another question": (golden(tiny_package.GOLDEN[0], {"prompt": [8], "tokens": [7]}), {"golden.unmatched"}),
    "slower": (measured(15.0), {"speed.slower"}),
    "faster": (measured(25.0), {"speed.faster"}),
    "hardly slower": (measured(19.0), set()),
    "more memory": (measured(20.0, 150), {"speed.memory"}),
    "larger": (text("notes.txt", "x" * 20_000), {"size.larger", "files.added"}),
    "a file that is gone": (without("replay.py"), {"files.removed"}),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_is_found_and_judged(old: Path, tmp_path: Path, case: str) -> None:
    change, wanted = CHANGES[case]
    new = tiny_package.write(tmp_path / "new")
    tiny_package.seal(new, **change(new))
    found = release_diff.compare(old, new)
    rules = {finding.rule for finding in found.findings}
    assert rules - {"speed.unmatched", "size.changed"} == wanted
    verdicts = [diff_rules.RULES[rule].verdict for rule in wanted]
    worst = [word for word in (diff_rules.BREAKING, diff_rules.REVIEW) if word in verdicts]
    assert found.verdict == (worst[0] if worst else diff_rules.COMPATIBLE)
    assert found.verdict in diff_report.text(found)


def test_adapters_come_change_and_go(old: Path, tmp_path: Path) -> None:
    """Their files are left out here, so that the packages have to be trusted."""
    rich = tiny_package.write(tmp_path / "rich", adapters={"a": {"sha256": "1"}, "b": {"sha256": "2"}})
    other = tiny_package.write(tmp_path / "other", adapters={"a": {"sha256": "3"}})
    rules = [finding.rule for finding in release_diff.compare(rich, other, trust=True).findings]
    assert rules[:2] == ["adapter.removed", "adapter.changed"]
    found = release_diff.compare(old, rich, trust=True)
    assert {finding.item for finding in found.findings if finding.rule == "adapter.added"} == {"a", "b"}


def test_every_rule_is_tested_or_named_here() -> None:
    """Those that are left need packages that this version cannot verify, or a library that is absent."""
    tested = set().union(*(rules for _, rules in CHANGES.values()))
    tested |= {"adapter.removed", "adapter.changed", "adapter.added", "size.changed", "speed.unmatched"}
    assert diff_rules.RULES.keys() - tested == {"task", "schema", "tokenizer.unchecked"}


def test_equal_releases_are_compatible(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = tiny_package.write(tmp_path / "new")
    assert cli.main(["diff", str(old), str(new)]) == 0
    assert "verdict: compatible" in capsys.readouterr().out
    assert cli.main(["diff", str(old), str(old)]) == 2


def test_exit_codes_and_json(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = tiny_package.write(tmp_path / "review", tools={"onnx": "2"}, replay={"top1": 0.5})
    assert cli.main(["diff", str(old), str(new), "--json"]) == diff_rules.EXIT_CODES[diff_rules.REVIEW] == 20
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "needs review"
    assert [finding["rule"] for finding in found["findings"]] == ["replay", "tools", "speed.unmatched"]
    assert found["findings"][0]["why"] == diff_rules.RULES["replay"].why
    new = tiny_package.write(tmp_path / "breaking", source={**tiny_package.FACTS["source"], "license": "MIT"})
    assert cli.main(["diff", str(old), str(new)]) == diff_rules.EXIT_CODES[diff_rules.BREAKING] == 21
    assert "what users may do with the model changes" in " ".join(capsys.readouterr().out.split())


def test_packages_are_verified_unless_they_are_trusted(old: Path, tmp_path: Path) -> None:
    new = tiny_package.write(tmp_path / "new")
    (new / "model.onnx.data").write_bytes(b"x" * (new / "model.onnx.data").stat().st_size)
    with pytest.raises(PackageError, match="not the package that was built"):
        release_diff.compare(old, new)
    assert release_diff.compare(old, new, trust=True).verdict == diff_rules.COMPATIBLE


@pytest.mark.parametrize("value", [None, [], "x", 3, {"a": [1]}])
def test_files_of_another_shape_are_no_traceback(old: Path, tmp_path: Path, value: Any) -> None:
    new = tiny_package.write(tmp_path / "new")
    for name in ("validation.json", "golden.jsonl"):
        (new / name).write_text(json.dumps(value) + "\n")
    found = release_diff.compare(old, tiny_package.seal(new, tools=copy.deepcopy(tiny_package.FACTS["tools"])))
    assert found.verdict == diff_rules.REVIEW
    diff_report.text(found)


def test_a_benchmark_of_another_machine_says_nothing(old: Path, tmp_path: Path) -> None:
    new = tiny_package.write(tmp_path / "new")
    (tmp_path / "new.bench.json").write_text(bench(("new", 1.0, 100), processor="slow"))
    rules = {finding.rule for finding in release_diff.compare(old, new).findings}
    assert rules == {"speed.unmatched"}


def test_operators_are_counted_as_onnx_counts_them() -> None:
    from onnx import helper

    made = tiny_package.graph("Identity", "Abs", "Abs")
    inner = helper.make_graph([helper.make_node("Neg", ["a"], ["b"])], "inner", [], [])
    made.graph.node.append(helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=inner))
    made.graph.node.append(helper.make_node("MatMulNBits", ["a"], ["e"], domain="com.microsoft"))
    made.functions.add(name="f", domain="x").node.append(helper.make_node("Exp", ["a"], ["b"]))
    data = made.SerializeToString()
    wanted = {"Identity": 1, "Abs": 2, "Neg": 2, "If": 1, "com.microsoft::MatMulNBits": 1, "Exp": 1}
    assert onnx_references.operators(data) == wanted
    assert onnx_references.opsets(data) == {"ai.onnx": 21}
    with pytest.raises(ValueError, match="ends within"):
        onnx_references.operators(data[:-3])


def test_the_rules_are_documented() -> None:
    assert diff_rules.table() in DOCUMENT.read_text(encoding="utf-8")
