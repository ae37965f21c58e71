"""Push a package to an OCI registry and pull it from there, with `oras` for what registries disagree about: signing in.

Bytes are not left to it: it neither compares what it downloads with a digest nor goes on where it was cut off.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.artifact import SIGNATURE, SIGNED
from pipeline.errors import DownloadError, PackageError, RuntimeMissing, UsageError
from pipeline.formats import oci_image, oci_layout, staging
from pipeline.formats.oci_image import Blob, Image
from pipeline.package import signature, verify

# distribution-spec: names and tags.
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(
    rf"(?P<host>[A-Za-z0-9.-]+(?::[0-9]{{1,5}})?)/(?P<name>{_PART}(?:/{_PART})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_CHUNK, _COPY = 16 << 20, 1 << 20
_TIMEOUT = (10, 120)  # seconds until a registry must be reached, and between two of its bytes
_ATTEMPTS = 3


@dataclass(frozen=True)
class Moved:
    """What a push or pull did: the artifact's digest, bytes that were sent or fetched, and bytes that were there."""

    digest: str
    moved: int
    kept: int


def push(package: Path, reference: str, plain: bool = False, key: Path | None = None) -> Moved:
    """Verify a package and push it; blobs that the registry has are not sent again.

    Args:
        reference: ``host[:port]/name:tag``.
        plain: over HTTP, for a registry on this machine.
        key: the public key that the package must be signed with.

    Raises:
        PackageError: the package fails verification.
        UsageError: the reference is none, or has no tag.
        DownloadError: the registry cannot be reached, or refuses.
        RuntimeMissing: oras is not installed.
    """
    found = _parsed(reference)
    if not found["tag"] or found["digest"]:
        raise UsageError(f"{reference} has no tag, or a digest", fix="name it host/name:tag")
    manifest = verify.package(package, key=key)
    image, config = oci_image.describe(package, manifest)
    client = _Client(found, plain)
    moved = kept = 0
    for layer in image.layers:
        if client.has(layer):
            kept += layer.size
        else:
            client.upload(layer, package / layer.name)
            moved += layer.size
    if not client.has(image.config):
        client.upload(image.config, config)
        moved += image.config.size
    client.put_manifest(image, found["tag"])
    return Moved(image.blob.digest, moved + image.blob.size, kept)


def pull(reference: str, layout: Path, tag: str, plain: bool = False, key: Path | None = None) -> tuple[Image, Moved]:
    """Pull an artifact into a layout under a tag; blobs that are there and whole are not fetched again.

    Args:
        key: the public key that every file must be signed with, which is asked before the weights are fetched.

    Raises:
        UsageError: the reference is none, or the folder is no layout.
        PackageError: the manifest is refused, not signed with the key, or bytes are not those of their digest.
        DownloadError: the registry cannot be reached, refuses, or has no such artifact.
        ResourceError: the layout cannot be written.
        RuntimeMissing: oras is not installed.
    """
    found = _parsed(reference)
    client = _Client(found, plain)
    data = client.manifest(found["digest"] or found["tag"] or "latest")
    image = oci_image.parse(data)
    if found["digest"] and image.blob.digest != found["digest"]:
        raise PackageError(f"the registry has another manifest under {found['digest']}", why=image.blob.digest)
    moved = kept = 0
    with oci_layout.changing(layout):
        blobs = {blob.digest: blob for blob in (*image.layers, image.config)}
        missing = {name: blob for name, blob in blobs.items() if not oci_layout.whole(layout, blob)}
        kept = sum(blob.size for name, blob in blobs.items() if name not in missing)
        staging.check_space(layout / "blobs" / "sha256", sum(blob.size for blob in missing.values()))
        for signing in (True, False):
            for blob in missing.values():
                if (blob.name in SIGNED) is signing:
                    moved += client.download(blob, oci_layout.path_of(layout, blob))
            if key and signing:
                _check_signature(reference, layout, image, key)
        config = oci_layout.path_of(layout, image.config).read_bytes()
        oci_layout.add(layout, image, config, tag)
    return image, Moved(image.blob.digest, moved + len(data), kept)


