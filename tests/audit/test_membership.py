"""Membership attacks: they find what is there, and nothing where there is nothing."""

from __future__ import annotations

import numpy as np
import pytest

from blindtune.audit.membership import Scored, attack_membership
from blindtune.errors import DataError

COUNT = 2000
RANDOM = np.random.default_rng(0)
HARD = RANDOM.gamma(4.0, 1.0, (2, COUNT))  # texts differ much more than tuning changes them


def scored(losses, greedy: float = 0.0) -> Scored:
    return Scored(losses.tolist(), (RANDOM.random(len(losses)) < greedy).tolist())


def test_nothing_is_found_where_tuning_helped_all_texts_alike():
    after = HARD - 0.5 + RANDOM.normal(0, 0.1, HARD.shape)
    found = attack_membership((scored(after[0]), scored(after[1])), (scored(HARD[0]), scored(HARD[1])))
    for finding in found.findings:
        assert finding.low < 0.5 < finding.high
        assert finding.found < 0.03
    assert abs(found.gap) < 0.2


def test_the_loss_before_tuning_makes_the_attack_sharper():
    after = HARD - np.array([[0.5], [0.2]]) + RANDOM.normal(0, 0.1, HARD.shape)
    found = attack_membership((scored(after[0], 0.3), scored(after[1])), (scored(HARD[0]), scored(HARD[1])))
    loss, calibrated = found.findings
    assert 0.5 < loss.auc < 0.65
    assert calibrated.auc > 0.97
    assert calibrated.found > 0.5
    assert found.strongest is calibrated
    assert found.memorized[0] == pytest.approx(0.3, abs=0.05)
    assert found.memorized[1] == 0
    assert found.gap - found.gap_before == pytest.approx(0.3, abs=0.02)


def test_too_few_texts():
    few, many = scored(HARD[0][:5]), scored(HARD[1])
    with pytest.raises(DataError, match="at least 20"):
        attack_membership((few, many), (few, many))
