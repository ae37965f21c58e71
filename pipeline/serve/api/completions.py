"""`/v1/completions`, free of HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from pipeline.serve.api import answers, prompts
from pipeline.serve.api.answers import PlainAnswer
from pipeline.serve.api.protocol import Completion, CompletionChoice, CompletionRequest, Usage
from pipeline.serve.api.runs import Chunks, Run
from pipeline.serve.api.token_texts import TokenTexts
from pipeline.serve.events import Request
from pipeline.serve.inference.models import Model, Models


@dataclass(frozen=True)
class _Batch:
    """A request made ready: for each prompt so many answers, which stand in a row.

    Attributes:
        each: answers that are made of a prompt.
        shown: how many of them are given.
    """

    model: Model
    name: str
    requests: Sequence[Request]
    made: Sequence[PlainAnswer]
    each: int
    shown: int
    id: str = field(default_factory=lambda: answers.identifier("cmpl"))
    created: int = field(default_factory=lambda: int(time.time()))

    def run(self, client: str) -> Run:
        return Run(self.model.engine, self.requests, client)

    @property
    def usage(self) -> Usage:
        counts = [answer.counts for answer in self.made]
        return answers.usage(counts[begin : begin + self.each] for begin in range(0, len(counts), self.each))

    def completion(self, choices: Sequence[CompletionChoice], usage: Usage | None = None) -> Completion:
        return Completion(
            id=self.id,
            created=self.created,
            model=self.name,
            choices=list(choices),
            system_fingerprint=answers.fingerprint(self.model.manifest),
            usage=usage,
        )

    def choices(self) -> list[CompletionChoice]:
        """Of each prompt's answers those to show: the most likely ones where more were made."""
        found: list[CompletionChoice] = []
        for begin in range(0, len(self.made), self.each):
            group = list(self.made[begin : begin + self.each])
            if self.each > self.shown:
                group.sort(key=lambda answer: -answer.likelihood)
            found += [answer.choice(len(found) + place) for place, answer in enumerate(group[: self.shown])]
        return found


async def complete(models: Models, request: CompletionRequest, client: str = "") -> Completion:
    """All answers, whole; arguments and errors as of `pipeline.serve.api.chat.complete`."""
    batch = await _batch(models, request)
    run = batch.run(client)
    try:
        async for index, event in run:
            batch.made[index].push(event)
    finally:
        run.close()
    return batch.completion(batch.choices(), batch.usage)


async def stream(models: Models, request: CompletionRequest, client: str = "") -> Chunks[Completion]:
    """The answers in chunks, once the model has begun with one; what can be refused is refused before."""
    batch = await _batch(models, request)
    counted = request.stream_options is not None and bool(request.stream_options.include_usage)

    async def chunks(run: Run) -> AsyncGenerator[Completion, None]:
        async for index, event in run:
            if choice := batch.made[index].push(event):
                yield batch.completion([choice])
        if counted:
            yield batch.completion([], batch.usage)

    return Chunks(await batch.run(client).open(), chunks)


async def _batch(models: Models, request: CompletionRequest) -> _Batch:
    model, adapter = models.find(request.model)
    return await asyncio.to_thread(_made, model, adapter, request)


def _made(model: Model, adapter: str, request: CompletionRequest) -> _Batch:
    asked = prompts.of_completion(model, adapter, request)
    shown = request.n or 1
    each = request.best_of or shown
    texts = TokenTexts(model.tokenizer) if request.logprobs is not None else None
    made: list[PlainAnswer] = []
    for one in asked:
        before = model.tokenizer.decode(one.prompt, skip_special=False) if request.echo else ""
        made += [PlainAnswer(len(made) + index, before, texts) for index in range(each)]
    requests = [choice for one in asked for choice in prompts.choices(one, each)]
    return _Batch(model, request.model, requests, made, each, shown)
