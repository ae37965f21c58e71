"""Adapters of a package: slots in its graph, ``NAME.onnx_adapter`` files that fill them, and what is said of each.

A graph with slots adds ``(x @ A) @ B`` to what a projection gives. ``A`` and ``B`` are inputs with defaults of rank 0;
a file overrides them when a generator is told to. The runtime looks at a file's tensors when it computes the first
token and not before, and a file does not tell what it was made for: both are checked here.

Shapes in this module:
    I, O: inputs and outputs of a projection, R: rank, of each adapter and projection its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import digest
from pipeline.artifact import Manifest, read_json
from pipeline.errors import PackageError, RuntimeMissing
from pipeline.package import onnx_references

ENDING = ".onnx_adapter"
DESCRIPTION = ".json"  # of NAME.onnx_adapter: NAME.onnx_adapter.json
SCHEMA_VERSION = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
PARTS = ("lora_A", "lora_B")
_SLOT = re.compile(r"(.+)\.lora_([AB])\.weight")
_DTYPES = {1: "float32", 10: "float16"}  # of TensorProto.DataType
_ORT_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}


@dataclass(frozen=True)
class Slot:
    """Where an adapter may add to a projection: ``A`` is ``[inputs, R]``, ``B`` is ``[R, outputs]``, of one dtype."""

    inputs: int
    outputs: int
    dtype: str


@dataclass(frozen=True)
class Described:
    """What stands beside an adapter's file.

    Attributes:
        name: how it is called in its package.
        sha256: of the file.
        base: digest of the checkpoint whose package it was converted for.
        ranks: for each slot that it fills, R.
        source: sha256 of peft's files.
        trained_on: what the adapter called its base model.
        license: SPDX identifier; empty when nobody said.
    """

    name: str
    sha256: str
    base: str
    ranks: Mapping[str, int]
    source: str
    trained_on: str
    license: str


def tensor_name(slot: str, part: str) -> str:
    """The graph's name of ``lora_A`` or ``lora_B`` of a slot."""
    return f"{slot}.{part}.weight"


def names(package: Path) -> list[str]:
    """The adapters in a package."""
    return sorted(path.name.removesuffix(ENDING) for path in package.glob(f"*{ENDING}"))


def unsuited(config: Mapping[str, Any]) -> str:
    """Why a kind of model takes no adapters, from its ``genai_config.json``; empty when it does."""
    model = config["model"]
    others = [name for name in ("vision", "speech", "embedding", "encoder") if name in model]
    if others:
        return f"it has a graph for {', '.join(others)}, and the runtime ignores adapters of such models without a word"
    if "filename" not in model["decoder"]:
        return "its decoder is a pipeline of graphs, which have no slots"
    return ""


def slots(package: Path) -> dict[str, Slot]:
    """The slots of a package's graph, by the module that they are beside; read with the standard library alone.

    Raises:
        PackageError: the configuration or the graph cannot be read, or a slot has one input of two.
    """
    try:
        decoder = read_json(package / "genai_config.json")["model"]["decoder"]
        if "filename" not in decoder:
            return {}
        inputs = onnx_references.inputs((package / decoder["filename"]).read_bytes())
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise PackageError("the graph of the package cannot be read", where=str(package), why=str(error)) from None
    found = {}
    for name in dict.fromkeys(match[1] for match in map(_SLOT.fullmatch, inputs) if match):
        (kind, first), (other, second) = (inputs.get(tensor_name(name, part), (0, ())) for part in PARTS)
        if kind != other or kind not in _DTYPES or len(first) != 2 or len(second) != 2:
            raise PackageError(f"the slot {name} is no pair of matrices", where=str(package))
        found[name] = Slot(first[0], second[1], _DTYPES[kind])
    return found


def description(described: Described) -> str:
    """The text of the file that stands beside the adapter's."""
    return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(described)}, indent=1, sort_keys=True) + "\n"


def read_description(file: Path) -> Described:
    """What is said of an adapter's file.

    Raises:
        PackageError: nothing, or it does not follow its schema.
    """
    path = file.with_name(file.name + DESCRIPTION)
    try:
        data = read_json(path)
        if not isinstance(data, dict) or data.pop("schema_version", None) != SCHEMA_VERSION:
            raise ValueError(f"it is not of schema version {SCHEMA_VERSION}")
        described = Described(**data)
        texts = (value for key, value in data.items() if key != "ranks")
        ranks = described.ranks
        if not all(isinstance(text, str) and text.isprintable() for text in (*texts, *ranks)):
            raise ValueError("a value is no line of text")
        if not isinstance(ranks, dict) or not all(type(rank) is int and rank > 0 for rank in ranks.values()):
            raise ValueError("a rank is no positive number")
    except FileNotFoundError:
        raise PackageError(
            f"nothing is said of the adapter {file.name}",
            where=str(path),
            why="the file alone does not tell which base model it is for",
            fix="`qwen-onnx adapter` writes both files: keep them together",
        ) from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise PackageError("the description of an adapter cannot be read", where=str(path), why=str(error)) from None
    return described


