"""Sign a package with a private key: what `pipeline.package.signature` checks, made by OpenSSF's model-signing."""

from __future__ import annotations

import base64
import json
import os
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from pipeline import digest, files
from pipeline.artifact import CHECKSUMS, MANIFEST, PROVENANCE, SIGNATURE, SIGNED
from pipeline.errors import PackageError, ResourceError, RuntimeMissing, UsageError
from pipeline.package import ecdsa, provenance, signature, verify

PASSWORD = "QWEN_ONNX_KEY_PASSWORD"  # noqa: S105 - the name of a variable
"""The environment variable with the password of an encrypted key."""
_CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384"}


def sign(package: Path, private: Path, builder: str = provenance.BUILDER) -> dict[str, Any]:
    """Check a package, and write its provenance and its signature beside its files; earlier ones are replaced.

    Args:
        private: an elliptic curve key in PEM (P-256 or P-384), which nobody but its owner may read.
        builder: URI of who built it.

    Returns:
        ``hint``: sha256 of the public key, by which signatures name it; ``digest``: of the package.

    Raises:
        RuntimeMissing: model-signing is not installed.
        UsageError: the key is not one, others can read it, or its password is wrong.
        PackageError: the package is not what was built.
        ResourceError: the signature cannot be written.
    """
    key, password = _private_key(private)
    try:
        for name in SIGNED:
            (package / name).unlink(missing_ok=True)
    except OSError as error:
        kind = ResourceError if package.is_dir() else PackageError
        raise kind(f"{package} cannot be signed", why=str(error)) from None
    manifest = verify.package(package)
    sums = {name: sha256 for name, (_, sha256) in manifest.files.items()}
    sums |= {name: digest.of_file(package / name) for name in (MANIFEST, CHECKSUMS)}
    try:
        made = provenance.statement(manifest.data, sums, builder, revision())
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise PackageError(
            f"{package} cannot be signed", why=f"its {MANIFEST} does not tell where it comes from ({error!r})"
        ) from None
    from cryptography.hazmat.primitives import serialization

    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    with tempfile.TemporaryDirectory() as folder:
        trusted, bundle = Path(folder) / "public.pem", Path(folder) / SIGNATURE
        trusted.write_bytes(public)
        hint = ecdsa.read_key(public.decode()).hint
        try:
            files.publish(package / PROVENANCE, json.dumps(_envelope(key, made, hint)) + "\n")
            _model_signing(package, private, password, bundle)
            files.publish(package / SIGNATURE, bundle.read_text(encoding="utf-8") + "\n")
            verify.package(package, key=trusted)
        except BaseException:
            for name in SIGNED:
                (package / name).unlink(missing_ok=True)
            raise
    return {"hint": hint, "digest": manifest.digest}


def _private_key(path: Path) -> tuple[Any, bytes | None]:
    """The key in a file, and the password that it took."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise _missing(error) from None
    fix = "make one: openssl ecparam -name prime256v1 -genkey -noout -out PRIVATE.pem && chmod 600 PRIVATE.pem"
    try:
        status = path.stat()
        if os.name == "posix" and stat.S_IMODE(status.st_mode) & 0o077:
            raise UsageError(
                f"others can read {path}",
                why="whoever has the private key can sign in your name",
                fix=f"chmod 600 {path}; if it was on a shared machine, make another key",
            )
        given = os.environ.get(PASSWORD, "").encode() or None
        key = serialization.load_pem_private_key(path.read_bytes(), given)
    except TypeError:  # what the library says of a password that is missing, or that nobody asked for
        lacks = PASSWORD not in os.environ
        why = f"it is encrypted, and {PASSWORD} is not set" if lacks else f"{PASSWORD} is set, and it is not encrypted"
        raise UsageError(f"{path} cannot be read", why=why) from None
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path} is no private key, or its password is another", why=str(error), fix=fix) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise UsageError(f"{path} is no key that signs packages", why="it is of neither P-256 nor P-384", fix=fix)
    return key, given


def _envelope(key: Any, made: dict[str, Any], hint: str) -> dict[str, Any]:
    """A statement in a signed envelope (DSSE v1)."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    payload = digest.canonical_json(made)
    hashed = getattr(hashes, _CURVES[key.curve.name])()
    signed = key.sign(signature.pae(signature.PAYLOAD_TYPE, payload), ec.ECDSA(hashed))
    return {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": signature.PAYLOAD_TYPE,
        "signatures": [{"keyid": hint, "sig": base64.b64encode(signed).decode()}],
    }


def _model_signing(package: Path, private: Path, password: bytes | None, out: Path) -> None:
    try:
        from model_signing import hashing, signing
    except ImportError as error:
        raise _missing(error) from None
    # Nothing but the signature itself is left out; by default files of git would be.
    hashed = hashing.Config().set_ignored_paths(paths=[package / SIGNATURE], ignore_git_paths=False)
    signer = signing.Config().set_hashing_config(hashed)
    signer.use_elliptic_key_signer(private_key=private, password=password).sign(package, out)


def _missing(error: ImportError) -> RuntimeMissing:
    return RuntimeMissing("model-signing cannot be loaded", why=str(error), fix="pip install '.[sign]'")


def revision() -> dict[str, Any] | None:
    """The commit of this project that runs, and whether its files were changed since; ``None`` where git knows none."""
    here = Path(__file__).parents[1]
    try:
        shown, status = (
            subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True, timeout=30).stdout
            for words in (("rev-parse", "HEAD", "--show-toplevel"), ("status", "--porcelain", "--", "."))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    commit, top = shown.splitlines()
    return {"gitCommit": commit, "modified": bool(status)} if Path(top) == here.parent else None
