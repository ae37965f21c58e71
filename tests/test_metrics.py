"""The numbers that decide whether a package ships, against values computed by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pipeline.fidelity import metrics


def _log(*rows: list[float]) -> Any:
    return np.log(np.array(rows, dtype=np.float32))


def test_log_softmax_is_a_distribution_and_ignores_a_constant_shift() -> None:
    logits = np.array([[0.0, math.log(2), math.log(5)], [1e4, 1e4, -1e4]], dtype=np.float32)
    expected = [[1 / 8, 2 / 8, 5 / 8], [0.5, 0.5, 0.0]]
    np.testing.assert_allclose(np.exp(metrics.log_softmax(logits)), expected, atol=1e-6)
    np.testing.assert_allclose(np.exp(metrics.log_softmax(logits + 3)), expected, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_log_softmax_refuses_and_locates_values_that_are_no_numbers(bad: float) -> None:
    logits = np.zeros((7, 5), dtype=np.float32)
    logits[2, 1] = logits[6, 4] = bad
    with pytest.raises(ValueError, match=r"positions \[2, 6\] have NaN or infinite"):
        metrics.log_softmax(logits)


def test_kl_divergence_is_zero_for_equals_and_has_the_textbook_value_otherwise() -> None:
    reference, other = _log([0.5, 0.25, 0.25], [0.9, 0.05, 0.05]), _log([0.25, 0.25, 0.5], [0.9, 0.05, 0.05])
    # 1/2 log(1/2 : 1/4) + 1/4 log(1/4 : 1/4) + 1/4 log(1/4 : 1/2) = 1/2 log 2 - 1/4 log 2
    np.testing.assert_allclose(metrics.kl_divergence(reference, other), [0.25 * math.log(2), 0], atol=1e-7)
    np.testing.assert_array_equal(metrics.kl_divergence(reference, reference), [0, 0])


def test_kl_divergence_takes_the_reference_first() -> None:
    reference, other = _log([0.9, 0.1]), _log([0.5, 0.5])
    forward = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    backward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5)
    assert metrics.kl_divergence(reference, other)[0] == pytest.approx(forward, rel=1e-5)
    assert metrics.kl_divergence(other, reference)[0] == pytest.approx(backward, rel=1e-5)


def test_top1_agreement_compares_the_likeliest_token_of_each_position() -> None:
    reference, other = _log([0.5, 0.3, 0.2], [0.1, 0.2, 0.7]), _log([0.4, 0.35, 0.25], [0.1, 0.8, 0.1])
    assert metrics.top1_agreement(reference, other).tolist() == [True, False]


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    uniform = metrics.log_softmax(np.zeros((6, 50), dtype=np.float32))
    loss = metrics.negative_log_likelihood(uniform, [3, 1, 4, 1, 5, 9])
    assert loss.shape == (5,)
    assert math.exp(loss.mean()) == pytest.approx(50, rel=1e-6)


def test_likelihood_is_of_the_token_that_follows_each_position() -> None:
    rows = _log([0.1, 0.9], [0.8, 0.2], [0.5, 0.5])
    loss = metrics.negative_log_likelihood(rows, [0, 1, 0])
    np.testing.assert_allclose(loss, [-math.log(0.9), -math.log(0.8)], rtol=1e-5)


@pytest.mark.parametrize(
    ("reference", "other", "at", "share"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], None, 1.0),
        ([1, 2, 3, 4], [1, 2, 9, 4], 2, 0.5),
        ([1, 2, 3, 4], [9, 2, 3, 4], 0, 0.0),
        ([1, 2, 3, 4], [1], 1, 0.25),  # an answer that ends early is cut where it ends
        ([1, 2], [1, 2, 3], 2, 1.0),
        ([], [], None, 1.0),
        ([], [1], 0, 1.0),
    ],
)
def test_greedy_agreement_is_the_share_before_the_first_divergence(
    reference: list[int], other: list[int], at: int | None, share: float
) -> None:
    assert metrics.first_divergence(reference, other) == at
    assert metrics.greedy_agreement(reference, other) == share
