"""Asks a server much at once, and checks that each answer is complete and its own: ``load_test.py URL --json``.

Every prompt has a marker of its own and is asked alone first. Many clients then ask the same prompts at temperature 0,
so that an answer which is not that of its prompt belongs to another one, or to none. Needs httpx, and a server that is
idle otherwise. Exit codes: 0, 1 when an answer is lost or mixed, 2 when there is nothing to test.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import itertools
import json
import math
import os
import random
import statistics
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

VARIABLE = "QWEN_ONNX_API_KEYS"
_BUSY = (429, 503)  # statuses that say: ask again, and when
_MOST_CLIENTS, _MOST_REQUESTS, _MOST_SECONDS = 1000, 100_000, 3600
_WARM = 0.25  # of the answers, after which memory is expected to stay as it is


class Unusable(Exception):  # noqa: N818 - of a server or an option
    """There is nothing to test."""


@dataclass
class Answer:
    """What became of one request.

    Attributes:
        prompt: number of its prompt.
        ids: of the chunks that came; a stream has one.
        waits: seconds that the server told it to wait, one for each time that it was busy.
        problem: why it is not a whole answer; empty when it is one.
        refused: that the server was busy as often as it was asked; such an answer is not lost, it was never begun.
    """

    prompt: int
    text: str = ""
    ids: tuple[str, ...] = ()
    tokens: int = 0
    first: float = 0.0
    seconds: float = 0.0
    statuses: list[int] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    untold: int = 0
    problem: str = ""
    refused: bool = False


@dataclass(frozen=True)
class Verdict:
    """Sentences about the answers that are lost, and those that are mixed."""

    lost: tuple[str, ...]
    mixed: tuple[str, ...]


def check(references: Sequence[str], answers: Iterable[Answer]) -> Verdict:
    """Hold answers against those that each prompt got when it was asked alone."""
    lost: list[str] = []
    mixed: list[str] = []
    owners: dict[str, int] = {}
    for number, answer in enumerate(answers):
        name = f"request {number} (prompt {answer.prompt})"
        for one in set(answer.ids):
            if owners.setdefault(one, number) != number:
                mixed.append(f"{name} has chunks of the id {one}, as request {owners[one]} has")
        if len(set(answer.ids)) > 1:
            mixed.append(f"{name} has chunks of {len(set(answer.ids))} answers")
        if answer.refused:
            continue
        if answer.problem:
            lost.append(f"{name}: {answer.problem}")
        elif answer.text != references[answer.prompt]:
            others = [index for index, text in enumerate(references) if text == answer.text]
            whose = f"is that of prompt {others[0]}" if others else "is that of no prompt"
            mixed.append(f"{name}: {answer.text!r} {whose}; alone it was {references[answer.prompt]!r}")
    return Verdict(tuple(lost), tuple(mixed))


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Of the straight line with the least squares; None where there is no telling."""
    if len({x for x, _ in points}) < 3:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def prompts(count: int) -> list[str]:
    """Prompts whose answers differ, the same ones each time."""
    chosen = random.Random(1)  # noqa: S311 - nothing is secret here
    letters = "bcdfghjkmnpqrtvwxz"
    markers = ["-".join("".join(chosen.choices(letters, k=3)) for _ in range(3)) for _ in range(count)]
    return [f"Say the word {marker} and nothing else.\n{marker}" for marker in markers]


