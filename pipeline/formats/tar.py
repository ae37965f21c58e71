"""What lies in a tar archive, read from its headers by a reader that takes nothing but regular files of one folder.

All else that tar can say is refused by name: links, devices, headers that change other entries. Headers are read one
by one, in bounded memory, and no content is.
"""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from typing import IO

from pipeline.artifact import is_file_name
from pipeline.errors import PackageError

_BLOCK, _RECORD = 512, 10240
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
            raise refused(f"it has more than {quota.files} files", "--max-files allows more")
        folder, _, name = info.name.partition("/")
        if not (is_file_name(folder) and is_file_name(name)) or len(name.encode()) > _NAME_BYTES:
            raise refused(f"the entry {shown(info.name)} is no file of one folder")
        if (other := names.get(name.casefold())) is not None:
            raise refused(f"{shown(name)} and {shown(other)} are one file where case does not count")
        names[name.casefold()] = name
        folders.add(folder)
        total += info.size
        if total > quota.size:
            raise refused(f"its files have more than {quota.size} bytes", "--max-bytes allows more")
        at += _BLOCK
        found.append(Entry(name, at, info.size))
        at += info.size + -info.size % _BLOCK
        if at > end:
            raise refused(f"it ends within {shown(name)}", "fetch it again")
    if len(folders) != 1:
        raise refused("it has no files" if not folders else "its entries are in several folders")
    if end - at > 2 * _RECORD or any(_read(file, at, end, end - at)):
        raise refused("something comes after its end")
    return found


def _read(file: IO[bytes], at: int, end: int, size: int = _BLOCK) -> bytes:
    if at + size > end:
        raise refused("it has no end", "fetch it again")
    file.seek(at)
    return file.read(size)


def _info(block: bytes, at: int) -> tarfile.TarInfo | None:
    """What a header says; nothing at the end of the archive."""
    if not any(block):
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.TarError, ValueError, IndexError):
        raise refused(
            f"byte {at} begins no entry of a tar archive", "packages are packed without compression"
        ) from None
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise refused(f"the entry {shown(info.name)} is {_TYPES.get(info.type, 'of an unknown type')}")
    if info.size < 0:
        raise refused(f"the entry {shown(info.name)} has a negative size")
    return info


def shown(name: str) -> str:
    return ascii(name[:100])


def refused(why: str, fix: str = "") -> PackageError:
    return PackageError("the archive is refused", why=why, fix=fix or "pack the package again with `qwen-onnx pack`")
