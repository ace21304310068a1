"""Resume: an interrupted run ends with the weights of an uninterrupted one: bit for bit, or but for noise."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest
import torch

from blindtune.errors import BudgetSpent, CheckpointError, ConfigError, OperatorUnreachable
from blindtune.labels import (
    P3EFT,
    PSLF,
    DistanceCorrelation,
    LoRA,
    PaddedLoRA,
    PrivateBackpropOptions,
    PrivateModel,
    RandomizedResponse,
    adapter_config,
    make_head,
)
from blindtune.labels.trainer import TrainConfig, Trainer, evaluate, predict
from blindtune.privacy.randomness import SecureGenerator
from blindtune.training import Callback, steps_for
from tests.labels.conftest import connect, operators  # noqa: F401 - fixtures

CONFIG = TrainConfig(steps=8, batch_size=8, learning_rate=5e-3)


def padded():
    return PaddedLoRA(steps=8)


def adversarial():
    return P3EFT(steps=8, activation_weight=0.1, shift_weight=0.1, joint_weight=0.1, buffer=3, rise=0.5)


def correlation():
    return DistanceCorrelation(activation_weight=0.3, shift_weight=0.1)


METHODS = [LoRA, padded, adversarial, correlation, PSLF, RandomizedResponse]
NAMES = ["lora", "padded-lora", "p3eft", "distance-correlation", "pslf", "randomized-response"]


def start(backbone, examples, folder, algorithm, config=CONFIG, key=bytes(32), head="linear") -> Trainer:
    head = make_head(head, backbone.hidden_size, 2, seed=0)
    model = PrivateModel(backbone, head, algorithm, generator=SecureGenerator(key))
    trainer = Trainer(model, examples, config, checkpoint=folder, save_every=3)
    trainer.prepare()
    return trainer


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("stopped", ["after a checkpoint", "at a checkpoint"])
@pytest.mark.parametrize("algorithm", METHODS, ids=NAMES)
def test_resume_continues_to_the_same_weights(connect, film_examples, tmp_path, algorithm, stopped):  # noqa: F811
    """To the last bit where nothing is hidden under noise; noise is never used twice, and costs a little precision.

    A step that is repeated sends fresh shares, which count: equal ones would tell that the gradient is equal.
    """
    examples = film_examples.take(range(40))
    whole = start(connect(), examples, None, algorithm())
    assert [step.step for step in whole.steps()] == list(range(1, 9))

    broken = start(connect(), examples, tmp_path, algorithm())
    for step in broken.steps():
        if step.step == 5:  # the last checkpoint is that of step 3
            break
    if stopped == "at a checkpoint":
        broken.save()
    model = PrivateModel.from_pretrained(tmp_path, connect(adapter=adapter_config(tmp_path)))
    resumed = Trainer(model, examples, CONFIG, checkpoint=tmp_path)
    resumed.resume()
    repeated = stopped == "after a checkpoint"
    assert [step.step for step in resumed.steps()] == list(range(4 if repeated else 6, 9))
    ledger = model.method.ledger
    if ledger is None:
        assert torch.equal(weights(resumed), weights(whole))
        assert resumed.model.method.report() == whole.model.method.report()
    else:
        assert 0 < (weights(resumed) - weights(whole)).norm() < 0.05 * weights(whole).norm()
        assert ledger.messages("share") == 8 + (2 if repeated else 0)


def test_a_run_that_is_begun_in_the_folder_of_another_one_does_not_lend_it_its_ledger(connect, film_examples, tmp_path):  # noqa: F811
    """It sets the journal aside before it saves anything. With its own, the first run would have a new budget."""
    examples = film_examples.take(range(40))
    first = start(connect(), examples, tmp_path, padded())
    list(first.steps())
    first.save()
    shutil.copy(tmp_path / "resume.safetensors", tmp_path / "first")
    second = start(connect(), examples, tmp_path, padded())  # and broken off
    with pytest.raises(CheckpointError, match="of another run"):
        PrivateModel.from_pretrained(tmp_path, connect(adapter=adapter_config(tmp_path)))
    second.save()
    os.replace(tmp_path / "resume.safetensors", tmp_path / "kept")
    model = PrivateModel.from_pretrained(tmp_path, connect(adapter=adapter_config(tmp_path)))
    os.replace(tmp_path / "first", tmp_path / "resume.safetensors")
    with pytest.raises(CheckpointError, match="files of two runs"):
        Trainer(model, examples, CONFIG, checkpoint=tmp_path).resume()


@pytest.mark.parametrize("algorithm", [padded, adversarial])
def test_a_step_that_fails_leaves_no_trace(connect, film_examples, algorithm):  # noqa: F811
    examples = film_examples.take(range(40))
    whole = start(connect(), examples, None, algorithm())
    list(whole.steps())

    flaky = start(connect(), examples, None, algorithm())
    steps = flaky.steps()
    next(steps)
    channel = flaky.model.backbone.channel
    gradients, channel.gradients = channel.gradients, _fail
    with pytest.raises(ConnectionError):
        next(steps)
    channel.gradients = gradients
    method, sent = flaky.model.method.step_state_dict(), flaky.model.backbone.steps
    assert (flaky.done, sent) == (1, 1)
    assert all(torch.equal(value, flaky.model.method.step_state_dict()[name]) for name, value in method.items())
    assert len(list(flaky.steps())) == 7
    assert (weights(flaky) - weights(whole)).norm() < 0.05 * weights(whole).norm()


def _fail(*_):
    raise ConnectionError("the cable was pulled")


def test_random_adam_moments_hide_the_first_step_from_whoever_sees_adapters(connect, film_examples):  # noqa: F811
    examples = film_examples.take(range(40))

    def first_step(config: TrainConfig, key: bytes) -> torch.Tensor:
        trainer = start(connect(), examples, None, LoRA(), config, key)
        before = trainer.model.backbone.lora_adapters()[0].vector().detach()
        next(trainer.steps())
        change = trainer.model.backbone.lora_adapters()[0].vector().detach() - before
        return change[change != 0]

    plain, same = (first_step(CONFIG, bytes([i] * 32)) for i in range(2))
    assert torch.equal(plain, same)
    random = replace(CONFIG, random_adam_moments=1.0)
    one, other = (first_step(random, bytes([i] * 32)) for i in range(2))
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.1
    assert float(one.std()) < 3 * float(plain.std())  # the step is no longer than Adam's


def test_a_run_with_random_adam_moments_resumes_to_the_same_weights(connect, film_examples, tmp_path):  # noqa: F811
    examples, config = film_examples.take(range(40)), replace(CONFIG, random_adam_moments=1e-3)
    whole = start(connect(), examples, None, LoRA(), config)
    list(whole.steps())
    broken = start(connect(), examples, tmp_path, LoRA(), config)
    for step in broken.steps():
        if step.step == 5:
            break
    model = PrivateModel.from_pretrained(tmp_path, connect(adapter=adapter_config(tmp_path)))
    resumed = Trainer(model, examples, config, checkpoint=tmp_path)
    resumed.resume()
    list(resumed.steps())
    assert torch.equal(weights(resumed), weights(whole))


def test_a_run_with_clipping_resumes_to_the_same_weights(connect, film_examples, tmp_path):  # noqa: F811
    examples, config = film_examples.take(range(40)), replace(CONFIG, max_grad_norm=0.1)
    unclipped, whole = (start(connect(), examples, None, LoRA(), c, head="mlp") for c in (CONFIG, config))
    for trainer in (unclipped, whole):
        list(trainer.steps())
    assert not torch.equal(weights(whole), weights(unclipped))
    broken = start(connect(), examples, tmp_path, LoRA(), config, head="mlp")
    for step in broken.steps():
        if step.step == 5:
            break
    model = PrivateModel.from_pretrained(tmp_path, connect(adapter=adapter_config(tmp_path)))
    resumed = Trainer(model, examples, config, checkpoint=tmp_path)
    resumed.resume()
    list(resumed.steps())
    assert torch.equal(weights(resumed), weights(whole))
    unlike = Trainer(model, examples, CONFIG, checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="differs in"):
        unlike.resume()


def test_a_run_of_a_recipe_resumes_to_the_same_weights(connect, film_examples, tmp_path):  # noqa: F811
    """But for the shares' rounding, which Adam makes whole steps of where a gradient is small."""
    examples, method = film_examples.take(range(40)), P3EFT(recipe=2023)
    config = TrainConfig(steps=8, batch_size=8, **method.complete_training({}))
    whole = start(connect(), examples, None, method, config, head="mlp")
    list(whole.steps())
    broken = start(connect(), examples, tmp_path, P3EFT(recipe=2023), config, head="mlp")
    for step in broken.steps():
        if step.step == 3:
            break
    broken.save()
    model = PrivateModel.from_pretrained(tmp_path, connect(adapter=adapter_config(tmp_path)))
    resumed = Trainer(model, examples, config, checkpoint=tmp_path)
    resumed.resume()
    list(resumed.steps())
    assert (weights(resumed) - weights(whole)).norm() < 0.05 * weights(whole).norm()


