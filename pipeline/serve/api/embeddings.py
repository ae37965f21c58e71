"""`/v1/embeddings` and `/v1/rerank`, free of HTTP."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import UsageError
from pipeline.package import retrieval_config
from pipeline.runtime import retrieval
from pipeline.serve.api import answers
from pipeline.serve.api.protocol import (
    Document,
    Embedding,
    EmbeddingRequest,
    Embeddings,
    InputUsage,
    Ranked,
    Ranking,
    RerankRequest,
)
from pipeline.serve.inference.models import Model, Models
from pipeline.serve.refusals import Refused, TooLong, Unsupported
from pipeline.task import EMBED, RERANK

Rows = list[list[int]]


async def embed(models: Models, request: EmbeddingRequest, client: str = "") -> Embeddings:
    """A vector of each text.

    Raises:
        Refused: of all kinds; its ``parameter`` names the text that is to blame.
    """
    model = _find(models, request.model, EMBED)
    rows = await asyncio.to_thread(_rows, model, request)
    vectors = await model.engine.embed(rows, request.dimensions, client)
    coded = _base64 if request.encoding_format == "base64" else list
    return Embeddings(
        data=[Embedding(index=index, embedding=coded(vector)) for index, vector in enumerate(vectors)],
        model=request.model,
        usage=_usage(rows),
    )


async def rerank(models: Models, request: RerankRequest, client: str = "") -> Ranking:
    """Documents by how relevant they are, equal ones in the order given; raises as `embed` does."""
    model = _find(models, request.model, RERANK)
    documents = [document if isinstance(document, str) else document.text for document in request.documents]
    rows = await asyncio.to_thread(_pairs, model, request, documents)
    scores = await model.engine.rank(rows, client)
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: request.top_n]
    shown = request.return_documents is not False
    return Ranking(
        id=answers.identifier("rerank"),
        model=request.model,
        results=[
            Ranked(
                index=index,
                relevance_score=scores[index],
                document=Document(text=documents[index]) if shown else None,
            )
            for index in order
        ],
        usage=_usage(rows),
    )


def _find(models: Models, name: str, task: str) -> Model:
    model, _ = models.find(name)
    if model.task != task:
        raise Unsupported(f"the model `{name}` does not {task}", why=f"its task is to {model.task}", parameter="model")
    return model


def _rows(model: Model, request: EmbeddingRequest) -> Rows:
    config = retrieval_config.read_config(model.package)
    most = int(config["dimensions"])
    if request.dimensions is not None and request.dimensions > most:
        raise Refused(f"{request.dimensions} dimensions are asked for; the model has {most}", parameter="dimensions")
    form = request.input_type or "document"
    if request.instruction is not None and form != "query":
        raise Refused(
            "`instruction` is for queries",
            why="documents are embedded as they are",
            fix='set `input_type` to "query", or leave it out',
            parameter="instruction",
        )
    given = request.input
    several = isinstance(given, list) and not isinstance(given[0], int)
    texts: Sequence[Any] = given if isinstance(given, list) and several else [given]
    more = {} if request.instruction is None else {"instruction": request.instruction}
    found = []
    for index, text in enumerate(texts):
        place = f"input[{index}]" if several else "input"
        if isinstance(text, str):
            ids = _body(model, config, form, {form: text, **more}, place)
        else:
            ids = _known(model, text, place)
        found.append(_framed(config, ids, bool(request.truncate), place))
    return found


def _pairs(model: Model, request: RerankRequest, documents: Sequence[str]) -> Rows:
    config = retrieval_config.read_config(model.package)
    more = {} if request.instruction is None else {"instruction": request.instruction}
    found = []
    for index, document in enumerate(documents):
        place = f"documents[{index}]"
        ids = _body(model, config, "pair", {"query": request.query, "document": document, **more}, place)
        found.append(_framed(config, ids, bool(request.truncate), place))
    return found


def _body(model: Model, config: Mapping[str, Any], form: str, texts: Mapping[str, str], place: str) -> list[int]:
    try:
        return retrieval.body(model.tokenizer, config, form, texts)
    except UsageError as error:
        raise Refused(error.what, why=error.why, parameter=place) from None


def _known(model: Model, ids: Sequence[int], place: str) -> list[int]:
    if max(ids) >= model.vocabulary:
        raise Refused(f"there are token ids outside [0, {model.vocabulary})", parameter=place)
    return list(ids)


def _framed(config: Mapping[str, Any], ids: Sequence[int], truncate: bool, place: str) -> list[int]:
    most = retrieval.room(config)
    if len(ids) > most and not truncate:
        raise TooLong(
            f"the text has {len(ids)} tokens; the model takes {most}",
            fix="shorten it, set `truncate`, or rebuild the package with a larger generation.context_length",
            parameter=place,
        )
    return retrieval.framed(config, ids, truncate)


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _usage(rows: Rows) -> InputUsage:
    tokens = sum(map(len, rows))
    return InputUsage(prompt_tokens=tokens, total_tokens=tokens)
