"""The process that has the model: requests come in as lines of JSON on standard input, events go out the same way.

onnxruntime-genai holds the interpreter's lock while it computes, and what native code does wrong ends a process: so the
model has one of its own. Answers take turns, a piece of a prompt or a token each. ``python -m
pipeline.serve.inference.worker`` with the package and options as JSON; the end of standard input ends it.

Lines in: ``{"id", "answer": Request}``, ``{"id", "embed": rows of ids, "dimensions"}``, ``{"id", "rank": rows}``,
``{"cancel": id}``. Lines out: ``{"ready": facts}`` or ``{"failed": error}`` once; then for each id ``prefilled``,
``piece``, and one of ``end``, ``vectors``, ``scores``, ``error`` and ``cancelled``.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.errors import PackageError, QwenOnnxError, StageError, UsageError
from pipeline.serve.events import End, Event, Piece, Prefilled, request_of
from pipeline.task import GENERATE

_SELF_TEST = 8  # tokens of each golden answer
_NAMES: dict[type[Event], str] = {Prefilled: "prefilled", Piece: "piece", End: "end"}

Message = Mapping[str, Any]
Work = Callable[[Message], Iterator[Message]]
"""What is done for a request: yields what to tell of it after each step."""


@dataclass(frozen=True)
class Options:
    """How a package is loaded.

    Attributes:
        task: what the package is for.
        threads: of the processor; 0 for all that may be used.
        provider: ``cpu`` runs it on the processor, whatever it is for.
        parallel: answers that take turns, and conversations whose caches are kept.
        self_test: whether to replay the beginning of the golden answers first.
        lookup: whether greedy answers are drafted from what was said, several tokens at once.
    """

    task: str = GENERATE
    threads: int = 0
    provider: str = ""
    parallel: int = 4
    self_test: bool = True
    lookup: bool = False


def main(arguments: Sequence[str]) -> int:
    """Serve requests until standard input ends; returns an exit code."""
    package, options = Path(arguments[0]), Options(**json.loads(arguments[1]))
    # What native libraries print must not get between the lines.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)
    try:
        work, facts = _load(package, options)
    except QwenOnnxError as error:
        _tell(out, {"failed": error.as_dict()})
        return error.exit_code
    _tell(out, {"ready": facts})
    _serve(work, out)
    return 0


def _serve(work: Work, out: IO[str]) -> None:
    inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(inbox,), daemon=True).start()
    active: dict[int, Iterator[Message]] = {}
    while True:
        while not active or not inbox.empty():
            message = inbox.get()
            if message is None:
                return
            if "cancel" in message:
                if given_up := active.pop(message["cancel"], None):
                    given_up.close()  # type: ignore[attr-defined]
                    _tell(out, {"id": message["cancel"], "cancelled": True})
            else:
                active[message["id"]] = work(message)
        for number, steps in list(active.items()):
            try:
                told = next(steps, None)
            except QwenOnnxError as error:
                told = {"error": error.as_dict()}
            except Exception as error:  # the binding raises bare exceptions: one answer fails, not all of them
                traceback.print_exc()
                told = {"error": StageError("the model failed", why=str(error).split("\n")[0]).as_dict()}
            if told is None or "error" in told:
                del active[number]
            if told:
                _tell(out, {"id": number, **told})


def _listen(inbox: queue.SimpleQueue[Message | None]) -> None:
    for line in sys.stdin.buffer:
        inbox.put(json.loads(line))
    inbox.put(None)


def _tell(out: IO[str], message: Message) -> None:
    out.write(json.dumps(message, separators=(",", ":")) + "\n")
    out.flush()


def _load(package: Path, options: Options) -> tuple[Work, dict[str, Any]]:
    begin = time.perf_counter()
    work, facts = (_generating if options.task == GENERATE else _retrieving)(package, options)
    return work, {**facts, "seconds": round(time.perf_counter() - begin, 3)}


def _generating(package: Path, options: Options) -> tuple[Work, dict[str, Any]]:
    from pipeline.runtime import chat, session
    from pipeline.serve.inference import answering
    from pipeline.serve.inference.slots import Slots

    opened = session.open_package(package, options.threads or None, options.provider)
    # OpenVINO's cache belongs to the model: a second conversation would write into the first one's.
    parallel = 1 if "OpenVINO" in opened.provider or not opened.rewinds else options.parallel
    host = answering.Host(opened, chat.load(package), Slots(parallel), {}, _drafts(opened) if options.lookup else False)

    def work(message: Message) -> Iterator[Message]:
        for event in answering.answer(host, request_of(message["answer"])):
            yield {_NAMES[type(event)]: asdict(event)}

    facts = {"provider": opened.provider, "parallel": parallel, "prefix_cache": opened.rewinds}
    if options.self_test:
        facts["self_test"] = _self_test(package, opened)
    return work, facts


def _drafts(opened: Any) -> bool:
    """Whether a package can verify drafts; one that cannot says so, and answers token by token."""
    from pipeline.runtime import generate, speculation

    try:
        reader = generate.Reader(opened, 64)
        speculation.Verifier(reader).verify([0, 1], [0])
    except UsageError as error:
        sys.stderr.write(f"{error}\n")
        return False
    return True


def _self_test(package: Path, opened: Any) -> dict[str, Any]:
    """What the device makes of the beginning of the golden answers: ``problem``, ``tokens``, ``seconds``."""
    from pipeline.artifact import MANIFEST, read_manifest
    from pipeline.package import replay

    if not (package / replay.GOLDEN).is_file():
        return {"problem": "", "tokens": 0, "seconds": 0.0}
    begin = time.perf_counter()
    try:
        entries = [
            {**entry, "tokens": entry["tokens"][:_SELF_TEST], "logprobs": entry["logprobs"][:_SELF_TEST]}
            for entry in replay.read(package / replay.GOLDEN)
        ]
        found = replay.replay(opened.model, entries, opened.window, package)
    except Exception as error:  # the binding raises bare exceptions of the C++ side
        raise PackageError("the golden answers cannot be replayed", why=str(error).split("\n")[0]) from None
    given = read_manifest(package).data.get("replay", {}) if (package / MANIFEST).is_file() else {}
    problem = replay.verdict(found, {**replay.DEFAULT, **given})
    seconds = round(time.perf_counter() - begin, 3)
    return {"problem": problem, "tokens": found["tokens"], "seconds": seconds}


def _retrieving(package: Path, options: Options) -> tuple[Work, dict[str, Any]]:
    from pipeline.runtime import retrieval

    opened = retrieval.open_package(package, options.threads or None)

    def work(message: Message) -> Iterator[Message]:
        rows, found = message["embed"] if "embed" in message else message["rank"], []
        for row in rows:
            if "rank" in message:
                found.append(opened.scores([row])[0])
            else:
                found.append(opened.embed([row], message["dimensions"])[0].tolist())
            yield {}
        yield {"scores" if "rank" in message else "vectors": found}

    return work, {"provider": "cpu", "parallel": options.parallel, "prefix_cache": False}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
