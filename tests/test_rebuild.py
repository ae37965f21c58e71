"""A package is made again from its own manifest, elsewhere and on another day, and comes out byte by byte the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import cli, digest
from pipeline.artifact import CHECKSUMS, MANIFEST, PROVENANCE, SIGNATURE, Manifest, read_manifest
from pipeline.builds import plan, rebuild
from pipeline.errors import CheckpointError, RuntimeMissing, UsageError
from pipeline.package import contents as package_files

ROOT = Path(__file__).parents[1]
WHERE = Path("package") / MANIFEST
GATES = {"mean_kl": 0.3, "top1": 0.8, "perplexity_ratio": 1.5, "greedy": 0.5}
RECIPE: dict[str, Any] = {
    "description": "tiny",
    "target": "cpu",
    "checkpoint": {"sources": [{"type": "local", "path": "qwen2"}], "license": "Apache-2.0", "base_model": "tiny"},
    "quantize": {"algorithm": "min_error", "body": {"bits": 4, "block_size": 16, "symmetric": False}},
    "validate": {"windows": 4, "window_tokens": 32, "greedy_tokens": 8, "gates": GATES},
}
HUB = {"type": "hub", "repo": "Qwen/Tiny", "revision": "c" * 40}
# What must not matter, beside folders, rights of new files, threads and where temporary files go.
ELSEWHERE = {"PYTHONHASHSEED": "4242", "TZ": "Asia/Tokyo", "SOURCE_DATE_EPOCH": "1700000000", "LC_ALL": "C"}


def _manifest(sha256: str | None = None, **checkpoint: Any) -> Manifest:
    recipe = {**RECIPE, "checkpoint": {**RECIPE["checkpoint"], **checkpoint}}
    return Manifest({"name": "tiny-cpu", "recipe": recipe, "source": {"sha256": sha256}, "tools": {}})


def test_a_local_checkpoint_or_adapter_has_to_be_given(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="built from a local checkpoint") as told:
        rebuild.loaded(_manifest(), WHERE, rebuild.Given())
    assert "`qwen2`" in told.value.why
    assert "--checkpoint PATH" in told.value.fix
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        rebuild.loaded(_manifest(), WHERE, rebuild.Given(tmp_path / "gone"))
    with pytest.raises(UsageError, match="an adapter merged into the checkpoint") as told:
        rebuild.loaded(_manifest(adapter="legal"), WHERE, rebuild.Given(tmp_path))
    assert "--adapter DIR" in told.value.fix
    with pytest.raises(UsageError, match="built without the adapter other"):
        rebuild.loaded(_manifest(), WHERE, rebuild.Given(tmp_path, {"other": tmp_path}))
    made = rebuild.loaded(_manifest(adapter="legal"), WHERE, rebuild.Given(tmp_path, {"": tmp_path / "a"}))
    assert made.recipe.checkpoint.adapter == str(tmp_path / "a")
    assert made.name == "tiny-cpu"


def test_adapters_that_are_kept_apart_are_given_by_name(tmp_path: Path) -> None:
    manifest = _manifest()
    manifest.data["recipe"]["adapters"] = {"legal": {"path": "legal"}}
    with pytest.raises(UsageError, match="built with the adapter legal") as told:
        rebuild.loaded(manifest, WHERE, rebuild.Given(tmp_path))
    assert "--adapter legal=DIR" in told.value.fix
    made = rebuild.loaded(manifest, WHERE, rebuild.Given(tmp_path, {"legal": tmp_path / "a"}))
    assert made.recipe.adapters
    assert made.recipe.adapters["legal"].path == str(tmp_path / "a")


def test_what_can_be_fetched_needs_nothing_and_no_path_of_a_manifest_is_followed(tmp_path: Path) -> None:
    both = {"sources": [{"type": "local", "path": "/etc/secret"}, HUB]}
    made = rebuild.loaded(_manifest(**both), WHERE, rebuild.Given())
    assert [source.type for source in made.recipe.checkpoint.sources] == ["hub"]
    made = rebuild.loaded(_manifest(sha256="a" * 64, **both), WHERE, rebuild.Given(tmp_path))
    sources = made.recipe.checkpoint.sources
    assert [source.type for source in sources] == ["local", "hub"]
    assert sources[0].path == str(tmp_path)  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="the checkpoint cannot be given"):
        rebuild.loaded(_manifest(**both), WHERE, rebuild.Given(tmp_path))


def test_other_versions_and_another_checkpoint_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    made = rebuild.loaded(_manifest(sources=[HUB]), WHERE, rebuild.Given())
    manifest = _manifest(sources=[HUB])
    manifest.data["tools"].update(plan.make(made)[-1].fields["tools"])
    steps, versions = rebuild.planned(manifest, made)
    assert versions == {}
    manifest.data["tools"].update({"torch": "1.0", "gone": "3"})
    steps, versions = rebuild.planned(manifest, made)
    assert versions == {"torch": ("1.0", plan.installed("torch")), "gone": ("3", "")}
    with pytest.raises(RuntimeMissing, match="other versions") as told:
        rebuild.check_versions(versions)
    assert f"gone 3, here none; torch 1.0, here {plan.installed('torch')}" in told.value.why
    assert "--other-versions" in told.value.fix
    with pytest.raises(CheckpointError, match="not the checkpoint"):
        rebuild.planned(_manifest(sha256="a" * 64, sources=[HUB]), made)
    assert [step.stage for step in rebuild.until(steps, "quantize")] == ["checkpoint", "export", "quantize"]
    assert rebuild.until(steps, "") == steps
    with pytest.raises(UsageError, match="no stage polish"):
        rebuild.until(steps, "polish")


def test_what_differs_is_told_apart_from_what_may() -> None:
    then = {"a": "1", "b": "2", "c": "3", MANIFEST: "4", SIGNATURE: "5", PROVENANCE: "6"}
    now = {"a": "1", "b": "0", "d": "3", MANIFEST: "0"}
    found = {file.name: file for file in rebuild._compare(then, now, other_versions=False)}
    states = {"a": "equal", "b": "differs", "c": "missing", "d": "added", MANIFEST: "differs"}
    assert {name: file.state for name, file in found.items()} == {**states, SIGNATURE: "allowed", PROVENANCE: "allowed"}
    assert "random" in found[SIGNATURE].why
    found = {file.name: file for file in rebuild._compare(then, now, other_versions=True)}
    assert (found[MANIFEST].state, found["b"].state) == ("allowed", "differs")
    assert rebuild.Rebuilt((found["a"], found[SIGNATURE], found[MANIFEST]), {}, {}).equal
    assert not rebuild.Rebuilt((found["a"], found["c"]), {}, {}).equal


def _run(*arguments: str, cwd: Path, umask: int, threads: str, environment: dict[str, str]) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        capture_output=True,
        check=False,
        text=True,
        cwd=cwd,
        umask=umask,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads, **environment},
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def _reseal(package: Path, **recipe: Any) -> None:
    """Let a manifest tell another recipe, and be whole."""
    data = dict(read_manifest(package).data)
    data["recipe"] = {**data["recipe"], **recipe}
    (package / MANIFEST).write_text(json.dumps(data))
    sums = {name: entry["sha256"] for name, entry in data["files"].items()}
    (package / CHECKSUMS).write_bytes(package_files.checksums({**sums, MANIFEST: digest.of_file(package / MANIFEST)}))


@pytest.mark.slow
def test_a_package_comes_out_the_same_in_another_folder_and_on_another_day(
    checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = tmp_path_factory.mktemp("first")
    second = tmp_path_factory.mktemp("second") / "an other"
    for folder in (first / "tiny", first / "tmp", second / "tmp"):
        folder.mkdir(parents=True)
    checkpoint = checkpoint_of("qwen2")
    sources = {"sources": [{"type": "local", "path": str(checkpoint)}]}
    # Keys in an order of their own, which a manifest does not keep.
    recipe = {key: RECIPE[key] for key in reversed(RECIPE)} | {"checkpoint": {**RECIPE["checkpoint"], **sources}}
    (first / "tiny" / "cpu.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    day = {"TMPDIR": str(first / "tmp"), "PYTHONHASHSEED": "1", "TZ": "UTC", "SOURCE_DATE_EPOCH": "1"}
    build = ["build", "tiny/cpu.yaml", "--store", "store", "--out", "out"]
    code, out = _run(*build, cwd=first, umask=0o022, threads="1", environment=day)
    assert code == 0, out
    package = first / "out" / "tiny-cpu"
    before = digest.of_tree(package)

    shutil.copytree(checkpoint, second / "moved")
    shutil.rmtree(first / "store")
    elsewhere = {**ELSEWHERE, "TMPDIR": str(second / "tmp"), "HOME": str(second / "tmp")}
    command = ["rebuild", str(package), "--checkpoint", "moved", "--out", "again", "--json"]
    code, out = _run(*command, cwd=second, umask=0o077, threads="2", environment=elsewhere)
    assert code == 0, out
    told = json.loads(out.splitlines()[-1])
    assert (told["event"], told["equal"], told["versions"]) == ("rebuild", True, {})
    assert {file["state"] for file in told["files"]} == {"equal"}
    assert len(told["files"]) == len(list(package.iterdir())) > 15
    assert told["steps"] == {"checkpoint": True, "quantize": True, "validate": True}
    assert digest.of_tree(second / "again") == digest.of_tree(package) == before
    assert sorted(path.name for path in second.iterdir()) == ["again", "moved", "tmp"]  # and no store

    # A manifest that does not tell how the weights were made is found out, and which step it is.
    body = {"bits": 4, "block_size": 32, "symmetric": False}
    _reseal(package, quantize={"algorithm": "min_error", "body": body})
    long = second / ("a place for temporary files that is too long for the path of a socket" * 2)
    long.mkdir()
    command = ["rebuild", str(package), "--checkpoint", "moved", "--until", "quantize"]
    code, out = _run(*command, cwd=second, umask=0o022, threads="1", environment={**elsewhere, "TMPDIR": str(long)})
    assert code == rebuild.DIFFERS, out
    assert "differs  model.onnx.data" in out
    assert "the first step whose result differs: quantize" in out
    assert "NOT the same" in out


def test_what_a_rebuild_cannot_honour_is_refused_before_anything_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_package import write

    package = write(tmp_path / "tiny-cpu-int4")
    monkeypatch.setattr(rebuild, "make", None)  # whoever got so far would fail otherwise
    assert cli.main(["rebuild", str(tmp_path)]) == 9
    assert cli.main(["rebuild", str(package), "--until", "quantize", "--out", str(tmp_path / "out")]) == 2
    assert cli.main(["rebuild", str(package), "--out", str(package)]) == 2
    assert cli.main(["rebuild", str(package)]) == 3  # of a recipe that this version does not read
    assert f"{package / MANIFEST}" in capsys.readouterr().err
