"""What CI gets of a build (summary, JUnit), and the templates of deploy/ci, run step by step."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from builds import tiny_recipe

from pipeline import cli
from pipeline.artifact import VALIDATION, Estimate, Step
from pipeline.builds import summary
from pipeline.builds.store import Store
from pipeline.errors import GateError, StageError
from pipeline.facts.target import TARGETS

ROOT = Path(__file__).parent.parent
CI = ROOT / "deploy" / "ci"
HOSTILE = 'a < b & "c" ]]> \x1b[31m \x00 \ud800 模型'
GATES = [
    {"metric": "finite", "path": "", "value": 1.0, "bound": 1.0, "sense": "min", "passed": True},
    {"metric": "mean_kl", "path": "prefill", "value": 0.5, "bound": 0.03, "sense": "max", "passed": False},
]


def _recorder(folder: Path) -> summary.Recorder:
    """One that has seen a checkpoint in the store and a validation that was made in 12 seconds."""
    store, recorder = Store(folder), summary.Recorder()
    for stage, report in (("checkpoint", recorder.hit), ("validate", recorder.done)):
        step = Step(stage, f"{stage}-key", {}, (), {}, Estimate(0, 0, 0))
        with store.lock(step.key), store.workspace(step) as files:
            (files / VALIDATION).write_text(json.dumps({"gates": GATES}), encoding="utf-8")
            report(store.publish(step, files, {}, seconds=12.0))
    return recorder


def _check(text: str) -> ElementTree.Element:
    """Parse JUnit's XML, and hold it against what readers of it agree on."""
    root = ElementTree.fromstring(text.encode("utf-8"))
    assert root.tag == "testsuites"
    for suite in root:
        assert (suite.tag, bool(suite.attrib["name"])) == ("testsuite", True)
        cases = list(suite)
        assert int(suite.attrib["tests"]) == len(cases) > 0
        for attribute, kind in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(suite.attrib[attribute]) == len(suite.findall(f"testcase/{kind}"))
        for case in cases:
            assert case.tag == "testcase"
            assert case.attrib.keys() == {"classname", "name", "time"}
            assert len(case) <= 1
            assert {child.tag for child in case} <= {"failure", "error", "skipped", "system-out"}
        names = [case.attrib["name"] for case in cases]
        assert len(set(names)) == len(names)
        total = sum(float(case.attrib["time"]) for case in cases)
        assert float(suite.attrib["time"]) == pytest.approx(total, abs=0.01)
    return root


def test_each_gate_is_a_test_case_with_its_share_of_the_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _recorder(tmp_path).summary("tiny-cpu", error=GateError("mean_kl is 0.5"))
    assert (found["outcome"], found["exit_code"], found["package"]) == ("refused", 8, None)
    assert [(step["stage"], step["cached"]) for step in found["steps"]] == [("checkpoint", True), ("validate", False)]
    steps, gates = _check(summary.junit(found))
    assert [(case.attrib["name"], case.attrib["time"]) for case in steps] == [("checkpoint", "0.000")]
    assert steps[0].find("skipped") is not None
    assert [(case.attrib["name"], case.attrib["time"]) for case in gates] == [
        ("finite", "6.000"),
        ("mean_kl (prefill)", "6.000"),
    ]
    [failure] = gates.findall("testcase/failure")
    assert failure.attrib["message"] == "mean_kl (prefill) is 0.5, the gate is at most 0.03"
    assert gates.attrib["failures"] == "1"


def test_a_step_that_failed_is_named_and_any_text_stays_well_formed(tmp_path: Path) -> None:
    recorder = _recorder(tmp_path)
    recorder.start(Step("export", "export-key", {}, (), {}, Estimate(0, 0, 0)))
    found = recorder.summary(HOSTILE, error=StageError(HOSTILE, why=HOSTILE, fix="read the log"))
    assert (found["outcome"], found["exit_code"], found["failed_step"]) == ("failed", 7, "export")
    root = _check(summary.junit(found))
    [error] = root.findall("testsuite/testcase/error")
    readable = HOSTILE.replace("\x1b", "\ufffd").replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    assert error.attrib == {"message": readable, "type": "StageError"}
    assert f"why: {readable}\nnext: read the log" in (error.text or "")


