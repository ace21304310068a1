"""Which numbers were sent, and not how large they are: the low-order bits of a share tell its gradient (Mironov 2012).

Earlier versions sent the carrier c = fl32(g - α n), with float32 noise n and one secret coefficient α for a share,
1 ≤ |α| < 1.25. Float32 numbers are multiples of a unit that depends on their size only. Where α n has wider gaps than
the unit of c, a part 1 - 1/α of all float32 numbers can't be c, and which ones these are depends on g. However large
the noise is, a wrong gradient is contradicted by up to a fifth of the coordinates, the right one by none.

An operator that knows some gradients of the batch finds α with them (`recover_coefficient`) and then tests the
gradients that other labels would give (`label_scores`). Without any gradient it can still read labels if all gradients
are ± one vector (`blind_signs`). Rows of hidden states under float32 noise are read in the same way (`row_scores`).

Where gradient and noise are multiples of one public step and the coefficient is ±1, every multiple can be c under every
gradient, and all scores are equal. `public_step` recognizes such a share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft

from blindtune.audit.labels.registry import Declaration, observes_shares
from blindtune.audit.observe import Features, View
from blindtune.audit.statistics import Labels, Scores, auc

DECLARATION = Declaration("lattice", "any share", "all other labels", ("how shares are made",))
SPAN = (1.0, 1.25)
"""Of |α|, in versions that rounded after adding noise."""
EXACT = 2**24
"""Float32 holds every integer below this."""

FLOOR = 2.0**-10
"""Likelihood of a carrier that can't be reached. Hypotheses differ from the client's gradients by rounding errors."""
TOLERANCE = 2.0**-10
"""By how much a carrier may miss while α is searched for, in units of its last bit, for the same reason."""
CANDIDATES = (2**10, 2**18)
"""Highest peaks of the periodogram that are looked at: first few of them, and more if none of these is α."""
STRONGEST = 8192
"""Coordinates for the search. More cost time and find no more: α that they leave open differ by 10^-10."""
SURE = 40.0
"""Nats of evidence for α that are asked for. Among all α, 10^10 can be told apart: 23 nats."""
VISIBLE = 1.5
"""Height of the peak of α, in standard deviations of the periodogram, below which it isn't among the highest."""
NEARLY_ALL = 0.995
FOLDS = 4

PHASES, FINER = 16, 8
"""Cells of one period of the likelihood, and points in each of them over which it is averaged."""
UNLIKELY = 0.02
"""Least likelihood in such a cell."""
CELLS, MOST_CELLS = 1024, 2**22
"""Values of a coordinate that are taken as possible, of so many that are looked at."""


