"""Sound as Whisper's log-mel spectrogram, which Qwen2-Audio hears: short-time Fourier transforms on the mel scale.

With the settings of the published models: 16 kHz, windows of 25 ms every 10 ms, at most 30 s (Radford et al., 2022).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

SAMPLE_RATE = 16000
WINDOW, HOP = 400, 160  # samples
SECONDS = 30
SAMPLES = SECONDS * SAMPLE_RATE
FRAMES = SAMPLES // HOP
# The tower sees a valid frame's neighbours, and strides by 4: what is cut off after these has no effect on it.
_MARGIN, _STRIDE = 2, 4
# Slaney's mel scale: linear below 1 kHz, 15 mel there; above it logarithmic, 27 mel to each factor of 6.4.
_LINEAR = 200 / 3  # Hz a mel
_CORNER = 1000.0
_OCTAVE = np.log(6.4) / 27


def frames_of(samples: int) -> int:
    """How many frames so many samples have."""
    return -(-samples // HOP)


def tokens_of(frames: int) -> int:
    """How many tokens so many frames are heard as: a convolution halves them, and a pool halves them again."""
    return (frames + 1) // 2 // 2


def log_mel(samples: Floats, bins: int) -> Floats:
    """The spectrogram ``[bins, F]`` float32 of a sound, with as much of the silence after it as has an effect.

    Args:
        samples: mono at 16 kHz, in [-1, 1], at most `SAMPLES`; ``[N]``.
        bins: of the mel scale.

    Raises:
        ValueError: there are more samples, or none.
    """
    if not 0 < len(samples) <= SAMPLES:
        raise ValueError(f"{len(samples)} samples are not 1 to {SAMPLES}")
    count = min(FRAMES, -(-(frames_of(len(samples)) + _MARGIN) // _STRIDE) * _STRIDE)
    padded = np.zeros(SAMPLES, np.float32)
    padded[: len(samples)] = samples
    padded = np.pad(padded, WINDOW // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:count]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    power = np.abs(np.fft.rfft(frames * window.astype(np.float32), axis=1)) ** 2
    logs = np.log10(np.maximum(filters(bins) @ power.T, 1e-10))
    scaled: Floats = ((np.maximum(logs, logs.max() - 8.0) + 4.0) / 4.0).astype(np.float32)
    return scaled


@cache
def filters(bins: int) -> npt.NDArray[np.float64]:
    """Triangles on the mel scale ``[bins, WINDOW / 2 + 1]``, each of the area 1 in Hz."""
    edges = _hertz(np.linspace(0.0, _mel(SAMPLE_RATE / 2), bins + 2))
    frequencies = np.linspace(0.0, SAMPLE_RATE / 2, WINDOW // 2 + 1)
    left, peak, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (frequencies - left) / (peak - left), (right - frequencies) / (right - peak)
    triangles: npt.NDArray[np.float64] = np.maximum(0.0, np.minimum(rising, falling)) * 2.0 / (right - left)
    return triangles


def _mel(hertz: float) -> float:
    return hertz / _LINEAR if hertz < _CORNER else _CORNER / _LINEAR + float(np.log(hertz / _CORNER)) / _OCTAVE


def _hertz(mel: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    corner = _CORNER / _LINEAR
    above = _CORNER * np.exp(_OCTAVE * np.maximum(mel - corner, 0.0))
    return np.where(mel < corner, mel * _LINEAR, above)
