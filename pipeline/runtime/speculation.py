"""Lossless speculation by prompt lookup: what an answer repeats is verified many tokens at once.

The draft of what comes next is what followed the longest suffix n-gram of prompt and answer where it stood before
(Saxena 2023, "Prompt Lookup Decoding", https://github.com/apoorvumang/prompt-lookup-decoding; the lookup decoding of
llama.cpp, ``prompt_lookup_num_tokens`` of transformers). One forward computes the logits after every drafted token; the
longest prefix of the draft that the model itself ranks first is accepted, and the model's own next token with it
(Leviathan et al. 2023, https://arxiv.org/abs/2211.17192, at temperature 0).

What is guaranteed: every token is the one that the package's own logits rank first after exactly the tokens before it.
A draft decides how soon a token comes, never which. Every forward takes two tokens or more, for kernels of one token
sum in another order than those of several. Where the logits after a token are the same bits however many tokens are fed
with it (`independent` tells), the answer is therefore the same whatever is drafted. It is that of decoding token by
token up to this rounding: the two part where two tokens are nearly tied, as prefill and decode of a package do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UsageError
from pipeline.package import onnx_references
from pipeline.runtime import generate
from pipeline.runtime.generate import Reader
from pipeline.runtime.sampling import Sampling
from pipeline.runtime.session import Session

if TYPE_CHECKING:
    import numpy.typing as npt

LONGEST = 15
"""Most tokens of a draft: with the token before it, as many as a package gives logits for at once."""
# Chosen by replaying recorded answers to the prompts of `lookup_bench`, where a forward of 2 tokens took 1.1 times as
# long as one of 1, of 8 tokens 3.3 times, of 16 tokens 6 times. Around these values the gain is flat.
_NGRAM = 8
_SURE = 3  # a match of fewer tokens says little of what follows: one token is drafted after it
_SHORTEST = 2  # what a draft may have, whatever was refused before


@dataclass
class Counts:
    """How speculation went: forwards, the prompt's included; tokens drafted and accepted."""

    forwards: int = 0
    drafted: int = 0
    accepted: int = 0


