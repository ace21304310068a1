"""Randomised response: the probabilities that ε asks for, and one draw for each example, whatever happens."""

import math
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from blindtune.privacy.randomized_response import LabelRandomizer, keep_probability, randomize
from blindtune.privacy.randomness import SecureGenerator

KEY = bytes(range(32))


def randomizer(epsilon: float = 1.0, classes: int = 2, key: bytes = KEY) -> LabelRandomizer:
    return LabelRandomizer(epsilon, classes, SecureGenerator(key))


def names(count: int, start: int = 0) -> list[bytes]:
    return [index.to_bytes(16, "little") for index in range(start, start + count)]


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 5.0])
def test_no_outcome_is_more_than_e_to_the_epsilon_likelier_under_another_label(epsilon, classes):
    keep = keep_probability(epsilon, classes)
    other = (1 - keep) / (classes - 1)
    assert keep / other == pytest.approx(math.exp(epsilon))


def test_a_large_epsilon_keeps_every_label():
    assert keep_probability(1e6, 1000) == 1.0


@pytest.mark.parametrize(("epsilon", "classes"), [(0.5, 2), (1.0, 5)])
def test_outcomes_have_the_stated_probabilities(epsilon, classes):
    generator = SecureGenerator(KEY)
    counts = Counter(randomize(1, epsilon, classes, generator=generator) for _ in range(20_000))
    keep = keep_probability(epsilon, classes)
    expected = [20_000 * (keep if label == 1 else (1 - keep) / (classes - 1)) for label in range(classes)]
    assert set(counts) == set(range(classes))
    assert chisquare([counts[label] for label in range(classes)], expected).pvalue > 0.001


def test_an_example_has_the_same_label_at_every_step_and_in_every_order():
    drawn = randomizer()
    labels = torch.arange(200) % 2
    first = drawn.labels(names(200), labels)
    assert not torch.equal(first, labels)
    for _ in range(20):
        order = torch.randperm(200)[:32]
        batch = drawn.labels([names(200)[i] for i in order], labels[order])
        assert torch.equal(batch, first[order])


def test_averaging_over_steps_recovers_labels_that_are_drawn_anew_and_no_others():
    """The attack that drawing once is made against."""
    labels = torch.arange(200) % 2
    kept = randomizer()
    once = torch.stack([kept.labels(names(200), labels) for _ in range(101)]).double().mean(0).round()
    anew = torch.stack([randomizer(key=bytes([i]) * 32).labels(names(200), labels) for i in range(101)])
    assert (anew.double().mean(0).round() == labels).double().mean() > 0.99
    assert (once == labels).double().mean() < 0.85


def test_a_lost_state_draws_as_before_with_the_key_and_otherwise_without():
    labels = torch.arange(64) % 3
    first = randomizer(classes=3).labels(names(64), labels)
    assert torch.equal(randomizer(classes=3).labels(names(64)[::-1], labels.flip(0)).flip(0), first)
    assert not torch.equal(randomizer(classes=3, key=bytes(32)).labels(names(64), labels), first)


def test_examples_are_drawn_independently():
    drawn = randomizer(epsilon=0.01).labels(names(4000), torch.zeros(4000, dtype=torch.int64)).double()
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.04)
    assert torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]))[0, 1].abs() < 0.06


def test_equal_examples_with_different_labels_do_not_tell_that_they_differ():
    """Were both kept or changed by the same draw, unequal outcomes would mean unequal labels for certain."""
    for index in range(50):
        name = names(1, start=index)[0]
        first, second = randomizer().labels([name, name], torch.tensor([0, 1])).tolist()
        assert first == second


def test_state_restores_what_was_drawn():
    before = randomizer()
    drawn = before.labels(names(30), torch.arange(30) % 2)
    after = randomizer(key=bytes(32))  # another key: only the state can tell
    after.load_state_dict(before.state_dict())
    assert torch.equal(after.labels(names(30), torch.zeros(30, dtype=torch.int64)), drawn)
    empty = randomizer().state_dict()
    assert empty["examples"].shape == (0, 16)
    after.load_state_dict(empty)
    assert torch.equal(after.labels(names(30), torch.arange(30) % 2), drawn)


@pytest.mark.parametrize(("epsilon", "classes"), [(0.0, 2), (-1.0, 2), (math.inf, 2), (math.nan, 2), (1.0, 1)])
def test_nonsense_is_refused(epsilon, classes):
    with pytest.raises(ValueError, match="positive, finite epsilon and two classes"):
        LabelRandomizer(epsilon, classes, SecureGenerator())


def test_labels_and_names_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="label 2 is none of 2"):
        randomizer().labels(names(1), torch.tensor([2]))
    with pytest.raises(ValueError, match="16 bytes"):
        randomizer().labels([b"short"], torch.tensor([1]))
