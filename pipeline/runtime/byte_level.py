"""Bytes as the printable characters that byte-level BPE writes them with (GPT-2's table)."""

from __future__ import annotations


def _characters() -> list[str]:
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_CHARACTERS = _characters()
_BYTES = {character: byte for byte, character in enumerate(_CHARACTERS)}


def written(token: bytes) -> str:
    """The characters that stand for bytes."""
    return "".join(_CHARACTERS[byte] for byte in token)


def read(characters: str) -> bytes:
    """The bytes that characters stand for; raises `KeyError` for a character that stands for none."""
    return bytes(_BYTES[character] for character in characters)
