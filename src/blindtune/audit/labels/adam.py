"""Optimizer inversion under Adam: a step reveals the sign of every coordinate of the gradient.

Adam moves each coordinate of the adapters by (Kingma and Ba 2015, without ε and weight decay)

    Δ_t = −η_t (a + b g_t) / √(c + d g_t²),     a = β₁ m_{t−1} / (1 − β₁ᵗ),   b = (1 − β₁) / (1 − β₁ᵗ),
                                                c = β₂ v_{t−1} / (1 − β₂ᵗ),   d = (1 − β₂) / (1 − β₂ᵗ).

An attacker who has received all adapters since the first step knows m and v, except for one positive factor for each
coordinate (the steps of Adam do not depend on the scale of a gradient). It solves this quadratic equation for g_t. The
equation has one or two solutions; the attack takes the smaller one. The attacker need not know the rate η_t:
|a + b g| ≤ √(a²/c + b²/d) √(c + d g²), so η_t is the largest step of all coordinates, in units of that bound.

The factors stay unknown, so the attack uses signs only. It fits the model of a gradient, Σ_b r_b J_bᵀ u
(`blindtune.audit.labels.inversion`), to the signs in several rounds: each round gives the signs the sizes of the fitted
gradient, and fits the model to the result. There are many more signs (n P) than unknowns (B + n d), which compensates
for the unknown sizes. On MiniLM with real texts, the residuals of the first eight steps reveal the labels with AUC
0.99; with the model of plain SGD, the same steps give 0.97.

The attack assumes that the operator receives consecutive adapters from the first step of the optimizer, and that β is
(0.9, 0.99), the default of blindtune; for other β the first steps are nearly the same. Adam moments that start at
random values prevent the attack until their influence has decayed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blindtune.audit.channel_id import ChannelId, ChannelKind
from blindtune.audit.labels.inversion import Explanation, Observed, explain, read_residuals
from blindtune.audit.labels.registry import Reconstructed, observes_updates
from blindtune.audit.observe import Update
from blindtune.audit.recompute import Jacobian
from blindtune.audit.solvers import TINY

BETAS = (0.9, 0.99)
TURNS = 4
INVERTED = ChannelId(ChannelKind.UPDATE, modifier="inverted, Adam")


@observes_updates(
    INVERTED,
    observes="all adapters since the first step",
    needs=("the model", "the texts of each step", "Adam's β"),
)
def invert_adam(updates: Sequence[Update], observed: Observed) -> Reconstructed:
    """Returns residuals `(N, 1)` from the first updates of a run, up to one sign for all."""
    adam = Adam()

    def explain_step(jacobian: Jacobian, step: Tensor, u: Tensor | None) -> Explanation:
        signs = adam.undo(step).sign().float()
        explanation = explain(jacobian, signs, u)
        for _ in range(TURNS):
            explanation = explanation.improved(jacobian, signs * explanation.gradient.abs())
        return explanation

    return read_residuals(updates, observed, explain_step)


class Adam:
    """Tracks the state of the client's optimizer, in units of the first gradient of each coordinate."""

    def __init__(self) -> None:
        self._steps = 0
        self._m = self._v = torch.zeros(1, dtype=torch.float64)

    def undo(self, change: Tensor) -> Tensor:
        """Returns the gradients `(n, P)` of this change, in units of the size of each coordinate's first gradient."""
        y, t, (b1, b2) = -change.double(), self._steps + 1, BETAS
        a, b = b1 * self._m / (1 - b1**t), (1 - b1) / (1 - b1**t)
        c, d = b2 * self._v / (1 - b2**t), (1 - b2) / (1 - b2**t)
        started = self._v > 0
        bound = (torch.where(started, a.square() / c.clamp_min(TINY), 0.0) + b**2 / d).sqrt()
        y = y / (y.abs() / bound).max().clamp_min(TINY)
        gradient = torch.where(started, _smaller_solution(a, b, c, d, y), y.sign())
        self._m = b1 * self._m + (1 - b1) * gradient
        self._v = b2 * self._v + (1 - b2) * gradient.square()
        self._steps = t
        return gradient


def _smaller_solution(a: Tensor, b: float, c: Tensor, d: float, y: Tensor) -> Tensor:
    """Returns the smaller x with (a + b x) / √(c + d x²) = y."""
    # (y² d − b²) x² − 2 a b x + (y² c − a²) = 0, which has a further solution where a + b x has the wrong sign
    p, q, s = y.square() * d - b**2, -a * b, y.square() * c - a.square()
    root = (q.square() - p * s).clamp_min(0).sqrt()
    stable = -(q + torch.where(q >= 0, root, -root))  # of −q ± √(q² − p s), the one without cancellation
    first, second = stable / _nonzero(p), s / _nonzero(stable)
    first_fits = (a + b * first) * y >= 0
    second_fits = (a + b * second) * y >= 0
    return torch.where(first_fits & (~second_fits | (first.abs() < second.abs())), first, second)


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x.abs() < TINY, TINY, x)
