"""Which bytes a package's graphs make a runtime read: those of files in the package, and no others."""

from __future__ import annotations

from pathlib import Path

from pipeline.artifact import shown
from pipeline.errors import PackageError
from pipeline.package import onnx_references
from pipeline.package.config import is_name


def check_external_data(package: Path) -> None:
    """Refuse a graph whose external data lies outside the package or outside its files.

    Raises:
        PackageError: naming the first such tensor.
    """
    for path in sorted(package.glob("*.onnx")):
        try:
            references = onnx_references.read(path.read_bytes())
        except ValueError as error:
            raise PackageError(
                f"{path.name} is not an ONNX model", where=str(path), why=str(error), codes=["data.graph"]
            ) from None
        for entry in references:
            problem = _reference_problem(package, entry)
            if problem:
                raise PackageError(
                    f"{path.name} refers to data that it may not read",
                    where=f"tensor {shown(entry.tensor)}",
                    why=problem,
                    fix="do not load it",
                    codes=["data.outside"],
                )


def _reference_problem(package: Path, entry: onnx_references.Reference) -> str:
    if not is_name(entry.location):
        return f"location {entry.location!r} is no file name of the package"
    file = package / entry.location
    if not _is_regular(file):
        return f"location {entry.location!r} is no regular file of the package"
    if file.suffix == ".xml" and not _is_regular(file.with_suffix(".bin")):
        return f"{entry.location!r} has its weights in {file.stem}.bin, which is no regular file of the package"
    size = file.stat().st_size
    length = size - entry.offset if entry.length is None else entry.length
    if entry.offset < 0 or length < 0 or entry.offset + length > size:
        return f"bytes {entry.offset} to {entry.offset + length} of {entry.location}, which has {size}"
    return ""


def _is_regular(file: Path) -> bool:
    return file.is_file() and not file.is_symlink()
