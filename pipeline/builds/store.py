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
import errno
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
from pipeline.files import flush

_RECORD = "artifact.json"
_AREAS = ("tmp", "locks", "logs", "downloads")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_DOWNLOAD_LOCK = ".lock"  # pipeline.checkpoint.download holds it while it fetches


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
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> StoreError:
        return StoreError(
            f"the store {self.root} cannot be used",
            why=f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}",
            fix="choose another place with --store, or make this one writable",
        )

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
        """Hold the lock of a key; ``waiting`` is called once when another process has it. Yields the descriptor.

        Raises:
            StoreError: the store cannot be written.
        """
        with self._open_lock(key) as file:
            _acquire(file, waiting)
            yield file.fileno()

    def _open_lock(self, key: str) -> IO[str]:
        try:
            return (self.root / "locks" / key).open("w")
        except OSError as error:
            if error.errno in _FULL:
                raise
            raise self._unusable(error) from error

    @contextlib.contextmanager
    def workspace(self, step: Step) -> Iterator[Path]:
        """An empty directory for a step's files, removed at the end whatever happens. Needs the step's lock.

        Raises:
            OSError: it cannot be made, for instance because the disk is full.
        """
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
        """Make a step's workspace an artifact: digest, flush to disk, rename into place.

        Raises:
            OSError: the disk is full or fails; nothing of the artifact is visible then.
        """
        sizes: dict[str, tuple[int, str]] = {}
        for path in sorted(files.rglob("*")):
            if path.is_file():
                flush(path)
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
        flush(folder / _RECORD)
        for directory in (*(path for path in files.rglob("*") if path.is_dir()), files, folder):
            flush(directory)
        final = self.root / step.stage / step.key
        final.parent.mkdir(exist_ok=True)
        if final.exists():
            shutil.rmtree(final)
        folder.rename(final)
        flush(final.parent)
        artifact = self._read(final)
        assert artifact is not None
        return artifact

    def entries(self) -> list[Artifact]:
        """All artifacts, by stage and key."""
        return [artifact for folder in self._folders() if (artifact := self._read(folder))]

    def remove(self, artifact: Artifact) -> None:
        """Remove an artifact: first its record, so that a crash in between leaves no half of it visible."""
        folder = self.root / artifact.stage / artifact.key
        (folder / _RECORD).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def collect(self, keep: set[str]) -> int:
        """Remove artifacts whose key is not in ``keep``, damaged ones, abandoned work, logs and downloads.

        What a running build works at is skipped: its step, its log and what it downloads.

        Returns:
            the bytes freed.
        """
        before = _usage(self.root)
        for folder in self._folders():
            if folder.name not in keep or self._read(folder) is None:
                with self._idle(self.root / "locks" / folder.name) as idle:
                    if idle:
                        (folder / _RECORD).unlink(missing_ok=True)
                        shutil.rmtree(folder, ignore_errors=True)
        for folder in (self.root / "tmp").iterdir():
            with self._idle(self.root / "locks" / folder.name.split(".")[0]) as idle:
                if idle:
                    shutil.rmtree(folder, ignore_errors=True)
        busy = {path.name for path in (self.root / "locks").iterdir() if not self._is_idle(path)}
        for log in (self.root / "logs").iterdir():
            if not any(key.startswith(log.stem.rpartition("-")[2]) for key in busy):
                log.unlink(missing_ok=True)
        with self._idle(self.root / "downloads" / _DOWNLOAD_LOCK) as idle:
            for path in (self.root / "downloads").iterdir() if idle else ():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != _DOWNLOAD_LOCK:  # whoever waits for it has it open
                    path.unlink(missing_ok=True)
        return before - _usage(self.root)

    def _folders(self) -> list[Path]:
        """Where artifacts are or were, whole or not."""
        return sorted(path for path in self.root.glob("*/*") if path.parent.name not in _AREAS and path.is_dir())

    @contextlib.contextmanager
    def _idle(self, lock: Path) -> Iterator[bool]:
        """Hold a lock if nobody else does, and tell so."""
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def _is_idle(self, lock: Path) -> bool:
        with self._idle(lock) as idle:
            return idle

    def _read(self, folder: Path) -> Artifact | None:
        try:
            data = json.loads((folder / _RECORD).read_bytes())
            if (data["stage"], data["key"]) != (folder.parent.name, folder.name):
                return None
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
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None


def _acquire(file: IO[str], waiting: Callable[[], None] | None) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting:
            waiting()
        fcntl.flock(file, fcntl.LOCK_EX)


def _usage(root: Path) -> int:
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(OSError):  # another process removed it
                total += (Path(folder) / name).stat().st_size
    return total
