"""A content-addressed store of artifacts on disk.

    <root>/<stage>/<key>/artifact.json   what it is; written last, so that it marks completion
    <root>/<stage>/<key>/files/          what the stage wrote
    <root>/tmp/                          work in progress, never visible as an artifact
    <root>/locks/<key>                   held (flock) while a key is being built
    <root>/logs/  <root>/downloads/      what libraries printed; bytes fetched

The kernel drops a lock when its last holder dies, so a killed build leaves none behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from pipeline import digest
from pipeline.artifact import Artifact, Step
from pipeline.errors import StoreError

_RECORD = "artifact.json"
_AREAS = ("tmp", "locks", "logs", "downloads")


class Store:
    """Artifacts below ``root``; see the module for the layout.

    Raises:
        StoreError: the root cannot be created or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            for area in _AREAS:
                (root / area).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"the store {root} cannot be used",
                why=error.strerror or str(error),
                fix="choose another place with --store, or make this one writable",
            ) from error

    def get(self, stage: str, key: str) -> Artifact | None:
        """The artifact of a key, or ``None`` when it is absent or visibly damaged (a file gone or of another size)."""
        folder = self.root / stage / key
        artifact = self._read(folder)
        if artifact is None:
            return None
        for name, (size, _) in artifact.files.items():
            try:
                if (artifact.path / name).stat().st_size != size:
                    return None
            except OSError:
                return None
        return artifact

    def problems(self, artifact: Artifact) -> list[str]:
        """Every file of an artifact that is missing, added or changed, by content."""
        found = digest.tree(artifact.path) if artifact.path.is_dir() else {}
        wanted = {name: sha256 for name, (_, sha256) in artifact.files.items()}
        missing = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
        added = [f"{name} was added" for name in sorted(found.keys() - wanted.keys())]
        changed = [f"{name} has changed" for name in sorted(wanted) if name in found and found[name] != wanted[name]]
        return missing + added + changed

    @contextlib.contextmanager
    def lock(self, key: str, waiting: Callable[[], None] | None = None) -> Iterator[int]:
        """Hold the lock of a key; ``waiting`` is called once when another process has it. Yields the descriptor."""
        with (self.root / "locks" / key).open("w") as file:
            _acquire(file, waiting)
            yield file.fileno()

    @contextlib.contextmanager
    def workspace(self, step: Step) -> Iterator[Path]:
        """An empty directory for a step's files, removed at the end whatever happens. Needs the step's lock."""
        for stale in (self.root / "tmp").glob(f"{step.key}.*"):
            shutil.rmtree(stale, ignore_errors=True)
        folder = self.root / "tmp" / f"{step.key}.{secrets.token_hex(4)}"
        (folder / "files").mkdir(parents=True)
        try:
            yield folder / "files"
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(
        self, step: Step, files: Path, facts: Mapping[str, Any], seconds: float = 0.0, peak_memory: int = 0
    ) -> Artifact:
        """Make a step's workspace an artifact: digest, flush to disk, rename into place."""
        sizes: dict[str, tuple[int, str]] = {}
        for path in sorted(files.rglob("*")):
            if path.is_file():
                _flush(path)
                sizes[path.relative_to(files).as_posix()] = (path.stat().st_size, digest.of_file(path))
        record = {
            "stage": step.stage,
            "key": step.key,
            "digest": digest.of_tree(files, {name: sha256 for name, (_, sha256) in sizes.items()}),
            "files": sizes,
            "facts": dict(facts),
            "fields": dict(step.fields),
            "tools": dict(step.tools),
            "seconds": round(seconds, 1),
            "peak_memory": peak_memory,
        }
        folder = files.parent
        (folder / _RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
        _flush(folder / _RECORD)
        final = self.root / step.stage / step.key
        final.parent.mkdir(exist_ok=True)
        if final.exists():
            shutil.rmtree(final)
        folder.rename(final)
        _flush(final.parent)
        artifact = self._read(final)
        assert artifact is not None
        return artifact

    def entries(self) -> list[Artifact]:
        """All artifacts, by stage and key."""
        folders = sorted(path.parent for path in self.root.glob(f"*/*/{_RECORD}") if path.parts[-3] != "tmp")
        return [artifact for folder in folders if (artifact := self._read(folder))]

    def remove(self, artifact: Artifact) -> None:
        """Remove an artifact: first its record, so that a crash in between leaves no half of it visible."""
        folder = self.root / artifact.stage / artifact.key
        (folder / _RECORD).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def collect(self, keep: set[str]) -> int:
        """Remove artifacts whose key is not in ``keep``, abandoned work and downloads; returns the bytes freed."""
        before = _usage(self.root)
        for artifact in self.entries():
            if artifact.key not in keep:
                with self.lock(artifact.key):
                    self.remove(artifact)
        for folder in (self.root / "tmp").iterdir():
            with self._idle(folder.name.split(".")[0]) as idle:
                if idle:
                    shutil.rmtree(folder, ignore_errors=True)
        for area in ("downloads", "logs"):
            with self._idle(area) as idle:
                if idle:
                    shutil.rmtree(self.root / area, ignore_errors=True)
                    (self.root / area).mkdir(exist_ok=True)
        return before - _usage(self.root)

    @contextlib.contextmanager
    def _idle(self, key: str) -> Iterator[bool]:
        with (self.root / "locks" / key).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def _read(self, folder: Path) -> Artifact | None:
        try:
            data = json.loads((folder / _RECORD).read_bytes())
            return Artifact(
                stage=data["stage"],
                key=data["key"],
                digest=data["digest"],
                path=folder / "files",
                files={name: (size, sha256) for name, (size, sha256) in data["files"].items()},
                facts=data["facts"],
                seconds=data["seconds"],
                peak_memory=data["peak_memory"],
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _acquire(file: IO[str], waiting: Callable[[], None] | None) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting:
            waiting()
        fcntl.flock(file, fcntl.LOCK_EX)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _usage(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