@dataclass
class Load:
    """A run against a server."""

    client: httpx.AsyncClient
    model: str
    limit: int
    cache: bool
    stop: float
    answers: list[Answer] = field(default_factory=list)

    async def ask(self, prompt: int, text: str, limit: int = 0) -> Answer:
        """One answer; waits and asks again as long as the server is busy, and there is time."""
        answer = Answer(prompt)
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": limit or self.limit,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "cache_prompt": self.cache,
        }
        begin = time.perf_counter()
        while True:
            try:
                if await self._try(answer, body):
                    break
            except httpx.HTTPError as error:
                answer.problem = f"the connection failed: {error!r}"
                break
            if time.monotonic() + answer.waits[-1] > self.stop:
                answer.problem, answer.refused = "the server was busy until the end", True
                break
            await asyncio.sleep(answer.waits[-1])
        answer.seconds = time.perf_counter() - begin
        return answer

    async def _try(self, answer: Answer, body: dict[str, Any]) -> bool:
        """Ask once; false when the server is busy."""
        begin = time.perf_counter()
        async with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
            answer.statuses.append(response.status_code)
            if response.status_code in _BUSY:
                told = response.headers.get("retry-after", "")
                answer.untold += not told.isdigit()
                answer.waits.append(float(told) if told.isdigit() else 1.0)
                await response.aread()
                return False
            if response.status_code != 200:
                answer.problem = f"status {response.status_code}: {(await response.aread())[:200]!r}"
                return True
            ids, texts, reason, done = [], [], "", False
            async for line in response.aiter_lines():
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if data == "[DONE]":
                    done = True
                elif data:
                    event = json.loads(data)
                    if "error" in event:
                        answer.problem = f"the stream ended with {event['error']['message']!r}"
                        continue
                    ids.append(event["id"])
                    answer.tokens = (event.get("usage") or {}).get("completion_tokens", answer.tokens)
                    for choice in event["choices"]:
                        reason = choice.get("finish_reason") or reason
                        if piece := choice["delta"].get("content"):
                            answer.first = answer.first or time.perf_counter() - begin
                            texts.append(piece)
        answer.text, answer.ids = "".join(texts), tuple(ids)
        if not answer.problem and not (done and reason):
            answer.problem = f"the stream ended early, after {answer.text!r}"
        return True

    async def run(self, clients: int, requests: int, texts: Sequence[str]) -> int:
        """Ask until all is asked or the time is over; returns how many requests were never made."""
        numbers = iter(range(requests))

        async def work() -> None:
            for number in numbers:
                if time.monotonic() > self.stop:
                    break
                prompt = number % len(texts)
                self.answers.append(await self.ask(prompt, texts[prompt]))

        await asyncio.gather(*(work() for _ in range(clients)))
        return requests - len(self.answers)


class Probe:
    """Asks for ``/health`` again and again, in a thread: what it measures is not how busy the clients are."""

    def __init__(self, url: str, headers: dict[str, str], every: float = 0.05) -> None:
        self._url, self._headers, self._every = url, headers, every
        self._found: list[tuple[float, int]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Probe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, headers=self._headers, timeout=30, trust_env=False) as client:
            while True:
                begin = time.perf_counter()
                try:
                    status = client.get("/health").status_code
                except httpx.HTTPError:
                    status = 0
                self._found.append((time.perf_counter() - begin, status))
                if self._end.wait(self._every):
                    break

    def report(self) -> dict[str, Any]:
        """Milliseconds of its answers, and the statuses; 0 is a connection that failed."""
        return {**milliseconds(seconds for seconds, _ in self._found), "statuses": counted(s for _, s in self._found)}


async def watch(load: Load, found: list[dict[str, float]], every: float = 0.5) -> None:
    """Note the memory of each process, and how many answers there were, again and again."""
    while True:
        text = (await load.client.get("/metrics")).text
        memory = {
            line.split('"')[1]: float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith("qwen_onnx_memory_bytes{")
        }
        found.append({"": float(len(load.answers)), **memory})
        await asyncio.sleep(every)


def memories(found: Sequence[dict[str, float]], requests: int) -> dict[str, Any]:
    """Of each process: MB at the beginning and the end, bytes a request once it is warm."""
    names = sorted({name for sample in found for name in sample if name})
    report = {}
    for name in names:
        points = [(sample[""], sample[name]) for sample in found if name in sample]
        growth = slope([point for point in points if point[0] >= _WARM * requests])
        report[name] = {
            "mb_first": round(points[0][1] / 1e6, 1),
            "mb_last": round(points[-1][1] / 1e6, 1),
            "mb_most": round(max(size for _, size in points) / 1e6, 1),
            "bytes_a_request": None if growth is None else round(growth),
        }
    return report


