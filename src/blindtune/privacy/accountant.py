"""What operators can learn at most: one guarantee, in the forms in which it is used.

Everything that depends on labels reaches an operator as a Gaussian mechanism: a vector a_t under noise of standard
deviation σ_t, where a_t may depend on the labels and on all messages before. A message *costs* |a_t|² / σ_t². A filter
(`blindtune.privacy.ledger`) keeps the sum of costs below a public bound A on every path, for any labels. For any two
labelings the distances of the means then add up to Σ |a_t - a'_t|² / σ_t² ≤ (√A + √A)² = 4 A, so the whole view of an
operator is μ-GDP with

    μ = 2 √A        (fully adaptive composition: Smith and Thakurta 2022; Gaussian DP: Dong, Roth and Su 2022)

and the mutual information of all labels with the whole view is at most A / 2 = μ² / 8 nats (chain rule). Both are about
*any* two labelings, so one label is covered wherever it acts, through the client's state too. docs/guarantee.md has the
proof, with its assumptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, cast

from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import norm

DELTA = 1e-5
"""The δ at which ε is stated."""


@dataclass(frozen=True)
class Guarantee:
    """What a view can tell at most, in the forms in which it is stated.

    Attributes:
        epsilon, delta: (ε, δ)-differential privacy of labels.
        auc_bound: no test that tells two labelings apart has a larger AUC.
        mu: of Gaussian differential privacy; None where the mechanism isn't Gaussian.
        bits: mutual information of all labels with the view; None where no bound is known.
    """

    epsilon: float
    delta: float
    auc_bound: float
    mu: float | None = None
    bits: float | None = None

    def report(self, prefix: str = "") -> dict[str, float]:
        """The numbers by name, for a table or a progress line."""
        values = {
            "mu": self.mu, "epsilon": self.epsilon, "delta": self.delta, "auc_bound": self.auc_bound,
            "information_bits": self.bits,
        }  # fmt: skip
        return {prefix + name: value for name, value in values.items() if value is not None}


class Accountant(Protocol):
    """Knows what a run can have told one operator so far."""

    def guarantee(self, delta: float = DELTA) -> Guarantee: ...


def gaussian_guarantee(mu: float, delta: float = DELTA) -> Guarantee:
    """Of μ-GDP. μ may be infinite: then nothing is private.

    Raises:
        ValueError: μ < 0 or δ outside (0, 1).
    """
    bits = mu**2 / 8.0 / math.log(2.0)
    return Guarantee(epsilon(mu, delta), delta, auc_bound(mu), mu, bits)


@dataclass(frozen=True)
class PureAccountant:
    """ε-differential privacy that steps and operators don't add to, as of randomised response."""

    epsilon: float

    @property
    def mu(self) -> float:
        """The μ-GDP that follows from ε-DP: 2 Φ⁻¹(e^ε / (1 + e^ε)).

        Both trade-off functions go through (0, 1) and have this fixed point; that of ε-DP is straight between them, and
        that of μ-GDP, which is convex, lies below.
        """
        return 2.0 * float(norm.isf(expit(-self.epsilon)))

    def guarantee(self, delta: float = DELTA) -> Guarantee:
        return Guarantee(self.epsilon, 0.0, 1.0 / (1.0 + math.exp(-self.epsilon)))


def allowance(mu: float) -> float:
    """A = μ² / 4: the sum of costs with which a run stays μ-GDP."""
    return mu**2 / 4.0


def mu_of(cost: float) -> float:
    """μ = 2 √A."""
    return 2.0 * math.sqrt(cost)


def epsilon(mu: float, delta: float) -> float:
    """The ε that goes with δ under μ-GDP: δ(ε) = Φ(−ε/μ + μ/2) − e^ε Φ(−ε/μ − μ/2).

    Raises:
        ValueError: μ < 0 or δ outside (0, 1).
    """
    if not mu >= 0 or not 0 < delta < 1:
        raise ValueError(f"mu = {mu} and delta = {delta}: need mu of at least 0 and delta between 0 and 1.")
    if math.isinf(mu):
        return math.inf
    if mu == 0 or _delta(0.0, mu) <= delta:
        return 0.0
    high = 1.0
    while _delta(high, mu) > delta:
        high *= 2

    def excess(value: float) -> float:
        return _delta(value, mu) - delta

    return float(cast(float, brentq(excess, 0.0, high)))


def auc_bound(mu: float) -> float:
    """The best AUC that any test of two labelings can reach under μ-GDP: Φ(μ / √2)."""
    return float(norm.cdf(mu / math.sqrt(2.0)))


def mean_advantage(nats: float, labels: int) -> float:
    """How far above chance any attacker's guesses of `labels` labels, independent given the texts, are on average.

    Pinsker's inequality for each label and Jensen's for their mean: √(nats / 2 labels), in units of probability. Chance
    is what the best attacker guesses from the texts alone.
    """
    return min(1.0, math.sqrt(nats / (2.0 * labels))) if labels else 1.0


def _delta(eps: float, mu: float) -> float:
    upper = float(norm.cdf(-eps / mu + mu / 2))
    return upper - math.exp(eps + float(norm.logcdf(-eps / mu - mu / 2)))
