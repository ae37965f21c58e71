"""Builds of tiny checkpoints through the real command line: when all goes well, and when it does not."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builds import (
    GATES,
    NAME,
    STAGES,
    Project,
    build,
    end,
    flip,
    new_project,
    run,
    stages,
    stopped_at,
    without_build_tools,
)
from tiny import tiny_qwen1

from pipeline import digest
from pipeline.package import verify

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path: Path, built: Callable[..., Project]) -> Project:
    """A copy of a project that has been built, to be damaged at will."""
    return built().copy(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "exporter"),
    [("qwen2", "genai"), ("qwen2", "optimum"), ("qwen3", "genai"), ("qwen3", "optimum"), ("qwen2_moe", "native")],
)
def test_a_package_is_whole_validated_and_served_without_the_build_tools(
    built: Callable[..., Project], model_type: str, exporter: str
) -> None:
    package = built(model_type, exporter).package
    manifest = verify.package(package)
    assert {path.name for path in package.iterdir()} == {*manifest.files, "manifest.json", "SHA256SUMS"}

    validation = json.loads((package / "validation.json").read_bytes())
    assert validation["passed"]
    assert {gate["path"] for gate in validation["gates"] if gate["metric"] == "mean_kl"} == {"prefill", "decode"}
    for path in ("prefill", "decode"):
        assert validation[path]["positions"] == 4 * 32
        assert 0 < validation[path]["mean_kl"] <= GATES["mean_kl"]
        assert GATES["top1"] <= validation[path]["top1"] <= 1

    facts = json.loads(without_build_tools("verify", str(package), "--replay", "--json"))
    assert facts["replay"]["prompts"] > 0
    assert facts["replay"]["identical"] == facts["replay"]["prompts"]
    lines = without_build_tools("generate", str(package), "--prompt", "The fox", "--max-tokens", "5", "--json")
    *answer, end = map(json.loads, lines.splitlines())
    assert end["tokens"] == len(answer) <= 5
    assert all(0 <= event["token"] < 512 for event in answer)


def test_a_checkpoint_of_qwen_1_is_built_without_its_code(tmp_path: Path) -> None:
    project = new_project(tmp_path, tiny_qwen1(tmp_path / "qwen 1"))
    assert stages(build(project), "done") == STAGES
    verify.package(project.package)
    config = json.loads((project.package / "genai_config.json").read_bytes())["model"]
    assert (config["type"], config["context_length"]) == ("qwen2", 512)
    facts = json.loads(without_build_tools("verify", str(project.package), "--replay", "--json"))
    assert facts["replay"]["identical"] == facts["replay"]["prompts"] > 0
    lines = without_build_tools("generate", str(project.package), "--prompt", "The fox", "--max-tokens", "5", "--json")
    assert len(lines.splitlines()) >= 2
    assert [path.name for path in sorted(project.package.glob("*.py"))] == ["replay.py", "verify.py"]


def test_an_unchanged_recipe_is_all_cached_and_touches_nothing(project: Project) -> None:
    before = {path: path.stat().st_mtime_ns for path in project.package.iterdir()}
    events = build(project)
    assert [entry["event"] for entry in events] == ["hit"] * 5 + ["package"]
    assert stages(events, "hit") == STAGES
    assert events[-1]["fresh"] is False
    assert {path: path.stat().st_mtime_ns for path in project.package.iterdir()} == before


@pytest.mark.parametrize(
    ("section", "value", "again"),
    [
        ("description", "other words", STAGES[4:]),
        ("validate", {"gates": {**GATES, "mean_kl": 0.29}}, STAGES[3:]),
        ("quantize", {"body": {"bits": 4, "block_size": 32, "symmetric": False}}, STAGES[2:]),
    ],
)
def test_a_change_remakes_what_depends_on_it_and_nothing_else(
    project: Project, section: str, value: Any, again: list[str]
) -> None:
    project.edit(section, value)
    events = build(project)
    assert stages(events, "done") == again
    assert stages(events, "hit") == [stage for stage in STAGES if stage not in again]
    assert events[-1]["fresh"] is True
    verify.package(project.package)


def test_a_refused_model_is_explained_kept_as_evidence_and_never_packaged(project: Project) -> None:
    before = digest.of_tree(project.package)
    project.edit("validate", {"gates": {**GATES, "mean_kl": 1e-9}})
    for _ in range(2):  # made, and then from the store
        code, out, err = run(*project.command)
        assert code == 8
        assert "FAIL" in out
        for part in ("mean_kl (prefill) is 0.", "the gate is at most 1e-09", "mean_kl (decode)", "`qwen-onnx tune "):
            assert part in err
        report = Path(err.partition("where: ")[2].splitlines()[0])
        assert report.is_relative_to(project.store)
        assert json.loads(report.read_bytes())["passed"] is False
    assert digest.of_tree(project.package) == before
    shutil.rmtree(project.out)
    assert run(*project.command)[0] == 8
    assert not project.out.exists()


def test_a_build_that_was_killed_while_it_replaced_the_package_is_repaired(project: Project) -> None:
    before = digest.of_tree(project.package)
    (project.out / f".{NAME}.new").mkdir()
    project.package.rename(project.out / f".{NAME}.old")
    build(project)
    assert sorted(path.name for path in project.out.iterdir()) == ["index.html", NAME]
    assert digest.of_tree(project.package) == before


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_no_package_is_never_replaced_by_one(project: Project, tmp_path: Path, kind: str) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.txt").write_text("precious")
    shutil.rmtree(project.package)
    if kind == "folder":
        own.rename(project.package)
    elif kind == "file":
        (own / "thesis.txt").rename(project.package)
    else:
        project.package.symlink_to(own)
    code, _, err = run(*project.command)
    assert code == 2
    assert f"{project.package} exists and is no package" in err
    kept = project.package if kind == "file" else project.package / "thesis.txt"
    assert kept.read_text() == "precious"


def test_an_interrupt_ends_the_worker_and_the_build_goes_on_later(project: Project) -> None:
    project.forget("export", "package")
    with stopped_at(project, "export") as (process, _):
        process.send_signal(signal.SIGINT)
        code, _, err = end(process, project)
    assert code == 130
    assert "run the same command again" in err
    assert project.stored("export") == []
    assert stages(build(project), "done") == ["export", "package"]


@pytest.mark.parametrize(
    ("number", "code", "words"), [(signal.SIGKILL, 6, "memory"), (signal.SIGSEGV, 7, "exit code -11")]
)
def test_a_worker_that_crashes_is_explained(project: Project, number: int, code: int, words: str) -> None:
    project.forget("quantize")
    with stopped_at(project, "quantize") as (process, worker):
        worker.send_signal(number)
        worker.resume()
        ended, events, err = end(process, project)
    assert (ended, err) == (code, "")
    assert events[-1]["event"] == "error"
    assert "quantize" in events[-1]["what"]
    assert words in events[-1]["what"] + events[-1]["why"]
    assert events[-1]["fix"]
    assert project.stored("quantize") == []


def test_a_flipped_bit_in_a_package_is_refused_and_the_next_build_replaces_it(project: Project) -> None:
    before = digest.of_tree(project.package)
    flip(project.package / "model.onnx.data")
    code, _, err = run("verify", str(project.package))
    assert code == 9
    assert "model.onnx.data has changed" in err
    events = build(project)
    assert stages(events, "hit") == STAGES
    assert events[-1]["fresh"] is True
    assert digest.of_tree(project.package) == before


def test_a_limit_on_file_sizes_is_named(project: Project) -> None:
    project.forget("quantize")
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    call = "from pipeline import cli; sys.exit(cli.main(sys.argv[1:]))"
    result = subprocess.run(
        [sys.executable, "-c", limited + call, *project.command], capture_output=True, text=True, check=False
    )
    assert result.returncode == 6, result.stderr
    assert "Traceback" not in result.stderr
    assert "the disk does not take a file of quantize" in result.stderr
    assert project.stored("quantize") == []


@pytest.mark.parametrize(
    ("section", "value", "code", "words"),
    [
        ("checkpoint", {"sha256": "0" * 64}, 4, ["not the pinned ones", "0" * 64]),
        ("checkpoint", {"sources": [{"type": "local", "path": "nowhere"}]}, 4, ["no checkpoint at", "nowhere"]),
        ("quantize", {"algoritm": "rtn"}, 3, ["cpu.yaml:", "algoritm", "algorithm"]),
        ("export", {"options": {"int4_blok_size": 32}}, 3, ["int4_blok_size"]),
    ],
)
def test_mistakes_in_a_recipe_are_told(project: Project, section: str, value: Any, code: int, words: list[str]) -> None:
    before = digest.of_tree(project.package)
    project.edit(section, value)
    found, _, err = run(*project.command)
    assert found == code
    assert [word for word in words if word not in err] == []
    assert digest.of_tree(project.package) == before


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        for command in (["verify", str(folder)], ["generate", str(folder), "--prompt", "x"]):
            code, out, err = run(*command)
            assert (code, out) == (9, "")
            assert str(folder) in err
