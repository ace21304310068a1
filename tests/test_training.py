"""What runs of both products share: a loop that saves however it ends, callbacks, and summaries of two products."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from blindtune.errors import CheckpointError, ConfigError, OperatorUnreachable
from blindtune.training import (
    Callback,
    Interrupted,
    LabelsSummary,
    TextsSummary,
    TrainConfig,
    Trainer,
    read_summary,
)
from blindtune.training.summary import write_summary
from blindtune.wire import Readout

CONFIG = TrainConfig(steps=6, batch_size=1, learning_rate=0.1)


@dataclass(frozen=True)
class Step:
    step: int
    losses: dict[str, float]
    seconds: float = 0.0


class Parabola(Trainer[TrainConfig, Step]):
    """The smallest trainer: |w − 1|². `fail_at`: the step that meets an error."""

    def __init__(self, checkpoint: Path | None, config: TrainConfig = CONFIG, fail_at: int = 0, **options: Any) -> None:
        self.weight = nn.Parameter(torch.zeros(3))
        super().__init__(config, {"weight": self.weight}, checkpoint=checkpoint, **options)
        self.fail_at = fail_at

    def _step(self) -> Step:
        if self.done + 1 == self.fail_at:
            raise OperatorUnreachable("It is gone.")
        self.optimizer.zero_grad()
        loss = (self.weight - 1).square().sum()
        loss.backward()
        self._update()
        self.done += 1
        return Step(self.done, {"task": float(loss.detach())})

    def _identity(self) -> dict[str, object]:
        return {"steps or rates": self.config}

    def _save_result(self, folder: Path) -> None:
        (folder / "result").write_text(str(self.done))


@dataclass
class Recorded(Callback):
    """What a callback is told, in order."""

    told: list[object] = field(default_factory=list)
    during: Any = None

    def on_train_begin(self, done: int, steps: int) -> None:
        self.told.append(("begin", done, steps))

    def on_step_end(self, step: Any) -> None:
        self.told.append(step.step)
        if self.during is not None:
            self.during(step)

    def on_train_end(self) -> None:
        self.told.append("end")


class TestRun:
    def test_saves_and_calls_callbacks(self, tmp_path):
        first, second = Recorded(), Recorded()
        steps = Parabola(tmp_path).run([first, second])
        assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
        assert first.told == second.told == [("begin", 0, 6), 1, 2, 3, 4, 5, 6, "end"]
        assert (tmp_path / "result").read_text() == "6"

    def test_saves_the_last_complete_step_after_an_error(self, tmp_path):
        whole = Parabola(None)
        whole.run()
        callback = Recorded()
        with pytest.raises(OperatorUnreachable):
            Parabola(tmp_path, fail_at=5, save_every=100).run([callback])
        assert callback.told == [("begin", 0, 6), 1, 2, 3, 4, "end"]
        assert (tmp_path / "result").read_text() == "4"
        resumed = Parabola(tmp_path)
        resumed.resume()
        assert resumed.done == 4
        again = Recorded()
        assert [step.step for step in resumed.run([again])] == [5, 6]
        assert again.told[0] == ("begin", 4, 6)
        assert torch.equal(resumed.weight, whole.weight), "to the last bit, Adam's moments included"

    def test_ends_after_the_step_that_is_under_way_on_ctrl_c(self, tmp_path):
        callback = Recorded(during=lambda step: step.step == 2 and os.kill(os.getpid(), signal.SIGINT))
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(Interrupted):
            Parabola(tmp_path, save_every=100).run([callback])
        assert callback.told == [("begin", 0, 6), 1, 2, "end"]
        assert (tmp_path / "result").read_text() == "2"
        assert signal.getsignal(signal.SIGINT) is before

    def test_writes_nothing_without_a_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Parabola(None).run()
        assert list(tmp_path.iterdir()) == []

    def test_of_something_else_is_not_resumed(self, tmp_path):
        Parabola(tmp_path).run()
        other = Parabola(tmp_path, replace(CONFIG, learning_rate=0.2))
        with pytest.raises(CheckpointError, match=r"differs in: steps or rates\."):
            other.resume()
        assert other.done == 0
        assert not other.weight.any()

    def test_cannot_be_resumed_without_a_checkpoint(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"resume\.safetensors can't be read.*Start anew without --resume"):
            Parabola(tmp_path).resume()


@pytest.mark.parametrize("change", [{"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}])
def test_a_run_of_nothing_is_refused(change: dict[str, Any]):
    with pytest.raises(ConfigError, match="at least one step, one example and a positive learning rate"):
        TrainConfig(**change)


SHARED = {"options": {}, "model": "m", "base_model_name": "org/m", "fingerprint": "1" * 64, "max_length": 16}
SUMMARIES = {
    "labels": LabelsSummary(
        method="lora", run="", hidden_size=8,
        readout=Readout(pooling="mean"), pairs="joint", codec="fp32", adapters=1, seed=0, head="LinearHead",
        loss="cross_entropy", num_classes=2, classes=["no", "yes"], **SHARED,
    ),
    "texts": TextsSummary(
        method="offline", cut=(2, 2), tune="lora", rank=8, alpha=16, targets=None, parts=["bottom", "top"], fields={},
        **SHARED,
    ),
}  # fmt: skip
KINDS = {"labels": LabelsSummary, "texts": TextsSummary}


class TestSummary:
    @pytest.mark.parametrize("product", KINDS)
    def test_is_read_as_it_was_written(self, product: str, tmp_path: Path):
        write_summary(tmp_path, SUMMARIES[product])
        assert read_summary(tmp_path, KINDS[product]) == SUMMARIES[product]
        assert json.loads((tmp_path / "blindtune.json").read_text())["product"] == product

    @pytest.mark.parametrize(("product", "other"), [("labels", "texts"), ("texts", "labels")])
    def test_of_the_other_product_says_so(self, product: str, other: str, tmp_path: Path):
        write_summary(tmp_path, SUMMARIES[product])
        with pytest.raises(CheckpointError) as caught:
            read_summary(tmp_path, KINDS[other])
        assert caught.value.message == f"{tmp_path} holds a run of private {product}, not of private {other}."
        assert caught.value.remedy == f"Use the commands of `blindtune {product}` for it."

    def test_that_is_not_there_is_named(self, tmp_path: Path):
        with pytest.raises(CheckpointError, match=r"There is no .*blindtune\.json"):
            read_summary(tmp_path, LabelsSummary)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"format": 2}, "not a checkpoint of this version"),
            ({"adapters": "many"}, "is damaged: adapters: "),
            ({"unheard": 1}, "is damaged: unheard: "),
        ],
    )
    def test_that_is_damaged_says_where(self, change: dict[str, Any], words: str, tmp_path: Path):
        content = {**SUMMARIES["labels"].model_dump(), **change}
        (tmp_path / "blindtune.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=words):
            read_summary(tmp_path, LabelsSummary)

    @pytest.mark.parametrize("content", ["", "[1]", "null", "{"])
    def test_that_is_no_object_is_damaged(self, content: str, tmp_path: Path):
        (tmp_path / "blindtune.json").write_text(content)
        with pytest.raises(CheckpointError, match="holds no JSON object"):
            read_summary(tmp_path, TextsSummary)


def test_clipping_bounds_the_norm_over_all_parameters():
    trainer = Parabola(None, replace(CONFIG, max_grad_norm=0.5))
    next(trainer.steps())
    assert trainer.weight.grad.norm() == pytest.approx(0.5)
    trainer = Parabola(None)
    next(trainer.steps())
    assert trainer.weight.grad.norm() == pytest.approx(12**0.5), "off by default"
    with pytest.raises(ConfigError, match=r"max_grad_norm = -1 is no norm.*0 for no clipping"):
        replace(CONFIG, max_grad_norm=-1)
