"""BiSR: refines the first guess of an inverter with hidden states and with gradients.

- BiSR(f) starts EIA from SIP's candidates and scores, and matches s_A.
- BiSR(b) multiplies SIP's distribution of each token by TAG's distribution of each label, and so matches gradients.
- BiSR takes the candidates of both. It chooses among them from left to right, in the context of the tokens chosen
  before (`blindtune.audit.texts.nearest`). The score of a candidate includes how well it fits g_B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blindtune.audit.texts.attacker import Attacker
from blindtune.audit.texts.direct import shortlist_after_first
from blindtune.audit.texts.eia import match_forward
from blindtune.audit.texts.nearest import read_in_context
from blindtune.audit.texts.observe import Observed
from blindtune.audit.texts.registry import attack
from blindtune.audit.texts.shortlist import Shortlist
from blindtune.audit.texts.sip import sip_shortlist
from blindtune.audit.texts.tag import next_shortlist


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
    ids = [shortlist.ids[:, :half] for shortlist in lists]
    scores = [shortlist.scores[:, :half] for shortlist in lists]
    candidates = Shortlist(torch.cat(ids, dim=1), torch.cat(scores, dim=1))
    evidence = shortlist_after_first(next_shortlist(observed, attacker, prior=False), observed, attacker)
    evidence.scores[observed.positions == 0] = 0.0  # gradients don't depend on the first token
    return read_in_context(observed, attacker, candidates, evidence)


def forward_shortlist(observed: Observed, attacker: Attacker) -> Shortlist:
    """Returns the candidates of EIA, started from those of SIP."""

    def make() -> Shortlist:
        return match_forward(sip_shortlist(observed, attacker), observed, attacker)

    return observed.remember("BiSR(f)", attacker, make)


def label_tokens(observed: Observed, attacker: Attacker) -> Shortlist:
    """Returns TAG's labels, as candidates for the tokens at the next positions."""
    return shortlist_after_first(next_shortlist(observed, attacker), observed, attacker)


def both(observed: Observed, attacker: Attacker) -> Shortlist:
    """Returns the product of SIP's and TAG's distributions."""
    return sip_shortlist(observed, attacker).times(label_tokens(observed, attacker), attacker.budget.candidates)
