"""Discrete Gaussian noise on a lattice: exact, the same everywhere, and nothing is rounded after it is added."""

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest, norm

from blindtune import lattice as module
from blindtune.keystream import Keystream
from blindtune.lattice import (
    EXACT,
    MOST_STEPS,
    NOISE_VERSION,
    Lattice,
    LatticeOverflow,
    discrete_gaussian,
    expand_noise,
)

SEED = bytes(range(32))
VECTOR_SMALL = [-3, 1, 4, 1, 3, 4, -1, 1, 3, -1, 0, 0]
VECTOR_LARGE = [-1392860, 995242, -153164, -1060927, -1093029, -1493343]


def plain_discrete_gaussian(stream: Keystream, steps: int, count: int) -> list[int]:
    """The sampler as its docstring tells it, word by word, with e^x from the decimal module."""
    import decimal

    decimal.getcontext().prec = 60

    def exp(x: Fraction) -> decimal.Decimal:
        return (-decimal.Decimal(x.numerator) / decimal.Decimal(x.denominator)).exp() * 2**64

    found: list[int | None] = [None] * count
    mask = 2 ** (steps - 1).bit_length() - 1
    while None in found:
        places = [index for index, value in enumerate(found) if value is None]
        words = struct.unpack(f"<{3 * len(places)}Q", stream.bytes(24 * len(places)))
        for i, place in enumerate(places):
            first, tail, accept = words[i], words[len(places) + i], words[2 * len(places) + i]
            offset, negative, k = (first >> 1) & mask, first & 1, 0
            while tail < exp(Fraction(k + 1)):
                k += 1
            y = steps * k + offset
            kept = offset < steps and accept < exp(Fraction(y * y - (2 * k - 1) * steps**2, 2 * steps**2))
            if kept and not (negative and y == 0):
                found[place] = -y if negative else y
    return found  # type: ignore[return-value]


class TestNoise:
    @pytest.mark.parametrize("steps", [1, 2, 3, 1000, 2**20 + 7])
    def test_is_what_plain_arithmetic_gives(self, steps):
        expected = plain_discrete_gaussian(Keystream(SEED), steps, 400)
        assert discrete_gaussian(Keystream(SEED), steps, 400).tolist() == expected

    @pytest.mark.parametrize("steps", [1, 3, 1_000_000])
    def test_does_not_depend_on_where_floating_point_is_trusted(self, steps, monkeypatch):
        """All comparisons within 2^-7 in exact arithmetic, in place of those within 2^-40."""
        expected = discrete_gaussian(Keystream(SEED), steps, 3000)
        monkeypatch.setattr(module, "CERTAIN", 2.0**-7)
        assert torch.equal(discrete_gaussian(Keystream(SEED), steps, 3000), expected)

    def test_goes_on_with_more_bits_where_64_are_a_tie(self):
        """The first 64 bits are those of e^-1 itself, so the next ones decide."""
        import decimal

        decimal.getcontext().prec = 80
        bits = int(decimal.Decimal(-1).exp() * 2**128)
        word, rest = bits >> 64, bits & (2**64 - 1)

        class Bits(Keystream):
            def __init__(self, following: int) -> None:
                self.following = following

            def bytes(self, count: int) -> bytes:
                return self.following.to_bytes(8, "little")

        for following, below in ((rest - 1, True), (rest + 1, False), (0, True), (2**64 - 1, False)):
            assert module._uniform_below_exp(Bits(following), word, Fraction(1)) is below
        assert module._uniform_below_exp(Keystream(SEED), 2**64 - 1, Fraction(0))

    @pytest.mark.parametrize("steps", [1, 2, 5])
    def test_has_the_probabilities_of_a_discrete_gaussian(self, steps):
        drawn = discrete_gaussian(Keystream(bytes([steps]) * 32), steps, 300_000).numpy()
        edge = 3 * steps
        weights = np.exp(-(np.arange(-12 * steps, 12 * steps + 1) ** 2) / (2 * steps**2))
        inside = weights[9 * steps : -9 * steps] / weights.sum()
        counts = [int((drawn == k).sum()) for k in range(-edge, edge + 1)]
        expected = 300_000 * np.append(inside, 1 - inside.sum())
        assert chisquare([*counts, 300_000 - sum(counts)], expected).pvalue > 1e-4

    def test_of_many_steps_is_normal(self):
        drawn = discrete_gaussian(Keystream(SEED), MOST_STEPS, 200_000).double() / MOST_STEPS
        assert kstest(drawn.numpy(), "norm").pvalue > 1e-3
        assert float(drawn.abs().max()) < 6

    def test_version_2_is_what_it_was(self):
        """Test vectors: another implementation that speaks version 2 must give these."""
        assert NOISE_VERSION == 2
        assert discrete_gaussian(Keystream(SEED), 3, 12).tolist() == VECTOR_SMALL
        assert discrete_gaussian(Keystream(SEED), 10**6, 6).tolist() == VECTOR_LARGE

    def test_in_blocks_is_the_stream_of_one_block_after_the_other(self, monkeypatch):
        monkeypatch.setattr(module, "BLOCK", 8)
        stream = Keystream(SEED)
        parts = [discrete_gaussian(stream, 100, count) for count in (8, 8, 3)]
        assert torch.equal(torch.cat(parts), discrete_gaussian(Keystream(SEED), 100, 19))

    def test_that_is_sent_as_a_seed_is_exact_in_float32(self):
        lattice = Lattice.for_sigma(37.0)
        noise = expand_noise(SEED, (3, 50), lattice)
        points = lattice.noise(Keystream(SEED), (3, 50))
        assert noise.dtype == torch.float32
        assert torch.equal((noise.double() / lattice.step), points.double())

    @pytest.mark.parametrize("steps", [0, -3, 2**24 + 1])
    def test_of_a_size_that_is_not_exact_is_refused(self, steps):
        with pytest.raises(ValueError, match=f"steps = {steps}"):
            discrete_gaussian(Keystream(SEED), steps, 1)


