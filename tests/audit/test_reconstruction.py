"""Attacks that reconstruct what a defence hid: each succeeds on a real run that lacks the defence, and not on noise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch.nn import functional as F

from blindtune.audit import Recomputation, Row, View, join_views, read_view
from blindtune.audit.channel_id import ChannelId, ChannelKind
from blindtune.audit.channels import (
    beyond_text_channels,
    collusion_channels,
    computed_channels,
    counterparts,
    inverted_channels,
    travelled_channels,
)
from blindtune.audit.labels import ATTACKS, Channel, adam, inversion, invert_updates, recombine, summed
from blindtune.audit.labels.adam import Adam
from blindtune.audit.recompute import adapter_weights, token_batch
from blindtune.audit.statistics import best_auc
from blindtune.client import Backbone
from blindtune.data import Examples
from blindtune.errors import TranscriptError
from blindtune.labels import LinearHead, LoRA, PaddedLoRA, PrivateModel
from blindtune.labels.channels.private_backprop import PrivateBackprop, PrivateBackpropOptions
from blindtune.labels.trainer import TrainConfig, Trainer
from blindtune.privacy.mixing import mix, mixing_weights
from blindtune.privacy.randomness import SecureGenerator
from blindtune.wire import Transcript
from tests.audit.padded import split

BATCH = 32
ADAPTER = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], layers_to_transform=[4, 5])
DIFFERENCE = ChannelId(ChannelKind.ACTIVATION, modifier="of a minus b")
RECOMBINED = ChannelId(ChannelKind.GRADIENT, modifier="recombined")
LOUDEST = ChannelId(ChannelKind.GRADIENT, modifier="loudest")
Labels = dict[Row, int]
Record = Callable[..., tuple[list[View], Labels]]


@pytest.fixture(scope="module")
def record(start_server, film_examples, tmp_path_factory) -> Record:
    """`record(operators, texts, train, **options)`: runs `train(backbone, examples)`; views and labels by row."""

    def run(operators: int, texts: int, train: Callable[[Backbone, Examples], None], **options):
        folders: list[Path] = [tmp_path_factory.mktemp("run") / name for name in "abc"[:operators]]
        examples = film_examples.take(range(texts))
        with ExitStack() as stack:
            servers = [stack.enter_context(start_server("minilm", record=folder)) for folder in folders]
            backbone = Backbone([s.url for s in servers], adapter=ADAPTER, max_length=24, **options)
            train(backbone, examples)
            with torch.no_grad():
                backbone.infer(examples.texts[:2])  # whoever evaluates uploads the last adapters
            rows = [row.ids for row in backbone.rows(examples.texts)]
            backbone.close()
        views = [read_view(Transcript(folder), folder.name) for folder in folders]
        return views, dict(zip(rows, examples.labels, strict=True))

    return run


def train_padded(backbone: Backbone, examples: Examples) -> None:
    steps = len(examples) // BATCH
    method = PaddedLoRA(steps=steps, check_every=0, allow_single_operator=len(backbone.pool) == 1)
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), method)
    trainer = Trainer(model, examples, TrainConfig(steps=steps, batch_size=BATCH))
    trainer.prepare()
    list(trainer.steps())


def train_sgd(backbone: Backbone, examples: Examples, optimizer: type = torch.optim.SGD, rate: float = 0.05) -> None:
    """A user's own loop: mixed adapters, a linear head, a fixed learning rate."""
    n, labels = backbone.num_adapters, torch.tensor(examples.labels)
    weights = torch.ones(1, backbone.hidden_size)
    if n > 1:
        weights = mixing_weights(n, backbone.hidden_size, 1.0, generator=SecureGenerator())
    head = LinearHead(backbone.hidden_size, 2)
    head.fit(backbone.frozen(examples.texts), labels)
    steps = optimizer([*backbone.parameters(), *head.parameters()], lr=rate)
    for start in range(0, len(labels), BATCH):
        hidden = backbone.all_adapters(examples.texts[start : start + BATCH])
        loss = F.cross_entropy(head(mix(hidden, weights)), labels[start : start + BATCH])
        steps.zero_grad()
        loss.backward()
        steps.step()


def train_lora(
    backbone: Backbone, examples: Examples, *, random_adam_moments: float = 0.0, adapter_noise: float = 0.0
) -> None:
    """The trainer with its own Adam; gradients travel in shares."""
    method = LoRA(PrivateBackpropOptions(m=2, adapter_noise=adapter_noise))
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), method)
    steps = len(examples) // BATCH
    config = TrainConfig(steps=steps, batch_size=BATCH, warmup=2, random_adam_moments=random_adam_moments)
    trainer = Trainer(model, examples, config)
    trainer.prepare()
    list(trainer.steps())


