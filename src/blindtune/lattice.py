"""Exact discrete Gaussian noise on a public lattice. The privacy guarantee of every noisy message rests on this module.

Floating-point noise leaks: fl(g + n) can only take certain values, and which ones depends on g (Mironov 2012). So every
secret value is first rounded to a multiple of a public step 2^e, and the noise is a discrete Gaussian on the same
multiples (Canonne, Kamath and Steinke 2020). All sums are integers below 2^24 steps, which float32 represents exactly,
so no rounding takes place after the noise is added.

The sampler works on integers from the keystream. It compares uniform numbers with e^-x: in floating point where the
result is certain, otherwise in exact arithmetic. So its distribution is exact, and every machine computes the same
numbers from the same key.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blindtune.keystream import Keystream

NOISE_VERSION = 2
"""Version of the expansion of a seed into noise; a change of the algorithm needs a new number.

Version 1 was float32 Box-Muller noise; it leaked.
"""
EXACT = 2**24
"""Float32 represents every integer of smaller absolute value exactly."""
MOST_STEPS = 3 * 2**19
"""Largest σ, in steps, of noise that is sent alone: 2^24 steps are then 10.7 σ."""
BLOCK = 2**16
"""Number of values that the sampler draws at a time."""
CERTAIN = 2.0**-40
"""Relative distance from e^-x beyond which the floating-point comparison is certain. Its error is below 2^-49."""


class LatticeOverflow(ArithmeticError):
    """A value is 2^24 steps or more from zero. With noise of at most `MOST_STEPS`, its probability is below 10^-25."""


@dataclass(frozen=True)
class Lattice:
    """The multiples of 2^exponent, and discrete Gaussian noise on them with σ = steps · 2^exponent.

    Attributes:
        exponent: e; the public step is 2^e.
        steps: σ in units of the step, an integer.
    """

    exponent: int
    steps: int

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS or not -100 <= self.exponent <= 60:
            raise ValueError(f"A lattice of step 2^{self.exponent} and noise of {self.steps} steps isn't exact.")

    @staticmethod
    def for_sigma(sigma: float, *, terms: int = 1, largest: float = 0.0) -> Lattice:
        """Returns the finest lattice on which a value plus `terms` noise terms of this σ stays below 2^24 steps.

        The sum of the noise terms may reach 10.7 σ √terms. The lattice's σ differs from `sigma` by at most half a step.

        Args:
            sigma: standard deviation of one noise term, in real units.
            terms: number of noise terms that are added to the value.
            largest: bound on the absolute value that noise is added to, in real units.
        Raises:
            ValueError: σ is not positive, too large or small for float32, or below half a step.
        """
        if not 0 < sigma < math.inf or terms < 1 or not 0 <= largest < math.inf:
            raise ValueError(f"sigma = {sigma}, terms = {terms}, largest = {largest}: these make no noise.")
        step = sigma * math.sqrt(terms) / MOST_STEPS + largest / EXACT
        exponent = math.ceil(math.log2(step))
        return Lattice(exponent, round(sigma / 2.0**exponent))

    @property
    def step(self) -> float:
        """The distance 2^exponent between neighbouring lattice points, in real units."""
        return 2.0**self.exponent

    @property
    def sigma(self) -> float:
        """The standard deviation of the noise, in real units."""
        return self.steps * self.step

    def noise(self, stream: Keystream, shape: Sequence[int]) -> Tensor:
        """Returns discrete Gaussian noise in steps, int64."""
        return discrete_gaussian(stream, self.steps, math.prod(shape)).reshape(tuple(shape))

    def round(self, values: Tensor, stream: Keystream) -> Tensor:
        """Rounds real values to lattice points, up or down at random and without bias. Returns steps, int64."""
        scaled = values.double() / self.step
        return torch.floor(scaled + 1.0 - stream.uniform(*values.shape)).long()

    def round_within(self, values: Tensor, most: float, stream: Keystream) -> tuple[Tensor, float]:
        """Scales values down until the `cost` of their lattice points is at most `most`, then rounds as `round` does.

        Rounding adds on average at most 1/4 step² to each value's square. If it adds more, the values are scaled
        down further, and after 32 attempts replaced by zeros.

        Returns:
            The lattice points, in steps, int64, and the factor by which the values were scaled.
        """
        exact = values.double()
        steps = max(0.0, math.sqrt(max(0.0, most * self.steps**2 - values.numel() / 4.0)) - 2.0)
        factor = min(1.0, steps * self.step / max(float(exact.norm()), 1e-30))
        for _ in range(32):
            points = self.round(exact * factor, stream)
            if self.cost(points) <= most:
                return points, factor
            factor *= 0.97
        return torch.zeros_like(values, dtype=torch.int64), 0.0

    def cost(self, points: Tensor) -> float:
        """Returns the cost |a|² / σ² of lattice points a (`blindtune.privacy.accountant`)."""
        return float(points.double().square().sum()) / self.steps**2

    def values(self, points: Tensor) -> Tensor:
        """Returns the real values of lattice points: float32, exact.

        Raises:
            LatticeOverflow: a point is 2^24 steps or more from zero.
        """
        if points.numel() and (int(points.max()) >= EXACT or int(points.min()) <= -EXACT):
            raise LatticeOverflow(f"A value needs {points.double().abs().max():.0f} steps; {EXACT} are exact.")
        return (points.double() * self.step).float()


def expand_noise(seed: bytes, shape: Sequence[int], lattice: Lattice) -> Tensor:
    """Expands a seed into a share of pure noise, float32. The client and every operator compute the same bits.

    Args:
        seed: 32 bytes that are used for nothing else.
    """
    return lattice.values(lattice.noise(Keystream(seed), shape).clamp(1 - EXACT, EXACT - 1))


def discrete_gaussian(stream: Keystream, steps: int, count: int) -> Tensor:
    """Draws `count` integers y with exactly P(y) ∝ e^(-y² / 2 steps²), int64, identical on every platform.

    Each candidate takes three words w₁, w₂, w₃ of 64 bits. w₁ gives a sign and u, uniform below `steps` (otherwise the
    candidate is rejected); w₂ gives k with P(k) ∝ e^-k; y = steps · k + u is accepted if w₃ is below
    e^-((y² - (2k - 1) steps²) / 2 steps²), which is at most one. The product of these probabilities is
    ∝ e^-(y² / 2 steps²). This is the rejection sampler of Canonne, Kamath and Steinke (2020, algorithm 3), which starts
    from a discrete Laplace distribution; here both of its rejection steps are combined into one.

    Raises:
        ValueError: `steps` is below 1 or too large for exact integers.
    """
    if not 1 <= steps <= 2**24:
        raise ValueError(f"steps = {steps}: must be between 1 and 2^24.")
    result = np.empty(count, dtype=np.int64)
    for start in range(0, count, BLOCK):
        pending = np.arange(start, min(count, start + BLOCK))
        while pending.size:
            values, accepted = _candidates(stream, steps, pending.size)
            result[pending[accepted]] = values[accepted]
            pending = pending[~accepted]
    return torch.from_numpy(result)


def _candidates(stream: Keystream, steps: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Draws one round of `count` candidates. Returns their values and whether each is accepted."""
    offset_words, tail_words, accept_words = np.frombuffer(stream.bytes(24 * count), dtype="<u8").reshape(3, count)
    offset = ((offset_words >> np.uint64(1)) & np.uint64(2 ** (steps - 1).bit_length() - 1)).astype(np.int64)
    negative = (offset_words & np.uint64(1)).astype(bool)
    accepted = offset < steps
    k = _geometric(stream, tail_words)
    y = steps * k + offset
    numerator = y * y - (2 * k - 1) * (steps * steps)
    accepted &= _below_exp(stream, accept_words, numerator, 2 * steps * steps, accepted)
    accepted &= ~(negative & (y == 0))  # otherwise zero would be drawn with both signs, and so twice as often
    return np.where(negative, -y, y), accepted


