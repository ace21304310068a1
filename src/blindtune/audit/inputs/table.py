"""Hidden states of every token of the vocabulary in one context, and how real ones scatter around them.

    s_A ≈ f(token after a fixed context) + r,   r ~ N(m, C) fitted on public text, disturbance included

That r is normal with one covariance is false and works: −½ |C^(−1/2) (s_A − f − m)|² ranks the right token of 49,152
first almost always after two blocks. A text's first token has no context, so it has a table and an r of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from blindtune.audit.inputs.attacker import Attacker
from blindtune.audit.inputs.observe import Observed
from blindtune.audit.inputs.reader import Reader
from blindtune.audit.inputs.shortlist import Shortlist

CONTEXT = 6
"""Public tokens before each token of the table."""
AT_ONCE = 2048
FLOOR = 1e-6
"""Of a table's variance, added to that of residuals: a bottom that is known exactly leaves none."""


@dataclass(frozen=True)
class Scatter:
    """A normal distribution of residuals: mean `(d,)`, and `whiten (d, d)` that makes its covariance the identity."""

    mean: Tensor
    whiten: Tensor

    @staticmethod
    def of(residuals: Tensor, floor: Tensor) -> Scatter:
        """From `(N, d)`, shrunk towards independence, the more the fewer they are; variances `floor (d,)` are added."""
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
        """Up to a constant, `(…,)` for `(…, d)`."""
        return -0.5 * ((residuals - self.mean) @ self.whiten).square().sum(-1)


@dataclass(frozen=True)
class Table:
    """`states (V, d)` as an attacker expects to read them, of tokens after a context or, `first`, at the start."""

    states: Tensor
    scatter: Scatter

    @cached_property
    def _whitened(self) -> Tensor:
        return (self.states - self.states.mean(0)) @ self.scatter.whiten  # (V, d)

    def log_densities(self, observed: Tensor, offset: Tensor | None = None) -> Tensor:
        """`(n, V)` for s_A `(n, d)`.

        Args:
            offset: what another context adds to all states `(n, d)`, in place of the scatter's mean.
        """
        centre = self.states.mean(0) + (self.scatter.mean if offset is None else offset)
        given, table = (observed - centre) @ self.scatter.whiten, self._whitened  # (n, d), (V, d)
        return given @ table.T - 0.5 * (given.square().sum(1, keepdim=True) + table.square().sum(1))


def tables(attacker: Attacker) -> tuple[Table, Table]:
    """At the start of a text, and after a context. Made once."""
    return attacker.remember("tables", lambda: _tables(attacker))


def _tables(attacker: Attacker) -> tuple[Table, Table]:
    rows = attacker.rows(attacker.budget.public_rows)
    context = next((row for row in rows if len(row) >= CONTEXT), rows[-1])[:CONTEXT]
    batches = attacker.public_batches()
    seen = torch.cat([attacker.simulate(batch.hidden) for batch in batches])
    ids = torch.cat([batch.ids for batch in batches])
    first = torch.cat([batch.positions for batch in batches]) == 0
    result: list[Table] = []
    for before, chosen in (([], first), (context, ~first)):
        states = attacker.expected(_states(attacker, before))
        scatter = Scatter.of(seen[chosen] - states[ids[chosen]], FLOOR * states.var(0) + 1e-12)
        result.append(Table(states, scatter))
    return result[0], result[1]


@torch.no_grad()
def _states(attacker: Attacker, context: list[int]) -> Tensor:
    """s_A of every token after the context, `(V, d)`."""
    reader = Reader(attacker.simulated.causal, attacker.sent)
    for token in context:
        reader.read(torch.tensor([token], device=attacker.device))
    vocabulary = torch.arange(len(attacker.embeddings), device=attacker.device)
    return torch.cat([reader.imagine(tokens.unsqueeze(0))[0].float() for tokens in vocabulary.split(AT_ONCE)])


def scatter_around(residuals: Tensor, attacker: Attacker) -> Scatter:
    """Of residuals `(N, d)` that may be zero."""
    return Scatter.of(residuals, FLOOR * tables(attacker)[1].states.var(0) + 1e-12)


def nearest_shortlist(observed: Observed, attacker: Attacker) -> Shortlist:
    """Tokens whose state in the table is nearest, with public frequencies as the prior."""
    first, later = tables(attacker)
    start = observed.positions == 0

    def score(some: slice) -> Tensor:
        states, at_start = observed.s_a[some], start[some]
        scores = later.log_densities(states) + attacker.log_frequencies
        if at_start.any():
            scores[at_start] = first.log_densities(states[at_start]) + attacker.log_first_frequencies
        return scores

    def make() -> Shortlist:
        return Shortlist.of(score, len(observed.s_a), attacker.budget.candidates)

    return observed.remember("nearest", attacker, make)
