"""What passes between stages (steps, artifacts, results), and the manifest of a package."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline import digest
from pipeline.errors import PackageError
from pipeline.task import GENERATE, TASKS

MANIFEST = "manifest.json"
CHECKSUMS = "SHA256SUMS"
SIGNATURE = "model.sig"
PROVENANCE = "provenance.dsse.json"
SIGNED = (SIGNATURE, PROVENANCE)
"""What signing adds to a package; its manifest is older, and lists neither."""
VALIDATION = "validation.json"
GOLDEN = "golden.jsonl"
SCHEMA_VERSION = 1
_MAX_JSON = 64 << 20

Progress = Callable[[float, str], None]
"""Called with the fraction done, in [0, 1], and a few words on what is being done."""


@dataclass(frozen=True)
class Estimate:
    """What a step is expected to need: peak bytes of memory, bytes of disk, seconds on two cores."""

    memory: int
    disk: int
    seconds: int


@dataclass(frozen=True)
class Need:
    """What the steps that are still to run need, and what the machine has; bytes and seconds."""

    memory: int
    disk: int
    seconds: int
    free_memory: int
    free_disk: int


@dataclass(frozen=True)
class Step:
    """One unit of work.

    Attributes:
        stage: key of ``pipeline.stages.STAGES``.
        key: sha256 of everything that affects the result.
        fields: the part of the recipe that affects the result; a stage reads nothing else.
        inputs: the stages whose artifacts it reads.
        tools: versions of the libraries that produce the result.
        estimate: what it is expected to need.
        context: what the stage needs and what does not affect the result, such as where to fetch from.
    """

    stage: str
    key: str
    fields: Mapping[str, Any]
    inputs: tuple[str, ...]
    tools: Mapping[str, str]
    estimate: Estimate
    context: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for crossing a process boundary."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Step:
        """The step that `as_dict` described."""
        return Step(**{**data, "inputs": tuple(data["inputs"]), "estimate": Estimate(**data["estimate"])})


@dataclass(frozen=True)
class Artifact:
    """The immutable result of a step.

    Attributes:
        stage, key: of the step that made it.
        digest: sha256 over its files' paths and contents.
        path: directory of the files.
        files: relative POSIX path → size in bytes and sha256.
        facts: what the stage found worth telling.
        seconds, peak_memory: what making it took (wall time; bytes of resident memory).
    """

    stage: str
    key: str
    digest: str
    path: Path
    files: Mapping[str, tuple[int, str]]
    facts: Mapping[str, Any]
    seconds: float = 0.0
    peak_memory: int = 0

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.files.values())


def graph_files(artifact: Artifact) -> dict[str, str]:
    """Relative path → sha256 of an artifact's graphs, weights and adapters."""
    endings = (".onnx", ".data", ".bin", ".xml", ".onnx_adapter")
    return {name: sha256 for name, (_, sha256) in artifact.files.items() if name.endswith(endings)}


def candidate(inputs: Mapping[str, Artifact]) -> Artifact:
    """Of a stage's inputs the one that is to be shipped: the last one that has graphs."""
    return next(inputs[name] for name in ("compile", "adapters", "quantize") if name in inputs)


@dataclass(frozen=True)
class Result:
    """What a stage returns beside the files it wrote.

    Attributes:
        facts: JSON values worth telling.
        refused: the error (`QwenOnnxError.as_dict`) that forbids going on; the artifact is kept as evidence.
    """

    facts: dict[str, Any]
    refused: dict[str, str] | None = None


@dataclass(frozen=True)
class Manifest:
    """The content of a package's ``manifest.json``: where it comes from, what it needs, what is in it."""

    data: Mapping[str, Any]

    @property
    def files(self) -> dict[str, tuple[int, str]]:
        """Relative path → size in bytes and sha256, of every file but the manifest and SHA256SUMS."""
        return {name: (entry["size"], entry["sha256"]) for name, entry in self.data["files"].items()}

    @property
    def task(self) -> str:
        """What the package is for, see `pipeline.task`."""
        return str(self.data.get("task", GENERATE))

    @property
    def generates(self) -> bool:
        """Whether it generates text, and is run by onnxruntime-genai."""
        return TASKS[self.task].generates

    @property
    def digest(self) -> str:
        """sha256 over all entries: one value that names the package's contents."""
        return digest.of_value(dict(self.data))


_REQUIRED: dict[str, type | tuple[type, ...]] = {
    "schema_version": int,
    "name": str,
    "source": dict,
    "recipe": dict,
    "steps": dict,
    "target": dict,
    "runtime": dict,
    "files": dict,
}


