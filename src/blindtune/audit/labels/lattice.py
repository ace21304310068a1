"""Attacks the low-order bits of a share: they reveal its gradient, however large the noise is (Mironov 2012).

Earlier versions sent the carrier c = fl32(g - α n), with float32 noise n and one secret coefficient α for a share,
1 ≤ |α| < 1.25. Float32 numbers are multiples of a unit that depends on their size only. If the gaps of α n are wider
than the unit of c, a part 1 - 1/α of all float32 numbers can't be c, and the numbers that can't be c depend on g. Up to
a fifth of the coordinates contradict a wrong gradient; no coordinate contradicts the right one.

An operator that knows some gradients of the batch computes α from them (`recover_coefficient`) and then tests the
gradients that other labels would give (`label_scores`). Without any gradient it can still read labels if all gradients
are ± one vector (`blind_signs`). The same method reads rows of hidden states under float32 noise (`row_scores`).

If gradient and noise are multiples of one public step and the coefficient is ±1, every multiple can be c under every
gradient, and all scores are equal. `public_step` recognizes such a share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft

from blindtune.audit.channel_id import ChannelId
from blindtune.audit.labels.registry import Declaration, Knowledge, observes_shares
from blindtune.audit.observe import Features, View
from blindtune.audit.statistics import Labels, Scores, auc

DECLARATION = Declaration("lattice", "any share", Knowledge.ALL_OTHER_LABELS, ("how shares are made",))
SPAN = (1.0, 1.25)
"""Range of |α| in versions that rounded after they had added noise."""
EXACT = 2**24
"""Float32 represents every integer below this exactly."""

FLOOR = 2.0**-10
"""Likelihood of a carrier that no noise gives. It isn't zero, because hypotheses contain rounding errors."""
TOLERANCE = 2.0**-10
"""Tolerance of the search for α, in units of the last bit of a carrier, for the same reason."""
CANDIDATES = (2**10, 2**18)
"""Numbers of highest peaks of the periodogram to test. The larger number is used only if α is none of the first."""
STRONGEST = 8192
"""Number of coordinates for the search. More coordinates take time and do not help: these determine α to 10^-10."""
SURE = 40.0
"""Required evidence for α in nats. There are 10^10 distinguishable values of α, which is 23 nats."""
VISIBLE = 1.5
"""Least height of the peak of α, in standard deviations of the periodogram, to be among the highest peaks."""
NEARLY_ALL = 0.995
FOLDS = 4

PHASES, FINER = 16, 8
"""Number of cells of one period of the likelihood, and of points in each cell over which it is averaged."""
UNLIKELY = 0.02
"""Least likelihood of a cell."""
CELLS, MOST_CELLS = 1024, 2**22
"""Number of values of a coordinate that are considered possible, and maximum number of values that are examined."""