def noise_mass(carrier: ArrayLike, gradient: ArrayLike, coefficient: float, *, step: int | None = None) -> Scores:
    """How much noise gives exactly this carrier, for every coordinate; zero if none does.

    Noise that is rounded to float32 takes a value with a probability proportional to the value's unit in the last
    place, times a density that hardly changes between neighbours. So this is the likelihood of the gradient but for
    the density: the sum of these units over all n with fl32(gradient - coefficient · n) = carrier, divided by the
    carrier's own unit.

    Args:
        carrier: `(..., d)`, float32 numbers.
        gradient: `(..., d)`, broadcast against it.
        step: exponent e of a public lattice. Then noise is an integer number of steps 2^e, the gradient is rounded
            up or down to one at random, without bias, and the result is the probability that this rounding allows
            the carrier.
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
    found = np.zeros(c.shape, dtype=bool)
    first, last = np.zeros(c.shape, np.float32), np.zeros(c.shape, np.float32)
    for end, extreme, order in (
        (np.minimum(*ends), first, (infinity, None, -infinity)),
        (np.maximum(*ends), last, (-infinity, None, infinity)),
    ):  # the end may be rounded, so the first and the last noise are looked for beside it
        nearest = end.astype(np.float32)
        for direction in order:
            noise = nearest if direction is None else np.nextafter(nearest, direction)
            gives = (g - coefficient * noise.astype(np.float64)).astype(np.float32) == carriers
            extreme[gives] = noise[gives]
            found |= gives
    units = (np.spacing(np.abs(first)).astype(np.float64) + np.spacing(np.abs(last))) / 2
    mass = last.astype(np.float64) - first + units
    return np.where(found, mass / np.spacing(np.abs(carriers)), 0.0)


def reachable(
    carrier: ArrayLike, gradient: ArrayLike, coefficient: float, *, step: int | None = None
) -> NDArray[np.bool_]:
    """For every coordinate, whether some noise gives exactly this carrier; arguments as for `noise_mass`.

    The sign of the coefficient makes no difference.
    """
    return noise_mass(carrier, gradient, coefficient, step=step) > 0


def row_reachable(noisy_row: ArrayLike, row: ArrayLike) -> NDArray[np.bool_]:
    """For every coordinate, whether float32 noise n gives fl32(row + n) = noisy_row; `(..., d)` both."""
    return reachable(noisy_row, row, -1.0)


def public_step(share: ArrayLike) -> int | None:
    """e of the largest 2^e of which all values of a share are multiples, if it is 2^24 steps from zero to none of them.

    Float32 numbers that were rounded after noise was added have no such step, but for fewer than about ten values:
    the smallest of them have last bits far below those of the largest. None also for a share of zeros.
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
    """|α| of a carrier fl32(g - α n) whose gradient is known; its sign is that of the noise and means nothing.

    In units of the carrier's last bit, α N = X + e with X = |g - c|, an unknown integer N, and |e| ≤ 1/2. So X / α is
    nearer to integers than chance would have it, and Σ exp(2πi X / α) has a peak of height M sin(π/α) / (π/α) over M
    coordinates: one Fourier transform finds it among 10^7 values of 1/α. Its highest peaks are then tested exactly,
    one coordinate after the other: each allows intervals of α, whose intersection is nearly always empty, and 10^-10
    wide around the true α. With 12,288 coordinates α of 1.03 and more are found, with 2,000 those above 1.06. It takes
    about a second, and a few seconds where no α is found.

    Args:
        carrier, gradient: of the same shape. All coordinates must be right to about 10^-10 of the noise.
        span: where |α| is looked for.
    Returns:
        |α| to about 10^-11, or None if no α, or more than one, reaches nearly all coordinates. None too for a share on
        a public lattice, where α is 1.
    Raises:
        ValueError: a span outside [1, 2).
    """
    low, high = span
    if not 1 <= low < high < 2:
        raise ValueError(f"span = {span}: |α| is looked for between 1 and 2.")
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
        found = [
            alpha
            for alpha in _centres(scaled, lower, upper)
            if reachable(sent, known, alpha).mean() >= NEARLY_ALL and len(scaled) * np.log(alpha) >= SURE / 2
        ]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _informative(carrier: Scores, gradient: Scores, high: float) -> Scores:
    """|g - c| in units of c's last bit, for the coordinates where α n has wider gaps than that: in [2^23 high, 2^24).

    That is where n has as many digits before the point as c for every α below `high`.
    """
    distance = np.abs(gradient - carrier)
    mantissas, exponents = np.frexp(distance)
    others, same = np.frexp(np.abs(carrier))
    loud = np.abs(carrier) >= np.sqrt(np.mean(carrier**2)) / 16  # small ones have units as small as errors of g
    chosen = loud & (exponents == same) & (mantissas >= high / 2) & (others > 0.5)
    return np.ldexp(mantissas[chosen], 24)


def _peaks(scaled: Scores, low: float, high: float) -> tuple[Scores, Scores]:
    """Intervals of α around the highest peaks of |Σ exp(2πi X / α)|, the highest first: lower ends, upper ends."""
    middle, half = (1 / low + 1 / high) / 2, (1 / low - 1 / high) / 2
    stride = max(1, int(0.2 / half))  # 1/α lies in a narrow band, so X may be rounded to multiples of this
    origin = scaled.min()
    places = np.rint((scaled - origin) / stride).astype(np.int64)
    size = 1 << int(2 * (places.max() + 1) - 1).bit_length()
    turns = np.exp(2j * np.pi * np.mod(middle * scaled, 1.0))
    line = np.zeros(size, dtype=np.complex64)
    np.add.at(line, places, turns.astype(np.complex64))
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
    """What is left of intervals of α when every coordinate has said which α it allows."""
    margin = 0.5 + TOLERANCE
    for value in scaled:
        if not len(lower):
            break
        least, most = np.ceil((value - margin) / upper), np.floor((value + margin) / lower)
        parts: list[tuple[Scores, Scores]] = []
        for more in range(2):  # an interval is so narrow that there are two integers in it at most
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
    """For each group of intervals that are left, the middle of the α there that most coordinates allow."""
    found: list[float] = []
    order = np.argsort(lower)
    for group in np.split(order, np.flatnonzero(np.diff(lower[order]) > 1e-8) + 1) if len(order) else []:
        integers = np.rint(scaled / ((lower[group].min() + upper[group].max()) / 2))
        ends = np.concatenate([(scaled - 0.5) / integers, (scaled + 0.5) / integers])
        steps = np.repeat([1, -1], len(scaled))[np.argsort(ends)]
        best = int(np.cumsum(steps).argmax())
        ends.sort()
        found.append(float(ends[best] + ends[best + 1]) / 2)
    return found


