"""The channels of one look at one server: vectors for texts that it computed, was sent, or reconstructed.

| channel | what an attacker hopes for |
|---|---|
| activation i, shift i | the adapter carries the labels |
| shift i since the first step, since the last look | what came before hides less than what came between |
| … joint, in common, 0 minus i | several adapters together carry them |
| shift i of the mean adapter, of the recent mean adapter | noise on adapters averages out, what they learn doesn't |
| activation of A minus B | operators that collude hold adapters with one pad: it cancels |
| sent activation i, gradient … | what travelled, averaged over messages |
| update inverted | an optimizer step tells its gradient, under plain SGD or Adam |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, takewhile

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from blindtune.audit.labels import SHARE_ATTACKS, UPDATE_ATTACKS, Channel
from blindtune.audit.labels.registry import COMPONENTS, UpdateAttack
from blindtune.audit.observe import Adapter, Checkpoint, Features, Mean, Row, Update, View
from blindtune.audit.recompute import Jacobian, Recomputation

MIN_TEXTS = 50
MIN_TRAVELLED = 1000
"""Vectors that travelled are pooled over steps until there are so many (if there are): fewer say little."""
NEIGHBOURS = 4
"""Of so many adapters that are near in time the one with the nearest weights counts as received at the same moment."""


def computed_channels(
    view: View,
    recompute: Recomputation,
    now: tuple[Adapter, ...],
    earlier: Mapping[str, tuple[Adapter, ...]],
    rows: Sequence[Row],
) -> dict[str, Features]:
    """Activations, shifts from θ = 0 and from earlier adapters, joints over adapters, and their differences.

    Args:
        earlier: how shifts from them are called -> adapters.
    """
    if len(rows) < MIN_TEXTS:
        return {}
    hidden = recompute.hidden(view, now, rows)  # (n, N, d)
    frozen = recompute.hidden(view, (), rows)[0]
    channels: dict[str, Features] = {}
    references = {"": frozen}
    for name, adapters in earlier.items():
        if adapters != now and len(adapters) == len(hidden):
            start = recompute.hidden(view, adapters, rows)
            if not np.allclose(start, frozen, atol=1e-4):  # adapters usually begin without effect
                references[f" since {name}"] = start
    for i, vectors in enumerate(hidden):
        channels[f"activation {i}"] = vectors
        for suffix, reference in references.items():
            channels[f"shift {i}{suffix}"] = vectors - (reference if reference.ndim == 2 else reference[i])
    if len(hidden) > 1:
        channels["activations joint"] = np.concatenate(list(hidden), axis=1)
        channels["shifts joint"] = np.concatenate(list(hidden - frozen), axis=1)
        channels["shifts in common"] = common_variates(hidden[0] - frozen, hidden[1] - frozen)
        for i in range(1, len(hidden)):
            channels[f"activation 0 minus {i}"] = hidden[0] - hidden[i]
    return channels


def mean_adapters(view: View, now: Checkpoint) -> dict[str, tuple[Mean, ...]]:
    """Averages of the adapters received until now, and of the latter half of them: name -> one for each position."""
    alike = [
        checkpoint.adapters
        for checkpoint in view.moving
        if checkpoint.step <= now.step
        and len(checkpoint.adapters) == len(now.adapters)
        and all(name in view.weights for name in checkpoint.adapters)
    ]
    chosen = {"mean adapter": alike, "recent mean adapter": alike[len(alike) // 2 :]}
    return {
        name: tuple(Mean(tuple(column)) for column in zip(*several, strict=True))
        for name, several in chosen.items()
        if len(several) > 1
    }


def mean_channels(view: View, recompute: Recomputation, now: Checkpoint, rows: Sequence[Row]) -> dict[str, Features]:
    """Shifts under averages of adapters: fresh noise on each of them shrinks with the root of their number."""
    if len(rows) < MIN_TEXTS:
        return {}
    frozen = recompute.hidden(view, (), rows)[0]
    channels: dict[str, Features] = {}
    for name, adapters in mean_adapters(view, now).items():
        for i, vectors in enumerate(recompute.hidden(view, adapters, rows)):
            channels[f"shift {i} of the {name}"] = vectors - frozen
    return channels


def counterparts(view: View, now: Checkpoint) -> dict[str, tuple[Checkpoint, Checkpoint]]:
    """For each two operators the adapters that they received at about this moment: "A minus B" -> A's and B's.

    Only adapters that the other one did not receive count; so there are none where all get the same.
    """
    found: dict[str, tuple[Checkpoint, Checkpoint]] = {}
    operators = sorted({operator for times in view.received.values() for operator in times})
    for pair in combinations(operators, 2):
        own = {
            operator: [
                checkpoint
                for checkpoint in view.moving
                if len(checkpoint.adapters) == len(now.adapters)
                and view.received[checkpoint.adapters].keys() & set(pair) == {operator}
                and all(name in view.weights for name in checkpoint.adapters)
            ]
            for operator in pair
        }
        if not all(own.values()):
            continue
        start = next((operator for operator in pair if operator in view.received[now.adapters]), pair[0])
        end = pair[1] if start == pair[0] else pair[0]
        one = _near(view, own[start], now)[0]
        near = _near(view, own[end], one)[:NEIGHBOURS]
        weights = view.load(name for checkpoint in [one, *near] for name in checkpoint.adapters)
        other = min(near, key=lambda checkpoint: _distance(weights, one, checkpoint))
        found[f"{pair[0]} minus {pair[1]}"] = (one, other) if start == pair[0] else (other, one)
    return found


def collusion_channels(
    view: View, recompute: Recomputation, now: Checkpoint, rows: Sequence[Row]
) -> dict[str, Features]:
    """Differences of activations under adapters that different operators received at the same moment."""
    if len(rows) < MIN_TEXTS:
        return {}
    channels: dict[str, Features] = {}
    for name, (one, other) in counterparts(view, now).items():
        difference = recompute.hidden(view, one.adapters, rows) - recompute.hidden(view, other.adapters, rows)
        for i, vectors in enumerate(difference):
            channels[f"activation {i} of {name}" if len(difference) > 1 else f"activation of {name}"] = vectors
    return channels


def extra_adapters(view: View, now: Checkpoint, *, means: bool) -> list[tuple[Adapter, ...]]:
    """What `mean_channels` and `collusion_channels` will recompute at this look, beside its own adapters."""
    wanted: list[tuple[Adapter, ...]] = [
        checkpoint.adapters for p in counterparts(view, now).values() for checkpoint in p
    ]
    return [*wanted, *(mean_adapters(view, now).values() if means else ())]


def _near(view: View, checkpoints: Sequence[Checkpoint], to: Checkpoint) -> list[Checkpoint]:
    """The nearest in time first."""
    time = min(view.received[to.adapters].values())
    return sorted(checkpoints, key=lambda c: abs(min(view.received[c.adapters].values()) - time))


def _distance(weights: Mapping[str | Mean, Tensor], one: Checkpoint, other: Checkpoint) -> float:
    pairs = zip(one.adapters, other.adapters, strict=True)
    return sum(float((weights[a] - weights[b]).norm()) for a, b in pairs)


def common_variates(left: Features, right: Features) -> Features:
    """What two adapters' features `(N, d)` have in common: the first canonical variates' sum, `(N, 1)`.

    Adapters with independent disguises share little but the task (canonical correlation of the leading components).
    """
    leading = [Channel(features).components(COMPONENTS) for features in (left, right)]
    one, other = (scores / np.maximum(np.linalg.norm(scores, axis=0), 1e-30) for scores in leading)
    u, _, v = np.linalg.svd(one.T @ other)
    return ((one @ u[:, :1] + other @ v[:1].T) * len(left) ** 0.5).astype(np.float32)


def travelled_channels(view: View, labels: Mapping[Row, int], step: int) -> dict[str, tuple[Features, list[Row]]]:
    """Vectors that were really sent up to this step, for each text the mean of all of them: noise averages out.

    Among them what attacks on shares make of them.
    """
    sums: dict[str, dict[Row, Features]] = {}
    counts: dict[str, dict[Row, int]] = {}
    sighted = [(s.rows, s.channels) for s in view.sightings if s.step <= step]
    for met in view.gradients:
        if met.step <= step:
            sighted += [(met.rows, attack.function(met.shares)) for attack in SHARE_ATTACKS.values()]
    for rows, channels in sighted:
        for channel, vectors in channels.items():
            total, count = sums.setdefault(channel, {}), counts.setdefault(channel, {})
            for row, vector in zip(rows, vectors, strict=True):
                if row in labels:
                    total[row] = total[row] + vector if row in total else vector
                    count[row] = count.get(row, 0) + 1
    final = step >= view.moving[-1].step
    return {
        channel: (np.stack([vector / np.float32(counts[channel][row]) for row, vector in known.items()]), list(known))
        for channel, known in sums.items()
        if len(known) >= (MIN_TEXTS if final else MIN_TRAVELLED)
    }


def beyond_text_channels(
    view: View, recompute: Recomputation, travelled: Mapping[str, tuple[Features, list[Row]]]
) -> dict[str, tuple[Features, list[Row]]]:
    """Recombined gradients without what the texts explain: see `beyond_text`."""
    return {
        f"{name} beyond the text": (beyond_text(features, recompute.hidden(view, (), rows)[0]), rows)
        for name, (features, rows) in travelled.items()
        if name.startswith("gradient recombined") and len(rows) >= MIN_TEXTS
    }


def beyond_text(features: Features, frozen: Features) -> Features:
    """Residuals `(N, d)` of a regression on the leading principal components of frozen features.

    Decoys pull on hidden states along functions of the text; the task's residual r_b = p_b − y_b is what the text
    does not tell, since the head fits as much of y as it can. So this leaves r_b.
    """
    leading = Channel(frozen).components(COMPONENTS)
    known = np.concatenate([np.ones((len(leading), 1)), leading / leading.std(0)], axis=1)
    return (features - known @ np.linalg.lstsq(known, features, rcond=None)[0]).astype(np.float32)


def inverted_channels(
    view: View, labels: Mapping[Row, int], recompute: Recomputation, count: int
) -> dict[str, tuple[Features, list[Row]]]:
    """What attacks on updates make of `count` of them, over the run or its first ones: the mean for each text."""
    updates = [update for update in view.updates() if any(row in labels for row in update.rows)]
    if not updates or count < 1:
        return {}
    spread = [updates[i] for i in np.unique(np.linspace(0, len(updates) - 1, count).round().astype(int))]
    gapless = [update for update, _ in takewhile(_follows, zip(updates, [None, *updates], strict=False))][:count]

    channels: dict[str, tuple[Features, list[Row]]] = {}
    for channel, attack in UPDATE_ATTACKS.items():
        found = inverted(view, recompute, attack, gapless if attack.consecutive else spread, labels)
        if len(found[1]) >= MIN_TEXTS:
            channels[channel] = found
    return channels


def inverted(
    view: View, recompute: Recomputation, attack: UpdateAttack, updates: Sequence[Update], labels: Mapping[Row, int]
) -> tuple[Features, list[Row]]:
    """What one attack makes of these updates: the mean for each text whose label is known."""

    def observed(update: Update) -> tuple[Jacobian, NDArray[np.float64]]:
        before, after = ([view.adapter(name) for name in names] for names in (update.before, update.after))
        change = np.stack([(b - a).double().numpy() for a, b in zip(before, after, strict=True)])
        return recompute.jacobian(view, update.at, update.rows), change

    by_row: dict[Row, list[Features]] = {}
    for vector, row in zip(*attack.function(updates, observed), strict=True):
        if row in labels:
            by_row.setdefault(row, []).append(vector)
    means = [np.mean(found, axis=0, dtype=np.float32) for found in by_row.values()]
    return (np.stack(means) if means else np.empty((0, 0), np.float32)), list(by_row)


def _follows(pair: tuple[Update, Update | None]) -> bool:
    """Whether an update starts where the one before it ended."""
    update, last = pair
    return last is None or update.before == last.after