class TestLattice:
    @pytest.mark.parametrize("terms", [1, 2, 7])
    @pytest.mark.parametrize("sigma", [1e-6, 0.003, 1.0, 5000.0, 1e9])
    def test_meets_sigma_and_leaves_room_for_all_terms(self, sigma, terms):
        lattice = Lattice.for_sigma(sigma, terms=terms)
        assert lattice.sigma == pytest.approx(sigma, rel=3e-6)
        assert lattice.step == 2.0**lattice.exponent
        assert EXACT / (lattice.steps * math.sqrt(terms)) >= 10.6
        assert lattice.steps > 0.49 * MOST_STEPS / math.sqrt(terms)

    @pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf, 1e-60, 1e60])
    def test_for_noise_that_float32_cannot_hold_is_refused(self, sigma):
        with pytest.raises(ValueError, match=r"sigma|exact"):
            Lattice.for_sigma(sigma)

    def test_has_room_for_what_noise_is_added_to(self):
        lattice = Lattice.for_sigma(0.01, largest=60.0)
        edge = lattice.round(torch.full((4000,), 60.0), Keystream(SEED))
        lattice.values(edge + lattice.noise(Keystream(SEED), (4000,)))
        assert 1000 < lattice.steps < 3000

    def test_rounds_without_bias_to_one_of_the_two_neighbours(self):
        lattice = Lattice(-3, 1000)
        values = torch.tensor([0.3, -0.3, 1.0, 0.0, 7.49]).expand(20_000, -1)
        points = lattice.round(values, Keystream(SEED))
        exact = values.double() / lattice.step
        assert bool(((points == exact.floor()) | (points == exact.ceil())).all())
        assert torch.allclose(points.double().mean(0), exact[0], atol=0.02)
        assert torch.equal(points[:, 2], torch.full((20_000,), 8))

    def test_sums_of_points_are_exact_in_float32(self):
        lattice = Lattice.for_sigma(1000.0)
        noise = lattice.noise(Keystream(SEED), (10_000,))
        point = torch.randint(-5000, 5000, (10_000,), generator=torch.Generator().manual_seed(0))
        sent = lattice.values(point + noise)
        assert torch.equal((sent.double() / lattice.step).long() - noise, point)

    def test_refuses_what_float32_would_round(self):
        lattice = Lattice(0, 10)
        assert float(lattice.values(torch.tensor([EXACT - 1]))) == EXACT - 1
        with pytest.raises(LatticeOverflow, match="16777216"):
            lattice.values(torch.tensor([-EXACT]))


def test_discrete_and_rounded_gaussians_are_as_good_as_the_same():
    """μ-GDP is that of the Gaussian mechanism, whose output rounded to the lattice is g plus a rounded Gaussian.

    Its divergence from the discrete Gaussian is 1 / 576 steps⁴ nats for a value, here by summing; so for 10^12 values
    of 2^19 steps their total variation is about 10^-7 (Pinsker), which adds as much to δ.
    """
    for steps in (4, 16):
        k = np.arange(-12 * steps, 12 * steps + 1)
        discrete = np.exp(-(k**2) / (2 * steps**2))
        discrete /= discrete.sum()
        rounded = norm.sf((np.abs(k) - 0.5) / steps) - norm.sf((np.abs(k) + 0.5) / steps)
        divergence = float((rounded * np.log(rounded / discrete)).sum())
        assert divergence == pytest.approx(1 / (576 * steps**4), rel=0.01)
    assert math.sqrt(1e12 / (576 * 2**76) / 2) < 1.1e-7
