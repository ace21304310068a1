"""Runs every attack on every channel over the training steps of one server's view."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from blindtune.audit.channel_id import FROZEN_MODEL, ChannelId, Control
from blindtune.audit.channels import (
    MIN_TEXTS,
    Travelled,
    beyond_text_channels,
    collusion_channels,
    computed_channels,
    counterparts,
    extra_adapters,
    inverted_channels,
    mean_channels,
    travelled_channels,
)
from blindtune.audit.labels import ATTACKS, Attack, Channel
from blindtune.audit.labels.few import COUNTS
from blindtune.audit.labels.registry import Knowledge, When
from blindtune.audit.observe import Adapter, Checkpoint, Features, Row, View
from blindtune.audit.recompute import Memory, Recomputation
from blindtune.audit.statistics import CachedScores, Labels, Scores, best_auc, bootstrap_auc, mean_auc
from blindtune.errors import TranscriptError

_LIBRARIES = ThreadpoolController()


@dataclass(frozen=True)
class Finding:
    """Holds the AUC of one attack on one channel at one step, over `texts` examples.

    `low` and `high` are the 95% bootstrap interval. For each attack on each channel, only the step with the highest AUC
    has one. For probes with few labels, `auc` is the mean over draws of the known texts; the interval is over draws.
    """

    operator: str
    channel: ChannelId
    attack: str
    knows: Knowledge
    step: int
    texts: int
    auc: float
    low: float | None = None
    high: float | None = None

    def interval(self) -> str:
        """Formats the AUC with its interval, as `0.612 [0.58, 0.64]`."""
        return f"{self.auc:.3f}" + ("" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]")

    def to_json(self) -> dict[str, Any]:
        """Returns all fields, with channel and knowledge as text."""
        return {**asdict(self), "channel": str(self.channel), "knows": str(self.knows)}


@dataclass
class Plan:
    """Configures the attacks on one server's view.

    Attributes:
        labels: label of each text that is scored.
        points: number of snapshots to attack, spread evenly over the run.
        probe_points: number of snapshots at which expensive attacks run too: the probe with all labels, and averages of
            adapters.
        max_texts: maximum number of texts to attack; all if None.
        updates: number of optimizer steps to invert. Each one costs as much as twenty or more training steps.
        control: whether shuffled adapters are attacked too, which takes half of the time.
    """

    labels: Mapping[Row, int]
    points: int = 8
    probe_points: int = 3
    max_texts: int | None = None
    updates: int = 0
    control: bool = True


@dataclass
class Attacked:
    """Holds all findings on one server, and the features that its report plots.

    Attributes:
        pictures: features and labels to plot, by channel and by "early" or "late".
        cached: scores of the attacks without labels, for the null distribution of their maximum.
    """

    operator: str
    checkpoints: int
    texts: int
    memory: Memory = field(default_factory=Memory, repr=False)
    findings: list[Finding] = field(default_factory=list[Finding])
    pictures: dict[tuple[ChannelId, str], tuple[Features, Labels]] = field(
        default_factory=dict[tuple[ChannelId, str], tuple[Features, Labels]]
    )
    cached: list[CachedScores] = field(default_factory=list[CachedScores], repr=False)
    labels: dict[Hashable, int] = field(default_factory=dict[Hashable, int], repr=False)
    _strongest: dict[tuple[ChannelId, str], tuple[Finding, Scores, NDArray[np.bool_]]] = field(
        default_factory=dict[tuple[ChannelId, str], tuple[Finding, Scores, NDArray[np.bool_]]], repr=False
    )
    """For each channel and attack: the finding with the highest AUC, its scores, and the texts of the scored class."""

    def attack(
        self,
        channel_id: ChannelId,
        step: int,
        channel: Channel,
        rows: Sequence[Hashable],
        labels: Labels,
        attacks: Sequence[Attack] | None = None,
    ) -> None:
        """Runs attacks (all if None) on a channel whose vectors belong to the examples `rows`."""
        features = channel.features
        varies = float(np.abs(features - features.mean(0)).max()) > 1e-6 * max(1e-6, float(np.abs(features).max()))
        if not varies or len(np.unique(labels)) < 2:
            return
        digest = _digest(features, labels)
        for attack in attacks or ATTACKS.values():
            if not attack.fits(channel_id):
                continue
            key = (attack.name, digest)
            if key not in self.memory:  # operators with the same adapters have the same vectors
                with _LIBRARIES.limit(limits=1):  # on matrices of this size, threads are up to 20 times slower
                    self.memory[key] = attack.run(channel, labels)
            scores = self.memory[key]
            if scores is None:
                continue
            finding = Finding(self.operator, channel_id, attack.name, attack.knows, step, len(labels), 0.5)
            if scores.ndim == 3:
                value, low, high = mean_auc(scores, labels)
                self.findings.append(replace(finding, auc=value, low=low, high=high))
                continue
            value, label, column = best_auc(scores, labels, symmetric=attack.symmetric)
            finding = replace(finding, auc=value)
            self.findings.append(finding)
            strongest = self._strongest.get((channel_id, attack.name))
            if strongest is None or value > strongest[0].auc:
                self._strongest[channel_id, attack.name] = (finding, scores[:, column], labels == label)
            if attack.unsupervised and not channel_id.is_control:
                self.cached.append(CachedScores(rows, scores))
                self.labels.update(zip(rows, labels.tolist(), strict=True))

    def finish(self) -> None:
        """Adds an interval to the best finding of each attack on each channel."""
        for finding, scores, positive in self._strongest.values():
            low, high = bootstrap_auc(scores, positive, symmetric=ATTACKS[finding.attack].symmetric)
            self.findings[self.findings.index(finding)] = replace(finding, low=low, high=high)
        self._strongest.clear()


def audited_checkpoints(view: View, points: int) -> list[Checkpoint]:
    """Returns up to `points` evenly spaced checkpoints of `view.moving`, with the last one.

    The first checkpoint is left out unless it is the only one.
    """
    count = len(view.moving)
    if count == 0:
        return []
    positions = np.unique(np.linspace(0, count - 1, points + 1).round().astype(int)[1:])
    return [view.moving[position] for position in positions]


def scored_rows(view: View, plan: Plan) -> list[Row]:
    """Returns texts with a known label, in the order of their first receipt; at most a random sample of `max_texts`.

    Raises:
        TranscriptError: too few texts of this server have labels.
    """
    rows = [row for row in view.first_seen if row in plan.labels]
    if len(rows) < MIN_TEXTS or len({plan.labels[row] for row in rows}) < 2:
        raise TranscriptError(
            f"{len(rows)} of the {len(view.first_seen)} texts that {view.operator} saw have a label, "
            f"of {len({plan.labels[row] for row in rows})} classes; an audit needs {MIN_TEXTS} texts of two classes.",
            remedy="Give the labels of the texts that were trained on (--labels), with the same --text columns.",
        )
    if plan.max_texts is not None and len(rows) > plan.max_texts:
        kept = set(sorted(rows, key=_random_key)[: plan.max_texts])  # the same texts for every server
        rows = [row for row in rows if row in kept]
    return rows


def attack_view(
    view: View, plan: Plan, recompute: Recomputation, on_cell: Callable[[], None] | None = None
) -> Attacked:
    """Attacks every channel that this server could compute, or whose vectors were sent.

    The same channels of the control are attacked at the same snapshots. The control is the same adapters with their
    weights in random order. The highest AUC of many attacks exceeds 0.5 by chance, and exceeds it further if the texts
    alone reveal their labels; the control measures both effects.
    """
    rows = scored_rows(view, plan)
    snapshots = audited_checkpoints(view, plan.points)
    recompute.ensure(view, [()], rows)
    positions = np.linspace(len(snapshots) - 1, 0, plan.probe_points if snapshots else 0).round().astype(int)
    probed = {snapshots[position].step for position in positions}
    recompute.ensure(view, _adapters(view, plan, snapshots, probed), rows)
    frozen = recompute.hidden(view, (), rows)[0]
    result = Attacked(view.operator, len(view.checkpoints), len(rows), recompute.scores)
    previous: Checkpoint | None = None
    for snapshot in snapshots:
        last = snapshot is snapshots[-1]
        received = set(view.rows_until(snapshot.step))
        visible = [row for row in rows if row in received]
        due: dict[When, bool] = {
            "every snapshot": True,
            "some snapshots": snapshot.step in probed,
            "last snapshot": last,
        }
        attacks = [attack for attack in ATTACKS.values() if due[attack.when]]
        computed = _computed(view, plan, recompute, snapshot, previous, visible, means=snapshot.step in probed)
        travelled = _travelled(view, plan, recompute, snapshot, frozen, rows, last=last)
        channels = {channel_id: (features, visible) for channel_id, features in computed.items()} | travelled
        for channel_id, (features, channel_rows) in channels.items():
            labels = _labels(plan, channel_rows)
            few = [a for a in attacks if a.knows in COUNTS.values()] if channel_id in travelled else []
            others = [a for a in attacks if a not in few]
            result.attack(channel_id, snapshot.step, _channel(plan, features), channel_rows, labels, others)
            if few:  # on the texts of the computed channels, in the same order, so that the draws are the same
                same, same_rows = _of_rows(features, channel_rows, visible)
                same_labels = _labels(plan, same_rows)
                result.attack(channel_id, snapshot.step, _channel(plan, same), same_rows, same_labels, few)
            if not channel_id.is_control and (last or (channel_id, "early") not in result.pictures):
                result.pictures[channel_id, "late" if last else "early"] = (features, labels)
            if on_cell is not None:
                on_cell()
        previous = snapshot
    result.attack(FROZEN_MODEL, 0, _channel(plan, frozen), rows, _labels(plan, rows))
    result.pictures[FROZEN_MODEL, "late"] = (frozen, _labels(plan, rows))
    result.finish()
    return result


def _adapters(view: View, plan: Plan, snapshots: Sequence[Checkpoint], probed: set[int]) -> list[tuple[Adapter, ...]]:
    """Returns all adapters that the attacks on these snapshots recompute."""
    checkpoints = [*view.moving[:1], *snapshots]
    adapters: list[tuple[Adapter, ...]] = [checkpoint.adapters for checkpoint in checkpoints]
    if plan.control:
        adapters += [checkpoint.shuffled for checkpoint in checkpoints]
    for snapshot in snapshots:
        adapters += extra_adapters(view, snapshot, means=snapshot.step in probed)
    return adapters


def _computed(
    view: View,
    plan: Plan,
    recompute: Recomputation,
    snapshot: Checkpoint,
    previous: Checkpoint | None,
    rows: list[Row],
    *,
    means: bool,
) -> dict[ChannelId, Features]:
    """Returns the channels that the server can compute at one snapshot, and the same channels of shuffled adapters."""
    earlier = {"the first step": view.moving[0]}
    if previous is not None:
        earlier["the previous snapshot"] = previous
    own = {name: checkpoint.adapters for name, checkpoint in earlier.items()}
    channels = computed_channels(view, recompute, snapshot.adapters, own, rows)
    channels |= collusion_channels(view, recompute, snapshot, rows)
    if means:
        channels |= mean_channels(view, recompute, snapshot, rows)
    if plan.control:
        shuffled = {name: checkpoint.shuffled for name, checkpoint in earlier.items()}
        control = computed_channels(view, recompute, snapshot.shuffled, shuffled, rows)
        for channel_id, features in control.items():
            channels[replace(channel_id, control=Control.SHUFFLED)] = features
    return channels


def _travelled(
    view: View,
    plan: Plan,
    recompute: Recomputation,
    snapshot: Checkpoint,
    frozen: Features,
    rows: Sequence[Row],
    *,
    last: bool,
) -> Travelled:
    """Returns the channels whose vectors were sent or reconstructed. Marks those of the frozen model as controls.

    Args:
        frozen, rows: hidden states of the frozen model, and their texts.
    """
    channels = travelled_channels(view, plan.labels, snapshot.step)
    channels |= beyond_text_channels(view, recompute, channels)
    if last:
        channels |= inverted_channels(view, plan.labels, recompute, plan.updates)
    marked: Travelled = {}
    for channel_id, (features, channel_rows) in channels.items():
        if _is_frozen(features, channel_rows, frozen, rows):
            channel_id = replace(channel_id, control=Control.FROZEN)
        marked[channel_id] = (features, channel_rows)
    return marked


def _of_rows(features: Features, rows: Sequence[Row], wanted: Sequence[Row]) -> tuple[Features, list[Row]]:
    """Returns the vectors of the wanted texts that have one, in the order of the wanted texts."""
    index_of = {row: index for index, row in enumerate(rows)}
    kept = [row for row in wanted if row in index_of]
    return features[[index_of[row] for row in kept]], kept


def _is_frozen(features: Features, rows: Sequence[Row], frozen: Features, frozen_rows: Sequence[Row]) -> bool:
    """Returns whether vectors `(N, d)` that were sent equal those of the pretrained model, which depend on no label."""
    sent, kept = _of_rows(features, rows, frozen_rows)
    expected, _ = _of_rows(frozen, frozen_rows, kept)
    return len(kept) > 0 and sent.shape == expected.shape and bool(np.allclose(sent, expected, atol=1e-4))


def _digest(features: Features, labels: Labels) -> bytes:
    digest = hashlib.blake2b(np.ascontiguousarray(features).tobytes(), digest_size=16)
    digest.update(labels.tobytes())
    return digest.digest()


def _labels(plan: Plan, rows: Sequence[Row]) -> Labels:
    return np.array([plan.labels[row] for row in rows], dtype=np.int64)


def _channel(plan: Plan, features: Features) -> Channel:
    return Channel(features, len(set(plan.labels.values())))


def _random_key(row: Row) -> bytes:
    """Returns a sort key that looks random: it does not depend on the order or the meaning of texts."""
    return hashlib.sha256(repr(row).encode()).digest()


def cells(view: View, plan: Plan) -> int:
    """Returns the approximate number of channels that `attack_view` will attack, for a progress bar."""
    snapshots = audited_checkpoints(view, plan.points)
    if not snapshots:
        return 1
    n = len(snapshots[0].adapters)
    each = n * 9 + (10 if n > 1 else 0) + n * len(counterparts(view, snapshots[-1]))
    return each * len(snapshots) + 2 * n * min(plan.probe_points, len(snapshots)) + 1
