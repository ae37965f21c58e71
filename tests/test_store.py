"""The store: what is in it is whole, whatever happened while it was written."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import Artifact, Estimate, Step
from pipeline.builds.store import Store
from pipeline.errors import StoreError

_KEY, _OTHER = "a" * 64, "b" * 64


def _step(key: str = _KEY, stage: str = "export") -> Step:
    return Step(stage, key, {"bits": 4}, (), {"onnx": "1"}, Estimate(0, 0, 0))


def _publish(store: Store, key: str = _KEY, stage: str = "export", text: str = "weights") -> Artifact:
    with store.lock(key), store.workspace(_step(key, stage)) as files:
        (files / "model.onnx").write_text(text)
        (files / "sub").mkdir()
        (files / "sub" / "größe 1.txt").write_text("x")
        return store.publish(_step(key, stage), files, {"nodes": 3}, 1.26, 7)


def _child(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process that runs ``script``; ``root`` and ``key`` are its arguments."""
    head = "import sys, time\nfrom pathlib import Path\nfrom pipeline.builds.store import Store\n"
    head += "root, key = Path(sys.argv[1]), sys.argv[2]\nstore = Store(root)\n"
    command = [sys.executable, "-c", head + script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def holder_of(root: Path, key: str) -> subprocess.Popen[str]:
    """Another process that holds a key's lock and has a workspace, until its input ends."""
    script = "from pipeline.artifact import Step, Estimate\nstep = Step('export', key, {}, (), {}, Estimate(0, 0, 0))\n"
    script += "with store.lock(key), store.workspace(step) as files:\n"
    script += "    (files / 'half').write_text('x')\n    print('held', flush=True)\n    sys.stdin.read()\n"
    process = _child(script, root, key)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def _end(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize("name", ["store", "with space/größe/模型"])
def test_what_is_published_is_found_again_by_another_store(tmp_path: Path, name: str) -> None:
    made = _publish(Store(tmp_path / name))
    found = Store(tmp_path / name).get("export", _KEY)
    assert found == made
    assert found is not None
    assert sorted(found.files) == ["model.onnx", "sub/größe 1.txt"]
    assert (found.path / "model.onnx").read_text() == "weights"
    assert (found.facts, found.seconds, found.peak_memory, found.size) == ({"nodes": 3}, 1.3, 7, 8)
    assert not list((tmp_path / name / "tmp").iterdir())


def test_the_digest_names_the_contents_and_not_the_key(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, second, third = _publish(store), _publish(store, _OTHER), _publish(store, "c" * 64, text="weight5")
    assert first.digest == second.digest != third.digest


@pytest.mark.parametrize(
    ("spoil", "visible", "problem"),
    [
        (lambda files: (files / "model.onnx").unlink(), True, "model.onnx is missing"),
        (lambda files: (files / "model.onnx").write_text("weight"), True, "model.onnx has changed"),
        (lambda files: (files / "model.onnx").write_text("weighus"), False, "model.onnx has changed"),
        (lambda files: (files / "more").write_text(""), False, "more was added"),
        (lambda files: (files.parent / "artifact.json").unlink(), True, ""),
        (lambda files: (files.parent / "artifact.json").write_text("[]"), True, ""),
        (lambda files: (files.parent / "artifact.json").write_text('{"stage": "export"'), True, ""),
        (lambda files: (files.parent / "artifact.json").write_text("[" * 100_000), True, ""),
    ],
)
def test_damage_is_a_miss_where_it_is_visible_and_found_by_content_otherwise(
    tmp_path: Path, spoil: Any, visible: bool, problem: str
) -> None:
    store = Store(tmp_path)
    artifact = _publish(store)
    assert store.problems(artifact) == []
    spoil(artifact.path)
    assert (store.get("export", _KEY) is None) == visible
    if problem:
        assert store.problems(artifact) == [problem]
    assert store.problems(_publish(store)) == []  # it is made anew over what is left
    assert store.get("export", _KEY) is not None


def test_a_record_that_was_moved_to_another_key_is_not_believed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = _publish(store)
    artifact.path.parent.rename(artifact.path.parent.with_name(_OTHER))
    assert store.get("export", _OTHER) is None


def test_a_failed_step_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(FileNotFoundError), store.workspace(_step()) as files:
        shutil.copy(files / "absent", files / "half")
    assert not list((tmp_path / "tmp").iterdir())
    assert store.entries() == []


def test_a_killed_build_frees_its_lock_and_its_workspace_is_cleared(tmp_path: Path) -> None:
    store = Store(tmp_path)
    holder = holder_of(tmp_path, _KEY)
    holder.send_signal(signal.SIGKILL)
    holder.communicate(timeout=60)
    assert len(list((tmp_path / "tmp").iterdir())) == 1  # it had no time to clean up
    assert store.get("export", _KEY) is None

    def waiting() -> None:
        raise AssertionError("the lock of a dead process is held")

    with store.lock(_KEY, waiting), store.workspace(_step()) as files:
        assert list((tmp_path / "tmp").iterdir()) == [files.parent]


def test_of_two_builds_of_a_key_one_works_at_a_time(tmp_path: Path) -> None:
    script = """
for turn in range(20):
    with store.lock(key):
        number = int((root / "count").read_text())
        time.sleep(0.002)
        (root / "count").write_text(str(number + 1))
"""
    (tmp_path / "count").write_text("0")
    children = [_child(script, tmp_path, _KEY) for _ in range(2)]
    for child in children:
        _end(child)
    assert (tmp_path / "count").read_text() == "40"


def test_who_waits_for_a_lock_is_told_once_and_other_keys_are_free(tmp_path: Path) -> None:
    store = Store(tmp_path)
    holder = holder_of(tmp_path, _KEY)
    told: list[str] = []

    def waiting() -> None:
        told.append("waiting")
        assert holder.stdin
        holder.stdin.close()  # which lets the holder go

    with store.lock(_OTHER, lambda: told.append("not free")):
        pass
    with store.lock(_KEY, waiting):
        assert told == ["waiting"]
    assert holder.wait(timeout=60) == 0
    assert holder.stdout
    holder.stdout.close()


def test_collect_removes_what_is_not_kept_and_leaves_running_builds_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    kept, gone, running = _publish(store), _publish(store, _OTHER, "quantize"), _publish(store, "c" * 64)
    half = _publish(store, "d" * 64)
    (half.path.parent / "artifact.json").unlink()  # killed while it was being removed
    for name in ("downloads/a.gguf", "downloads/wheels", f"logs/export-{'b' * 16}.log", f"logs/export-{'c' * 16}.log"):
        (tmp_path / name).write_text("1234")
    (tmp_path / "tmp" / f"{_OTHER}.1234").mkdir()
    holder = holder_of(tmp_path, "c" * 64)
    freed = store.collect({kept.key})
    assert store.get("export", _KEY) == kept
    assert store.get("export", "c" * 64) == running
    assert not gone.path.parent.exists()
    assert not half.path.parent.exists()
    assert freed > gone.size + half.size + 4
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == [".lock"]
    assert [path.name for path in (tmp_path / "logs").iterdir()] == [f"export-{'c' * 16}.log"]
    assert [path.name.split(".")[0] for path in (tmp_path / "tmp").iterdir()] == ["c" * 64]
    _end(holder)
    store.collect({kept.key})
    assert store.entries() == [kept]


def test_collect_leaves_a_running_download_alone(tmp_path: Path) -> None:
    script = "from pipeline.checkpoint import download\nwith download.exclusive(root / 'downloads', lambda: None):\n"
    script += "    print('held', flush=True)\n    sys.stdin.read()\n"
    store = Store(tmp_path)
    holder = _child(script, tmp_path, _KEY)
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    (tmp_path / "downloads" / "x.partial").write_text("half")
    store.collect(set())
    assert (tmp_path / "downloads" / "x.partial").exists()
    _end(holder)
    store.collect(set())
    assert not (tmp_path / "downloads" / "x.partial").exists()


def test_an_unusable_root_is_a_store_error_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be used") as caught:
        Store(tmp_path / "file" / "store")
    assert "Not a directory" in caught.value.why
    assert "--store" in caught.value.fix
    store = Store(tmp_path / "store")
    (tmp_path / "store" / "locks").rmdir()
    (tmp_path / "store" / "locks").write_text("")
    with pytest.raises(StoreError), store.lock(_KEY):
        pass


def test_a_full_disk_leaves_nothing_visible_and_the_old_artifacts_whole(tmp_path: Path) -> None:
    # A limit on file sizes stands for the disk: writing fails in the middle of a file, with an OSError.
    script = """
import resource, signal
from pipeline.artifact import Step, Estimate
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
step = Step("export", key, {}, (), {}, Estimate(0, 0, 0))
try:
    with store.lock(key), store.workspace(step) as files:
        (files / "model.onnx").write_text("weights")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        store.publish(step, files, {"long": "x" * 100_000})
except OSError as error:
    print(error.errno)
"""
    store = Store(tmp_path)
    old = _publish(store, _OTHER)
    child = _child(script, tmp_path, _KEY)
    assert child.communicate(timeout=60)[0] == f"{errno.EFBIG}\n"
    assert store.entries() == [old]
    assert store.problems(old) == []
    assert not list((tmp_path / "tmp").iterdir())
    assert store.problems(_publish(store)) == []


def test_the_record_says_how_the_artifact_was_made(tmp_path: Path) -> None:
    artifact = _publish(Store(tmp_path))
    record = json.loads((artifact.path.parent / "artifact.json").read_bytes())
    assert (record["fields"], record["tools"]) == ({"bits": 4}, {"onnx": "1"})
    assert sorted(path.name for path in artifact.path.parent.iterdir()) == ["artifact.json", "files"]
