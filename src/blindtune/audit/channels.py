"""The channels of one server at one snapshot: vectors of texts that it computed, received, sent, or reconstructed.

| channel | why it may reveal labels |
|---|---|
| activation i, shift i | the adapter has learned the labels |
| shift i since the first step, since the previous snapshot | the reference contains the same mask, which cancels |
| … joint, in common, 0 minus i | several adapters together contain the labels |
| shift i of the mean adapter, of the recent mean adapter | noise on adapters averages out; what they learned does not |
| activation of A minus B | operators that collude hold adapters with the same pad, which cancels |
| sent activation i, gradient … | the mean over all messages about a text reduces noise |
| update inverted | an optimizer step reveals its gradient, under plain SGD or Adam |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from blindtune.audit.channel_id import IN_COMMON, JOINT, RECOMBINED, SUMMED, ChannelId, ChannelKind
from blindtune.audit.labels import SHARE_ATTACKS, UPDATE_ATTACKS, Channel
from blindtune.audit.labels.registry import COMPONENTS, UpdateAttack
from blindtune.audit.observe import Adapter, Checkpoint, Features, Mean, Row, Update, View
from blindtune.audit.recompute import Jacobian, Recomputation

MIN_TEXTS = 50
MIN_TRAVELLED = 1000
"""Least number of texts with sent vectors for an attack at a snapshot. At the last snapshot it is `MIN_TEXTS`."""
NEIGHBOURS = 4
"""Number of adapters nearest in time. Of these, the one with the closest weights counts as received at that step."""
RECOMBINATIONS = (RECOMBINED, f"{RECOMBINED}, {SUMMED}")
Travelled = dict[ChannelId, tuple[Features, list[Row]]]
"""Channel -> vectors and their texts."""


def computed_channels(
    view: View,
    recompute: Recomputation,
    now: tuple[Adapter, ...],
    earlier: Mapping[str, tuple[Adapter, ...]],
    rows: Sequence[Row],
) -> dict[ChannelId, Features]:
    """Returns the activations of each adapter, their shifts, and combinations of the activations of several adapters.

    Args:
        earlier: adapters to compute shifts from, besides θ = 0, by the name that the label of the channel shows, such
            as `the first step`.
    """
    if len(rows) < MIN_TEXTS:
        return {}
    hidden = recompute.hidden(view, now, rows)  # (n, N, d)
    frozen = recompute.hidden(view, (), rows)[0]
    references: dict[str, Features] = {}
    for name, adapters in earlier.items():
        if adapters != now and len(adapters) == len(hidden):
            start = recompute.hidden(view, adapters, rows)
            if not np.allclose(start, frozen, atol=1e-4):  # adapters usually have no effect at the start
                references[f"since {name}"] = start
    channels: dict[ChannelId, Features] = {}
    for i, vectors in enumerate(hidden):
        channels[ChannelId(ChannelKind.ACTIVATION, adapter=i)] = vectors
        channels[ChannelId(ChannelKind.SHIFT, adapter=i)] = vectors - frozen
        for modifier, reference in references.items():
            channels[ChannelId(ChannelKind.SHIFT, adapter=i, modifier=modifier)] = vectors - reference[i]
    if len(hidden) > 1:
        shifts = hidden - frozen
        channels[ChannelId(ChannelKind.ACTIVATION, modifier=JOINT)] = np.concatenate(list(hidden), axis=1)
        channels[ChannelId(ChannelKind.SHIFT, modifier=JOINT)] = np.concatenate(list(shifts), axis=1)
        channels[ChannelId(ChannelKind.SHIFT, modifier=IN_COMMON)] = common_variates(shifts[0], shifts[1])
        for i in range(1, len(hidden)):
            difference = ChannelId(ChannelKind.ACTIVATION, adapter=0, modifier=f"minus {i}")
            channels[difference] = hidden[0] - hidden[i]
    return channels


def mean_adapters(view: View, now: Checkpoint) -> dict[str, tuple[Mean, ...]]:
    """Returns, by name, the means of all adapters up to `now` and of the latter half; one for each adapter index."""
    same_shape = [
        checkpoint.adapters
        for checkpoint in view.moving
        if checkpoint.step <= now.step
        and len(checkpoint.adapters) == len(now.adapters)
        and all(name in view.weights for name in checkpoint.adapters)
    ]
    chosen = {"mean adapter": same_shape, "recent mean adapter": same_shape[len(same_shape) // 2 :]}
    return {
        name: tuple(Mean(tuple(column)) for column in zip(*adapters, strict=True))
        for name, adapters in chosen.items()
        if len(adapters) > 1
    }


def mean_channels(
    view: View, recompute: Recomputation, now: Checkpoint, rows: Sequence[Row]
) -> dict[ChannelId, Features]:
    """Returns shifts under averages of adapters. Fresh noise shrinks with the square root of the number of adapters."""
    if len(rows) < MIN_TEXTS:
        return {}
    frozen = recompute.hidden(view, (), rows)[0]
    channels: dict[ChannelId, Features] = {}
    for name, adapters in mean_adapters(view, now).items():
        for i, vectors in enumerate(recompute.hidden(view, adapters, rows)):
            channels[ChannelId(ChannelKind.SHIFT, adapter=i, modifier=f"of the {name}")] = vectors - frozen
    return channels


def counterparts(view: View, now: Checkpoint) -> dict[str, tuple[Checkpoint, Checkpoint]]:
    """Returns adapters that two operators received at about the same step: "A minus B" -> those of A and of B.

    Adapters that both operators received don't count. So the result is empty if all operators receive the same ones.
    """
    operators = sorted({operator for times in view.received.values() for operator in times})
    by_pair: dict[str, tuple[Checkpoint, Checkpoint]] = {}
    for first, second in combinations(operators, 2):
        of_first = _received_by_one(view, now, first, second)
        of_second = _received_by_one(view, now, second, first)
        if not of_first or not of_second:
            continue
        receivers = view.received[now.adapters]
        if second in receivers and first not in receivers:
            own, counterpart = _nearest_pair(view, now, of_second, of_first)
            by_pair[f"{first} minus {second}"] = (counterpart, own)
        else:
            own, counterpart = _nearest_pair(view, now, of_first, of_second)
            by_pair[f"{first} minus {second}"] = (own, counterpart)
    return by_pair


def _received_by_one(view: View, now: Checkpoint, operator: str, other: str) -> list[Checkpoint]:
    """Returns checkpoints with as many adapters as `now` that `operator` received and `other` didn't."""
    return [
        checkpoint
        for checkpoint in view.moving
        if len(checkpoint.adapters) == len(now.adapters)
        and operator in view.received[checkpoint.adapters]
        and other not in view.received[checkpoint.adapters]
        and all(name in view.weights for name in checkpoint.adapters)
    ]