def check(file: Path, package: Path, base: str) -> Described:
    """Check an adapter's description and bytes against a package, without a runtime; returns the description.

    Args:
        file: ``NAME.onnx_adapter``, in the package or elsewhere.
        base: digest of the checkpoint that the package was made from.

    Raises:
        PackageError: the file is not what is said of it, or is not for this package.
    """
    described = read_description(file)
    known = slots(package)
    if not known:
        raise _misfit(file, "its graph has no slots", "build the package from a recipe with `adapters`")
    if not file.is_file() or file.is_symlink() or digest.of_file(file) != described.sha256:
        raise PackageError(
            f"{file.name} is not the file that was converted",
            where=str(file),
            why="it is missing, or its sha256 is another",
            fix="fetch it again with its description, and do not load it",
        )
    if described.base != base:
        raise _misfit(file, f"it was converted for a package of another checkpoint ({described.base[:12]})")
    if absent := sorted(described.ranks.keys() - known.keys()):
        raise _misfit(file, f"the graph has no slot {absent[0]}")
    return described


def check_tensors(file: Path, described: Described, known: Mapping[str, Slot]) -> None:
    """Compare every tensor of an adapter with the slots of a graph.

    Raises:
        PackageError: one has no slot, another shape or another type, or is missing.
        RuntimeMissing: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeMissing("onnxruntime cannot be loaded", why=str(error), fix="pip install '.[serve]'") from None
    try:
        adapter = onnxruntime.AdapterFormat.read_adapter(str(file.resolve()))
        given = {
            name: (tuple(value.shape()), _ORT_DTYPES.get(value.data_type(), value.data_type()))
            for name, value in adapter.get_parameters().items()
        }
    except Exception as error:  # the binding raises bare exceptions of the C++ side
        why = str(error).splitlines()[0] if str(error) else ""
        raise PackageError(f"{file.name} is no adapter of ONNX Runtime", where=str(file), why=why) from None
    if problem := next(_tensor_problems(given, described.ranks, known), ""):
        raise _misfit(file, problem)


def _tensor_problems(
    given: Mapping[str, tuple[tuple[int, ...], str]], ranks: Mapping[str, int], known: Mapping[str, Slot]
) -> Iterator[str]:
    wanted = {}
    for name, rank in ranks.items():
        slot = known[name]
        for part, dims in zip(PARTS, ((slot.inputs, rank), (rank, slot.outputs)), strict=True):
            wanted[tensor_name(name, part)] = (dims, slot.dtype)
    for name in sorted({*wanted, *given}):
        if name not in wanted:
            yield f"its tensor {name} is not in its description"
        elif name not in given:
            yield f"the tensor {name} is missing"
        elif given[name] != wanted[name]:
            texts = (f"{dtype} {list(dims)}" for dims, dtype in (given[name], wanted[name]))
            yield f"the tensor {name} is {', not '.join(texts)}"


def _misfit(file: Path, why: str, fix: str = "convert it for this package with `qwen-onnx adapter`") -> PackageError:
    return PackageError(f"the adapter {file.name} does not fit the package", where=str(file), why=why, fix=fix)


def check_package(package: Path, manifest: Manifest) -> None:
    """Check the adapters of a package, as far as no runtime is needed.

    Raises:
        PackageError: the manifest names others than there are, or one is not for this package.
    """
    told = manifest.data.get("adapters", {})
    found = names(package)
    if not isinstance(told, dict) or sorted(told) != found:
        raise PackageError(
            f"{package} has not the adapters of its manifest",
            why=f"it has {', '.join(found) or 'none'}",
            fix="fetch it again, and do not load it",
        )
    for name in found:
        described = check(package / f"{name}{ENDING}", package, base_of(manifest))
        if described.name != name:
            raise PackageError(f"the adapter {name} calls itself {described.name}", where=str(package))


def base_of(manifest: Manifest) -> str:
    """Digest of the checkpoint that a package was made from; empty where its manifest does not tell."""
    step = manifest.data["steps"].get("checkpoint")
    return str(step.get("digest", "")) if isinstance(step, dict) else ""
