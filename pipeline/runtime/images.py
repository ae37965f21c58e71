"""Checking pictures before the runtime reads them.

onnxruntime-genai 0.14.1 decodes PNG and JPEG. Given another format, or a JPEG whose structure is broken, it ends the
process or never returns: what it is given is looked at here first. The decoder itself reports damage inside a PNG.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UsageError

MAX_BYTES = 64 << 20
MAX_SIDE = 16_384
MAX_PIXELS = 50_000_000  # 150 MB decoded; three times that as floats
MAX_ASPECT = 200  # transformers refuses more

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
_OTHERS = {
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"RIFF": "WebP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\0\0\0": "HEIF or AVIF",
    b"<": "SVG",
}
# Baseline, extended and progressive JPEG; the others (lossless, arithmetic) are not decoded.
_FRAMES = (0xC0, 0xC1, 0xC2)
_OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_BARE = (0x01, *range(0xD0, 0xD8))  # markers without a length


@dataclass(frozen=True)
class Picture:
    """An encoded picture that the runtime can read, and its size in pixels."""

    data: bytes
    width: int
    height: int


def load(path: Path) -> Picture:
    """Read a picture.

    Raises:
        UsageError: it cannot be read, or `check` refuses it.
    """
    try:
        if not path.is_file():  # a pipe would never end
            raise OSError("it is no regular file")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise OSError(f"it has {size} bytes; more than {MAX_BYTES} are not read")
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"the image {path} cannot be read", why=str(error)) from None
    return check(data, str(path))


def check(data: bytes, where: str = "") -> Picture:
    """Look at the header of a picture, and at the structure of a JPEG.

    Raises:
        UsageError: it is no PNG or JPEG, is cut off, or is too large or too narrow.
    """
    try:
        if data.startswith(_PNG):
            width, height = _png_size(data)
        elif data.startswith(_JPEG):
            width, height = _jpeg_size(data)
        else:
            raise _refused(where, f"it is {_kind(data)}, neither PNG nor JPEG", "convert it to PNG")
    except (struct.error, IndexError):
        raise _refused(where, "it is cut off", "fetch it again") from None
    except ValueError as error:
        raise _refused(where, str(error), "save it again as PNG") from None
    if not width or not height:
        raise _refused(where, f"it has {width}x{height} pixels", "give an image with pixels")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        why = f"it has {width}x{height} pixels, the largest is {MAX_PIXELS:,} pixels and {MAX_SIDE:,} on a side"
        raise _refused(where, why, "scale it down")
    if max(width, height) > MAX_ASPECT * min(width, height):
        why = f"it has {width}x{height} pixels, one side is more than {MAX_ASPECT} times the other"
        raise _refused(where, why, "crop it")
    return Picture(data, width, height)


def _refused(where: str, why: str, fix: str) -> UsageError:
    return UsageError("the image cannot be given to the model", where=where, why=why, fix=fix)


def _kind(data: bytes) -> str:
    return next((name for start, name in _OTHERS.items() if data.startswith(start)), "something else")


def _png_size(data: bytes) -> tuple[int, int]:
    length, kind, width, height = struct.unpack(">I4sII", data[8:24])
    if (length, kind) != (13, b"IHDR"):
        raise ValueError("its PNG header is damaged")
    return width, height


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Width and height of a JPEG that has one frame and comes to its end.

    Raises:
        ValueError: it has or does something else.
        IndexError, struct.error: it is cut off.
    """
    at, size, scans = 2, None, 0
    while True:
        if data[at] != 0xFF:
            raise ValueError("its JPEG structure is damaged")
        while data[at] == 0xFF:
            at += 1
        marker, at = data[at], at + 1
        if marker == _END:
            if size is None or not scans:
                raise ValueError("it is a JPEG without a picture")
            return size
        if marker in (0x00, _START) or marker in _OTHER_FRAMES or (marker in _FRAMES and size is not None):
            raise ValueError(f"its JPEG has the marker {marker:#04x}, which is not decoded here")
        if marker in _BARE:
            continue
        (length,) = struct.unpack(">H", data[at : at + 2])
        if length < 2:
            raise ValueError("its JPEG structure is damaged")
        if marker in _FRAMES:
            height, width = struct.unpack(">HH", data[at + 3 : at + 7])
            size = width, height
        at += length
        if marker == _SCAN:
            scans += 1
            at = _after_scan(data, at)


def _after_scan(data: bytes, at: int) -> int:
    """Where the next marker starts that is no part of the coded picture."""
    while (at := data.find(b"\xff", at)) >= 0:
        following = data[at + 1]
        if following == 0xFF:
            at += 1
        elif following == 0x00 or 0xD0 <= following <= 0xD7:
            at += 2
        else:
            return at
    raise IndexError
