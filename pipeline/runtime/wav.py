"""Sound from WAV files: mono float samples at 16 kHz."""

from __future__ import annotations

import shlex
import wave
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import UsageError
from pipeline.runtime.mel import SAMPLE_RATE, SAMPLES, SECONDS, frames_of, tokens_of

if TYPE_CHECKING:
    import numpy.typing as npt

# How other formats begin, and what they are called.
_OTHERS = {
    b"ID3": "MP3",
    b"\xff\xfb": "MP3",
    b"\xff\xf3": "MP3",
    b"fLaC": "FLAC",
    b"OggS": "Ogg",
    b"FORM": "AIFF",
    b"RF64": "RF64",
    b"\x1aE\xdf\xa3": "WebM or Matroska",
}
_CODINGS = {2: "ADPCM", 3: "floating point", 6: "A-law", 7: "mu-law", 0xFFFE: "the extensible kind"}
_MOST_CHANNELS = 64


def read(path: Path) -> npt.NDArray[np.float32]:
    """The samples ``[N]`` of a WAV file, in [-1, 1]; channels are averaged.

    Raises:
        UsageError: it cannot be read, is no WAV file of whole numbers (8, 16, 24 or 32 bits), has another rate than
            16 kHz, is longer than 30 s, or is too short to be heard.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
            if other := next((name for mark, name in _OTHERS.items() if start.startswith(mark)), ""):
                raise _unreadable(path, f"it is {other}, and WAV files are read")
            file.seek(0)
            with wave.open(file) as opened:
                _check(path, opened)
                channels, width = opened.getnchannels(), opened.getsampwidth()
                data = opened.readframes(opened.getnframes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read", why=error.strerror or str(error)) from None
    except (wave.Error, EOFError) as error:
        raise _unreadable(path, _reason(str(error))) from None
    whole = len(data) // (channels * width) * channels * width  # a file may end before its header says so
    samples = _floats(data[:whole], width).reshape(-1, channels).mean(axis=1, dtype=np.float32)
    if not tokens_of(frames_of(len(samples))):
        raise UsageError(
            f"{path} is too short to be heard",
            why=f"it has {len(samples)} samples; a token stands for 640",
            fix="give a sound of a tenth of a second at least",
        )
    found: npt.NDArray[np.float32] = samples
    return found


def _check(path: Path, opened: wave.Wave_read) -> None:
    if opened.getsampwidth() not in (1, 2, 3, 4) or not 1 <= opened.getnchannels() <= _MOST_CHANNELS:
        why = f"it has {opened.getnchannels()} channels of {opened.getsampwidth()} bytes a sample"
        raise _unreadable(path, why)
    if opened.getframerate() != SAMPLE_RATE:
        raise UsageError(
            f"{path} has {opened.getframerate()} samples a second, not {SAMPLE_RATE}",
            why="the model hears sound at that rate alone",
            fix=_convert(path),
        )
    if opened.getnframes() > SAMPLES:
        parts = f"-f segment -segment_time {SECONDS} {shlex.quote(f'{path.stem}-%d.wav')}"
        raise UsageError(
            f"{path} is longer than {SECONDS} s",
            why=f"it has {opened.getnframes() / SAMPLE_RATE:.1f} s, and the rest would not be heard",
            fix=f"ffmpeg -i {shlex.quote(str(path))} {parts}, and give the parts with one --audio each",
        )


def _floats(data: bytes, width: int) -> npt.NDArray[np.float32]:
    """Little-endian whole numbers of ``width`` bytes as floats; those of one byte have no sign."""
    if width == 1:
        return ((np.frombuffer(data, np.uint8) - 128.0) / 128).astype(np.float32)
    if width == 3:  # numpy has no such type: the bytes become the upper ones of 32 bits
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        data, width = wide.tobytes(), 4
    values = np.frombuffer(data, f"<i{width}")
    return (values / float(1 << (8 * width - 1))).astype(np.float32)


def _reason(error: str) -> str:
    """What `wave` says, in words where it says a number."""
    number = error.rpartition("unknown format: ")[2]
    if number.isdigit():
        return f"its samples are coded as {_CODINGS.get(int(number), f'format {number}')}, not as whole numbers"
    return error or "it ends too early"


def _unreadable(path: Path, why: str) -> UsageError:
    return UsageError(f"{path} is not a sound that can be read", why=why, fix=_convert(path))


def _convert(path: Path) -> str:
    made = shlex.quote(f"{path.stem}-16k.wav")
    return f"ffmpeg -i {shlex.quote(str(path))} -ac 1 -ar {SAMPLE_RATE} -c:a pcm_s16le {made}"
