"""Nearest token: chooses the token whose hidden state is nearest to the received one.

The first attack compares with hidden states from a table (`blindtune.audit.texts.table`), which were computed in one
context for all texts. The second attack computes them in the context of the text itself, from left to right: it runs
the attacker's bottom on the recovered tokens and on each candidate, and takes the candidate that fits best. The
difference between the states of these candidates and their states in the table estimates what this context adds to
every state of the table. With that correction, the table gives further candidates.

How well the right token fits depends on the scatter of s_A around the output of the attacker's bottom. The attacker
knows the scatter of a defence that it can simulate. It can't simulate what the client's bottom has learned. That shows
in the residuals of a first pass over the texts; if they are large, a second pass uses the scatter of these residuals.
The larger the scatter, the more the language model decides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blindtune.audit.texts.attacker import Attacker
from blindtune.audit.texts.observe import Observed
from blindtune.audit.texts.reader import Reader
from blindtune.audit.texts.registry import attack
from blindtune.audit.texts.shortlist import Shortlist
from blindtune.audit.texts.table import Scatter, nearest_shortlist, scatter_around, tables
from blindtune.models.cut.parts import pack, unpack

FROM_MODEL = 16
"""Number of candidates that the language model adds to those of an attack."""
KEPT = 0.5
"""Fraction of the residuals (the smallest ones) to which a scatter is fitted. Others may come from wrong guesses."""
AS_EXPECTED = 2.0
"""Residuals of up to this multiple of the expected variance need no second pass."""


@attack("nearest token", observes=("s_A",), needs=("bottom", "public text"))
def nearest_token(observed: Observed, attacker: Attacker) -> Tensor:
    return nearest_shortlist(observed, attacker).best


@attack("nearest, left to right", observes=("s_A",), needs=("bottom", "trunk", "top", "public text"))
def nearest_left_to_right(observed: Observed, attacker: Attacker) -> Tensor:
    return read_in_context(observed, attacker, nearest_shortlist(observed, attacker))


def read_in_context(
    observed: Observed, attacker: Attacker, candidates: Shortlist, evidence: Shortlist | None = None
) -> Tensor:
    """Returns the guesses `(N,)`. Makes a second pass if the residuals of the first exceed the simulated scatter.

    Args:
        evidence: scores of tokens from other attacks, which are added to those of this attack.
    """
    expected = simulated_scatter(attacker)
    guess = left_to_right(observed, attacker, candidates, expected, evidence)
    residuals = smallest(residuals_of(guess, observed, attacker), attacker)
    if float(-2 * expected.log_density(residuals).mean()) < AS_EXPECTED * observed.s_a.shape[1]:
        return guess
    without_context = smallest(residuals_of(candidates.best, observed, attacker), attacker)
    if without_context.norm() < residuals.norm():  # of two poor guesses, the better one estimates the scatter better
        residuals = without_context
    return left_to_right(observed, attacker, candidates, scatter_around(residuals, attacker), evidence)


def simulated_scatter(attacker: Attacker) -> Scatter:
    """Returns the scatter of the simulated defence around its expected output."""

    def make() -> Scatter:
        hidden = torch.cat([batch.hidden for batch in attacker.public_batches()])
        return scatter_around(attacker.simulate(hidden) - attacker.expected(hidden), attacker)

    return attacker.remember("simulated scatter", make)


def residuals_of(guess: Tensor, observed: Observed, attacker: Attacker) -> Tensor:
    """Returns the received s_A minus the expected one for guesses `(N,)`: `(N, d)`."""
    lengths = observed.lengths.to(guess.device)
    return observed.s_a - attacker.expected(attacker.run_bottom(unpack(guess, lengths), lengths))


def smallest(residuals: Tensor, attacker: Attacker) -> Tensor:
    """Returns the fraction `KEPT` of the residuals with the smallest norm in units of each value's deviation."""
    sizes = (residuals / (tables(attacker)[1].states.std(0) + 1e-6)).norm(dim=1)
    return residuals[sizes <= sizes.quantile(KEPT)]


@torch.no_grad()
def left_to_right(
    observed: Observed, attacker: Attacker, candidates: Shortlist, scatter: Scatter, evidence: Shortlist | None = None
) -> Tensor:
    """Returns the best token at each position, given the tokens before it, `(N,)`."""
    lengths = observed.lengths.to(attacker.device)
    order = lengths.argsort(descending=True, stable=True)
    states = unpack(observed.s_a, lengths)[order]  # (B, L, d)
    listed = unpack(candidates.ids, lengths)[order]  # (B, L, K)
    evidence_ids = None if evidence is None else unpack(evidence.ids, lengths)[order]
    evidence_scores = None if evidence is None else unpack(evidence.scores, lengths)[order]
    bottom, model = Reader(attacker.simulated.causal, attacker.sent), Reader(attacker.model.causal)
    first, later = tables(attacker)
    guesses = torch.zeros(listed.shape[:2], dtype=torch.long, device=attacker.device)
    for position in range(listed.shape[1]):
        count = int((lengths > position).sum())  # texts that have this position
        prior = attacker.log_first_frequencies.expand(count, -1)
        if position > 0:
            bottom.keep(count)
            model.keep(count)
            prior = attacker.logits(model.read(guesses[:count, position - 1])).log_softmax(-1)
        proposed = prior.topk(min(FROM_MODEL, prior.shape[1])).indices
        tokens = torch.cat([listed[:count, position], proposed], dim=1)  # (count, K)
        state, expected = states[:count, position], _expect(bottom, tokens, attacker)
        if position > 0:
            densities = later.log_densities(state, (expected - later.states[tokens]).mean(1))
        else:
            densities = first.log_densities(state)
        more = densities.topk(min(attacker.budget.candidates, densities.shape[1])).indices
        tokens, expected = torch.cat([tokens, more], 1), torch.cat([expected, _expect(bottom, more, attacker)], 1)
        scores = scatter.log_density(state.unsqueeze(1) - expected) + prior.gather(1, tokens)
        if evidence_ids is not None and evidence_scores is not None:
            here = Shortlist(evidence_ids[:count, position], evidence_scores[:count, position])
            scores = scores + here.find(tokens)[0]
        guesses[:count, position] = tokens.gather(1, scores.argmax(1, keepdim=True))[:, 0]
        bottom.read(guesses[:count, position])
    return pack(guesses[order.argsort()], lengths)


def _expect(bottom: Reader, tokens: Tensor, attacker: Attacker) -> Tensor:
    """Returns the states `(B, K, d)` that the attacker expects to receive if `tokens (B, K)` come next."""
    imagined = bottom.imagine(tokens).float()
    return attacker.expected(imagined.flatten(0, 1)).reshape(imagined.shape)
