"""`/v1/chat/completions`, free of HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from pipeline.runtime.thinking import Splitter
from pipeline.serve.api import answers, prompts
from pipeline.serve.api.answers import ChatAnswer
from pipeline.serve.api.prompts import Asked
from pipeline.serve.api.protocol import ChatChunk, ChatCompletion, ChatRequest, ChunkChoice, Usage
from pipeline.serve.api.runs import Chunks, Run
from pipeline.serve.api.token_texts import TokenTexts
from pipeline.serve.events import Prefilled
from pipeline.serve.inference import tool_calls
from pipeline.serve.inference.models import Model, Models


@dataclass(frozen=True)
class _Head:
    """What all chunks of an answer have."""

    model: str
    system_fingerprint: str | None
    id: str = field(default_factory=lambda: answers.identifier("chatcmpl"))
    created: int = field(default_factory=lambda: int(time.time()))

    def chunk(self, *choices: ChunkChoice, usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=list(choices),
            system_fingerprint=self.system_fingerprint,
            usage=usage,
        )


async def complete(models: Models, request: ChatRequest, client: str = "") -> ChatCompletion:
    """The whole answer.

    Args:
        client: whose turn it is in the engine's queue.

    Raises:
        Refused: of all kinds, see `pipeline.serve.refusals`.
        UsageError: the template or the package cannot take the conversation.
    """
    model, asked = await _asked(models, request)
    head, made = _Head(request.model, answers.fingerprint(model.manifest)), _answers(model, request, asked)
    run = Run(model.engine, prompts.choices(asked.request, len(made)), client)
    try:
        async for index, event in run:
            made[index].push(event)
    finally:
        run.close()
    return ChatCompletion(
        id=head.id,
        created=head.created,
        model=head.model,
        choices=[answer.choice() for answer in made],
        usage=answers.usage([[answer.counts for answer in made]]),
        system_fingerprint=head.system_fingerprint,
    )


async def stream(models: Models, request: ChatRequest, client: str = "") -> Chunks[ChatChunk]:
    """The answer in chunks, once the model has begun with it.

    What can be refused is refused before there is one, and raises as `complete` does.
    """
    model, asked = await _asked(models, request)
    head, made = _Head(request.model, answers.fingerprint(model.manifest)), _answers(model, request, asked)
    counted = request.stream_options is not None and bool(request.stream_options.include_usage)

    async def chunks(run: Run) -> AsyncGenerator[ChatChunk, None]:
        begun = False
        async for index, event in run:
            # Who speaks is told with the first token: until then an answer can still be refused.
            if not begun and not isinstance(event, Prefilled):
                begun = True
                for answer in made:
                    yield head.chunk(answer.begin())
            if choice := made[index].push(event):
                yield head.chunk(choice)
        if counted:
            yield head.chunk(usage=answers.usage([[answer.counts for answer in made]]))

    return Chunks(await Run(model.engine, prompts.choices(asked.request, len(made)), client).open(), chunks)


async def _asked(models: Models, request: ChatRequest) -> tuple[Model, Asked]:
    model, adapter = models.find(request.model)
    return model, await asyncio.to_thread(prompts.of_chat, model, adapter, request)


def _answers(model: Model, request: ChatRequest, asked: Asked) -> list[ChatAnswer]:
    texts = TokenTexts(model.tokenizer) if request.logprobs else None
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()] if asked.calls else []
    form = tool_calls.form_of(model.tokenizer.template)
    return [
        ChatAnswer(
            index,
            Splitter(asked.request.inside) if asked.request.reasons else None,
            tool_calls.ToolCalls(tools, form) if tools else None,
            texts,
        )
        for index in range(request.n or 1)
    ]
