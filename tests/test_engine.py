"""The engine: the queue, the process of the model, and the caches of conversations."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import PackageError, UsageError
from pipeline.runtime import chat, generate, session as sessions
from pipeline.runtime.sampling import Sampling
from pipeline.runtime.session import Session
from pipeline.serve.events import LENGTH, STOP, End, Piece, Prefilled, Request, request_of
from pipeline.serve.inference import answering, engine as engines, slots
from pipeline.serve.inference.answering import Stops
from pipeline.serve.inference.engine import Engine, Limits
from pipeline.serve.inference.worker import Options
from pipeline.serve.refusals import Busy, TimedOut, Unavailable

PROMPT = (5, 17, 40, 8, 99, 23)


@pytest.mark.parametrize(
    ("stops", "pieces", "wanted"),
    [
        (["ab"], ["xa", "b", "c"], ("x", "ab")),
        (["ab"], ["xa", "ac"], ("xaac", "")),
        (["aab"], ["aa", "ab"], ("a", "aab")),
        (["bc", "abcd"], ["abcd"], ("a", "bc")),
        ([], ["abc"], ("abc", "")),
        (["好"], ["你", "好吗"], ("你", "好")),
    ],
)
def test_stops_are_found_however_text_is_cut(stops: list[str], pieces: list[str], wanted: tuple[str, str]) -> None:
    text = "".join(pieces)
    for cut in ([*pieces], [*text], [text]):
        found, held, hit = Stops(stops), "", ""
        for piece in cut:
            final, hit = found.push(piece)
            held += final
            if hit:
                break
        assert (held + ("" if hit else found.rest()), hit) == wanted


def test_a_request_crosses_the_boundary_unchanged() -> None:
    request = Request(
        PROMPT,
        3,
        Sampling(0.5, seed=3, logit_bias={4: -1.5}),
        ("a",),
        2,
        "g",
        True,
        True,
        9,
        "x",
        (b"\x00\xff",),
        False,
    )
    assert request_of(request.as_dict()) == request


@pytest.fixture(scope="module")
def session(tiny_package: Path) -> Session:
    return sessions.open_package(tiny_package, 1)


@asynccontextmanager
async def started(package: Path, limits: Limits | None = None, **options: Any) -> AsyncIterator[Engine]:
    engine = Engine(package, Options(threads=1, **options), limits)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop(0)


async def answered(engine: Engine, request: Request, client: str = "") -> tuple[list[int], End]:
    events = [event async for event in engine.submit(request, client)]
    assert isinstance(events[-1], End)
    return [event.token for event in events if isinstance(event, Piece)], events[-1]


@pytest.mark.slow
def test_answers_are_those_of_generate(tiny_package: Path, session: Session) -> None:
    drawn = Sampling(2.0, top_k=40, seed=7)
    wanted = [list(generate.stream(session, PROMPT, 24, sampling)) for sampling in (Sampling(), drawn)]

    async def run() -> None:
        async with started(tiny_package) as engine:
            assert engine.state == engines.READY
            for sampling, tokens in zip((Sampling(), drawn), wanted, strict=True):
                found, end = await answered(engine, Request(PROMPT, 24, sampling, cache=False))
                assert found == tokens
                assert (end.prompt, end.tokens) == (len(PROMPT), len(tokens))
            together = await asyncio.gather(*(answered(engine, Request(PROMPT, 24, drawn)) for _ in range(6)))
            assert all(found == wanted[1] for found, _ in together)
            assert engine.counts.requests == 8

    asyncio.run(run())


@pytest.mark.slow
def test_the_next_turn_of_a_conversation_is_not_read_again(tiny_package: Path, session: Session) -> None:
    async def run() -> None:
        async with started(tiny_package, parallel=2) as engine:
            first, _ = await answered(engine, Request(PROMPT, 12))
            turn = (*PROMPT, *first, 31, 32, 33)
            found, end = await answered(engine, Request(turn, 12))
            assert end.cached == len(PROMPT) + len(first) - (len(first) == 12)
            assert found == list(generate.stream(session, turn, 12))
            other, end = await answered(engine, Request((7, 8, 9, 10), 12))
            assert end.cached == 0
            assert other == list(generate.stream(session, (7, 8, 9, 10), 12))
            again, end = await answered(engine, Request(turn, 12))
            assert (again, end.cached) == (found, len(turn) - 2)
            _, end = await answered(engine, Request(turn, 12, cache=False))
            assert end.cached == 0

    asyncio.run(run())


@pytest.mark.slow
def test_a_cache_that_is_full_grows(tiny_package: Path, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "_SMALL", 16)
    monkeypatch.setattr(slots, "_USUAL", 4)
    host = answering.Host(session, chat.load(tiny_package), slots.Slots(1), {})
    request = Request(PROMPT, 60, Sampling(logit_bias=dict.fromkeys(session.eos, -100.0)))
    events = list(answering.answer(host, request))
    found = [event.token for event in events if isinstance(event, Piece)]
    assert found == list(generate.stream(session, PROMPT, 60, request.sampling))
    assert [event.done for event in events if isinstance(event, Prefilled)] == [6, 16, 32, 64]
    assert events[-1] == End(LENGTH, "", len(PROMPT), 0, 60)


@pytest.mark.slow
def test_drafts_change_no_answer(tiny_package: Path, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "_SMALL", 16)
    monkeypatch.setattr(slots, "_USUAL", 4)
    tokenizer = chat.load(tiny_package)
    plain = answering.Host(session, tokenizer, slots.Slots(1), {})
    drafted = answering.Host(session, tokenizer, slots.Slots(1), {}, lookup=True)
    endless = replace(session, config={**session.config, "model": {**session.config["model"], "eos_token_id": []}})
    for host in (plain, drafted):
        host.session = endless
    read: list[int] = []
    append = generate.Reader.append
    monkeypatch.setattr(
        generate.Reader, "append", lambda self, ids, output: (read.append(len(ids)), append(self, ids, output))[1]
    )
    text = tuple(range(20, 40))
    for request in (Request(PROMPT, 1), Request(text * 2, 60), Request((*text * 2, 7), 60, stop=("zzz",))):
        wanted, found = (list(answering.answer(host, request)) for host in (plain, drafted))
        assert [one for one in wanted if isinstance(one, Piece)] == [one for one in found if isinstance(one, Piece)]
        assert replace(wanted[-1], cached=0) == replace(found[-1], cached=0)
    assert read
    assert max(read) > 2
    turns = list(answering.answer(drafted, Request((*text * 2, 7, 8, 9), 4)))
    assert turns[-1].cached == 41  # what was drafted and not taken is forgotten


@pytest.mark.slow
def test_what_is_asked_of_an_answer_is_done(tiny_package: Path, session: Session) -> None:
    plain = list(generate.stream(session, PROMPT, 12))

    async def run() -> None:
        async with started(tiny_package) as engine:
            banned = Sampling(logit_bias={plain[0]: -100.0})
            found, _ = await answered(engine, Request(PROMPT, 12, banned))
            assert plain[0] not in found
            events = [event async for event in engine.submit(Request(PROMPT, 12, top_logprobs=3))]
            pieces = [event for event in events if isinstance(event, Piece)]
            assert all(piece.top[0] == (piece.token, piece.logprob) and len(piece.top) == 3 for piece in pieces)
            assert isinstance(events[0], Prefilled)
            text = "".join(piece.text for piece in pieces)
            stop = text[3:6]
            events = [event async for event in engine.submit(Request(PROMPT, 12, stop=(stop,)))]
            end = events[-1]
            assert isinstance(end, End)
            assert (end.reason, end.stopped_by) == (STOP, stop)
            shown = "".join(event.text for event in events if isinstance(event, Piece)) + end.text
            assert shown == text[: text.index(stop)]
            _, end = await answered(engine, Request(PROMPT, 2))
            assert end.reason == LENGTH
            with pytest.raises(UsageError, match="outside"):
                await answered(engine, Request((100_000,), 2))
            with pytest.raises(UsageError, match="no adapter"):
                await answered(engine, Request(PROMPT, 2, adapter="x"))
            assert (await answered(engine, Request(PROMPT, 12)))[0] == plain

    asyncio.run(run())


def endless(session: Session) -> Request:
    return Request(PROMPT, 100_000, Sampling(logit_bias=dict.fromkeys(session.eos, -100.0)))


@pytest.mark.slow
def test_a_full_queue_refuses_and_clients_take_turns(tiny_package: Path, session: Session) -> None:
    async def run() -> None:
        async with started(tiny_package, Limits(queue=3), parallel=1) as engine:
            first = engine.submit(endless(session), "a")
            order: list[str] = []

            async def ask(client: str) -> None:
                await answered(engine, Request(PROMPT, 2), client)
                order.append(client)

            waiting = [asyncio.create_task(ask(client)) for client in ("b", "b", "c")]
            await asyncio.sleep(0)
            with pytest.raises(Busy) as refused:
                engine.submit(Request(PROMPT, 2), "d")
            assert refused.value.retry_after >= 1
            first.cancel()
            await asyncio.gather(*waiting)
            assert order == ["b", "c", "b"]
            assert (engine.waiting, engine.running) == (0, 0)

    asyncio.run(run())


@pytest.mark.slow
def test_who_leaves_makes_room(tiny_package: Path, session: Session) -> None:
    async def run() -> None:
        async with started(tiny_package, parallel=1) as engine:
            stream = engine.submit(endless(session))
            async for event in stream:
                if isinstance(event, Piece):
                    break
            stream.cancel()
            await answered(engine, Request(PROMPT, 2))
            engine.limits = Limits(timeout=0.05)
            with pytest.raises(TimedOut):
                await answered(engine, endless(session))
            engine.limits = Limits()
            await answered(engine, Request(PROMPT, 2))
            assert (engine.counts.cancelled, engine.counts.timed_out) == (1, 1)

    asyncio.run(run())


@pytest.mark.slow
def test_a_process_that_ends_is_replaced(tiny_package: Path, session: Session) -> None:
    async def run() -> None:
        async with started(tiny_package, parallel=1) as engine:
            stream = engine.submit(endless(session))
            waiting = asyncio.create_task(answered(engine, Request(PROMPT, 4)))
            async for event in stream:
                if isinstance(event, Piece):
                    break
            os.kill(engine.pid or 0, signal.SIGKILL)
            with pytest.raises(Unavailable, match="failed while it answered"):
                async for _ in stream:
                    pass
            assert engine.state == engines.RESTARTING
            assert "signal 9" in engine.why
            found, _ = await waiting
            assert found == list(generate.stream(session, PROMPT, 4))
            assert (engine.state, engine.counts.restarts) == (engines.READY, 1)

    asyncio.run(run())


@pytest.mark.slow
def test_a_model_that_nobody_asks_is_unloaded_and_comes_back(tiny_package: Path) -> None:
    async def run() -> None:
        async with started(tiny_package, Limits(idle=0.2, stall=2.0)) as engine:
            while engine.state != engines.IDLE or engine.pid is not None:
                await asyncio.sleep(0.05)
            _, end = await answered(engine, Request(PROMPT, 4))
            assert end.tokens
            assert engine.counts.restarts == 0

    asyncio.run(run())


@pytest.mark.slow
def test_a_change_is_not_missed_before_it_is_awaited(tiny_package: Path) -> None:
    async def run() -> None:
        async with started(tiny_package) as engine:
            change = engine._change()
            engine._signal()
            await asyncio.wait_for(change, 10)

    asyncio.run(run())


@pytest.mark.slow
def test_a_stop_lets_answers_come_to_their_end(tiny_package: Path, session: Session) -> None:
    async def run() -> None:
        async with started(tiny_package, parallel=1) as engine:
            asked = [asyncio.create_task(answered(engine, Request(PROMPT, 12))) for _ in range(3)]
            await asyncio.sleep(0)
            await engine.stop(60)
            assert all(found == list(generate.stream(session, PROMPT, 12)) for found, _ in await asyncio.gather(*asked))
            assert engine.pid is None
            with pytest.raises(Unavailable):
                engine.submit(Request(PROMPT, 2))
        async with started(tiny_package, parallel=1) as engine:
            stream = engine.submit(endless(session))
            await engine.stop(0)
            with pytest.raises(Unavailable):
                async for _ in stream:
                    pass

    asyncio.run(run())


@pytest.mark.slow
def test_a_package_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    async def run() -> None:
        with pytest.raises(PackageError, match="genai_config"):
            async with started(tmp_path):
                pass

    asyncio.run(run())
