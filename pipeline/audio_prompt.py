"""Questions with sounds for a package that hears: token ids, and what its audio tower is given.

Shapes in this module:
    C: clips, M: mel bins, F: frames of the longest clip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import audio_tower, mel
from pipeline.artifact import read_json
from pipeline.audio_tower import Tower
from pipeline.errors import CheckpointError, PackageError, UsageError

if TYPE_CHECKING:
    import numpy.typing as npt

    from pipeline.chat import Message, Tokenizer

    Floats = npt.NDArray[np.float32]


_FRAMES = "audio_sizes_frames"


@dataclass(frozen=True)
class Prompt:
    """Token ids, and arrays by name for `replay.feed`: ``audio_embeds`` float32 ``[C, M, F]``, ``audio_sizes`` and
    ``audio_sizes_frames`` int64 ``[C]`` (tokens and frames of each clip)."""

    ids: list[int]
    media: dict[str, npt.NDArray[Any]]


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


def of_chat(tokenizer: Tokenizer, tower: Tower, messages: Sequence[Message], clips: Sequence[Floats]) -> Prompt:
    """A conversation whose messages have parts of the type ``audio``, one for each clip.

    Args:
        clips: mono samples at 16 kHz, as `wav.read` returns them.

    Raises:
        UsageError: the template fails, or has not a place for each clip.
    """
    return _with_sounds(tokenizer.encode_chat(messages), tower, clips)


def ask(text: str, clips: int) -> dict[str, Any]:
    """A user's message with so many sounds before the text."""
    sounds: list[dict[str, str]] = [{"type": "audio", "audio_url": f"clip {index + 1}"} for index in range(clips)]
    return {"role": "user", "content": [*sounds, {"type": "text", "text": text}]}


def of_text(tokenizer: Tokenizer, tower: Tower, text: str, clips: Sequence[Floats]) -> Prompt:
    """Sounds and then plain text, without a chat template, as base models are asked.

    Raises:
        PackageError: the tokenizer has no tokens for sounds.
    """
    marks = [tokenizer.trusted.token_to_id(token) for token in audio_tower.TOKENS]
    if None in marks:
        raise PackageError("the tokenizer has no tokens for sounds", why=f"it lacks one of {audio_tower.TOKENS}")
    return _with_sounds(marks * len(clips) + tokenizer.encode(text, special=False), tower, clips)


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


def _with_sounds(ids: Sequence[int], tower: Tower, clips: Sequence[Floats]) -> Prompt:
    """Each token of sound becomes as many as its clip is heard as."""
    if (places := list(ids).count(tower.token)) != len(clips):
        raise UsageError(
            f"the prompt has places for {places} sounds, and there are {len(clips)}",
            why="the package's chat template decides where they go",
        )
    frames = [mel.frames_of(len(clip)) for clip in clips]
    tokens = [mel.tokens_of(count) for count in frames]
    sizes = iter(tokens)
    wide = [part for token in ids for part in ([token] * next(sizes) if token == tower.token else [token])]
    spectrograms = [mel.log_mel(clip, tower.bins) for clip in clips]
    longest = max(values.shape[1] for values in spectrograms)
    batch = np.zeros((len(clips), tower.bins, longest), np.float32)
    for row, values in zip(batch, spectrograms, strict=True):
        row[:, : values.shape[1]] = values
    sizes_of = {"audio_sizes": np.array(tokens, np.int64), _FRAMES: np.array(frames, np.int64)}
    return Prompt(wide, {"audio_embeds": batch, **sizes_of})
