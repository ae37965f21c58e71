"""Plots as inline SVG for a page that loads nothing: no library, no script, no style of their own.

Lengths along x are percentages and everything else is pixels, so a plot is as wide as its column and its text keeps its
size on a phone. Colours are classes that the page defines, for light, dark and paper. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

_BAR_ROOM = 66.0  # per cent of the width that the longest bar takes; its text stands to the right of it
_LABEL = 44  # characters of 12 px that fit a phone's width
_SMALLEST, _LARGEST = 1e-7, 1e7  # what a logarithmic axis goes to; beyond are numbers that mean nothing
# Characters that a page would not show, or that turn the text around them about (bidirectional controls), as a picture
# or a code: texts of models and recipes may have any.
_SHOWN = (
    {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
    | {127: "\u2421"}
    | {code: f"[U+{code:04X}]" for code in (*range(0x80, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F))}
    | {code: f"[U+{code:04X}]" for code in (*range(0x2066, 0x206A), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF)}
)


@dataclass(frozen=True)
class Bar:
    """One bar: its length in the plot's unit, what stands beside it, and its class."""

    value: float
    text: str
    kind: str = "a"


@dataclass(frozen=True)
class Group:
    """Bars below one label."""

    label: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot: ``mark`` is a character or two beside it, ``name`` is told on hovering."""

    x: float
    y: float
    mark: str
    name: str
    kind: str = "a"


def visible(text: str) -> str:
    """``text`` with its invisible and unprintable characters shown as such; line ends and tabs stay."""
    return text.translate(_SHOWN)


def bars(title: str, description: str, groups: Sequence[Group], bound: float | None = None) -> str:
    """Horizontal bars from zero, with a dashed line at ``bound``; negative values have no length."""
    longest = max([bar.value for group in groups for bar in group.bars] + [bound or 0.0])
    scale = _BAR_ROOM / longest if longest > 0 else 0.0
    parts, top = [], 0.0
    for group in groups:
        parts.append(f'<text y="{top + 13:g}">{_label(group.label)}</text>')
        top += 19
        for bar in group.bars:
            length = max(bar.value * scale, 0.0)
            parts.append(f'<rect class="{bar.kind}" y="{top:g}" width="{length:.2f}%" height="13"/>')
            parts.append(f'<text class="halo" x="{length:.2f}%" dx="6" y="{top + 11:g}">{_label(bar.text)}</text>')
            top += 17
        top += 7
    if bound is not None:
        at, anchor = f"{bound * scale:.2f}%", "middle" if bound * scale > 8 else "start"
        parts.insert(0, f'<line class="bound" x1="{at}" x2="{at}" y1="0" y2="{top:g}"/>')
        parts.append(f'<text class="quiet" x="{at}" y="{top + 13:g}" text-anchor="{anchor}">gate {bound:g}</text>')
        top += 18
    return _figure(title, description, top, parts)


def columns(title: str, description: str, values: Sequence[float], unit: str) -> str:
    """A column for each index from 0; each tells its value in ``unit`` where it is hovered over."""
    height, width = 110.0, 100 / max(len(values), 1)
    highest = max([*values, 0.0])
    parts = [f'<text class="quiet" y="11">{_text(_significant(highest))} {_text(unit)}</text>']
    for index, value in enumerate(values):
        tall = height * max(value, 0.0) / highest if highest else 0.0
        parts.append(
            f'<rect class="a" x="{width * index:.3f}%" y="{18 + height - tall:.1f}" width="{0.86 * width:.3f}%" '
            f'height="{tall:.1f}"><title>{index}: {_text(_significant(value))} {_text(unit)}</title></rect>'
        )
    parts.append(f'<line class="axis" x1="0" x2="100%" y1="{18 + height:g}" y2="{18 + height:g}"/>')
    parts += _ticks(len(values), 18 + height + 15)
    return _figure(title, description, height + 38, parts)


def heat(title: str, description: str, rows: Sequence[tuple[str, Sequence[float | None]]], unit: str) -> str:
    """A strip of cells for each row, darker for larger values; ``None`` is a gap. All rows are of one length."""
    highest = max([value for _, cells in rows for value in cells if value is not None] + [0.0])
    count = max((len(cells) for _, cells in rows), default=1)
    width = 100 / max(count, 1)
    parts, top = [], 0.0
    for label, cells in rows:
        parts.append(f'<text y="{top + 13:g}">{_label(label)}</text>')
        for index, value in enumerate(cells):
            if value is not None:
                shade = 0.06 + 0.94 * max(value, 0.0) / highest if highest else 0.06
                parts.append(
                    f'<rect class="a" x="{width * index:.3f}%" y="{top + 18:g}" width="{0.92 * width:.3f}%" '
                    f'height="16" fill-opacity="{shade:.3f}"><title>{_label(label)}, {index}: '
                    f"{_text(_significant(value))} {_text(unit)}</title></rect>"
                )
        top += 42
    parts += _ticks(count, top + 8)
    return _figure(title, description, top + 14, parts)


def scatter(title: str, description: str, points: Sequence[Point], x_label: str, y_label: str, more: bool) -> str:
    """Points over a linear x from zero and a logarithmic y, less of which is better; the Pareto front is joined.

    Args:
        more: whether more of x is better.
    """
    top, bottom = 36.0, 250.0
    widest = max([point.x for point in points] + [0.0]) * 1.08 or 1.0
    low, high = _decades([point.y for point in points])

    def across(x: float) -> float:
        return 10 + 88 * x / widest

    def down(y: float) -> float:
        return bottom - (bottom - top) * (math.log10(min(max(y, low), high)) - math.log10(low)) / math.log10(high / low)

    parts = []
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        at = down(10.0**power)
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="quiet" y="{at - 4:.1f}">{10.0**power:g}</text>')
    step = _step(widest)
    for index in range(int(widest / step) + 1):
        x = across(index * step)
        parts.append(f'<line class="grid" x1="{x:.2f}%" x2="{x:.2f}%" y1="{top:g}" y2="{bottom:g}"/>')
        parts.append(
            f'<text class="quiet" x="{x:.2f}%" y="{bottom + 16:g}" text-anchor="middle">{index * step:g}</text>'
        )
    parts.append(f'<text class="quiet" x="100%" y="{bottom + 34:g}" text-anchor="end">{_text(x_label)}</text>')
    parts.append(f'<text class="quiet" y="11">{_text(y_label)}</text>')
    best = front(points, more)
    for left, right in pairwise(best):
        parts.append(
            f'<line class="front" x1="{across(left.x):.2f}%" y1="{down(left.y):.1f}" '
            f'x2="{across(right.x):.2f}%" y2="{down(right.y):.1f}"/>'
        )
    for point in points:
        hollow = "" if point in best else " hollow"
        parts.append(
            f'<circle class="{point.kind}{hollow}" cx="{across(point.x):.2f}%" cy="{down(point.y):.1f}" r="6">'
            f"<title>{_text(point.name)}</title></circle>"
        )
    for x, y, mark in _marks([(across(point.x), down(point.y), point.mark) for point in points]):
        parts.append(f'<text class="halo" x="{x:.2f}%" dx="10" y="{y + 4:.1f}">{_text(mark)}</text>')
    return _figure(title, description, bottom + 40, parts)


def front(points: Sequence[Point], more: bool) -> list[Point]:
    """The points that no other beats in x (``more``: by being larger) without losing in y, ordered by x."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.x if more else point.x, point.y)):
        if not best or point.y < best[-1].y:
            best.append(point)
    return best[::-1] if more else best


