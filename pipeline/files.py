"""Files that are there as a whole, or not at all; files that are there twice."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipeline.errors import ResourceError


def publish(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` (UTF-8), replacing what is there at once; its folder is made where it is missing.

    Raises:
        ResourceError: it cannot be written; what was there is as it was.
    """
    with staged(path) as file:
        file.write(text.encode("utf-8"))


@contextlib.contextmanager
def staged(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which becomes ``path`` at the end of the block; its folder is made where it is missing.

    Raises:
        ResourceError: it cannot be written; what was there is as it was.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(
            f"{path} cannot be written", why=str(error), fix="free some space, or give another place"
        ) from None


def flush(path: Path) -> None:
    """Make a file last, or the names in a folder, such as that of a file that was renamed into it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link(source: Path, path: Path) -> None:
    """Let ``path`` be the same file as ``source``, or a copy where the file system has no hard links."""
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)
