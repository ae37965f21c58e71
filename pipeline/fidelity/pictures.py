"""Pictures that a package is validated with, drawn here, and what the reference makes of them.

Their sides are whole squares of patches, so that nothing has to resize them: what the runtime and transformers make of
the same pixels must then be the same. Where a picture has to be resized, the two differ by design, for the one rounds
after it has resized in one direction, and the other after the other.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.facts.vision import FRAMES, Vision

if TYPE_CHECKING:
    import numpy.typing as npt

# How large each picture is at least, in squares of patches down and across: wide, tall and even.
_SQUARES = {"gradient": (5, 8), "bars": (9, 4), "rings": (6, 6), "checks": (4, 10)}
_QUESTIONS = {
    "gradient": "Describe this image.",
    "bars": "Which colours are in this image?",
    "rings": "What shape is in the middle of this image?",
    "checks": "Is there text in this image? Answer yes or no.",
}


@dataclass(frozen=True)
class Drawn:
    """A picture with a question about it; ``pixels`` are ``[height, width, 3]`` uint8."""

    name: str
    question: str
    pixels: npt.NDArray[np.uint8]

    @property
    def png(self) -> bytes:
        """The picture as PNG: eight bits a channel, each pixel less the one before it (filter 1), which packs well."""
        height, width, _ = self.pixels.shape
        less = np.diff(self.pixels, axis=1, prepend=np.zeros((height, 1, 3), np.uint8))
        rows = b"".join(b"\1" + row.tobytes() for row in less)
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def draw(side: int, min_pixels: int, max_pixels: int) -> list[Drawn]:
    """Pictures that nothing resizes.

    Args:
        side: pixels on each side of a square of patches.
        min_pixels, max_pixels: within which a picture keeps its size.

    Raises:
        ValueError: so few pixels are allowed that no picture fits.
    """
    found = []
    for name, (down, across) in _SQUARES.items():
        times = 1
        while down * across * (times * side) ** 2 < min_pixels:
            times += 1
        height, width = down * times * side, across * times * side
        if height * width > max_pixels:
            raise ValueError(f"pictures have at most {max_pixels} pixels, and {height}x{width} are drawn")
        found.append(Drawn(name, _QUESTIONS[name], _pixels(name, height, width)))
    return found


def _pixels(name: str, height: int, width: int) -> npt.NDArray[np.uint8]:
    down, across = np.mgrid[0:height, 0:width]
    if name == "gradient":
        parts = [across * 255 // width, down * 255 // height, 255 - across * 255 // width]
    elif name == "bars":
        bar = across * 8 // width
        parts = [(bar >> bit & 1) * 255 for bit in range(3)]
    elif name == "rings":
        far = np.hypot(down - height / 2, across - width / 2)
        ring = (far // 24).astype(int) % 3
        parts = [(ring == shade) * 220 + 20 for shade in range(3)]
    else:
        check = (down // 14 + across // 14) % 2
        parts = [check * 255, check * 200, 255 - check * 120]
    return np.stack(parts, axis=-1).astype(np.uint8)


def patches(
    pixels: npt.NDArray[np.uint8], vision: Vision, processor: Mapping[str, Any]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """What transformers' processor makes of a picture that needs no resizing.

    Args:
        pixels: ``[height, width, 3]``.
        processor: ``mean`` and ``std`` of each channel.

    Returns:
        patches ``[N, 1176]``, square by square, and the grid ``[1, 3]``: 1, patches down and across.
    """
    patch, merge = vision.patch, vision.merge
    down, across = pixels.shape[0] // patch, pixels.shape[1] // patch
    mean, std = (np.array(processor[key], np.float64) for key in ("mean", "std"))
    values = ((pixels / 255.0 - mean) / std).astype(np.float32).transpose(2, 0, 1)
    values = values.reshape(3, down // merge, merge, patch, across // merge, merge, patch)
    values = np.repeat(values.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None], FRAMES, axis=5)
    return values.reshape(down * across, -1), np.array([[1, down, across]])
