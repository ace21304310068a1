"""Optimizer inversion: reconstructs the gradient of a batch from one update, and the labels from the gradient.

For two classes and a linear head, the gradient at the hidden states of text b is r_b u: a residual r_b, which is
negative for one class and positive for the other, times one direction u = (u_1 … u_n) that all texts share and that
changes slowly over a run. Plain SGD moves the adapters by

    θ_{t+1} − θ_t = −η Σ_b r_b J_bᵀ u,        J_b = ∂h(x_b, θ_t)/∂θ_t, which the server can compute.

If the client takes gradients at fixed adapters, the attack takes J_b at these adapters too (`Update.at`).

The equation is linear in r for known u, and linear in u for known r. The attack alternates: it solves for the B
residuals by least squares, and for u by conjugate gradients. It starts from the direction in which the update moved the
hidden states of the batch; for each further update it starts from the u of the one before. There are many more
equations (n P) than unknowns (B + n d).

Adam divides each coordinate by its running size and adds a running mean; `blindtune.audit.labels.adam` inverts it.
Padded adapters change by fresh pads at each step, so they have no update to invert.

The attack works for two classes, for a linear head (or any head whose gradients at the hidden states have one
direction), and for a server that receives consecutive adapters. It does not model regularizers that move hidden states
in other directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blindtune.audit.channel_id import ChannelId, ChannelKind
from blindtune.audit.labels.registry import Reconstructed, observes_updates
from blindtune.audit.observe import Update
from blindtune.audit.recompute import Jacobian
from blindtune.audit.solvers import TINY, conjugate_gradients

Observed = Callable[[Update], tuple[Jacobian, NDArray[np.float64]]]
Explain = Callable[[Jacobian, Tensor, Tensor | None], "Explanation"]
"""Fits residuals and a direction to a step `(n, P)`, starting from u `(n, d)` if it is given."""
FIRST_ROUNDS, ROUNDS, CONJUGATE_STEPS = 5, 1, 6
INVERTED = ChannelId(ChannelKind.UPDATE, modifier="inverted")


@observes_updates(INVERTED, observes="consecutive adapters", needs=("the model", "the texts of each step"))
def invert_updates(updates: Sequence[Update], observed: Observed) -> Reconstructed:
    """Returns residuals `(N, 1)` from updates under plain SGD, up to one sign for all."""
    return read_residuals(updates, observed, lambda jacobian, step, u: explain(jacobian, step.float(), u))


def read_residuals(updates: Sequence[Update], observed: Observed, explain_step: Explain) -> Reconstructed:
    """Returns residuals `(N, 1)` of all updates, scaled to a mean size of one in each update.

    Args:
        explain_step: fits residuals and a direction to one step, starting from the u of the step before.
    """
    residuals: list[Tensor] = []
    u: Tensor | None = None
    for update in updates:
        jacobian, step = observed(update)
        explanation = explain_step(jacobian, torch.from_numpy(step), u)
        u = explanation.u
        residuals.append(explanation.r / explanation.r.abs().mean().clamp_min(TINY))
    rows = [row for update in updates for row in update.rows]
    return torch.cat(residuals).numpy().astype(np.float32)[:, None], rows


@dataclass(frozen=True)
class Explanation:
    """Holds residuals r `(B,)`, a direction u `(n, d)`, and their gradient Σ_b r_b J_bᵀ u `(n, P)`."""

    r: Tensor
    u: Tensor
    gradient: Tensor

    def improved(self, jacobian: Jacobian, gradient: Tensor) -> Explanation:
        """Returns the result of one more round of fitting a gradient of the adapters `(n, P)`."""
        gradient = gradient / gradient.norm().clamp_min(TINY)
        return _fit_residuals(jacobian, gradient, _fit_direction(jacobian, gradient, self))


def explain(jacobian: Jacobian, gradient: Tensor, u: Tensor | None) -> Explanation:
    """Fits r and u to a gradient of the adapters `(n, P)`, starting from u if it is given."""
    gradient = gradient / gradient.norm().clamp_min(TINY)
    rounds = FIRST_ROUNDS if u is None else ROUNDS
    if u is None:
        u = _moved_direction(jacobian, gradient)
    explanation = _fit_residuals(jacobian, gradient, u)
    for _ in range(rounds):
        explanation = explanation.improved(jacobian, gradient)
    return explanation


def _moved_direction(jacobian: Jacobian, change: Tensor) -> Tensor:
    """Returns the direction `(n, d)` in which the change moves the hidden states of the batch most."""
    moved = jacobian.push(change)  # (n, B, d)
    n, _, d = moved.shape
    right = torch.linalg.svd(moved.permute(1, 0, 2).flatten(1), full_matrices=False)[2]  # of (B, n d)
    return right[0].reshape(n, d)


def _fit_residuals(jacobian: Jacobian, change: Tensor, u: Tensor) -> Explanation:
    """Solves Σ_b r_b J_bᵀ u = change for r by least squares."""
    gradients = jacobian.per_example(u).double()  # (B, n P)
    gram = gradients @ gradients.T
    ridge = 1e-6 * gram.diagonal().mean().clamp_min(TINY)
    right = gradients @ change.flatten().double()
    r = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), right)
    return Explanation(r.float(), u, (r @ gradients).float().reshape(change.shape))


def _fit_direction(jacobian: Jacobian, change: Tensor, explanation: Explanation) -> Tensor:
    """Returns u, of length one, after a few conjugate-gradient steps towards the least-squares solution for known r."""
    weights = explanation.r[None, :, None]
    u = conjugate_gradients(
        apply=lambda direction: jacobian.pull(weights * direction.unsqueeze(1)),
        transpose=lambda residual: (weights * jacobian.push(residual)).sum(1),
        residual=change - explanation.gradient,
        start=explanation.u,
        squared_norm=lambda x: x.pow(2).sum(),
        iterations=CONJUGATE_STEPS,
    )
    return u / u.norm().clamp_min(TINY)