def read_manifest(package: Path) -> Manifest:
    """Read and check ``manifest.json`` of a package directory.

    Raises:
        PackageError: it is missing, is not JSON, or does not follow the schema.
    """
    manifest = load_manifest(package)
    check_schema(package, manifest)
    return manifest


def load_manifest(package: Path) -> Manifest:
    """The manifest of a package as far as its list of files goes, of whatever schema version.

    Raises:
        PackageError: it is missing, is not JSON, or lists no files.
    """
    path = package / MANIFEST
    try:
        data = read_json(path)
        digest.of_value(data)  # a string that is not valid Unicode has none
    except FileNotFoundError:
        raise PackageError(
            f"{package} is not a package",
            why=f"it has no {MANIFEST}",
            fix="give the directory that `qwen-onnx build` wrote",
            codes=["files.missing"],
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise PackageError(
            f"{MANIFEST} cannot be read", where=str(path), why=str(error), codes=["files.unreadable"]
        ) from None
    if problem := _files_problem(data):
        raise _schema_error(path, problem)
    return Manifest(data)


def check_schema(package: Path, manifest: Manifest) -> None:
    """Check all of a manifest.

    Raises:
        PackageError: it does not follow the schema, or is of a newer one.
    """
    if problem := _version_problem(manifest.data) or _schema_problem(manifest.data):
        raise _schema_error(package / MANIFEST, problem, newer=bool(_version_problem(manifest.data)))


def _schema_error(path: Path, problem: str, newer: bool = False) -> PackageError:
    return PackageError(
        f"{MANIFEST} does not follow its schema",
        where=str(path),
        why=problem,
        fix="use the version of qwen-onnx that its package was made with, or a newer one" if newer else "",
        codes=["manifest.version" if newer else "manifest.schema"],
    )


def read_json(path: Path) -> Any:
    """The value of a JSON file that nobody has to trust: what other parsers might read otherwise is refused.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, too large, not UTF-8, not JSON, names a key twice in one object (parsers
            differ in which one counts), or has NaN or infinite numbers.
        RecursionError: it is nested too deep.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):  # a pipe would never end
        raise ValueError("it is no regular file")
    if status.st_size > _MAX_JSON:
        raise ValueError(f"it is larger than {_MAX_JSON} bytes")
    return parse_json(path.read_bytes())


def parse_json(data: bytes) -> Any:
    """The value of JSON that nobody has to trust, see `read_json`.

    Raises:
        ValueError, RecursionError: as `read_json`.
    """
    return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number")
    return value


def shown(name: str) -> str:
    """A name that nobody has to trust, as it may go to a terminal: control characters are escaped."""
    return name if name.isprintable() else ascii(name)


def is_file_name(name: str) -> bool:
    """Whether ``name`` can be a file of a package: visible, printable, and one component on every system."""
    return bool(name) and name.isprintable() and not name.startswith(".") and not set(name) & set('/\\:*?"<>|')


def _files_problem(data: Any) -> str:
    """What is wrong with a manifest's list of files."""
    if not isinstance(data, dict):
        return "it is not an object"
    if not isinstance(data.get("files"), dict):
        return _version_problem(data) or "`files` is missing or of the wrong type"
    return next(filter(None, (_entry_problem(name, entry) for name, entry in data["files"].items())), "")


def _version_problem(data: Mapping[str, Any]) -> str:
    version = data.get("schema_version")
    if type(version) is int and version == SCHEMA_VERSION:
        return ""
    return f"schema version {version!r}; this program reads {SCHEMA_VERSION}"


def _schema_problem(data: Mapping[str, Any]) -> str:
    for key, kind in _REQUIRED.items():
        if not isinstance(data.get(key), kind):
            return f"`{key}` is missing or of the wrong type"
    if data.get("task", GENERATE) not in list(TASKS):  # it may be no text, and have no hash
        return f"task {data['task']!r} is none of {', '.join(TASKS)}"
    if not data["name"].isprintable():  # it goes to terminals
        return f"name {data['name']!r} cannot be printed"
    return ""


def _entry_problem(name: str, entry: Any) -> str:
    if not is_file_name(name):
        return f"file name {name!r}: a package is one flat directory of files with plain names"
    if not isinstance(entry, dict) or type(entry.get("size")) is not int or not isinstance(entry.get("sha256"), str):
        return f"file {name!r} has no size or sha256"
    return ""