def milliseconds(seconds: Iterable[float]) -> dict[str, Any]:
    """Count, median, 95th percentile and the most."""
    found = sorted(1000 * one for one in seconds)
    if not found:
        return {"count": 0}
    late = found[min(len(found) - 1, math.ceil(0.95 * len(found)) - 1)]
    return {
        "count": len(found),
        "median_ms": round(statistics.median(found), 1),
        "p95_ms": round(late, 1),
        "most_ms": round(found[-1], 1),
    }


def counted(values: Iterable[object]) -> dict[str, int]:
    """How often each value is there."""
    return {str(value): count for value, count in sorted(Counter(values).items(), key=str)}


def check_url(url: str, anywhere: bool) -> None:
    """Refuse a server of somebody else: this is an attack unless it is meant."""
    parts = urllib.parse.urlsplit(url)
    try:
        local = parts.hostname == "localhost" or ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        local = False
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Unusable(f"{url!r} is no address of a server, such as http://127.0.0.1:8000")
    if not (local or anywhere):
        raise Unusable(f"{parts.hostname} is not this machine; --anywhere says that it may be asked that much")


async def test(options: argparse.Namespace) -> dict[str, Any]:
    """All of it, as a report."""
    headers = {"authorization": f"Bearer {key}"} if (key := _key(options.key_file)) else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=options.clients)
    client = httpx.AsyncClient(
        base_url=options.url, headers=headers, limits=limits, timeout=options.timeout, trust_env=False
    )
    async with client:
        model = await _model(client, options.model)
        load = Load(client, model, options.max_tokens, options.cache, time.monotonic() + options.seconds)
        texts = prompts(options.prompts)
        alone = [await load.ask(number, text) for number, text in enumerate(texts)]
        if problems := [answer.problem for answer in alone if answer.problem]:
            raise Unusable(f"a prompt that is asked alone gets no answer: {problems[0]}")
        references = [answer.text for answer in alone]
        if len(set(references)) < 2:
            raise Unusable("all prompts get the same answer, so that nobody would see a mixed one; ask for more tokens")
        samples: list[dict[str, float]] = []
        watching = asyncio.create_task(watch(load, samples))
        begin = time.perf_counter()
        with Probe(options.url, headers) as probe:
            unasked = await load.run(options.clients, options.requests, texts)
        seconds = time.perf_counter() - begin
        watching.cancel()
        (ended,) = await asyncio.gather(watching, return_exceptions=True)
        verdict = check(references, load.answers)
        whole = [answer for answer in load.answers if not answer.problem]
        waits = [wait for answer in load.answers for wait in answer.waits]
        report = {
            "model": model,
            "clients": options.clients,
            "requests": {
                "made": len(load.answers),
                "answered": len(whole),
                "refused_to_the_end": sum(answer.refused for answer in load.answers),
                "never_made": unasked,
            },
            "different_answers": len(set(references)),
            "lost": verdict.lost,
            "mixed": verdict.mixed,
            "seconds": round(seconds, 2),
            "requests_per_second": round(len(whole) / seconds, 2),
            "tokens_per_second": round(sum(answer.tokens for answer in whole) / seconds, 2),
            "first_token": milliseconds(answer.first for answer in whole),
            "answer_with_waits": milliseconds(answer.seconds for answer in whole),
            "statuses": counted(itertools.chain.from_iterable(answer.statuses for answer in load.answers)),
            "retry_after": {
                "honoured": len(waits),
                "not_told": sum(answer.untold for answer in load.answers),
                "seconds": counted(waits),
                "most_for_one": max((len(answer.waits) for answer in load.answers), default=0),
            },
            "memory": memories(samples, len(load.answers)),
            "health": probe.report(),
        }
        if isinstance(ended, Exception):
            report["memory_problem"] = repr(ended)
        if options.prefill:
            report["prefill"] = await _prefill(load, options, headers)
    return report


