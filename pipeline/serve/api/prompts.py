"""Requests of OpenAI's API as what the model's process is asked: token ids, and how the next one is chosen.

These functions render templates and tokenize, which takes time: call them in a thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from pipeline.runtime.chat import Tokenizer
from pipeline.runtime.sampling import Sampling
from pipeline.runtime.thinking import VARIABLE, is_open
from pipeline.serve.api import conversations, thoughts
from pipeline.serve.api.protocol import ChatRequest, CompletionRequest, NamedTool, Sampled, Tool
from pipeline.serve.events import Request
from pipeline.serve.inference import grammar, tool_calls
from pipeline.serve.inference.models import Model
from pipeline.serve.refusals import Refused, TooLong, Unsupported

MAX_ANSWERS = 256
"""Most answers of one request, its prompts and choices multiplied."""

_SEEDS = 1 << 63
# What a request has fields for, or this server sets itself.
_OWN = ("messages", "tools", "documents", "add_generation_prompt")
_PREFIX, _SUFFIX, _MIDDLE = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"


@dataclass(frozen=True)
class Asked:
    """A conversation as it goes to the model's process.

    Attributes:
        request: of the first choice.
        calls: whether the answer may have tool calls.
    """

    request: Request
    calls: bool


def of_chat(model: Model, adapter: str, request: ChatRequest) -> Asked:
    """What the process is asked for a conversation.

    Raises:
        Refused, Unsupported: what is asked contradicts itself, or the model cannot do it.
        TooLong: the prompt leaves no room in the context.
        UsageError: the template fails on these messages.
    """
    _check_generates(model)
    _check_chat(request)
    tools = _tools(model, request)
    form = _grammar(model, request, tools)
    think = thoughts.wanted(model, request, bool(form))
    messages, pictures = conversations.templated(request.messages, model.sees)
    told = thoughts.variables(model, think) | variables(model.tokenizer, request.chat_template_kwargs)
    ids = encoded(model.tokenizer, messages, tools, told)
    inside = model.thinks and is_open(model.tokenizer.decode(ids[-16:], skip_special=False))
    if form and think and model.switch and not inside:
        ids, inside = [*ids, *thoughts.opened(model.tokenizer)], True
    most = request.max_completion_tokens if request.max_tokens is None else request.max_tokens
    limit = _limit(model, len(ids), most, "messages")
    wanted = Request(
        prompt=tuple(ids),
        limit=limit,
        sampling=_sampling(model, request),
        stop=_stops(request),
        top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        grammar=form,
        reasons=model.thinks,
        inside=inside,
        budget=thoughts.budget(model, request, think, inside, limit),
        adapter=adapter,
        images=pictures,
        cache=request.cache_prompt is not False,
    )
    return Asked(wanted, bool(tools))


def of_completion(model: Model, adapter: str, request: CompletionRequest) -> list[Request]:
    """What the process is asked for each prompt; raises as `of_chat` does."""
    _check_generates(model)
    _check_completion(request)
    given = request.prompt
    prompts: Sequence[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    if len(prompts) * (request.best_of or request.n or 1) > MAX_ANSWERS:
        raise Refused(f"there are more than {MAX_ANSWERS} answers to give", fix="send several requests", parameter="n")
    logprobs = request.logprobs
    if request.best_of:
        logprobs = logprobs or 0  # answers are compared by them
    found = []
    for prompt in prompts:
        ids = _completed(model, prompt, request.suffix)
        found.append(
            Request(
                prompt=tuple(ids),
                limit=_limit(model, len(ids), request.max_tokens, "prompt"),
                sampling=_sampling(model, request),
                stop=_stops(request),
                top_logprobs=logprobs,
                adapter=adapter,
                cache=request.cache_prompt is not False,
            )
        )
    return found


def choices(request: Request, count: int) -> list[Request]:
    """The same request with another seed for each choice."""
    seed = request.sampling.seed
    if seed is None:
        return [request] * count
    return [
        replace(request, sampling=replace(request.sampling, seed=(seed + index) % _SEEDS)) for index in range(count)
    ]


def encoded(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], variables: Mapping[str, Any]
) -> list[int]:
    """Token ids of a conversation and the tools in it; raises `UsageError` when the template fails on them."""
    given = {"tools": [_described(tool) for tool in tools]} if tools else {}
    return tokenizer.encode_chat(messages, **given, **variables)


def _described(tool: Tool) -> dict[str, Any]:
    """A tool as templates show it to a model, which is not trained to be told how strict it has to be."""
    return tool.model_dump(exclude_none=True, exclude={"function": {"strict"}})


def _check_generates(model: Model) -> None:
    if not model.generates:
        raise Unsupported(
            f"the model `{model.name}` generates no text",
            why=f"its task is to {model.task}",
            fix="ask /v1/embeddings or /v1/rerank",
            parameter="model",
        )


def _check_sampled(request: Sampled) -> None:
    if request.stream_options is not None and not request.stream:
        raise Refused(
            "`stream_options` are for streams", fix="set `stream`, or leave it out", parameter="stream_options"
        )


def _check_chat(request: ChatRequest) -> None:
    _check_sampled(request)
    if None not in (request.max_tokens, request.max_completion_tokens):
        raise Refused(
            "`max_tokens` and `max_completion_tokens` are both given",
            why="they are two names of one limit",
            parameter="max_tokens",
        )
    if request.top_logprobs and not request.logprobs:
        raise Refused("`top_logprobs` needs `logprobs`", fix="set `logprobs` to true", parameter="top_logprobs")


def _check_completion(request: CompletionRequest) -> None:
    _check_sampled(request)
    if request.best_of is not None:
        if request.best_of < (request.n or 1):
            raise Refused("`best_of` is less than `n`", parameter="best_of")
        if request.stream:
            raise Refused("`best_of` cannot be streamed", why="the best is known at the end", parameter="best_of")
    if request.echo and request.logprobs is not None:
        raise Unsupported(
            "`echo` with `logprobs` is not honoured",
            why="the log-probabilities of a prompt's tokens are not computed",
            fix="leave out one of them",
            parameter="echo",
        )
    if request.echo and request.suffix is not None:
        raise Refused("`echo` and `suffix` cannot be given together", parameter="echo")


def _tools(model: Model, request: ChatRequest) -> list[Tool]:
    """The tools that the answer may call."""
    tools, choice = request.tools or [], request.tool_choice
    names = [tool.function.name for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise Refused(f"there are two tools `{twice}`", parameter="tools")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise Refused(f"there is no tool `{choice.function.name}`", parameter="tool_choice")
    if choice == "required" and not tools:
        raise Refused("a tool is to be called, and there are none", fix="give `tools`", parameter="tool_choice")
    if choice == "none" or not tools:
        return []
    if not calls_tools(model):
        raise Unsupported("the model calls no tools", why="its chat template has no place for them", parameter="tools")
    return tools


def calls_tools(model: Model) -> bool:
    """Whether a model can be told of tools, and writes its calls in a form that is known."""
    template = model.tokenizer.template
    return bool(tool_calls.form_of(template)) and takes(template, "tools")


def _grammar(model: Model, request: ChatRequest, tools: Sequence[Tool]) -> str:
    """The grammar that the answer has to follow; empty when it may be any text.

    Calls that may be made and need not be strict are left to the model.
    """
    form = request.response_format
    wanted = form.model_dump(by_alias=True, exclude_none=True) if form is not None and form.type != "text" else None
    if not tools:
        return grammar.response_grammar(wanted)
    choice = request.tool_choice or "auto"
    parallel = request.parallel_tool_calls is not False
    strict = any(tool.function.strict for tool in tools)
    if choice == "auto" and parallel and not strict and wanted is None:
        return ""
    given = choice if isinstance(choice, str) else choice.model_dump()
    offered = [tool.model_dump(exclude_none=True) for tool in tools]
    written = tool_calls.form_of(model.tokenizer.template)
    return grammar.tools_grammar(offered, given, parallel, written, wanted)


def variables(tokenizer: Tokenizer, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """What else the template is to be told."""
    found = {name: value for name, value in (given or {}).items() if name != VARIABLE}
    for name in found:
        if name in _OWN or name in tokenizer.specials:
            raise Refused(f"`chat_template_kwargs.{name}` cannot be set", parameter="chat_template_kwargs")
        if not takes(tokenizer.template, name):
            raise Unsupported(
                f"the package's chat template reads no `{name}`",
                fix="leave it out",
                parameter=f"chat_template_kwargs.{name}",
            )
    return found


@lru_cache(maxsize=256)
def takes(template: str, variable: str) -> bool:
    """Whether a chat template reads a variable, which takes a process to find out; raises as `Tokenizer.takes`."""
    return Tokenizer(None, None, template).takes(variable)


def _completed(model: Model, prompt: str | Sequence[int], suffix: str | None) -> list[int]:
    """Token ids of a prompt that is to be gone on with."""
    tokenizer = model.tokenizer
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, special=False)
    else:
        ids = list(prompt)
        if max(ids) >= model.vocabulary:
            raise Refused(f"the prompt has token ids outside [0, {model.vocabulary})", parameter="prompt")
    if suffix is not None:
        marks = [tokenizer.trusted.token_to_id(token) for token in (_PREFIX, _SUFFIX, _MIDDLE)]
        if None in marks:
            raise Unsupported(
                "the model fills no gaps",
                why=f"its tokenizer knows no {_MIDDLE}",
                fix="leave it out",
                parameter="suffix",
            )
        before, after, middle = marks
        ids = [before, *ids, after, *tokenizer.encode(suffix, special=False), middle]
    if not ids:
        raise Refused("the prompt is empty", why="a model goes on with something", parameter="prompt")
    return ids


def _limit(model: Model, prompt: int, asked: int | None, parameter: str) -> int:
    """Most tokens of the answer: what is asked, or what the context has room for."""
    if prompt >= model.context_length:
        raise TooLong(
            f"the prompt has {prompt} tokens; the context holds {model.context_length}, the answer included",
            fix="shorten the prompt, or rebuild the package with a larger generation.context_length",
            parameter=parameter,
        )
    room = model.context_length - prompt
    return room if asked is None else min(asked, room)


def _stops(request: Sampled) -> tuple[str, ...]:
    if request.stop is None:
        return ()
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)


def _sampling(model: Model, request: Sampled) -> Sampling:
    search = model.search

    def chosen(name: str, otherwise: float) -> float:
        given = getattr(request, name)
        return float(search.get(name, otherwise) if given is None else given)

    return Sampling(
        temperature=chosen("temperature", 1.0),
        top_k=int(chosen("top_k", 0)),
        top_p=chosen("top_p", 1.0),
        min_p=chosen("min_p", 0.0),
        seed=None if request.seed is None else request.seed % _SEEDS,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=_biases(model, request.logit_bias or {}),
    )


def _biases(model: Model, given: Mapping[str, float]) -> dict[int, float]:
    found = {}
    for text, bias in given.items():
        if not (text.isascii() and text.isdigit()) or int(text[:20]) >= model.vocabulary:
            raise Refused(
                f"`logit_bias` names {text[:40]!r}, which is no token id in [0, {model.vocabulary})",
                parameter="logit_bias",
            )
        found[int(text)] = bias
    return found