def noise_mass(carrier: ArrayLike, gradient: ArrayLike, coefficient: float, *, step: int | None = None) -> Scores:
    """Computes the amount of noise that gives exactly this carrier, for every coordinate; zero if no noise does.

    The probability of a float32 noise value is its unit in the last place times a density, which is nearly equal for
    neighbours. So the result is the likelihood of the gradient without the density: the sum of these units over all n
    with fl32(gradient - coefficient · n) = carrier, divided by the unit of the carrier.

    Args:
        carrier: `(..., d)`, float32 numbers.
        gradient: `(..., d)`, broadcast against it.
        step: exponent e of a public lattice. Then noise is a multiple of 2^e, the gradient is rounded up or down to a
            multiple at random, without bias, and the result is the probability that this rounding allows the carrier.
    """
    carriers, g = np.broadcast_arrays(np.asarray(carrier, np.float32), np.asarray(gradient, np.float64))
    c = carriers.astype(np.float64)
    if step is not None:
        scaled, sent = np.ldexp(g, -step), np.ldexp(c, -step)
        below = np.floor(scaled)
        down, up = (below - sent) / coefficient, (below + 1.0 - sent) / coefficient
        share = scaled - below
        return (1.0 - share) * (down == np.rint(down)) + share * (up == np.rint(up))
    infinity = np.float32(np.inf)
    less, more = np.nextafter(carriers, -infinity), np.nextafter(carriers, infinity)
    ends = [(g - (c + other) / 2) / coefficient for other in (less.astype(np.float64), more.astype(np.float64))]
    exists = np.zeros(c.shape, dtype=bool)
    first, last = np.zeros(c.shape, np.float32), np.zeros(c.shape, np.float32)

    def gives(noise: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Returns whether the noise gives the carrier."""
        return (g - coefficient * noise.astype(np.float64)).astype(np.float32) == carriers

    # The ends may be rounded, so their neighbours are tested too.
    nearest = np.minimum(*ends).astype(np.float32)
    for noise in (np.nextafter(nearest, infinity), nearest, np.nextafter(nearest, -infinity)):
        fits = gives(noise)
        first = np.where(fits, noise, first)  # the smallest noise that gives the carrier
        exists |= fits
    nearest = np.maximum(*ends).astype(np.float32)
    for noise in (np.nextafter(nearest, -infinity), nearest, np.nextafter(nearest, infinity)):
        fits = gives(noise)
        last = np.where(fits, noise, last)  # the largest noise that gives the carrier
        exists |= fits
    units = (np.spacing(np.abs(first)).astype(np.float64) + np.spacing(np.abs(last))) / 2
    mass = last.astype(np.float64) - first + units
    return np.where(exists, mass / np.spacing(np.abs(carriers)), 0.0)


def reachable(
    carrier: ArrayLike, gradient: ArrayLike, coefficient: float, *, step: int | None = None
) -> NDArray[np.bool_]:
    """Returns whether some noise gives exactly this carrier, for every coordinate. For arguments see `noise_mass`.

    The result does not depend on the sign of the coefficient.
    """
    return noise_mass(carrier, gradient, coefficient, step=step) > 0


def row_reachable(noisy_row: ArrayLike, row: ArrayLike) -> NDArray[np.bool_]:
    """Returns whether some float32 noise n gives fl32(row + n) = noisy_row, for every coordinate; `(..., d)` both."""
    return reachable(noisy_row, row, -1.0)


def public_step(share: ArrayLike) -> int | None:
    """Returns e of the largest 2^e that divides all values of a share, if all are less than 2^24 times as large.

    Float32 numbers that were rounded after noise was added have no such step, unless there are fewer than about ten of
    them: the last bits of the smallest values are far below those of the largest. A share of zeros has no step either.

    Returns:
        e, or None.
    """
    mantissas, exponents = np.frexp(np.asarray(share, np.float64).ravel())
    if not mantissas.any():
        return None
    integers = np.ldexp(mantissas, 53).astype(np.int64)[mantissas != 0]
    trailing = np.frexp((integers & -integers).astype(np.float64))[1] - 1
    lowest = int((exponents[mantissas != 0] - 53 + trailing).min())
    highest = int(exponents[mantissas != 0].max())  # all are below 2^highest
    return lowest if highest - lowest <= 25 and float(np.abs(share).max()) * 2.0**-lowest < EXACT else None


def recover_coefficient(carrier: ArrayLike, gradient: ArrayLike, *, span: tuple[float, float] = SPAN) -> float | None:
    """Computes |α| of a carrier fl32(g - α n) whose gradient is known. The sign of α has no meaning.

    In units of the carrier's last bit, α N = X + e with X = |g - c|, an unknown integer N, and |e| ≤ 1/2. So X / α is
    nearer to integers than it would be by chance, and Σ exp(2πi X / α) has a peak of height M sin(π/α) / (π/α) over M
    coordinates. One Fourier transform computes the sum for 10^7 values of 1/α. The highest peaks are then tested
    exactly, one coordinate after the other: each coordinate allows intervals of α. Their intersection is 10^-10 wide
    around the true α, and nearly always empty elsewhere. The function finds α ≥ 1.03 with 12,288 coordinates, and
    α > 1.06 with 2,000. It takes about a second, and a few seconds if there is no α.

    Args:
        carrier, gradient: of the same shape. All coordinates must be right to about 10^-10 of the noise.
        span: the range of |α| that is searched.
    Returns:
        |α| to about 10^-11, or None if no α, or more than one, explains nearly all coordinates. Also None for a share
        on a public lattice, for which α is 1.
    Raises:
        ValueError: a span outside [1, 2).
    """
    low, high = span
    if not 1 <= low < high < 2:
        raise ValueError(f"span = {span}: the function searches |α| in [1, 2) only.")
    sent, known = np.asarray(carrier, np.float64).ravel(), np.asarray(gradient, np.float64).ravel()
    if public_step(sent) is not None:
        return None
    scaled = _informative(sent, known, high)[:STRONGEST]  # (M,)
    size = max(len(scaled), 1)
    low = max(low, 1.0 + SURE / size, 1.0 + VISIBLE / np.sqrt(size))
    if low >= high:
        return None
    least, most = _peaks(scaled, low, high)
    for count in CANDIDATES:
        lower, upper = _intersect(scaled, least[:count], most[:count])
        fitting = [
            alpha
            for alpha in _centres(scaled, lower, upper)
            if reachable(sent, known, alpha).mean() >= NEARLY_ALL and len(scaled) * np.log(alpha) >= SURE / 2
        ]
        if fitting:
            return fitting[0] if len(fitting) == 1 else None
    return None


def _informative(carrier: Scores, gradient: Scores, high: float) -> Scores:
    """Returns |g - c|, in units of the last bit of c, of the coordinates where it is in [2^23 high, 2^24).

    For these coordinates, n has as many digits before the point as c for every α below `high`, so the gaps of α n are
    wider than the unit of c.
    """
    distance = np.abs(gradient - carrier)
    mantissas, exponents = np.frexp(distance)
    others, same = np.frexp(np.abs(carrier))
    loud = np.abs(carrier) >= np.sqrt(np.mean(carrier**2)) / 16  # units of small carriers are as small as errors of g
    chosen = loud & (exponents == same) & (mantissas >= high / 2) & (others > 0.5)
    return np.ldexp(mantissas[chosen], 24)


def _peaks(scaled: Scores, low: float, high: float) -> tuple[Scores, Scores]:
    """Returns intervals of α around the highest peaks of |Σ exp(2πi X / α)|, in descending order: both ends."""
    middle, half = (1 / low + 1 / high) / 2, (1 / low - 1 / high) / 2
    stride = max(1, int(0.2 / half))  # 1/α lies in a narrow band, so X may be rounded to multiples of the stride
    origin = scaled.min()
    bins = np.rint((scaled - origin) / stride).astype(np.int64)
    size = 1 << int(2 * (bins.max() + 1) - 1).bit_length()
    turns = np.exp(2j * np.pi * np.mod(middle * scaled, 1.0))
    line = np.zeros(size, dtype=np.complex64)
    np.add.at(line, bins, turns.astype(np.complex64))
    spectrum: NDArray[np.complex64] = np.asarray(fft.ifft(line, norm="forward", overwrite_x=True))
    reach = min(int(half * size * stride), size // 2 - 1)
    band = np.concatenate([spectrum[-reach:], spectrum[: reach + 1]])
    power = band.real**2 + band.imag**2
    count = min(CANDIDATES[-1], len(power))
    top = np.argpartition(power, -count)[-count:]
    top = top[np.argsort(-power[top])]
    inverse, width = middle + (top - reach) / (size * stride), 0.505 / (size * stride)
    return 1 / (inverse + width), 1 / (inverse - width)


def _intersect(scaled: Scores, lower: Scores, upper: Scores) -> tuple[Scores, Scores]:
    """Intersects intervals of α with those that every coordinate allows."""
    margin = 0.5 + TOLERANCE
    for value in scaled:
        if not len(lower):
            break
        least, most = np.ceil((value - margin) / upper), np.floor((value + margin) / lower)
        parts: list[tuple[Scores, Scores]] = []
        for more in range(2):  # an interval is so narrow that it contains two integers at most
            possible = least + more <= most
            integer = least[possible] + more
            parts.append(
                (
                    np.maximum(lower[possible], (value - margin) / integer),
                    np.minimum(upper[possible], (value + margin) / integer),
                )
            )
        lower, upper = (np.concatenate(ends) for ends in zip(*parts, strict=True))
    return lower, upper


def _centres(scaled: Scores, lower: Scores, upper: Scores) -> list[float]:
    """Returns the middle of the values of α that most coordinates allow, for each group of adjacent intervals."""
    centres: list[float] = []
    order = np.argsort(lower)
    for group in np.split(order, np.flatnonzero(np.diff(lower[order]) > 1e-8) + 1) if len(order) else []:
        integers = np.rint(scaled / ((lower[group].min() + upper[group].max()) / 2))
        ends = np.concatenate([(scaled - 0.5) / integers, (scaled + 0.5) / integers])
        steps = np.repeat([1, -1], len(scaled))[np.argsort(ends)]
        best = int(np.cumsum(steps).argmax())
        ends.sort()
        centres.append(float(ends[best] + ends[best + 1]) / 2)
    return centres


def label_scores(
    carrier: ArrayLike,
    hypotheses: ArrayLike,
    *,
    known: Labels | None = None,
    coefficient: float | None = None,
    sigma: float | None = None,
) -> Scores:
    """Computes the log-likelihood `(B, K)` of each label, up to a constant; zeros if α can't be computed.

    Args:
        carrier: `(B, d)`.
        hypotheses: `(B, K, d)`, the gradient that each example would have under each label.
        known: `(B,)` labels, -1 where unknown. The coefficient is computed from them if it isn't given; on a public
            lattice it is 1.
        coefficient: α, of either sign.
        sigma: standard deviation of the noise. If given, the density of the noise contributes to the likelihood, as a
            guarantee assumes.
    """
    sent, gradients = np.asarray(carrier, np.float32), np.asarray(hypotheses, np.float64)
    step = public_step(sent)
    if coefficient is None and step is not None:
        coefficient = 1.0
    elif coefficient is None and known is not None and bool((known >= 0).any()):
        rows = np.flatnonzero(known >= 0)
        coefficient = recover_coefficient(sent[rows], gradients[rows, known[rows]])
    if coefficient is None:
        return np.zeros(gradients.shape[:2])
    mass = noise_mass(sent[:, None], gradients, coefficient, step=step)
    scores = np.log(np.maximum(mass, FLOOR)).sum(-1)
    if sigma is not None:
        noise = (gradients - sent[:, None].astype(np.float64)) / coefficient
        scores -= (noise**2).sum(-1) / (2 * sigma**2)
    return scores


def row_scores(noisy: ArrayLike, candidates: ArrayLike, *, sigma: float | None = None) -> Scores:
    """Computes the log-likelihood `(N, K)` of candidates `(N, K, d)` for rows `(N, d)` under float32 noise."""
    return label_scores(noisy, candidates, coefficient=-1.0, sigma=sigma)


def blind_signs(carrier: ArrayLike, coefficient: float, norm: float) -> Scores:
    """Separates two classes of examples, from α alone, if every gradient is ±u with one unknown u.

    Gradients have this form for two classes and a linear head if all of them are clipped to one norm. For each
    coordinate u_i and each example, the likelihood of u_i is periodic, with α times the unit of the noise as period.
    The function weighs values of u_i by how well they explain all examples with either sign. Under each value, two
    examples agree or disagree in sign. The leading eigenvector of the agreements `(B, B)`, summed over all values and
    coordinates, separates the classes. No label is needed if α, B and d exceed a threshold: with B = 64, d = 384, and
    noise of 2,000 times the norm it is about α = 1.09; at 100 times the norm, about 1.15.

    Args:
        carrier: `(B, d)`.
        norm: |u|.
    Returns:
        `(B,)`: the sign is the class, up to a swap of the two; zeros if the carrier doesn't separate examples.
    """
    c, alpha = np.asarray(carrier, np.float64), abs(coefficient)
    spread = norm / np.sqrt(c.shape[1])
    farthest = 4 * spread
    exponent = int(np.floor(np.log2(np.sqrt(np.mean(c**2))))) - 25  # the resolution of smaller carriers isn't needed
    while farthest / (alpha * 2.0**exponent / PHASES) > MOST_CELLS:
        exponent += 1
    cell = alpha * 2.0**exponent / PHASES
    agreement = np.zeros((len(c), len(c)))
    for column in c.T:
        periods = _periods(column, alpha, farthest, exponent)
        block = PHASES << max((octave for octave, _, _ in periods), default=0)
        count = int(np.ceil(farthest / cell / block)) * block
        values = -((np.arange(count) * (cell / spread)) ** 2) / 2  # log-likelihood of |u_i|, u_i normal
        for octave, _, likelihood in periods:
            either = np.log((likelihood + likelihood[:, ::-1]) / 2).sum(0)
            values.reshape(-1, PHASES, 1 << octave)[...] += either[:, None]
        top = np.argpartition(values, -CELLS)[-CELLS:] if count > CELLS else np.arange(count)
        weights = np.exp(values[top] - values.max()) / np.exp(values - values.max()).sum()
        lean = np.zeros((len(top), len(c)))
        for octave, rows, likelihood in periods:
            plus, minus = likelihood[:, (top >> octave) % PHASES], likelihood[:, PHASES - 1 - (top >> octave) % PHASES]
            lean[:, rows] = ((plus - minus) / (plus + minus)).T
        agreement += (lean * weights[:, None]).T @ lean
    np.fill_diagonal(agreement, 0.0)
    if not agreement.any():
        return np.zeros(len(c))
    return np.linalg.eigh(agreement)[1][:, -1]


def _periods(
    column: Scores, alpha: float, farthest: float, exponent: int
) -> list[tuple[int, NDArray[np.int64], Scores]]:
    """Computes one period of each example's likelihood of u_i ≥ 0 under +u, grouped by the length of the period.

    The likelihood under -u is the same in reverse order.

    Args:
        column: `(B,)`, one coordinate of the carrier.
        farthest: largest |u_i|. Examples for which the unit of the noise depends on u_i are left out.
        exponent: exponent of the smallest unit of noise that is used.
    Returns:
        For each unit 2^(exponent + octave): (octave, examples `(b,)`, likelihood `(b, PHASES)`).
    """
    mantissas, exponents = np.frexp(np.abs(column))
    mantissas, exponents = mantissas * 2, exponents - 1
    same = mantissas >= alpha  # c and n have as many digits before the point; otherwise n has one digit less
    units = np.where(same, exponents - 23, exponents - 24)
    reach = np.where(same, 0.5, 1.0) / alpha  # half of c's unit, in units of n, divided by α
    moves = 2 * farthest / np.ldexp(1.0, exponents)
    steady = (mantissas - moves > 1) & (mantissas + moves < 2) & (np.abs(mantissas - alpha) > 2 * moves)
    points = (np.arange(PHASES * FINER) + 0.5) / (PHASES * FINER)
    periods: list[tuple[int, NDArray[np.int64], Scores]] = []
    for unit in np.unique(units[steady & (units >= exponent)]):
        rows = np.flatnonzero(steady & (units == unit))
        shift = points - np.mod(np.ldexp(column[rows], -unit) / alpha, 1.0)[:, None]
        half = reach[rows][:, None]
        integers = np.floor(shift + half) - np.ceil(shift - half) + 1  # number of noise values that give the carrier
        likelihood = integers.reshape(len(rows), PHASES, FINER).mean(2) / (2 * half)
        periods.append((int(unit) - exponent, rows, np.maximum(likelihood, UNLIKELY)))
    return periods


@observes_shares(DECLARATION.name, observes=DECLARATION.observes, needs=DECLARATION.needs, knows=DECLARATION.knows)
def without_hypotheses(shares: Features) -> dict[ChannelId, NDArray[np.floating]]:
    """Returns no channel: low-order bits reveal labels only with hypothesised gradients. See `audit_shares`."""
    return {}


def unknown_label_scores(share: ArrayLike, hypotheses: ArrayLike, labels: Labels) -> Scores:
    """Computes `label_scores` `(B, K)` of each example, with α from the labels of other examples.

    The examples are divided into four folds; α of a fold is computed from the labels of the three others.

    Args:
        share: `(B, d)`, one share as an operator received it.
        hypotheses: `(B, K, d)`, as for `label_scores`.
        labels: `(B,)` of 0 ... K - 1.
    """
    sent, gradients = np.asarray(share), np.asarray(hypotheses)
    scores = np.zeros(gradients.shape[:2])
    folds = np.arange(len(labels)) % FOLDS
    for fold in range(min(FOLDS, len(labels))):
        unknown = folds == fold
        known = np.where(unknown, -1, labels)
        scores[unknown] = label_scores(sent, gradients, known=known)[unknown]
    return scores


def audit_shares(shares: Features, hypotheses: ArrayLike, labels: Labels) -> list[float]:
    """Computes the AUC of each share if all other labels are known: one class against the rest, averaged.

    Args:
        shares: `(m, n, B, d)`, any shares of a gradient.
        hypotheses: `(B, K, n, d)`, the gradient that each example would have under each label, with the clipping of the
            client.
        labels: `(B,)` of 0 ... K - 1.
    Raises:
        ValueError: all examples have one label.
    """
    gradients = np.asarray(hypotheses)
    gradients = gradients.reshape(*gradients.shape[:2], -1)
    values: list[float] = []
    for share in shares:
        scores = unknown_label_scores(np.moveaxis(share, 0, 1).reshape(share.shape[1], -1), gradients, labels)
        margins = [scores[:, k] - np.delete(scores, k, axis=1).max(1) for k in range(scores.shape[1])]
        present = [k for k in range(len(margins)) if int((labels == k).sum()) > 0]
        values.append(float(np.mean([auc(margins[k], labels == k) for k in present])))
    return values


@dataclass(frozen=True)
class OnLattice:
    """Counts the gradients and adapters that an operator received, and those that are multiples of one public step.

    If noise was added to the others, they were rounded after that. An operator that can compute the gradient for each
    label can read labels from these, however large the noise is.
    """

    operator: str
    gradients: int
    of_gradients: int
    adapters: int
    of_adapters: int

    def __str__(self) -> str:
        return (
            f"{self.operator}: {self.gradients} of {self.of_gradients} gradients and {self.adapters} of "
            f"{self.of_adapters} adapters lie on a public lattice"
        )


def on_lattice(view: View, most_adapters: int = 8) -> OnLattice:
    """Returns the counts over all gradients of a view, and over the adapters of its last checkpoints."""
    shares = [share for group in view.gradients for share in group.shares]
    names = [name for checkpoint in view.moving[-most_adapters:] for name in checkpoint.adapters]
    adapters = [weights.numpy() for weights in view.load(names).values()]
    shares_on_lattice = sum(public_step(share) is not None for share in shares)
    adapters_on_lattice = sum(public_step(weights) is not None for weights in adapters)
    return OnLattice(view.operator, shares_on_lattice, len(shares), adapters_on_lattice, len(adapters))
