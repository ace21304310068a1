"""An operator is killed in the middle of a run, which ends with the weights that it has without that, but for noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blindtune import Backbone, LinearHead, PaddedLoRA, PrivateModel, SecureGenerator, Timeout, TrainConfig, Trainer
from blindtune.data import Examples
from blindtune.errors import OperatorUnreachable
from tests.conftest import Server, StartServer

STEPS = 7


@pytest.fixture(scope="module")
def examples(film_examples: Examples) -> Examples:
    return film_examples.take(range(48))


@dataclass
class Run:
    """A short private training run over two operators."""

    trainer: Trainer
    before_backward: list[Callable[[], None]] = field(default_factory=list)
    """Called once each, between the forward and the backward pass of a step."""
    losses: list[dict[str, float]] = field(default_factory=list)

    def steps(self) -> Iterator[int]:
        for step in self.trainer.steps():
            self.losses.append(step.losses)
            yield step.step

    def outcome(self) -> dict[str, Tensor]:
        model = self.trainer.model
        named = {f"model.{name}": tensor.detach().clone() for name, tensor in model.state_dict().items()}
        method = {f"method.{name}": tensor for name, tensor in model.method.state_dict().items()}
        return {
            **named,
            **method,
            "losses": torch.tensor([value for losses in self.losses for value in losses.values()]),
        }


def prepare(urls: list[str], examples: Examples, stack: ExitStack, **options: Any) -> Run:
    backbone = stack.enter_context(closing(Backbone(urls, max_length=32, **options)))
    run = Run(trainer=None)  # type: ignore[arg-type]

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        if run.before_backward:
            run.before_backward.pop()()
        return F.cross_entropy(logits, labels)

    torch.manual_seed(0)
    model = PrivateModel(
        backbone,
        LinearHead(backbone.hidden_size, 2),
        PaddedLoRA(steps=STEPS),
        loss=loss,
        generator=SecureGenerator(bytes(32)),
        seed=0,
    )
    run.trainer = Trainer(model, examples, TrainConfig(steps=STEPS, batch_size=8, warmup=2, seed=0))
    run.trainer.prepare()
    return run


@dataclass
class Mortal:
    """An operator that can be killed and started again at the same address."""

    start: Callable[[], Server]
    server: Server

    @property
    def url(self) -> str:
        return self.server.url

    def kill(self) -> None:
        self.server.kill()

    def raise_again(self) -> None:
        self.server = self.start()


@pytest.fixture(scope="module")
def mortal(start_server: StartServer) -> Iterator[Mortal]:
    with ExitStack() as stack:
        first = stack.enter_context(start_server("minilm"))
        yield Mortal(lambda: stack.enter_context(start_server("minilm", port=first.port)), first)


@pytest.fixture(scope="module")
def urls(two_servers: list[Server], mortal: Mortal) -> list[str]:
    return [two_servers[0].url, mortal.url]


@pytest.fixture(scope="module")
def undisturbed(urls: list[str], examples: Examples) -> dict[str, Tensor]:
    with ExitStack() as stack:
        run = prepare(urls, examples, stack)
        start = run.outcome()
        assert list(run.steps()) == list(range(1, STEPS + 1))
        outcome = run.outcome()
    moved = [name for name in start if name.startswith("model.") and not torch.equal(start[name], outcome[name])]
    assert len(moved) > 10, "training must have changed something"
    assert any("head" in name for name in moved), "and the task must have had a part in it"
    return outcome


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Noise, which is new in each run, costs precision; Adam makes much of it in the first steps."""
    assert found.keys() == expected.keys()
    for name in (name for name in expected if name.startswith("model.") and expected[name].is_floating_point()):
        apart = (found[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-6)
        assert float(apart) < 0.5, name


def test_the_client_waits_for_a_killed_operator_and_the_run_ends_the_same(
    urls: list[str], mortal: Mortal, examples: Examples, undisturbed: dict[str, Tensor]
):
    """Killed twice: between a forward and its backward pass, and between two steps. No step is repeated."""
    waits: list[tuple[str, int]] = []

    def on_wait(url: str, attempt: int) -> None:
        waits.append((url, attempt))
        if not mortal.server.process.alive:
            mortal.raise_again()

    with ExitStack() as stack:
        run = prepare(urls, examples, stack, on_wait=on_wait)
        for step in run.steps():
            if step == 2:
                run.before_backward.append(mortal.kill)
            if step == 5:
                mortal.kill()
        assert waits == [(mortal.url, 2), (mortal.url, 2)]
        assert run.trainer.model.method.ledger.messages("share") == STEPS
        assert_close(run.outcome(), undisturbed)


def test_a_run_that_timed_out_goes_on_when_the_operator_is_back(
    urls: list[str], mortal: Mortal, examples: Examples, undisturbed: dict[str, Tensor]
):
    """The step that failed has changed nothing of the model. It is repeated with fresh pads and shares, which count, so
    the weights are the same but for what noise costs in precision."""
    with ExitStack() as stack:
        run = prepare(urls, examples, stack, timeout=Timeout(connect=2, answer=60, total=0.5))
        steps = run.steps()
        for _ in range(3):
            next(steps)
        run.before_backward.append(mortal.kill)
        before = run.outcome()
        mu = run.trainer.model.method.report()["mu"]
        with pytest.raises(OperatorUnreachable, match=mortal.url):
            next(steps)
        assert run.trainer.model.method.report()["mu"] >= mu
        assert_equal(run.outcome(), before)
        mortal.raise_again()
        assert list(run.steps()) == [4, 5, 6, 7]
        assert run.trainer.model.method.ledger.messages("share") == STEPS + 1
        assert_close(run.outcome(), undisturbed)
