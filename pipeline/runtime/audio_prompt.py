"""Sounds for a package that hears: what its audio tower is given, and whether that fits a prompt.

Shapes in this module:
    C: clips, M: mel bins, F: frames of the longest clip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.artifact import read_json
from pipeline.errors import CheckpointError, PackageError, UsageError
from pipeline.package.replay import Media
from pipeline.runtime import audio_tower, mel
from pipeline.runtime.audio_tower import Tower

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]


_FRAMES = "audio_sizes_frames"


def read_tower(package: Path) -> Tower:
    """The audio tower of a package.

    Raises:
        UsageError: it has none.
        PackageError: its configuration cannot be read.
    """
    path = package / "config.json"
    try:
        config = read_json(path)
        hears = config["model_type"] == audio_tower.MODEL_TYPE
    except FileNotFoundError:
        hears = False
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise PackageError("config.json cannot be read", where=str(path), why=str(error)) from None
    if not hears:
        raise UsageError(f"{package} does not hear", fix="leave --audio out, or use a package of Qwen2-Audio")
    try:
        return audio_tower.read(config, str(path))
    except CheckpointError as error:
        raise PackageError(error.what, where=error.where, why=error.why) from None


def prepare(tower: Tower, clips: Sequence[Floats]) -> Media:
    """Sounds as the tower takes them: ``audio_embeds`` float32 ``[C, M, F]``, spectrograms; ``audio_sizes`` and
    ``audio_sizes_frames`` int64 ``[C]``, tokens and frames of each.

    Args:
        clips: mono samples at 16 kHz, as `wav.read` returns them; one at least.
    """
    frames = [mel.frames_of(len(clip)) for clip in clips]
    tokens = [mel.tokens_of(count) for count in frames]
    spectrograms = [mel.log_mel(clip, tower.bins) for clip in clips]
    batch = np.zeros((len(clips), tower.bins, max(values.shape[1] for values in spectrograms)), np.float32)
    for row, values in zip(batch, spectrograms, strict=True):
        row[:, : values.shape[1]] = values
    sizes = {"audio_sizes": np.array(tokens, np.int64), _FRAMES: np.array(frames, np.int64)}
    return Media({"audio_embeds": batch, **sizes}, tuple(tokens))


def check(media: Mapping[str, npt.NDArray[Any]], ids: Sequence[int], tower: Tower) -> None:
    """Refuse arrays that do not belong to a prompt: the runtime trusts their sizes.

    Raises:
        ValueError: saying what does not fit.
    """
    batch, tokens, frames = (media.get(name, np.zeros(0)) for name in ("audio_embeds", "audio_sizes", _FRAMES))
    if batch.ndim != 3 or batch.shape[1] != tower.bins or batch.shape[2] > mel.FRAMES:
        raise ValueError(f"spectrograms have the shape {list(batch.shape)}")
    if tokens.shape != (len(batch),) or frames.shape != (len(batch),):
        raise ValueError("there is not one size for each spectrogram")
    if not len(batch) or min(frames) < 1 or max(frames) > batch.shape[2]:
        raise ValueError(f"of {batch.shape[2]} frames {frames.tolist()} are sound")
    if [mel.tokens_of(count) for count in frames.tolist()] != tokens.tolist():
        raise ValueError(f"{frames.tolist()} frames are not heard as {tokens.tolist()} tokens")
    if list(ids).count(tower.token) != tokens.sum():
        raise ValueError(f"the prompt has {list(ids).count(tower.token)} tokens of sound, not {tokens.sum()}")
