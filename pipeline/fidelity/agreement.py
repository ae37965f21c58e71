"""How well a model agrees with its reference over many windows of text: `pipeline.fidelity.metrics`, accumulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.fidelity import metrics

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]


def gate(metric: str, path: str, value: float, bound: float, sense: str) -> dict[str, Any]:
    """A gate with what was measured; the value is to be at most (``sense`` max) or at least (min) the bound."""
    passed = value <= bound if sense == "max" else value >= bound
    return {"metric": metric, "path": path, "value": value, "bound": bound, "sense": sense, "passed": bool(passed)}


@dataclass
class Tally:
    """Per-position figures of one path (prefill or decode), by domain."""

    divergence: dict[str, list[npt.NDArray[np.float64]]] = field(default_factory=dict)
    agreement: dict[str, list[npt.NDArray[np.bool_]]] = field(default_factory=dict)
    reference_nll: dict[str, list[npt.NDArray[np.float64]]] = field(default_factory=dict)
    other_nll: dict[str, list[npt.NDArray[np.float64]]] = field(default_factory=dict)

    def add(self, domain: str, reference: Floats, logits: Floats, ids: Sequence[int]) -> None:
        """Account for one window.

        Args:
            domain: what kind of text it is.
            reference: the reference's log-probabilities, ``[T, V]``.
            logits: the other model's logits, ``[T, V]``.
            ids: the window's tokens, ``[T]``.

        Raises:
            ValueError: the logits have NaN or infinite values.
        """
        other = metrics.log_softmax(logits)
        self.divergence.setdefault(domain, []).append(metrics.kl_divergence(reference, other))
        self.agreement.setdefault(domain, []).append(metrics.top1_agreement(reference, other))
        self.reference_nll.setdefault(domain, []).append(metrics.negative_log_likelihood(reference, ids))
        self.other_nll.setdefault(domain, []).append(metrics.negative_log_likelihood(other, ids))

    def figures(self, domain: str | None = None) -> dict[str, float]:
        """``mean_kl`` and ``p99_kl`` (nats), ``top1``, both perplexities and their ratio; of one domain or of all."""
        domains = [domain] if domain else list(self.divergence)

        def joined(parts: dict[str, list[npt.NDArray[np.float64]]]) -> npt.NDArray[np.float64]:
            return np.concatenate([part for name in domains for part in parts[name]])

        divergence = joined(self.divergence)
        agreement = np.concatenate([part for name in domains for part in self.agreement[name]])
        reference, other = float(joined(self.reference_nll).mean()), float(joined(self.other_nll).mean())
        return {
            "positions": len(divergence),
            "mean_kl": round(float(divergence.mean()), 6),
            "p99_kl": round(float(np.quantile(divergence, 0.99)), 6),
            "top1": round(float(agreement.mean()), 6),
            "reference_perplexity": round(float(np.exp(reference)), 4),
            "perplexity": round(float(np.exp(other)), 4),
            "perplexity_ratio": round(float(np.exp(other - reference)), 6),
        }

    @property
    def domains(self) -> list[str]:
        """The domains seen, in order."""
        return list(self.divergence)