def _check_signature(reference: str, layout: Path, image: Image, key: Path) -> None:
    """Hold what an artifact lists against a signature that is in the layout already."""
    with tempfile.TemporaryDirectory() as folder:
        for layer in image.layers:
            if layer.name in SIGNED:
                files.link(oci_layout.path_of(layout, layer), Path(folder) / layer.name)
        try:
            signed = signature.read(Path(folder), key)
        except PackageError as error:
            what = f"{reference} is not signed with that key"
            raise PackageError(what, why=error.why, fix=error.fix, codes=error.codes) from None
    listed = {layer.name: layer.sha256 for layer in image.layers if layer.name != SIGNATURE}
    if signed is None or signed.files != listed:
        raise PackageError(
            f"{reference} lists other files than were signed",
            fix="ask whoever made it for the signed package, and do not load this one",
            codes=["signature.wrong"],
        )


def tag_of(reference: str) -> str:
    """The tag of a reference, or what stands in for it in a layout."""
    found = _parsed(reference)
    return found["tag"] or found["digest"].replace(":", "-") or "latest"


def _parsed(reference: str) -> dict[str, str]:
    match = _REFERENCE.fullmatch(reference)
    host = match["host"] if match else ""
    if match is None or not ("." in host or ":" in host or host == "localhost"):
        raise UsageError(f"{reference!r} names nothing in a registry", fix="give host[:port]/name:tag, in lower case")
    return match.groupdict(default="")


