"""How far the positions of a checkpoint reach, and which of its ways to reach further are honoured.

YaRN (Peng et al., 2023, https://arxiv.org/abs/2309.00071) scales the rotary frequencies, and is: its context is the
factor times the window that the weights were trained for. Dual chunk attention (An et al., 2024,
https://arxiv.org/abs/2402.17463) changes the attention itself, which neither transformers nor the runtime does: such
checkpoints end where plain attention does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import CheckpointError

_DUAL_CHUNK = "dual_chunk_attention_config"
_ORIGINAL = "original_max_position_embeddings"
DEFAULT = 32768  # transformers' max_position_embeddings where a configuration has none
_PLAIN = (None, "default")
# Optional numbers of a YaRN configuration, all positive; transformers' names.
_NUMBERS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_MAX_FACTOR = 1024


@dataclass(frozen=True)
class Reach:
    """In tokens.

    Attributes:
        original: the window that the weights were trained for.
        context: what prompt and answer together may have.
        missing: what the checkpoint needs beyond its context, and this project has not; empty for most.
        claimed: the context that it would have with that.
    """

    original: int
    context: int
    missing: str = ""
    claimed: int = 0


def read(config: Mapping[str, Any], stated: int, where: str) -> Reach:
    """What a ``config.json`` says of its positions.

    Args:
        stated: its ``max_position_embeddings``, or the default of that.

    Raises:
        CheckpointError: the rotary embeddings are scaled in a way that is not supported, or attention slides.
    """
    _refuse_windows(config, where)
    if "rope_parameters" in config:
        raise CheckpointError(
            "config.json has rope_parameters",
            where=where,
            why="the installed transformers does not read them, and would take another base of the rotary frequencies",
            fix="write rope_theta and rope_scaling at its top level instead",
        )
    scaling = config.get("rope_scaling")
    original = context = stated
    if scaling is not None and kind(config, where) not in _PLAIN:
        original = _yarn_window(scaling, stated, where)
        context = int(original * scaling["factor"])
    chunks = config.get(_DUAL_CHUNK)
    if not chunks:
        return Reach(original, context)
    trained = chunks.get(_ORIGINAL) if isinstance(chunks, Mapping) else None
    if type(trained) is not int or trained < 1:
        raise CheckpointError(
            f"the checkpoint has dual chunk attention, but does not say what it was trained for ({_ORIGINAL})",
            where=where,
            why="plain attention is right up to there, and unknown beyond",
            fix=f"add {_ORIGINAL} to {_DUAL_CHUNK}, as the publisher has it",
        )
    if trained >= context:
        return Reach(original, context)
    return Reach(min(original, trained), trained, "dual chunk attention", context)


def kind(config: Mapping[str, Any], where: str) -> str | None:
    """The type of ``rope_scaling``: ``yarn``, or ``None`` or ``default`` where nothing is scaled.

    Raises:
        CheckpointError: it is of another type.
    """
    scaling = config.get("rope_scaling")
    if scaling is None:
        return None
    given = scaling if isinstance(scaling, Mapping) else {}
    names = {given[key] for key in ("type", "rope_type") if isinstance(given.get(key), str)}
    if "mrope_section" in given:  # positions of three dimensions, of models that see, which are not scaled by that
        names = {"default" if name == "mrope" else name for name in names}
    if len(names) != 1 or not names <= {"default", "yarn"}:
        raise CheckpointError(
            f"rotary embeddings of type {' and '.join(sorted(names)) or repr(scaling)} are not supported",
            where=f"{where}: rope_scaling",
            why="a graph with other frequencies would be written, and nothing would say so before long texts",
            fix="supported: yarn, or no rope_scaling (the window that the weights were trained for)",
        )
    return str(names.pop())


def _yarn_window(scaling: Mapping[str, Any], stated: int, where: str) -> int:
    """The window that YaRN extends; its settings are checked."""
    known = ("type", "rope_type", "factor", _ORIGINAL, *_NUMBERS, "truncate")
    factor, window = scaling.get("factor"), scaling.get(_ORIGINAL)
    wrong = [f"unknown key {key}" for key in sorted(set(map(str, scaling)) - set(known))]
    if not _within(factor, 1, _MAX_FACTOR):
        wrong.append(f"factor is {factor!r}, no number from 1 to {_MAX_FACTOR}")
    if window is not None and (type(window) is not int or window < 1):
        wrong.append(f"{_ORIGINAL} is {window!r}")
    for key in _NUMBERS:
        value = scaling.get(key)
        if value is not None and not _within(value, 1e-6, 1e6):
            wrong.append(f"{key} is {value!r}")
    if not isinstance(scaling.get("truncate", True), bool):
        wrong.append(f"truncate is {scaling['truncate']!r}")
    if wrong:
        raise CheckpointError("YaRN is not set up right", where=f"{where}: rope_scaling", why="; ".join(wrong))
    return window or stated


def _within(value: Any, least: float, most: float) -> bool:
    return type(value) in (int, float) and least <= value <= most  # a bool is an int, too


def _refuse_windows(config: Mapping[str, Any], where: str) -> None:
    kinds = config.get("layer_types")
    sliding = isinstance(kinds, list) and any(entry != "full_attention" for entry in kinds)
    if config.get("use_sliding_window") or sliding:
        raise CheckpointError(
            "the checkpoint attends to a sliding window of tokens",
            where=f"{where}: use_sliding_window, layer_types",
            why="the genai builder would give one window to all layers, those before max_window_layers included",
            fix="use_sliding_window: false, as Qwen publishes its models, if it was trained with full attention",
        )


def check_context(config: Any, wanted: int | None, where: str) -> None:
    """Refuse a package whose context would need what is missing.

    Args:
        config: the contents of a ``config.json``; what else is wrong with it is not looked at.
        wanted: the recipe's ``generation.context_length``; the checkpoint's whole context when left out.

    Raises:
        CheckpointError: it would; also as `read`.
    """
    if not isinstance(config, Mapping) or not config.get(_DUAL_CHUNK):
        return
    stated = config.get("max_position_embeddings")
    reach = read(config, stated if type(stated) is int else DEFAULT, where)
    if reach.missing and (wanted is None or wanted > reach.context):
        raise CheckpointError(
            f"a context of {wanted or reach.claimed} tokens needs {reach.missing}",
            where=where,
            why=f"neither transformers nor the runtime has it; plain attention is right up to {reach.context} tokens",
            fix=f"set generation.context_length in the recipe to {reach.context} or less",
        )
