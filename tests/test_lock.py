"""Locks: a branch becomes a commit and a digest, written into the recipe and nowhere else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import COMMIT, Hub, serve

from pipeline.builds import lock, plan
from pipeline.builds.lock import Lock
from pipeline.checkpoint import files as checkpoint_files
from pipeline.errors import CheckpointError, RecipeError
from pipeline.facts import recipe

SHA256 = "ab" * 32
SHOWN = f"revision: {COMMIT}"
REST = """
target: cpu
quantize: {algorithm: min_error, body: {bits: 4, block_size: 32, symmetric: false}}
validate: {gates: {mean_kl: 0.1, top1: 0.8, perplexity_ratio: 1.1}}
"""
BLOCK = """\
# the model
checkpoint:
  sources:
    # from its publisher
    - type: hub
      repo: owner/name
      revision: main
  # its rights
  license: MIT   # as they say
  base_model: b
"""
FLOW = "checkpoint: {sources: [{type: hub, repo: owner/name, revision: main}], license: MIT, base_model: b}\n"
KNOWN = f"""\
checkpoint:
  sha256: {"cd" * 32}
  sources:
    - {{type: hub, repo: owner/name, revision: main}}
    - {{type: local, path: here}}
  size: 1   # a guess
  license: MIT
  base_model: b
