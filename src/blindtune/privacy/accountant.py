"""What operators can learn at most: two bounds, on two kinds of questions.

*One label, in the gradient channel*: Gaussian differential privacy (Dong, Roth, Su 2022). One share at one operator is
a Gaussian mechanism. Changing one example's label moves that example's row of the clipped gradient by at most 2C, so k
views of it have μ = 2 C √k / σ. This is about the shares' rows for one example, with the client's state (head,
adapters, regularizer) and all other rows held fixed.

*All labels together, in everything*: mutual information. Each message m_t of an operator is noise around something
that depends on the labels and on all that went before. Its divergence from the noise alone is at most k_t, whatever
went before, so by the chain rule I(all labels; m_1 … m_T) ≤ Σ k_t, also where a label acts on later steps
through the client's state. A share has k = C² / 2σ² for each example in it, a padded adapter R² / 8 s² σ²
(`blindtune.privacy.pads`). Labels that are independent given the texts share this sum among them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import cast

import torch
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor

from blindtune.errors import CheckpointError


class Accountant:
    """Counts, for every operator and example, the shares that depended on the example's gradient.

    Operators go by their address: a resumed run may name them in another order.
    """

    def __init__(self, clip_norm: float, sigma: float) -> None:
        self.clip_norm, self.sigma = clip_norm, sigma
        self._views: dict[str, Counter[str]] = {}
        self.met = False
        """Whether all shares of a gradient went to one operator: then nothing is private."""

    def record_meeting(self) -> None:
        """All shares of one gradient met at one operator."""
        self.met = True

    def record(self, operator: str, examples: Iterable[str]) -> None:
        """One more view of each of these examples at this operator."""
        self._views.setdefault(operator, Counter()).update(examples)

    def mu_after(self, operator: str, examples: Iterable[str]) -> float:
        """What `mu` would be if `record` were called with these."""
        known = self._views.get(operator, Counter[str]())
        most = max((known[example] + count for example, count in Counter(examples).items()), default=0)
        return math.inf if self.met else gaussian_mu(self.clip_norm, self.sigma, max(self.views(), most))

    def views(self) -> int:
        """The largest number of views of one example at one operator."""
        return max((max(counts.values(), default=0) for counts in self._views.values()), default=0)

    def mu(self) -> float:
        """μ of the run so far, for the example and the operator where it is largest."""
        return math.inf if self.met else gaussian_mu(self.clip_norm, self.sigma, self.views())

    def nats(self) -> float:
        """What shares can tell one operator about all labels together, where it is most."""
        views = max((sum(counts.values()) for counts in self._views.values()), default=0)
        return math.inf if self.met else views * self.clip_norm**2 / (2.0 * self.sigma**2)

    def state(self) -> Tensor:
        """The counts as bytes (JSON), for a checkpoint."""
        return _as_bytes({operator: dict(views) for operator, views in self._views.items()})

    def load_state(self, state: Tensor) -> None:
        """Goes on from the counts of a checkpoint.

        Raises:
            CheckpointError: it counts operators by number, as checkpoints once did.
        """
        counts: dict[str, dict[str, int]] = json.loads(bytes(state.numpy()))
        if any(operator.isdecimal() for operator in counts):
            raise CheckpointError(
                "The checkpoint knows operators by their number, and so not which server has seen what.",
                remedy="Resume with the version that wrote it, or start anew without --resume.",
            )
        self._views = {operator: Counter(views) for operator, views in counts.items()}


class InformationLedger:
    """Counts what different messages can tell each operator about all labels together; equal messages count once."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[str, float]] = {}
        self.met = False
        """Whether messages that must be kept apart went to one operator: then nothing is private."""

    def after(self, operator: str, message: str, nats: float) -> float:
        """What `nats` of this operator would be if `record` were called with these."""
        seen = self._seen.get(operator, {})
        return sum(seen.values()) + (0.0 if message in seen else nats)

    def record(self, operator: str, message: str, nats: float) -> None:
        """The operator is sent this message."""
        self._seen.setdefault(operator, {})[message] = nats

    def messages(self) -> int:
        """Different messages that one operator has seen, where they are most."""
        return max((len(seen) for seen in self._seen.values()), default=0)

    def nats(self) -> float:
        """The bound for the operator where it is largest."""
        return math.inf if self.met else max((sum(seen.values()) for seen in self._seen.values()), default=0.0)

    def state(self) -> Tensor:
        """As bytes (JSON), for a checkpoint."""
        return _as_bytes(self._seen)

    def load_state(self, state: Tensor) -> None:
        """Adds what `state` has counted: whatever was sent stays sent."""
        counts: dict[str, dict[str, float]] = json.loads(bytes(state.numpy()))
        for operator, seen in counts.items():
            self._seen.setdefault(operator, {}).update(seen)


def mean_advantage(nats: float, labels: int) -> float:
    """How far above chance any attacker's guesses of `labels` labels, independent given the texts, are on average.

    Pinsker's inequality for each label and Jensen's for their mean: √(nats / 2 labels), in units of probability. Chance
    is what the best attacker guesses from the texts alone.
    """
    return min(1.0, math.sqrt(nats / (2.0 * labels))) if labels else 1.0


def _as_bytes(value: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def gaussian_mu(clip_norm: float, sigma: float, views: int) -> float:
    """μ = 2 C √views / σ."""
    return 2.0 * clip_norm * math.sqrt(views) / sigma


def epsilon(mu: float, delta: float) -> float:
    """The ε that goes with δ under μ-GDP: δ(ε) = Φ(−ε/μ + μ/2) − e^ε Φ(−ε/μ − μ/2).

    Raises:
        ValueError: μ < 0 or δ outside (0, 1).
    """
    if mu < 0 or not 0 < delta < 1:
        raise ValueError(f"mu = {mu} and delta = {delta}: need mu of at least 0 and delta between 0 and 1.")
    if mu == 0 or _delta(0.0, mu) <= delta:
        return 0.0
    high = 1.0
    while _delta(high, mu) > delta:
        high *= 2

    def excess(value: float) -> float:
        return _delta(value, mu) - delta

    return float(cast(float, brentq(excess, 0.0, high)))


def auc_bound(mu: float) -> float:
    """The best AUC that any test of one label can reach under μ-GDP: Φ(μ / √2)."""
    return float(norm.cdf(mu / math.sqrt(2.0)))


def _delta(eps: float, mu: float) -> float:
    upper = float(norm.cdf(-eps / mu + mu / 2))
    return upper - math.exp(eps + float(norm.logcdf(-eps / mu - mu / 2)))
