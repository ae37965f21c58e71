"""Sounds: what is read from WAV files, what is refused, and how much of it a model hears."""

from __future__ import annotations

import struct
import wave
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import UsageError
from pipeline.runtime import mel, wav

TONE = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(4000) / mel.SAMPLE_RATE)


def write(path: Path, samples: np.ndarray, width: int = 2, rate: int = mel.SAMPLE_RATE, channels: int = 1) -> Path:
    """A WAV file of ``samples`` in [-1, 1], the same in each channel."""
    whole = np.repeat(np.round(samples * ((1 << (8 * width - 1)) - 1)).astype(np.int64), channels)
    whole += 128 if width == 1 else 0
    data = whole.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return path


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_width_is_read(width: int, channels: int, tmp_path: Path) -> None:
    found = wav.read(write(tmp_path / "a.wav", TONE, width, channels=channels))
    assert found.dtype == np.float32
    assert np.abs(found - TONE).max() < 2 / (1 << (8 * width - 1)) + 1e-6


def test_channels_are_averaged(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(mel.SAMPLE_RATE)
        file.writeframes(np.tile(np.array([16384, 0], "<i2"), 1000).tobytes())
    assert np.allclose(wav.read(tmp_path / "a.wav"), 0.25)


def _header(coding: int) -> bytes:
    form = struct.pack("<IHHIIHH", 16, coding, 1, 16000, 64000, 4, 32)
    return b"RIFF" + struct.pack("<I", 100) + b"WAVEfmt " + form + b"data" + struct.pack("<I", 0)


def test_a_file_that_ends_before_its_header_says_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", TONE, channels=2)
    path.write_bytes(path.read_bytes()[:-4001])
    assert len(wav.read(path)) == len(TONE) - 1001


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"ID3\x04 and more", "it is MP3"),
        (b"fLaC and more", "it is FLAC"),
        (b"OggS and more", "it is Ogg"),
        (b"nothing known", "does not start with RIFF id"),
        (b"RIFF", "ends too early"),
        (b"", "ends too early"),
        (_header(3), "coded as floating point"),
        (_header(7), "coded as mu-law"),
        (_header(0xFFFE), "coded as the extensible kind"),
        (_header(77), "coded as format 77"),
    ],
)
def test_what_is_no_sound_in_whole_numbers_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a b.wav"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        wav.read(path)
    assert said in caught.value.why
    assert f"ffmpeg -i '{path}' -ac 1 -ar 16000 -c:a pcm_s16le 'a b-16k.wav'" in caught.value.fix


def test_other_rates_and_lengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="44100 samples a second") as caught:
        wav.read(write(tmp_path / "fast.wav", TONE, rate=44100))
    assert "-ar 16000" in caught.value.fix
    with pytest.raises(UsageError, match="longer than 30 s") as caught:
        wav.read(write(tmp_path / "long.wav", np.zeros(mel.SAMPLES + 1)))
    assert "-segment_time 30" in caught.value.fix
    assert len(wav.read(write(tmp_path / "whole.wav", np.zeros(mel.SAMPLES)))) == mel.SAMPLES
    for samples in (0, 320):
        with pytest.raises(UsageError, match="too short"):
            wav.read(write(tmp_path / "short.wav", np.zeros(samples)))
    assert len(wav.read(write(tmp_path / "least.wav", np.zeros(321)))) == 321
    with pytest.raises(UsageError, match="cannot be read"):
        wav.read(tmp_path / "none.wav")
    with pytest.raises(UsageError, match="cannot be read"):
        wav.read(tmp_path)


def test_a_tone_is_where_it_is_on_the_mel_scale() -> None:
    found = mel.log_mel(TONE.astype(np.float32), 80)
    centre = 15 / (15 + np.log(8) / (np.log(6.4) / 27)) * 81 - 1  # 1 kHz is 15 mel; 8 kHz is the end
    assert abs(found[:, 5:20].mean(axis=1).argmax() - centre) <= 1
    assert found.shape == (80, 28)  # 25 frames, two of silence, to a multiple of 4
    assert found.max() - found.min() <= 2.0


def test_how_much_is_heard() -> None:
    assert [mel.frames_of(samples) for samples in (1, 160, 161, mel.SAMPLES)] == [1, 1, 2, 3000]
    assert [mel.tokens_of(frames) for frames in (1, 2, 3, 6, 7, 3000)] == [0, 0, 1, 1, 2, 750]
    for samples in (0, mel.SAMPLES + 1):
        with pytest.raises(ValueError, match="samples"):
            mel.log_mel(np.zeros(samples, np.float32), 80)
