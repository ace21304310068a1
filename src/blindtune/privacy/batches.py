"""Statistical tests for batches that depend on labels. The client runs them before it sends a batch.

An operator sees the texts of every batch. Label privacy is proven for batches that don't depend on labels; class
weights in a sampler, oversampling, undersampling and stratified batches break that assumption. `BatchMonitor` tests for
both effects that they have:

**Rates.** Shuffling sends each text once before it sends any text twice. Let B be the largest batch. When a text is
sent for the c-th time (per copy in the set), at most (c - 1) B sends may be missing for all texts to have been sent
c - 1 times (a loader that drops the last batch leaves fewer than B per epoch). If this doesn't hold, the monitor tests
whether all classes were sent at the same rate. If a sampler doesn't use labels, labels are exchangeable among texts
with equally many copies, whatever the sampler (with replacement, a fixed subset, epochs that are cut short). So for
class k and any θ (Chernoff; Hoeffding 1963 for draws without replacement), where s_j is how often text j was sent, and
G_m are the texts with m copies, n_km of them in class k,

    P(Σ_{j in k} s_j ≥ x) ≤ exp(Σ_m n_km ln mean_{j in G_m} exp(θ s_j) - θ x),    and the same for ≤ x with θ < 0.

The test is repeated whenever the number of batches has grown by a fifth. Test i rejects a label-free run with a
probability of at most RATE_ALARM / (i (i + 1)), over all classes and both signs of θ, so all tests of a run together
with at most RATE_ALARM. Batches of texts of similar length have labels that are more alike than in random batches, so
the exponents are divided by the dispersion of batches around the overall rates. That alone would accept batches of one
class each. If all texts have equal chances to be in a batch, however alike the texts of one batch are, the mean share q
of a class in n batches is as far above (or below) its p with a probability of at most exp(-n KL(q, p)) (Hoeffding
1963). So a run is also rejected if both this exponent and the undivided one are too large.

**Stratified batches.** n_k of the B texts in a batch are of class k, which is a fraction p_k of the set. In stratified
batches, X = Σ_k (n_k - B p_k)² / (B p_k) is smaller than in random ones. Each batch, given the batches before it, is a
draw from the texts that its epoch has not sent yet (or from those that the epoch before sent; or with replacement from
the whole set or from the texts sent so far: the largest of these expectations counts). Then for any t

    W_t = Π_batches exp(-t X) / E exp(-t X)

is a supermartingale, and the probability that the mean of W_t over several t ever exceeds 1 / STRATA_ALARM during a run
is at most STRATA_ALARM (Ville's inequality). The expectation is exact, so the test also holds for small batches and
rare classes. A batch of exactly the texts of an earlier batch gives no new evidence and isn't counted. Batches whose
class counts vary more than at random are never rejected by this test.

Not detected: copies of texts in the set itself; the order of labels within an epoch (a file that is sorted by label); a
run that leaves out texts of a class and ends before it sends any text twice; fewer than B texts that are left out.
Rejected although possibly label-free: sampling by a property that nearly determines the label, if texts aren't sent
equally often or batches are stratified by it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Sequence
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln, rel_entr
from torch import Tensor

from blindtune.errors import CheckpointError, LabelDependentBatches

RATE_ALARM = 1e-6
"""Largest probability that a label-free run is rejected for the rates of its classes."""
STRATA_ALARM = 1e-9
"""Largest probability that a label-free run is rejected for stratified batches."""
MIN_BATCHES = 10
"""Number of batches before the first test of rates, which needs an estimate of their dispersion."""
REPETITIONS = 8
"""Number of consecutive repetitions of a batch that count as retries. Further ones count as new batches."""
QUANTILES = 4
"""Number of classes into which float labels are binned."""
GROUPS = 8
"""Number of groups of classes whose dispersion is measured. The most frequent classes have a group each; all others
share the last."""

_TILTS = np.array([0.25, 1.0, 4.0, 16.0])
"""Values of t."""
_THETAS = np.geomspace(1e-4, 8.0, 48)
"""Values of |θ|."""
_GROWTH = 1.2
_REMEDY = (
    "Shuffle independently of labels (torch's RandomSampler), or weigh classes in the loss, which stays on this "
    "machine."
)

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class BatchMonitor:
    """Rejects batches that depend on labels.

    A step costs O(batch). A test of rates costs O(set), and the tests become rarer as the run goes on.

    Args:
        texts: the N texts of the training set, or any hashable objects that identify them. Equal ones are copies of one
            text.
        labels: their N classes. Float labels with more than 4 values are binned into 4 classes by quantiles. All copies
            of a text have the class of the first.

    Attributes:
        batches: number of batches that were counted.
        strange: number of texts that were sent and aren't in the training set; their rates can't be tested.

    Raises:
        ValueError: there are no texts, another number of labels than texts, or labels that aren't finite.
    """

    def __init__(self, texts: Sequence[Hashable], labels: Sequence[int] | Sequence[float]) -> None:
        if not len(texts) or len(texts) != len(labels):
            raise ValueError(f"There are {len(texts)} texts and {len(labels)} labels.")
        self._classes = _Classes(labels)
        self._ids: dict[Hashable, int] = {}
        index = np.array([self._ids.setdefault(text, len(self._ids)) for text in texts], dtype=np.int64)
        _, first, copies = np.unique(index, return_index=True, return_counts=True)
        self._copies: Ints = copies.astype(np.int64)
        self._class = self._classes.of(labels)[first]
        sizes = np.bincount(self._class, weights=copies, minlength=len(self._classes.names)).astype(np.float64)
        self._share: Floats = sizes / sizes.sum()
        self._group = _groups(sizes)
        self._whole: Ints = np.bincount(self._group, weights=sizes).astype(np.int64)
        self._fingerprint: int | None = None

        self.batches = 0
        self.strange = 0
        self._sent: Ints = np.zeros(len(self._ids), dtype=np.int64)
        self._refused = 0
        self._largest = 0
        self._last = 0  # hash of the last batch
        self._repeated = 0  # consecutive repetitions of the last batch
        self._levels: Ints = np.array([len(texts), 0], dtype=np.int64)  # number of copies that were sent 0, 1, … times
        self._uneven = False
        self._tests = 0
        self._next_test = MIN_BATCHES
        self._epoch = 1
        self._epoch_of: Ints = np.zeros_like(self._sent)  # the epoch in which each text was last sent
        self._epoch_sent: Ints = np.zeros_like(self._sent)  # how often each text was sent in that epoch
        self._left = self._whole.copy()  # number of texts of each group that this epoch hasn't sent
        self._repeating = np.zeros_like(self._whole)  # of these, the ones that the epoch before sent
        self._batch_of: Ints = np.zeros_like(self._sent)  # hash of the last batch that each text was in
        self._unknown_batches: set[int] = set()  # hashes of batches without any text of the training set
        self._wealth: Floats = np.zeros(len(_TILTS))  # ln W_t
        # For each group: Σ n and Σ n²/B over all batches; Σ (n - B p)², its expectation and Σ n/B over batches whose
        # texts had not formed a batch before.
        self._sums: Floats = np.zeros((5, len(self._whole)))
        self._new = 0  # number of such batches
        self._expected: dict[int, Floats] = {}  # by size of batch, with replacement

    def observe(self, texts: Sequence[Hashable], labels: Sequence[int] | Sequence[float]) -> None:
        """Counts a batch before any part of it is sent. A batch that equals the last one counts as a retry of it.

        Args:
            texts: the B texts of the batch.
            labels: their B classes; only those of texts that aren't in the training set are used.

        Raises:
            LabelDependentBatches: this batch and the earlier ones depend on labels. Every later call raises it too.
            ValueError: there are another number of labels than texts.
        """
        if len(texts) != len(labels):
            raise ValueError(f"There are {len(texts)} texts and {len(labels)} labels.")
        if self._refused:
            self._refuse()
        if not len(texts):
            return
        index = np.array([self._ids.get(text, -1) for text in texts], dtype=np.int64)
        members = index[index >= 0]
        unknown = [i for i, j in enumerate(index.tolist()) if j < 0]
        batch = (_sum_of_hashes(members) + sum(_hash(texts[i]) for i in unknown)) % 2**62 + 1
        if batch != self._last:
            self._last, self._repeated = batch, 0
        elif self._repeated < REPETITIONS:
            self._repeated += 1
            return
        self.batches += 1
        self.strange += len(unknown)
        classes = self._class[members]
        if unknown:
            others = self._classes.of([labels[i] for i in unknown])
            classes = np.concatenate([classes, others[others >= 0]])
        counts = np.bincount(self._group[classes], minlength=len(self._whole)).astype(np.int64)
        self._disperse(batch, members, counts, bool(unknown))
        self._count(members, counts)
        self._test()
        if self._refused:
            self._refuse()

    def _count(self, members: Ints, counts: Ints) -> None:
        """Updates how often texts were sent, and `_uneven`: whether shuffling can't have sent them like that."""
        size = int(counts.sum())
        self._sums[0] += counts
        self._sums[1] += counts**2 / max(1, size)
        if not len(members):
            return
        self._largest = max(self._largest, len(members))
        ids, times = np.unique(members, return_counts=True)
        top = len(self._levels) - 2  # largest number of times that a copy was sent
        for _ in range(int(times.max())):
            ids, times = ids[times > 0], times[times > 0]
            levels, moved = np.unique(self._sent[ids] // self._copies[ids], return_counts=True)
            missing = int(levels[-1]) + 3 - len(self._levels)
            if missing > 0:
                self._levels = np.concatenate([self._levels, np.zeros(missing, dtype=np.int64)])
            self._levels[levels] -= moved
            self._levels[levels + 1] += moved
            self._sent[ids] += 1
            times = times - 1
        for c in range(top + 1, len(self._levels) - 1):
            missed = int(self._levels[: c - 1] @ np.arange(c - 1, 0, -1)) if c > 1 else 0
            self._uneven |= missed > (c - 1) * self._largest

    def _disperse(self, batch: int, members: Ints, counts: Ints, unknown: bool) -> None:
        """Updates the test for stratified batches."""
        ids, times = np.unique(members, return_counts=True)
        before = np.where(self._epoch_of[ids] == self._epoch, self._epoch_sent[ids], 0)
        if (before + times > self._copies[ids]).any():
            self._epoch += 1
            self._repeating = self._whole - self._left  # the texts that the epoch before has sent
            self._left = self._whole.copy()
            before = np.zeros_like(before)
        new = not (self._batch_of[ids] == batch).all() if len(ids) else batch not in self._unknown_batches
        size = int(counts.sum())
        if new and size and len(self._whole) > 1:
            total = int(self._whole.sum())
            means = size * self._whole / total
            log_e = self._largest_expectation(size, means, unknown)
            self._wealth += -_TILTS * float(((counts - means) ** 2 / means).sum()) - log_e
            self._sums[2] += (counts - means) ** 2
            self._sums[3] += means * (1 - means / size) * max(0, total - size) / max(1, total - 1)
            self._sums[4] += 0 if unknown else counts / size
            self._new += 1
            if np.logaddexp.reduce(self._wealth) - math.log(len(_TILTS)) > -math.log(STRATA_ALARM):
                self._refused = 2
        self._epoch_of[ids] = self._epoch
        self._epoch_sent[ids] = before + times
        sent = np.bincount(self._group[self._class[members]], minlength=len(self._whole))
        self._left = np.maximum(self._left - sent, 0)
        self._repeating = np.maximum(self._repeating - sent, 0)
        self._batch_of[ids] = batch
        if not len(ids):
            self._unknown_batches.add(batch)

    def _largest_expectation(self, size: int, means: Floats, unknown: bool) -> Floats:
        """Returns ln E exp(-t X) of the next batch for each t, under the label-free sampler for which it is largest."""
        if size not in self._expected:
            self._expected[size] = _expectation(size, means, means)
        log_e = self._expected[size]
        if self._uneven or unknown:
            sent = self._sums[0] / max(1.0, self._sums[0].sum())
            log_e = np.maximum(log_e, _expectation(size, means, size * sent)) if sent.any() else log_e
        pools = [self._left] if (self._left == self._repeating).all() else [self._left, self._repeating]
        for left in () if unknown else pools:
            if size <= left.sum():
                log_e = np.maximum(log_e, _expectation(size, means, size * left / left.sum(), left))
        return log_e

    def _test(self) -> None:
        """Tests whether all classes were sent at the same rate, if that is due and texts weren't sent equally often."""
        if not self._uneven or self.batches < self._next_test or len(self._share) < 2:
            return
        self._next_test = max(self.batches + 1, math.ceil(self.batches * _GROWTH))
        self._tests += 1
        exponents = self._exponents()
        exponent = max(exponents.max() / self._dispersion(), np.minimum(exponents, self._batch_exponents()).max())
        bound = math.log(2 * len(self._share) * self._tests * (self._tests + 1) / RATE_ALARM)
        if exponent > bound:
            self._refused = 1

    def _exponents(self) -> Floats:
        """Returns -ln of the bound on the probability of each class's number of sends."""
        classes = len(self._share)
        thetas = np.concatenate([_THETAS, -_THETAS])
        logs = np.zeros((classes, len(thetas)))
        for m in np.unique(self._copies):
            stratum = self._copies == m
            values, counts = np.unique(self._sent[stratum], return_counts=True)
            terms = thetas[:, None] * values + np.log(counts / counts.sum())
            logs += np.bincount(self._class[stratum], minlength=classes)[:, None] * np.logaddexp.reduce(terms, axis=1)
        sent = np.bincount(self._class, weights=self._sent, minlength=classes)
        return (sent[:, None] * thetas - logs).max(axis=1)

    def _batch_exponents(self) -> Floats:
        """Returns -ln of Hoeffding's bound on the probability of the mean share of each class's group in batches."""
        batches = self._sums[4].sum()
        q, p = self._sums[4] / max(1.0, batches), self._whole / self._whole.sum()
        divergence = rel_entr(q, p) + rel_entr(np.maximum(0, 1 - q), 1 - p)
        return (batches * divergence)[self._group]

    def _dispersion(self) -> float:
        """Returns the variance of groups' counts in batches, relative to random batches; at least 1."""
        # The texts of a group that was sent rarely may all come in whole batches: one such batch is added.
        n, squares = self._sums[:2] + np.where(self._sums[0] < self._largest, self._largest, 0)
        excess = float((squares * n.sum() / n - n).sum())
        return max(1.0, excess / ((len(n) - 1) * (self.batches - 1)))

    def _refuse(self) -> NoReturn:
        """Raises `LabelDependentBatches` for the test that rejected the run."""
        if self._refused == 2:
            squares, expected = self._sums[2:4]
            k = int(self._whole.argmax())
            name = self._classes.names[int(np.flatnonzero(self._group == k)[0])]
            raise LabelDependentBatches(
                f"{name} deviates by {math.sqrt(squares[k] / self._new):.1f} texts from its share in {self._new} "
                f"batches; random batches deviate by {math.sqrt(expected[k] / self._new):.1f}. The batches seem to be "
                "stratified by label.",
                remedy=_REMEDY,
            )
        k = int(self._exponents().argmax())
        sent = np.bincount(self._class, weights=self._sent)[k] / self._sent.sum()
        share, sent = _percentages(float(self._share[k]), float(sent))
        raise LabelDependentBatches(
            f"{self._classes.names[k]} is {share} of the training set and {sent} of what was sent in {self.batches} "
            "batches.",
            remedy=_REMEDY,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Returns all counts, for a resumed run. They reveal labels: keep them on this machine."""
        numbers = [
            self._identity(), self.batches, self.strange, self._refused, self._largest, self._last, self._repeated,
            int(self._uneven), self._tests, self._next_test, self._epoch, self._new,
        ]  # fmt: skip
        arrays = {
            "numbers": np.array(numbers, dtype=np.int64),
            "unknown_batches": np.array(sorted(self._unknown_batches), dtype=np.int64),
        }
        return {
            name: torch.from_numpy(array.copy())
            for name, array in {**arrays, **{name: getattr(self, f"_{name}") for name in _ARRAYS}}.items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the counts of another monitor of the same training set.

        Raises:
            CheckpointError: the state is incomplete or belongs to another training set.
        """
        try:
            numbers = [int(number) for number in state["numbers"].tolist()]
            arrays = {name: np.array(state[name].cpu().numpy()) for name in _ARRAYS}
            unknown: set[int] = set(state["unknown_batches"].tolist())
            identity, *rest = numbers
            names = (
                "batches", "strange", "_refused", "_largest", "_last", "_repeated", "_uneven", "_tests", "_next_test",
                "_epoch", "_new",
            )  # fmt: skip
            values = dict(zip(names, rest, strict=True))
        except (KeyError, ValueError):
            raise CheckpointError("The record of batches is incomplete.", remedy="Use another checkpoint.") from None
        if identity != self._identity():
            raise CheckpointError(
                "The record of batches belongs to another training set.",
                remedy="Resume with the same texts and labels, in the same order, as at the start of the run.",
            )
        for name, value in values.items():
            setattr(self, name, value)
        self._uneven = bool(self._uneven)
        for name, array in arrays.items():
            setattr(self, f"_{name}", array)
        self._unknown_batches = unknown

    def _identity(self) -> int:
        """Returns 63 bits of a hash of the training set's texts, their classes and their order."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(self._copies.tobytes() + self._class.tobytes(), digest_size=8)
            for text in self._ids:
                digest.update(repr(text).encode("utf-8", "surrogatepass") + b"\0")
            self._fingerprint = int.from_bytes(digest.digest()) >> 1
        return self._fingerprint


_ARRAYS = ("sent", "levels", "epoch_of", "epoch_sent", "left", "repeating", "batch_of", "wealth", "sums")
"""Attributes in `state_dict`, without their leading underscore."""


class _Classes:
    """Maps labels to classes 0, 1, …: one class for each value, or for each quantile of float labels."""

    def __init__(self, labels: Sequence[int] | Sequence[float]) -> None:
        array = np.asarray(labels)
        if not np.isfinite(array).all():
            raise ValueError("There are labels that aren't finite.")
        self.values = np.unique(array)
        self.binned = array.dtype.kind == "f" and len(self.values) > QUANTILES
        if self.binned:
            inner = np.quantile(array, np.arange(1, QUANTILES) / QUANTILES)
            # A bin holds the labels above its lower edge up to its upper one. Empty bins are left out.
            upper = np.append(np.unique(inner), np.inf)
            self.values = upper[np.unique(np.searchsorted(upper, array))]
            bounds = [f"{value:.4g}" for value in self.values[:-1]]
            lower = [f"above {bound}" for bound in bounds]
            self.names = [f"Labels up to {bounds[0]}"] if bounds else ["Any label"]
            self.names += [f"Labels {a} up to {b}" for a, b in zip(lower, bounds[1:], strict=False)]
            self.names += [f"Labels {lower[-1]}"] if bounds else []
            self.names = [f"The part with {name[0].lower()}{name[1:]}" for name in self.names]
        else:
            whole = array.dtype.kind != "f"
            self.names = [f"Class {int(value) if whole else f'{value:g}'}" for value in self.values.tolist()]

    def of(self, labels: Sequence[int] | Sequence[float]) -> Ints:
        """Returns the class of each label; -1 for a label that the training set doesn't have."""
        array = np.asarray(labels)
        nearest = np.minimum(np.searchsorted(self.values, array), len(self.values) - 1)
        return (nearest if self.binned else np.where(self.values[nearest] == array, nearest, -1)).astype(np.int64)


def _percentages(*parts: float) -> list[str]:
    """Formats fractions as percentages, with enough digits that they differ from each other and from 0 %."""
    texts: list[str] = []
    for digits in range(5):
        texts = [f"{part:.{digits}%}" for part in parts]
        if len(set(texts)) == len(parts) and all(
            float(text[:-1]) > 0 or not part for text, part in zip(texts, parts, strict=True)
        ):
            break
    return texts


def _groups(sizes: Floats) -> Ints:
    """Returns the group of each class: each of the most frequent classes has its own; all others share the last one."""
    rank = np.empty(len(sizes), dtype=np.int64)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    return np.minimum(rank, min(GROUPS, np.count_nonzero(sizes)) - 1)


def _expectation(size: int, means: Floats, centres: Floats, left: Ints | None = None) -> Floats:
    """Returns ln E exp(-t Σ (n - means)² / means) for each t in `_TILTS`.

    Args:
        size: B, the sum of n.
        means: B p_k, `[groups]`.
        centres: E n, `[groups]`.
        left: number of texts of each group that the batch is drawn from without replacement, `[groups]`; None for a
            draw with replacement.
    """
    # n are independent binomials of one rate (or Poisson), conditional on their sum B: a convolution over groups.
    total = 0 if left is None else int(left.sum())
    if left is None:
        log_sum = size * math.log(size) - size - math.lgamma(size + 1)
    elif size == total:
        return -_TILTS * float(((left - means) ** 2 / means).sum())
    else:
        log_sum = float(_log_binomial(np.array([size]), total, size / total)[0])
    product, offset = np.ones((len(_TILTS), 1)), 0
    order = np.argsort(means).tolist()
    for k in order:
        mean, centre = float(means[k]), float(centres[k])
        spread = 8 * math.sqrt(max(mean, centre)) + 8  # the probability beyond is negligible
        low = max(0, math.floor(min(mean, centre) - spread))
        high = min(size if left is None else int(left[k]), math.ceil(max(mean, centre) + spread)) if centre else 0
        n = np.arange(low, high + 1)
        if left is not None:
            log_p = _log_binomial(n, int(left[k]), size / total)
        else:
            log_p = n * math.log(centre or 1.0) - centre - gammaln(n + 1)
        factor = np.exp(log_p - _TILTS[:, None] * (n - mean) ** 2 / mean)
        if k == order[-1]:  # the group with the most terms: only the terms with sum B are needed
            rest = size - offset - np.arange(product.shape[1]) - low
            inside = (rest >= 0) & (rest < len(n))
            sums = (product[:, inside] * factor[:, rest[inside]]).sum(axis=1)
            return np.log(np.maximum(sums, 1e-290)) - log_sum
        if k == order[0]:
            product = factor
        else:
            product = np.stack([np.convolve(a, b) for a, b in zip(product, factor, strict=True)])
        offset += low
    raise ValueError("There are no groups of classes.")


def _log_binomial(n: Ints, total: int, rate: float) -> Floats:
    """Returns ln P(n) of a binomial with this total and rate."""
    choose = math.lgamma(total + 1) - gammaln(n + 1) - gammaln(total - n + 1)
    return choose + n * math.log(rate) + (total - n) * math.log1p(-rate)


def _sum_of_hashes(ids: Ints) -> int:
    """Returns the sum of SplitMix64 hashes of the ids, which doesn't depend on their order."""
    x = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((x ^ (x >> np.uint64(31))).sum(dtype=np.uint64))


def _hash(text: Hashable) -> int:
    """Returns 64 bits of a hash of the text."""
    return int.from_bytes(hashlib.blake2b(repr(text).encode("utf-8", "surrogatepass"), digest_size=8).digest())
