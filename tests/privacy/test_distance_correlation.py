"""Distance correlation: no bias where the plain estimator is all bias, and a gradient that takes a leak away."""

import math

import pytest
import torch
from torch.nn import functional as F

from blindtune.privacy.distance_correlation import FLOOR, log_distance_correlation, squared_distance_correlation


def draw(rows: int, dim: int, seed: int, classes: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Features, and one-hot labels that have nothing to do with them."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=random)
    return torch.randn(rows, dim, generator=random), F.one_hot(labels, classes).float()


def plain(x: torch.Tensor, y: torch.Tensor) -> float:
    """The estimator of 2007: dCor², not its square root, of doubly centred distances."""

    def centred(values: torch.Tensor) -> torch.Tensor:
        a = torch.cdist(values.double(), values.double())
        return a - a.mean(0, keepdim=True) - a.mean(1, keepdim=True) + a.mean()

    a, b = centred(x), centred(y)
    return float((a * b).mean() / (a.pow(2).mean() * b.pow(2).mean()).sqrt())


def by_definition(x: torch.Tensor, y: torch.Tensor) -> float:
    """Székely and Rizzo 2014, definition 2 and equation 3.1, one entry after the other."""

    def centred(values: torch.Tensor) -> list[list[float]]:
        n = len(values)
        a = [[math.dist(values[i].tolist(), values[j].tolist()) for j in range(n)] for i in range(n)]
        rows = [sum(row) / (n - 2) for row in a]
        total = sum(map(sum, a)) / ((n - 1) * (n - 2))
        return [[0.0 if i == j else a[i][j] - rows[i] - rows[j] + total for j in range(n)] for i in range(n)]

    def product(p: list[list[float]], q: list[list[float]]) -> float:
        return sum(left * right for rows in zip(p, q, strict=True) for left, right in zip(*rows, strict=True))

    a, b = centred(x), centred(y)
    return product(a, b) / math.sqrt(product(a, a) * product(b, b))


@pytest.mark.parametrize(("rows", "dim", "classes"), [(4, 2, 2), (7, 3, 3), (12, 40, 2)])
def test_it_is_the_published_formula(rows, dim, classes):
    x, _ = draw(rows, dim, seed=1)
    y = F.one_hot(torch.arange(rows) % classes, classes).float()
    assert squared_distance_correlation(x, y).item() == pytest.approx(by_definition(x, y), abs=1e-5)


@pytest.mark.parametrize(("other", "bias"), [("two classes", 0.17), ("one class each", 0.98), ("features", 0.9)])
def test_independent_batches_read_about_zero_where_the_plain_estimator_reads_its_bias(other, bias):
    """1/√32 = 0.177 against two classes, and nearly one where labels have as many dimensions as features."""
    batches = [draw(32, 384, seed) for seed in range(40)]
    if other == "one class each":
        batches = [(x, torch.eye(32)) for x, _ in batches]
    elif other == "features":
        batches = [(x, draw(32, 384, 1000 + seed)[0]) for seed, (x, _) in enumerate(batches)]
    values = torch.tensor([squared_distance_correlation(*batch).item() for batch in batches])
    assert abs(values.mean()) < 0.03
    assert values.abs().max() < 0.2
    assert sum(plain(*batch) for batch in batches) / 40 > bias


@pytest.mark.parametrize("classes", [2, 5])
def test_a_function_of_the_labels_reads_nearly_one(classes):
    _, y = draw(32, 384, seed=3, classes=classes)
    x = y @ torch.randn(classes, 384, generator=torch.Generator().manual_seed(4))
    assert squared_distance_correlation(x, y).item() > 0.97
    assert squared_distance_correlation(y, y).item() == pytest.approx(1.0, abs=1e-6)


def test_turning_moving_and_scaling_change_nothing():
    x, y = draw(24, 16, seed=5)
    x = x + y[:, :1]
    turn, _ = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(6)))
    value = squared_distance_correlation(x, y).item()
    for scale in (1e-12, 3.0, 1e12):
        assert squared_distance_correlation(scale * (x @ turn + 0.5), y).item() == pytest.approx(value, abs=1e-4)
    assert squared_distance_correlation(y, x).item() == pytest.approx(value, abs=1e-6)


