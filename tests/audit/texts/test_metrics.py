"""Metrics of reconstruction, against values computed by hand."""

from __future__ import annotations

import pytest

from blindtune.audit.texts.metrics import (
    METRICS,
    accuracy,
    bootstrap_mean,
    meteor,
    rouge_l,
    rouge_n,
    set_f1,
)

TRUTH = ["the", "cat", "sat", "on", "the", "mat"]


def test_accuracy_counts_positions_only():
    assert accuracy(TRUTH, ["the", "cat", "sat", "on", "a", "mat"]) == pytest.approx(5 / 6)
    assert accuracy(TRUTH, ["cat", "sat", "on", "the", "mat", "the"]) == 0.0
    with pytest.raises(ValueError, match="5 guesses for 6 tokens"):
        accuracy(TRUTH, TRUTH[1:])
    with pytest.raises(ValueError, match="0 tokens"):
        accuracy([], [])


def test_rouge_counts_n_grams_as_often_as_they_occur():
    guess = ["the", "the", "the", "cat"]
    assert rouge_n(TRUTH, guess, 1) == pytest.approx(2 * 3 / (6 + 4))  # the, the, cat
    assert rouge_n(TRUTH, guess, 2) == pytest.approx(2 * 1 / (5 + 3))  # the cat
    assert rouge_n(TRUTH, ["dog"], 1) == 0.0
    assert rouge_n(["the"], ["the"], 2) == 0.0  # too short to have one


def test_rouge_l_is_the_longest_common_subsequence():
    assert rouge_l(TRUTH, ["cat", "the", "on", "mat"]) == pytest.approx(2 * 3 / (6 + 4))  # cat, on, mat
    assert rouge_l(TRUTH, []) == 0.0


def test_set_f1_ignores_order_and_repetition():
    assert set_f1(TRUTH, ["mat", "mat", "the", "dog"]) == pytest.approx(2 * 2 / (5 + 3))


def test_meteor_punishes_wrong_order():
    # 6 matches in one chunk: Fmean 1, penalty 0.5 / 6³
    assert meteor(TRUTH, TRUTH) == pytest.approx(1 - 0.5 * (1 / 6) ** 3)
    # "on the mat" | "the cat sat": 6 matches, 2 chunks
    assert meteor(TRUTH, ["on", "the", "mat", "the", "cat", "sat"]) == pytest.approx(1 - 0.5 * (2 / 6) ** 3)
    # the cat | mat: 3 matches, 2 chunks, P = 3/4, R = 3/6
    fmean = 10 * 0.75 * 0.5 / (0.5 + 9 * 0.75)
    assert meteor(TRUTH, ["the", "cat", "dog", "mat"]) == pytest.approx(fmean * (1 - 0.5 * (2 / 3) ** 3))
    assert meteor(TRUTH, ["dog"]) == 0.0


def test_meteor_matches_the_longest_run_that_is_left():
    # "the" alone stands first in the ground truth, but "the mat" is there too: one chunk, not two
    assert meteor(TRUTH, ["the", "mat"]) == pytest.approx(10 * 1 * (2 / 6) / (2 / 6 + 9) * (1 - 0.5 * (1 / 2) ** 3))


@pytest.mark.parametrize("name", METRICS)
def test_metrics_lie_between_nothing_and_a_perfect_guess(name):
    long = [str(i) for i in range(50)]
    assert METRICS[name](long, long) > 0.99
    assert METRICS[name](long, ["?"] * 50) == 0.0


def test_the_interval_holds_the_mean_and_narrows_with_more_texts():
    few = bootstrap_mean([0.0, 1.0] * 5, weights=[1.0] * 10)
    many = bootstrap_mean([0.0, 1.0] * 500, weights=[1.0] * 1000)
    assert few.mean == many.mean == 0.5
    assert few.low < many.low < 0.5 < many.high < few.high
    assert bootstrap_mean([0.0, 1.0], weights=[1.0, 3.0]).mean == 0.75
    with pytest.raises(ValueError, match="nothing"):
        bootstrap_mean([], weights=[])
