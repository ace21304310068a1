"""Runs every attack on every channel over the training steps of one server's view."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from blindtune.audit.labels import ATTACKS, Attack
from blindtune.audit.observe import Checkpoint, Features, Memory, Recomputation, Row, View
from blindtune.audit.statistics import Labels, Scores, best_auc, bootstrap_auc
from blindtune.errors import TranscriptError

MIN_TEXTS = 50
CANONICAL_COMPONENTS = 10
MIN_TRAVELLED = 1000
"""Vectors that travelled are pooled over steps until there are so many (if there are): fewer say little."""
FROZEN = "frozen model"


@dataclass(frozen=True)
class Finding:
    """One attack on one channel at one step: AUC over `texts` examples.

    The worst moment of each attack on each channel has a 95% bootstrap interval.
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
    """What to attack: labels of known texts, how many points in time, at how many of them the costly probe."""

    labels: Mapping[Row, int]
    points: int = 8
    probe_points: int = 3
    max_texts: int | None = None


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
    _worst: dict[tuple[str, str], tuple[Finding, Scores, NDArray[np.bool_]]] = field(
        default_factory=dict[tuple[str, str], tuple[Finding, Scores, NDArray[np.bool_]]], repr=False
    )
    """`(channel, attack) -> its best finding, with the scores and the class that gave it`."""

    def add(self, attack: Attack, channel: str, step: int, features: Features, labels: Labels) -> None:
        """Runs one attack on one channel, unless equal vectors were attacked before."""
        key = (attack.name, _digest(features, labels))
        if key not in self.memory:
            self.memory[key] = attack.run(features, labels)
        scores = self.memory[key]
        value, label, column = best_auc(scores, labels, symmetric=attack.symmetric)
        finding = Finding(self.operator, channel, attack.name, attack.knows, step, len(labels), value)
        self.findings.append(finding)
        worst = self._worst.get((channel, attack.name))
        if worst is None or value > worst[0].auc:
            self._worst[channel, attack.name] = (finding, scores[:, column], labels == label)

    def finish(self) -> None:
        """Adds intervals to the worst moments."""
        for found, scores, positive in self._worst.values():
            low, high = bootstrap_auc(scores, positive, symmetric=ATTACKS[found.attack].symmetric)
            self.findings[self.findings.index(found)] = replace(found, low=low, high=high)
        self._worst.clear()


def audited_checkpoints(view: View, points: int) -> list[Checkpoint]:
    """Points in time, evenly spread, the last one included; the very first one only if there is no other."""
    count = len(view.checkpoints)
    if count == 0:
        return []
    positions = np.unique(np.linspace(0, count - 1, points + 1).round().astype(int)[1:])
    return [view.checkpoints[position] for position in positions]


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
    """Attacks everything that this server could compute or was sent."""
    rows = scored_rows(view, plan)
    checkpoints = audited_checkpoints(view, plan.points)
    recompute.ensure(view, [()], rows)
    wanted = [view.checkpoints[0].adapters, *(c.adapters for c in checkpoints)] if checkpoints else []
    recompute.ensure(view, wanted, rows)
    result = Attacked(view.operator, len(view.checkpoints), len(rows), recompute.scores)
    probed = {checkpoints[i].step for i in np.linspace(len(checkpoints) - 1, 0, plan.probe_points).round().astype(int)}
    previous: Checkpoint | None = None
    for checkpoint in checkpoints:
        seen = set(view.rows_until(checkpoint.step))
        visible = [row for row in rows if row in seen]
        attacks = [a for a in ATTACKS.values() if a.symmetric or checkpoint.step in probed]
        computed = _computed_channels(view, recompute, checkpoint, previous, visible)
        travelled = _travelled_channels(view, plan, checkpoint.step)
        for channel, (features, channel_rows) in _all(computed, visible, travelled):
            labels = np.array([plan.labels[row] for row in channel_rows], dtype=np.int64)
            _attack_channel(result, channel, checkpoint.step, features, labels, attacks, on_cell)
            when = "late" if checkpoint is checkpoints[-1] else "early"
            if when == "late" or (channel, "early") not in result.pictures:
                result.pictures[channel, when] = (features, labels)
        previous = checkpoint
    frozen = recompute.hidden(view, (), rows)[0]
    labels = np.array([plan.labels[row] for row in rows], dtype=np.int64)
    _attack_channel(result, FROZEN, 0, frozen, labels, list(ATTACKS.values()), on_cell)
    result.pictures[FROZEN, "late"] = (frozen, labels)
    result.finish()
    return result


def _digest(features: Features, labels: Labels) -> bytes:
    digest = hashlib.blake2b(np.ascontiguousarray(features).tobytes(), digest_size=16)
    digest.update(labels.tobytes())
    return digest.digest()


def _shuffled(row: Row) -> bytes:
    """A sort key that has nothing to do with a text's content or place."""
    return hashlib.sha256(repr(row).encode()).digest()


def cells(view: View, plan: Plan) -> int:
    """About how many channels `attack_view` will attack, for a progress bar."""
    n = len(view.checkpoints[0].adapters) if view.checkpoints else 0
    each = n * 5 + (5 if n > 1 else 0)
    return each * len(audited_checkpoints(view, plan.points)) + 1


def _computed_channels(
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


def _travelled_channels(view: View, plan: Plan, step: int) -> dict[str, tuple[Features, list[Row]]]:
    """Vectors that were really sent up to this step, for each text the mean of all of them: noise averages out."""
    sums: dict[str, dict[Row, Features]] = {}
    counts: dict[str, dict[Row, int]] = {}
    for sighting in view.sightings:
        if sighting.step > step:
            continue
        for channel, vectors in sighting.channels.items():
            total, count = sums.setdefault(channel, {}), counts.setdefault(channel, {})
            for row, vector in zip(sighting.rows, vectors, strict=True):
                if row in plan.labels:
                    total[row] = total[row] + vector if row in total else vector
                    count[row] = count.get(row, 0) + 1
    final = step == view.checkpoints[-1].step
    return {
        channel: (np.stack([vector / np.float32(counts[channel][row]) for row, vector in known.items()]), list(known))
        for channel, known in sums.items()
        if len(known) >= (MIN_TEXTS if final else MIN_TRAVELLED)
    }


def _all(
    computed: Mapping[str, Features], rows: list[Row], travelled: Mapping[str, tuple[Features, list[Row]]]
) -> Iterator[tuple[str, tuple[Features, list[Row]]]]:
    for channel, features in computed.items():
        yield channel, (features, rows)
    yield from travelled.items()


def _attack_channel(
    result: Attacked,
    channel: str,
    step: int,
    features: Features,
    labels: Labels,
    attacks: Sequence[Attack],
    on_cell: Callable[[], None] | None,
) -> None:
    varies = float(np.abs(features - features.mean(0)).max()) > 1e-6 * max(1e-6, float(np.abs(features).max()))
    if varies and len(np.unique(labels)) > 1:
        for attack in attacks:
            result.add(attack, channel, step, features, labels)
    if on_cell is not None:
        on_cell()