def test_no_norm_over_true_and_randomised_labels_reaches_the_adapters(connect, film_examples):  # noqa: F811
    with pytest.raises(ConfigError, match=r"depend on the true labels\..*max_grad_norm=0"):
        start(connect(), film_examples.take(range(40)), None, PSLF(), replace(CONFIG, max_grad_norm=1.0))


def test_resume_refuses_other_data(connect, film_examples, tmp_path):  # noqa: F811
    trainer = start(connect(), film_examples.take(range(40)), tmp_path, LoRA())
    list(trainer.steps())
    model = PrivateModel.from_pretrained(tmp_path, connect(adapter=adapter_config(tmp_path)))
    other = Trainer(model, film_examples.take(range(1, 41)), CONFIG, checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match=r"comes from a run that differs in: data\."):
        other.resume()
    longer = Trainer(model, film_examples.take(range(40)), replace(CONFIG, steps=9), checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match=r"differs in: steps, batch size, rates or seed\."):
        longer.resume()


def test_a_trainer_whose_backbone_another_model_took_saves_nothing(connect, film_examples, tmp_path):  # noqa: F811
    """Not even what it would go on from: what it was sent since is in the other model's ledger."""
    trainer = start(connect(), film_examples.take(range(40)), tmp_path / "out", LoRA())
    PrivateModel(trainer.model.backbone, trainer.model.head, LoRA())
    with pytest.raises(ConfigError, match="belongs to another model now"):
        trainer.save()
    assert not (tmp_path / "out").exists()


