"""Optimizer inversion: the step from θ_t to θ_{t+1} tells the batch's gradient, and from it the labels.

For two classes and a linear head, the gradient at the hidden states of text b is r_b u: a residual r_b, negative for
one class and positive for the other, times one direction u = (u_1 … u_n) that all texts share and that changes slowly
over a run. Plain SGD moves the adapters by

    θ_{t+1} − θ_t = −η Σ_b r_b J_bᵀ u,        J_b = ∂h(x_b, θ_t)/∂θ_t, which the server can compute.

Where gradients are taken at adapters that stand still, J_b is taken there too (`Update.at`).

This is linear in r for known u and linear in u for known r. We alternate: least squares for the B residuals,
conjugate gradients for u, starting from the direction into which the update itself moved the batch's hidden states.
The next update starts from the last one's u. There are many more equations (n P) than unknowns (B + n d).

Adam divides each coordinate by its running size and adds a running mean (`blindtune.audit.labels.adam`). Padded
adapters move by their pads, so there is no update to invert.

Works for two classes, a linear head (or any whose gradients at the hidden states have one direction), and a server
that sees consecutive steps. Regularizers that pull on hidden states in other directions are not modelled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blindtune.audit.labels.registry import Reconstructed, observes_updates
from blindtune.audit.observe import Update
from blindtune.audit.recompute import Jacobian

Observed = Callable[[Update], tuple[Jacobian, NDArray[np.float64]]]
Read = Callable[[Jacobian, Tensor, Tensor | None], "Explanation"]
"""What explains a step `(n, P)`, starting from u `(n, d)` if there is one."""
FIRST_ROUNDS, ROUNDS, CONJUGATE_STEPS = 5, 1, 6


@observes_updates("update inverted", observes="consecutive adapters", needs=("the model", "the texts of each step"))
def invert_updates(updates: Sequence[Update], observed: Observed) -> Reconstructed:
    """Residuals `(N, 1)`, up to one sign for all, from consecutive updates."""
    return read_residuals(updates, observed, lambda jacobian, step, u: explain(jacobian, step.float(), u))


def read_residuals(updates: Sequence[Update], observed: Observed, read: Read) -> Reconstructed:
    """Residuals `(N, 1)` of all updates, each update's of mean size one; `read` starts from the last one's u."""
    residuals: list[Tensor] = []
    u: Tensor | None = None
    for update in updates:
        jacobian, step = observed(update)
        found = read(jacobian, torch.from_numpy(step), u)
        u = found.u
        residuals.append(found.r / found.r.abs().mean().clamp_min(1e-30))
    rows = [row for update in updates for row in update.rows]
    return torch.cat(residuals).numpy().astype(np.float32)[:, None], rows


@dataclass(frozen=True)
class Explanation:
    """Residuals `(B,)`, a direction `(n, d)`, and the gradient that they give, Σ_b r_b J_bᵀ u, `(n, P)`."""

    r: Tensor
    u: Tensor
    gradient: Tensor

    def improved(self, jacobian: Jacobian, gradient: Tensor) -> Explanation:
        """One round nearer to a gradient of the adapters `(n, P)`."""
        gradient = gradient / gradient.norm().clamp_min(1e-30)
        return _along(jacobian, gradient, _direction(jacobian, gradient, self))


def explain(jacobian: Jacobian, gradient: Tensor, u: Tensor | None) -> Explanation:
    """What explains a gradient of the adapters `(n, P)` best, starting from u if there is one."""
    gradient = gradient / gradient.norm().clamp_min(1e-30)
    rounds = FIRST_ROUNDS if u is None else ROUNDS
    if u is None:
        u = _moved_direction(jacobian, gradient)
    found = _along(jacobian, gradient, u)
    for _ in range(rounds):
        found = found.improved(jacobian, gradient)
    return found


def _moved_direction(jacobian: Jacobian, change: Tensor) -> Tensor:
    """The direction `(n, d)` into which the change moved the batch's hidden states most."""
    moved = jacobian.push(change)  # (n, B, d)
    n, _, d = moved.shape
    right = torch.linalg.svd(moved.permute(1, 0, 2).flatten(1), full_matrices=False)[2]  # of (B, n d)
    return right[0].reshape(n, d)


def _along(jacobian: Jacobian, change: Tensor, u: Tensor) -> Explanation:
    """Least squares for r in Σ_b r_b J_bᵀ u = change."""
    gradients = jacobian.per_example(u).double()  # (B, n P)
    gram = gradients @ gradients.T
    ridge = 1e-6 * gram.diagonal().mean().clamp_min(1e-30)
    right = gradients @ change.flatten().double()
    r = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), right)
    return Explanation(r.float(), u, (r @ gradients).float().reshape(change.shape))


def _direction(jacobian: Jacobian, change: Tensor, found: Explanation) -> Tensor:
    """A few conjugate-gradient steps from u towards the least-squares solution for known r; of length one."""
    weights, u = found.r[None, :, None], found.u
    rest = change - found.gradient
    search, size = torch.zeros_like(u), torch.tensor(torch.inf)
    for _ in range(CONJUGATE_STEPS):
        steepest = (weights * jacobian.push(rest)).sum(1)
        new = steepest.pow(2).sum()
        search, size = steepest + new / size.clamp_min(1e-30) * search, new
        image = jacobian.pull(weights * search.unsqueeze(1))
        length = size / image.pow(2).sum().clamp_min(1e-30)
        u, rest = u + length * search, rest - length * image
    return u / u.norm().clamp_min(1e-30)
