"""Packages in a Python program: whole answers and streams, awaited or not, from any thread, until it is closed."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_retrieval import checkpoints, made  # noqa: F401 - fixtures
from test_server import eventually

from pipeline.errors import PackageError, QwenOnnxError, UsageError
from pipeline.runtime import retrieval
from pipeline.serve import Generator
from pipeline.serve.api.protocol import ChatCompletion, Completion
from pipeline.serve.api.responses_protocol import Response
from pipeline.serve.inference.engine import Limits
from pipeline.serve.inference.worker import Options
from pipeline.serve.refusals import Busy, Refused, Unavailable, UnknownModel, Unsupported

ROOT = Path(__file__).parents[1]
ASKED = [{"role": "user", "content": "The quick brown fox"}]
FEW: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
LONG: dict[str, Any] = {"max_tokens": 400, "temperature": 0, "logit_bias": {509: -100, 510: -100, 511: -100}}

slow = pytest.mark.slow
pytestmark = [
    # What the exporter says of itself, in the fixtures of packages that embed.
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean"),
]


def opened(package: Path, **more: Any) -> Generator:
    return Generator(package, options=Options(threads=1), **more)


@pytest.fixture(scope="module")
def model(tiny_package: Path) -> Iterator[Generator]:
    with opened(tiny_package) as generator:
        yield generator


def calm(model: Generator) -> bool:
    engine = model.model.engine
    return eventually(lambda: engine.running + engine.waiting == 0, 10)


def text_of(answer: ChatCompletion) -> str:
    text = answer.choices[0].message.content
    assert text
    return text


# Answers


@slow
def test_streams_add_up_to_answers_awaited_or_not(model: Generator) -> None:
    wanted = text_of(model.chat(ASKED, **FEW))
    chunks = list(model.chat(ASKED, stream=True, **FEW))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted
    plain = model.complete("The quick", **FEW)
    pieces = list(model.complete("The quick", stream=True, **FEW))
    assert "".join(piece.choices[0].text for piece in pieces) == plain.choices[0].text

    async def run() -> None:
        assert text_of(await model.achat(ASKED, **FEW)) == wanted
        stream = await model.achat(ASKED, stream=True, **FEW)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == wanted
        assert (await model.acomplete("The quick", **FEW)).choices == plain.choices
        response = await model.arespond("The quick brown fox", max_output_tokens=8, temperature=0)
        assert response.output_text == wanted
        async with await model.arespond("fox", stream=True, max_output_tokens=8) as events:
            assert (await anext(events)).sequence_number == 0

    asyncio.run(run())
    asyncio.run(run())  # in another loop


@slow
def test_answers_can_be_given_back_as_they_are(model: Generator) -> None:
    first = model.chat(ASKED, **FEW)
    again = model.chat([*ASKED, first.choices[0].message, {"role": "user", "content": "And then?"}], **FEW)
    assert again.usage.prompt_tokens > first.usage.prompt_tokens
    plain = [*ASKED, {"role": "assistant", "content": text_of(first)}, {"role": "user", "content": "And then?"}]
    assert model.chat(tuple(plain), **FEW).choices == again.choices


@slow
def test_a_batch_has_its_answers_in_order_and_errors_in_their_places(model: Generator) -> None:
    requests: list[Any] = [
        {"messages": ASKED, **FEW},
        {"prompt": "The quick", **FEW},
        {"input": "The quick brown fox", "max_output_tokens": 8, "temperature": 0},
        {"messages": ASKED, "temprature": 1},
        {"prompt": "x", "stream": True},
        {"query": "x", "documents": ["y"]},
        {"x": 1},
        5,
    ]
    chat, plain, response, *refused = model.batch(requests)
    assert isinstance(chat, ChatCompletion)
    assert isinstance(plain, Completion)
    assert isinstance(response, Response)
    assert text_of(chat) == response.output_text
    assert all(isinstance(error, Refused) for error in refused)
    assert isinstance(refused[2], Unsupported)
    assert [error.parameter for error in refused if isinstance(error, Refused)] == [
        *("temprature", "stream", "model", None, None)
    ]
    many = model.batch([requests[0]] * 40)
    assert {text_of(answer) for answer in many if isinstance(answer, ChatCompletion)} == {text_of(chat)}
    assert len(many) == 40
    wide = asyncio.run(model.abatch([{"messages": ASKED, "n": 8, **FEW}] * 6))
    assert all(isinstance(answer, ChatCompletion) and len(answer.choices) == 8 for answer in wide)
    assert model.batch([]) == []


@slow
def test_several_threads_may_ask_at_once(model: Generator) -> None:
    wanted = text_of(model.chat(ASKED, **FEW))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: text_of(model.chat(ASKED, **FEW)), range(16)))
    assert set(found) == {wanted}


@slow
def test_packages_that_embed_and_rank_do(made: Callable[..., Any]) -> None:  # noqa: F811 - the fixture
    package = made("embed", "float")["package"].path
    reference = retrieval.open_package(package)
    wanted = reference.embed([reference.ids("query", query="bees"), reference.ids("query", query="the sea")])
    with opened(package) as generator:
        found = generator.embed(["bees", "the sea"], input_type="query")
        np.testing.assert_allclose([row.embedding for row in found.data], wanted, atol=1e-5)
        awaited = asyncio.run(generator.aembed("bees", input_type="query"))
        assert awaited.data[0].embedding == pytest.approx(found.data[0].embedding, abs=1e-5)
        (batched,) = generator.batch([{"input": ["bees"], "input_type": "query"}])
        assert not isinstance(batched, QwenOnnxError)
        with pytest.raises(Unsupported, match="generates no text"):
            generator.chat(ASKED)
    with opened(made("rerank", "float")["package"].path) as generator:
        ranking = generator.rerank("bees", ["honey", "ships"])
        assert {row.index for row in ranking.results} == {0, 1}
        assert asyncio.run(generator.arerank("bees", ["honey", "ships"])).results == ranking.results


# Refusals


@slow
def test_what_is_refused_is_refused_as_by_the_server(model: Generator) -> None:
    for fields, kind, parameter in (
        ({"temprature": 1}, Refused, "temprature"),
        ({"temperature": 3}, Refused, "temperature"),
        ({"stream": 1}, Refused, "stream"),
        ({"n": 9, "stream": True}, Refused, "n"),
        ({"model": "other"}, UnknownModel, "model"),
        ({"temperature": float("nan")}, Refused, None),
        ({"seed": np.int64(3)}, Refused, None),
        ({"stop": {1, 2}}, Refused, None),
        ({"user": "half a pair \ud800"}, Refused, None),
    ):
        with pytest.raises(kind) as caught:
            model.chat(ASKED, **fields)
        assert caught.value.parameter == parameter
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(Refused):
        model.chat(deep)
    with pytest.raises(UnknownModel):
        asyncio.run(model.achat(ASKED, model="other", stream=True))


def test_what_is_no_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(PackageError):
        Generator(tmp_path).open()
    with pytest.raises(PackageError):
        asyncio.run(Generator(tmp_path / "nowhere").__aenter__())


@slow
def test_a_model_that_cannot_be_loaded_says_why_and_leaves_nothing(tiny_package: Path, tmp_path: Path) -> None:
    import shutil

    import psutil

    broken = shutil.copytree(tiny_package, tmp_path / "broken")
    (broken / "model.onnx").write_bytes(b"no model")
    threads = threading.active_count()
    generator = opened(broken)
    for _ in range(2):
        with pytest.raises(QwenOnnxError):
            generator.open()
    generator.close()
    assert threading.active_count() == threads
    assert not [child for child in psutil.Process().children() if str(broken) in " ".join(child.cmdline())]


@slow
def test_a_full_queue_is_told(tiny_package: Path) -> None:
    with opened(tiny_package, limits=Limits(queue=1)) as generator, ThreadPoolExecutor(12) as threads:
        asked = [threads.submit(generator.chat, ASKED, **LONG) for _ in range(12)]
        errors = [one.exception() for one in asked]
    assert any(isinstance(error, Busy) for error in errors)
    assert any(error is None for error in errors)


# Leaving


@slow
@pytest.mark.parametrize("how", ["close", "with", "forgotten", "async"])
def test_a_stream_that_is_left_early_is_given_up(model: Generator, how: str) -> None:
    engine = model.model.engine
    before = engine.counts.cancelled

    async def some() -> None:
        stream = await model.achat(ASKED, stream=True, **LONG)
        async for _ in stream:
            break
        await stream.aclose()
        assert [chunk async for chunk in stream] == []

    if how == "async":
        asyncio.run(some())
    else:
        stream = model.chat(ASKED, stream=True, **LONG)
        assert next(stream).choices
        if how == "close":
            stream.close()
            assert list(stream) == []
        elif how == "with":
            with stream:
                next(stream)
        del stream
        gc.collect()
    assert calm(model)
    assert engine.counts.cancelled == before + 1
    assert text_of(model.chat(ASKED, **FEW))


@slow
def test_a_stream_that_another_thread_closes_ends(model: Generator) -> None:
    stream = model.chat(ASKED, stream=True, n=8, **LONG)
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: sum(1 for _ in stream))
        time.sleep(0.02)
        stream.close()
        reading.result(10)
    assert calm(model)


@slow
def test_a_task_that_is_cancelled_gives_its_answer_up(model: Generator) -> None:
    engine = model.model.engine
    before = engine.counts.cancelled

    async def run() -> None:
        task = asyncio.create_task(model.achat(ASKED, n=8, **LONG))
        while not engine.running:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert calm(model)
    assert engine.counts.cancelled > before


@slow
def test_what_waits_when_it_is_closed_is_told(tiny_package: Path) -> None:
    generator = opened(tiny_package).open()
    engine = generator.model.engine
    stream = generator.chat(ASKED, stream=True, **LONG)
    next(stream)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(generator.chat, ASKED, n=8, **LONG) for _ in range(2)]
        assert eventually(lambda: engine.counts.requests >= 10, 10)
        generator.close()
        for one in waiting:
            with pytest.raises(Unavailable):
                one.result(10)
    with pytest.raises(UsageError, match="closed"):
        next(stream)
    assert engine.pid is None
    generator.close()
    for ask in (lambda: generator.chat(ASKED), lambda: generator.batch([]), lambda: generator.model, generator.open):
        with pytest.raises(UsageError, match="closed"):
            ask()
    with pytest.raises(UsageError, match="closed"):
        asyncio.run(generator.achat(ASKED))


def test_what_is_not_open_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not open"):
        Generator(tmp_path).chat(ASKED)


@slow
def test_a_killed_model_is_told_and_comes_back(tiny_package: Path) -> None:
    with opened(tiny_package) as generator:
        engine = generator.model.engine
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(generator.chat, ASKED, n=8, **LONG)
            assert eventually(lambda: engine.running > 0, 10)
            assert engine.pid
            os.kill(engine.pid, signal.SIGKILL)
            with pytest.raises(Unavailable):
                asked.result(30)
        assert text_of(generator.chat(ASKED, **FEW))


PROGRAM = """
import sys
from pipeline.serve import Generator
from pipeline.serve.inference.worker import Options
model = Generator(sys.argv[1], options=Options(threads=1)).open()
stream = model.chat([{"role": "user", "content": "fox"}], stream=True)
print(next(stream).object, model.model.engine.pid)
"""


@slow
def test_a_program_that_closes_nothing_ends_and_leaves_no_process(tiny_package: Path) -> None:
    import psutil

    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(tiny_package)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    kind, pid = done.stdout.split()
    assert (done.returncode, done.stderr, kind) == (0, "", "chat.completion.chunk")
    assert not psutil.pid_exists(int(pid))


@slow
def test_a_generator_that_nobody_has_is_closed(tiny_package: Path) -> None:
    generator = opened(tiny_package).open()
    engine = generator.model.engine
    stream = generator.chat(ASKED, stream=True, **FEW)
    del generator
    gc.collect()
    assert len(list(stream)) > 1  # who has the stream has the generator
    del stream
    gc.collect()
    assert eventually(lambda: engine.pid is None, 10)


# The page of examples


EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.DOTALL)


@slow
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(number: int, tiny_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "PACKAGE" in EXAMPLES[number]
    code = EXAMPLES[number].replace('"PACKAGE"', repr(str(tiny_package)))
    exec(compile(code, f"docs/python.md, example {number}", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out
