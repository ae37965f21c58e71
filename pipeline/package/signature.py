"""Who vouches for a package: ``model.sig`` and ``provenance.dsse.json``, checked with the standard library alone.

``model.sig`` is a bundle of OpenSSF's model-signing: a DSSE envelope around an in-toto statement that lists every file
with its sha256. ``provenance.dsse.json`` is a DSSE envelope around a statement of SLSA v1. One key signs both. What is
in them is read before anybody knows who wrote it, so that every field is checked.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipeline.artifact import PROVENANCE, SIGNATURE, is_file_name, parse_json, read_json
from pipeline.errors import PackageError, UsageError
from pipeline.package.ecdsa import PublicKey, read_key, verifies

STATEMENT = "https://in-toto.io/Statement/v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
MODEL_SIGNING = "https://model_signing/signature/v1.0"
SLSA = "https://slsa.dev/provenance/v1"
_BUNDLE = "application/vnd.dev.sigstore.bundle"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_READING = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


class _OtherKeyError(ValueError):
    """A signature that is sound, and not by the key that was asked for."""


@dataclass(frozen=True)
class Signed:
    """What a signature says of a package.

    Attributes:
        files: name → sha256 of every file but the signature.
        subjects: the same as the provenance has it; ``None`` without one.
        checked: whether both were made by the owner of a key that the caller trusts.
    """

    files: Mapping[str, str]
    subjects: Mapping[str, str] | None
    checked: bool


def read(package: Path, key: Path | None = None) -> Signed | None:
    """The signature of a package, checked against a public key where one is given; ``None`` when there is none.

    Args:
        key: a public key in PEM. Without it nobody knows who made the signature, and what it says is taken as a claim.

    Raises:
        PackageError: the signature is missing although there is a key, is none, or is not by the owner of the key.
        UsageError: the key cannot be read.
    """
    owner = trusted(key) if key else None
    path = package / SIGNATURE
    if not (path.exists() or path.is_symlink()):
        if owner is None:
            return None
        raise PackageError(
            f"{package} is not signed",
            why=f"it has no {SIGNATURE}, and a key was given to check it with",
            fix="ask whoever made it for the signed package, and do not load this one",
            codes=["signature.missing"],
        )
    file = SIGNATURE
    try:
        files = _signed_files(read_json(path), owner)
        subjects, file = None, PROVENANCE
        if PROVENANCE in files and (package / PROVENANCE).exists():  # else it is missed with all other files
            subjects = _subjects(read_json(package / PROVENANCE), owner)
    except _OtherKeyError as error:
        raise PackageError(
            f"{package} was not signed with that key",
            where=file,
            why=str(error),
            fix="ask whoever made it for their public key by another way, and do not load the package",
            codes=["signature.wrong"],
        ) from None
    except _READING as error:
        raise PackageError(
            f"{file} is no signature that this program reads",
            where=str(package / file),
            why=str(error),
            fix="fetch the package again, and do not load it",
            codes=["signature.malformed"],
        ) from None
    return Signed(files, subjects, owner is not None)


def trusted(key: Path) -> PublicKey:
    """The public key in a PEM file.

    Raises:
        UsageError: there is none, or of a kind that signs no packages.
    """
    try:
        if key.stat().st_size > 1 << 16:
            raise ValueError("it is too large for a key")
        return read_key(key.read_text(encoding="ascii"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{key} is no public key",
            why=str(error),
            fix="give a PEM file; `openssl ec -in PRIVATE.pem -pubout` writes it",
            codes=["signature.key"],
        ) from None


def pae(kind: str, payload: bytes) -> bytes:
    """What is signed of an envelope (DSSE v1, pre-authentication encoding)."""
    return b"DSSEv1 %d %s %d %s" % (len(kind.encode()), kind.encode(), len(payload), payload)


def statement(envelope: Mapping[str, Any], key: PublicKey | None) -> dict[str, Any]:
    """The in-toto statement in an envelope, whose one signature is checked where there is a key.

    Raises:
        ValueError, LookupError, TypeError, AttributeError, RecursionError: it is no such envelope, or not by that key.
    """
    payload = base64.b64decode(envelope["payload"], validate=True)
    (signature,) = envelope["signatures"]
    if envelope["payloadType"] != PAYLOAD_TYPE:
        raise ValueError(f"its payload is {envelope['payloadType']!r}, no in-toto statement")
    made = base64.b64decode(signature["sig"], validate=True)
    if key and not verifies(key, pae(PAYLOAD_TYPE, payload), made):
        raise _OtherKeyError("the signature does not verify with it")
    found = parse_json(payload)
    if not isinstance(found, dict) or found["_type"] != STATEMENT:
        raise ValueError("its payload is no in-toto statement of version 1")
    return found


def _signed_files(bundle: Mapping[str, Any], key: PublicKey | None) -> dict[str, str]:
    """Name → sha256 of what ``model.sig`` covers."""
    if not bundle["mediaType"].startswith(_BUNDLE):
        raise ValueError(f"its media type is {bundle['mediaType']!r}")
    material = bundle["verificationMaterial"]
    if key and "publicKey" not in material:
        raise _OtherKeyError("it was made with a certificate or an identity: check it with model-signing")
    hint = material.get("publicKey", {}).get("hint")
    if key and hint and hint != key.hint:
        raise _OtherKeyError(f"it names the key {str(hint)[:16]!r}, and {key.hint[:16]!r} was given")
    found = statement(bundle["dsseEnvelope"], key)
    if found["predicateType"] != MODEL_SIGNING:
        raise ValueError(f"its predicate is {found['predicateType']!r}")
    resources = found["predicate"]["resources"]
    files = {entry["name"]: entry["digest"] for entry in resources}
    if found["predicate"]["serialization"]["method"] != "files" or len(files) != len(resources):
        raise ValueError("it does not list each file once")
    if any(entry["algorithm"] != "sha256" for entry in resources) or not all(map(_is_digest, files.values())):
        raise ValueError("it lists digests that are not sha256")
    if not all(is_file_name(name) for name in files):
        raise ValueError("it lists files that no package has")
    (subject,) = found["subject"]
    if subject["digest"] != {"sha256": sha256(bytes.fromhex("".join(files.values()))).hexdigest()}:
        raise ValueError("its digest is not that of the files that it lists")
    return files


def _subjects(envelope: Mapping[str, Any], key: PublicKey | None) -> dict[str, str]:
    """Name → sha256 of what a provenance is of."""
    found = statement(envelope, key)
    if found["predicateType"] != SLSA:
        raise ValueError(f"its predicate is {found['predicateType']!r}")
    subjects = {entry["name"]: entry["digest"]["sha256"] for entry in found["subject"]}
    if len(subjects) != len(found["subject"]) or not all(map(_is_digest, subjects.values())):
        raise ValueError("it does not list each file once, with its sha256")
    return subjects


def _is_digest(text: Any) -> bool:
    return isinstance(text, str) and _SHA256.fullmatch(text) is not None
