"""Choosing the next token from logits: penalties, biases, and what is drawn from.

The runtime's own search fixes its settings when a generator is made, before a prompt is fed. Here they belong to a
request, so that a conversation's cache can be taken up by a request with others; a seed gives the same tokens with
every version of the runtime; and what is asked for is either done or refused.

Shapes in this module:
    V: vocabulary size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import UsageError

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

MAX_BIAS = 100.0
_FEW = 2048  # most answers draw from fewer tokens, and sorting a vocabulary takes long


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the most likely one, unless there is a temperature.

    Attributes:
        temperature: what logits are divided by; 0 takes the most likely token.
        top_k: draw from so many of the most likely tokens; 0 from all.
        top_p: draw from the most likely ones that have this probability together.
        min_p: draw from those that are at least this much as likely as the most likely one.
        seed: of what is drawn; one of the system's when left out.
        repetition_penalty: logits of tokens of prompt and answer are divided by it, or multiplied where negative
            (Keskar et al. 2019, https://arxiv.org/abs/1909.05858); None takes the package's.
        presence_penalty, frequency_penalty: subtracted from the logit of a token of the answer, once, and for each time
            that it was given.
        logit_bias: added to the logits of these token ids.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 5.0:  # NaN fails too
            raise UsageError(f"temperature {self.temperature} is not in [0, 5]")
        if not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"top_p {self.top_p} is not in (0, 1]")
        if not 0.0 <= self.min_p <= 1.0:
            raise UsageError(f"min_p {self.min_p} is not in [0, 1]")
        if self.top_k < 0:
            raise UsageError(f"top_k {self.top_k} is negative")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise UsageError(f"seed {self.seed} is not in [0, 2^63)")
        if self.repetition_penalty is not None and not 0.0 < self.repetition_penalty <= 10.0:
            raise UsageError(f"repetition_penalty {self.repetition_penalty} is not in (0, 10]")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2.0 <= getattr(self, name) <= 2.0:
                raise UsageError(f"{name} {getattr(self, name)} is not in [-2, 2]")
        for token, bias in self.logit_bias.items():
            if token < 0 or not -MAX_BIAS <= bias <= MAX_BIAS:
                raise UsageError(f"logit_bias {bias} of token {token} is not in [-100, 100]")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0

    @property
    def plain(self) -> bool:
        """Whether it is the one that the model ranks first, but for the package's own penalty."""
        changed = self.presence_penalty or self.frequency_penalty or self.logit_bias
        return self.greedy and not changed and self.repetition_penalty is None


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        prompt: ids that the repetition penalty counts.
        penalty: the package's repetition penalty.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = (), penalty: float = 1.0) -> None:
        self._sampling = sampling
        own = sampling.repetition_penalty
        self._penalty = penalty if own is None else own
        self._seen = set(prompt) if self._penalty != 1.0 else set()
        self._given: Counter[int] = Counter()
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))

    def choose(self, logits: Floats, allowed: npt.NDArray[np.bool_] | None = None) -> int:
        """The next token.

        Args:
            logits: ``[V]``; is not changed.
            allowed: ``[V]``, the tokens to choose from, at least one; all when left out.

        Raises:
            UsageError: a biased token is not in the vocabulary.
        """
        logits = self._weighed(logits)
        if allowed is not None:
            logits = np.where(allowed, logits, np.float32(-np.inf))
        token = int(logits.argmax()) if self._sampling.greedy else self._drawn(logits)
        self.note(token)
        return token

    def note(self, token: int) -> None:
        """Count a token of the answer that was not chosen here."""
        self._given[token] += 1
        if self._penalty != 1.0:
            self._seen.add(token)

    def _weighed(self, logits: Floats) -> Floats:
        sampling = self._sampling
        counted = self._given and (sampling.presence_penalty or sampling.frequency_penalty)
        if not (self._seen or counted or sampling.logit_bias):
            return logits
        logits = logits.copy()
        if self._seen:
            known = np.fromiter(self._seen, np.int64)
            logits[known] = np.where(logits[known] < 0, logits[known] * self._penalty, logits[known] / self._penalty)
        if counted:
            tokens = np.fromiter(self._given.keys(), np.int64)
            times = np.fromiter(self._given.values(), np.float32)
            logits[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * times
        for token, bias in sampling.logit_bias.items():
            if token >= len(logits):
                raise UsageError(f"logit_bias names token {token}, and the vocabulary has {len(logits)}")
            logits[token] += bias
        return logits

    def _drawn(self, logits: Floats) -> int:
        tokens, weights = _candidates(logits, self._sampling)
        sums = np.cumsum(weights)
        return int(
            tokens[np.searchsorted(sums, self._random.random() * sums[-1], side="right").clip(max=len(sums) - 1)]
        )


def _candidates(logits: Floats, sampling: Sampling) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Tokens to draw from, the most likely first, and their weights, not normalized."""
    count = min(sampling.top_k or len(logits), len(logits))
    scaled = logits.astype(np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled.max())
    whole = weights.sum()
    few = min(count, _FEW)
    order = _largest(weights, few)
    if few < count and weights[order].sum() < sampling.top_p * whole:
        order = _largest(weights, count)
    found = weights[order]
    if sampling.top_k:
        whole = found.sum()
    before = np.cumsum(found) - found
    # A token is drawn from while those before it have less than top_p together: the first one always is.
    kept = (before < sampling.top_p * whole) & (found >= sampling.min_p) & (found > 0)
    return order[kept], found[kept]


def _largest(weights: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """Indices of the ``count`` largest weights, the largest first, and of equal ones the first."""
    if count >= len(weights):
        return np.argsort(-weights, kind="stable")
    least = np.partition(weights, len(weights) - count)[len(weights) - count]
    inside = np.flatnonzero(weights >= least)
    return inside[np.argsort(-weights[inside], kind="stable")][:count]


def log_probabilities(logits: Floats) -> Floats:
    """Logarithms of the model's own probabilities ``[V]``, whatever is asked of what is chosen."""
    shifted = logits - logits.max()
    result: Floats = shifted - np.log(np.exp(shifted).sum())
    return result
