"""A package as one file, and back: a plain tar whose bytes depend on the package alone.

Weights do not compress, so nothing is compressed: the archive is the files, sorted, in blocks of 512 bytes (POSIX
ustar), all with one owner, mode and time. What reads it back is as strict as what wrote it: an archive is data from
elsewhere, and everything that tar can say beyond regular files in one folder is refused before a byte is written.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipeline import digest, files
from pipeline.artifact import MANIFEST, Manifest, is_file_name, read_manifest
from pipeline.errors import PackageError, ResourceError, UsageError
from pipeline.formats import staging, tar
from pipeline.package import verify

_BLOCK, _RECORD, _COPY = 512, 10240, 1 << 20
_MODE = 0o644
_MAX_MANIFEST = 64 << 20  # bytes; `pipeline.artifact` reads no more
_USTAR_SIZE = 8 << 30  # sizes from here on need the notation of GNU tar


@dataclass(frozen=True)
class Packed:
    """What `pack` wrote: bytes and sha256 of the archive, and how many files are in it."""

    size: int
    sha256: str
    files: int


@dataclass(frozen=True)
class Unpacked:
    """What `unpack` made; ``kept`` files were there already, from a run that did not come to its end."""

    manifest: Manifest
    files: int
    kept: int


def epoch() -> int:
    """The time that entries get: ``SOURCE_DATE_EPOCH`` (https://reproducible-builds.org/specs), or 0.

    Raises:
        UsageError: it is no whole number of seconds that tar can write.
    """
    text = os.environ.get("SOURCE_DATE_EPOCH", "0")
    if not (text.isascii() and text.isdigit() and len(text) <= 11 and int(text) < 8**11):
        raise UsageError(f"SOURCE_DATE_EPOCH is {text[:40]!r}", why="it has to be seconds since 1970, in digits")
    return int(text)


def pack(package: Path, out: Path, key: Path | None = None) -> Packed:
    """Verify a package and write it as an archive; equal packages give equal bytes.

    Args:
        key: the public key that it must be signed with.

    Raises:
        PackageError: the package fails verification, or has a name that tar cannot write.
        UsageError: ``out`` is inside of the package.
        ResourceError: the archive cannot be written; what was there is as it was.
    """
    if out.resolve().parent == package.resolve():
        raise UsageError(f"{out} is inside of the package", why="nothing may be added to a package")
    manifest, seconds = verify.package(package, key=key), epoch()
    folder = _folder(manifest)
    names = sorted(path.name for path in package.iterdir())
    hashed = hashlib.sha256()
    with files.staged(out) as file:
        size = 0
        for name in names:
            for block in _blocks(package / name, f"{folder}/{name}", seconds, manifest.files.get(name)):
                file.write(block)
                hashed.update(block)
                size += len(block)
        end = bytes(-(size + 2 * _BLOCK) % _RECORD + 2 * _BLOCK)
        file.write(end)
        hashed.update(end)
    return Packed(size + len(end), hashed.hexdigest(), len(names))


def _folder(manifest: Manifest) -> str:
    """The folder in the archive, so that tar(1) puts no file beside others."""
    name = str(manifest.data["name"])
    return name if is_file_name(name) else manifest.digest[:16]


def _blocks(path: Path, name: str, seconds: int, wanted: tuple[int, str] | None) -> Iterator[bytes]:
    """Header, content and padding of an entry; a file that changed since it was verified is an error."""
    size = path.stat().st_size
    yield _header(name, size, seconds)
    hashed, left = hashlib.sha256(), size
    with path.open("rb") as file:
        while left and (block := file.read(min(_COPY, left))):
            hashed.update(block)
            left -= len(block)
            yield block
        changed = bool(left or file.read(1))
    if changed or (wanted and hashed.hexdigest() != wanted[1]):
        raise PackageError(f"{path} changed while it was packed", fix="pack it again when nothing writes to it")
    yield bytes(-size % _BLOCK)


def _header(name: str, size: int, seconds: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, seconds, _MODE
    try:
        header = (
            info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
            if size < _USTAR_SIZE
            else info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")
        )
    except ValueError as error:
        raise PackageError(f"{name!r} cannot be written to an archive", why=str(error)) from None
    if len(header) != _BLOCK:
        raise PackageError(f"{name!r} cannot be written to an archive", why="it is longer than 100 bytes")
    return header


def unpack(archive: Path, out: Path, quota: tar.Quota | None = None, key: Path | None = None) -> Unpacked:
    """Make the directory ``out`` of an archive; it is there when all of it is there and verified, and not before.

    A run that was ended leaves a hidden folder beside ``out``; the next one keeps what is whole in it.

    Args:
        key: the public key that the package must be signed with.

    Raises:
        UsageError: there is no archive, or something else is at ``out``.
        PackageError: the archive is refused, or what is in it fails verification.
        ResourceError: the disk is full or fails.
    """
    if not archive.is_file():
        raise UsageError(f"there is no archive {archive}", fix="give the file that `qwen-onnx pack` wrote")
    try:
        with archive.open("rb") as file:
            return _unpack(file, tar.entries(file, quota or tar.Quota()), out, key)
    except OSError as error:
        raise ResourceError(f"{archive} cannot be read", why=str(error)) from None


def _unpack(file: IO[bytes], found: list[tar.Entry], out: Path, key: Path | None) -> Unpacked:
    named = {entry.name: entry for entry in found}
    if MANIFEST not in named:
        raise tar.refused(f"it has no {MANIFEST}, so it holds no package")
    if named[MANIFEST].size > _MAX_MANIFEST:
        raise tar.refused(f"its {MANIFEST} is larger than {_MAX_MANIFEST} bytes")
    file.seek(named[MANIFEST].offset)
    if staging.arrived(out, file.read(named[MANIFEST].size), key):
        return Unpacked(read_manifest(out), len(found), len(found))
    with staging.folder(out, set(named), "unpack", key) as place:
        there = sum(path.lstat().st_size for path in place.iterdir())
        staging.check_space(place, sum(entry.size for entry in found) - there)
        _extract(file, named.pop(MANIFEST), place / MANIFEST)
        manifest, kept = read_manifest(place), 0
        for entry in named.values():
            kept += _file(file, entry, place / entry.name, manifest.files.get(entry.name))
    return Unpacked(manifest, len(found), kept)


def _file(file: IO[bytes], entry: tar.Entry, path: Path, wanted: tuple[int, str] | None) -> bool:
    """Extract a file, unless it is there with the digest that the manifest names; returns whether it was."""
    if wanted and path.is_file() and not path.is_symlink():
        size, sha256 = wanted
        if entry.size == size == path.stat().st_size and digest.of_file(path) == sha256:
            return True
    sha256 = _extract(file, entry, path)
    if wanted and (entry.size, sha256) != wanted:
        raise PackageError(f"{entry.name} of the archive is not what its manifest names", fix="fetch the archive again")
    return False


def _extract(file: IO[bytes], entry: tar.Entry, path: Path) -> str:
    """Write an entry to ``path``, to disk; returns its sha256."""
    staging.remove(path)
    hashed, left = hashlib.sha256(), entry.size
    file.seek(entry.offset)
    with path.open("xb") as target:
        while left:
            block = file.read(min(_COPY, left))
            if not block:
                raise tar.refused(f"it ends within {tar.shown(entry.name)}", "fetch it again")
            target.write(block)
            hashed.update(block)
            left -= len(block)
        target.flush()
        os.fsync(target.fileno())
    return hashed.hexdigest()