@pytest.fixture(scope="module")
def met(record) -> tuple[list[View], Labels]:
    """Padded LoRA with both shares at one server."""
    return record(1, 12 * BATCH, train_padded)


@pytest.fixture(scope="module")
def apart(record) -> tuple[list[View], Labels]:
    """Padded LoRA over two operators, as it should be."""
    return record(2, 12 * BATCH, train_padded)


@pytest.fixture(scope="module")
def sgd(record) -> tuple[list[View], Labels]:
    """Plain SGD on one adapter; gradients travel in shares over two operators, so only θ_t tells anything."""
    return record(2, 4 * BATCH, train_sgd, channel=PrivateBackprop(PrivateBackpropOptions(m=2), SecureGenerator()))


def strongest(found: dict[ChannelId, tuple[np.ndarray, list[Row]]], labels: Labels, start: str = "") -> float:
    """The best attack without labels on channels whose labels begin so."""
    best = 0.0
    for name, (features, rows) in found.items():
        if str(name).startswith(start):
            truth = np.array([labels[row] for row in rows])
            for attack in ATTACKS.values():
                scores = attack.run(Channel(features), truth) if attack.unsupervised else None
                if scores is not None:
                    best = max(best, best_auc(scores, truth, symmetric=True)[0])
    return best


def gathered(view: View, labels: Labels) -> dict[ChannelId, tuple[np.ndarray, list[Row]]]:
    return travelled_channels(view, labels, view.checkpoints[-1].step)


def shuffled(labels: Labels) -> Labels:
    values = np.random.default_rng(0).permutation(list(labels.values())).tolist()
    return dict(zip(labels, values, strict=True))


def test_shares_that_meet_at_one_server_give_labels_away(met, minilm):
    [view], labels = met
    found = gathered(view, labels)
    found |= beyond_text_channels(view, Recomputation(minilm), found)
    assert strongest(found, labels, "gradient 0.") < 0.65  # each share alone is noise
    assert strongest(found, labels, "gradient recombined") > 0.95


def test_operators_that_collude_recombine_their_shares(apart, minilm):
    views, labels = apart
    for view in views:
        assert strongest(gathered(view, labels), labels, "gradient") < 0.65
    joint = join_views(views)
    assert joint.operator == "a + b"
    assert [len(group.shares) for group in joint.gradients] == [2] * 12
    found = gathered(joint, labels)
    found |= beyond_text_channels(joint, Recomputation(minilm), found)
    assert strongest(found, labels, "gradient recombined") > 0.95
    assert strongest(found, shuffled(labels)) < 0.65


def test_a_joint_view_has_one_step_for_each_set_of_adapters(sgd):
    views, _ = sgd
    joint = join_views(views)
    assert {c.adapters for c in joint.checkpoints} == {c.adapters for v in views for c in v.checkpoints}
    assert joint.moving == joint.checkpoints
    assert [u.before for u in joint.updates()] == [c.adapters for c in joint.checkpoints[:-1]]
    assert [u.at for u in joint.updates()] == [u.before for u in joint.updates()]
    assert set(joint.first_seen) == {row for view in views for row in view.first_seen}
    assert all(counterparts(joint, checkpoint) == {} for checkpoint in joint.checkpoints)  # all got the same


