"""sha256 digests of files and trees, and canonical JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes. NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def of_bytes(data: bytes) -> str:
    """sha256 (hex) of ``data``."""
    return hashlib.sha256(data).hexdigest()


def of_value(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of ``value``."""
    return of_bytes(canonical_json(value))


def of_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """sha256 (hex) of a file's bytes; ``progress`` is called with the size of each block read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            if progress:
                progress(len(block))
    return digest.hexdigest()


def of_tree(folder: Path, files: dict[str, str] | None = None) -> str:
    """sha256 (hex) over the sorted relative paths and digests of all files below ``folder``."""
    return of_value(files if files is not None else tree(folder))


def tree(folder: Path) -> dict[str, str]:
    """Relative POSIX path → sha256 of every file below ``folder``."""
    return {path.relative_to(folder).as_posix(): of_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}
