"""Padded adapters: what the difference of two gives back, and how little one of them tells."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm
from sklearn.metrics import roc_auc_score
from torch import Tensor

from blindtune.lattice import Lattice, LatticeOverflow
from blindtune.privacy.pads import PadScale, pad_pair, unpad
from blindtune.privacy.randomness import SecureGenerator

HALF_ULP = 2.0**-24
"""Relative error of rounding to float32."""


def generator(*context: bytes) -> SecureGenerator:
    return SecureGenerator(bytes(range(32))).derive(*context)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(sigma: float, amplification: float) -> PadScale:
    return PadScale(Lattice.for_sigma(sigma, largest=sigma), amplification)


def padded(delta: Tensor, scale: PadScale, key: SecureGenerator) -> tuple[Tensor, Tensor]:
    return pad_pair(scale.points(delta, math.inf, generator=key)[0], scale.lattice, generator=key)


def of_norm(length: float, size: int, seed: int = 0) -> Tensor:
    direction = random(size, seed=seed)
    return direction * length / direction.norm()


class TestArithmetic:
    @pytest.mark.parametrize("amplification", [1.0, 100.0, 5000.0])
    def test_the_difference_of_two_gives_a_linear_functions_value(self, amplification: float):
        """Up to rounding to float32, of the adapters and of what comes back, which s amplifies."""
        scale = make(0.1, amplification)
        delta, jacobian, base = of_norm(1.5, 400), random(3, 7, 400, seed=1), random(3, 7, seed=2).float()
        plus, minus = padded(delta, scale, generator())
        hidden = [(base + jacobian @ half.double()).float() for half in (plus, minus)]
        found = unpad(base, *hidden, amplification)
        assert found.dtype == plus.dtype == minus.dtype == torch.float32
        rounded = (plus.double() - minus.double()) * amplification  # δ on the lattice, exact
        expected = base.double() + jacobian @ rounded
        rounding = HALF_ULP * (hidden[0].abs() + jacobian.abs() @ plus.double().abs())
        assert bool(((found - expected).abs() <= 2.5 * amplification * rounding + 1e-6).all())
        assert float((found - expected).norm()) < 2e-3 * float((jacobian @ delta).norm())

    def test_what_is_not_linear_in_the_pad_alone_cancels(self):
        """h(θ) = Jθ + q(θ): of a quadratic q only its part between pad and δ is left, and no more of it than of δ."""
        scale = make(0.1, 1000.0)
        delta, jacobian, quadratic = of_norm(1.0, 50), random(6, 50, seed=1), random(6, 50, 50, seed=2)
        plus, minus = padded(delta, scale, generator())

        def h(theta: Tensor) -> Tensor:
            return jacobian @ theta + torch.einsum("kij,i,j->k", quadratic, theta, theta)

        found = unpad(torch.zeros(6), h(plus.double()), h(minus.double()), 1000.0)
        pad = (plus.double() + minus.double()) / 2
        delta = (plus.double() - minus.double()) * 1000.0  # on the lattice
        at_pad = jacobian @ delta + torch.einsum("kij,i,j->k", quadratic + quadratic.transpose(1, 2), pad, delta)
        assert torch.allclose(found.double(), at_pad, atol=1e-3)
        assert float(h(pad).norm()) > 0.1, "the pad itself moves h"

    def test_halves_are_exact_and_on_the_lattice(self):
        """Their difference is twice δ/2s on the lattice, to the last bit: nothing was rounded after the pad came."""
        scale, delta = make(0.02, 37.0), of_norm(1.0, 1000)
        points = scale.lattice.round(delta / 74.0, generator())
        plus, minus = pad_pair(points, scale.lattice, generator=generator(b"pad"))
        steps = [(half.double() / scale.lattice.step) for half in (plus, minus)]
        assert all(torch.equal(s, s.round()) for s in steps)
        assert torch.equal((steps[0] - steps[1]).long(), 2 * points)
        assert float((points.double() * scale.lattice.step * 74.0 - delta).abs().max()) <= scale.lattice.step * 74.0

    def test_an_update_far_larger_than_the_pad_is_refused_and_never_rounded(self):
        with pytest.raises(LatticeOverflow):
            padded(of_norm(1e3, 4), make(0.1, 1.0), generator())


class TestBudget:
    @pytest.mark.parametrize("sigma", [0.003, 2.0])
    @pytest.mark.parametrize("norm", [0.1, 8.0])
    @pytest.mark.parametrize("allowance", [1e-5, 0.01])
    def test_is_what_an_update_of_that_norm_costs(self, sigma: float, norm: float, allowance: float):
        scale = PadScale.for_allowance(sigma, norm, allowance)
        assert scale.lattice.sigma == pytest.approx(sigma, rel=1e-5)
        points, factor = scale.points(of_norm(norm, 300), 1.0, generator=generator())
        assert (scale.lattice.cost(points), factor) == (pytest.approx(allowance, rel=0.02), 1.0)
        assert 0.9 < scale.resolution(300, allowance) < 1

    @pytest.mark.parametrize("length", [0.1, 1.0, 30.0])
    def test_is_never_exceeded_however_long_the_update_is_and_however_its_rounding_falls(self, length: float):
        scale = PadScale.for_allowance(0.01, 1.0, 1e-5)
        for key in range(40):
            delta = of_norm(length, 3000, key)
            points, factor = scale.points(delta, 1e-5, generator=generator(bytes([key])))
            assert scale.lattice.cost(points) <= 1e-5
            assert factor == (1.0 if length < 1 else pytest.approx(1 / length, rel=0.2))
            found = points.double() * scale.lattice.step * 2 * scale.amplification
            assert float((found - factor * delta).norm()) < 0.2 * factor * length if length >= 1 else True
        points, factor = scale.points(of_norm(1.0, 300), 0.0, generator=generator())
        assert (int(points.abs().max()), factor) == (0, 0.0)

    def test_is_in_units_of_the_divergence_from_a_pad_alone(self):
        """Kullback-Leibler divergence of N(a, σ²) from N(0, σ²): half the cost."""
        scale, delta = make(0.3, 5.0), of_norm(2.0, 6)
        alone = torch.distributions.Normal(torch.zeros(6), 0.3)
        divergence = torch.distributions.kl_divergence(torch.distributions.Normal(delta / 10.0, 0.3), alone)
        cost = scale.lattice.cost(scale.points(delta, 1.0, generator=generator())[0])
        assert cost / 2 == pytest.approx(float(divergence.sum()), rel=1e-4)

    @pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan])
    @pytest.mark.parametrize("place", range(3))
    def test_of_numbers_that_are_not_positive_is_refused(self, place: int, wrong: float):
        numbers = [1.0, 1.0, 1.0]
        numbers[place] = wrong
        with pytest.raises(ValueError, match="must be positive"):
            PadScale.for_allowance(*numbers)


SIZE = 200_000


class TestWhatOneOperatorSees:
    """Fixed keys, so that these numbers are always the same; five standard errors each."""

    SCALE = make(0.02, 100.0)
    DELTA = of_norm(4.0, SIZE, seed=3)

    @pytest.mark.parametrize("side", [0, 1])
    def test_is_normal_around_what_the_update_adds(self, side: int):
        half = padded(self.DELTA, self.SCALE, generator())[side].double()
        sign = 1.0 - 2.0 * side
        pad = half - sign * self.DELTA / 200.0
        assert abs(float(pad.mean())) < 5 * 0.02 / SIZE**0.5
        assert float(pad.var()) == pytest.approx(0.02**2, rel=5 * (2 / SIZE) ** 0.5)
        assert kstest(pad.numpy() / 0.02, "norm").pvalue > 1e-3
        along = float(half @ self.DELTA) / (4.0 * 0.02)  # N(±|δ| / 2sσ, 1)
        assert along == pytest.approx(sign * 4.0 / (200.0 * 0.02), abs=5)

    def test_has_a_pad_that_does_not_depend_on_the_update(self):
        one = padded(self.DELTA, self.SCALE, generator())[0].double() - self.DELTA / 200.0
        other = padded(-self.DELTA, self.SCALE, generator())[0].double() + self.DELTA / 200.0
        assert torch.allclose(one, other, atol=2.5 * self.SCALE.lattice.step)  # the same key: the same pad

    def test_has_another_pad_under_another_key(self):
        pads = [padded(self.DELTA, self.SCALE, generator(key))[0].numpy() for key in (b"a", b"b")]
        assert abs(np.corrcoef(*pads)[0, 1]) < 5 / SIZE**0.5

    def test_is_worth_nothing_only_as_long_as_nobody_has_both(self):
        plus, minus = padded(self.DELTA, self.SCALE, generator())
        together = (plus.double() - minus.double()) * 100.0
        assert float((together - self.DELTA).norm()) < 1e-2 * float(self.DELTA.norm())


RUNS, VIEWS = 400, 12


def distinguishing_auc(nats: float) -> tuple[float, float]:
    """The best attacker: knows both candidates for every δ of a run and sums the likelihood ratios of what one operator
    saw. Returns its AUC, and the bound Φ(μ / √2) with μ = |δ₁ − δ₀| √views / 2sσ."""
    scale = PadScale.for_allowance(0.05, 1.0, 2 * nats / VIEWS)
    candidates = [[of_norm(sign, 30, seed=view) for view in range(VIEWS)] for sign in (-1.0, 1.0)]
    ratios = np.zeros((2, RUNS))
    for truth in (0, 1):
        for run in range(RUNS):
            for view, delta in enumerate(candidates[truth]):
                key = generator(bytes([truth]), run.to_bytes(4, "little"), view.to_bytes(4, "little"))
                seen = padded(delta, scale, key)[0].double()
                means = [candidates[c][view] / (2 * scale.amplification) for c in (0, 1)]
                squares = [float((seen - mean).square().sum()) for mean in means]
                ratios[truth, run] += (squares[0] - squares[1]) / (2 * scale.lattice.sigma**2)
    mu = 2.0 * VIEWS**0.5 / (2 * scale.amplification * scale.lattice.sigma)
    auc = float(roc_auc_score(np.repeat([0, 1], RUNS), ratios.flatten()))
    return auc, float(norm.cdf(mu / math.sqrt(2.0)))


def test_the_best_attacker_tells_two_updates_apart_as_often_as_the_bound_says_and_no_more():
    auc, bound = distinguishing_auc(nats=0.1)
    assert 0.7 < bound < 0.75
    assert auc == pytest.approx(bound, abs=0.06)  # three standard errors


def test_pads_that_are_too_small_hide_nothing():
    """The same attacker, the same numbers, a budget of 5 nats."""
    auc, _ = distinguishing_auc(nats=5.0)
    assert auc >= 0.95
