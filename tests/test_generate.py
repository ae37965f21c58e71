"""What the runtime would swallow is refused, and text comes out piece by piece without broken characters."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import cli
from pipeline.errors import PackageError, UsageError
from pipeline.runtime import chat, generate, session as sessions
from pipeline.runtime.generate import TextStream
from pipeline.runtime.sampling import Sampling
from pipeline.runtime.session import Session


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": 5.1}, "temperature 5.1"),
        ({"top_p": math.nan}, "top_p nan"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"top_k": -1}, "top_k -1"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 1 << 63}, "seed 9223372036854775808"),
        ({"min_p": math.nan}, "min_p nan"),
        ({"presence_penalty": 2.1}, "presence_penalty 2.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
        ({"logit_bias": {3: math.nan}}, "logit_bias nan of token 3"),
    ],
)
def test_sampling_is_checked(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Sampling(**options)


CONFIG = {"model": {"context_length": 8, "vocab_size": 16, "eos_token_id": 3, "decoder": {}}}


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
        generate.check_prompt(Session(Path(), None, CONFIG, 1, "cpu"), prompt)


@pytest.mark.parametrize(("window", "fits"), [(1, 11), (4, 8)])
def test_an_answer_fits_behind_a_prompt_whose_last_window_is_filled_up(window: int, fits: int) -> None:
    facts = {"context_length": 16, "vocab_size": 16, "eos_token_id": 3, "pad_token_id": 15}
    config = {"model": {**facts, "decoder": {"sliding_window": {"window_size": window}}}}
    opened = Session(Path(), None, config, 1, "cpu")
    generate.check_answer(opened, [1] * 5, [2] * fits)
    generate.check_answer(opened, [1] * 5, [])
    with pytest.raises(UsageError, match="does not fit"):
        generate.check_answer(opened, [1] * 5, [2] * (fits + 1))
    with pytest.raises(UsageError, match="the answer has token ids outside"):
        generate.check_answer(opened, [1] * 5, [16])


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


def test_a_stream_decodes_no_token_twice() -> None:
    """Else a long answer would take time that grows with its square."""
    decoded = 0

    class Counting(Bytes):
        def decode(self, ids: Sequence[int]) -> str:
            nonlocal decoded
            decoded += len(ids)
            return super().decode(ids)

    stream = TextStream(Counting())
    for _ in range(2000):
        stream.push(ord("x"))
    assert decoded == 2000


@pytest.fixture(scope="module")
def package(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as Olive's ModelBuilder writes it, in float32, which picks its tokens without near ties."""
    from pipeline.export import exporter

    checkpoint = checkpoint_of("qwen2")
    folder = tmp_path_factory.mktemp("package")
    exporter.export_genai(checkpoint, folder, {}, "CPUExecutionProvider", "float32")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(checkpoint / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def session(package: Path) -> Session:
    return sessions.open_package(package, 1)


@pytest.mark.slow
def test_greedy_tokens_are_the_most_likely_of_both_paths(session: Session) -> None:
    prompt = [5, 17, 40, 8]
    answer = list(generate.stream(session, prompt, 12))
    assert answer
    ids = prompt + answer
    decoded = generate.decode_logits(session, ids)
    whole = generate.prefill_logits(session, ids)
    assert decoded.shape == (len(ids), session.vocabulary)
    assert decoded[len(prompt) - 1 : -1].argmax(axis=1).tolist() == answer
    np.testing.assert_allclose(whole, decoded, atol=1e-3)


@pytest.mark.slow
def test_a_seed_gives_the_same_tokens_again(session: Session) -> None:
    def drawn(seed: int) -> list[int]:
        # More choices than there are tokens are all tokens.
        return list(generate.stream(session, [5, 17, 40], 20, Sampling(5.0, 10_000, 1.0, seed=seed)))

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(4)}) > 1


@pytest.mark.slow
def test_an_answer_ends_at_its_limit_or_with_the_context(session: Session) -> None:
    endless = replace(session, config={"model": {**session.config["model"], "eos_token_id": []}})
    assert len(list(generate.stream(endless, [5, 17], 1))) == 1
    with pytest.raises(UsageError, match="limit of 0"):
        list(generate.stream(session, [5, 17], 0))
    assert generate.room(session, session.context_length - 3, 10) == 3
    assert len(list(generate.stream(session, [5] * (session.context_length - 3), 10))) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 5])
def test_an_answer_for_machines_is_a_token_a_line_and_a_summary(
    package: Path, session: Session, limit: int, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(package), "--trust", "--raw", "--prompt", "the fox", "--json"]
    assert cli.main([*arguments, "--threads", "1", "--max-tokens", str(limit)]) == 0
    *tokens, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    prompt = chat.load(package).encode("the fox", special=False)
    wanted = list(generate.stream(session, prompt, limit))
    assert [line["token"] for line in tokens] == wanted
    assert "".join(line["text"] for line in tokens) + last["text"] == chat.load(package).decode(wanted)
    assert last["done"] is True
    assert (last["prompt_tokens"], last["tokens"]) == (len(prompt), len(wanted))
    assert last["ended"] == ("length" if len(wanted) == limit else "eos")
    assert {"seconds_to_first", "tokens_per_second"} < last.keys()


@pytest.mark.slow
@pytest.mark.parametrize("text", ["{", "{}", '{"model": {}}', '{"model": null}'])
def test_a_configuration_without_its_facts_is_refused(package: Path, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "package"
    shutil.copytree(package, folder)
    (folder / "genai_config.json").write_text(text)
    with pytest.raises(PackageError, match=r"no readable genai_config\.json"):
        sessions.open_package(folder)