def test_order_of_the_rows_does_not_matter():
    x, y = draw(24, 16, seed=7)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(8))
    assert torch.allclose(squared_distance_correlation(x, y), squared_distance_correlation(x[order], y[order]))


def leaking(seed: int, rows: int = 32, dim: int = 384) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = draw(rows, dim, seed)
    x[:, 0] += 40 * y[:, 0]
    return x, y


def test_gradients_are_finite_with_equal_rows():
    x, y = leaking(seed=9)
    x[1], x[2], y[1], y[2] = x[0], x[0], y[0], y[0]
    x.requires_grad_()
    log_distance_correlation(x, y).backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("case", ["equal features", "one class", "all classes differ"])
def test_nothing_to_correlate_is_zero_with_a_finite_gradient(case):
    x, y = draw(8, 4, seed=10)
    x = torch.ones(8, 4) / 3 if case == "equal features" else x
    y = {"one class": F.one_hot(torch.ones(8).long(), 2).float(), "all classes differ": torch.eye(8)}.get(case, y)
    x.requires_grad_()
    value = squared_distance_correlation(x, y)
    value.backward()
    assert value.item() == 0
    assert torch.isfinite(x.grad).all()


def test_the_logarithm_stops_at_its_floor():
    batch = next(b for b in (draw(32, 384, seed) for seed in range(40)) if squared_distance_correlation(*b) < 0)
    x, y = batch
    x.requires_grad_()
    value = log_distance_correlation(x, y)
    value.backward()
    assert value.item() == pytest.approx(math.log(FLOOR))
    assert (x.grad == 0).all()
    high = leaking(seed=11)
    assert log_distance_correlation(*high).item() == pytest.approx(math.log(squared_distance_correlation(*high)))


def test_following_the_gradient_takes_a_planted_leak_away():
    """The attack: the first principal component tells the label. A linear map is trained; the attack meets new rows."""
    torch.manual_seed(0)
    change = torch.zeros(64, 64, requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=0.02)
    unseen, classes = leaking(seed=999, rows=400, dim=64)
    before = leading_gap(unseen, classes)
    for step in range(150):
        x, y = leaking(seed=step, dim=64)
        optimizer.zero_grad()
        log_distance_correlation(x + x @ change, y).backward()
        optimizer.step()
    with torch.no_grad():
        after = unseen + unseen @ change
    assert before > 10
    assert leading_gap(after, classes) < 2
    assert squared_distance_correlation(after, classes) < 0.1 < squared_distance_correlation(unseen, classes)


def leading_gap(x: torch.Tensor, y: torch.Tensor) -> float:
    """How far apart the classes are on the first principal component, in standard deviations within a class."""
    _, _, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    score = (x - x.mean(0)) @ v[0]
    one, two = score[y[:, 0] == 1], score[y[:, 0] == 0]
    return float((one.mean() - two.mean()).abs() / torch.maximum(one.std(), two.std()))


@pytest.mark.parametrize(("rows", "other"), [(3, 3), (0, 0), (8, 7)])
def test_too_few_or_unequal_rows_are_refused(rows, other):
    with pytest.raises(ValueError, match=f"{rows} and {other} rows"):
        squared_distance_correlation(torch.zeros(rows, 3), torch.zeros(other, 2))


@pytest.mark.parametrize("floor", [0.0, 1.0, -0.1])
def test_a_floor_without_logarithm_is_refused(floor):
    with pytest.raises(ValueError, match="floor"):
        log_distance_correlation(*draw(8, 3, seed=0), floor=floor)


@pytest.mark.parametrize("rows", [4, 32])
def test_the_biased_estimator_is_the_plain_one(rows):
    x, y = draw(rows, 40, seed=2)
    value = squared_distance_correlation(x, y, "biased").item()
    assert value == pytest.approx(plain(x, y), abs=1e-5)
    assert log_distance_correlation(x, y, estimator="biased").item() == pytest.approx(math.log(value), abs=1e-5)


def test_the_biased_estimator_penalises_what_chance_explains_too():
    x, y = draw(32, 384, seed=3)
    for estimator, pulls in (("unbiased", False), ("biased", True)):
        moving = x.clone().requires_grad_()
        log_distance_correlation(moving, y, estimator=estimator).backward()
        assert bool(moving.grad.abs().max() > 0) == pulls
