"""What serving costs: ``python tests/serve_bench.py PACKAGE`` on a machine that does nothing else.

``overhead`` times the tokens of one answer four ways, in turns: the plain loop of `pipeline.runtime.generate.stream`,
the steps of `pipeline.serve.inference.answering` in the same process, the engine with its process, and the whole server
over HTTP. Each is held against the loop of the same round, so that a machine whose speed drifts tells the same.
``turns`` times the first token of the second turn of a conversation, with what the first one left in the cache and
without.

Seconds of the processor are told beside those of the clock: they hardly depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from pipeline.runtime import chat, generate, session
from pipeline.serve.events import Piece, Request
from pipeline.serve.inference import answering
from pipeline.serve.inference.engine import Engine
from pipeline.serve.inference.slots import Slots
from pipeline.serve.inference.worker import Options

TEXT = "Write a long Python module with a class for matrices, all operators, and a docstring for every method."
Timed = tuple[float, list[float]]
"""When it was asked, and when each token came."""


@contextmanager
def serving(package: Path, threads: int) -> Iterator[tuple[str, psutil.Process]]:
    """Address and process of a server."""
    command = [sys.executable, "-m", "pipeline", "serve", f"model={package}", "--trust", "--port", "0", "--json"]
    command += ["--no-self-test", "--log-format", "json", *(["--threads", str(threads)] if threads else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout
    try:
        url = json.loads(process.stdout.readline())["url"]
        assert json.loads(process.stdout.readline())["event"] == "ready"
        yield url, psutil.Process(process.pid)
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


def used(process: psutil.Process) -> float:
    """Seconds of the processor that a process has used, its children aside."""
    times = process.cpu_times()
    return float(times.user + times.system)


def overhead(package: Path, threads: int, tokens: int, rounds: int, seconds: int) -> dict[str, Any]:
    """Tokens a second of each way, how many percent slower than the loop of its round it was, and what it used.

    No round is begun after so many seconds.
    """
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

    async def measure(url: str, server: psutil.Process) -> list[dict[str, dict[str, float]]]:
        engine = Engine(package, Options(threads=threads, self_test=False))
        await engine.start()
        assert engine.pid
        here, model = psutil.Process(), psutil.Process(engine.pid)
        served = next(child for child in server.children() if "pipeline.serve.inference.worker" in child.cmdline())

        async def engine_stream() -> Timed:
            begin = time.perf_counter()
            return begin, [time.perf_counter() async for event in engine.submit(request) if isinstance(event, Piece)]

        async def http() -> Timed:
            body = {"prompt": prompt, "max_tokens": tokens}
            return (await asyncio.to_thread(over_http, url, "/v1/completions", body))[0]

        async def plain(run: Callable[[], Timed]) -> Timed:
            return run()

        ways: dict[str, tuple[Callable[[], Awaitable[Timed]], dict[str, psutil.Process]]] = {
            "loop": (lambda: plain(loop), {"model": here}),
            "steps": (lambda: plain(steps), {"model": here}),
            "engine": (engine_stream, {"model": model, "engine": here}),
            "http": (http, {"model": served, "server": server, "client": here}),
        }
        found: list[dict[str, dict[str, float]]] = []
        try:
            for number in range(rounds + 1):  # the first one warms up
                order = [list(ways)[(number + place) % 4] for place in range(4)]
                found.append({})
                for name in order:
                    run, processes = ways[name]
                    before = {part: used(process) for part, process in processes.items()}
                    _, times = await run()
                    # Text is held back while a character is not complete, so that pieces may be fewer than tokens.
                    speed = {"tokens_per_second": (len(times) - 1) / (times[-1] - times[0])}
                    for part, process in processes.items():
                        speed[f"{part}_cpu_ms"] = 1000 * (used(process) - before[part]) / len(times)
                    found[-1][name] = speed
                print(f"round {number}", json.dumps(found[-1]), file=sys.stderr, flush=True)
                if time.monotonic() > deadline:
                    break
        finally:
            await engine.stop(0)
        return found[1:] or found

    deadline = time.monotonic() + seconds
    with serving(package, threads) as (url, server):
        speeds = asyncio.run(measure(url, server))
    report: dict[str, Any] = {}
    for name in speeds[0]:
        slower = [100 * (one["loop"]["tokens_per_second"] / one[name]["tokens_per_second"] - 1) for one in speeds]
        report[name] = {figure: [round(one[name][figure], 2) for one in speeds] for figure in speeds[0][name]}
        report[name] |= {
            "slower_percent": [round(percent, 1) for percent in slower],
            "slower_percent_median": round(statistics.median(slower), 1),
        }
    return report


def turns(package: Path, threads: int, length: int, rounds: int) -> dict[str, Any]:
    """Seconds to the first token of a second turn, after a first one of ``length`` tokens."""
    tokenizer = chat.load(package)
    warm, cold, sizes = [], [], []
    with serving(package, threads) as (url, _):
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
            print(f"round {number}: cached {warm[-1]} s, cold {cold[-1]} s", file=sys.stderr, flush=True)
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
    parser.add_argument("--seconds", type=int, default=600, help="after which no round of `overhead` is begun")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server is ended in any case
    if options.what == "overhead":
        found = overhead(options.package, options.threads, options.tokens, options.rounds, options.seconds)
    else:
        found = turns(options.package, options.threads, options.length, options.rounds)
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
