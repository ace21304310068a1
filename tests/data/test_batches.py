"""Batches as a function of seed and step."""

from blindtune.data import BatchPlan

LENGTHS = [5 + (i * 7) % 40 for i in range(103)]


def test_every_example_comes_once_in_each_epoch():
    plan = BatchPlan(LENGTHS, 8, seed=0)
    for epoch in range(3):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        assert sorted(i for step in steps for i in plan.batch(step)) == list(range(103))


def test_a_step_does_not_depend_on_the_steps_before_it():
    forwards = BatchPlan(LENGTHS, 8, seed=0)
    first = [forwards.batch(step) for step in range(30)]
    backwards = BatchPlan(LENGTHS, 8, seed=0)
    assert [backwards.batch(step) for step in reversed(range(30))] == first[::-1]


def test_epochs_and_seeds_are_shuffled_differently():
    plan = BatchPlan(LENGTHS, 8, seed=0)
    assert plan.batch(0) != plan.batch(plan.steps_per_epoch)
    assert plan.batch(0) != BatchPlan(LENGTHS, 8, seed=1).batch(0)


def test_batches_of_similar_length_need_less_padding():
    lengths = [5 + (i * 7919) % 60 for i in range(640)]
    plan = BatchPlan(lengths, 16, seed=0)
    batches = [plan.batch(step) for step in range(plan.steps_per_epoch)]
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.2 * sum(lengths)