def test_a_recipe_that_cannot_be_read_is_summarized_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "tiny" / "cpu-int4.yaml"
    bad.parent.mkdir()
    bad.write_text("targt: cpu\n", encoding="utf-8")
    out = tmp_path / "new folder"
    assert cli.main(["build", str(bad), "--summary", str(out / "s.json"), "--junit", str(out / "j.xml")]) == 3
    assert "targt" in capsys.readouterr().err
    found = json.loads((out / "s.json").read_text(encoding="utf-8"))
    assert (found["name"], found["outcome"], found["exit_code"]) == ("tiny-cpu-int4", "failed", 3)
    assert found["error"]["error"] == "RecipeError"
    [suite] = _check((out / "j.xml").read_text(encoding="utf-8"))
    assert [(case.attrib["name"], case[0].tag) for case in suite] == [("build", "error")]


def test_a_summary_that_cannot_be_written_does_not_hide_why_the_build_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    arguments = ["build", str(tmp_path / "none.yaml"), "--junit", str(tmp_path / "file" / "j.xml")]
    code = cli.main(arguments)
    err = capsys.readouterr().err
    assert code == 3
    assert "j.xml cannot be written" in err
    assert "none.yaml" in err


# The templates.


@dataclass(frozen=True)
class Template:
    """The job of the GitHub workflow."""

    job: dict[str, Any]

    @property
    def cells(self) -> list[dict[str, str]]:
        """All combinations of the matrix."""
        matrix = self.job["strategy"]["matrix"]
        found = [{"target": target, "scheme": scheme} for target in matrix["target"] for scheme in matrix["scheme"]]
        return found + matrix["include"]

    def value(self, text: str, cell: dict[str, str]) -> str:
        """``text`` with the expressions of the matrix evaluated; any other one is an error here."""
        shown = re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda found: cell[found[1]], text)
        assert "${{" not in shown
        return shown

    def run(self, folder: Path, cell: dict[str, str], **variables: str) -> tuple[list[str], dict[str, list[Path]]]:
        """Run the steps in order; returns the names of those that failed, and what would be uploaded."""
        environment = {**os.environ, **{key: self.value(text, cell) for key, text in self.job["env"].items()}}
        environment |= variables
        failed: list[str] = []
        uploads: dict[str, list[Path]] = {}
        for step in self.job["steps"]:
            if failed and step.get("if") != "${{ !cancelled() }}":
                continue
            if "run" in step:
                command = ["bash", "-e", "-o", "pipefail", "-c", self.value(step["run"], cell)]
                done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
                failed += [step["name"]] if done.returncode else []
                (folder / f"{len(failed)}-{step['run'].split()[-1]}.log").write_text(done.stdout + done.stderr)
            elif step["uses"].startswith("actions/upload-artifact@"):
                with_ = step["with"]
                found = sorted(path for path in (folder / with_["path"]).rglob("*") if path.is_file())
                assert found or with_["if-no-files-found"] == "ignore"
                uploads[self.value(with_["name"], cell)] = found
        return failed, uploads


@pytest.fixture(scope="module")
def template() -> Template:
    value = yaml.safe_load((CI / "github-workflow.yaml").read_text(encoding="utf-8"))
    assert value[True] == {"push": {"tags": ["v*"]}, "workflow_dispatch": None}  # YAML 1.1 takes `on` for a truth value
    return Template(value["jobs"]["package"])


