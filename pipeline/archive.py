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

from pipeline import digest, files, staging, verify
from pipeline.artifact import MANIFEST, MAX_JSON, Manifest, is_file_name, read_manifest
from pipeline.errors import PackageError, ResourceError, UsageError

_BLOCK, _RECORD, _COPY = 512, 10240, 1 << 20
_MODE = 0o644
_USTAR_SIZE = 8 << 30  # sizes from here on need the notation of GNU tar
_NAME_BYTES = 255  # the longest file name of common file systems
# What each entry type of tar is, for those who are told that it is refused.
_TYPES = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.DIRTYPE: "a folder",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file, which may be larger than the archive",
    tarfile.XHDTYPE: "a header that changes other entries",
    tarfile.XGLTYPE: "a header that changes other entries",
    tarfile.GNUTYPE_LONGNAME: "a header that changes other entries",
    tarfile.GNUTYPE_LONGLINK: "a header that changes other entries",
}


@dataclass(frozen=True)
class Quota:
    """The most that an archive may unpack to: bytes of all files, and how many files."""

    size: int = 200 * 10**9
    files: int = 1000


@dataclass(frozen=True)
class Entry:
    """A file of an archive: its name without the folder, where its bytes begin, and how many there are."""

    name: str
    offset: int
    size: int


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


def pack(package: Path, out: Path) -> Packed:
    """Verify a package and write it as an archive; equal packages give equal bytes.

    Raises:
        PackageError: the package fails verification, or has a name that tar cannot write.
        UsageError: ``out`` is inside of the package.
        ResourceError: the archive cannot be written; what was there is as it was.
    """
    if out.resolve().parent == package.resolve():
        raise UsageError(f"{out} is inside of the package", why="nothing may be added to a package")
    manifest, seconds = verify.package(package), epoch()
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


def entries(file: IO[bytes], quota: Quota) -> list[Entry]:
    """All entries of an archive, read from its headers alone.

    Raises:
        PackageError: it is no such archive, or has an entry that is refused; nothing was written.
    """
    end, at, found, folders = file.seek(0, os.SEEK_END), 0, list[Entry](), set[str]()
    total, names = 0, dict[str, str]()
    while True:
        info = _info(_read(file, at, end), at)
        if info is None:
            break
        if len(found) == quota.files:
            raise _refused(f"it has more than {quota.files} files", "--max-files allows more")
        folder, _, name = info.name.partition("/")
        if not (is_file_name(folder) and is_file_name(name)) or len(name.encode()) > _NAME_BYTES:
            raise _refused(f"the entry {_shown(info.name)} is no file of one folder")
        if (other := names.get(name.casefold())) is not None:
            raise _refused(f"{_shown(name)} and {_shown(other)} are one file where case does not count")
        names[name.casefold()] = name
        folders.add(folder)
        total += info.size
        if total > quota.size:
            raise _refused(f"its files have more than {quota.size} bytes", "--max-bytes allows more")
        at += _BLOCK
        found.append(Entry(name, at, info.size))
        at += info.size + -info.size % _BLOCK
        if at > end:
            raise _refused(f"it ends within {_shown(name)}", "fetch it again")
    if len(folders) != 1:
        raise _refused("it has no files" if not folders else "its entries are in several folders")
    if end - at > 2 * _RECORD or any(_read(file, at, end, end - at)):
        raise _refused("something comes after its end")
    return found


def _read(file: IO[bytes], at: int, end: int, size: int = _BLOCK) -> bytes:
    if at + size > end:
        raise _refused("it has no end", "fetch it again")
    file.seek(at)
    return file.read(size)


def _info(block: bytes, at: int) -> tarfile.TarInfo | None:
    """What a header says; nothing at the end of the archive."""
    if not any(block):
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.TarError, ValueError, IndexError):
        raise _refused(
            f"byte {at} begins no entry of a tar archive", "packages are packed without compression"
        ) from None
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise _refused(f"the entry {_shown(info.name)} is {_TYPES.get(info.type, 'of an unknown type')}")
    if info.size < 0:
        raise _refused(f"the entry {_shown(info.name)} has a negative size")
    return info


def _shown(name: str) -> str:
    return ascii(name[:100])


def _refused(why: str, fix: str = "") -> PackageError:
    return PackageError("the archive is refused", why=why, fix=fix or "pack the package again with `qwen-onnx pack`")


def unpack(archive: Path, out: Path, quota: Quota | None = None) -> Unpacked:
    """Make the directory ``out`` of an archive; it is there when all of it is there and verified, and not before.

    A run that was ended leaves a hidden folder beside ``out``; the next one keeps what is whole in it.

    Raises:
        UsageError: there is no archive, or something else is at ``out``.
        PackageError: the archive is refused, or what is in it fails verification.
        ResourceError: the disk is full or fails.
    """
    if not archive.is_file():
        raise UsageError(f"there is no archive {archive}", fix="give the file that `qwen-onnx pack` wrote")
    try:
        with archive.open("rb") as file:
            return _unpack(file, entries(file, quota or Quota()), out)
    except OSError as error:
        raise ResourceError(f"{archive} cannot be read", why=str(error)) from None


def _unpack(file: IO[bytes], found: list[Entry], out: Path) -> Unpacked:
    named = {entry.name: entry for entry in found}
    if MANIFEST not in named:
        raise _refused(f"it has no {MANIFEST}, so it holds no package")
    if named[MANIFEST].size > MAX_JSON:
        raise _refused(f"its {MANIFEST} is larger than {MAX_JSON} bytes")
    file.seek(named[MANIFEST].offset)
    if staging.arrived(out, file.read(named[MANIFEST].size)):
        return Unpacked(read_manifest(out), len(found), len(found))
    with staging.folder(out, set(named), "unpack") as place:
        there = sum(path.lstat().st_size for path in place.iterdir())
        staging.check_space(place, sum(entry.size for entry in found) - there)
        _extract(file, named.pop(MANIFEST), place / MANIFEST)
        manifest, kept = read_manifest(place), 0
        for entry in named.values():
            kept += _file(file, entry, place / entry.name, manifest.files.get(entry.name))
    return Unpacked(manifest, len(found), kept)


def _file(file: IO[bytes], entry: Entry, path: Path, wanted: tuple[int, str] | None) -> bool:
    """Extract a file, unless it is there with the digest that the manifest names; returns whether it was."""
    if wanted and path.is_file() and not path.is_symlink():
        size, sha256 = wanted
        if entry.size == size == path.stat().st_size and digest.of_file(path) == sha256:
            return True
    sha256 = _extract(file, entry, path)
    if wanted and (entry.size, sha256) != wanted:
        raise PackageError(f"{entry.name} of the archive is not what its manifest names", fix="fetch the archive again")
    return False


def _extract(file: IO[bytes], entry: Entry, path: Path) -> str:
    """Write an entry to ``path``, to disk; returns its sha256."""
    staging.remove(path)
    hashed, left = hashlib.sha256(), entry.size
    file.seek(entry.offset)
    with path.open("xb") as target:
        while left:
            block = file.read(min(_COPY, left))
            if not block:
                raise _refused(f"it ends within {_shown(entry.name)}", "fetch it again")
            target.write(block)
            hashed.update(block)
            left -= len(block)
        target.flush()
        os.fsync(target.fileno())
    return hashed.hexdigest()