class _Client:
    """One repository of a registry."""

    def __init__(self, found: dict[str, str], plain: bool) -> None:
        try:
            import oras.provider
            import requests
        except ImportError as error:
            raise RuntimeMissing("oras is not installed", why=str(error), fix="pip install '.[oci]'") from None
        self._errors = (requests.RequestException, ValueError, AttributeError, TypeError)
        self._base = f"{'http' if plain else 'https'}://{found['host']}/v2/"
        self._registry = oras.provider.Registry(found["host"], insecure=plain, auth_backend=self._scheme(requests))
        self._container = self._registry.get_container(f"{found['host']}/{found['name']}:{found['tag'] or 'latest'}")
        self._name = found["name"]
        self._send = type(self._registry).do_request.__wrapped__  # its own retries sleep for two minutes
        self._registry.session.mount("http", _adapter(requests))
        self._registry.auth.load_configs(self._container)

    def _scheme(self, requests: Any) -> str:
        """How the registry wants its users to sign in; found out by asking, which also tells whether it is there."""
        try:
            answer = requests.get(self._base, timeout=_TIMEOUT)
        except requests.RequestException as error:
            raise DownloadError(
                f"{self._base} cannot be reached",
                why=str(error)[:300],
                fix="check the name; --plain-http is for registries without TLS",
            ) from None
        return "basic" if answer.headers.get("Www-Authenticate", "").lower().startswith("basic") else "token"

    def _ask(self, method: str, path: str, wanted: tuple[int, ...], **more: Any) -> Any:
        """The answer to a request, if its status is one of ``wanted``; what was cut off is asked again."""
        url = path if path.startswith("http") else f"{self._base}{self._name}/{path}"
        for attempt in range(_ATTEMPTS):
            try:
                answer = self._send(self._registry, url, method, **more)
            except self._errors as error:
                if isinstance(error, ValueError | AttributeError) or attempt == _ATTEMPTS - 1:
                    # What oras raises where it finds no way to sign in.
                    raise self._failed(f"{method} {path}", str(error)) from None
            else:
                if answer.status_code in wanted:
                    return answer
                if answer.status_code < 500 or attempt == _ATTEMPTS - 1:
                    raise self._failed(f"{method} {path}", f"status {answer.status_code}: {answer.text[:200]}")
            time.sleep(attempt + 1)
        raise AssertionError

    def _failed(self, what: str, why: str) -> DownloadError:
        fix = "check the name, or sign in with `docker login` or `oras login`, whose configuration is used"
        return DownloadError(f"the registry does not answer to {what}", where=self._base, why=why, fix=fix)

    def has(self, blob: Blob) -> bool:
        return bool(self._ask("HEAD", f"blobs/{blob.digest}", (200, 404)).status_code == 200)

    def upload(self, blob: Blob, source: Path | bytes) -> None:
        """Send a blob in chunks; the registry compares it with its digest."""
        place = self._location(self._ask("POST", "blobs/uploads/", (202,)))
        at = 0
        for chunk in _chunks(source):
            span = {"Content-Range": f"{at}-{at + len(chunk) - 1}", "Content-Type": "application/octet-stream"}
            place = self._location(self._ask("PATCH", place, (202,), data=chunk, headers=span))
            at += len(chunk)
        mark = "&" if "?" in place else "?"
        self._ask("PUT", f"{place}{mark}digest={blob.digest}", (201,))

    def _location(self, answer: Any) -> str:
        place = str(answer.headers.get("Location", ""))
        return place if place.startswith("http") else self._base.removesuffix("/v2/") + place

    def put_manifest(self, image: Image, tag: str) -> None:
        headers = {"Content-Type": image.blob.media_type}
        answer = self._ask("PUT", f"manifests/{tag}", (201,), data=image.manifest, headers=headers)
        if answer.headers.get("Docker-Content-Digest", image.blob.digest) != image.blob.digest:
            raise self._failed("PUT manifests", "it has kept another manifest than the one that was sent")

    def manifest(self, name: str) -> bytes:
        headers = {"Accept": oci_image.MANIFEST_TYPE}
        with self._ask("GET", f"manifests/{name}", (200,), headers=headers, stream=True) as answer:
            data = b""
            for block in answer.iter_content(_COPY):
                data += block
                if len(data) > oci_image.MAX_MANIFEST:
                    raise PackageError(
                        "the manifest is refused", why=f"it is larger than {oci_image.MAX_MANIFEST} bytes"
                    )
        return data

    def download(self, blob: Blob, path: Path) -> int:
        """Fetch a blob to ``path``, from where an earlier attempt stopped; returns the bytes that were fetched."""
        partial = path.with_name(f".{path.name}.part")
        fetched = 0
        for attempt in range(_ATTEMPTS):
            try:
                fetched += self._fetch(blob, partial)
                break
            except self._errors[0] as error:  # cut off
                if attempt == _ATTEMPTS - 1:
                    raise self._failed(f"GET blobs/{blob.digest}", str(error)[:200]) from None
                time.sleep(attempt + 1)
        if not oci_layout.same(partial, blob):
            partial.unlink()
            raise PackageError(
                f"the registry sends other bytes than {blob.digest}",
                where=blob.name or "the configuration",
                fix="push the package again, and tell who runs the registry",
            )
        partial.replace(path)
        return fetched

    def _fetch(self, blob: Blob, partial: Path) -> int:
        there = partial.stat().st_size if partial.is_file() else 0
        if there >= blob.size:
            partial.unlink(missing_ok=True)
            there = 0
        headers = {"Range": f"bytes={there}-"} if there else {}
        fetched = 0
        with self._ask("GET", f"blobs/{blob.digest}", (200, 206), headers=headers, stream=True) as answer:
            there = there if answer.status_code == 206 else 0
            with partial.open("ab" if there else "wb") as file:
                for block in answer.iter_content(_COPY):
                    fetched += len(block)
                    if there + fetched > blob.size:
                        raise PackageError(f"the registry sends more than the {blob.size} bytes of {blob.digest}")
                    file.write(block)
        return fetched


def _chunks(source: Path | bytes) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _adapter(requests: Any) -> Any:
    """A transport of requests that does not wait for ever."""

    class Adapter(requests.adapters.HTTPAdapter):  # type: ignore[misc]
        def send(self, request: Any, *arguments: Any, **more: Any) -> Any:
            return super().send(request, *arguments, **{**more, "timeout": more.get("timeout") or _TIMEOUT})

    return Adapter()
