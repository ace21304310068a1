"""Runs every attack on every channel over the training steps of one server's view."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from blindtune.audit.channels import (
    MIN_TEXTS,
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
from blindtune.audit.observe import Adapter, Checkpoint, Features, Row, View
from blindtune.audit.recompute import Memory, Recomputation
from blindtune.audit.statistics import CachedScores, Labels, Scores, best_auc, bootstrap_auc, mean_auc
from blindtune.errors import TranscriptError

FROZEN = "frozen model"
"""How channels begin that no label has anything to do with: what texts tell by themselves."""
SHUFFLED = f"{FROZEN}, shuffled adapter"
_LIBRARIES = ThreadpoolController()


@dataclass(frozen=True)
class Finding:
    """One attack on one channel at one step: AUC over `texts` examples.

    The worst moment of each attack on each channel has a 95% bootstrap interval. Probes with few labels have the mean
    over draws of the known texts, and the interval over draws.
    """

    operator: str
    channel: str
    attack: str
    knows: str
    step: int
    texts: int
    auc: float
    low: float | None = None
    high: float | None = None

    def interval(self) -> str:
        """`0.612 [0.58, 0.64]`."""
        return f"{self.auc:.3f}" + ("" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]")


@dataclass
class Plan:
    """What to attack: labels of known texts, how many points in time, at how many of them what costs more.

    That is the probe with all labels, and averages of adapters.

    Attributes:
        updates: how many optimizer steps to invert; each costs as much as twenty or more training steps.
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
    """All findings on one server, and the features that its report draws."""

    operator: str
    checkpoints: int
    texts: int
    memory: Memory = field(default_factory=Memory, repr=False)
    findings: list[Finding] = field(default_factory=list[Finding])
    pictures: dict[tuple[str, str], tuple[Features, Labels]] = field(
        default_factory=dict[tuple[str, str], tuple[Features, Labels]]
    )
    """`(channel, "early" or "late") -> features and labels`."""
    cached: list[CachedScores] = field(default_factory=list[CachedScores], repr=False)
    """Scores of the attacks without labels, for the null distribution of their maximum."""
    labels: dict[Hashable, int] = field(default_factory=dict[Hashable, int], repr=False)
    _worst: dict[tuple[str, str], tuple[Finding, Scores, NDArray[np.bool_]]] = field(
        default_factory=dict[tuple[str, str], tuple[Finding, Scores, NDArray[np.bool_]]], repr=False
    )
    """`(channel, attack) -> its best finding, with the scores and the class that gave it`."""

    def attack(
        self,
        name: str,
        step: int,
        channel: Channel,
        rows: Sequence[Hashable],
        labels: Labels,
        attacks: Sequence[Attack] | None = None,
    ) -> None:
        """Runs attacks (all if left out) on the channel `name`, whose vectors belong to the examples `rows`."""
        features = channel.features
        varies = float(np.abs(features - features.mean(0)).max()) > 1e-6 * max(1e-6, float(np.abs(features).max()))
        if not varies or len(np.unique(labels)) < 2:
            return
        digest = _digest(features, labels)
        for attack in attacks or ATTACKS.values():
            if not attack.fits(name):
                continue
            key = (attack.name, digest)
            if key not in self.memory:  # operators that see the same adapters see the same vectors
                with _LIBRARIES.limit(limits=1):  # threads slow matrices of this size down, up to twenty times
                    self.memory[key] = attack.run(channel, labels)
            scores = self.memory[key]
            if scores is None:
                continue
            finding = Finding(self.operator, name, attack.name, attack.knows, step, len(labels), 0.5)
            if scores.ndim == 3:
                value, low, high = mean_auc(scores, labels)
                self.findings.append(replace(finding, auc=value, low=low, high=high))
                continue
            value, label, column = best_auc(scores, labels, symmetric=attack.symmetric)
            finding = replace(finding, auc=value)
            self.findings.append(finding)
            worst = self._worst.get((name, attack.name))
            if worst is None or value > worst[0].auc:
                self._worst[name, attack.name] = (finding, scores[:, column], labels == label)
            if attack.unsupervised and not name.startswith(FROZEN):
                self.cached.append(CachedScores(rows, scores))
                self.labels.update(zip(rows, labels.tolist(), strict=True))

    def finish(self) -> None:
        """Adds intervals to the worst moments."""
        for found, scores, positive in self._worst.values():
            low, high = bootstrap_auc(scores, positive, symmetric=ATTACKS[found.attack].symmetric)
            self.findings[self.findings.index(found)] = replace(found, low=low, high=high)
        self._worst.clear()


