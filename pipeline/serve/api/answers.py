"""What the model's process tells, as the chunks and completions of OpenAI's API."""

from __future__ import annotations

import codecs
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.artifact import Manifest
from pipeline.runtime.thinking import Parts, Splitter
from pipeline.serve.api.protocol import (
    AnswerMessage,
    ChatChoice,
    ChatLogprobs,
    ChunkChoice,
    CompletionChoice,
    CompletionDetails,
    CompletionLogprobs,
    Delta,
    FinishReason,
    FunctionCall,
    FunctionDelta,
    LikelyToken,
    PromptDetails,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from pipeline.serve.api.token_texts import TokenTexts
from pipeline.serve.events import LENGTH, End, Event, Piece
from pipeline.serve.inference.tool_calls import CallArguments, CallBegin, Text, ToolCalls


def identifier(kind: str) -> str:
    """A name for an answer, such as ``chatcmpl-...``."""
    return f"{kind}-{secrets.token_hex(12)}"


def fingerprint(manifest: Manifest | None) -> str | None:
    """What answers name the package's contents with: the same package gives the same answers again."""
    return f"fp_{manifest.digest.rpartition(':')[2][:16]}" if manifest else None


@dataclass
class Counts:
    """Tokens of one choice, told at its end."""

    prompt: int = 0
    cached: int = 0
    tokens: int = 0
    thoughts: int = 0


def usage(prompts: Iterable[Sequence[Counts]]) -> Usage:
    """Tokens of all choices of all prompts: each prompt counts once, as its first choice read it."""
    groups = list(prompts)
    prompt, cached = (sum(getattr(group[0], name) for group in groups) for name in ("prompt", "cached"))
    tokens, thoughts = (sum(getattr(one, name) for group in groups for one in group) for name in ("tokens", "thoughts"))
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=tokens,
        total_tokens=prompt + tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=cached),
        completion_tokens_details=CompletionDetails(reasoning_tokens=thoughts),
    )


class ChatAnswer:
    """One choice of a conversation: events go in, what is added to the message comes out.

    Args:
        splitter: tells thoughts from the answer, of models that think.
        calls: tells calls of tools from text, of requests that have tools.
        texts: of tokens, for log-probabilities; None when they were not asked for.
    """

    def __init__(
        self,
        index: int,
        splitter: Splitter | None = None,
        calls: ToolCalls | None = None,
        texts: TokenTexts | None = None,
    ) -> None:
        self.counts = Counts()
        self._index, self._splitter, self._calls, self._texts = index, splitter, calls, texts
        self._waiting: list[TokenLogprob] = []
        self._whole = _Whole()

    def begin(self) -> ChunkChoice:
        """The first chunk, which tells who speaks."""
        return ChunkChoice(index=self._index, delta=Delta(role="assistant", content=""))

    def push(self, event: Event) -> ChunkChoice | None:
        """What became final with an event; None when nothing did."""
        if isinstance(event, Piece):
            delta = self._delta(self._split(event), False)
            if self._texts is not None:
                self._waiting.append(_chat_logprob(self._texts, event))
            return self._chunk(delta, None) if delta else None
        if isinstance(event, End):
            self.counts.prompt, self.counts.cached, self.counts.tokens = event.prompt, event.cached, event.tokens
            delta = self._delta(self._last(event.text), True)
            return self._chunk(delta or Delta(), self._reason(event))
        return None

    def choice(self) -> ChatChoice:
        """The whole of it, once its end was pushed."""
        whole = self._whole
        assert whole.reason is not None
        calls = [
            ToolCall(id=name[0], function=FunctionCall(name=name[1], arguments="".join(arguments)))
            for name, arguments in whole.calls
        ]
        content = "".join(whole.content)
        message = AnswerMessage(
            content=content if content or not calls else None,
            reasoning_content="".join(whole.reasoning) or None,
            tool_calls=calls or None,
        )
        logprobs = ChatLogprobs(content=whole.logprobs) if self._texts is not None else None
        return ChatChoice(index=self._index, message=message, finish_reason=whole.reason, logprobs=logprobs)

    def _split(self, event: Piece) -> Parts:
        if self._splitter is None:
            return Parts(content=event.text)
        before = self._splitter.inside
        parts = self._splitter.push(event.text)
        self.counts.thoughts += before or self._splitter.inside
        return parts

    def _last(self, text: str) -> Parts:
        if self._splitter is None:
            return Parts(content=text)
        parts, rest = self._splitter.push(text), self._splitter.rest()
        return Parts(parts.reasoning + rest.reasoning, parts.content + rest.content)

    def _delta(self, parts: Parts, last: bool) -> Delta | None:
        """What to tell of a piece of both parts, tool calls taken out; None for nothing."""
        content, calls = parts.content, []
        if self._calls is not None:
            found = self._calls.push(parts.content) + (self._calls.rest() if last else [])
            content = "".join(one.text for one in found if isinstance(one, Text))
            calls = self._called([one for one in found if not isinstance(one, Text)])
        self._whole.reasoning.append(parts.reasoning)
        self._whole.content.append(content)
        if not (parts.reasoning or content or calls):
            return None
        return Delta(content=content or None, reasoning_content=parts.reasoning or None, tool_calls=calls or None)

    def _called(self, found: Sequence[CallBegin | CallArguments]) -> list[ToolCallDelta]:
        """One entry a call: clients take a second one of the same call in a chunk for another call."""
        entries: dict[int, dict[str, Any]] = {}
        for one in found:
            entry = entries.setdefault(one.index, {"arguments": ""})
            if isinstance(one, CallBegin):
                entry |= {"id": one.id, "name": one.name}
                self._whole.calls.append(((one.id, one.name), []))
            else:
                entry["arguments"] += one.text
                self._whole.calls[one.index][1].append(one.text)
        return [
            ToolCallDelta(
                index=index,
                id=entry.get("id"),
                type="function" if "id" in entry else None,
                function=FunctionDelta(name=entry.get("name"), arguments=entry["arguments"]),
            )
            for index, entry in entries.items()
        ]

    def _reason(self, event: End) -> FinishReason:
        if event.reason == LENGTH:
            return "length"
        return "tool_calls" if self._whole.calls else "stop"

    def _chunk(self, delta: Delta, reason: FinishReason | None) -> ChunkChoice:
        told, self._waiting = self._waiting, []
        self._whole.logprobs += told
        self._whole.reason = reason
        logprobs = ChatLogprobs(content=told) if told else None
        return ChunkChoice(index=self._index, delta=delta, finish_reason=reason, logprobs=logprobs)


