"""BiSR: an inverter's first guess, refined from both directions of the wire.

- BiSR(f): SIP's candidates and scores are where EIA starts, instead of anywhere: forward matching of s_A.
- BiSR(b): SIP's distribution of each token times TAG's of each label: gradient matching from a first guess.
- BiSR: the candidates of both, read from left to right in their own context (`blindtune.audit.inputs.nearest`), where
  each also counts by how well it fits g_B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blindtune.audit.inputs.attacker import Attacker
from blindtune.audit.inputs.direct import shortlist_after_first
from blindtune.audit.inputs.eia import match_forward
from blindtune.audit.inputs.nearest import read_in_context
from blindtune.audit.inputs.observe import Observed
from blindtune.audit.inputs.registry import attack
from blindtune.audit.inputs.shortlist import Shortlist
from blindtune.audit.inputs.sip import sip_shortlist
from blindtune.audit.inputs.tag import next_shortlist


@attack("BiSR(f)", observes=("s_A",), needs=("bottom", "public text"))
def bisr_forward(observed: Observed, attacker: Attacker) -> Tensor:
    return forward_shortlist(observed, attacker).best


@attack("BiSR(b)", observes=("s_A", "s_B", "gradients"), needs=("bottom", "top", "public text"))
def bisr_backward(observed: Observed, attacker: Attacker) -> Tensor:
    return both(observed, attacker).best


@attack("BiSR", observes=("s_A", "s_B", "gradients"), needs=("bottom", "trunk", "top", "public text"))
def bisr(observed: Observed, attacker: Attacker) -> Tensor:
    half = attacker.budget.candidates // 2
    lists = both(observed, attacker), forward_shortlist(observed, attacker), label_tokens(observed, attacker)
    ids, scores = ([getattr(some, name)[:, :half] for some in lists] for name in ("ids", "scores"))
    candidates = Shortlist(torch.cat(ids, dim=1), torch.cat(scores, dim=1))
    evidence = shortlist_after_first(next_shortlist(observed, attacker, prior=False), observed, attacker)
    evidence.scores[observed.positions == 0] = 0.0  # no gradient knows the first token
    return read_in_context(observed, attacker, candidates, evidence)


def forward_shortlist(observed: Observed, attacker: Attacker) -> Shortlist:
    """SIP, then EIA from there."""

    def make() -> Shortlist:
        return match_forward(sip_shortlist(observed, attacker), observed, attacker)

    return observed.remember("BiSR(f)", attacker, make)


def label_tokens(observed: Observed, attacker: Attacker) -> Shortlist:
    """TAG's labels as candidates for the tokens that they are."""
    return shortlist_after_first(next_shortlist(observed, attacker), observed, attacker)


def both(observed: Observed, attacker: Attacker) -> Shortlist:
    """SIP's distribution times TAG's."""
    return sip_shortlist(observed, attacker).times(label_tokens(observed, attacker), attacker.budget.candidates)