def test_the_matrix_names_targets_and_recipes_that_there_are(template: Template) -> None:
    assert len(template.cells) == 7
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    [model] = re.findall(r"^MODEL \?= (.+)$", makefile, re.MULTILINE)
    for cell in template.cells:
        assert cell["target"] in TARGETS
        assert (ROOT / "recipes" / model / f"{cell['target']}-{cell['scheme']}.yaml").is_file()
        assert re.search(rf"^[a-z -]*\b{cell['target']}\b[a-z -]*: \$\(READY\)", makefile, re.MULTILINE)
    assert f"model=${{MODEL:-{model}}}" in (CI / "build.sh").read_text(encoding="utf-8")


def test_actions_are_pinned_by_their_major_version(template: Template) -> None:
    used = [step["uses"] for step in template.job["steps"] if "uses" in step]
    assert [name for name in used if not re.fullmatch(r"actions/[a-z-]+@v\d+", name)] == []
    assert len(used) == 4


def _clone(folder: Path, checkpoint: Path) -> Path:
    """What a clone has, with the environment that is here and one recipe, of a tiny checkpoint; returns the recipe."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, folder / name)
    shutil.copytree(ROOT / "deploy" / "ci", folder / "deploy" / "ci")
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    (folder / ".venv" / "ready").touch()
    value = tiny_recipe(checkpoint)
    recipe = folder / "recipes" / "tiny" / "cpu-int4.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text(yaml.safe_dump(value), encoding="utf-8")
    return recipe


@pytest.mark.slow
def test_the_steps_of_the_workflow_build_a_package_or_say_why_not(
    tmp_path: Path, template: Template, checkpoint_of: Callable[..., Path]
) -> None:
    recipe = _clone(tmp_path, checkpoint_of("qwen2"))
    variables = {"MODEL": "tiny", "PYTHONPATH": str(ROOT)}
    failed, uploads = template.run(tmp_path, template.cells[0], **variables)
    logs = "\n".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))
    assert failed == [], logs
    results = {path.name: path for path in uploads["results-cpu-int4"]}
    assert results.keys() == {"summary.json", "junit.xml", "verify.json", "report.html"}
    found = json.loads(results["summary.json"].read_bytes())
    assert (found["outcome"], found["error"]) == ("built", None)
    assert [step["stage"] for step in found["steps"]] == ["checkpoint", "export", "quantize", "validate", "package"]
    package = tmp_path / "artifacts" / "ci" / "packages" / "tiny-cpu-int4"
    assert set(uploads["package-cpu-int4"]) >= {package / name for name in found["package"]["files"]}
    assert found["package"]["bytes"] == sum((package / name).stat().st_size for name in found["package"]["files"])
    verified = json.loads(results["verify.json"].read_bytes())
    assert verified["digest"] == found["package"]["digest"]
    assert verified["replay"]["identical"] == verified["replay"]["prompts"] > 0
    steps, gates = _check(results["junit.xml"].read_text(encoding="utf-8"))
    validation = json.loads((package / VALIDATION).read_bytes())
    assert len(gates) == len(validation["gates"]) == len(found["gates"])
    assert [suite.attrib["failures"] for suite in (steps, gates)] == ["0", "0"]

    value = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    value["validate"]["gates"]["mean_kl"] = 1e-9
    recipe.write_text(yaml.safe_dump(value), encoding="utf-8")
    shutil.rmtree(tmp_path / "artifacts" / "ci")
    failed, uploads = template.run(tmp_path, template.cells[0], **variables)
    assert failed == ["Build, validate and package"]
    assert {path.name for path in uploads["results-cpu-int4"]} == {"summary.json", "junit.xml"}
    assert "package-cpu-int4" not in uploads
    results = {path.name: path for path in uploads["results-cpu-int4"]}
    found = json.loads(results["summary.json"].read_bytes())
    assert (found["outcome"], found["exit_code"], found["package"]) == ("refused", 8, None)
    steps, gates = _check(results["junit.xml"].read_text(encoding="utf-8"))
    assert [suite.attrib["failures"] for suite in (steps, gates)] == ["0", "2"]  # prefill, and token by token
    assert steps.attrib["skipped"] == steps.attrib["tests"] == "3"  # checkpoint, export and quantize were there