@dataclass
class _Whole:
    """All that was told of a message; of a call its id and name, and its arguments."""

    reasoning: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    calls: list[tuple[tuple[str, str], list[str]]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: FinishReason | None = None


def _chat_logprob(texts: TokenTexts, piece: Piece) -> TokenLogprob:
    top = [_likely(texts, token, logprob) for token, logprob in piece.top]
    own = _likely(texts, piece.token, piece.logprob or 0.0)
    return TokenLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top)


def _likely(texts: TokenTexts, token: int, logprob: float) -> LikelyToken:
    return LikelyToken(token=texts.text_of(token), logprob=logprob, bytes=list(texts.bytes_of(token)))


@dataclass(frozen=True)
class _Placed:
    """A token, and where its text begins in that of the answer, in characters."""

    piece: Piece
    offset: int


class PlainAnswer:
    """One choice of a plain completion.

    Args:
        before: text that it begins with, of requests that want their prompt back.
        texts: of tokens, for log-probabilities; None when they were not asked for.
    """

    def __init__(self, index: int, before: str = "", texts: TokenTexts | None = None) -> None:
        self.counts = Counts()
        self._index, self._before, self._texts = index, before, texts
        self._offset = len(before)
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._placed: list[_Placed] = []
        self._told = 0
        self._text: list[str] = []
        self._reason: Literal["stop", "length"] | None = None

    @property
    def likelihood(self) -> float:
        """The mean log-probability of its tokens, which must have been asked for."""
        return sum(one.piece.logprob or 0.0 for one in self._placed) / max(1, len(self._placed))

    def push(self, event: Event) -> CompletionChoice | None:
        """What became final with an event; None when nothing did."""
        if isinstance(event, Piece):
            self._placed.append(_Placed(event, self._offset))
            if self._texts is not None:
                self._offset += len(self._characters.decode(self._texts.bytes_of(event.token)))
            return self._chunk(event.text) if event.text else None
        if isinstance(event, End):
            self.counts.prompt, self.counts.cached, self.counts.tokens = event.prompt, event.cached, event.tokens
            self._reason = "length" if event.reason == LENGTH else "stop"
            return self._chunk(event.text)
        return None

    def choice(self, index: int) -> CompletionChoice:
        """The whole of it, once its end was pushed, under a number of its own."""
        logprobs = self._logprobs(self._placed)
        return CompletionChoice(index=index, text="".join(self._text), finish_reason=self._reason, logprobs=logprobs)

    def _chunk(self, text: str) -> CompletionChoice:
        text, self._before = self._before + text, ""
        self._text.append(text)
        told, self._told = self._placed[self._told :], len(self._placed)
        logprobs = self._logprobs(told) if told else None
        return CompletionChoice(index=self._index, text=text, finish_reason=self._reason, logprobs=logprobs)

    def _logprobs(self, placed: Sequence[_Placed]) -> CompletionLogprobs | None:
        if self._texts is None:
            return None
        name = self._texts.name_of
        return CompletionLogprobs(
            tokens=[name(one.piece.token) for one in placed],
            token_logprobs=[one.piece.logprob for one in placed],
            top_logprobs=[{name(token): logprob for token, logprob in one.piece.top} for one in placed],
            text_offset=[one.offset for one in placed],
        )
