"""`/tokenize` and `/detokenize`, as llama-server and vLLM have them, and `/v1/models`, free of HTTP."""

from __future__ import annotations

import asyncio

from pipeline.serve.api import conversations, prompts
from pipeline.serve.api.protocol import (
    Capability,
    Detokenized,
    DetokenizeRequest,
    ModelCard,
    ModelList,
    Tokenized,
    TokenizeRequest,
)
from pipeline.serve.api.token_texts import TokenTexts
from pipeline.serve.inference.models import Model, Models
from pipeline.serve.refusals import Refused, UnknownModel
from pipeline.task import EMBED


async def tokenize(models: Models, request: TokenizeRequest) -> Tokenized:
    """Token ids of a text, or of messages with the prompt for an answer at their end, a picture counting as one.

    Raises:
        Refused: there is not one of both, or messages cannot be taken.
        UsageError: the template fails on these messages.
    """
    model = _find(models, request.model)
    ids = await asyncio.to_thread(_ids, model, request)
    texts = TokenTexts(model.tokenizer)
    pieces = [texts.text_of(token) for token in ids] if request.with_pieces else None
    return Tokenized(tokens=ids, count=len(ids), max_model_len=model.context_length, pieces=pieces)


async def detokenize(models: Models, request: DetokenizeRequest) -> Detokenized:
    """The text of token ids, control tokens as they are written."""
    model = _find(models, request.model)
    if any(token >= model.vocabulary for token in request.tokens):
        raise Refused(f"there are token ids outside [0, {model.vocabulary})", parameter="tokens")
    text = await asyncio.to_thread(model.tokenizer.decode, request.tokens, skip_special=False)
    return Detokenized(content=text, prompt=text)


def cards(models: Models) -> ModelList:
    """All that is served, adapters after the model that they belong to."""
    return ModelList(data=[_card(model, name) for model in models for name in model.ids])


def card(models: Models, name: str) -> ModelCard:
    """One of them; raises `UnknownModel`."""
    model, _ = models.find(name)
    return _card(model, name)


def _card(model: Model, name: str) -> ModelCard:
    return ModelCard(
        id=name,
        created=model.created,
        root=model.name,
        parent=None if name == model.name else model.name,
        context_length=model.context_length,
        max_model_len=model.context_length,
        capabilities=_capabilities(model),
        task=model.task,
        sees=model.sees,
        state=model.engine.state,
    )


def _capabilities(model: Model) -> list[Capability]:
    if not model.generates:
        return ["embeddings"] if model.task == EMBED else ["rerank"]
    found: list[Capability] = ["chat", "completion"]
    if model.thinks:
        found.append("thinking")
    if prompts.calls_tools(model):
        found.append("tools")
    if model.sees:
        found.append("vision")
    return found


def _find(models: Models, name: str | None) -> Model:
    if name is not None:
        return models.find(name)[0]
    served = list(models)
    if len(served) != 1:
        known = ", ".join(model.name for model in served)
        raise UnknownModel("several models are served", why=f"these are {known}", fix="name one", parameter="model")
    return served[0]


def _ids(model: Model, request: TokenizeRequest) -> list[int]:
    given = {name: getattr(request, name) for name in ("content", "prompt", "messages")}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise Refused("give one of `content`, `prompt` and `messages`", parameter=[*given, "content"][0])
    if request.messages is None:
        if request.tools is not None or request.chat_template_kwargs is not None:
            raise Refused("`tools` and `chat_template_kwargs` belong to `messages`", parameter="messages")
        return model.tokenizer.encode(next(iter(given.values())), special=bool(request.parse_special))
    if request.parse_special:
        raise Refused(
            "`parse_special` is for a text", why="a template says itself what is special", parameter="parse_special"
        )
    messages, _ = conversations.templated(request.messages, model.sees)
    variables = prompts.variables(model.tokenizer, request.chat_template_kwargs)
    return prompts.encoded(model.tokenizer, messages, request.tools or (), variables)
