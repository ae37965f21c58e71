"""How far two releases of a package differ in what was measured: fidelity, golden answers, speed.

Figures come from ``validation.json``, ``golden.jsonl``, and from benchmarks beside the packages. One that is missing or
of another kind than a number counts as missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pipeline.diff.rules import KL_LEAST, KL_SHARE, PERPLEXITY_MORE, SIZE_SHARE, SPEED_SHARE, TOP1_LESS, Finding
from pipeline.documents.measured import Bench, Subject

_VALUE = 0.001  # of vectors of length 1, and of scores: kernels of two machines differ by less
_PATHS = ("prefill", "decode")
# Figure → by how much it is worse: above 0 it is worse, above 1 by more than measuring again explains.
_FIGURES: dict[str, Callable[[float, float], float]] = {
    "mean_kl": lambda old, new: (new - old) / max(KL_LEAST, KL_SHARE * old),
    "top1": lambda old, new: (old - new) / TOP1_LESS,
    "perplexity_ratio": lambda old, new: (new - old) / PERPLEXITY_MORE,
}


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def quality(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Finding]:
    """Differences of two validations."""
    before, after = (_object(data.get("text")).get("sha256") for data in (old, new))
    if before != after:
        yield Finding("quality.unmatched", "sha256 of the texts", before, after)
    elif not (old and new):
        yield Finding("quality.unmatched", "validation.json", bool(old), bool(new))
    else:
        for path in _PATHS:
            yield from _path(path, _object(old.get(path)), _object(new.get(path)))
    yield from _gates(old, new)


def _path(path: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Finding]:
    """Differences of a path's figures, and of each kind of text."""
    domains = _object(old.get("domains")).keys() | _object(new.get("domains")).keys()
    places = [("", old, new)]
    for name in sorted(domains):
        first, second = (_object(_object(side.get("domains")).get(name)) for side in (old, new))
        places.append((f" {name}", first, second))
    for place, first, second in places:
        for name, worse in _FIGURES.items():
            before, after = _number(first.get(name)), _number(second.get(name))
            item = f"{name} of {path}{place}"
            if before is None and after is None:
                continue
            if before is None or after is None:
                yield Finding("quality.unmatched", item, before, after)
            elif abs(share := worse(before, after)) > 1 and not (place and name != "mean_kl"):
                # A kind of text has a quarter of the positions: its other figures are too coarse.
                yield Finding("quality.worse" if share > 0 else "quality.better", item, before, after)


def _gates(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Finding]:
    before, after = (_bounds(data.get("gates")) for data in (old, new))
    for gate, (sense, bound) in before.items():
        if gate not in after:
            yield Finding("quality.gate", gate, bound, "absent")
        elif (now := after[gate][1]) != bound and (now > bound) == (sense == "max"):
            yield Finding("quality.gate", gate, bound, now)


def _bounds(gates: Any) -> dict[str, tuple[Any, float]]:
    found = {}
    for gate in gates if isinstance(gates, list) else []:
        entry = _object(gate)
        if (bound := _number(entry.get("bound"))) is not None:
            found[f"{entry.get('metric')} {entry.get('path')}".strip()] = (entry.get("sense"), bound)
    return found


def answers(old: Sequence[Any], new: Sequence[Any]) -> Iterator[Finding]:
    """Golden prompts that have other answers, by the prompts' ids; or other vectors, of packages that embed."""
    before, after = ({_prompt(entry): _object(entry) for entry in side} for side in (old, new))
    for key in {**before, **after}:
        name = str(_object(before.get(key) or after[key]).get("name", key[:40]))
        if key not in before or key not in after:
            yield Finding("golden.unmatched", name, *("there" if key in side else "absent" for side in (before, after)))
            continue
        vectors = [_numbers(side[key].get("values")) for side in (before, after)]
        if largest := max((abs(was - now) for was, now in zip(*vectors, strict=False)), default=0.0):
            if largest > _VALUE or len(vectors[0]) != len(vectors[1]):
                yield Finding("golden.changed", f"{name}, numbers that differ most", 0.0, round(largest, 6))
            continue
        first, second = before[key].get("tokens"), after[key].get("tokens")
        if first != second and isinstance(first, list) and isinstance(second, list):
            same = next((at for at, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
            at = min(len(first), len(second)) if same is None else same
            yield Finding("golden.changed", f"{name}, from token {at + 1} on", first[at : at + 6], second[at : at + 6])


def _numbers(value: Any) -> list[float]:
    return [number for item in value if (number := _number(item)) is not None] if isinstance(value, list) else []


def _prompt(entry: Any) -> str:
    """What was asked: ids, and the adapter, pictures or sounds that go with them."""
    fields = _object(entry)
    return str([fields.get(key) for key in ("prompt", "ids", "adapter", "images", "audio")])


def speed(old: Bench | None, new: Bench | None, old_name: str, new_name: str) -> Iterator[Finding]:
    """Differences of two benchmarks on one machine; one benchmark with both packages is best."""
    pair = _pair(old, new, old_name, new_name)
    if pair is None:
        yield Finding("speed.unmatched", "benchmarks", bool(old), bool(new))
        return
    first, second = pair
    rates = [("prefill", first.prefill, second.prefill), ("decode", first.decode, second.decode)]
    for kind, before, after in rates:
        for length in sorted(before.keys() & after.keys(), key=int):
            yield from _rate(f"{kind} at {length} tokens, tokens a second", before[length], after[length])
    wait = "first token, seconds"
    yield from _rate(wait, first.time_to_first_token, second.time_to_first_token, slow_is_more=True)
    if second.peak_memory > first.peak_memory * (1 + SIZE_SHARE):
        yield Finding("speed.memory", "peak memory, bytes", first.peak_memory, second.peak_memory)


def _pair(old: Bench | None, new: Bench | None, old_name: str, new_name: str) -> tuple[Subject, Subject] | None:
    for before, after in ((old, old), (new, new), (old, new)):
        if before and after and before.machine == after.machine:
            first = next((subject for subject in before.subjects if subject.name == old_name), None)
            second = next((subject for subject in after.subjects if subject.name == new_name), None)
            if first and second:
                return first, second
    return None


def _rate(item: str, old: float, new: float, slow_is_more: bool = False) -> Iterator[Finding]:
    ratio = (old / new if slow_is_more else new / old) if old > 0 and new > 0 else 1.0
    if ratio < 1 - SPEED_SHARE:
        yield Finding("speed.slower", item, old, new)
    elif ratio > 1 + SPEED_SHARE:
        yield Finding("speed.faster", item, old, new)
