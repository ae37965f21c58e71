"""Which weights get more bits: the cheapest steps from the smallest scheme to one that loses little enough.

Losses of single weights add up well as long as they are small, so that the choice is a knapsack whose items are steps
on each weight's lower convex hull of (bytes, loss); taking steps by loss saved a byte is optimal but for the last one
(Shoham and Gersho, 1988).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.facts.scheme import WeightScheme


@dataclass(frozen=True)
class Option:
    """One way to store a weight.

    Attributes:
        scheme: of its blocks.
        size: bytes.
        loss: KL divergence (nats) that it costs alone.
        time: of its product with one token, in seconds.
    """

    scheme: WeightScheme
    size: int
    loss: float
    time: float = 0.0


def allocate(
    options: Mapping[str, Sequence[Option]],
    max_loss: float | None = None,
    max_size: float | None = None,
    max_time: float | None = None,
) -> dict[str, Option]:
    """An option for each weight, so that the sums of losses, sizes and times keep to their bounds.

    Args:
        options: of each weight, in any order.
        max_loss: take steps until the sum of losses is at most that.
        max_size, max_time: take steps while the sum of sizes, and of times, is at most that.

    Returns:
        the choice; where no choice keeps to ``max_loss``, the one of least loss, and where none keeps to ``max_size``,
        the smallest.
    """
    hulls = {path: _hull(given) for path, given in options.items()}
    chosen = {path: hull[0] for path, hull in hulls.items()}
    loss = sum(option.loss for option in chosen.values())
    size = sum(option.size for option in chosen.values())
    time = sum(option.time for option in chosen.values())
    steps = [
        ((before.loss - after.loss) / (after.size - before.size), path, before, after)
        for path, hull in hulls.items()
        for before, after in itertools.pairwise(hull)
    ]
    stuck: set[str] = set()  # a step of theirs did not fit, and later ones start from it
    for _, path, before, after in sorted(steps, key=lambda step: (-step[0], step[1])):
        if max_loss is not None and loss <= max_loss:
            break
        too_large = max_size is not None and size + after.size - before.size > max_size
        too_slow = max_time is not None and time + after.time - before.time > max_time
        if path in stuck or too_large or too_slow:
            stuck.add(path)
            continue
        chosen[path] = after
        loss += after.loss - before.loss
        size += after.size - before.size
        time += after.time - before.time
    return chosen


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of (size, loss), by rising size and falling loss."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.size, option.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-1], option) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(left: Option, right: Option) -> float:
    """Loss saved a byte."""
    return (left.loss - right.loss) / (right.size - left.size)
