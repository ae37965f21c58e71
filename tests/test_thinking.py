"""Thoughts are told apart wherever a stream is cut, end after their budget, and are asked for only where that works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tiny import CHAT_TEMPLATE, THINKING_TEMPLATE

from pipeline import cli
from pipeline.errors import UsageError
from pipeline.facts import texts
from pipeline.runtime import chat, generate, session, template, thinking
from pipeline.runtime.generate import TextStream
from pipeline.runtime.thinking import CLOSING, Budget, Parts, Splitter

pytestmark = [
    # What the exporter says of itself.
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean"),
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

# What a model writes, whether the prompt has opened the block, the thoughts, the answer.
ANSWERS: dict[str, tuple[str, bool, str, str]] = {
    "no thoughts": ("The answer is 4.", False, "", "The answer is 4."),
    "thoughts": ("<think>\n2 and 2\nis 4.\n</think>\n\nIt is 4.\n", False, "2 and 2\nis 4.", "It is 4.\n"),
    "white space first": (" \n<think>a</think>b", False, "a", "b"),
    "an empty block": ("<think>\n\n</think>\n\nhello", False, "", "hello"),
    "opened by the prompt": ("\nHm. 好\n</think>\n\n行", True, "Hm. 好", "行"),
    "opened by the prompt, closed at once": ("</think>x", True, "", "x"),
    "never closed": ("<think>\non and on  ", False, "on and on", ""),
    "cut inside the closing tag": ("<think>a</thi", False, "a</thi", ""),
    "cut inside the opening tag": ("<thi", False, "", "<thi"),
    "white space alone": ("\n  ", False, "", "\n  "),
    "nothing": ("", False, "", ""),
    "nothing, opened by the prompt": ("", True, "", ""),
    "nearly tags": ("<think>a </thin> </ think> <</think>b", False, "a </thin> </ think> <", "b"),
    "tags in the answer": ("a <think>b</think> c", False, "", "a <think>b</think> c"),
    "tags after the thoughts": ("<think>a</think>\n<think>b</think>", False, "a", "<think>b</think>"),
    "a tag that is not the first word": ("so <think>", False, "", "so <think>"),
    "an indented answer": ("<think>a</think>\n\n    return x", False, "a", "    return x"),
    "spaces inside": ("<think>a  \n\n  b \n</think>c", False, "a  \n\n  b", "c"),
    "characters of several bytes": ("<think>👩‍👩‍👧 naïve</think>\n日本語", False, "👩‍👩‍👧 naïve", "日本語"),
}


def split(pieces: Sequence[str], inside: bool) -> tuple[str, str]:
    splitter = Splitter(inside)
    parts = [*(splitter.push(piece) for piece in pieces), splitter.rest()]
    return "".join(part.reasoning for part in parts), "".join(part.content for part in parts)


@pytest.mark.parametrize("case", ANSWERS)
def test_thoughts_are_told_apart_wherever_the_text_is_cut(case: str) -> None:
    text, inside, *wanted = ANSWERS[case]
    assert split([text], inside) == tuple(wanted)
    assert split(list(text), inside) == tuple(wanted)
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            assert split([text[:first], text[first:second], text[second:]], inside) == tuple(wanted)


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("case", ANSWERS)
def test_tokens_of_one_byte_are_told_apart_alike(case: str) -> None:
    text, inside, *wanted = ANSWERS[case]
    stream = TextStream(Bytes())
    assert split([*map(stream.push, text.encode()), stream.rest()], inside) == tuple(wanted)


def test_what_is_final_is_told_at_once() -> None:
    splitter = Splitter()
    assert splitter.push("<think>so ") == Parts("so")
    assert splitter.push("far</th") == Parts(" far")
    assert splitter.inside
    assert splitter.push("ink>\n\nyes") == Parts("", "yes")
    assert not splitter.inside
    assert splitter.push(" <") == Parts("", " <")


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [("assistant\n<think>\n", True), ("<think>", True), ("<think>\n\n</think>\n\n", False), ("assistant\n", False)],
)
def test_a_prompt_may_open_the_block(prompt: str, opened: bool) -> None:
    assert thinking.is_open(prompt) is opened


@pytest.mark.parametrize(
    ("pieces", "inside", "at"),
    [
        (["<think>", "\n", "a", "b", "c"], False, 4),  # the third token of the block
        (["a", "b", "c", "d"], True, 3),
        (["no", " thoughts", " at", " all"], False, None),
        (["<think>", "a", "b", "</think>", "c", "d", "e"], False, None),
    ],
)
def test_a_budget_counts_the_tokens_of_the_block(pieces: list[str], inside: bool, at: int | None) -> None:
    budget = Budget(3, [70, 80], lambda token: pieces[token], inside)
    told = [list(budget(token)) for token in range(len(pieces))]
    assert told == [[70, 80] if token + 1 == at else [] for token in range(len(pieces))]


def test_what_a_template_reads_is_found_without_running_it() -> None:
    assert template.names(THINKING_TEMPLATE) == {"tools", "messages", "add_generation_prompt", "enable_thinking"}
    assert template.names("{% set enable_thinking = 1 %}{{ enable_thinking }}") == set()
    assert template.names("{{ raise_exception('no') }}{% if x.y %}{{ strftime_now('%Y') }}{% endif %}") == {"x"}


def tokenizer(source: str) -> chat.Tokenizer:
    return chat.Tokenizer(None, None, source)


def test_a_template_takes_what_it_reads_and_not_what_it_mentions() -> None:
    assert tokenizer(THINKING_TEMPLATE).takes("enable_thinking")
    assert not tokenizer(CHAT_TEMPLATE).takes("enable_thinking")
    assert not tokenizer("{# enable_thinking #}{{ 'enable_thinking' }}").takes("enable_thinking")
    assert not tokenizer("").takes("enable_thinking")
    for hostile in ("{{ enable_thinking", "{{ enable_thinking ** (9 ** (9 ** 9)) }}"):
        with pytest.raises(UsageError, match="cannot be read"):
            tokenizer(hostile).takes("enable_thinking")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--raw", "--thinking"], "--raw has no chat template"),
        (["--raw", "--no-thinking"], "--raw has no chat template"),
        (["--raw", "--thinking-budget", "8"], "--raw has no chat template"),
        (["--no-thinking", "--thinking-budget", "8"], "--no-thinking leaves nothing"),
        (["--lookup", "--thinking-budget", "8"], "cannot end thoughts"),
        (["--thinking-budget", "0"], "--thinking-budget 0 is not positive"),
    ],
)
def test_contradictions_are_refused_before_anything_is_read(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", str(tmp_path / "none"), "--prompt", "hi", *arguments]) == 2
    assert said in capsys.readouterr().err


# In the style of models that always think: the template has no switch, and opens the block itself.
ALWAYS = CHAT_TEMPLATE.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}")


@pytest.fixture(scope="module")
def packages(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Float packages of tiny models: one that can think or not, one that always does, one that never does."""
    from pipeline.export import exporter

    made: dict[str, Path] = {}
    for name, model_type in (("both", "qwen3"), ("never", "qwen2")):
        checkpoint, folder = checkpoint_of(model_type), tmp_path_factory.mktemp("thinking") / name
        folder.mkdir()
        exporter.export_genai(checkpoint, folder, {}, "CPUExecutionProvider", "float32")
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(checkpoint / file, folder / file)
        made[name] = folder
    made["always"] = shutil.copytree(made["both"], made["both"].with_name("always"))
    assert "<think>" in ALWAYS
    (made["always"] / "chat_template.jinja").write_text(ALWAYS, encoding="utf-8")
    return made