def _marks(placed: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Marks of points that would cover one another stand in one place, that of the first."""
    shown: list[tuple[float, float, str]] = []
    for x, y, mark in placed:
        near = next((index for index, (a, b, _) in enumerate(shown) if abs(a - x) < 5 and abs(b - y) < 13), None)
        if near is None:
            shown.append((x, y, mark))
        else:
            a, b, marks = shown[near]
            shown[near] = (a, b, f"{marks}, {mark}")
    return shown


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Powers of ten around the positive ones of ``values``; what is not positive is drawn at the lower one."""
    positive = [min(max(value, _SMALLEST), _LARGEST) for value in values if value > 0] or [1.0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    return 10.0**low, 10.0 ** max(high, low + 1)


def _step(widest: float) -> float:
    """1, 2 or 5 times a power of ten: the distance of about five ticks."""
    power = 10.0 ** math.floor(math.log10(widest / 4))
    return next(factor * power for factor in (5, 2, 1) if factor * power <= widest / 4)


def _ticks(count: int, y: float) -> list[str]:
    """Numbers below a row of ``count`` columns."""
    every = next(step for step in (1, 2, 4, 8, 16, 32, max(count, 1)) if count / step <= 12)
    return [
        f'<text class="quiet" x="{100 * (index + 0.46) / count:.3f}%" y="{y:g}" text-anchor="middle">{index}</text>'
        for index in range(0, count, every)
    ]


def _significant(value: float) -> str:
    return f"{value:.3g}"


def _text(text: str) -> str:
    return escape(visible(text))


def _label(text: str) -> str:
    return _text(text if len(text) <= _LABEL else f"{text[: _LABEL - 1]}…")


def _figure(title: str, description: str, height: float, parts: Sequence[str]) -> str:
    """To assistive technology a plot is one image with a name and a description; tables have the figures."""
    return (
        f'<svg role="img" width="100%" height="{height:g}"><title>{_text(title)}</title>'
        f"<desc>{_text(description)}</desc>{''.join(parts)}</svg>"
    )
