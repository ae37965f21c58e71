"""The conversations whose caches are kept, so that the next turn of one does not read it all again."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.runtime.generate import Reader
from pipeline.runtime.session import Session

# A cache is taken up for another conversation when this much of it is kept: else the oldest one is given up for it.
_WORTH = 0.5
# The runtime fills the whole of a cache with zeros when a generator is made: so one is made for an answer of usual
# length, and a larger one when it is full.
_SMALL, _USUAL = 2048, 1024
_LEAST = 2  # tokens of a prompt that are read in any case: kernels of one token sum in another order


@dataclass
class _Slot:
    reader: Reader
    busy: bool = False
    used: int = 0

    def fits(self, session: Session, length: int) -> bool:
        """Whether a sequence of a session could be read on here, up to ``length`` tokens."""
        own = self.reader.session
        return own.model is session.model and own.adapter == session.adapter and length <= self.reader.length


class Slots:
    """At most ``count`` conversations, those that are being answered included."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._slots: list[_Slot] = []
        self._clock = itertools.count(1)

    @contextmanager
    def taken(
        self, session: Session, prompt: Sequence[int], limit: int, cache: bool, grows: bool
    ) -> Iterator[tuple[Reader, int]]:
        """A reader for ``prompt`` and an answer, and how many tokens of the prompt it has read already.

        Args:
            limit: most tokens of the answer.
            cache: whether to take up what is kept, and to keep what will be read.
            grows: whether the reader may have to `Reader.grow`, rather than have room for them all.
        """
        slot, known = self._found(session, prompt, limit) if cache else (None, 0)
        if slot is None:
            self._make_room()
            whole = session.padded(len(prompt)) + limit
            slot = _Slot(Reader(session, _room(session, len(prompt), limit) if grows else whole))
            self._slots.append(slot)
        slot.busy, slot.used = True, next(self._clock)
        try:
            slot.reader.rewind(known)
            yield slot.reader, known
        except Exception:  # a step has failed: what it has read is not known
            cache = False
            raise
        finally:  # or it was left between two steps
            slot.busy, slot.used = False, next(self._clock)
            if not cache:
                self._slots.remove(slot)

    def _found(self, session: Session, prompt: Sequence[int], limit: int) -> tuple[_Slot | None, int]:
        """The free slot that knows most of a prompt, if it is worth more than a new one."""
        best, known = None, 0
        for slot in self._slots:
            if slot.busy or not slot.fits(session, len(prompt) + min(limit, _USUAL // 4)):
                continue
            alike = _alike(slot.reader.ids, prompt)
            if alike > known:
                best, known = slot, alike
        if best is None:
            return None, 0
        if len(self._slots) < self._count and known < _WORTH * len(best.reader.ids):
            return None, 0  # another conversation that begins alike, with the same instructions: both are kept
        return best, max(0, min(known, len(prompt) - _LEAST))

    def _make_room(self) -> None:
        free = sorted((slot for slot in self._slots if not slot.busy), key=lambda slot: slot.used)
        while len(self._slots) >= self._count and free:
            self._slots.remove(free.pop(0))


def larger(session: Session, length: int) -> int:
    """What a full cache of ``length`` tokens grows to."""
    return min(session.context_length, 2 * length)


def _room(session: Session, prompt: int, limit: int) -> int:
    """Room for a prompt, the usual answer and some turns: a power of two, as far as the context goes."""
    length = _SMALL
    while length < prompt + min(limit, _USUAL):
        length *= 2
    return min(session.context_length, length)


def _alike(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin alike with."""
    return next(
        (index for index, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
        min(len(first), len(second)),
    )
