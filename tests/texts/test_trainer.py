"""A run that is broken off ends where an uninterrupted one ends; another run's checkpoint is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from blindtune.errors import CheckpointError, NonFiniteTensor
from blindtune.texts import Design, Gradfree, Online, TrainConfig, merge_checkpoint
from tests.texts.client import SUMMARY, MakeSetup, run


@pytest.mark.parametrize("design", [Online(), Online(noise=0.1, decorrelation_weight=0.1), Gradfree(zo=True)], ids=str)
def test_a_resumed_run_ends_where_an_uninterrupted_one_ends(setup: MakeSetup, tmp_path: Path, design: Design) -> None:
    key = bytes(range(32))
    whole = setup(design, key=key)
    run(whole.trainer())
    first = setup(design, key=key)
    broken = first.trainer(checkpoint=tmp_path)
    run(broken, 2)
    broken.save()
    second = setup(design)  # with another key, until it resumes
    trainer = second.trainer(checkpoint=tmp_path)
    trainer.resume()
    assert trainer.done == 2
    run(trainer)
    for name, parameter in whole.ends.trainable.items():
        assert torch.equal(parameter, second.ends.trainable[name]), name


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"fingerprint": "3" * 64}, "model"),
        ({"cut": (1, 3)}, "cut"),
        ({"emulator": {"tensors_sha256": "4" * 64}}, "emulator"),
        ({"emulator": None, "cut": (1, 3)}, "cut; emulator"),
    ],
)
def test_resume_refuses_another_model(setup: MakeSetup, tmp_path: Path, told: dict[str, Any], says: str) -> None:
    """Even one whose weights have the same shapes."""
    ours = setup()
    trainer = ours.trainer(checkpoint=tmp_path)
    run(trainer, 1)
    trainer.save()
    with pytest.raises(CheckpointError, match=rf"differs in: {says}\."):
        setup().trainer(checkpoint=tmp_path, summary=SUMMARY.model_copy(update=told)).resume()
    setup().trainer(checkpoint=tmp_path).resume()


def test_resume_refuses_another_run(setup: MakeSetup, tmp_path: Path) -> None:
    ours = setup()
    trainer = ours.trainer(checkpoint=tmp_path / "out")
    run(trainer, 1)
    trainer.save()
    with pytest.raises(CheckpointError, match=r"differs in: design or its options\."):
        setup(Online()).trainer(checkpoint=tmp_path / "out").resume()
    with pytest.raises(CheckpointError, match="steps, batch size, rate or seed"):
        setup().trainer(TrainConfig(steps=5), checkpoint=tmp_path / "out").resume()
    with pytest.raises(CheckpointError, match="what of the ends is tuned"):
        setup(parts=("top",)).trainer(checkpoint=tmp_path / "out").resume()
    started = setup()
    merge_checkpoint(started.ends, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"differs in: --start\."):
        started.trainer(checkpoint=tmp_path / "out").resume()
    with pytest.raises(CheckpointError, match="can't be read"):
        setup().trainer(checkpoint=tmp_path / "nowhere").resume()


def test_operations_of_attention_are_counted_whichever_kernel_computes_it(setup: MakeSetup) -> None:
    (fused,) = [step.flops for step in setup().trainer(TrainConfig(steps=1, batch_size=4)).steps()]
    with sdpa_kernel(SDPBackend.MATH):  # plain products of matrices
        (plain,) = [step.flops for step in setup().trainer(TrainConfig(steps=1, batch_size=4)).steps()]
    assert plain <= fused < 1.05 * plain  # a fused backward pass computes one of seven products again


def test_a_loss_that_explodes_sends_no_gradient(setup: MakeSetup) -> None:
    ours = setup()
    with torch.no_grad():
        ours.ends.parameters("top")[0].fill_(float("inf"))
    with pytest.raises(NonFiniteTensor, match="no gradient was sent"):
        run(ours.trainer())
    assert "g_B up" not in ours.trunk.traffic
