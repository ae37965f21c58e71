"""What stands before an engine: the server's limits on prompts and answers, and the count of what each client took."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, cast

from pipeline.serve.events import End, Event, Piece, Prefilled, Request
from pipeline.serve.inference.engine import Engine, Stream
from pipeline.serve.inference.models import Models
from pipeline.serve.refusals import TooLong
from pipeline.serve.web.security import Budgets
from pipeline.serve.web.settings import Settings


def gated(models: Models, settings: Settings, budgets: Budgets) -> Models:
    """The same models behind the server's limits."""
    return Models(replace(model, engine=cast("Engine", _Gate(model.engine, settings, budgets))) for model in models)


class _Gate:
    """An engine, to whoever asks it."""

    def __init__(self, engine: Engine, settings: Settings, budgets: Budgets) -> None:
        self._engine, self._settings, self._budgets = engine, settings, budgets

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, request: Request, client: str = "") -> Stream:
        """As `Engine.submit`; an answer of no given length ends at the server's limit.

        Raises:
            TooLong: the prompt is longer than the server takes.
        """
        self._check(len(request.prompt))
        most = self._settings.max_tokens
        if most and request.limit > most:
            request = replace(request, limit=most)
        return cast("Stream", _Counted(self._engine.submit(request, client), client, self._budgets))

    async def embed(self, rows: list[list[int]], dimensions: int | None, client: str = "") -> list[list[float]]:
        """As `Engine.embed`; raises TooLong as well."""
        self._check(max(map(len, rows), default=0))
        found = await self._engine.embed(rows, dimensions, client)
        self._budgets.spend(client, sum(map(len, rows)))
        return found

    async def rank(self, rows: list[list[int]], client: str = "") -> list[float]:
        """As `Engine.rank`; raises TooLong as well."""
        self._check(max(map(len, rows), default=0))
        found = await self._engine.rank(rows, client)
        self._budgets.spend(client, sum(map(len, rows)))
        return found

    def _check(self, tokens: int) -> None:
        most = self._settings.max_prompt_tokens
        if most and tokens > most:
            raise TooLong(f"the prompt has {tokens} tokens", why=f"this server takes {most} (--max-prompt-tokens)")


class _Counted:
    """A stream whose tokens are counted as spent when it ends, however it does."""

    def __init__(self, stream: Stream, client: str, budgets: Budgets) -> None:
        self._stream, self._client, self._budgets = stream, client, budgets
        self._prompt = self._answer = 0

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        try:
            event = await anext(self._stream)
        except BaseException:
            self._settle()
            raise
        if isinstance(event, Prefilled):
            self._prompt = event.done
        elif isinstance(event, Piece):
            self._answer += 1
        elif isinstance(event, End):
            self._prompt, self._answer = event.prompt, event.tokens
            self._settle()
        return event

    def cancel(self) -> None:
        """As `Stream.cancel`."""
        self._settle()
        self._stream.cancel()

    def _settle(self) -> None:
        self._budgets.spend(self._client, self._prompt + self._answer)
        self._prompt = self._answer = 0
