"""How close two models are: pure functions on logits.

Shapes: T positions, V token ids. Logits are float32 arrays ``[T, V]``; everything is in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]


def log_softmax(logits: Floats) -> Floats:
    """Log-probabilities ``[T, V]`` float32.

    Raises:
        ValueError: a row has NaN or infinite values.
    """
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():  # checked first: numpy would warn of its arithmetic, and go on
        raise ValueError(f"logits of positions {np.flatnonzero(~finite)[:5].tolist()} have NaN or infinite values")
    shifted = logits - logits.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)
    result: Floats = shifted - np.log(total).astype(np.float32)
    return result


def kl_divergence(reference: Floats, other: Floats) -> npt.NDArray[np.float64]:
    """KL(reference || other) of each position, ``[T]``, from log-probabilities (Kullback and Leibler, 1951)."""
    divergence: npt.NDArray[np.float64] = (np.exp(reference) * (reference - other)).sum(axis=1, dtype=np.float64)
    return divergence


def top1_agreement(reference: Floats, other: Floats) -> npt.NDArray[np.bool_]:
    """Whether both rank the same token first, for each position."""
    agreement: npt.NDArray[np.bool_] = reference.argmax(axis=1) == other.argmax(axis=1)
    return agreement


def negative_log_likelihood(log_probabilities: Floats, ids: Sequence[int]) -> npt.NDArray[np.float64]:
    """``-log p(ids[t + 1])`` for each but the last position, ``[T - 1]``."""
    following = np.asarray(ids[1:])
    result: npt.NDArray[np.float64] = -log_probabilities[np.arange(len(following)), following].astype(np.float64)
    return result


def change_products(reference: tuple[Floats, Floats], other: tuple[Floats, Floats]) -> tuple[float, float]:
    """The product of a change of the reference with the change of another model, and with itself.

    Summed over texts, the first over the second is the slope of the regression of the other's change on the
    reference's: 1 where it is this change, 0 where there is none, 2 where it is twice as large. Noise that does not
    depend on the change leaves it alone.

    Args:
        reference, other: log-probabilities before and after the change.
    """
    wanted, found = (after - before for before, after in (reference, other))
    return float((wanted * found).sum(dtype=np.float64)), float((wanted * wanted).sum(dtype=np.float64))


def first_divergence(reference: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token that differs (or exists in one only); ``None`` when both are equal."""
    for index, (left, right) in enumerate(zip(reference, other, strict=False)):
        if left != right:
            return index
    return None if len(reference) == len(other) else min(len(reference), len(other))


def greedy_agreement(reference: Sequence[int], other: Sequence[int]) -> float:
    """Share of the reference's tokens before the first divergence, in [0, 1]."""
    at = first_divergence(reference, other)
    return 1.0 if at is None or not reference else at / len(reference)
