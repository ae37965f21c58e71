"""ECDSA signatures (FIPS 186-5, section 6.4.2), checked with the standard library alone.

A package is checked where nothing is installed. To check a signature takes no secret, so that it does no harm that the
time of this code depends on its numbers; to make one does, and is left to a library (`pipeline.package.signing`).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Point = tuple[int, int] | None
"""Coordinates; ``None`` is the point at infinity."""


@dataclass(frozen=True)
class Curve:
    """``y² = x³ - 3x + b`` over the integers modulo ``p`` (SP 800-186, section 3.2.1).

    Attributes:
        prefix: what a public key in DER (RFC 5480) begins with, up to its two coordinates of ``size`` bytes.
        n: the order of the base point ``g``.
        hashed: the hash that goes with it; none has more bits than ``n``, so that no digest is cut.
    """

    prefix: bytes
    size: int
    p: int
    b: int
    n: int
    g: tuple[int, int]
    hashed: Callable[..., Any]


_ID = "06072a8648ce3d0201"  # id-ecPublicKey
CURVES = {
    "P-256": Curve(
        bytes.fromhex("30593013" + _ID + "06082a8648ce3d03010703420004"),
        32,
        0xFFFFFFFF00000001000000000000000000000000FFFFFFFFFFFFFFFFFFFFFFFF,
        0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B,
        0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
        (
            0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
            0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
        ),
        hashlib.sha256,
    ),
    "P-384": Curve(
        bytes.fromhex("30763010" + _ID + "06052b8104002203620004"),
        48,
        2**384 - 2**128 - 2**96 + 2**32 - 1,
        0xB3312FA7E23EE7E4988E056BE3F82D19181D9C6EFE8141120314088F5013875AC656398D8A2ED19D2A85C8EDD3EC2AEF,
        0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973,
        (
            0xAA87CA22BE8B05378EB1C71EF320AD746E1D3B628BA79B9859F741E082542A385502F25DBF55296C3A545E3872760AB7,
            0x3617DE4A96262C6F5D9E98BF9292DC29F8F41DBD289A147CE9DA3113B5F0B8C00A60B1CE1D7E819D7A431D7C90EA0E5F,
        ),
        hashlib.sha384,
    ),
}
_PEM = re.compile(r"-----BEGIN ([A-Z ]+)-----\s+([A-Za-z0-9+/=\s]+?)\s+-----END \1-----")


@dataclass(frozen=True)
class PublicKey:
    """A point on a curve.

    Attributes:
        hint: sha256 (hex) of the key in PEM as OpenSSL writes it, by which signatures name their key.
    """

    curve: Curve
    point: tuple[int, int]
    hint: str


def read_key(text: str) -> PublicKey:
    """A public key in PEM.

    Raises:
        ValueError: it is none, or not of a curve that is known here.
    """
    blocks = _PEM.findall(text)
    if len(blocks) != 1 or blocks[0][0] != "PUBLIC KEY":
        found = ", ".join(sorted({label.lower() for label, _ in blocks})) or "nothing of the kind"
        raise ValueError(f"one public key in PEM is expected, and there is {found}")
    data = base64.b64decode("".join(blocks[0][1].split()), validate=True)
    for curve in CURVES.values():
        if data.startswith(curve.prefix) and len(data) == len(curve.prefix) + 2 * curve.size:
            break
    else:
        raise ValueError(f"the key is of none of the curves {', '.join(CURVES)}")
    middle = len(curve.prefix) + curve.size
    x, y = int.from_bytes(data[len(curve.prefix) : middle], "big"), int.from_bytes(data[middle:], "big")
    if max(x, y) >= curve.p or (y * y - x * x * x + 3 * x - curve.b) % curve.p:
        raise ValueError("the key is no point of its curve")
    encoded = base64.b64encode(data).decode()
    lines = "".join(f"{encoded[at : at + 64]}\n" for at in range(0, len(encoded), 64))
    pem = f"-----BEGIN PUBLIC KEY-----\n{lines}-----END PUBLIC KEY-----\n"
    return PublicKey(curve, (x, y), hashlib.sha256(pem.encode()).hexdigest())


def verifies(key: PublicKey, message: bytes, signature: bytes) -> bool:
    """Whether ``signature`` (DER, RFC 3279 section 2.2.3) is of ``message`` by the owner of ``key``."""
    curve = key.curve
    try:
        r, s = _integers(signature)
    except (ValueError, IndexError):
        return False
    if not (0 < r < curve.n and 0 < s < curve.n):
        return False
    inverse = pow(s, -1, curve.n)
    hashed = int.from_bytes(curve.hashed(message).digest(), "big")
    point = _sum_of_products(curve, hashed * inverse % curve.n, curve.g, r * inverse % curve.n, key.point)
    return point is not None and point[0] % curve.n == r


def _integers(data: bytes) -> tuple[int, int]:
    """The two integers of a sequence in DER; every other encoding of them is refused.

    Raises:
        ValueError, IndexError: it is no such sequence.
    """
    body, rest = _element(data, 0x30)
    first, body = _element(body, 0x02)
    second, body = _element(body, 0x02)
    if rest or body:
        raise ValueError("something follows")
    for number in (first, second):
        if number[0] & 0x80 or (number[0] == 0 and len(number) > 1 and not number[1] & 0x80):
            raise ValueError("a number is negative, or longer than it needs to be")
    return int.from_bytes(first, "big"), int.from_bytes(second, "big")


def _element(data: bytes, tag: int) -> tuple[bytes, bytes]:
    """The content of the first element, and what follows it."""
    if data[0] != tag:
        raise ValueError("another type was expected")
    size, begin = data[1], 2
    if size == 0x81:
        size, begin = data[2], 3
        if size < 0x80:
            raise ValueError("a length is longer than it needs to be")
    elif size > 0x7F:
        raise ValueError("no signature is that long")
    if size == 0 or len(data) < begin + size:
        raise ValueError("it ends too early")
    return data[begin : begin + size], data[begin + size :]


def _sum_of_products(curve: Curve, first: int, a: Point, second: int, b: Point) -> Point:
    """``first * a + second * b``, both at once, from the highest bit down (Shamir's trick)."""
    both, result = _add(curve, a, b), None
    for bit in range(max(first.bit_length(), second.bit_length()) - 1, -1, -1):
        result = _add(curve, result, result)
        chosen = (first >> bit & 1, second >> bit & 1)
        result = _add(curve, result, {(0, 0): None, (1, 0): a, (0, 1): b, (1, 1): both}[chosen])
    return result


def _add(curve: Curve, a: Point, b: Point) -> Point:
    if a is None or b is None:
        return a or b
    p = curve.p
    if a[0] == b[0]:
        if (a[1] + b[1]) % p == 0:
            return None
        slope = 3 * (a[0] * a[0] - 1) * pow(2 * a[1], -1, p) % p
    else:
        slope = (b[1] - a[1]) * pow(b[0] - a[0], -1, p) % p
    x = (slope * slope - a[0] - b[0]) % p
    return x, (slope * (a[0] - x) - a[1]) % p
