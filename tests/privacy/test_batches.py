from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, RandomSampler, Sampler, SequentialSampler, WeightedRandomSampler

from blindtune.data.batches import BatchPlan
from blindtune.errors import CheckpointError, LabelDependentBatches
from blindtune.privacy import batches
from blindtune.privacy.batches import BatchMonitor

SEEDS = 200
Batches = Iterator[list[int]]


def epochs(sampler: Sampler[int], size: int, *, drop_last: bool = False) -> Batches:
    loader = BatchSampler(sampler, size, drop_last)
    while True:
        yield from loader


def shuffled(y: np.ndarray, size: int, seed: int) -> Batches:
    return epochs(RandomSampler(y), size)


def dropping(y: np.ndarray, size: int, seed: int) -> Batches:
    return epochs(RandomSampler(y), size, drop_last=True)


def replaced(y: np.ndarray, size: int, seed: int) -> Batches:
    return epochs(RandomSampler(y, replacement=True), size)


def unshuffled(y: np.ndarray, size: int, seed: int) -> Batches:
    return epochs(SequentialSampler(y), size)


def by_length(y: np.ndarray, size: int, seed: int, spread: int = 30) -> Batches:
    """Class 1 is longer: with spread 0, the length is the label."""
    lengths = 10 + 20 * y + np.random.default_rng(seed).integers(0, spread + 1, len(y))
    plan = BatchPlan(lengths.tolist(), size, seed)
    return (plan.batch(step) for step in range(10**6))


