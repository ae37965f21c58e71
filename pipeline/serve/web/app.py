"""The HTTP side of a server of packages: routes, their types, and what becomes of errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from pipeline import __version__
from pipeline.errors import QwenOnnxError
from pipeline.serve.api import (
    bodies,
    chat,
    completions,
    embeddings,
    protocol as types,
    responses,
    responses_protocol,
    tokens,
)
from pipeline.serve.inference.models import Models
from pipeline.serve.refusals import NotAllowed, NotFound, Refused
from pipeline.serve.web import failures, health, logs, openapi, page, sse
from pipeline.serve.web.front import Guarded, Observed
from pipeline.serve.web.gate import gated
from pipeline.serve.web.health import Health
from pipeline.serve.web.metrics import KIND, Metrics
from pipeline.serve.web.security import Budgets
from pipeline.serve.web.settings import Settings

Handler = Callable[[Request], Awaitable[Response]]

_DESCRIPTION = "Packages of Qwen models behind the API of OpenAI. Errors have its form, too."
_HEALTH = ("/health", "/ready")
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_STATUSES = {
    400: "The request cannot be honoured; the message says why.",
    401: "There is no API key, or another one.",
    403: "The server is not called so.",
    404: "There is no such model.",
    408: "The request has not arrived in time.",
    413: "The request is too large.",
    429: "The key has had its requests or tokens of the minute; see Retry-After.",
    500: "The server failed.",
    503: "The queue is full, or the model is not there; see Retry-After.",
    504: "The answer took too long.",
}
_GET = (401, 403, 404, 500)


@dataclass(frozen=True)
class Call:
    """A route that takes JSON.

    Attributes:
        takes, gives: types of the request and of the whole answer.
        complete: makes it, of models, request and client.
        stream: makes its chunks, where they can be had.
        named: whether they are events with names.
    """

    path: str
    takes: type[types.Given]
    gives: type[BaseModel]
    complete: Callable[[Models, Any, str], Coroutine[Any, Any, BaseModel]]
    stream: Callable[[Models, Any, str], Coroutine[Any, Any, Any]] | None = None
    named: bool = False


async def _tokenize(models: Models, request: types.TokenizeRequest, _: str) -> types.Tokenized:
    return await tokens.tokenize(models, request)


async def _detokenize(models: Models, request: types.DetokenizeRequest, _: str) -> types.Detokenized:
    return await tokens.detokenize(models, request)


CALLS = (
    Call("/v1/chat/completions", types.ChatRequest, types.ChatCompletion, chat.complete, chat.stream),
    Call("/v1/completions", types.CompletionRequest, types.Completion, completions.complete, completions.stream),
    Call(
        "/v1/responses",
        responses_protocol.ResponseRequest,
        responses_protocol.Response,
        responses.complete,
        responses.stream,
        named=True,
    ),
    Call("/v1/embeddings", types.EmbeddingRequest, types.Embeddings, embeddings.embed),
    Call("/v1/rerank", types.RerankRequest, types.Ranking, embeddings.rerank),
    Call("/tokenize", types.TokenizeRequest, types.Tokenized, _tokenize),
    Call("/detokenize", types.DetokenizeRequest, types.Detokenized, _detokenize),
)


def create(models: Models, settings: Settings | None = None) -> FastAPI:
    """The app that serves models; whoever runs it starts and stops their engines.

    ``app.state.stopping`` is set when no more requests are taken.
    """
    settings = settings or Settings()
    app = FastAPI(title="qwen-onnx", version=__version__, openapi_url=None, docs_url=None, redoc_url=None)
    metrics, budgets = Metrics(models), Budgets(settings.requests_per_minute, settings.tokens_per_minute)
    app.state.stopping = False
    guarded = gated(models, settings, budgets)
    for call in CALLS:
        _add(app, "POST", call.path, _handler(call, guarded, settings), call.gives, _responses(call), call.takes)
    _add_models(app, models)
    _add_watching(app, models, metrics)
    free: tuple[str, ...] = _HEALTH
    if settings.page:
        app.router.routes.extend(page.routes())
        free += tuple(page.PATHS)
    app.add_exception_handler(QwenOnnxError, _told)
    app.add_exception_handler(bodies.Gone, _told)
    app.add_exception_handler(HTTPException, _lost)
    app.add_middleware(Guarded, settings=settings, budgets=budgets, free=free)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-api-key", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(Observed, count=metrics.request, known=free)
    kinds = [call.takes for call in CALLS]
    app.openapi = lambda: openapi.document(app, kinds, bool(settings.keys), _DESCRIPTION)  # type: ignore[method-assign]
    return app


def _add(
    app: FastAPI,
    method: str,
    path: str,
    handler: Handler,
    gives: type[BaseModel] | None,
    responses: dict[int | str, dict[str, Any]],
    takes: type[BaseModel] | None = None,
) -> None:
    """A route that returns its responses itself; the types are for the document."""
    app.add_api_route(
        path,
        handler,
        methods=[method],
        response_model=gives,
        responses=responses,
        openapi_extra={**openapi.names_in(path), **(openapi.body_of(takes) if takes else {})},
        summary=(takes or gives or Response).__name__,
        operation_id="_".join([method.lower(), *path.replace("/", " ").replace("{", " ").replace("}", " ").split()]),
    )


def _responses(call: Call | None) -> dict[int | str, dict[str, Any]]:
    """What the document says of statuses."""
    statuses = _STATUSES if call else _GET
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": types.ErrorAnswer, "description": _STATUSES[status]} for status in statuses
    }
    if call and call.stream:
        text = {"type": "string", "description": "Events of JSON, with `stream: true`."}
        found[200] = {"description": "The answer.", "content": {sse.KIND: {"schema": text}}}
    return found


def _handler(call: Call, models: Models, settings: Settings) -> Handler:
    async def handle(request: Request) -> Response:
        body = await bodies.read(request.receive, request.headers, settings.max_body, settings.body_seconds)
        facts, client = request.state.facts, request.state.client
        facts |= {"body": logs.digest(body), "bytes": len(body)}
        asked = types.parse(call.takes, await bodies.parse(body))
        _note_model(facts, models, getattr(asked, "model", None))
        _check_limit(asked, settings.max_tokens)
        if call.stream and getattr(asked, "stream", None):
            chunks = await sse.unless_gone(request.receive, call.stream(models, asked, client))
            if chunks is None:
                raise bodies.Gone
            source = sse.Source(chunks, call.named, lambda error: _note(facts, error))
            await source.open()
            return sse.Events(source, settings.ping_seconds)
        answer = await sse.unless_gone(request.receive, call.complete(models, asked, client))
        if answer is None:
            raise bodies.Gone
        return Response(answer.model_dump_json(), media_type="application/json")

    return handle


def _note_model(facts: dict[str, Any], models: Models, name: str | None) -> None:
    """Log the model of a request, if it is one: another name may be anything."""
    with contextlib.suppress(Refused):
        if name is not None:
            models.find(name)
            facts["model"] = name


def _note(facts: dict[str, Any], error: Exception) -> None:
    """Log that a stream failed after its status was sent."""
    facts["failed"] = failures.described(error)[1]["error"]["code"]
    if failures.is_bug(error):
        logs.bug(error, id=facts["id"])


def _check_limit(asked: BaseModel, most: int) -> None:
    for name in _LIMITS:
        wanted = getattr(asked, name, None)
        if most and wanted is not None and wanted > most:
            raise Refused(f"`{name}` is {wanted}", why=f"this server takes {most} (--max-tokens)", parameter=name)


def _add_models(app: FastAPI, models: Models) -> None:
    async def cards(request: Request) -> Response:  # noqa: ARG001
        return Response(
            (await asyncio.to_thread(tokens.cards, models)).model_dump_json(), media_type="application/json"
        )

    async def card(request: Request) -> Response:
        found = await asyncio.to_thread(tokens.card, models, request.path_params["model"])
        return Response(found.model_dump_json(), media_type="application/json")

    _add(app, "GET", "/v1/models", cards, types.ModelList, _responses(None))
    _add(app, "GET", "/v1/models/{model}", card, types.ModelCard, _responses(None))


def _add_watching(app: FastAPI, models: Models, metrics: Metrics) -> None:
    """Health, metrics and the document."""

    def told(request: Request, found: Health, good: bool) -> Response:
        shown = found if request.state.known else Health(status=found.status, reasons=[], models={})
        headers = {} if good else {"retry-after": "1"}
        return Response(shown.model_dump_json(), 200 if good else 503, headers, "application/json")

    async def healthy(request: Request) -> Response:
        found = health.of(models, metrics.paces, app.state.stopping)
        return told(request, found, health.answers(found))

    async def ready(request: Request) -> Response:
        found = health.of(models, metrics.paces, app.state.stopping)
        full = [model.name for model in models if model.engine.waiting >= model.engine.limits.queue]
        found.reasons += [f"the queue of {name} is full" for name in full]
        return told(request, found, health.answers(found) and not full)

    async def measured(request: Request) -> Response:  # noqa: ARG001
        return Response(metrics.text(), media_type=KIND)

    async def described(request: Request) -> Response:  # noqa: ARG001
        return JSONResponse(app.openapi())

    unwell: dict[int | str, dict[str, Any]] = {503: {"model": Health, "description": "Requests are not answered."}}
    errors: dict[int | str, dict[str, Any]] = {
        status: about for status, about in _responses(None).items() if status in {403, 500}
    }
    for path, handler in (("/health", healthy), ("/ready", ready)):
        _add(app, "GET", path, handler, Health, {**errors, **unwell})
        app.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)
    plain: dict[int | str, dict[str, Any]] = {
        200: {"description": "Metrics for Prometheus.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    }
    app.add_api_route(
        "/metrics", measured, methods=["GET"], response_class=Response, responses={**_responses(None), **plain}
    )
    app.add_api_route("/openapi.json", described, methods=["GET"], include_in_schema=False)


async def _told(request: Request, error: Exception) -> Response:
    """The response to what was refused, and to what failed as it may."""
    status, body = failures.described(error)
    request.state.facts["code"] = body["error"]["code"]
    if status == 500:
        logs.bug(error, id=request.state.facts["id"])
    return failures.response(error)


async def _lost(request: Request, error: Exception) -> Response:
    """The response to a path or method that is not served."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        refused: Refused = NotAllowed(f"{request.method} is not taken here", fix="see /openapi.json")
    else:
        refused = NotFound("there is nothing at this path", fix="see /openapi.json")
    found = failures.response(refused)
    found.headers.update(error.headers or {})
    return found
