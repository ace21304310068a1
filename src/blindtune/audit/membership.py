"""What tuned weights tell about the texts that they were tuned on: membership, and texts that are known by heart.

The attacker holds the tuned model, and has a text of which it wants to know whether it was among the training texts.

| attack | score of a text | needs |
|---|---|---|
| loss | −loss under the tuned model (Yeom et al. 2018, arXiv:1709.01604) | the tuned model |
| calibrated loss | loss before tuning − loss after it (Watson et al. 2022, arXiv:2111.08440) | the model before, too |

Losses are means over the tokens that were learned. Members and others must be alike in all but membership, such as a
random part of one file that was kept out of training: else attacks find the difference between two files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blindtune.audit.statistics import auc, bootstrap_auc
from blindtune.errors import DataError

MIN_TEXTS = 20
FEW_FALSE_ALARMS = 0.01


@dataclass(frozen=True)
class Scored:
    """How well a model knows texts.

    Attributes:
        losses: −log p for each learned token on average, `(N,)`, nats.
        greedy: whether the likeliest token at each place is the text's own: it would be written word for word.
    """

    losses: Sequence[float]
    greedy: Sequence[bool]


@dataclass(frozen=True)
class MembershipFinding:
    """What one attack tells.

    Attributes:
        auc: a random member scores above a random other text with this probability; low, high: 95%, over texts.
        found: part of the members that are found if one in a hundred others may be taken for one.
    """

    attack: str
    auc: float
    low: float
    high: float
    found: float


@dataclass(frozen=True)
class Membership:
    """The attacks on one set of tuned weights, and what of the texts' learned part is known by heart.

    Attributes:
        heart: parts of members and others that the tuned model would write word for word; heart_before: before tuning.
        gap: mean loss of others minus that of members, under the tuned model; gap_before: before tuning, where it
            should be near zero: else the two groups differ by themselves.
    """

    findings: list[MembershipFinding]
    heart: tuple[float, float]
    heart_before: tuple[float, float]
    gap: float
    gap_before: float
    members: int
    others: int

    @property
    def strongest(self) -> MembershipFinding:
        return max(self.findings, key=lambda finding: finding.auc)


def attack_membership(tuned: tuple[Scored, Scored], before: tuple[Scored, Scored]) -> Membership:
    """Membership attacks on `(members, others)`, scored by the tuned model and by the model before tuning.

    Raises:
        DataError: too few members or others.
    """
    members, others = (len(scored.losses) for scored in tuned)
    if min(members, others) < MIN_TEXTS:
        raise DataError(
            f"{members} members and {others} other texts say little.", remedy=f"Give at least {MIN_TEXTS} of each."
        )
    after, first = (np.concatenate([np.asarray(s.losses, dtype=np.float64) for s in pair]) for pair in (tuned, before))
    truth = np.arange(members + others) < members
    findings = [
        _finding("loss", -after, truth),
        _finding("calibrated loss", first - after, truth),
    ]
    gap, gap_before = (float(losses[~truth].mean() - losses[truth].mean()) for losses in (after, first))
    heart, heart_before = (tuple(float(np.mean(s.greedy)) for s in pair) for pair in (tuned, before))
    return Membership(
        findings, (heart[0], heart[1]), (heart_before[0], heart_before[1]), gap, gap_before, members, others
    )


def _finding(attack: str, scores: NDArray[np.float64], members: NDArray[np.bool_]) -> MembershipFinding:
    low, high = bootstrap_auc(scores, members, symmetric=False)
    threshold = np.quantile(scores[~members], 1 - FEW_FALSE_ALARMS)
    return MembershipFinding(attack, auc(scores, members), low, high, float((scores[members] > threshold).mean()))