def cut_short(y: np.ndarray, size: int, seed: int) -> Batches:
    """Half an epoch of batches by length, which tell the label, then a new one."""
    for epoch in range(10**6):
        yield from islice(by_length(y, size, 1000 * seed + epoch, 0), len(y) // size // 2)


def random_subset(y: np.ndarray, size: int, seed: int) -> Batches:
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(y))[: len(y) // 2]
    while True:
        order = rng.permutation(chosen)
        yield from (order[i : i + size].tolist() for i in range(0, len(order), size))


def several_steps(y: np.ndarray, size: int, seed: int) -> Batches:
    for batch in shuffled(y, size, seed):
        yield from [batch] * 20


def weighted(y: np.ndarray, size: int, seed: int) -> Batches:
    weights = 1 / np.bincount(y)[y]
    return epochs(WeightedRandomSampler(weights.tolist(), len(y)), size)


def oversampled(y: np.ndarray, size: int, seed: int) -> Batches:
    most = np.bincount(y).max()
    rows = np.concatenate([np.resize(np.flatnonzero(y == k), most) for k in np.unique(y)])
    return ([int(rows[i]) for i in batch] for batch in epochs(RandomSampler(rows), size))


def undersampled(y: np.ndarray, size: int, seed: int) -> Batches:
    least = np.bincount(y).min()
    rows = np.concatenate([np.flatnonzero(y == k)[:least] for k in np.unique(y)])
    return ([int(rows[i]) for i in batch] for batch in epochs(RandomSampler(rows), size))


def undersampled_anew(y: np.ndarray, size: int, seed: int) -> Batches:
    rng, least = np.random.default_rng(seed), np.bincount(y).min()
    while True:
        order = rng.permutation(np.concatenate([rng.permutation(np.flatnonzero(y == k))[:least] for k in np.unique(y)]))
        yield from (order[i : i + size].tolist() for i in range(0, len(order), size))


def stratified(y: np.ndarray, size: int, seed: int) -> Batches:
    rng = np.random.default_rng(seed)
    while True:
        parts = [np.array_split(rng.permutation(np.flatnonzero(y == k)), len(y) // size) for k in np.unique(y)]
        yield from (np.concatenate(batch).tolist() for batch in zip(*parts, strict=True))


def draw_labels(n: int, shares: list[float], seed: int) -> np.ndarray:
    y = np.random.default_rng(seed).choice(len(shares), n, p=shares)
    y[: len(shares)] = np.arange(len(shares))
    return y


def texts(batch: list[int]) -> list[str]:
    return [f"text {i}" for i in batch]


def observe_all(monitor: BatchMonitor, plan: Iterable[tuple[Sequence[Hashable], list[int]]]) -> None:
    for batch, labels in plan:
        monitor.observe(batch, labels)


def first_refusal(plan: Callable[..., Batches], y: np.ndarray, size: int, seed: int, steps: int) -> int | None:
    """The number of the batch that is refused."""
    torch.manual_seed(seed)
    monitor = BatchMonitor(texts(list(range(len(y)))), y.tolist())
    for step, batch in enumerate(islice(plan(y, size, seed), steps)):
        try:
            monitor.observe(texts(batch), y[batch].tolist())
        except LabelDependentBatches:
            return step + 1
    return None


@pytest.mark.parametrize("plan", [shuffled, dropping, replaced, unshuffled, by_length])
def test_label_free_batches_are_never_refused(plan: Callable[..., Batches]) -> None:
    for seed in range(SEEDS):
        shares = [[0.5, 0.5], [0.88, 0.12], [0.4, 0.3, 0.2, 0.1]][seed % 3]
        size = (4, 16)[seed % 2]
        y = draw_labels(64, shares, seed)
        assert first_refusal(plan, y, size, seed, 18) is None, (seed, shares, size)


@pytest.mark.parametrize("plan", [cut_short, random_subset, several_steps])
def test_nor_are_runs_whose_texts_differ_in_number(plan: Callable[..., Batches]) -> None:
    for seed in range(12):
        y = draw_labels(200, [[0.5, 0.5], [0.88, 0.12], [0.98, 0.02]][seed % 3], seed)
        assert first_refusal(plan, y, 16, seed, 60) is None, seed


@pytest.mark.parametrize("plan", [shuffled, replaced, random_subset, unshuffled])
def test_nor_are_long_runs(plan: Callable[..., Batches]) -> None:
    assert first_refusal(plan, draw_labels(64, [0.9, 0.1], 1), 8, 1, 400) is None


@pytest.mark.parametrize(
    ("plan", "size", "within"),
    [
        (weighted, 16, 20),
        (weighted, 4, 110),
        (oversampled, 16, 20),
        (undersampled, 16, 20),
        (undersampled, 4, 40),
    ],
)
def test_classes_sent_at_other_rates_are_refused(plan: Callable[..., Batches], size: int, within: int) -> None:
    for seed in range(10):
        y = np.random.default_rng(seed).permutation([1] * 24 + [0] * 176)
        refused = first_refusal(plan, y, size, seed, within)
        assert refused is not None, seed


@pytest.mark.parametrize(
    ("shares", "size", "within"),
    [([0.5, 0.5], 16, 20), ([0.5, 0.5], 4, 30), ([0.88, 0.12], 16, 60), ([0.1] * 10, 20, 8)],
)
def test_stratified_batches_are_refused(shares: list[float], size: int, within: int) -> None:
    for seed in range(10):
        y = np.repeat(np.arange(len(shares)), np.round(np.array(shares) * 400).astype(int))
        assert first_refusal(stratified, y, size, seed, within) is not None, seed


def test_what_each_epoch_leaves_out_adds_up_even_if_it_is_little_more_than_a_batch() -> None:
    y = np.array([1] * 23 + [0] * 41)
    assert all(first_refusal(undersampled_anew, y, 16, seed, 40) for seed in range(10))


def test_weak_weights_are_refused_in_the_end() -> None:
    def twice(y: np.ndarray, size: int, seed: int) -> Batches:
        return epochs(WeightedRandomSampler((1 + y).tolist(), len(y)), size)

    y = draw_labels(2000, [0.8, 0.2], 0)
    assert all(first_refusal(twice, y, 32, seed, 150) for seed in range(5))


def test_alarms_are_as_rare_as_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "RATE_ALARM", 0.05)
    monkeypatch.setattr(batches, "STRATA_ALARM", 0.05)
    runs = 40
    for plan in (shuffled, replaced):
        refused = [first_refusal(plan, draw_labels(80, [0.7, 0.3], seed), 8, seed, 30) for seed in range(runs)]
        alarms = sum(step is not None for step in refused)
        assert alarms <= runs * 0.1 + 5 * (runs * 0.1 * 0.9) ** 0.5


@pytest.mark.parametrize("left", [[30, 70], [5, 20, 9], [3, 1, 0]])
def test_expectations_are_exact(left: list[int]) -> None:
    rng, size, means = np.random.default_rng(0), 4, 4 * np.array([0.3, 0.5, 0.2][: len(left)])
    means *= size / means.sum()
    pool = np.array(left)
    centres = size * pool / pool.sum()
    drawn = [rng.multivariate_hypergeometric(pool, size, 100_000), rng.multinomial(size, centres / size, 100_000)]
    for counts, rest in zip(drawn, (pool, None), strict=True):
        x = ((counts - means) ** 2 / means).sum(axis=1)
        expected = np.log(np.exp(-batches._TILTS[:, None] * x).mean(axis=1))
        assert batches._expectation(size, means, centres, rest) == pytest.approx(expected, abs=0.05)


def test_full_batch_training() -> None:
    y = draw_labels(50, [0.8, 0.2], 0)
    monitor = BatchMonitor(range(50), y.tolist())
    for _ in range(200):
        monitor.observe(range(50), y.tolist())
    assert monitor.batches == 200 - batches.REPETITIONS


def test_full_batches_of_a_balanced_part_are_refused() -> None:
    y = [1] * 24 + [0] * 176
    monitor = BatchMonitor(range(200), y)
    plan = [(range(48), y[:48])] * (batches.REPETITIONS + batches.MIN_BATCHES + 1)
    with pytest.raises(LabelDependentBatches, match=r"Class 1 is 12% of the training set and 50% of what was"):
        observe_all(monitor, plan)


def test_a_repeated_batch_is_counted_once_in_any_order() -> None:
    monitor = BatchMonitor("abcdef", [0, 1] * 3)
    for batch in ("abc", "abc", "cab", "def", "def"):
        monitor.observe(batch, [0] * 3)
    assert monitor.batches == 2


def test_copies_and_strange_texts() -> None:
    rng = np.random.default_rng(0)
    rows = ["ok"] * 60 + ["so-so"] * 5 + [f"text {i}" for i in range(60)]
    y = [1] * 60 + [0, 1, 0, 1, 0] + [0] * 60
    monitor = BatchMonitor(rows, y)
    for _ in range(20):
        order = rng.permutation(len(rows))
        for i in range(0, len(rows), 8):
            batch = order[i : i + 8].tolist()
            monitor.observe([*(rows[j] for j in batch), f"strange {i}"], [*(y[j] for j in batch), 5])
    assert not monitor._uneven
    assert monitor.strange == monitor.batches == 20 * 16


def test_stratified_batches_of_strange_texts_are_refused() -> None:
    monitor = BatchMonitor(range(100), [0, 1] * 50)
    plan = [([f"changed {step} {i}" for i in range(16)], [0, 1] * 8) for step in range(25)]
    with pytest.raises(LabelDependentBatches):
        observe_all(monitor, plan)


def test_float_labels_are_binned() -> None:
    y = np.random.default_rng(0).normal(size=400)
    weights = np.exp(y).tolist()
    torch.manual_seed(0)
    monitors = [BatchMonitor(range(400), y.tolist()) for _ in range(2)]
    plans = [islice(epochs(sampler, 16), 40) for sampler in (RandomSampler(y), WeightedRandomSampler(weights, 400))]
    free, dependent = ([(batch, y[batch].tolist()) for batch in plan] for plan in plans)
    observe_all(monitors[0], free)
    with pytest.raises(LabelDependentBatches, match=r"The part with labels up to -0\.7038 is 25% of the training set"):
        observe_all(monitors[1], dependent)


@pytest.mark.parametrize("y", [[0.0, 1.0] * 8, [1.0] * 16, [0.0] * 13 + [1.0, 2.0, 3.0, 4.0, 5.0], [3] * 16])
def test_few_values_and_one_class(y: list[float]) -> None:
    monitor = BatchMonitor(range(len(y)), y)
    for batch in islice(epochs(RandomSampler(y), 4), 100):
        monitor.observe(batch, [y[i] for i in batch])


def test_a_refusal_is_final_and_says_what_to_do() -> None:
    y = np.arange(400) % 2
    monitor = BatchMonitor(range(400), y.tolist())
    plan = [(batch, y[batch].tolist()) for batch in islice(stratified(y, 16, 0), 20)]
    with pytest.raises(LabelDependentBatches, match="stratified"):
        observe_all(monitor, plan)
    resumed = BatchMonitor(range(400), y.tolist())
    resumed.load_state_dict(monitor.state_dict())
    for each in (monitor, resumed):
        with pytest.raises(LabelDependentBatches, match="RandomSampler") as caught:
            each.observe([1, 2, 3], [1, 0, 1])
        assert "weigh classes in the loss" in caught.value.remedy


def test_a_resumed_run_goes_on_where_it_was() -> None:
    y = draw_labels(200, [0.88, 0.12], 3)
    names = texts(list(range(200)))

    def train(monitor: BatchMonitor, plan: list[list[int]]) -> int:
        for batch in plan:
            try:
                monitor.observe(texts(batch), y[batch].tolist())
            except LabelDependentBatches:
                break
        return monitor.batches

    torch.manual_seed(0)
    plan = list(islice(weighted(y, 4, 0), 120))
    whole = train(BatchMonitor(names, y.tolist()), plan)
    first, second = (BatchMonitor(names, y.tolist()) for _ in range(2))
    train(first, plan[:12])
    second.load_state_dict(first.state_dict())
    assert train(second, plan[11:]) == whole < 120  # the twelfth is a repetition


def test_states_of_other_sets_are_refused() -> None:
    state = BatchMonitor("abcd", [0, 1, 0, 1]).state_dict()
    for other in (BatchMonitor("abce", [0, 1, 0, 1]), BatchMonitor("abcd", [0, 1, 1, 1])):
        with pytest.raises(CheckpointError, match="another training set"):
            other.load_state_dict(state)
    with pytest.raises(CheckpointError, match="incomplete"):
        BatchMonitor("abcd", [0, 1, 0, 1]).load_state_dict({"numbers": state["numbers"]})


def test_lengths_have_to_agree() -> None:
    with pytest.raises(ValueError, match="2 texts and 1 labels"):
        BatchMonitor("ab", [0])
    with pytest.raises(ValueError, match="0 texts"):
        BatchMonitor([], [])
    with pytest.raises(ValueError, match="1 texts and 2 labels"):
        BatchMonitor("ab", [0, 1]).observe("a", [0, 1])


@pytest.mark.parametrize(("size", "batch", "most"), [(400, 16, 10), (1000, 16, 10), (4000, 64, 10)])
def test_batches_of_the_minority_alone_are_refused(size: int, batch: int, most: int) -> None:
    """They differ from each other in nothing, and from what was sent in everything."""
    rng, minority = np.random.default_rng(0), int(0.12 * size)
    y = [0] * (size - minority) + [1] * minority
    monitor = BatchMonitor(range(size), y)
    plan = [(size - minority + rng.permutation(minority)[:batch]).tolist() for _ in range(most)]
    with pytest.raises(LabelDependentBatches, match="Class"):
        observe_all(monitor, [(rows, [y[i] for i in rows]) for rows in plan])


def test_batches_of_one_class_each_in_turn_are_refused() -> None:
    rng, y = np.random.default_rng(0), [0] * 352 + [1] * 48
    monitor, plan = BatchMonitor(range(400), y), []
    for step in range(60):
        plan.append((352 + rng.permutation(48)[:16]).tolist() if step % 2 else rng.permutation(352)[:16].tolist())
    with pytest.raises(LabelDependentBatches, match="Class"):
        observe_all(monitor, [(rows, [y[i] for i in rows]) for rows in plan])