def audited_checkpoints(view: View, points: int) -> list[Checkpoint]:
    """Points in time, evenly spread, the last one included; the very first one only if there is no other.

    Adapters that stand still are none.
    """
    count = len(view.moving)
    if count == 0:
        return []
    positions = np.unique(np.linspace(0, count - 1, points + 1).round().astype(int)[1:])
    return [view.moving[position] for position in positions]


def scored_rows(view: View, plan: Plan) -> list[Row]:
    """Texts with a known label, in order of first sight; a random sample of `max_texts` of them.

    Raises:
        TranscriptError: too few texts of this server have labels.
    """
    rows = [row for row in view.first_seen if row in plan.labels]
    if len(rows) < MIN_TEXTS or len({plan.labels[row] for row in rows}) < 2:
        raise TranscriptError(
            f"{len(rows)} of the {len(view.first_seen)} texts that {view.operator} saw have a label, "
            f"of {len({plan.labels[row] for row in rows})} classes; an audit needs {MIN_TEXTS} of two classes.",
            remedy="Give the labels of the texts that were trained on (--labels), with the same --text columns.",
        )
    if plan.max_texts is not None and len(rows) > plan.max_texts:
        kept = set(sorted(rows, key=_shuffled)[: plan.max_texts])  # the same texts for every server that saw them
        rows = [row for row in rows if row in kept]
    return rows


def attack_view(
    view: View, plan: Plan, recompute: Recomputation, on_cell: Callable[[], None] | None = None
) -> Attacked:
    """Attacks everything that this server could compute or was sent.

    The control is attacked as often: the same channels at the same looks, computed with adapters that have the received
    ones' weights in random order. The best of many attacks is good by luck, and better on texts that tell their labels.
    """
    rows = scored_rows(view, plan)
    checkpoints = audited_checkpoints(view, plan.points)
    recompute.ensure(view, [()], rows)
    chosen = np.linspace(len(checkpoints) - 1, 0, plan.probe_points if checkpoints else 0).round().astype(int)
    probed = {checkpoints[index].step for index in chosen}
    wanted: list[tuple[Adapter, ...]] = [checkpoint.adapters for checkpoint in [*view.moving[:1], *checkpoints]]
    if plan.control:
        wanted += [checkpoint.shuffled for checkpoint in [*view.moving[:1], *checkpoints]]
    for checkpoint in checkpoints:
        wanted += extra_adapters(view, checkpoint, means=checkpoint.step in probed)
    recompute.ensure(view, wanted, rows)
    frozen = recompute.hidden(view, (), rows)[0]
    result = Attacked(view.operator, len(view.checkpoints), len(rows), recompute.scores)
    previous: Checkpoint | None = None
    for checkpoint in checkpoints:
        late = checkpoint is checkpoints[-1]
        seen = set(view.rows_until(checkpoint.step))
        visible = [row for row in rows if row in seen]
        moments = {"every look": True, "some looks": checkpoint.step in probed, "last look": late}
        attacks = [a for a in ATTACKS.values() if moments[a.when]]
        earlier = {"the first step": view.moving[0], **({} if previous is None else {"the last look": previous})}
        received = {name: past.adapters for name, past in earlier.items()}
        computed = computed_channels(view, recompute, checkpoint.adapters, received, visible)
        computed |= collusion_channels(view, recompute, checkpoint, visible)
        if checkpoint.step in probed:
            computed |= mean_channels(view, recompute, checkpoint, visible)
        if plan.control:
            unknowing = {name: past.shuffled for name, past in earlier.items()}
            control = computed_channels(view, recompute, checkpoint.shuffled, unknowing, visible)
            computed |= {f"{SHUFFLED}: {name}": features for name, features in control.items()}
        gathered = travelled_channels(view, plan.labels, checkpoint.step)
        gathered |= beyond_text_channels(view, recompute, gathered)
        if late:
            gathered |= inverted_channels(view, plan.labels, recompute, plan.updates)
        gathered = {
            (f"{FROZEN}: {channel}" if _is_frozen(found, frozen, rows) else channel): found
            for channel, found in gathered.items()
        }
        for channel, (features, channel_rows) in _all(computed, visible, gathered):
            labels = _labels(plan, channel_rows)
            few = [a for a in attacks if a.knows in COUNTS.values()] if channel in gathered else []
            rest = [a for a in attacks if a not in few]
            result.attack(channel, checkpoint.step, _channel(plan, features), channel_rows, labels, rest)
            if few:  # on the texts that all other channels are attacked on, in their order: draws are the same
                same, same_rows = _of_rows(features, channel_rows, visible)
                result.attack(channel, checkpoint.step, _channel(plan, same), same_rows, _labels(plan, same_rows), few)
            if not channel.startswith(FROZEN) and (late or (channel, "early") not in result.pictures):
                result.pictures[channel, "late" if late else "early"] = (features, labels)
            if on_cell is not None:
                on_cell()
        previous = checkpoint
    result.attack(FROZEN, 0, _channel(plan, frozen), rows, _labels(plan, rows))
    result.pictures[FROZEN, "late"] = (frozen, _labels(plan, rows))
    result.finish()
    return result