class Lookup:
    """Finds where a growing sequence of tokens repeats itself."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids: list[int] = []
        self._followed: dict[tuple[int, ...], int] = {}  # n-gram → where what followed it last stands
        self._length = LONGEST // 2
        self.extend(ids)

    def extend(self, ids: Sequence[int]) -> None:
        """Append tokens."""
        for token in ids:
            end = len(self._ids)
            for size in range(1, min(_NGRAM, end) + 1):
                self._followed[tuple(self._ids[end - size :])] = end
            self._ids.append(token)

    def propose(self, room: int) -> list[int]:
        """What followed the longest suffix where it stood last: ``room`` tokens at most, none if it is new."""
        for size in range(min(_NGRAM, len(self._ids)), 0, -1):
            start = self._followed.get(tuple(self._ids[-size:]))
            if start is not None:
                count = min(room, self._length if size >= _SURE else 1)
                draft = self._ids[start : start + count]
                while len(draft) < count:  # it has run into its own start: the sequence goes round
                    draft.append(draft[len(draft) - (len(self._ids) - start)])
                return draft
        return []

    def learn(self, drafted: int, accepted: int) -> None:
        """Draft more after a draft that was accepted whole, and less after another one."""
        self._length = min(LONGEST, 2 * drafted + 1) if accepted == drafted else max(_SHORTEST, accepted, drafted // 2)


def stream(
    session: Session,
    prompt: Sequence[int],
    limit: int,
    sampling: Sampling | None = None,
    counts: Counts | None = None,
    lookup: bool = True,
) -> Iterator[int]:
    """Token ids that follow ``prompt``, as `pipeline.runtime.generate.stream` gives them, greedily.

    Args:
        sampling: must be plain.
        counts: is added to.
        lookup: whether to draft; the answer without drafts is what others are compared with.

    Raises:
        UsageError: sampling is asked for, the package cannot verify drafts; or as `pipeline.runtime.generate.stream`.
    """
    if sampling and not sampling.plain:
        raise UsageError(
            "lookup decoding takes the most likely token, and something else was asked for",
            fix="leave out --lookup, or --temperature",
        )
    generate.check_prompt(session, prompt)
    if limit < 1:
        raise UsageError(f"a limit of {limit} tokens is not positive")
    end = len(prompt) + generate.room(session, len(prompt), limit)
    source, verifier = Lookup(prompt), Verifier(generate.Reader(session, end))
    counts = counts if counts is not None else Counts()
    ids = list(prompt)
    while True:
        draft = verifier.usable(source.propose(min(verifier.longest, end - len(ids) - 1))) if lookup else []
        found = verifier.verify(ids, draft)
        counts.forwards += 1
        counts.drafted += len(draft)
        counts.accepted += len(found) - 1
        if draft:
            source.learn(len(draft), len(found) - 1)
        for token in found:
            if token in session.eos:
                return
            yield token
            ids.append(token)
            if len(ids) == end:
                return
        source.extend(found)


class Verifier:
    """What the model says to drafts of what follows a sequence.

    Args:
        reader: has read some of the sequence, or nothing.

    Attributes:
        longest: most tokens of a draft.

    Raises:
        UsageError: the package's settings ask for another search than the greedy one, or it is compiled for an NPU.
    """

    def __init__(self, reader: Reader) -> None:
        self.longest = LONGEST
        self._reader, session = reader, reader.session
        self._output = _output(session)
        self._padding = session.config["model"].get("pad_token_id")
        search = session.config.get("search", {})
        self._penalty = float(search.get("repetition_penalty", 1.0))
        if search.get("num_beams", 1) != 1 or search.get("min_length", 0) > 0:
            raise UsageError("lookup decoding knows no beams and no least length, which the package's settings ask for")

    def usable(self, draft: list[int]) -> list[int]:
        """A draft as far as it can be fed: the runtime masks padding out at the end of what it is fed first."""
        return draft[: draft.index(self._padding)] if self._padding in draft else draft

    def verify(self, ids: Sequence[int], draft: Sequence[int]) -> list[int]:
        """The prefix of ``draft`` that the model ranks first after ``ids``, and the next token that it ranks first.

        ``ids`` are those that the reader has read, and one at least that it has not. After it, the last one of what is
        returned is unread.

        Raises:
            UsageError: the package gives logits of the last token only.
        """
        drafted = list(draft) or [ids[-1]]  # a token that comes alone would be rounded otherwise
        while True:
            unread = ids[len(self._reader.ids) :]
            rows = self._reader.append([*unread, *drafted], self._output)
            if len(rows) > len(drafted):
                break
            if len(unread) == 1:  # else the runtime has fed a prompt in chunks, and tells of the last one
                self.longest = min(self.longest, len(rows) - 1)
            drafted = drafted[: self.longest]
            if not drafted:
                raise UsageError(
                    "the package cannot verify drafts",
                    why="its graph gives logits of the last token only",
                    fix="build it again with this version, for a processor, or with export.draft_tokens",
                )
            self._reader.rewind(len(ids) - 1)
        ranked = _ranked_first(rows[-len(drafted) - 1 :], [*ids, *drafted], self._penalty)
        agreed = 0
        while agreed < min(len(draft), len(drafted)) and ranked[agreed] == drafted[agreed]:
            agreed += 1
        self._reader.rewind(len(ids) + agreed)
        return ranked[: agreed + 1]


def _output(session: Session) -> str:
    """The output for several tokens' logits. The runtime does not survive being asked for one it lacks."""
    decoder = session.config["model"]["decoder"]
    if "filename" not in decoder:
        raise UsageError(f"{session.package} is made of stages, whose caches cannot be rewound to verify drafts")
    graph = (session.package / decoder["filename"]).read_bytes()
    return onnx_references.LAST_LOGITS if onnx_references.LAST_LOGITS in onnx_references.outputs(graph) else "logits"


def _ranked_first(rows: npt.NDArray[Any], ids: Sequence[int], penalty: float) -> list[int]:
    """Ids that are ranked first after each of the last tokens of ``ids``; ``rows`` are their logits ``[N, V]``.

    ``penalty`` is the runtime's for repetition: the logit of a token that was there before is divided by it, or
    multiplied where it is negative.
    """
    if penalty != 1.0:
        rows = np.array(rows, np.float32)
        for row, end in zip(rows, range(len(ids) - len(rows) + 1, len(ids) + 1), strict=True):
            known = np.unique(ids[:end])
            row[known] = np.where(row[known] < 0, row[known] * penalty, row[known] / penalty)
    found: list[int] = rows.argmax(axis=1).tolist()
    return found


def independent(session: Session, ids: Sequence[int]) -> bool:
    """Whether the logits after a token are the same bits however many tokens are fed with it, two or more.

    Compared are pieces of two tokens with one piece of every other length that drafts lead to, and with all at once.
    Kernels that depend on it sum in another order, which shows in almost every logit.

    Args:
        ids: any text of more than ``LONGEST + 3`` tokens.
    """
    output, generator = _output(session), generate.start(session, len(ids))
    tail = LONGEST + 1
    prefix = len(ids) - tail

    def rows(start: int, size: int) -> npt.NDArray[Any]:
        generator.rewind_to(start)
        generator.append_tokens(np.asarray(ids[start : start + size], np.int32))
        return np.asarray(generator.get_output(output))[0, -min(size, tail) :]

    generator.append_tokens(np.asarray(ids, np.int32))
    twos = np.concatenate([rows(start, 2) for start in range(prefix, len(ids), 2)])
    pieces = all(np.array_equal(rows(prefix, size), twos[:size]) for size in range(3, tail + 1))
    return pieces and np.array_equal(rows(0, len(ids)), twos)