"""


def write_recipe(folder: Path, text: str, rest: str = REST) -> Path:
    path = folder / "m" / "cpu.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + rest)
    return path


def _lock(**more: Any) -> Lock:
    return Lock(
        **{"source": 0, "repo": "owner/name", "revision": "main", "commit": COMMIT, "sha256": SHA256} | more, size=7
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            BLOCK,
            BLOCK.replace("revision: main", f"{SHOWN}  # main\n  sha256: {SHA256}\n  size: 7"),
        ),
        (
            BLOCK.replace("revision: main", "revision: main   # for now"),
            BLOCK.replace("revision: main", f"{SHOWN}   # for now\n  sha256: {SHA256}\n  size: 7"),
        ),
        (FLOW, FLOW.replace("main}]", f"{COMMIT}}}], sha256: {SHA256}, size: 7")),
        (
            KNOWN,
            KNOWN.replace("cd" * 32, SHA256).replace("revision: main", SHOWN).replace("size: 1 ", "size: 7 "),
        ),
    ],
    ids=["block", "commented", "flow", "what is there"],
)
def test_a_lock_changes_its_own_values_and_nothing_else(tmp_path: Path, text: str, expected: str) -> None:
    path = write_recipe(tmp_path, text)
    assert lock.write(recipe.load(path), [_lock()]) == [path]
    assert path.read_text() == expected + REST
    assert lock.unlocked(recipe.load(path).recipe.checkpoint) == []


def test_a_lock_goes_where_the_source_stands(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, "extends: _model.yaml\n")
    (path.parent / "_model.yaml").write_text(BLOCK)
    assert lock.write(recipe.load(path), [_lock()]) == [path.parent / "_model.yaml"]
    assert path.read_text() == "extends: _model.yaml\n" + REST
    locked = recipe.load(path).recipe.checkpoint
    assert (locked.sha256, locked.size, locked.sources[0].model_dump()["revision"]) == (SHA256, 7, COMMIT)


def test_digits_that_yaml_would_read_as_a_number_are_quoted(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, BLOCK)
    number = "1" * 38 + "e5"
    lock.write(recipe.load(path), [_lock(commit=number)])
    assert f'revision: "{number}"' in path.read_text()


def test_a_recipe_that_cannot_be_edited_stays_as_it_was(tmp_path: Path) -> None:
    """A digest in the recipe itself wins over one that is written where the sources stand; here both are known."""
    path = write_recipe(tmp_path, f"extends: _model.yaml\ncheckpoint: {{sha256: {'cd' * 32}}}\n")
    (path.parent / "_model.yaml").write_text(BLOCK)
    changed = lock.write(recipe.load(path), [_lock()])
    assert sorted(changed) == sorted([path, path.parent / "_model.yaml"])
    assert recipe.load(path).recipe.checkpoint.sha256 == SHA256


def test_an_unlocked_recipe_is_refused_by_a_plan_and_where_locks_are_demanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = recipe.load(write_recipe(tmp_path, BLOCK))
    with pytest.raises(RecipeError, match="the recipe is not locked") as caught:
        plan.make(loaded)
    assert caught.value.fix == f"qwen-onnx lock {loaded.path}"
    with pytest.raises(RecipeError, match="the recipe is not locked"):
        lock.pinned(loaded, True, print)
    for value, strict in (("true", True), ("1", True), ("", False), ("0", False), ("false", False)):
        monkeypatch.setenv("CI", value)
        assert lock.is_strict(False) is strict
        assert lock.is_strict(True)


def test_a_locked_recipe_is_left_alone(tmp_path: Path) -> None:
    loaded = recipe.load(write_recipe(tmp_path, BLOCK.replace("revision: main", SHOWN)))
    assert lock.pinned(loaded, True, print) is loaded


@pytest.mark.parametrize("revision", ["0123456789abcdef", "0123456789ABCDEF0123456789ABCDEF01234567", f"{COMMIT}0"])
def test_half_a_commit_is_no_branch(tmp_path: Path, revision: str) -> None:
    with pytest.raises(RecipeError, match="should be a whole commit"):
        recipe.load(write_recipe(tmp_path, BLOCK.replace("main", f'"{revision}"')))


FILES = {"config.json": b"{}", "tokenizer.json": b'{"model": 1}', "README.md": b"words", "onnx/model.json": b"x"}
SHARDED = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
WEIGHTS = {name: name.encode() * 100 for name in SHARDED.values()}
INDEX = {"model.safetensors.index.json": json.dumps({"weight_map": SHARDED}).encode()}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve({**FILES, **INDEX, **WEIGHTS}) as state:
        yield state


@pytest.mark.slow
def test_a_repository_is_locked_without_its_weights(hub: Hub, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, BLOCK)
    done = hub.run(tmp_path / "home", "lock", str(path), "--json")
    assert done.returncode == 0, done.stderr
    (told,) = json.loads(done.stdout)["locks"]
    parts = {name: body for name, body in hub.files.items() if name not in ("README.md", "onnx/model.json")}
    local = tmp_path / "local"
    local.mkdir()
    for name, body in parts.items():
        (local / name).write_bytes(body)
    assert told["sha256"] == checkpoint_files.tree_digest(local)
    assert told["size"] == sum(map(len, parts.values()))
    assert not set(hub.names) & set(WEIGHTS)
    locked = recipe.load(path).recipe.checkpoint
    assert (locked.sha256, locked.size) == (told["sha256"], told["size"])
    hub.names.clear()
    again = hub.run(tmp_path / "home", "lock", str(path))
    assert again.stdout == f"{path} is locked already\n"
    assert hub.names == []


@pytest.mark.slow
def test_a_file_is_locked_and_its_digest_refuses_what_comes_later(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"model.gguf": b"GGUF one"}
    text = BLOCK.replace("revision: main", "file: model.gguf\n      revision: main")
    path = write_recipe(tmp_path, text)
    assert hub.run(tmp_path / "home", "lock", str(path)).returncode == 0
    first = hashlib.sha256(b"GGUF one").hexdigest()
    assert recipe.load(path).recipe.checkpoint.sha256 == first
    assert hub.names == []
    # The branch has moved; the recipe still has the digest.
    hub.files = {"model.gguf": b"GGUF two"}
    path.write_text(path.read_text().replace(SHOWN, "revision: main"))
    done = hub.run(tmp_path / "home", "plan", str(path), "--store", str(tmp_path / "store"))
    assert done.returncode == CheckpointError.exit_code
    assert "owner/name at main has other bytes than the recipe's" in done.stderr
    assert hub.run(tmp_path / "home", "lock", str(path), "--revision", "main").returncode == 0
    assert recipe.load(path).recipe.checkpoint.sha256 == hashlib.sha256(b"GGUF two").hexdigest()


@pytest.mark.slow
def test_outside_ci_a_branch_is_resolved_with_a_warning_and_gives_the_plan_of_the_lock(
    hub: Hub, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, BLOCK)
    arguments = ("plan", str(path), "--json", "--store", str(tmp_path / "store"))
    warned = hub.run(tmp_path / "home", *arguments)
    assert f"warning: owner/name at main is commit {COMMIT} now" in warned.stderr, warned.stderr
    before = [json.loads(line).get("key") for line in warned.stdout.splitlines()]
    for refused in (
        hub.run(tmp_path / "home", *arguments, CI="true"),
        hub.run(tmp_path / "home", *arguments, "--locked"),
    ):
        assert refused.returncode == RecipeError.exit_code
        assert json.loads(refused.stdout)["what"] == "the recipe is not locked"
    assert hub.run(tmp_path / "home", "lock", str(path)).returncode == 0
    locked = hub.run(tmp_path / "home", *arguments, CI="true")
    assert locked.stderr == ""
    assert [json.loads(line).get("key") for line in locked.stdout.splitlines()] == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "code", "text"),
    [
        ("a missing shard", 4, "the shard model-00002-of-00002.safetensors is missing"),
        ("spoilt", 4, "config.json of owner/name is not what the hub lists"),
        ("no file", 5, "owner/name has no other.gguf"),
        ("no branch", 5, "it has no such revision"),
        ("gated", 5, "its terms must be accepted first"),
    ],
)
def test_what_cannot_be_locked_is_told_and_the_recipe_stays(
    hub: Hub, tmp_path: Path, case: str, code: int, text: str
) -> None:
    source = BLOCK
    if case == "a missing shard":
        del hub.files["model-00002-of-00002.safetensors"]
    elif case == "spoilt":
        hub.spoil = lambda _number, body: b"X" + body[1:]
    elif case == "no file":
        source = BLOCK.replace("revision: main", "file: other.gguf\n      revision: main")
    elif case == "no branch":
        source = BLOCK.replace("main", "other")
    hub.gated = case == "gated"
    path = write_recipe(tmp_path, source)
    done = hub.run(tmp_path / "home", "lock", str(path))
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert path.read_text() == source + REST
