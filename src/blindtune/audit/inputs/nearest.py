"""Nearest token: which token would have given the hidden state that was received?

In one context for all by table (`blindtune.audit.inputs.table`), and then in the text's own, from left to right: the
attacker runs its bottom on what it has recovered so far and on each candidate, and takes the one that fits best. From
those candidates it also sees what this context adds to all of the table, which finds more candidates.

How well one has to fit depends on how s_A scatters around what the attacker's bottom gives for the right tokens. That
is known for a defence that the attacker can simulate. What it can't (the client's bottom has learned something) shows
in the residuals of a first reading, and a second one allows for it. Where they are large, the language model's own
expectation decides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blindtune.audit.inputs.attacker import Attacker
from blindtune.audit.inputs.observe import Observed
from blindtune.audit.inputs.reader import Reader
from blindtune.audit.inputs.registry import attack
from blindtune.audit.inputs.shortlist import Shortlist
from blindtune.audit.inputs.table import Scatter, nearest_shortlist, scatter_around, tables
from blindtune.models.split import pack, unpack

FROM_MODEL = 16
"""Candidates that the language model proposes, beside those that an attack brings."""
KEPT = 0.5
"""Part of the residuals, the smallest, that a scatter is fitted on: the others may be wrong guesses."""
AS_EXPECTED = 2.0
"""Residuals of up to so many times the expected variance need no second reading."""


@attack("nearest token", observes=("s_A",), needs=("bottom", "public text"))
def nearest_token(observed: Observed, attacker: Attacker) -> Tensor:
    return nearest_shortlist(observed, attacker).best


@attack("nearest, left to right", observes=("s_A",), needs=("bottom", "trunk", "top", "public text"))
def nearest_left_to_right(observed: Observed, attacker: Attacker) -> Tensor:
    return read_in_context(observed, attacker, nearest_shortlist(observed, attacker))


def read_in_context(
    observed: Observed, attacker: Attacker, candidates: Shortlist, evidence: Shortlist | None = None
) -> Tensor:
    """Guesses `(N,)` among the candidates, read twice if the first reading doesn't fit the simulated defence.

    Args:
        evidence: what is known of each token from elsewhere.
    """
    expected = simulated_scatter(attacker)
    guess = left_to_right(observed, attacker, candidates, expected, evidence)
    residuals = smallest(residuals_of(guess, observed, attacker), attacker)
    if float(-2 * expected.log_density(residuals).mean()) < AS_EXPECTED * observed.s_a.shape[1]:
        return guess
    simple = smallest(residuals_of(candidates.best, observed, attacker), attacker)
    if simple.norm() < residuals.norm():  # of two bad readings, the better one tells more about the scatter
        residuals = simple
    return left_to_right(observed, attacker, candidates, scatter_around(residuals, attacker), evidence)


def simulated_scatter(attacker: Attacker) -> Scatter:
    """Of what the simulated defence does at random, around what it is expected to do."""

    def make() -> Scatter:
        hidden = torch.cat([batch.hidden for batch in attacker.public_batches()])
        return scatter_around(attacker.simulate(hidden) - attacker.expected(hidden), attacker)

    return attacker.remember("simulated scatter", make)


def residuals_of(guess: Tensor, observed: Observed, attacker: Attacker) -> Tensor:
    """What was received minus what the attacker's bottom gives for its guesses `(N,)`: `(N, d)`."""
    lengths = observed.lengths.to(guess.device)
    return observed.s_a - attacker.expected(attacker.run_bottom(unpack(guess, lengths), lengths))


def smallest(residuals: Tensor, attacker: Attacker) -> Tensor:
    """The smaller ones, in units of each value's deviation."""
    sizes = (residuals / (tables(attacker)[1].states.std(0) + 1e-6)).norm(dim=1)
    return residuals[sizes <= sizes.quantile(KEPT)]


@torch.no_grad()
def left_to_right(
    observed: Observed, attacker: Attacker, candidates: Shortlist, scatter: Scatter, evidence: Shortlist | None = None
) -> Tensor:
    """The best token at each place, given those before it, `(N,)`."""
    lengths = observed.lengths.to(attacker.device)
    order = lengths.argsort(descending=True, stable=True)
    states, listed = (unpack(x, lengths)[order] for x in (observed.s_a, candidates.ids))  # (B, L, d), (B, L, K)
    known = None if evidence is None else [unpack(x, lengths)[order] for x in (evidence.ids, evidence.scores)]
    bottom, model = Reader(attacker.simulated.causal, attacker.sent), Reader(attacker.model.causal)
    first, later = tables(attacker)
    guesses = torch.zeros(listed.shape[:2], dtype=torch.long, device=attacker.device)
    for place in range(listed.shape[1]):
        alive = int((lengths > place).sum())
        said = attacker.log_first_frequencies.expand(alive, -1)
        if place:
            bottom.keep(alive)
            model.keep(alive)
            said = attacker.logits(model.read(guesses[:alive, place - 1])).log_softmax(-1)
        proposed = said.topk(min(FROM_MODEL, said.shape[1])).indices
        tokens = torch.cat([listed[:alive, place], proposed], dim=1)  # (alive, K)
        state, expected = states[:alive, place], _expect(bottom, tokens, attacker)
        offset = (expected - later.states[tokens]).mean(1) if place else None
        densities = (later if place else first).log_densities(state, offset)
        more = densities.topk(min(attacker.budget.candidates, densities.shape[1])).indices
        tokens, expected = torch.cat([tokens, more], 1), torch.cat([expected, _expect(bottom, more, attacker)], 1)
        scores = scatter.log_density(state.unsqueeze(1) - expected) + said.gather(1, tokens)
        if known is not None:
            scores = scores + Shortlist(*(x[:alive, place] for x in known)).find(tokens)[0]
        guesses[:alive, place] = tokens.gather(1, scores.argmax(1, keepdim=True))[:, 0]
        bottom.read(guesses[:alive, place])
    return pack(guesses[order.argsort()], lengths)


def _expect(bottom: Reader, tokens: Tensor, attacker: Attacker) -> Tensor:
    """States `(B, K, d)` that the attacker expects to read if `tokens (B, K)` come next."""
    imagined = bottom.imagine(tokens).float()
    return attacker.expected(imagined.flatten(0, 1)).reshape(imagined.shape)