async def _prefill(load: Load, options: argparse.Namespace, headers: dict[str, str]) -> dict[str, Any]:
    """Read a long prompt, while ``/health`` is asked for."""
    words = [random.Random(2).choice(("one", "two", "red", "blue", "cat", "dog")) for _ in range(options.prefill)]  # noqa: S311
    content = " ".join(words)
    counting = await load.client.post("/tokenize", json={"model": load.model, "content": content})
    tokens, most = counting.json()["count"], counting.json()["max_model_len"]
    if tokens > most - 64:
        content = " ".join(words[: int(len(words) * (most - 64) / tokens * 0.9)])
        tokens = (await load.client.post("/tokenize", json={"model": load.model, "content": content})).json()["count"]
    load.stop = time.monotonic() + options.seconds
    with Probe(options.url, headers) as probe:
        answer = await load.ask(0, content, limit=1)
    found = {"tokens": tokens, "seconds": round(answer.seconds, 2), "health": probe.report()}
    return {**found, "problem": answer.problem} if answer.problem else found


async def _model(client: httpx.AsyncClient, name: str) -> str:
    try:
        response = await client.get("/v1/models")
        response.raise_for_status()
        found = [card["id"] for card in response.json()["data"] if card.get("task", "generate") == "generate"]
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise Unusable(f"{client.base_url} does not tell which models it has: {error}") from None
    if not found or name not in ("", *found):
        raise Unusable(f"there is no model {name or 'that answers'}; there is {', '.join(found) or 'none'}")
    return name or str(found[0])


def _key(path: Path | None) -> str:
    """The first key of a file or of the server's variable, without its name."""
    text = path.read_text(encoding="utf-8") if path else os.environ.get(VARIABLE, "").replace(",", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return lines[0].rpartition(":")[2].strip() if lines else ""


def _within(least: int, most: int) -> Any:
    def number(text: str) -> int:
        if not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not within {least} and {most}")
        return int(text)

    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Ask a server much at once, and check what it answers.")
    parser.add_argument("url", help="such as http://127.0.0.1:8000")
    parser.add_argument("--model", default="", help="its name (default: the first that the server has)")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help=f"its first key is used; or that of ${VARIABLE}")
    for name, default, most, text in (
        ("clients", 16, _MOST_CLIENTS, "that ask at a time"),
        ("requests", 200, _MOST_REQUESTS, "in all"),
        ("prompts", 8, 256, "that differ"),
        ("max-tokens", 16, 4096, "of an answer"),
        ("seconds", 300, _MOST_SECONDS, "after which nothing more is asked"),
        ("timeout", 120, _MOST_SECONDS, "seconds without a byte after which an answer is lost"),
    ):
        least = 2 if name == "prompts" else 1
        parser.add_argument(
            f"--{name}", type=_within(least, most), default=default, metavar="N", help=f"{text} (default: %(default)s)"
        )
    text = "words of a prompt that is read at the end, while /health is asked for; 0 for none (default: %(default)s)"
    parser.add_argument("--prefill", type=_within(0, 100_000), default=2000, metavar="N", help=text)
    text = "read every prompt anew; with caches the sums of a model may differ in their last bits"
    parser.add_argument("--no-cache", dest="cache", action="store_false", help=text)
    parser.add_argument("--anywhere", action="store_true", help="ask a server on another machine")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the test; returns an exit code."""
    options = _parser().parse_args(arguments)
    try:
        check_url(options.url, options.anywhere)
        report = asyncio.run(asyncio.wait_for(test(options), 2 * options.seconds + 2 * options.timeout))
    except (Unusable, OSError, TimeoutError) as error:
        print(f"error: {error or 'the time is over, and answers are still to come'}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=None if options.json else 2))
    bad = [*report["lost"], *report["mixed"]]
    if bad and not options.json:
        print(f"{len(report['lost'])} lost, {len(report['mixed'])} mixed; the first: {bad[0]}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
