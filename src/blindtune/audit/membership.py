"""Measures membership inference and memorization: what tuned weights reveal about the texts that they were tuned on.

The attacker holds the tuned model and a text, and decides whether the text was among the training texts.

| attack | score of a text | needs |
|---|---|---|
| loss | −loss under the tuned model (Yeom et al. 2018, arXiv:1709.01604) | the tuned model |
| calibrated loss | loss before tuning − loss after it (Watson et al. 2022, arXiv:2111.08440) | both models |

Losses are means over the tokens that were learned. Members and other texts must differ in membership only: the other
texts should be a random part of the same file that was kept out of training. Otherwise the attacks measure the
difference between two files.
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
    """Holds the scores of texts under a model.

    Attributes:
        losses: mean −log p over the learned tokens, `(N,)`, in nats.
        greedy: whether the likeliest token at each position is the text's own, so that the model would write it
            word for word.
    """

    losses: Sequence[float]
    greedy: Sequence[bool]


@dataclass(frozen=True)
class MembershipFinding:
    """Holds the result of one attack.

    Attributes:
        auc: probability that a random member has a higher score than a random other text.
        low, high: 95% bootstrap interval of `auc` over texts.
        found: fraction of the members that the attack identifies at a false positive rate of 1%.
    """

    attack: str
    auc: float
    low: float
    high: float
    found: float


@dataclass(frozen=True)
class Membership:
    """Holds the results of attacks on one set of tuned weights, and how many texts are memorized.

    Attributes:
        memorized: fractions of the members and of the other texts that the tuned model would write word for word.
        memorized_before: the same fractions for the model before tuning.
        gap: mean loss of other texts minus that of members, under the tuned model.
        gap_before: the same difference before tuning. It should be near zero; otherwise the two groups differ in more
            than membership.
        members, others: numbers of members and of other texts.
    """

    findings: list[MembershipFinding]
    memorized: tuple[float, float]
    memorized_before: tuple[float, float]
    gap: float
    gap_before: float
    members: int
    others: int

    @property
    def strongest(self) -> MembershipFinding:
        """Returns the attack with the highest AUC."""
        return max(self.findings, key=lambda finding: finding.auc)


def attack_membership(tuned: tuple[Scored, Scored], before: tuple[Scored, Scored]) -> Membership:
    """Computes the results of both attacks.

    Args:
        tuned: scores of `(members, others)` under the tuned model.
        before: scores of the same texts under the model before tuning.
    Raises:
        DataError: too few members or others.
    """
    members, others = (len(scored.losses) for scored in tuned)
    if min(members, others) < MIN_TEXTS:
        raise DataError(
            f"{members} members and {others} other texts are too few.", remedy=f"Give at least {MIN_TEXTS} of each."
        )
    losses, losses_before = _losses(tuned), _losses(before)
    is_member = np.arange(members + others) < members
    return Membership(
        [
            _finding("loss", -losses, is_member),
            _finding("calibrated loss", losses_before - losses, is_member),
        ],
        _memorized(tuned),
        _memorized(before),
        _gap(losses, is_member),
        _gap(losses_before, is_member),
        members,
        others,
    )


def _losses(pair: tuple[Scored, Scored]) -> NDArray[np.float64]:
    """Returns the losses of members and others, one after the other."""
    return np.concatenate([np.asarray(scored.losses, dtype=np.float64) for scored in pair])


def _memorized(pair: tuple[Scored, Scored]) -> tuple[float, float]:
    """Returns the fractions of members and of others that a model would write word for word."""
    members, others = pair
    return float(np.mean(members.greedy)), float(np.mean(others.greedy))


def _gap(losses: NDArray[np.float64], is_member: NDArray[np.bool_]) -> float:
    """Returns the mean loss of others minus that of members."""
    return float(losses[~is_member].mean() - losses[is_member].mean())


def _finding(attack: str, scores: NDArray[np.float64], is_member: NDArray[np.bool_]) -> MembershipFinding:
    low, high = bootstrap_auc(scores, is_member, symmetric=False)
    threshold = np.quantile(scores[~is_member], 1 - FEW_FALSE_ALARMS)
    identified = float((scores[is_member] > threshold).mean())
    return MembershipFinding(attack, auc(scores, is_member), low, high, identified)
