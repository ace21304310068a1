"""Padded adapters: what one operator can do with what it received, and what two that collude can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from blindtune.audit import Plan, Recomputation, View, attack_view, audited_checkpoints, cells, join_views
from blindtune.audit.channel_id import ChannelId, ChannelKind
from blindtune.audit.channels import (
    collusion_channels,
    computed_channels,
    counterparts,
    inverted_channels,
    mean_adapters,
    mean_channels,
    travelled_channels,
)
from blindtune.audit.labels import ATTACKS, Channel
from blindtune.audit.labels.inversion import INVERTED
from blindtune.audit.observe import Mean
from blindtune.audit.recompute import adapter_weights
from blindtune.audit.statistics import best_auc
from tests.audit.padded import BATCH, Task, record, slowly, trained_by_sgd

SIZE, STEPS = 4 * BATCH, 48
PROPER, WEAK = 0.01, 3e-5
"""Standard deviations of pads: one that hides δ for many steps, and one that hides it in a single step."""
AVERAGES = ("shift 0 of the mean adapter", "shift 0 of the recent mean adapter")
SHIFT = ChannelId(ChannelKind.SHIFT, adapter=0)
BASE_SENT = "sent activation 0 at the base"


@pytest.fixture(scope="module")
def task(tiny_backbone, film_sentences) -> Task:
    return Task(tiny_backbone("bert"), film_sentences[: 3 * SIZE], SIZE)


@pytest.fixture(scope="module")
def views(task, tmp_path_factory) -> Callable[[float], list[View]]:
    """`views(sigma)`: of operators A and B, by the standard deviation of the pads."""
    known: dict[float, list[View]] = {}

    def run(sigma: float) -> list[View]:
        if sigma not in known:
            known[sigma] = record(task, tmp_path_factory.mktemp("padded"), slowly(task.update, STEPS), sigma)
        return known[sigma]

    return run


@pytest.fixture(scope="module")
def recompute(task) -> Recomputation:
    return Recomputation(task.backbone)


def best(features: np.ndarray, truth: np.ndarray) -> float:
    """Of the attacks without labels."""
    runs = [attack.run(Channel(features), truth) for attack in ATTACKS.values() if attack.unsupervised]
    return max(best_auc(run, truth, symmetric=True)[0] for run in runs)


def at_last_snapshot(task: Task, view: View, recompute: Recomputation) -> dict[str, float]:
    """The best attack on each channel that is recomputed at the last snapshot; the one before is half-way."""
    now, rows = view.moving[-1], [row.ids for row in task.rows]
    earlier = {
        "the first step": view.moving[0].adapters,
        "the previous snapshot": view.moving[len(view.moving) // 2].adapters,
    }
    found = computed_channels(view, recompute, now.adapters, earlier, rows)
    found |= mean_channels(view, recompute, now, rows) | collusion_channels(view, recompute, now, rows)
    return {str(channel): best(features, task.truth.numpy()) for channel, features in found.items()}


def travelled(task: Task, view: View) -> dict[str, float]:
    """The best attack on each channel that was sent, or that shares make."""
    found = travelled_channels(view, task.labels, view.moving[-1].step)
    return {
        str(channel): best(vectors, np.array([task.labels[row] for row in rows]))
        for channel, (vectors, rows) in found.items()
    }


def timed(view: View, seconds: float) -> View:
    """With three calls in every ten seconds, on a clock that is ahead by so many."""
    calls = [replace(c, time=10.0 * (i // 3) + i % 3 + seconds) for i, c in enumerate(view.calls)]
    return View(view.operator, view.transcript, view.model, view.readout, view.spec, calls, view.weights)


def test_without_pads_a_shift_tells_the_labels(task, views, recompute):
    assert at_last_snapshot(task, views(0.0)[0], recompute)["shift 0"] > 0.95


def test_proper_pads_hide_a_small_update_from_either_operator(task, views, recompute):
    for view in views(PROPER):
        found = at_last_snapshot(task, view, recompute)
        assert found.keys() >= {"shift 0", "shift 0 since the previous snapshot", *AVERAGES}
        assert max(found.values()) < 0.7


def test_pads_that_are_too_small_average_out(task, views, recompute):
    for view in views(WEAK):
        found = at_last_snapshot(task, view, recompute)
        assert found["shift 0"] < 0.75
        assert min(found[name] for name in AVERAGES) > 0.9


def test_averages_are_over_all_adapters_so_far_and_over_the_latter_half(views):
    view = views(PROPER)[0]
    now = view.moving[8]
    found = mean_adapters(view, now)
    assert [found[name] for name in ("mean adapter", "recent mean adapter")] == [
        (Mean(tuple(c.adapters[0] for c in view.moving[start:9])),) for start in (0, 4)
    ]
    assert mean_adapters(view, view.moving[0]) == {}
    [mean] = found["recent mean adapter"]
    loaded = view.load([mean, mean.of[0], *found["mean adapter"]])
    expected = torch.stack([view.adapter(name) for name in mean.of]).mean(0)
    torch.testing.assert_close(loaded[mean], expected)
    torch.testing.assert_close(view.adapter(mean), expected)
    assert torch.equal(loaded[mean.of[0]], view.adapter(mean.of[0]))


def test_shuffled_adapters_are_as_large_and_know_nothing(task, views, recompute):
    view = views(0.0)[0]
    now, rows = view.moving[-1], [row.ids for row in task.rows]
    [name], [control] = now.adapters, now.shuffled
    layout = recompute.layout(view)
    own, shuffled = adapter_weights(view, layout, [name, control])
    matrices = zip(layout.split(own).values(), layout.split(shuffled).values(), strict=True)
    assert len({b.shape for _, b in layout.split(own).values()}) > 1
    for (_, b), (_, of_control) in matrices:  # A is fixed
        assert torch.equal(b.flatten().sort().values, of_control.flatten().sort().values)
        assert not torch.equal(b, of_control)
    assert torch.equal(adapter_weights(view, layout, [control])[0], shuffled)  # the same for everybody
    found = computed_channels(view, recompute, now.shuffled, {}, rows)
    assert best(found[SHIFT], task.truth.numpy()) < 0.75  # where the adapter itself tells all, see above


def test_operators_that_collude_take_the_pads_off(task, views, recompute):
    found = at_last_snapshot(task, join_views(views(PROPER)), recompute)
    assert found.pop("activation of A minus B") > 0.95
    assert max(found.values()) < 0.7


@pytest.mark.parametrize("seconds", [-14, 0.1, 14])
def test_adapters_with_one_pad_are_found_although_clocks_differ(views, seconds):
    one, other = views(PROPER)
    alike = {a.adapters: b.adapters for a, b in zip(one.moving, other.moving, strict=True)}
    joint = join_views([timed(one, 0), timed(other, seconds)])
    for now in joint.moving[8:-8]:
        a, b = counterparts(joint, now)["A minus B"]
        assert now in (a, b)
        assert alike[a.adapters] == b.adapters
    assert [len(group.shares) for group in joint.gradients] == [2] * STEPS


def test_the_audit_of_colluding_operators_finds_the_labels(task, views, recompute):
    plan = Plan(task.labels, points=3, probe_points=2)
    joint = join_views(views(PROPER))
    ticks: list[int] = []
    attacked = attack_view(joint, plan, recompute, lambda: ticks.append(1))
    found = {str(f.channel): f.auc for f in sorted(attacked.findings, key=lambda f: f.auc) if f.knows == "nothing"}
    assert found["activation of A minus B"] > 0.95
    assert found["gradient recombined"] > 0.95
    averaged = {f.step for f in attacked.findings if str(f.channel) == AVERAGES[0]}
    assert averaged == {joint.moving[position].step for position in (32, 95)}  # of three snapshots
    assert 0.5 < cells(joint, plan) / len(ticks) < 1.5


def test_the_audit_of_one_operator_finds_nothing(task, views, recompute):
    attacked = attack_view(views(PROPER)[1], Plan(task.labels, points=3, probe_points=2), recompute)
    assert max(f.auc for f in attacked.findings if f.knows == "nothing") < 0.7
    assert {str(f.channel) for f in attacked.findings} >= set(AVERAGES)


def test_what_knows_no_label_is_a_control(task, views, recompute):
    """h(x, 0) as it was sent is the frozen model's; and few known labels are tried on the same texts everywhere."""
    most = len(task.labels) - 10
    found = attack_view(views(PROPER)[0], Plan(task.labels, 2, 1, max_texts=most), recompute).findings
    labels = {str(f.channel) for f in found}
    assert f"frozen model: {BASE_SENT}" in labels
    assert BASE_SENT not in labels
    probes = [f for f in found if f.knows == "16 labels"]
    assert {f.channel.observes(ChannelKind.SENT_ACTIVATION) for f in probes} == {True, False}
    assert {f.texts for f in probes} == {most}
    assert {f.texts for f in found if str(f.channel) == "gradient 0" and f.knows == "nothing"} == {most + 10}


