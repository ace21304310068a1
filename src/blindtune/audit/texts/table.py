"""Computes hidden states of the whole vocabulary in one context, and the scatter of real hidden states around them.

    s_A ≈ f(token after a fixed context) + r,   r ~ N(m, C) fitted on public text, with the client's perturbation

It isn't true that r is normal with one covariance, but the model suffices: after two blocks,
−½ |C^(−1/2) (s_A − f − m)|² almost always ranks the right token of 49,152 first. The first token of a text has no
context, so it has its own table and its own r.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from blindtune.audit.texts.attacker import Attacker
from blindtune.audit.texts.observe import Observed
from blindtune.audit.texts.reader import Reader
from blindtune.audit.texts.shortlist import Shortlist

CONTEXT = 6
"""Number of public tokens before each token of the table."""
AT_ONCE = 2048
FLOOR = 1e-6
"""Fraction of a table's variance that is added to that of residuals, which may be zero."""


@dataclass(frozen=True)
class Scatter:
    """Describes a normal distribution of residuals by its mean `(d,)` and `whiten (d, d)`, which whitens them."""

    mean: Tensor
    whiten: Tensor

    @staticmethod
    def of(residuals: Tensor, floor: Tensor) -> Scatter:
        """Fits residuals `(N, d)`.

        The covariance is shrunk towards its diagonal, more if N is small. `floor (d,)` is added to the variances.
        """
        residuals = residuals.double()
        count, dim = residuals.shape
        mean = residuals.mean(0)
        covariance = (residuals - mean).T @ (residuals - mean) / max(count, 1)
        shrink = dim / (dim + count)
        variances = covariance.diagonal()
        covariance = (1 - shrink) * covariance + shrink * variances.diag() + floor.double().diag()
        root = torch.linalg.cholesky(covariance)
        identity = torch.eye(dim, dtype=torch.float64, device=residuals.device)
        inverse = torch.linalg.solve_triangular(root, identity, upper=False)
        return Scatter(mean.float(), inverse.T.float())

    def log_density(self, residuals: Tensor) -> Tensor:
        """Returns the log density `(…,)` of residuals `(…, d)`, up to a constant."""
        return -0.5 * ((residuals - self.mean) @ self.whiten).square().sum(-1)


@dataclass(frozen=True)
class Table:
    """Holds the states `(V, d)` that an attacker expects to receive for each token, and the scatter around them."""

    states: Tensor
    scatter: Scatter

    @cached_property
    def _whitened(self) -> Tensor:
        return (self.states - self.states.mean(0)) @ self.scatter.whiten  # (V, d)

    def log_densities(self, observed: Tensor, offset: Tensor | None = None) -> Tensor:
        """Returns log densities `(n, V)` of each token, up to a constant, for s_A `(n, d)`.

        Args:
            offset: what the context adds to all states, `(n, d)`; the mean of the scatter if None.
        """
        centre = self.states.mean(0) + (self.scatter.mean if offset is None else offset)
        given, table = (observed - centre) @ self.scatter.whiten, self._whitened  # (n, d), (V, d)
        return given @ table.T - 0.5 * (given.square().sum(1, keepdim=True) + table.square().sum(1))


def tables(attacker: Attacker) -> tuple[Table, Table]:
    """Returns the tables for the first token of a text and for later tokens, which are computed once."""
    return attacker.remember("tables", lambda: _tables(attacker))


def _tables(attacker: Attacker) -> tuple[Table, Table]:
    rows = attacker.rows(attacker.budget.public_rows)
    context = next((row for row in rows if len(row) >= CONTEXT), rows[-1])[:CONTEXT]
    batches = attacker.public_batches()
    simulated = torch.cat([attacker.simulate(batch.hidden) for batch in batches])
    ids = torch.cat([batch.ids for batch in batches])
    first = torch.cat([batch.positions for batch in batches]) == 0
    result: list[Table] = []
    for before, chosen in (([], first), (context, ~first)):
        states = attacker.expected(_states(attacker, before))
        scatter = Scatter.of(simulated[chosen] - states[ids[chosen]], FLOOR * states.var(0) + 1e-12)
        result.append(Table(states, scatter))
    return result[0], result[1]


@torch.no_grad()
def _states(attacker: Attacker, context: list[int]) -> Tensor:
    """Returns s_A of every token after the context, `(V, d)`."""
    reader = Reader(attacker.simulated.causal, attacker.sent)
    for token in context:
        reader.read(torch.tensor([token], device=attacker.device))
    vocabulary = torch.arange(len(attacker.embeddings), device=attacker.device)
    return torch.cat([reader.imagine(tokens.unsqueeze(0))[0].float() for tokens in vocabulary.split(AT_ONCE)])


def scatter_around(residuals: Tensor, attacker: Attacker) -> Scatter:
    """Returns the scatter that is fitted to residuals `(N, d)`; the residuals may be zero."""
    return Scatter.of(residuals, FLOOR * tables(attacker)[1].states.var(0) + 1e-12)


def nearest_shortlist(observed: Observed, attacker: Attacker) -> Shortlist:
    """Returns the tokens whose states in the table are nearest, with public frequencies as prior."""
    first, later = tables(attacker)
    start = observed.positions == 0

    def score(positions: slice) -> Tensor:
        states, at_start = observed.s_a[positions], start[positions]
        scores = later.log_densities(states) + attacker.log_frequencies
        if at_start.any():
            scores[at_start] = first.log_densities(states[at_start]) + attacker.log_first_frequencies
        return scores

    def make() -> Shortlist:
        return Shortlist.of(score, len(observed.s_a), attacker.budget.candidates)

    return observed.remember("nearest", attacker, make)
