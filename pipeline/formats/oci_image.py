"""A package as an OCI artifact of the CNCF's ModelPack kind: one raw layer a file, and a manifest that names them.

Equal files are equal blobs, so that of two packages of one model only what differs is stored and moved twice. Media
types and keys are those of https://github.com/modelpack/model-spec (specs-go/v1); the manifest is an image manifest of
https://github.com/opencontainers/image-spec.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import digest
from pipeline.artifact import CHECKSUMS, GOLDEN, MANIFEST, Manifest, is_file_name
from pipeline.errors import PackageError

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
MAX_MANIFEST = 4 << 20  # bytes that registries take at most (distribution-spec)
_LAYER = "application/vnd.cncf.model.{}.v1.raw"
_FILE, _TITLE = "org.cncf.model.filepath", "org.opencontainers.image.title"
_MOST_FILES, _MOST_BYTES = 1000, 200 * 10**9
_WEIGHTS = {".onnx", ".data", ".bin", ".xml", ".onnx_adapter"}
_DOCUMENTS = {MANIFEST, CHECKSUMS, "LICENSE", "NOTICE", "validation.json", "bom.cdx.json", "provenance.dsse.json"}
_DOCUMENT_ENDINGS = {".md", ".html", ".sig"}
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Blob:
    """A layer or configuration: what its bytes hash to, how many there are, and of which kind; ``name`` of a file."""

    digest: str
    size: int
    media_type: str
    name: str = ""

    @property
    def sha256(self) -> str:
        """The digest without its algorithm."""
        return self.digest.partition(":")[2]

    def descriptor(self) -> dict[str, Any]:
        """As a manifest names it."""
        annotations = {"annotations": {_FILE: self.name, _TITLE: self.name}} if self.name else {}
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size, **annotations}


@dataclass(frozen=True)
class Image:
    """An artifact: its manifest's bytes, its configuration, and a layer for each file of the package."""

    manifest: bytes
    config: Blob
    layers: tuple[Blob, ...]

    @property
    def blob(self) -> Blob:
        """The manifest itself, whose digest names the artifact."""
        return of_bytes(self.manifest, MANIFEST_TYPE)


def of_bytes(data: bytes, media_type: str) -> Blob:
    """The blob that ``data`` is."""
    return Blob(f"sha256:{digest.of_bytes(data)}", len(data), media_type)


def describe(package: Path, manifest: Manifest) -> tuple[Image, bytes]:
    """The artifact of a verified package, and its configuration's bytes; equal packages give equal bytes."""
    layers = []
    for path in sorted(package.iterdir(), key=lambda path: path.name):
        size, sha256 = manifest.files.get(path.name) or (path.stat().st_size, digest.of_file(path))
        layers.append(Blob(f"sha256:{sha256}", size, _media_type(path.name), path.name))
    config = digest.canonical_json(_config(package, manifest, layers))
    blob = of_bytes(config, CONFIG_TYPE)
    data = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": blob.descriptor(),
        "layers": [layer.descriptor() for layer in layers],
        "annotations": {_TITLE: str(manifest.data["name"])},
    }
    return Image(digest.canonical_json(data), blob, tuple(layers)), config


def _media_type(name: str) -> str:
    suffix = Path(name).suffix
    if suffix in _WEIGHTS:
        return _LAYER.format("weight")
    if suffix == ".py":
        return _LAYER.format("code")
    if name == GOLDEN:
        return _LAYER.format("dataset")
    documents = name in _DOCUMENTS or suffix in _DOCUMENT_ENDINGS
    return _LAYER.format("doc" if documents else "weight.config")


