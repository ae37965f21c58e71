"""What was measured of a package after it was sealed: loss attribution and benchmarks, from files beside it.

A folder of packages has ``NAME``, ``NAME.attribution.json`` and ``NAME.bench.json`` side by side.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.artifact import read_json
from pipeline.documents import svg
from pipeline.documents.html_report import nats

_KINDS = {"package": "a", "peer": "b"}
_MOST = 12  # weights that a table of attribution shows
# Figures of a subject beside its speeds: what they are called, how they are written, and what they are divided by.
_SCALARS: dict[str, tuple[str, str, float]] = {
    "time_to_first_token": ("first token, s", "{:.2f}", 1),
    "load": ("load, s", "{:.1f}", 1),
    "peak_memory": ("peak memory, MB", "{:,.0f}", 1e6),
    "bytes": ("size, MB", "{:,.0f}", 1e6),
    "mean_kl": ("mean KL, nats a token", "{:.3g}", 1),
    "perplexity_ratio": ("perplexity over the reference’s", "{:.3f}", 1),
}


class _Model(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False, frozen=True, strict=True)


class Stage(_Model):
    """The loss that a step adds: mean KL, nats a token."""

    name: str
    kl: float


class Weight(_Model):
    """One weight, and its share of the loss: mean KL, nats a token. ``layer`` is ``None`` for embedding and head."""

    path: str
    layer: Annotated[int, Field(ge=0, lt=1000)] | None
    kind: str
    bits: int
    block_size: int
    bytes: int
    kl: float


class Attribution(_Model):
    """The content of ``NAME.attribution.json``."""

    schema_version: Literal[1]
    text: dict[str, Any]
    total_kl: float
    rows: list[Weight]
    stages: list[Stage]


class Machine(_Model):
    """What a benchmark ran on."""

    processor: str
    threads: int
    system: str


class Subject(_Model):
    """One package or peer of a benchmark: tokens per second by length, seconds, bytes; medians of all rounds.

    ``ratios`` are the first subject's figures over this one's.
    """

    name: str
    kind: Literal["package", "peer"]
    version: str
    bytes: int
    prefill: dict[str, float]
    decode: dict[str, float]
    time_to_first_token: float
    load: float
    peak_memory: int
    mean_kl: float | None = None
    perplexity_ratio: float | None = None
    ratios: dict[str, float] = {}


class Absent(_Model):
    """A peer that could not be had."""

    name: str
    why: str


class Bench(_Model):
    """The content of ``NAME.bench.json``."""

    schema_version: Literal[1]
    machine: Machine
    rounds: int
    subjects: list[Subject]
    absent: list[Absent]


def beside(package: Path, kind: Literal["attribution", "bench"]) -> Path:
    """Where the results of a package are: beside its folder, which is sealed."""
    return package.with_name(f"{package.name}.{kind}.json")


def attribution(package: Path) -> dict[str, Any]:
    """What ``report-attribution.jinja`` shows; ``given`` is false where there is no such file."""
    return _shown(beside(package, "attribution"), Attribution, _attribution)


def bench(package: Path) -> dict[str, Any]:
    """What ``report-bench.jinja`` shows; ``given`` is false where there is no such file."""
    return _shown(beside(package, "bench"), Bench, _bench)


def read_bench(package: Path) -> Bench | None:
    """The benchmark of a package; nothing where there is none that can be read."""
    try:
        return Bench.model_validate(read_json(beside(package, "bench")))
    except (OSError, ValueError, RecursionError):
        return None


def _shown(path: Path, model: type[_Model], view: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"file": path.name, "problem": "", "given": False}
    try:
        return {**found, "given": True, **view(model.model_validate(read_json(path)))}
    except FileNotFoundError:
        return found
    except ValidationError as error:
        first = error.errors()[0]
        return {**found, "problem": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"}
    except (OSError, ValueError, RecursionError) as error:
        return {**found, "problem": str(error)}


def _attribution(found: Attribution) -> dict[str, Any]:
    kinds: dict[str, list[Weight]] = defaultdict(list)
    for row in found.rows:
        kinds[row.kind].append(row)
    summed = sorted(((kind, sum(row.kl for row in rows)) for kind, rows in kinds.items()), key=lambda item: -item[1])
    total = sum(kl for _, kl in summed)
    layers = max((row.layer for row in found.rows if row.layer is not None), default=-1) + 1
    by_layer = [0.0] * layers
    cells: dict[str, list[float | None]] = {}
    for row in found.rows:
        if row.layer is not None:
            by_layer[row.layer] += row.kl
            cells.setdefault(row.kind, [None] * layers)[row.layer] = row.kl
    steps = [(stage.name, stage.kl) for stage in found.stages]
    return {
        "about": f"Mean KL divergence of the whole: {nats(found.total_kl)} nats a token. Measured on "
        f"{', '.join(f'{value} {key}'.replace('_', ' ') for key, value in found.text.items() if key != 'sha256')}.",
        "stages_plot": _bars("Loss by step", steps),
        "kinds_plot": _bars("Loss by kind of weight", summed, total),
        "layers_plot": svg.columns("Loss by layer", f"of layers 0 to {layers - 1}", by_layer, "nats") if layers else "",
        "heat_plot": svg.heat("Loss by layer and kind", "the table below has the largest", list(cells.items()), "nats"),
        "rows": [
            {
                "path": row.path,
                "scheme": f"{row.bits}-bit" + (f"/{row.block_size}" if row.block_size > 0 else ""),
                "megabytes": f"{row.bytes / 1e6:.1f}",
                "kl": nats(row.kl),
                "share": f"{row.kl / total:.1%}" if total > 0 else "–",
            }
            for row in sorted(found.rows, key=lambda row: -row.kl)[:_MOST]
        ],
    }


def _bars(title: str, values: Sequence[tuple[str, float]], total: float = 0.0) -> str:
    groups = [
        svg.Group(name, [svg.Bar(value, nats(value) + (f" ({value / total:.0%})" if total > 0 else ""))])
        for name, value in values
    ]
    return svg.bars(title, "; ".join(f"{name} {nats(value)}" for name, value in values), groups)


def _bench(found: Bench) -> dict[str, Any]:
    subjects = found.subjects
    lengths = [
        (path, length)
        for path in ("prefill", "decode")
        for length in dict.fromkeys(length for subject in subjects for length in getattr(subject, path))
    ]
    machine = found.machine
    return {
        "about": f"Medians of {found.rounds} interleaved rounds on {machine.processor}, {machine.threads} threads, "
        f"{machine.system}. Times on one machine say little of another; ratios say more.",
        "pareto": [plot for plot in (_by_size(subjects), _by_speed(subjects)) if plot],
        "speeds": [_speeds(subjects, path, length) for path, length in lengths],
        "names": [subject.name for subject in subjects],
        "with_ratios": any(subject.ratios for subject in subjects),
        "rows": _rows(subjects, lengths),
        "absent": [entry.model_dump() for entry in found.absent],
    }


def _rows(subjects: Sequence[Subject], lengths: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """A row for each figure that any subject has, a cell for each subject."""
    rows = [{"figure": "version", "cells": [{"value": subject.version, "ratio": ""} for subject in subjects]}]
    for path, length in lengths:
        where = f"prefill of {length}" if path == "prefill" else f"decode after {length}"
        values = [getattr(subject, path).get(length) for subject in subjects]
        rows.append(_row(f"{where}, tokens/s", f"{path}_{length}", values, "{:.1f}", subjects))
    for name, (figure, form, scale) in _SCALARS.items():
        values = [getattr(subject, name) for subject in subjects]
        if any(value is not None for value in values):
            scaled = [value / scale if value is not None else None for value in values]
            rows.append(_row(figure, name, scaled, form, subjects))
    return rows


def _row(
    figure: str, name: str, values: Sequence[float | None], form: str, subjects: Sequence[Subject]
) -> dict[str, Any]:
    texts = [form.format(value) if value is not None else "–" for value in values]
    ratios = [f"{subject.ratios[name]:.2f}" if name in subject.ratios else "" for subject in subjects]
    return {"figure": figure, "cells": [{"value": a, "ratio": b} for a, b in zip(texts, ratios, strict=True)]}


def _speeds(subjects: Sequence[Subject], path: str, length: str) -> dict[str, str]:
    rows = [(subject, getattr(subject, path)[length]) for subject in subjects if length in getattr(subject, path)]
    groups = [
        svg.Group(subject.name, [svg.Bar(speed, f"{speed:.1f}", _KINDS[subject.kind])]) for subject, speed in rows
    ]
    title = f"Prefill of {length} tokens" if path == "prefill" else f"Decode after {length} tokens"
    told = "; ".join(f"{subject.name} {speed:.1f}" for subject, speed in rows)
    return {"caption": title, "svg": svg.bars(title, told, groups)}


def _by_size(subjects: Sequence[Subject]) -> dict[str, str]:
    return _pareto(subjects, "Size against loss", lambda subject: subject.bytes / 1e6, "MB", more=False)


def _by_speed(subjects: Sequence[Subject]) -> dict[str, str]:
    def speed(subject: Subject) -> float | None:
        lengths = list(subject.decode)
        return subject.decode.get("512", subject.decode[lengths[len(lengths) // 2]] if lengths else None)

    return _pareto(subjects, "Decoding speed against loss", speed, "tokens a second", more=True)


def _pareto(
    subjects: Sequence[Subject], caption: str, x: Callable[[Subject], float | None], unit: str, more: bool
) -> dict[str, str]:
    """A scatter plot of those subjects whose loss is known; empty when it would compare nothing."""
    points = [
        svg.Point(across, subject.mean_kl, str(number), subject.name, _KINDS[subject.kind])
        for number, subject in enumerate(subjects, 1)
        if subject.mean_kl is not None and (across := x(subject)) is not None
    ]
    if len(points) < 2:
        return {}
    told = "; ".join(f"{point.mark} {point.name}: {point.x:.4g} {unit}, KL {nats(point.y)}" for point in points)
    better = "right" if more else "left"
    return {
        "caption": caption,
        "svg": svg.scatter(caption, told, points, f"{unit} (better: {better})", "mean KL", more),
    }
