"""Print an answer as it comes: the answer to standard output, the thoughts before it to standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UsageError
from pipeline.runtime import adapters, generate, session, speculation
from pipeline.runtime.chat import Tokenizer
from pipeline.runtime.images import Picture
from pipeline.runtime.sampling import Sampling
from pipeline.runtime.thinking import CLOSING, VARIABLE, Budget, Parts, Splitter, is_open

if TYPE_CHECKING:
    from pipeline.runtime.generate import Floats


@dataclass(frozen=True)
class Settings:
    """How an answer is made and shown.

    Attributes:
        limit: most tokens, those of the thoughts included.
        lookup: draft from the prompt (`pipeline.runtime.speculation`).
        split: tell thoughts from the answer.
        budget: tokens after which thoughts are ended.
        as_json: one object a token, and one at the end.
        adapter: file of a LoRA adapter.
        pictures, clips: what the prompt is about, of a model that sees or hears (`generate.attach`).
    """

    limit: int
    threads: int | None = None
    provider: str = ""
    sampling: Sampling | None = None
    lookup: bool = False
    split: bool = False
    budget: int | None = None
    as_json: bool = False
    adapter: Path | None = None
    pictures: tuple[Picture, ...] = ()
    clips: tuple[Floats, ...] = ()


def thinking_variables(tokenizer: Tokenizer, wanted: bool | None) -> dict[str, Any]:
    """What a chat template is given for a model to think or not; nothing when it is not said.

    Raises:
        UsageError: the template has no such switch.
    """
    if wanted is None:
        return {}
    if not tokenizer.takes(VARIABLE):
        raise UsageError(
            f"the package's chat template knows no {VARIABLE}",
            why="its model cannot be told to think or not: it always does, or never",
            fix="leave out --thinking and --no-thinking",
        )
    return {VARIABLE: wanted}


def stream(folder: Path, tokenizer: Tokenizer, prompt: Sequence[int], settings: Settings) -> None:
    """Load a package and print its answer to ``prompt`` (token ids).

    Raises:
        UsageError: the budget leaves no room for an answer, or has nothing to end; or as `generate.stream`.
        PackageError, RuntimeMissing: as `session.open_package`.
    """
    inside = settings.split and is_open(tokenizer.decode(prompt[-16:], skip_special=False))
    budget = _budget(tokenizer, settings, inside)
    opened = session.open_package(folder, settings.threads, settings.provider)
    if settings.adapter:
        opened = adapters.activate(opened, settings.adapter)
    prompt, media = generate.attach(opened, prompt, settings.pictures, settings.clips)
    counts = speculation.Counts()
    if settings.lookup:
        tokens = speculation.stream(opened, prompt, settings.limit, settings.sampling, counts)
    else:
        tokens = generate.stream(opened, prompt, settings.limit, settings.sampling, budget, media)
    text = generate.TextStream(tokenizer)
    shown = (_Objects if settings.as_json else _Text)(Splitter(inside) if settings.split else None)
    begin = time.perf_counter()
    first, count = 0.0, 0
    for token in tokens:
        count += 1
        first = first or time.perf_counter() - begin
        shown.push(token, text.push(token))
    took = time.perf_counter() - begin - first
    speed = (count - 1) / took if count > 1 and took > 0 else 0.0
    full = count == generate.room(opened, len(prompt), settings.limit)
    facts: dict[str, Any] = {"prompt_tokens": len(prompt), "tokens": count, "ended": "length" if full else "eos"}
    facts |= {"seconds_to_first": round(first, 3), "tokens_per_second": round(speed, 1)}
    shown.end(text.rest(), facts | ({"lookup": asdict(counts)} if settings.lookup else {}))


def _budget(tokenizer: Tokenizer, settings: Settings, inside: bool) -> Budget | None:
    if settings.budget is None:
        return None
    if not (inside or (settings.split and tokenizer.takes(VARIABLE))):
        raise UsageError(
            "there are no thoughts to give a budget to",
            why="the package's chat template opens no block of thoughts, and cannot be told to",
            fix="leave out --thinking-budget",
        )
    closing = tokenizer.encode(CLOSING)
    if settings.budget + len(closing) >= settings.limit:
        raise UsageError(
            f"a thinking budget of {settings.budget} tokens leaves no room for an answer",
            why=f"ending the thoughts takes {len(closing)} more, of {settings.limit} tokens in all",
            fix="raise --max-tokens, or lower --thinking-budget",
        )
    return Budget(settings.budget, closing, generate.TextStream(tokenizer).push, inside)


class _Text:
    """For people: thoughts go to standard error, dim on a terminal, so that a file gets the answer alone."""

    def __init__(self, splitter: Splitter | None) -> None:
        self._splitter = splitter
        self._thinking = False

    def push(self, token: int, piece: str) -> None:  # noqa: ARG002
        self._show(self._splitter.push(piece) if self._splitter else Parts(content=piece))

    def end(self, rest: str, facts: dict[str, Any]) -> None:
        if self._splitter:
            self._show(self._splitter.push(rest))
            self._show(self._splitter.rest())
            rest = ""
        self._leave()
        print(rest, flush=True)
        speed = round(facts["tokens_per_second"])
        rate = f", {speed} tokens/s" if speed else ""
        if lookup := facts.get("lookup"):
            rate += f"; {lookup['accepted']} of {lookup['drafted']} drafted tokens accepted"
        sizes = f"{facts['prompt_tokens']} + {facts['tokens']} tokens"
        print(f"({sizes}, first after {facts['seconds_to_first']:.2f} s{rate})", file=sys.stderr)

    def _show(self, parts: Parts) -> None:
        if parts.reasoning:
            if not self._thinking:
                print(_dim("thinking: "), end="", file=sys.stderr)
            self._thinking = True
            print(_dim(parts.reasoning), end="", file=sys.stderr, flush=True)
        if parts.content:
            self._leave()
            print(parts.content, end="", flush=True)

    def _leave(self) -> None:
        if self._thinking:
            print("\n", file=sys.stderr, flush=True)
        self._thinking = False


def _dim(text: str) -> str:
    return f"\033[2m{text}\033[22m" if sys.stderr.isatty() else text


class _Objects:
    """For programs: a line for each token, and one at the end with the whole of both parts."""

    def __init__(self, splitter: Splitter | None) -> None:
        self._splitter = splitter
        self._reasoning: list[str] = []
        self._content: list[str] = []

    def push(self, token: int, piece: str) -> None:
        parts = self._splitter.push(piece) if self._splitter else None
        print(json.dumps({"token": token, "text": piece, **self._kept(parts)}), flush=True)

    def end(self, rest: str, facts: dict[str, Any]) -> None:
        whole: dict[str, str] = {}
        if self._splitter:
            self._kept(self._splitter.push(rest))
            self._kept(self._splitter.rest())
            whole = {"reasoning_content": "".join(self._reasoning), "content": "".join(self._content)}
        print(json.dumps({"done": True, "text": rest, **whole, **facts}), flush=True)

    def _kept(self, parts: Parts | None) -> dict[str, str]:
        if parts is None:
            return {}
        self._reasoning.append(parts.reasoning)
        self._content.append(parts.content)
        return {"reasoning_content": parts.reasoning, "content": parts.content}