def test_a_step_is_the_newest_adapters_although_gradients_are_at_fixed_ones(views):
    view = views(PROPER)[0]
    assert len(view.checkpoints) == STEPS + 1
    [base] = [c for c in view.checkpoints if c not in view.moving]
    assert base.step == 1
    assert [g.adapters for g in view.gradients] == [base.adapters] * STEPS
    assert [g.step for g in view.gradients] == list(range(1, STEPS + 1))
    assert sorted(set(view.first_seen.values())) == [0, 2, 3, 4]  # one epoch
    assert audited_checkpoints(view, STEPS - 1) == view.moving[1:]


def test_two_epochs_are_two_gradients_and_not_two_shares_of_one(views):
    for view in views(PROPER):
        assert [g.shares.shape[:2] for g in view.gradients] == [(1, 1)] * STEPS
    joint = join_views(views(PROPER))
    assert [g.shares.shape[:2] for g in joint.gradients] == [(2, 1)] * STEPS
    assert len({g.step for g in joint.gradients}) == STEPS


def test_colluding_operators_recombine_the_shares_of_every_step(task, views):
    assert travelled(task, join_views(views(PROPER)))["gradient recombined"] > 0.95
    for view in views(PROPER):
        alone = travelled(task, view)
        assert alone.keys() == {"sent activation 0", "gradient 0"} | ({BASE_SENT} if view.operator == "A" else set())
        assert max(alone.values()) < 0.7


def test_updates_are_of_one_operator_with_the_gradient_at_the_base(views):
    single, joint = views(PROPER)[0], join_views(views(PROPER))
    for view, count in ((single, STEPS - 1), (joint, 2 * (STEPS - 1))):
        updates = view.updates()
        assert len(updates) == count
        assert {u.at for u in updates} == {single.gradients[0].adapters}
        assert all(view.received[u.before].keys() == view.received[u.after].keys() for u in updates)
        assert [len(u.rows) for u in updates] == [BATCH] * count
    assert [u.before for u in single.updates()] == [c.adapters for c in single.moving[:-1]]


def test_updates_are_inverted_without_pads_only(task, tmp_path):
    deltas = trained_by_sgd(task, 5, 1e-4)
    for sigma, low, high in ((0.0, 0.95, 1.0), (PROPER, 0.5, 0.7)):
        view = record(task, tmp_path / str(sigma), deltas, sigma)[0]
        found = inverted_channels(view, task.labels, Recomputation(task.backbone), 4)
        vectors, rows = found[INVERTED]
        assert low <= best(vectors, np.array([task.labels[row] for row in rows])) <= high
