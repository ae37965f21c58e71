"""What serving costs: ``python tests/serve_bench.py PACKAGE`` on a machine that does nothing else.

``overhead`` times the tokens of one answer four ways, in turns: the plain loop of `pipeline.generate.stream`, the steps
of `pipeline.serve.answering` in the same process, the engine with its process, and the whole server over HTTP. Each is
held against the loop of the same round, so that a machine whose speed drifts tells the same. ``turns`` times the first
token of the second turn of a conversation, with what the first one left in the cache and without.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from pipeline import chat, generate, session
from pipeline.serve import answering
from pipeline.serve.engine import Engine
from pipeline.serve.events import Piece, Request
from pipeline.serve.slots import Slots
from pipeline.serve.worker import Options

TEXT = "Write a long Python module with a class for matrices, all operators, and a docstring for every method."
Timed = tuple[float, list[float]]
"""When it was asked, and when each token came."""


@contextmanager
def serving(package: Path, threads: int) -> Iterator[str]:
    command = [sys.executable, "-m", "pipeline", "serve", f"model={package}", "--trust", "--port", "0", "--json"]
    command += ["--no-self-test", "--log-format", "json", *(["--threads", str(threads)] if threads else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout
    try:
        url = json.loads(process.stdout.readline())["url"]
        assert json.loads(process.stdout.readline())["event"] == "ready"
        yield url
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def over_http(url: str, path: str, body: dict[str, Any]) -> tuple[Timed, str]:
    """The times of the pieces of a streamed answer, and its text."""
    times, texts = [], []
    begin = time.perf_counter()
    body = {"model": "model", "temperature": 0, "stream": True, **body}
    with httpx.stream("POST", url + path, json=body, timeout=600, trust_env=False) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    if text := choice.get("text") or choice.get("delta", {}).get("content"):
                        times.append(time.perf_counter())
                        texts.append(text)
    return (begin, times), "".join(texts)


def overhead(package: Path, threads: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of each way, and how many percent slower than the loop of its round it was."""
    opened, tokenizer = session.open_package(package, threads or None), chat.load(package)
    prompt = tokenizer.encode_chat([{"role": "user", "content": TEXT}])
    request = Request(prompt=tuple(prompt), limit=tokens)
    host = answering.Host(opened, tokenizer, Slots(4), {})

    def loop() -> Timed:
        text = generate.TextStream(tokenizer)
        begin, times = time.perf_counter(), []
        for token in generate.stream(opened, prompt, tokens):
            text.push(token)
            times.append(time.perf_counter())
        return begin, times

    def steps() -> Timed:
        begin = time.perf_counter()
        return begin, [time.perf_counter() for event in answering.answer(host, request) if isinstance(event, Piece)]

    async def measure() -> dict[str, list[float]]:
        engine = Engine(package, Options(threads=threads, self_test=False))
        await engine.start()

        async def engine_stream() -> Timed:
            begin = time.perf_counter()
            return begin, [time.perf_counter() async for event in engine.submit(request) if isinstance(event, Piece)]

        async def http() -> Timed:
            body = {"prompt": prompt, "max_tokens": tokens}
            return (await asyncio.to_thread(over_http, url, "/v1/completions", body))[0]

        async def plain(run: Callable[[], Timed]) -> Timed:
            return run()

        ways = {"loop": lambda: plain(loop), "steps": lambda: plain(steps), "engine": engine_stream, "http": http}
        found: dict[str, list[float]] = {name: [] for name in ways}
        try:
            for number in range(rounds + 1):  # the first one warms up
                order = list(ways)
                order = order[number % 4 :] + order[: number % 4]
                for name in order:
                    _, times = await ways[name]()
                    # Text is held back while a character is not complete, so that pieces may be fewer than tokens.
                    if number:
                        found[name].append((len(times) - 1) / (times[-1] - times[0]))
        finally:
            await engine.stop(0)
        return found

    with serving(package, threads) as url:
        speeds = asyncio.run(measure())
    slower = {
        name: [100 * (base / speed - 1) for base, speed in zip(speeds["loop"], speeds[name], strict=True)]
        for name in speeds
    }
    return {
        name: {
            "tokens_per_second": [round(speed, 2) for speed in speeds[name]],
            "slower_percent": [round(percent, 1) for percent in slower[name]],
            "slower_percent_median": round(statistics.median(slower[name]), 1),
        }
        for name in speeds
    }


def turns(package: Path, threads: int, length: int, rounds: int) -> dict[str, Any]:
    """Seconds to the first token of a second turn, after a first one of ``length`` tokens."""
    tokenizer = chat.load(package)
    warm, cold, sizes = [], [], []
    with serving(package, threads) as url:
        for number in range(rounds):
            text = f"Conversation {number}. " + "The river runs down to the sea, and the ships follow it. " * length
            text = str(tokenizer.decode(tokenizer.encode(text)[:length]))
            messages = [{"role": "user", "content": text}]
            _, answer = over_http(url, "/v1/chat/completions", {"messages": messages, "max_tokens": 16})
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And where do they go?"}]
            sizes.append(len(tokenizer.encode_chat(messages)))
            for times, cache in ((warm, True), (cold, False)):
                asked = {"messages": messages, "max_tokens": 8, "cache_prompt": cache}
                (begin, came), _ = over_http(url, "/v1/chat/completions", asked)
                times.append(round(came[0] - begin, 3))
    return {
        "prompt_tokens": sizes,
        "cached_seconds": warm,
        "cold_seconds": cold,
        "times_faster": round(statistics.median(cold) / statistics.median(warm), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Time what serving costs.")
    parser.add_argument("package", type=Path)
    parser.add_argument("--what", choices=("overhead", "turns"), default="overhead")
    parser.add_argument("--tokens", type=int, default=200, help="of the answer")
    parser.add_argument("--length", type=int, default=1500, help="of the first turn, in tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.what == "overhead":
        found = overhead(options.package, options.threads, options.tokens, options.rounds)
    else:
        found = turns(options.package, options.threads, options.length, options.rounds)
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
