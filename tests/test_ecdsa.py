"""Signatures are checked as the library that makes them checks them, and what is odd about one is no way around."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from pipeline.package import ecdsa

pytest.importorskip("cryptography")
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

KINDS: dict[str, tuple[Any, Any]] = {
    "P-256": (ec.SECP256R1(), hashes.SHA256()),
    "P-384": (ec.SECP384R1(), hashes.SHA384()),
}


def pem(key: Any) -> str:
    made: bytes = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return made.decode()


def accepts(key: Any, message: bytes, signature: bytes, kind: str) -> bool:
    """What the library says."""
    try:
        key.public_key().verify(signature, message, ec.ECDSA(KINDS[kind][1]))
    except InvalidSignature:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_it_agrees_with_the_library(kind: str) -> None:
    curve, hashed = KINDS[kind]
    for index in range(8):
        key, message = ec.generate_private_key(curve), bytes(range(index * 20))
        public, signature = ecdsa.read_key(pem(key)), key.sign(message, ec.ECDSA(hashed))
        assert ecdsa.verifies(public, message, signature)
        for changed in (bytearray(signature), bytearray(signature), bytearray(signature)):
            changed[[-1, 5, len(signature) // 2][index % 3]] ^= 1 << (index % 8)
            assert ecdsa.verifies(public, message, bytes(changed)) == accepts(key, message, bytes(changed), kind)
        assert not ecdsa.verifies(public, message + b"x", signature)
        assert not ecdsa.verifies(ecdsa.read_key(pem(ec.generate_private_key(curve))), message, signature)


@pytest.mark.parametrize("kind", KINDS)
def test_odd_numbers_and_odd_encodings_are_refused(kind: str) -> None:
    curve, hashed = KINDS[kind]
    key, n = ec.generate_private_key(curve), ecdsa.CURVES[kind].n
    public = ecdsa.read_key(pem(key))
    signature = key.sign(b"m", ec.ECDSA(hashed))
    r, s = decode_dss_signature(signature)
    for odd in ((0, 0), (0, s), (r, 0), (n, s), (r, n), (r + n, s), (r, s + n), (1, 1), (n - 1, n - 1)):
        assert not ecdsa.verifies(public, b"m", encode_dss_signature(*odd)), odd
    body = signature[2:]
    for bad in (
        b"",
        b"0",
        b"\x30\x00",
        signature[:-1],
        signature + b"\0",
        b"\x31" + signature[1:],
        bytes([0x30, 0x81, len(body)]) + body,  # a length that is longer than it needs to be
        bytes([0x30, len(body) + 1, 0x02, body[1] + 1, 0]) + body[2:],  # a zero in front
        b"\x30\x82\xff\xff" + body,
        b"\x30\x80" + body + b"\0\0",
    ):
        assert not ecdsa.verifies(public, b"m", bad), bad.hex()


def test_the_base_points_have_their_order() -> None:
    for curve in ecdsa.CURVES.values():
        assert ecdsa._sum_of_products(curve, curve.n - 1, curve.g, 1, curve.g) is None
        x, y = curve.g
        assert ecdsa._sum_of_products(curve, curve.n - 1, curve.g, 0, curve.g) == (x, curve.p - y)


def test_what_is_no_public_key_is_refused() -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    secret = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    point = base64.b64decode("".join(pem(private).splitlines()[1:-1]))
    beside = base64.b64encode(point[:-1] + bytes([point[-1] ^ 1])).decode()
    for text, said in (
        ("", "there is nothing of the kind"),
        (secret, "there is private key"),
        (pem(private) * 2, "one public key in PEM is expected"),
        (pem(rsa.generate_private_key(65537, 2048)), "of none of the curves"),
        (pem(ec.generate_private_key(ec.SECP521R1())), "of none of the curves"),
        (pem(ec.generate_private_key(ec.SECP256K1())), "of none of the curves"),
        (f"-----BEGIN PUBLIC KEY-----\n{beside}\n-----END PUBLIC KEY-----\n", "no point of its curve"),
        ("-----BEGIN PUBLIC KEY-----\nQQ=Q\n-----END PUBLIC KEY-----\n", "adding"),
    ):
        with pytest.raises(ValueError, match=said):
            ecdsa.read_key(text)