def _geometric(stream: Keystream, words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Draws k with P(k ≥ j) = e^-j: the number of j ≥ 1 for which a word's uniform number is below e^-j."""
    depth = -np.log((words.astype(np.float64) + 0.5) * 2.0**-64)
    k = np.floor(depth).astype(np.int64)
    nearest = np.rint(depth)
    # bounds the error of the logarithm, and the effect of the bits after the first 64, which aren't drawn yet
    error = np.maximum(64 * CERTAIN, np.exp(depth) * 2.0**-62)
    unsure = np.abs(depth - nearest) <= error
    for index in np.flatnonzero(unsure & (nearest >= 1)):
        j = int(nearest[index])
        below = _uniform_below_exp(stream, int(words[index]), Fraction(j))
        k[index] = j if below else j - 1
    return k


def _below_exp(
    stream: Keystream,
    words: NDArray[np.uint64],
    numerator: NDArray[np.int64],
    denominator: int,
    needed: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Returns whether the uniform numbers that begin with these words are below e^-(numerator / denominator).

    Args:
        needed: the entries whose result must be exact; the caller ignores the others.
    """
    bound = np.exp(-(numerator / denominator))
    uniform = words.astype(np.float64) * 2.0**-64
    below = uniform < bound
    unsure = needed & (np.abs(uniform - bound) <= CERTAIN * bound + 2.0**-62)
    for index in np.flatnonzero(unsure):
        exponent = Fraction(int(numerator[index]), denominator)
        below[index] = _uniform_below_exp(stream, int(words[index]), exponent)
    return below


def _uniform_below_exp(stream: Keystream, word: int, exponent: Fraction) -> bool:
    """Returns whether the uniform number in [0, 1) whose first 64 bits are `word` is below e^-exponent; exact.

    Draws further bits from the stream as long as the bits so far don't decide the comparison.
    """
    bits, value = 64, word
    while True:
        with decimal.localcontext() as context:
            context.prec = 40 + bits
            power = -decimal.Decimal(exponent.numerator) / decimal.Decimal(exponent.denominator)
            bound = int(power.exp() * (1 << bits))
        if value != bound:
            return value < bound
        value = (value << 64) | int.from_bytes(stream.bytes(8), "little")
        bits += 64
