"""Exact discrete Gaussian noise on a public lattice: what a message tells is decided here, to the last bit.

Floating-point noise leaks: fl(g + n) can only be certain numbers, and which ones depends on g (Mironov 2012). So every
value that is hidden is first rounded to a multiple of a public step 2^e, and the noise is a discrete Gaussian on the
same multiples (Canonne, Kamath and Steinke 2020). All sums are integers below 2^24 steps, which float32 holds exactly,
so nothing is rounded after the noise is added.

The sampler works on integers from the keystream. It compares uniform numbers with e^-x: in floating point where the
answer is certain, otherwise in exact arithmetic. So its distribution is exact, and it gives the same numbers on every
machine.
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
"""Another way to make noise of a seed gets another number. Version 1 was float32 Box-Muller noise; it leaked."""
EXACT = 2**24
"""Every integer below this is a float32."""
MOST_STEPS = 3 * 2**19
"""Largest σ, in steps, of noise that is sent alone: 2^24 are then 10.7 σ."""
BLOCK = 2**16
"""Values are drawn in blocks of this size, one block after the other."""
CERTAIN = 2.0**-40
"""Relative distance from e^-x at which the comparison in floating point is certain. The error is below 2^-49."""


class LatticeOverflow(ArithmeticError):
    """A value needs 2^24 steps or more. With noise of at most `MOST_STEPS` the chance is below 10^-25 for a value."""


@dataclass(frozen=True)
class Lattice:
    """The multiples of 2^exponent, and discrete Gaussian noise on them with σ = steps · 2^exponent.

    Attributes:
        exponent: e of the public step 2^e.
        steps: σ in units of the step, an integer.
    """

    exponent: int
    steps: int

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS or not -100 <= self.exponent <= 60:
            raise ValueError(f"A lattice of step 2^{self.exponent} and noise of {self.steps} steps isn't exact.")

    @staticmethod
    def for_sigma(sigma: float, *, terms: int = 1, largest: float = 0.0) -> Lattice:
        """The finest lattice on which a value plus so many noise terms of this σ stays below 2^24 steps.

        Noise has 10.7 σ √terms of room. σ is met to half a step.

        Args:
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
        return 2.0**self.exponent

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise, in real units."""
        return self.steps * self.step

    def noise(self, stream: Keystream, shape: Sequence[int]) -> Tensor:
        """Discrete Gaussian noise in steps, int64."""
        return discrete_gaussian(stream, self.steps, math.prod(shape)).reshape(tuple(shape))

    def round(self, values: Tensor, stream: Keystream) -> Tensor:
        """The lattice points of real values, in steps, int64: rounded up or down at random, without bias."""
        scaled = values.double() / self.step
        return torch.floor(scaled + 1.0 - stream.uniform(*values.shape)).long()

    def round_within(self, values: Tensor, most: float, stream: Keystream) -> tuple[Tensor, float]:
        """As `round`, of values that are shrunk until their `cost` is at most `most`; and the factor that did it.

        Rounding adds at most a quarter of a step squared to each value's square, on average. Where it adds more than
        that, the values are shrunk further, in the end to zero.
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
        """|a|² / σ² of points, see `blindtune.privacy.accountant`."""
        return float(points.double().square().sum()) / self.steps**2

    def values(self, points: Tensor) -> Tensor:
        """The real numbers of lattice points: float32, exact.

        Raises:
            LatticeOverflow: a point is 2^24 steps or more away from zero.
        """
        if points.numel() and (int(points.max()) >= EXACT or int(points.min()) <= -EXACT):
            raise LatticeOverflow(f"A value needs {points.double().abs().max():.0f} steps; {EXACT} are exact.")
        return (points.double() * self.step).float()


def expand_noise(seed: bytes, shape: Sequence[int], lattice: Lattice) -> Tensor:
    """The share of pure noise that a seed stands for, float32: the same bits at the client and at every operator.

    Args:
        seed: 32 bytes, used for nothing else.
    """
    return lattice.values(lattice.noise(Keystream(seed), shape).clamp(1 - EXACT, EXACT - 1))


def discrete_gaussian(stream: Keystream, steps: int, count: int) -> Tensor:
    """`count` integers y with P(y) ∝ e^(-y² / 2 steps²), int64: exactly, whatever the platform.

    Each candidate takes three words w₁, w₂, w₃ of 64 bits. w₁ gives a sign and u, uniform below `steps` (or the
    candidate is dropped); w₂ gives k with P(k) ∝ e^-k; y = steps · k + u is kept if w₃ is below
    e^-((y² - (2k - 1) steps²) / 2 steps²), which is at most one. All together is ∝ e^-(y² / 2 steps²). This is the
    rejection sampler of Canonne, Kamath and Steinke (2020, algorithm 3), which begins with a discrete Laplace
    distribution, with its rejections made at once.

    Raises:
        ValueError: `steps` is below 1 or too large for exact integers.
    """
    if not 1 <= steps <= 2**24:
        raise ValueError(f"steps = {steps}: must be between 1 and 2^24.")
    result = np.empty(count, dtype=np.int64)
    for start in range(0, count, BLOCK):
        open_ = np.arange(start, min(count, start + BLOCK))
        while open_.size:
            values, kept = _candidates(stream, steps, open_.size)
            result[open_[kept]] = values[kept]
            open_ = open_[~kept]
    return torch.from_numpy(result)


def _candidates(stream: Keystream, steps: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """One round of the sampler: a candidate for each place, and whether it is kept."""
    place, tail, accept = np.frombuffer(stream.bytes(24 * count), dtype="<u8").reshape(3, count)
    offset = ((place >> np.uint64(1)) & np.uint64(2 ** (steps - 1).bit_length() - 1)).astype(np.int64)
    negative = (place & np.uint64(1)).astype(bool)
    kept = offset < steps
    k = _geometric(stream, tail)
    y = steps * k + offset
    numerator = y * y - (2 * k - 1) * (steps * steps)
    kept &= _below_exp(stream, accept, numerator, 2 * steps * steps, kept)
    kept &= ~(negative & (y == 0))  # zero has one sign
    return np.where(negative, -y, y), kept


def _geometric(stream: Keystream, words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """k with P(k ≥ j) = e^-j: the number of j ≥ 1 for which the uniform number is below e^-j."""
    depth = -np.log((words.astype(np.float64) + 0.5) * 2.0**-64)
    k = np.floor(depth).astype(np.int64)
    nearest = np.rint(depth)
    error = np.maximum(64 * CERTAIN, np.exp(depth) * 2.0**-62)  # of the logarithm; of bits that aren't drawn yet
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
    wanted: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Whether uniform numbers that begin with these words are below e^-(numerator / denominator), where wanted."""
    bound = np.exp(-(numerator / denominator))
    uniform = words.astype(np.float64) * 2.0**-64
    below = uniform < bound
    unsure = wanted & (np.abs(uniform - bound) <= CERTAIN * bound + 2.0**-62)
    for index in np.flatnonzero(unsure):
        exponent = Fraction(int(numerator[index]), denominator)
        below[index] = _uniform_below_exp(stream, int(words[index]), exponent)
    return below


def _uniform_below_exp(stream: Keystream, word: int, exponent: Fraction) -> bool:
    """Whether the uniform number in [0, 1) whose first 64 bits are `word` is below e^-exponent; exact.

    Further bits come from the stream while the first ones can't tell.
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