def _nearest_pair(
    view: View, now: Checkpoint, own: Sequence[Checkpoint], others: Sequence[Checkpoint]
) -> tuple[Checkpoint, Checkpoint]:
    """Returns the checkpoint of `own` that is nearest to `now` in time, and its counterpart among `others`."""
    nearest = _by_time(view, own, now)[0]
    candidates = _by_time(view, others, nearest)[:NEIGHBOURS]
    weights = view.load(name for checkpoint in [nearest, *candidates] for name in checkpoint.adapters)
    return nearest, min(candidates, key=lambda checkpoint: _distance(weights, nearest, checkpoint))


def collusion_channels(
    view: View, recompute: Recomputation, now: Checkpoint, rows: Sequence[Row]
) -> dict[ChannelId, Features]:
    """Returns differences of activations under adapters that different operators received at about the same step."""
    if len(rows) < MIN_TEXTS:
        return {}
    channels: dict[ChannelId, Features] = {}
    for name, (first, second) in counterparts(view, now).items():
        difference = recompute.hidden(view, first.adapters, rows) - recompute.hidden(view, second.adapters, rows)
        for i, vectors in enumerate(difference):
            adapter = i if len(difference) > 1 else None
            channels[ChannelId(ChannelKind.ACTIVATION, adapter=adapter, modifier=f"of {name}")] = vectors
    return channels


def extra_adapters(view: View, now: Checkpoint, *, means: bool) -> list[tuple[Adapter, ...]]:
    """Returns the adapters that `collusion_channels` and, with `means`, `mean_channels` recompute at a snapshot."""
    adapters: list[tuple[Adapter, ...]] = []
    for first, second in counterparts(view, now).values():
        adapters += [first.adapters, second.adapters]
    if means:
        adapters += mean_adapters(view, now).values()
    return adapters


def _by_time(view: View, checkpoints: Sequence[Checkpoint], to: Checkpoint) -> list[Checkpoint]:
    """Returns checkpoints sorted by their distance in time to one of them."""
    time = min(view.received[to.adapters].values())
    return sorted(checkpoints, key=lambda c: abs(min(view.received[c.adapters].values()) - time))


def _distance(weights: Mapping[str | Mean, Tensor], first: Checkpoint, second: Checkpoint) -> float:
    """Returns the sum of the distances between the weights of corresponding adapters."""
    pairs = zip(first.adapters, second.adapters, strict=True)
    return sum(float((weights[a] - weights[b]).norm()) for a, b in pairs)


def common_variates(left: Features, right: Features) -> Features:
    """Returns the sum `(N, 1)` of the first canonical variates of two adapters' features `(N, d)`.

    Adapters with independent masks have little in common except the task.
    """
    first, second = _unit_components(left), _unit_components(right)
    u, _, v = np.linalg.svd(first.T @ second)
    return ((first @ u[:, :1] + second @ v[:1].T) * len(left) ** 0.5).astype(np.float32)


