"""The channels of one look at one server: vectors for texts that it computed, was sent, or reconstructed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from blindtune.audit.labels import SHARE_ATTACKS, UPDATE_ATTACKS, Channel
from blindtune.audit.labels.registry import COMPONENTS
from blindtune.audit.observe import Checkpoint, Features, Row, Update, View
from blindtune.audit.recompute import Jacobian, Recomputation

MIN_TEXTS = 50
CANONICAL_COMPONENTS = 10
MIN_TRAVELLED = 1000
"""Vectors that travelled are pooled over steps until there are so many (if there are): fewer say little."""


def computed_channels(
    view: View, recompute: Recomputation, now: Checkpoint, previous: Checkpoint | None, rows: Sequence[Row]
) -> dict[str, Features]:
    """Activations, shifts from θ = 0 and from earlier checkpoints, joints over adapters, and their differences."""
    if len(rows) < MIN_TEXTS:
        return {}
    hidden = recompute.hidden(view, now.adapters, rows)  # (n, N, d)
    frozen = recompute.hidden(view, (), rows)[0]
    channels: dict[str, Features] = {}
    references = {"": frozen}
    first = view.checkpoints[0]
    if now.step != first.step and len(first.adapters) == len(hidden):
        start = recompute.hidden(view, first.adapters, rows)
        if not np.allclose(start, frozen, atol=1e-4):  # adapters usually begin without effect
            references[" since the first step"] = start
    if previous is not None and len(previous.adapters) == len(hidden):
        references[" since the last look"] = recompute.hidden(view, previous.adapters, rows)
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


def common_variates(left: Features, right: Features) -> Features:
    """What two adapters' features `(N, d)` have in common: the first canonical variates' sum, `(N, 1)`.

    Adapters with independent disguises share little but the task (canonical correlation of the leading components).
    """
    scores: list[Features] = []
    for features in (left, right):
        centred = features - features.mean(0)
        leading = np.linalg.svd(centred, full_matrices=False)[0][:, :CANONICAL_COMPONENTS]
        scores.append(leading.astype(np.float32))
    u, _, v = np.linalg.svd(scores[0].T @ scores[1])
    return (scores[0] @ u[:, :1] + scores[1] @ v[:1].T) * np.float32(len(left) ** 0.5)


def travelled_channels(view: View, labels: Mapping[Row, int], step: int) -> dict[str, tuple[Features, list[Row]]]:
    """Vectors that were really sent up to this step, for each text the mean of all of them: noise averages out.

    Among them what attacks on shares make of them.
    """
    sums: dict[str, dict[Row, Features]] = {}
    counts: dict[str, dict[Row, int]] = {}
    sighted = [(s.rows, s.channels) for s in view.sightings if s.step <= step]
    for met in view.gradients:
        if met.step <= step:
            sighted += [(met.rows, reconstruct(met.shares)) for reconstruct in SHARE_ATTACKS.values()]
    for rows, channels in sighted:
        for channel, vectors in channels.items():
            total, count = sums.setdefault(channel, {}), counts.setdefault(channel, {})
            for row, vector in zip(rows, vectors, strict=True):
                if row in labels:
                    total[row] = total[row] + vector if row in total else vector
                    count[row] = count.get(row, 0) + 1
    final = step == view.checkpoints[-1].step
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
    """What attacks on updates make of `count` of them, evenly spread over the run: the mean for each text."""
    updates = [update for update in view.updates() if any(row in labels for row in update.rows)]
    if not updates or count < 1:
        return {}
    chosen = [updates[i] for i in np.unique(np.linspace(0, len(updates) - 1, count).round().astype(int))]

    def observed(update: Update) -> tuple[Jacobian, NDArray[np.float64]]:
        before, after = ([view.adapter(name) for name in names] for names in (update.before, update.after))
        change = np.stack([(b - a).double().numpy() for a, b in zip(before, after, strict=True)])
        return recompute.jacobian(view, update.before, update.rows), change

    channels: dict[str, tuple[Features, list[Row]]] = {}
    for channel, invert in UPDATE_ATTACKS.items():
        vectors, rows = invert(chosen, observed)
        by_row: dict[Row, list[Features]] = {}
        for row, vector in zip(rows, vectors, strict=True):
            if row in labels:
                by_row.setdefault(row, []).append(vector)
        if len(by_row) >= MIN_TEXTS:
            means = [np.mean(found, axis=0, dtype=np.float32) for found in by_row.values()]
            channels[channel] = (np.stack(means), list(by_row))
    return channels
