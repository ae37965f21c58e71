"""A package is the files of its manifest, byte by byte, and what signing adds to them: nothing more, nothing less."""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline import digest
from pipeline.artifact import CHECKSUMS, MANIFEST, PROVENANCE, SIGNATURE, SIGNED, Manifest, shown
from pipeline.errors import PackageError
from pipeline.package.signature import Signed

Found = list[tuple[str, str]]
"""What is wrong: code (`docs/verify.md`) and words."""


def checksums(files: Mapping[str, str]) -> bytes:
    """The content of ``SHA256SUMS`` for name → sha256, in the format of sha256sum(1)."""
    return "".join(f"{files[name]}  {name}\n" for name in sorted(files)).encode()


def check_names(package: Path, manifest: Manifest, signed: Signed | None = None) -> None:
    """Check that a directory holds exactly the files of its manifest, and of its signature where it has one.

    Raises:
        PackageError: naming every file that is missing, added, a link or otherwise special.
        OSError: it cannot be read.
    """
    wanted = {*manifest.files, CHECKSUMS, MANIFEST}
    entries = {entry.name: entry for entry in package.iterdir()}
    allowed = wanted | (set(SIGNED) if SIGNATURE in entries else set())
    found: Found = []
    for name, entry in sorted(entries.items()):
        if not stat.S_ISREG(entry.lstat().st_mode):
            found.append(("files.special", f"{shown(name)} is no regular file"))
        elif name not in allowed:
            found.append(("files.extra", f"{shown(name)} is not in the manifest"))
        elif signed and name not in (*signed.files, SIGNATURE):
            found.append(("files.unsigned", f"{shown(name)} is not in the signature"))
    absent = {*wanted, *(signed.files if signed else ())} - entries.keys()
    found += [("files.missing", f"{shown(name)} is missing") for name in sorted(absent)]
    folded: dict[str, str] = {}
    for name in sorted({*entries, *wanted}):  # names that a file system may have made one already
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            found.append(("files.case", f"{shown(name)} and {shown(other)} are one file where case does not count"))
    _refuse(package, found)


def check_digests(
    package: Path, manifest: Manifest, signed: Signed | None = None, progress: Callable[[int], None] | None = None
) -> None:
    """Compare every file with the manifest, and the manifest with ``SHA256SUMS``, signature and provenance.

    Raises:
        PackageError: naming every file that has changed.
        OSError: it cannot be read.
    """
    found: Found = [
        ("digests.changed", f"{name} has changed ({'size' if (package / name).stat().st_size != size else 'sha256'})")
        for name, (size, sha256) in sorted(manifest.files.items())
        if (package / name).stat().st_size != size or digest.of_file(package / name, progress) != sha256
    ]
    sums = {name: sha256 for name, (_, sha256) in manifest.files.items()}
    sums[MANIFEST] = digest.of_file(package / MANIFEST)
    if (package / CHECKSUMS).read_bytes() != checksums(sums):
        found.append(("digests.checksums", f"{CHECKSUMS} does not agree with the files and the manifest"))
    if signed:
        sums[CHECKSUMS] = digest.of_file(package / CHECKSUMS)
        if signed.subjects is not None and signed.subjects != sums:
            found.append(("digests.provenance", f"{PROVENANCE} is of other files"))
        if signed.subjects is not None:
            sums[PROVENANCE] = digest.of_file(package / PROVENANCE)
        found += [
            ("digests.signature", f"{name} is not the file that was signed")
            for name in sorted(sums)
            if signed.files.get(name) != sums[name]
        ]
    _refuse(package, found)


def _refuse(package: Path, found: Found) -> None:
    if found:
        raise PackageError(
            f"{package} is not the package that was built",
            why="; ".join(text for _, text in found),
            fix="fetch it again, and do not load it",
            codes=list(dict.fromkeys(code for code, _ in found)),
        )