def label_scores(
    carrier: ArrayLike,
    hypotheses: ArrayLike,
    *,
    known: Labels | None = None,
    coefficient: float | None = None,
    sigma: float | None = None,
) -> Scores:
    """Log-likelihood of each label of each example, up to a constant: `(B, K)`, zeros if α isn't found.

    Args:
        carrier: `(B, d)`.
        hypotheses: `(B, K, d)`, the gradient that each example would have under each label.
        known: `(B,)` labels, -1 where unknown. They serve to find the coefficient if it isn't given; on a public
            lattice it is 1.
        coefficient: α, of either sign.
        sigma: standard deviation of the noise, to add what its density tells: the part that a guarantee allows for.
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
    """Log-likelihood `(N, K)` of each candidate `(N, K, d)` for rows `(N, d)` to which float32 noise was added."""
    return label_scores(noisy, candidates, coefficient=-1.0, sigma=sigma)


def blind_signs(carrier: ArrayLike, coefficient: float, norm: float) -> Scores:
    """Which of two classes each example has, from nothing but α, if every gradient is ±u with one unknown u.

    That is so for two classes and a linear head whose gradients are all clipped to one norm. For each coordinate u_i
    and each example, the likelihood of u_i is periodic, with α times the noise's unit as period. Values of u_i are
    weighed by how well they explain all examples with either sign. Under each of them, examples agree or disagree in
    sign; summed over all values and coordinates, the leading eigenvector of the agreements `(B, B)` tells the classes.
    It needs no label: a threshold is crossed where α, B and d are large enough. With B = 64, d = 384, and noise of
    2,000 times the norm this is at about α = 1.09; at 100 times the norm, at about 1.15.

    Args:
        carrier: `(B, d)`.
        norm: of u.
    Returns:
        `(B,)`: the sign is the class, up to a swap of the two; zeros where nothing tells examples apart.
    """
    c, alpha = np.asarray(carrier, np.float64), abs(coefficient)
    spread = norm / np.sqrt(c.shape[1])
    farthest = 4 * spread
    exponent = int(np.floor(np.log2(np.sqrt(np.mean(c**2))))) - 25  # smaller carriers tell u_i finer than is needed
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
    """One period of each example's likelihood of a coordinate u_i ≥ 0 of +u, grouped by the length of the period.

    A cell from the end mirrors a cell from the start: it is the likelihood under -u.

    Args:
        column: `(B,)`, one coordinate of the carrier.
        farthest: largest |u_i|. Examples for which the noise's unit depends on u_i are left out.
        exponent: of the smallest unit of noise that is wanted.
    Returns:
        For each unit 2^(exponent + octave): (octave, examples `(b,)`, likelihood `(b, PHASES)`).
    """
    mantissas, exponents = np.frexp(np.abs(column))
    mantissas, exponents = mantissas * 2, exponents - 1
    same = mantissas >= alpha  # c and n have as many digits before the point; otherwise n has one less
    units = np.where(same, exponents - 23, exponents - 24)
    reach = np.where(same, 0.5, 1.0) / alpha  # half of c's unit, in units of n, divided by α
    moves = 2 * farthest / np.ldexp(1.0, exponents)
    steady = (mantissas - moves > 1) & (mantissas + moves < 2) & (np.abs(mantissas - alpha) > 2 * moves)
    points = (np.arange(PHASES * FINER) + 0.5) / (PHASES * FINER)
    found: list[tuple[int, NDArray[np.int64], Scores]] = []
    for unit in np.unique(units[steady & (units >= exponent)]):
        rows = np.flatnonzero(steady & (units == unit))
        shift = points - np.mod(np.ldexp(column[rows], -unit) / alpha, 1.0)[:, None]
        half = reach[rows][:, None]
        integers = np.floor(shift + half) - np.ceil(shift - half) + 1  # how many noise values give the carrier
        likelihood = integers.reshape(len(rows), PHASES, FINER).mean(2) / (2 * half)
        found.append((int(unit) - exponent, rows, np.maximum(likelihood, UNLIKELY)))
    return found


@observes_shares(DECLARATION.name, observes=DECLARATION.observes, needs=DECLARATION.needs, knows=DECLARATION.knows)
def without_hypotheses(shares: Features) -> dict[str, NDArray[np.floating]]:
    """No channel: without hypothesised gradients, low-order bits of a share tell nothing. `audit_shares` takes them."""
    return {}


def unknown_label_scores(share: ArrayLike, hypotheses: ArrayLike, labels: Labels) -> Scores:
    """`label_scores` `(B, K)` where each example's label is unknown and α is found with other examples.

    The examples are divided into four folds; α comes from the labels of the three others.

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
    """AUC of each share, all other labels known: one class against the rest, the mean over classes.

    Args:
        shares: `(m, n, B, d)`, any of a gradient's shares.
        hypotheses: `(B, K, n, d)`, the gradient that each example would have under each label, clipped as the client
            clips it.
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
    """How many of the gradients and adapters that an operator received are multiples of one public step each.

    Those that aren't were rounded after noise was added, if there was noise: then an operator that can compute
    gradients for each label reads labels from them, whatever the size of the noise.
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
    """Looks at all gradients of a view, and at its last adapters."""
    shares = [share for found in view.gradients for share in found.shares]
    names = [name for checkpoint in view.moving[-most_adapters:] for name in checkpoint.adapters]
    adapters = [weights.numpy() for weights in view.load(names).values()]
    found = [sum(public_step(values) is not None for values in kind) for kind in (shares, adapters)]
    return OnLattice(view.operator, found[0], len(shares), found[1], len(adapters))