def _of_rows(features: Features, rows: Sequence[Row], wanted: Sequence[Row]) -> tuple[Features, list[Row]]:
    """The vectors of those wanted texts that have one, in their order."""
    places = {row: place for place, row in enumerate(rows)}
    kept = [row for row in wanted if row in places]
    return features[[places[row] for row in kept]], kept


def _is_frozen(found: tuple[Features, list[Row]], frozen: Features, rows: Sequence[Row]) -> bool:
    """Whether vectors `(N, d)` that travelled are the pretrained model's, which no label has anything to do with."""
    features, kept = _of_rows(*found, rows)
    expected, _ = _of_rows(frozen, rows, kept)
    return len(kept) > 0 and features.shape == expected.shape and bool(np.allclose(features, expected, atol=1e-4))


def _digest(features: Features, labels: Labels) -> bytes:
    digest = hashlib.blake2b(np.ascontiguousarray(features).tobytes(), digest_size=16)
    digest.update(labels.tobytes())
    return digest.digest()


def _labels(plan: Plan, rows: Sequence[Row]) -> Labels:
    return np.array([plan.labels[row] for row in rows], dtype=np.int64)


def _channel(plan: Plan, features: Features) -> Channel:
    return Channel(features, len(set(plan.labels.values())))


def _shuffled(row: Row) -> bytes:
    """A sort key that has nothing to do with a text's content or place."""
    return hashlib.sha256(repr(row).encode()).digest()


def cells(view: View, plan: Plan) -> int:
    """About how many channels `attack_view` will attack, for a progress bar."""
    looks = audited_checkpoints(view, plan.points)
    if not looks:
        return 1
    n = len(looks[0].adapters)
    each = n * 9 + (10 if n > 1 else 0) + n * len(counterparts(view, looks[-1]))
    return each * len(looks) + 2 * n * min(plan.probe_points, len(looks)) + 1


def _all(
    computed: Mapping[str, Features], rows: list[Row], travelled: Mapping[str, tuple[Features, list[Row]]]
) -> Iterator[tuple[str, tuple[Features, list[Row]]]]:
    for channel, features in computed.items():
        yield channel, (features, rows)
    yield from travelled.items()
