"""Privacy accounting: upper bounds on what an operator can learn about labels, as μ, (ε, δ), AUC or information.

Everything that depends on labels reaches an operator through a Gaussian mechanism: a vector a_t plus noise of standard
deviation σ_t, where a_t may depend on the labels and on all earlier messages. A message *costs* |a_t|² / σ_t². A filter
(`blindtune.privacy.ledger`) keeps the sum of costs below a public bound A for any labels and any sequence of messages.
For any two labelings the squared distances of the means then add up to Σ |a_t - a'_t|² / σ_t² ≤ (√A + √A)² = 4 A, so
the whole view of an operator is μ-GDP with

    μ = 2 √A        (fully adaptive composition: Smith and Thakurta 2022; Gaussian DP: Dong, Roth and Su 2022)

and the mutual information of all labels with the whole view is at most A / 2 = μ² / 8 nats (chain rule). Both hold for
*any* two labelings, so each label is covered through every path by which it acts, including the client's state.
docs/labels/guarantee.md has the proof with its assumptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, cast

from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import norm

DELTA = 1e-5
"""The default δ for which ε is reported."""


@dataclass(frozen=True)
class Guarantee:
    """Upper bounds on what an operator's view reveals about labels.

    Attributes:
        epsilon, delta: the view is (ε, δ)-differentially private in the labels.
        auc_bound: largest AUC of any test that distinguishes two labelings.
        mu: μ of Gaussian differential privacy; None if the mechanism isn't Gaussian.
        bits: mutual information of all labels with the view, in bits; None if no bound is known.
    """

    epsilon: float
    delta: float
    auc_bound: float
    mu: float | None = None
    bits: float | None = None

    def report(self, prefix: str = "") -> dict[str, float]:
        """Returns the known bounds by name, for a table or a progress line. `prefix` precedes each name."""
        values = {
            "mu": self.mu, "epsilon": self.epsilon, "delta": self.delta, "auc_bound": self.auc_bound,
            "information_bits": self.bits,
        }  # fmt: skip
        return {prefix + name: value for name, value in values.items() if value is not None}


class Accountant(Protocol):
    """An object that bounds what a run can have revealed to one operator so far."""

    def guarantee(self, delta: float = DELTA) -> Guarantee:
        """Returns the bounds, with ε for this δ."""
        ...


def gaussian_guarantee(mu: float, delta: float = DELTA) -> Guarantee:
    """Returns the bounds that follow from μ-GDP. μ may be infinite: then nothing is private.

    Raises:
        ValueError: μ < 0 or δ outside (0, 1).
    """
    bits = mu**2 / 8.0 / math.log(2.0)
    return Guarantee(epsilon(mu, delta), delta, auc_bound(mu), mu, bits)


@dataclass(frozen=True)
class PureAccountant:
    """Accountant of a mechanism whose ε-DP guarantee doesn't grow with steps or operators: randomised response."""

    epsilon: float

    @property
    def mu(self) -> float:
        """The μ for which ε-DP implies μ-GDP: 2 Φ⁻¹(e^ε / (1 + e^ε)).

        Both trade-off functions pass through (0, 1) and have the same fixed point. Between the two points that of ε-DP
        is a straight line, and that of μ-GDP, which is convex, lies below it.
        """
        return 2.0 * float(norm.isf(expit(-self.epsilon)))

    def guarantee(self, delta: float = DELTA) -> Guarantee:
        """Returns pure ε-DP, so δ = 0 whatever `delta` is."""
        return Guarantee(self.epsilon, 0.0, 1.0 / (1.0 + math.exp(-self.epsilon)))


def allowance(mu: float) -> float:
    """Returns A = μ² / 4, the largest sum of costs with which a run is μ-GDP."""
    return mu**2 / 4.0


def mu_of(cost: float) -> float:
    """Returns μ = 2 √A for the sum of costs A."""
    return 2.0 * math.sqrt(cost)


def epsilon(mu: float, delta: float) -> float:
    """Returns the ε for which μ-GDP implies (ε, δ)-DP. It solves δ = Φ(−ε/μ + μ/2) − e^ε Φ(−ε/μ − μ/2).

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
    """Returns the largest AUC that any test between two labelings can reach under μ-GDP: Φ(μ / √2)."""
    return float(norm.cdf(mu / math.sqrt(2.0)))


def mean_advantage(nats: float, labels: int) -> float:
    """Returns a bound on an attacker's mean advantage over chance in guessing labels that are independent given texts.

    Pinsker's inequality for each label and Jensen's for their mean give √(nats / 2 labels), in units of probability.
    Chance is the success rate of the best attacker who has the texts alone.

    Args:
        nats: mutual information of all labels with the attacker's view.
        labels: number of labels.
    """
    return min(1.0, math.sqrt(nats / (2.0 * labels))) if labels else 1.0


def _delta(eps: float, mu: float) -> float:
    """Returns the δ for which μ-GDP implies (ε, δ)-DP."""
    upper = float(norm.cdf(-eps / mu + mu / 2))
    return upper - math.exp(eps + float(norm.logcdf(-eps / mu - mu / 2)))
