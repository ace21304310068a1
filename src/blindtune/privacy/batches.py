"""Whether batches depend on labels: a check on the client's machine, which knows labels, before a batch is sent.

An operator sees the texts of every batch. Label privacy is proven for batches that don't depend on labels; weights for
classes in a sampler, oversampling, undersampling and stratified batches break that. `BatchMonitor` looks for both ways
in which they show:

**Rates.** Shuffling sends each text once before it sends any text twice. Let B be the largest batch. When a text is
sent for the c-th time (per copy in the set), at most (c - 1) B more may be missing for all texts to have been sent
c - 1 times (a loader that drops the last batch leaves fewer than B per epoch). Where this doesn't hold, classes must
have been sent at one rate. Without a look at labels, labels are exchangeable among texts with equally many copies,
whatever the sampler (with replacement, a fixed subset, epochs that are cut short). So for class k and any θ (Chernoff;
Hoeffding 1963 for draws without replacement), where s_j is how often text j was sent, and G_m are the texts with m
copies, n_km of them in class k,

    P(Σ_{j in k} s_j ≥ x) ≤ exp(Σ_m n_km ln mean_{j in G_m} exp(θ s_j) - θ x),    and the same for ≤ x with θ < 0.

Tests come at numbers of batches that grow by a fifth. Test i may refuse with probability RATE_ALARM / (i (i + 1)), over
all classes and both sides, so all tests of a run together with RATE_ALARM. Batches of similar length are more alike in
their labels than chance makes them: exponents are divided by the dispersion of batches around what was sent. Alone,
that would let batches of one class pass. If batches are drawn with equal chances for all texts, however alike those of
one are, the mean share q of a class in n batches is as far above (or below) its p with at most the probability
exp(-n KL(q, p)) (Hoeffding 1963); where both this exponent and the undivided one are too large, it is refused as well.

**Stratified batches.** n_k of B texts in a batch are of class k, which is a part p_k of the set. X = Σ_k (n_k - B p_k)²
/ (B p_k) is smaller than chance makes it. Each batch, given those before it, is a draw from what its epoch has left (or
from what the epoch before sent; or with replacement from the whole set or from what was sent so far: the largest
expectation counts). Then for any t

    W_t = Π_batches exp(-t X) / E exp(-t X)

is a supermartingale, and the mean of W_t over a few t exceeds 1 / STRATA_ALARM at any moment of a run with at most the
probability STRATA_ALARM (Ville's inequality). The expectation is exact, so small batches and rare classes are no
problem. A batch that its texts have formed before tells nothing new and isn't counted. Batches that differ more than
by chance are never refused.

Not seen: copies of texts in the set itself, the order of labels within an epoch (a file that is sorted by label), a run
that leaves texts of a class out and ends before it sends any text twice, and fewer than B texts that are left out.
Refused, though it may be label-free: sampling by something that nearly tells the label, if texts aren't sent equally
often or batches are stratified by it.
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
"""Probability with which a label-free run is refused for the rates of its classes."""
STRATA_ALARM = 1e-9
"""Probability with which a label-free run is refused for stratified batches."""
MIN_BATCHES = 10
"""Batches before rates are tested: their dispersion has to be known."""
REPETITIONS = 8
"""Repetitions of a batch in a row that aren't counted; from then on it isn't a retry but the way to train."""
QUANTILES = 4
GROUPS = 8
"""Classes of which dispersion is measured; rarer ones are one group."""

_TILTS = np.array([0.25, 1.0, 4.0, 16.0])
_THETAS = np.geomspace(1e-4, 8.0, 48)
_GROWTH = 1.2
_REMEDY = (
    "Shuffle without looking at labels (torch's RandomSampler), or weigh classes in the loss: that stays on this "
    "machine."
)

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class BatchMonitor:
    """Refuses batches that depend on labels. A step costs O(batch); tests of rates O(set), ever more seldom.

    Args:
        texts: of the training set, N of them; equal ones are copies of one text. Anything hashable that stands for
            the text will do.
        labels: N classes. Float labels of more than 4 values are put into 4 classes by quantiles. Copies count with
            the label of the first.

    Attributes:
        batches: that were counted.
        strange: texts that were sent and aren't in the training set; their rates can't be tested.

    Raises:
        ValueError: no texts, not as many labels, or labels that aren't finite.
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
        self._last = 0  # the last batch, and its repetitions
        self._repeated = 0
        self._levels: Ints = np.array([len(texts), 0], dtype=np.int64)  # copies that were sent 0, 1, … times
        self._uneven = False
        self._tests = 0
        self._next_test = MIN_BATCHES
        self._epoch = 1
        self._epoch_of: Ints = np.zeros_like(self._sent)  # in which a text was last sent, and how often in it
        self._epoch_sent: Ints = np.zeros_like(self._sent)
        self._left = self._whole.copy()  # texts of each group that this epoch hasn't sent
        self._repeating = np.zeros_like(self._whole)  # of what the epoch before sent, what this one hasn't
        self._batch_of: Ints = np.zeros_like(self._sent)  # the last batch that a text was in
        self._strange_batches: set[int] = set()
        self._wealth: Floats = np.zeros(len(_TILTS))  # ln W_t
        # For each group: Σ n, Σ n²/B, Σ (n - B p)², and the last one's expectation; of new batches only these
        # two and the last, Σ n/B.
        self._moments: Floats = np.zeros((5, len(self._whole)))
        self._new = 0
        self._expected: dict[int, Floats] = {}  # by size of batch, with replacement

    def observe(self, texts: Sequence[Hashable], labels: Sequence[int] | Sequence[float]) -> None:
        """Counts a batch, before anything of it is sent. The batch that was counted last is a repetition.

        Args:
            texts: of the batch, B of them.
            labels: B classes; only those of texts that aren't in the training set are looked at.

        Raises:
            LabelDependentBatches: this batch and those before it depend on labels. Each later call raises it, too.
            ValueError: not as many labels as texts.
        """
        if len(texts) != len(labels):
            raise ValueError(f"There are {len(texts)} texts and {len(labels)} labels.")
        if self._refused:
            self._refuse()
        if not len(texts):
            return
        index = np.array([self._ids.get(text, -1) for text in texts], dtype=np.int64)
        known = index[index >= 0]
        strange = [i for i, j in enumerate(index.tolist()) if j < 0]
        batch = (_sum_of_hashes(known) + sum(_hash(texts[i]) for i in strange)) % 2**62 + 1
        if batch != self._last:
            self._last, self._repeated = batch, 0
        elif self._repeated < REPETITIONS:
            self._repeated += 1
            return
        self.batches += 1
        self.strange += len(strange)
        classes = self._class[known]
        if strange:
            others = self._classes.of([labels[i] for i in strange])
            classes = np.concatenate([classes, others[others >= 0]])
        counts = np.bincount(self._group[classes], minlength=len(self._whole)).astype(np.int64)
        self._disperse(batch, known, counts, bool(strange))
        self._count(known, counts)
        self._test()
        if self._refused:
            self._refuse()

    def _count(self, known: Ints, counts: Ints) -> None:
        """How often texts were sent, and whether that is what shuffling does."""
        size = int(counts.sum())
        self._moments[0] += counts
        self._moments[1] += counts**2 / max(1, size)
        if not len(known):
            return
        self._largest = max(self._largest, len(known))
        ids, times = np.unique(known, return_counts=True)
        top = len(self._levels) - 2  # the most often that a copy was sent
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

    def _disperse(self, batch: int, known: Ints, counts: Ints, strange: bool) -> None:
        """Whether batches are stratified."""
        ids, times = np.unique(known, return_counts=True)
        before = np.where(self._epoch_of[ids] == self._epoch, self._epoch_sent[ids], 0)
        if (before + times > self._copies[ids]).any():
            self._epoch += 1
            self._repeating = self._whole - self._left  # what the epoch that ends has sent
            self._left = self._whole.copy()
            before = np.zeros_like(before)
        new = not (self._batch_of[ids] == batch).all() if len(ids) else batch not in self._strange_batches
        size = int(counts.sum())
        if new and size and len(self._whole) > 1:
            total = int(self._whole.sum())
            means = size * self._whole / total
            log_e = self._largest_expectation(size, means, strange)
            self._wealth += -_TILTS * float(((counts - means) ** 2 / means).sum()) - log_e
            self._moments[2] += (counts - means) ** 2
            self._moments[3] += means * (1 - means / size) * max(0, total - size) / max(1, total - 1)
            self._moments[4] += 0 if strange else counts / size
            self._new += 1
            if np.logaddexp.reduce(self._wealth) - math.log(len(_TILTS)) > -math.log(STRATA_ALARM):
                self._refused = 2
        self._epoch_of[ids] = self._epoch
        self._epoch_sent[ids] = before + times
        sent = np.bincount(self._group[self._class[known]], minlength=len(self._whole))
        self._left = np.maximum(self._left - sent, 0)
        self._repeating = np.maximum(self._repeating - sent, 0)
        self._batch_of[ids] = batch
        if not len(ids):
            self._strange_batches.add(batch)

    def _largest_expectation(self, size: int, means: Floats, strange: bool) -> Floats:
        """ln E exp(-t X) of the next batch for each t, under the label-free sampler for which it is largest."""
        if size not in self._expected:
            self._expected[size] = _expectation(size, means, means)
        log_e = self._expected[size]
        if self._uneven or strange:
            sent = self._moments[0] / max(1.0, self._moments[0].sum())
            log_e = np.maximum(log_e, _expectation(size, means, size * sent)) if sent.any() else log_e
        pools = [self._left] if (self._left == self._repeating).all() else [self._left, self._repeating]
        for left in () if strange else pools:
            if size <= left.sum():
                log_e = np.maximum(log_e, _expectation(size, means, size * left / left.sum(), left))
        return log_e

    def _test(self) -> None:
        """Whether classes were sent at one rate, where texts weren't."""
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
        """-ln of the bound on the probability of what was sent of each class."""
        classes = len(self._share)
        thetas = np.concatenate([_THETAS, -_THETAS])
        logs = np.zeros((classes, len(thetas)))
        for m in np.unique(self._copies):
            stratum = self._copies == m
            values, often = np.unique(self._sent[stratum], return_counts=True)
            grown = thetas[:, None] * values + np.log(often / often.sum())
            logs += np.bincount(self._class[stratum], minlength=classes)[:, None] * np.logaddexp.reduce(grown, axis=1)
        sent = np.bincount(self._class, weights=self._sent, minlength=classes)
        return (sent[:, None] * thetas - logs).max(axis=1)

    def _batch_exponents(self) -> Floats:
        """-ln of Hoeffding's bound on the probability of the mean share of each class's group in new batches."""
        batches = self._moments[4].sum()
        q, p = self._moments[4] / max(1.0, batches), self._whole / self._whole.sum()
        divergence = rel_entr(q, p) + rel_entr(np.maximum(0, 1 - q), 1 - p)
        return (batches * divergence)[self._group]

    def _dispersion(self) -> float:
        """Mean square deviation of batches from what was sent of each group, in units of chance; at least 1."""
        # A group of which little was sent may come in whole batches: such a batch is added.
        n, squares = self._moments[:2] + np.where(self._moments[0] < self._largest, self._largest, 0)
        excess = float((squares * n.sum() / n - n).sum())
        return max(1.0, excess / ((len(n) - 1) * (self.batches - 1)))

    def _refuse(self) -> NoReturn:
        if self._refused == 2:
            squares, expected = self._moments[2:4]
            k = int(self._whole.argmax())
            name = self._classes.names[int(np.flatnonzero(self._group == k)[0])]
            raise LabelDependentBatches(
                f"{name} varies by {math.sqrt(squares[k] / self._new):.1f} texts from its share in {self._new} "
                f"batches; chance makes that {math.sqrt(expected[k] / self._new):.1f}. The batches look stratified by "
                "label.",
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
        """All that was counted, for a run that is resumed. It tells labels: keep it on this machine."""
        numbers = [
            self._identity(), self.batches, self.strange, self._refused, self._largest, self._last, self._repeated,
            int(self._uneven), self._tests, self._next_test, self._epoch, self._new,
        ]  # fmt: skip
        arrays = {
            "numbers": np.array(numbers, dtype=np.int64),
            "strange_batches": np.array(sorted(self._strange_batches), dtype=np.int64),
        }
        return {
            name: torch.from_numpy(array.copy())
            for name, array in {**arrays, **{name: getattr(self, f"_{name}") for name in _ARRAYS}}.items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on from what another monitor of the same set has counted.

        Raises:
            CheckpointError: the state is incomplete or belongs to another training set.
        """
        try:
            numbers = [int(number) for number in state["numbers"].tolist()]
            arrays = {name: np.array(state[name].cpu().numpy()) for name in _ARRAYS}
            strange: set[int] = set(state["strange_batches"].tolist())
            found, *rest = numbers
            names = (
                "batches", "strange", "_refused", "_largest", "_last", "_repeated", "_uneven", "_tests", "_next_test",
                "_epoch", "_new",
            )  # fmt: skip
            values = dict(zip(names, rest, strict=True))
        except (KeyError, ValueError):
            raise CheckpointError("The record of batches is incomplete.", remedy="Use another checkpoint.") from None
        if found != self._identity():
            raise CheckpointError(
                "The record of batches belongs to another training set.",
                remedy="Resume with the texts and labels, in the order, that the run began with.",
            )
        for name, value in values.items():
            setattr(self, name, value)
        self._uneven = bool(self._uneven)
        for name, array in arrays.items():
            setattr(self, f"_{name}", array)
        self._strange_batches = strange

    def _identity(self) -> int:
        """63 bits that differ for another set."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(self._copies.tobytes() + self._class.tobytes(), digest_size=8)
            for text in self._ids:
                digest.update(repr(text).encode("utf-8", "surrogatepass") + b"\0")
            self._fingerprint = int.from_bytes(digest.digest()) >> 1
        return self._fingerprint


_ARRAYS = ("sent", "levels", "epoch_of", "epoch_sent", "left", "repeating", "batch_of", "wealth", "moments")


class _Classes:
    """Labels as 0, 1, …: values as they are, or quantiles of float labels."""

    def __init__(self, labels: Sequence[int] | Sequence[float]) -> None:
        array = np.asarray(labels)
        if not np.isfinite(array).all():
            raise ValueError("There are labels that aren't finite.")
        self.values = np.unique(array)
        self.binned = array.dtype.kind == "f" and len(self.values) > QUANTILES
        if self.binned:
            inner = np.quantile(array, np.arange(1, QUANTILES) / QUANTILES)
            # A bin holds what is above one edge up to the next; bins that hold nothing are left out.
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
        """The class of each label; -1 where the training set has no such label."""
        array = np.asarray(labels)
        found = np.minimum(np.searchsorted(self.values, array), len(self.values) - 1)
        return (found if self.binned else np.where(self.values[found] == array, found, -1)).astype(np.int64)


def _percentages(*parts: float) -> list[str]:
    """With as few digits as tell them apart from each other and from 0 %."""
    texts: list[str] = []
    for digits in range(5):
        texts = [f"{part:.{digits}%}" for part in parts]
        if len(set(texts)) == len(parts) and all(
            float(text[:-1]) > 0 or not part for text, part in zip(texts, parts, strict=True)
        ):
            break
    return texts


def _groups(sizes: Floats) -> Ints:
    """The group of each class: the common ones have their own, the rest share the last."""
    rank = np.empty(len(sizes), dtype=np.int64)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    return np.minimum(rank, min(GROUPS, np.count_nonzero(sizes)) - 1)


def _expectation(size: int, means: Floats, centres: Floats, left: Ints | None = None) -> Floats:
    """ln E exp(-t Σ (n - means)² / means) for each t in `_TILTS`.

    Args:
        size: B, the sum of n.
        means: [groups] B p_k.
        centres: [groups] E n.
        left: [groups] what texts are drawn from without replacement; None for a draw with replacement.
    """
    # n are independent binomials of one rate (or Poisson), given that their sum is B: a convolution over groups.
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
        spread = 8 * math.sqrt(max(mean, centre)) + 8  # what is beyond has no weight
        low = max(0, math.floor(min(mean, centre) - spread))
        high = min(size if left is None else int(left[k]), math.ceil(max(mean, centre) + spread)) if centre else 0
        n = np.arange(low, high + 1)
        if left is not None:
            log_p = _log_binomial(n, int(left[k]), size / total)
        else:
            log_p = n * math.log(centre or 1.0) - centre - gammaln(n + 1)
        factor = np.exp(log_p - _TILTS[:, None] * (n - mean) ** 2 / mean)
        if k == order[-1]:  # the widest: only the sum B is needed
            rest = size - offset - np.arange(product.shape[1]) - low
            inside = (rest >= 0) & (rest < len(n))
            sums = (product[:, inside] * factor[:, rest[inside]]).sum(axis=1)
            return np.log(np.maximum(sums, 1e-290)) - log_sum
        if k == order[0]:
            product = factor
        else:
            product = np.stack([np.convolve(a, b) for a, b in zip(product, factor, strict=True)])
        offset += low
    raise AssertionError("there is no group")


def _log_binomial(n: Ints, total: int, rate: float) -> Floats:
    choose = math.lgamma(total + 1) - gammaln(n + 1) - gammaln(total - n + 1)
    return choose + n * math.log(rate) + (total - n) * math.log1p(-rate)


def _sum_of_hashes(ids: Ints) -> int:
    """The same for any order (SplitMix64)."""
    x = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((x ^ (x >> np.uint64(31))).sum(dtype=np.uint64))


def _hash(text: Hashable) -> int:
    return int.from_bytes(hashlib.blake2b(repr(text).encode("utf-8", "surrogatepass"), digest_size=8).digest())
