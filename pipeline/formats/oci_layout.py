"""A folder of OCI artifacts (image layout 1.0.0): other tools copy it to registries, and it keeps what was pulled.

oci-layout            the version
index.json            tag → manifest
blobs/sha256/<hex>    manifests, configurations and files, each named by its digest
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import digest, files
from pipeline.artifact import MANIFEST, Manifest, read_json, read_manifest
from pipeline.errors import PackageError, ResourceError, UsageError
from pipeline.formats import oci_image, staging
from pipeline.formats.oci_image import Blob, Image
from pipeline.package import verify

_VERSION = {"imageLayoutVersion": "1.0.0"}
_TAG = "org.opencontainers.image.ref.name"


def path_of(layout: Path, blob: Blob) -> Path:
    """Where a blob is, or would be."""
    return layout / "blobs" / "sha256" / blob.sha256


def whole(layout: Path, blob: Blob) -> bool:
    """Whether a blob is there, as its digest says."""
    return same(path_of(layout, blob), blob)


def same(path: Path, blob: Blob) -> bool:
    """Whether a file has the bytes of a blob; a link is none."""
    try:
        return not path.is_symlink() and path.stat().st_size == blob.size and digest.of_file(path) == blob.sha256
    except OSError:
        return False


def write(package: Path, layout: Path, tag: str, key: Path | None = None) -> Image:
    """Verify a package and put it into a layout, which is made where there is none; files are hard links.

    Args:
        key: the public key that the package must be signed with.

    Raises:
        PackageError: the package fails verification.
        UsageError: the folder is something else than a layout.
        ResourceError: it cannot be written.
    """
    image, config = oci_image.describe(package, verify.package(package, key=key))
    with changing(layout):
        for layer in image.layers:
            if not whole(layout, layer):
                path = path_of(layout, layer)
                path.unlink(missing_ok=True)
                files.link(package / layer.name, path)
        add(layout, image, config, tag)
    return image


@contextlib.contextmanager
def changing(layout: Path) -> Iterator[None]:
    """Hold a layout, made where there is none, against other processes that add to it.

    Raises:
        UsageError: the folder is something else than a layout.
        ResourceError: it cannot be written.
    """
    if layout.exists() and not (layout / "oci-layout").is_file() and (not layout.is_dir() or any(layout.iterdir())):
        raise UsageError(f"{layout} is no OCI layout", why="it has no file oci-layout", fix="give another folder")
    try:
        (layout / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
        descriptor = os.open(layout, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not (layout / "oci-layout").is_file():
                files.publish(layout / "index.json", _json({"schemaVersion": 2, "manifests": []}))
                files.publish(layout / "oci-layout", _json(_VERSION))
            yield
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ResourceError(f"{layout} cannot be written", why=str(error)) from None


def add(layout: Path, image: Image, config: bytes, tag: str) -> None:
    """Let a tag name an artifact whose files are there; `changing` must hold the layout."""
    for blob, data in ((image.config, config), (image.blob, image.manifest)):
        with files.staged(path_of(layout, blob)) as file:
            file.write(data)
    entry = {
        "mediaType": image.blob.media_type,
        "digest": image.blob.digest,
        "size": image.blob.size,
        "artifactType": oci_image.ARTIFACT_TYPE,
        "annotations": {_TAG: tag},
    }
    index = _index(layout)
    index["manifests"] = [other for other in index["manifests"] if _tag(other) != tag] + [entry]
    files.publish(layout / "index.json", _json(index))


def _json(value: Any) -> str:
    return digest.canonical_json(value).decode()


def _tag(entry: Any) -> str:
    """The tag of an entry of an index, empty where it has none."""
    annotations = entry.get("annotations") if isinstance(entry, dict) else None
    tag = annotations.get(_TAG) if isinstance(annotations, dict) else None
    return tag if isinstance(tag, str) else ""


def _index(layout: Path) -> dict[str, Any]:
    try:
        if read_json(layout / "oci-layout") != _VERSION:
            raise ValueError(f"its version is not {_VERSION['imageLayoutVersion']}")
        index = read_json(layout / "index.json")
        if not isinstance(index, dict) or not isinstance(index.get("manifests"), list):
            raise ValueError("index.json names no manifests")
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{layout} is no OCI layout that can be read", why=str(error)) from None
    return index


def read(layout: Path, tag: str = "") -> Image:
    """The artifact of a tag; of a layout with one artifact the tag may be left out.

    Raises:
        UsageError: it is no layout, or has no such tag.
        PackageError: the manifest is refused.
    """
    found = {_tag(entry): entry for entry in _index(layout)["manifests"]}
    if tag not in found and (tag or len(found) != 1):
        raise UsageError(
            f"{layout} has no {tag or 'single artifact'}", why=f"it has {', '.join(sorted(found)) or 'none'}"
        )
    entry = found[tag] if tag in found else next(iter(found.values()))
    try:
        blob = Blob(entry["digest"], entry["size"], entry["mediaType"])
        if blob.size > oci_image.MAX_MANIFEST or len(blob.sha256) != 64 or not blob.sha256.isalnum():
            raise ValueError("its size or digest is none of a manifest")
        if not whole(layout, blob):
            raise ValueError(f"the manifest {blob.digest} is missing or damaged")
        data = path_of(layout, blob).read_bytes()
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise PackageError(f"{layout} is damaged", why=str(error), fix="export or pull it again") from None
    return oci_image.parse(data)


def extract(layout: Path, image: Image, out: Path, key: Path | None = None) -> Manifest:
    """Make the directory ``out`` of an artifact, verified; files are hard links into the layout.

    Args:
        key: the public key that the package must be signed with.

    Raises:
        PackageError: a blob is missing or damaged, or what they make fails verification.
        UsageError: something else is at ``out``.
        ResourceError: it cannot be written.
    """
    named = {layer.name: layer for layer in image.layers}
    if MANIFEST not in named:
        raise PackageError("the artifact is refused", why=f"it has no {MANIFEST}, so it holds no package")
    damaged = [layer.name for layer in image.layers if not whole(layout, layer)]
    if damaged:
        raise PackageError(f"{layout} is damaged", why=f"missing or changed: {', '.join(damaged)}", fix="pull it again")
    if staging.arrived(out, path_of(layout, named[MANIFEST]).read_bytes(), key):
        return read_manifest(out)
    with staging.folder(out, set(), "oci", key) as place:
        for name, layer in named.items():
            files.link(path_of(layout, layer), place / name)
    return read_manifest(out)