def run(package: Path, *arguments: str, code: int = 0) -> None:
    given = ["generate", str(package), "--trust", "--threads", "1", "--prompt", "the fox", *arguments]
    assert cli.main(given) == code


@pytest.mark.slow
@pytest.mark.parametrize("conversation", texts.conversations(True), ids=lambda conversation: conversation.name)
def test_conversations_with_thinking_on_and_off_have_the_ids_that_transformers_gives(
    checkpoint_of: Callable[..., Path], conversation: texts.Conversation
) -> None:
    from transformers import AutoTokenizer

    messages, given = conversation.given()
    reference = AutoTokenizer.from_pretrained(checkpoint_of("qwen3"))
    wanted = reference.apply_chat_template(messages, add_generation_prompt=True, **given)
    ids = chat.load(checkpoint_of("qwen3")).encode_chat(messages, **given)
    assert ids == wanted
    text = reference.decode(ids)
    assert text.endswith("</think>\n\n") is (given.get("enable_thinking") is False)
    assert "17 + 20" not in text  # earlier thoughts are gone


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--thinking", "--no-thinking"])
@pytest.mark.parametrize("name", ["never", "always"])
def test_a_package_without_the_switch_refuses_to_be_switched(
    name: str, option: str, packages: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run(packages[name], option, code=2)
    assert "the package's chat template knows no enable_thinking" in capsys.readouterr().err


@pytest.mark.slow
def test_a_budget_is_refused_where_it_cannot_be_kept(
    packages: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run(packages["never"], "--thinking-budget", "8", code=2)
    assert "no thoughts to give a budget to" in capsys.readouterr().err
    run(packages["both"], "--thinking-budget", "8", "--max-tokens", "9", code=2)
    assert "leaves no room for an answer" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--thinking", "--no-thinking"])
def test_the_switch_reaches_the_template(
    option: str, packages: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run(packages["both"], option, "--max-tokens", "6", "--json")
    *tokens, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    loaded = chat.load(packages["both"])
    prompt = loaded.encode_chat([{"role": "user", "content": "the fox"}], enable_thinking=option == "--thinking")
    wanted = list(generate.stream(session.open_package(packages["both"], 1), prompt, 6))
    assert [line["token"] for line in tokens] == wanted
    assert last["prompt_tokens"] == len(prompt)
    assert last["content"] == loaded.decode(wanted)
    assert last["reasoning_content"] == ""


@pytest.mark.slow
def test_a_budget_ends_the_thoughts_and_the_model_answers_what_follows_from_them(
    packages: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    package, loaded = packages["always"], chat.load(packages["always"])
    closing = loaded.encode(CLOSING)
    limit = 5 + len(closing) + 7
    run(package, "--thinking-budget", "5", "--max-tokens", str(limit), "--json")
    *lines, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ids = [line["token"] for line in lines]

    opened = session.open_package(package, 1)
    prompt = loaded.encode_chat([{"role": "user", "content": "the fox"}])
    assert loaded.decode(prompt).endswith("<think>\n")
    thoughts = list(generate.stream(opened, prompt, 5))
    assert ids[: 5 + len(closing)] == thoughts + closing
    answer = ids[5 + len(closing) :]
    assert answer == list(generate.stream(opened, [*prompt, *thoughts, *closing], 7))
    assert answer

    told = CLOSING.removesuffix("</think>\n\n").rstrip()
    assert last["reasoning_content"] == (loaded.decode(thoughts) + told).strip()
    assert last["content"] == loaded.decode(answer).lstrip("\n")
    for part in ("reasoning_content", "content"):
        assert "".join(line[part] for line in lines).strip() == last[part].strip()

    run(package, "--thinking-budget", "5", "--max-tokens", str(limit))
    out, err = capsys.readouterr()
    assert out.strip() == last["content"].strip()
    assert last["reasoning_content"] in err


@pytest.mark.slow
def test_thoughts_that_fit_their_budget_are_left_alone(
    packages: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run(packages["always"], "--max-tokens", "100", "--json")
    without = capsys.readouterr().out.splitlines()[:-1]
    run(packages["always"], "--thinking-budget", "101", "--max-tokens", "200", "--json")
    assert capsys.readouterr().out.splitlines()[: len(without)] == without