def test_operators_that_collude_take_pads_off(apart, minilm):
    views, labels = apart
    recompute, joint = Recomputation(minilm), join_views(views)
    rows = [row for row in joint.first_seen if row in labels]
    found = collusion_channels(joint, recompute, joint.moving[-1], rows)
    together = strongest({DIFFERENCE: (found[DIFFERENCE], rows)}, labels)

    def average(view: View, *, knowing: bool) -> float:
        """Over the latter half of an operator's adapters, or those with their weights in random order."""
        own = [row for row in view.first_seen if row in labels]
        aucs: list[float] = []
        snapshots = view.moving[len(view.moving) // 2 :]
        adapters = [s.adapters if knowing else s.shuffled for s in snapshots]
        recompute.ensure(view, adapters, own)  # the layers below the adapters run once
        for chosen in adapters:
            channels = computed_channels(view, recompute, chosen, {}, own)
            aucs.append(strongest({name: (features, own) for name, features in channels.items()}, labels))
        return float(np.mean(aucs))

    assert together > 0.7  # twelve steps teach little
    for view in views:
        alone = average(view, knowing=True)
        assert alone < average(view, knowing=False) + 0.04
        assert alone < together - 0.05


def test_views_of_different_runs_cannot_be_joined(apart, record):
    def longer(backbone: Backbone, examples: Examples) -> None:
        backbone.adapter_config = LoraConfig(r=2, target_modules=["query"], layers_to_transform=[5])
        backbone.set_adapters(1)

    [other], _ = record(1, 4, longer)
    with pytest.raises(TranscriptError, match="several runs"):
        join_views([apart[0][0], other])


def test_the_sum_over_adapters_is_the_mixed_gradient(record):
    [view], labels = record(1, 4 * BATCH, train_sgd, num_adapters=2)
    assert strongest(gathered(view, labels), labels, "gradients summed") > 0.95


@pytest.mark.parametrize("m", [2, 3, 5])
def test_the_quietest_combination_is_the_gradient_itself(m):
    gradient = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    shares = split(gradient, m, 1000.0, SecureGenerator(bytes(32)))
    recovered = torch.from_numpy(recombine(shares.numpy())[RECOMBINED]).reshape(8, 2, 64).transpose(0, 1)
    error = (recovered - gradient).norm() / gradient.norm()
    assert min(error, (recovered + gradient).norm() / gradient.norm()) < 0.15


@pytest.mark.parametrize("ratio", [0.001, 0.03, 1.0, 100.0, 1000.0])
@pytest.mark.parametrize("m", [2, 3, 4, 8])
def test_shares_that_met_tell_the_labels_of_all_batches_together(m, ratio):
    """A sign that is right in one batch and wrong in the next would hide the labels from whoever pools batches."""
    random = torch.Generator().manual_seed(m)
    along = F.normalize(torch.randn(2, 64, generator=random), dim=-1)
    generator = SecureGenerator(bytes(32))
    found: dict[ChannelId, list[np.ndarray]] = {}
    truth = torch.randint(0, 2, (40 * BATCH,), generator=random)
    for labels in truth.split(BATCH):
        residual = torch.rand(BATCH, generator=random) * 0.5 * (1 - 2 * labels)
        shares = split(residual[None, :, None] * along[:, None], m, ratio, generator)
        for name, vectors in recombine(shares.numpy()).items():
            found.setdefault(name, []).append(vectors)
    rows = [(i,) for i in range(len(truth))]
    known = {row: int(label) for row, label in zip(rows, truth, strict=True)}
    assert strongest({name: (np.concatenate(v), rows) for name, v in found.items()}, known) > 0.95


def test_the_loudest_combination_is_the_gradient_where_noise_is_weak():
    gradient = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    shares = split(gradient, 2, 1e-5, SecureGenerator(bytes(32)))
    recovered = recombine(shares.numpy())[LOUDEST].reshape(8, 2, 64).transpose(1, 0, 2)
    np.testing.assert_allclose(recovered, gradient.numpy(), atol=1e-3)


def test_independent_noise_recombines_to_nothing():
    """What two operators hold of two different gradients: no combination means anything."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 600)
    found: dict[ChannelId, list[np.ndarray]] = {}
    for _ in range(20):
        noise = rng.normal(0, 1, (2, 2, 30, 16)).astype(np.float32)
        for name, vectors in {**recombine(noise), **summed(noise)}.items():
            found.setdefault(name, []).append(vectors)
    rows = [(i,) for i in range(600)]
    labels = {row: int(label) for row, label in zip(rows, truth, strict=True)}
    assert strongest({name: (np.concatenate(v), rows) for name, v in found.items()}, labels) < 0.6


def test_products_with_the_jacobian(sgd, minilm):
    """Against differences of hidden states, and against each other."""
    [view, _], _ = sgd
    recompute, random = Recomputation(minilm), torch.Generator().manual_seed(0)
    update = view.updates()[1]
    jacobian = recompute.jacobian(view, update.at, update.rows)
    layout, tokens = recompute.layout(view), token_batch(view, update.rows, minilm)
    weights = adapter_weights(view, layout, update.at)
    step = torch.randn(weights.shape, generator=random)
    with torch.no_grad():
        ahead, behind = (minilm.forward(tokens, view.readout, layout, weights + e * step) for e in (1e-3, -1e-3))
    pushed = jacobian.push(step)
    assert (pushed - (ahead - behind) / 2e-3).norm() < 0.01 * pushed.norm()
    r, u = torch.randn(BATCH, generator=random), torch.randn(1, 384, generator=random)
    cotangents = r[None, :, None] * u.unsqueeze(1)
    pulled = jacobian.pull(cotangents)
    torch.testing.assert_close((pulled * step).sum(), (cotangents * pushed).sum(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close((r @ jacobian.per_example(u))[None], pulled, rtol=1e-3, atol=1e-4)


def test_plain_sgd_is_inverted_from_adapters_alone(sgd, minilm):
    views, labels = sgd
    assert np.mean([strongest(gathered(view, labels), labels, "gradient") for view in views]) < 0.7
    found = inverted_channels(views[0], labels, Recomputation(minilm), 4)
    assert len(found[inversion.INVERTED][1]) == 4 * BATCH
    assert strongest(found, labels) > 0.95
    assert strongest(found, shuffled(labels)) < 0.65


def test_adam_is_undone_up_to_one_factor_for_each_coordinate():
    random = torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter(torch.zeros(2, 4000, dtype=torch.float64))
    optimizer = torch.optim.Adam([weights], betas=(0.9, 0.99))
    adam, first = Adam(), None
    for step in range(8):
        before = weights.detach().clone()
        sizes = torch.logspace(-3, 1, 4000, dtype=torch.float64)
        weights.grad = sizes * torch.randn(2, 4000, generator=random, dtype=torch.float64)
        weights.grad[:, ::2] *= step > 0  # as in a matrix behind one that is zero
        optimizer.param_groups[0]["lr"] = 0.001 * (1 + step)  # the attacker doesn't know the schedule
        optimizer.step()
        found = adam.undo(weights.detach() - before)
        first = weights.grad.abs() if first is None else torch.where(first > 0, first, weights.grad.abs())
        expected = weights.grad / first.clamp_min(1e-30)
        assert (found.sign() == expected.sign()).double().mean() > 0.99
        close = (found - expected).abs() < 0.02 * expected.abs()  # others took the wrong one of two solutions
        assert close[weights.grad != 0].double().mean() > (0.5 if step else 0.99)


def test_adam_is_inverted_from_adapters_alone(record, minilm):
    views, labels = record(2, 4 * BATCH, train_lora)
    assert np.mean([strongest(gathered(view, labels), labels, "gradient") for view in views]) < 0.7
    found = inverted_channels(views[0], labels, Recomputation(minilm), 4)
    assert len(found[adam.INVERTED][1]) == 4 * BATCH
    assert strongest(found, labels, "update inverted, Adam") > 0.95
    assert strongest(found, shuffled(labels)) < 0.65


@pytest.mark.parametrize("defence", [{"random_adam_moments": 0.1}, {"adapter_noise": 0.01}], ids=["moments", "noise"])
def test_what_adams_first_steps_change_can_be_hidden(record, minilm, defence):
    """The same training as above, but for where Adam starts, or for what travels."""
    [view, _], labels = record(2, 4 * BATCH, partial(train_lora, **defence))
    found = inverted_channels(view, labels, Recomputation(minilm), 4)
    assert len(found[adam.INVERTED][1]) == 4 * BATCH
    assert strongest(found, labels) < 0.75


def test_noise_on_adapters_hides_what_a_step_changed(record, minilm):
    """The same training as above, but for the noise."""
    noisy = PrivateBackprop(PrivateBackpropOptions(m=2, adapter_noise=0.01), SecureGenerator())
    [view, _], labels = record(2, 4 * BATCH, train_sgd, channel=noisy)
    found = inverted_channels(view, labels, Recomputation(minilm), 4)
    assert len(found[inversion.INVERTED][1]) == 4 * BATCH
    assert strongest(found, labels) < 0.75


def test_inverting_random_steps_finds_nothing(sgd, minilm):
    [view, _], labels = sgd
    recompute, rng = Recomputation(minilm), np.random.default_rng(0)
    updates = view.updates()[:4]  # of 64 texts, chance alone would find .75 once in 400 times

    def observed(update):
        jacobian = recompute.jacobian(view, update.before, update.rows)
        return jacobian, rng.normal(0, 1, (1, len(view.adapter(update.before[0]))))

    vectors, rows = invert_updates(updates, observed)
    assert len(rows) == 4 * BATCH
    assert strongest({inversion.INVERTED: (vectors, rows)}, labels) < 0.75