def _unit_components(features: Features) -> NDArray[np.float64]:
    """Returns the leading components, each of length one."""
    scores = Channel(features).components(COMPONENTS)
    return scores / np.maximum(np.linalg.norm(scores, axis=0), 1e-30)


def travelled_channels(view: View, labels: Mapping[Row, int], step: int) -> Travelled:
    """Returns vectors that were sent up to this step, and what attacks on shares reconstruct from them.

    The vector of a text is the mean over all messages, which reduces noise.
    """
    sums: dict[ChannelId, dict[Row, Features]] = {}
    counts: dict[ChannelId, dict[Row, int]] = {}
    messages = [(sighting.rows, sighting.channels) for sighting in view.sightings if sighting.step <= step]
    for group in view.gradients:
        if group.step <= step:
            messages += [(group.rows, attack.function(group.shares)) for attack in SHARE_ATTACKS.values()]
    for rows, channels in messages:
        for channel, vectors in channels.items():
            total, count = sums.setdefault(channel, {}), counts.setdefault(channel, {})
            for row, vector in zip(rows, vectors, strict=True):
                if row in labels:
                    total[row] = total[row] + vector if row in total else vector
                    count[row] = count.get(row, 0) + 1
    final = step >= view.moving[-1].step
    return {
        channel: (np.stack([total / np.float32(counts[channel][row]) for row, total in totals.items()]), list(totals))
        for channel, totals in sums.items()
        if len(totals) >= (MIN_TEXTS if final else MIN_TRAVELLED)
    }


def beyond_text_channels(
    view: View, recompute: Recomputation, travelled: Mapping[ChannelId, tuple[Features, list[Row]]]
) -> Travelled:
    """Returns recombined gradients without the part that the texts explain (see `beyond_text`)."""
    channels: Travelled = {}
    for channel, (features, rows) in travelled.items():
        if channel.observes(ChannelKind.GRADIENT) and channel.modifier in RECOMBINATIONS and len(rows) >= MIN_TEXTS:
            residuals = beyond_text(features, recompute.hidden(view, (), rows)[0])
            channels[replace(channel, modifier=f"{channel.modifier} beyond the text")] = (residuals, rows)
    return channels


def beyond_text(features: Features, frozen: Features) -> Features:
    """Returns residuals `(N, d)` of a regression on the leading principal components of frozen features.

    Decoys move hidden states by functions of the text, and the regression removes these. The task's residual
    r_b = p_b − y_b remains, because the text doesn't explain it: the head already fits as much of y as it can.
    """
    leading = Channel(frozen).components(COMPONENTS)
    known = np.concatenate([np.ones((len(leading), 1)), leading / leading.std(0)], axis=1)
    return (features - known @ np.linalg.lstsq(known, features, rcond=None)[0]).astype(np.float32)


def inverted_channels(view: View, labels: Mapping[Row, int], recompute: Recomputation, count: int) -> Travelled:
    """Returns results of attacks on `count` updates: the first ones if the attack needs those, else evenly spaced."""
    updates = [update for update in view.updates() if any(row in labels for row in update.rows)]
    if not updates or count < 1:
        return {}
    spread = [updates[i] for i in np.unique(np.linspace(0, len(updates) - 1, count).round().astype(int))]
    first = _consecutive(updates)[:count]
    channels: Travelled = {}
    for attack in UPDATE_ATTACKS.values():
        features, rows = inverted(view, recompute, attack, first if attack.consecutive else spread, labels)
        if len(rows) >= MIN_TEXTS:
            channels[attack.channel] = (features, rows)
    return channels


def inverted(
    view: View, recompute: Recomputation, attack: UpdateAttack, updates: Sequence[Update], labels: Mapping[Row, int]
) -> tuple[Features, list[Row]]:
    """Returns the result of one attack on these updates: the mean for each text whose label is known."""

    def observed(update: Update) -> tuple[Jacobian, NDArray[np.float64]]:
        before = [view.adapter(name) for name in update.before]
        after = [view.adapter(name) for name in update.after]
        change = np.stack([(b - a).double().numpy() for a, b in zip(before, after, strict=True)])
        return recompute.jacobian(view, update.at, update.rows), change

    by_row: dict[Row, list[Features]] = {}
    for vector, row in zip(*attack.function(updates, observed), strict=True):
        if row in labels:
            by_row.setdefault(row, []).append(vector)
    means = [np.mean(vectors, axis=0, dtype=np.float32) for vectors in by_row.values()]
    return (np.stack(means) if means else np.empty((0, 0), np.float32)), list(by_row)


def _consecutive(updates: Sequence[Update]) -> list[Update]:
    """Returns the first updates, up to the first one that doesn't start where the one before it ended."""
    consecutive: list[Update] = []
    for update in updates:
        if consecutive and update.before != consecutive[-1].after:
            break
        consecutive.append(update)
    return consecutive
