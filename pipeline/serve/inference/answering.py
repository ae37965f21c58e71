"""One answer, step by step: what the model's process does for a request.

A step is a piece of the prompt or one token, so that several answers can take turns and each can be given up between
two.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import UsageError
from pipeline.package import adapter_files
from pipeline.runtime import adapters, generate, images
from pipeline.runtime.chat import Tokenizer
from pipeline.runtime.generate import Reader, TextStream
from pipeline.runtime.sampling import Sampler, log_probabilities
from pipeline.runtime.session import Session
from pipeline.runtime.speculation import Lookup, Verifier
from pipeline.runtime.thinking import CLOSING, Budget, Splitter
from pipeline.serve.events import LENGTH, STOP, End, Event, Piece, Prefilled, Request
from pipeline.serve.inference import slots
from pipeline.serve.inference.slots import Slots

if TYPE_CHECKING:
    from pipeline.runtime.generate import Floats

_AFTER_THOUGHTS = "\n\n"  # what Qwen's models write between their thoughts and the answer


@dataclass
class Host:
    """A loaded package and the conversations that are kept.

    Attributes:
        adapted: the session of each adapter that was asked for; the model is the same one.
        lookup: whether greedy answers are drafted from what was said.
    """

    session: Session
    tokenizer: Tokenizer
    slots: Slots
    adapted: dict[str, Session]
    lookup: bool = False

    def with_adapter(self, name: str) -> Session:
        """The session whose generators have an adapter; the plain one for no name."""
        if not name:
            return self.session
        if name not in self.adapted:
            known = adapter_files.names(self.session.package)
            if name not in known:
                raise UsageError(f"the package has no adapter `{name}`", why=f"it has {', '.join(known) or 'none'}")
            self.adapted[name] = adapters.activate(self.session, adapters.find(self.session.package, name))
        return self.adapted[name]


def answer(host: Host, request: Request) -> Iterator[Event]:
    """The events of an answer, a step each; the last one is its end.

    Raises:
        UsageError: the package cannot take the request.
    """
    session = host.with_adapter(request.adapter)
    pictures = [images.check(data) for data in request.images]
    prompt, media = generate.attach(session, request.prompt, pictures)
    generate.check_prompt(session, prompt, media)
    limit = generate.room(session, len(prompt), request.limit)
    grows = session.rewinds and media is None
    with host.slots.taken(session, prompt, limit, request.cache and grows, grows) as (reader, cached):
        for done in reader.feed(prompt[cached:], media):
            yield Prefilled(cached + done, len(prompt), cached)
        answer = _Answer(host.tokenizer, request, reader, prompt, cached, limit)
        yield from answer.drafted() if host.lookup and _plain(request) and grows else answer.steps()


def _plain(request: Request) -> bool:
    """Whether the most likely tokens are wanted, and nothing else of them."""
    watched = request.grammar or request.budget is not None or request.top_logprobs is not None
    return request.sampling.plain and not watched


class _Answer:
    """The tokens after a prompt that has been read."""

    def __init__(
        self, tokenizer: Tokenizer, request: Request, reader: Reader, prompt: Sequence[int], cached: int, limit: int
    ) -> None:
        self._request, self._reader, self._tokenizer = request, reader, tokenizer
        self._prompt, self._cached, self._limit = prompt, cached, limit
        session = reader.session
        self._sampler = Sampler(request.sampling, prompt, session.repetition_penalty)
        self._text, self._stops = TextStream(tokenizer), Stops(request.stop)
        self._thoughts = Splitter(request.inside) if request.reasons else None
        self._forced: deque[int] = deque()
        self._follows = False  # whether the last token was chosen among those that the grammar allows
        self._constraint = None
        if request.grammar:
            from pipeline.serve.inference.grammar import Constraint

            self._constraint = Constraint(
                request.grammar, session.package / "tokenizer.json", session.vocabulary, session.eos
            )
        self._budget = None
        if request.budget is not None:
            closing = tokenizer.encode(CLOSING)
            self._budget = Budget(request.budget, closing, TextStream(tokenizer).push, request.inside)

    def steps(self) -> Iterator[Event]:
        """Token by token."""
        for count in range(self._limit):
            logits = self._reader.logits()
            token = self._next(logits)
            events, over = self._taken(token, count, logits)
            yield from events
            if over:
                return
            yield from self._grown(1)
            self._reader.take(token)

    def drafted(self) -> Iterator[Event]:
        """Several tokens at once where the answer repeats what was said (`pipeline.runtime.speculation`)."""
        reader, ids, count = self._reader, list(self._prompt), 0
        reader.rewind(len(ids) - 1)
        source, verifier = Lookup(ids), Verifier(reader)
        while True:
            yield from self._grown(2)
            room = min(verifier.longest, self._limit - count - 1, reader.length - len(ids) - 1)
            draft = verifier.usable(source.propose(room))
            found = verifier.verify(ids, draft)
            if draft:
                source.learn(len(draft), len(found) - 1)
            for token in found:
                events, over = self._taken(token, count, None)
                yield from events
                if over:
                    return
                ids.append(token)
                count += 1
            source.extend(found)

    def _taken(self, token: int, count: int, logits: Floats | None) -> tuple[list[Event], bool]:
        """What there is to tell of a token after ``count`` others, and whether the answer ends with it."""
        if token in self._reader.session.eos:
            return [self._end(STOP, count)], True
        piece = self._text.push(token)
        text, hit = self._stops.push(piece)
        told: Event = self._piece(token, text, logits)
        if hit:
            return [told, End(STOP, "", len(self._prompt), self._cached, count + 1, hit)], True
        self._follow(token, piece)
        if self._constraint is not None and self._constraint.done and not self._forced:
            return [told, self._end(STOP, count + 1)], True
        if count == self._limit - 1:
            return [told, self._end(LENGTH, self._limit)], True
        return [told], False

    def _grown(self, count: int) -> Iterator[Event]:
        """Make room for so many tokens where there is none."""
        reader = self._reader
        if len(reader.ids) + count > reader.length:
            for done in reader.grow(slots.larger(reader.session, reader.length)):
                yield Prefilled(done, len(reader.ids), 0)

    def _next(self, logits: Floats) -> int:
        self._follows = False
        if self._forced:
            self._sampler.note(token := self._forced.popleft())
            return token
        if self._constraint is None or self._inside:
            return self._sampler.choose(logits)
        self._follows = True
        return self._sampler.choose(logits, self._constraint.allowed())

    @property
    def _inside(self) -> bool:
        return self._thoughts is not None and self._thoughts.inside

    def _follow(self, token: int, piece: str) -> None:
        """Let all that watches the answer know of a token."""
        inside = self._inside
        if self._constraint is not None and self._follows:
            self._constraint.take(token)
        if self._thoughts is not None:
            self._thoughts.push(piece)
        if self._budget is not None:
            self._forced.extend(self._budget(token))
        if self._constraint is not None and inside and not self._inside and not self._forced:
            self._forced.extend(self._tokenizer.encode(_AFTER_THOUGHTS))

    def _piece(self, token: int, text: str, logits: Floats | None) -> Piece:
        wanted = self._request.top_logprobs
        if wanted is None or logits is None:
            return Piece(token, text)
        found = log_probabilities(logits)
        order = (-found).argsort(kind="stable")[:wanted].tolist() if wanted else []
        return Piece(token, text, float(found[token]), tuple((one, float(found[one])) for one in order))

    def _end(self, reason: str, tokens: int) -> End:
        last, hit = self._stops.push(self._text.rest())
        rest = last if hit else last + self._stops.rest()
        return End(STOP if hit else reason, rest, len(self._prompt), self._cached, tokens, hit)


class Stops:
    """Finds texts that end an answer in text that comes in pieces; what may become one of them is held back."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """The text that became final, and the stop that was found: the one that ends first."""
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._texts if (at := self._held.find(stop)) >= 0]
        if found:
            _, at, stop = min(found)
            final, self._held = self._held[:at], ""
            return final, stop
        kept = max((_overlap(self._held, stop) for stop in self._texts), default=0)
        final = self._held[: len(self._held) - kept]
        self._held = self._held[len(final) :]
        return final, ""

    def rest(self) -> str:
        """What was held back when no more text came."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text begin a stop."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
