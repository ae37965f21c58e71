"""What the runtime would swallow is refused, and text comes out piece by piece without broken characters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline import generate
from pipeline.errors import UsageError
from pipeline.generate import Sampling, TextStream
from pipeline.session import Session


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"temperature": 5.1}, "temperature 5.1"),
        ({"top_p": math.nan}, "top_p nan"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_k": 0}, "top_k 0"),
    ],
)
def test_sampling_is_checked(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Sampling(True, **options)


CONFIG = {"model": {"context_length": 8, "vocab_size": 16, "eos_token_id": 3}}


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ([], "the prompt is empty"),
        ([16], "outside"),
        ([-1], "outside"),
        ([1] * 8, "has 8 tokens; the context holds 8"),
    ],
)
def test_prompts_are_checked(prompt: list[int], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        generate.check_prompt(Session(Path(), None, CONFIG, 1), prompt)


class Bytes:
    """A tokenizer whose tokens are bytes: the hardest case for characters of several bytes."""

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["plain", "naïve café", "你好,世界", "👩‍👩‍👧‍👦 ok", "mixed 日本 🏳️‍🌈 end"])
def test_pieces_are_whole_characters_and_add_up(text: str) -> None:
    stream = TextStream(Bytes())
    pieces = [stream.push(byte) for byte in text.encode()]
    assert "".join(pieces) + stream.rest() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_never_ends_is_shown_at_the_end() -> None:
    stream = TextStream(Bytes())
    assert [stream.push(byte) for byte in "好".encode()[:2]] == ["", ""]
    assert stream.rest() == "\ufffd"