def _config(package: Path, manifest: Manifest, layers: list[Blob]) -> dict[str, Any]:
    """What ModelPack wants to know of a model; what the manifest does not say stays out."""
    data = manifest.data
    source, shape = data["source"], _object(data["recipe"].get("architecture"))
    languages = source.get("languages")
    capabilities = {
        "inputTypes": _inputs(package),
        "outputTypes": ["text" if manifest.generates else "embedding" if manifest.task == "embed" else "other"],
        # The schema takes two letters alone.
        "languages": [text for text in languages if isinstance(text, str) and re.fullmatch("[a-z]{2}", text)]
        if isinstance(languages, list)
        else [],
    }
    descriptor = {
        "name": data["name"],
        "family": shape.get("model_type"),
        "licenses": [source["license"]] if isinstance(source.get("license"), str) else None,
        "description": data["recipe"].get("description"),
    }
    config = {
        "architecture": "transformer",
        "format": "onnx",
        "precision": data["target"].get("dtype"),
        "quantization": _object(data.get("quantization")).get("algorithm"),
    }
    return {
        "descriptor": {key: value for key, value in descriptor.items() if isinstance(value, str | list)},
        "config": {key: value for key, value in config.items() if isinstance(value, str)}
        | {"capabilities": capabilities},
        "modelfs": {"type": "layers", "diffIds": [layer.digest for layer in layers]},
    }


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _inputs(package: Path) -> list[str]:
    try:
        model = _object(_object(json.loads((package / "genai_config.json").read_bytes())).get("model"))
    except (OSError, ValueError):
        model = {}
    kinds = {"vision": "image", "speech": "audio"}
    # A package that hears has an empty tower for pictures, which the runtime's type asks for.
    found = ["audio"] if "speech" in model else [name for key, name in kinds.items() if key in model]
    return ["text", *found]


def parse(manifest: bytes) -> Image:
    """The artifact that a manifest from elsewhere describes.

    Raises:
        PackageError: it is no manifest of a model that `describe` could have made: another kind, names that are no file
            names or collide, digests that are none, more files or bytes than packages have.
    """
    try:
        data = json.loads(manifest.decode("utf-8"))
        if data.get("mediaType") != MANIFEST_TYPE or data.get("artifactType") != ARTIFACT_TYPE:
            raise ValueError(f"it is of the kind {data.get('artifactType') or data.get('mediaType')!r}, no model")
        config = _blob(data["config"])
        layers = tuple(_blob(layer, layer["annotations"][_FILE]) for layer in data["layers"])
        _check(config, layers)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise PackageError(
            "the manifest is refused", why=str(error)[:200], fix="push it with `qwen-onnx oci push`"
        ) from None
    return Image(manifest, config, layers)


def _blob(value: Mapping[str, Any], name: Any = "") -> Blob:
    found = Blob(value["digest"], value["size"], value["mediaType"], name)
    if not isinstance(found.digest, str) or not _DIGEST.fullmatch(found.digest):  # it becomes the name of a file
        raise ValueError(f"{str(found.digest)[:80]!r} is no sha256 digest")
    if type(found.size) is not int or found.size < 0:
        raise ValueError(f"the size of {found.digest} is no number of bytes")
    return found


def _check(config: Blob, layers: tuple[Blob, ...]) -> None:
    if config.media_type != CONFIG_TYPE or config.size > MAX_MANIFEST:
        raise ValueError(f"its configuration is of the kind {config.media_type!r}, or too large")
    names = [layer.name for layer in layers]
    for layer in layers:
        if not isinstance(layer.name, str) or not is_file_name(layer.name):
            raise ValueError(f"{str(layer.name)[:80]!r} is no file name")
        if not isinstance(layer.media_type, str) or not layer.media_type.endswith(".raw"):
            raise ValueError(f"{layer.name} is of the kind {str(layer.media_type)[:80]!r}, and only raw files are read")
    if len({name.casefold() for name in names}) < len(names):
        raise ValueError("two of its files are one where case does not count")
    if not 0 < len(layers) <= _MOST_FILES or sum(layer.size for layer in layers) > _MOST_BYTES:
        raise ValueError(f"it has no files, more than {_MOST_FILES}, or more than {_MOST_BYTES} bytes")