def test_a_run_saves_the_last_complete_step_when_an_operator_is_gone(connect, film_examples, tmp_path):  # noqa: F811
    """And callbacks hear of each step that was complete."""
    examples, told = film_examples.take(range(40)), []
    trainer = start(connect(), examples, tmp_path, padded())
    channel = trainer.model.backbone.channel
    gradients = channel.gradients

    class Pull(Callback):
        def on_step_end(self, step):
            told.append(step.step)
            if step.step == 2:
                channel.gradients = _gone

        def on_train_end(self):
            told.append("end")

    with pytest.raises(OperatorUnreachable):
        trainer.run([Pull()])
    assert told == [1, 2, "end"]
    channel.gradients = gradients
    model = PrivateModel.from_pretrained(tmp_path, connect(adapter=adapter_config(tmp_path)))
    resumed = Trainer(model, examples, CONFIG, checkpoint=tmp_path)
    resumed.resume()
    assert resumed.done == 2
    assert torch.equal(weights(resumed), weights(trainer))
    assert [step.step for step in resumed.run()] == [3, 4, 5, 6, 7, 8]


def _gone(*_):
    raise OperatorUnreachable("It is gone.")


def test_predictions_are_in_the_order_of_the_texts(connect, film_examples):  # noqa: F811
    trainer = start(connect(), film_examples.take(range(40)), None, LoRA())
    list(trainer.steps())
    texts = [str(t) for t in film_examples.texts[:23]]
    together = predict(trainer.model, texts)
    one_by_one = torch.cat([predict(trainer.model, [text]) for text in texts])
    assert torch.allclose(together, one_by_one, atol=1e-4)
    assert torch.allclose(together.sum(-1), torch.ones(23), atol=1e-5)
    scores = evaluate(trainer.model, film_examples.take(range(23)))
    expected = (together.argmax(-1) == torch.tensor(film_examples.labels[:23])).float().mean()
    assert scores["accuracy"] == pytest.approx(float(expected))


def test_steps_for_epochs():
    assert steps_for(100, 32, 1.0) == 4
    assert steps_for(100, 32, 0.5) == 2
    assert steps_for(3, 32, 0.1) == 1


def test_the_learning_rate_rises_and_falls():
    config = TrainConfig(steps=100, warmup=10, floor=0.05)
    rates = [config.rate(step) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert min(rates[10:]) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("algorithm", "steps"),
    [
        (PaddedLoRA(steps=4, batch_size=8, max_mu=0.12, predictions=0), 5),
        (P3EFT(PrivateBackpropOptions(m=2, noise_ratio=100.0, max_mu=0.12)), 4),
    ],
)
def test_a_budget_ends_the_run_before_the_step_that_would_exceed_it(
    connect,  # noqa: F811
    film_examples,
    tmp_path,
    algorithm,
    steps,
):
    examples = film_examples.take(range(8))  # one batch: every step shows every example once
    trainer = start(connect(), examples, tmp_path, algorithm)
    sent: list[int] = []
    with pytest.raises(BudgetSpent, match=r"budget (is|of μ =) 0\.12"):
        sent.extend(step.step for step in trainer.steps())
    assert len(sent) == steps
    report = algorithm.report()
    assert 0.1 < report.get("mu", report.get("gradient_channel_mu")) <= 0.12
    before = weights(trainer)
    with pytest.raises(BudgetSpent):
        next(trainer.steps())
    assert torch.equal(weights(trainer), before)
