"""A package that arrives: it gathers in a hidden folder, and is at its place when all of it is there and verified."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline import files
from pipeline.artifact import MANIFEST
from pipeline.errors import QwenOnnxError, ResourceError, UsageError
from pipeline.package import signature, verify


def arrived(out: Path, manifest: bytes, key: Path | None = None) -> bool:
    """Whether ``out`` is the package of that ``manifest.json`` already, verified.

    Args:
        key: the public key that it must be signed with.

    Raises:
        UsageError: there is something else.
        PackageError: it is not signed with the key.
    """
    if not (out.is_symlink() or out.exists()) or (out.is_dir() and not any(out.iterdir())):
        return False
    same = False
    with contextlib.suppress(QwenOnnxError):
        verify.package(out)
        same = (out / MANIFEST).read_bytes() == manifest
    if not same:
        raise UsageError(f"{out} holds something else", fix="remove it, or give another place with -o")
    if key:
        signature.read(out, key)
    return True


@contextlib.contextmanager
def folder(out: Path, names: set[str], kind: str, key: Path | None = None) -> Iterator[Path]:
    """A folder to fill with the files ``names``; at the end of the block it is verified and becomes ``out``.

    What an interruption leaves is there the next time, so that it can be kept after a look at its digest; everything
    else is removed first. After an error in what arrives nothing is left.

    Args:
        kind: part of the hidden folder's name, so that two ways to the same place do not meet.
        key: the public key that the package must be signed with.

    Raises:
        PackageError: what is there at the end fails verification.
        UsageError: another process is filling the folder, or the key is none.
        ResourceError: the disk is full or fails.
    """
    if key:
        signature.trusted(key)
    place = out.with_name(f".{out.name}.{kind}")
    try:
        place.mkdir(parents=True, exist_ok=True)
        with _alone(place):
            for path in place.iterdir():
                if path.name not in names:
                    remove(path)
            try:
                yield place
                verify.package(place, key=key)
            except QwenOnnxError:
                shutil.rmtree(place)
                raise
            files.flush(place)
            place.rename(out)
            files.flush(out.parent)
    except OSError as error:
        raise ResourceError(f"{out} cannot be written", why=str(error), fix="run the same command again") from None


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UsageError(f"another process is filling {place}", fix="wait for it, or give another place") from None
    finally:
        os.close(descriptor)


def check_space(place: Path, needed: int) -> None:
    """Refuse to begin what the disk does not hold: ``needed`` bytes beside what is there.

    Raises:
        ResourceError: there is less space.
    """
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ResourceError(f"{needed} bytes are to be written, and {free} are free", where=str(place.parent))


def remove(path: Path) -> None:
    """Remove a file, a link or a folder; fine where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
