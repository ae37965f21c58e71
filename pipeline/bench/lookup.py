"""Time lookup decoding against decoding token by token: ``python -m pipeline.bench.lookup PACKAGE``.

The prompts range from an edit of a function to a question whose answer repeats nothing. Both take turns in one process;
what counts on a noisy machine is the median of the ratios of runs that followed one another.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.builds import report
from pipeline.errors import QwenOnnxError
from pipeline.fidelity import metrics
from pipeline.runtime import chat, generate, session, speculation
from pipeline.runtime.session import Session

_PROMPTS = Path(__file__).parent.parent / "data" / "lookup-prompts.txt"


@dataclass(frozen=True)
class Answer:
    """Tokens, seconds until the first one, and seconds until the last one."""

    tokens: list[int]
    first: float
    last: float

    @property
    def speed(self) -> float:
        """Tokens per second after the first one."""
        return (len(self.tokens) - 1) / (self.last - self.first) if len(self.tokens) > 1 else 0.0


def prompts() -> dict[str, str]:
    """The texts, by name: each follows a line ``### name``."""
    parts = _PROMPTS.read_text(encoding="utf-8").split("### ")[1:]
    return {name: text.strip() for name, _, text in (part.partition("\n") for part in parts)}


def compare(opened: Session, prompt: Sequence[int], limit: int, rounds: int) -> dict[str, Any]:
    """Answer ``prompt`` with at most ``limit`` tokens, token by token and by lookup, ``rounds`` times in turn.

    Returns:
        medians in tokens per second (``plain``, ``lookup``) and of their ratio, pair by pair; ``whole_ratio``, of the
        times for whole answers, prompts included; `pipeline.runtime.speculation.Counts` of one answer; ``lossless``:
        whether the answer is the one without drafts; ``first_difference`` from the one token by token (``None``: the
        same).

    Raises:
        UsageError: the package cannot verify drafts, or the prompt does not fit it.
    """
    pairs = []
    for _ in range(rounds):
        counts = speculation.Counts()
        plain = _timed(generate.stream(opened, prompt, limit))
        pairs.append((plain, _timed(speculation.stream(opened, prompt, limit, counts=counts))))
    plain, lookup = pairs[-1]
    undrafted = list(speculation.stream(opened, prompt, limit, lookup=False))
    return {
        "prompt_tokens": len(prompt),
        "tokens": len(lookup.tokens),
        "plain": round(statistics.median(pair[0].speed for pair in pairs), 2),
        "lookup": round(statistics.median(pair[1].speed for pair in pairs), 2),
        "ratio": round(statistics.median(b.speed / a.speed for a, b in pairs), 3),
        "whole_ratio": round(statistics.median(a.last / b.last for a, b in pairs), 3),
        **asdict(counts),
        "lossless": all(pair[1].tokens == undrafted for pair in pairs),
        "first_difference": metrics.first_divergence(plain.tokens, lookup.tokens),
    }


def _timed(stream: Iterator[int]) -> Answer:
    begin = time.perf_counter()
    tokens, first = [], 0.0
    for token in stream:
        tokens.append(token)
        first = first or time.perf_counter() - begin
    return Answer(tokens, first, time.perf_counter() - begin)


def main(arguments: Sequence[str] | None = None) -> int:
    """Time a package; returns an exit code."""
    parser = argparse.ArgumentParser(description="Time lookup decoding against decoding token by token.")
    parser.add_argument("package", type=Path)
    parser.add_argument("--prompt", action="append", choices=list(prompts()), help="may be given again (default: all)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=320, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, help="processor threads (default: all cores that may be used)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(arguments)
    try:
        opened = session.open_package(options.package, options.threads)
        tokenizer = chat.load(options.package)
        found = {}
        for name, text in prompts().items():
            if not options.prompt or name in options.prompt:
                ids = tokenizer.encode_chat([{"role": "user", "content": text}])
                found[name] = compare(opened, ids, options.max_tokens, options.rounds)
        exact = speculation.independent(opened, tokenizer.encode(prompts()["proofread"])[: 4 * speculation.LONGEST])
    except QwenOnnxError as error:
        report.show_error(error, options.json)
        return error.exit_code
    if options.json:
        print(json.dumps({"independent": exact, "prompts": found}))
        return 0
    rows = [
        (
            name,
            str(entry["tokens"]),
            f"{entry['plain']:.1f}",
            f"{entry['lookup']:.1f}",
            f"{entry['ratio']:.2f}",
            f"{entry['accepted']}/{entry['drafted']}",
            "yes" if entry["lossless"] else "NO",
            "same" if entry["first_difference"] is None else f"from {entry['first_difference']}",
        )
        for name, entry in found.items()
    ]
    head = ("PROMPT", "TOKENS", "PLAIN tok/s", "LOOKUP tok/s", "RATIO", "ACCEPTED", "LOSSLESS", "TOKEN BY TOKEN")
    print(report.table(rows, head))
    print(f"logits {'do not depend' if exact else 'DEPEND'} on how many tokens are fed at once, from two on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
