"""Training over a real server is training of the whole model, and each design sends what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from blindtune.errors import CacheFull, CheckpointError, ConfigError
from blindtune.texts import (
    ActivationStore,
    Boundary,
    CausalBatch,
    Ends,
    Gradfree,
    LocalTrunk,
    Online,
    TrainConfig,
    Trainer,
    make_design,
)
from tests.conftest import CutServer
from tests.texts.client import CONFIG, MakeSetup, real, run


def test_online_training_is_training_of_the_whole_model(setup: MakeSetup, cut_server: CutServer) -> None:
    """fp32: the same gradients as one process has, step by step, so the same weights."""
    ours = setup(tune="full")
    trainer = ours.trainer()
    whole: Any = AutoModelForCausalLM.from_pretrained(cut_server.model)
    whole.requires_grad_(False)
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_(name in ours.ends.trainable)
    reference = Trainer(
        cast(Any, _Whole(whole)), cast(Any, _WholeEnds(whole, ours.ends)), cast(Any, _WholeDesign()), ours.train, CONFIG
    )
    theirs, mine = run(reference), run(trainer)
    assert [step["task"] for step in mine] == pytest.approx([step["task"] for step in theirs], rel=1e-5)
    weights = dict(whole.named_parameters())
    for name, parameter in ours.ends.trainable.items():
        assert torch.allclose(parameter, weights[name], atol=2e-4), name


class _Whole(torch.nn.Module):
    """The reference: transformers' own model and loss, in the same loop."""

    def __init__(self, causal: Any) -> None:
        super().__init__()
        self.causal = causal
        self.boundary = Boundary(LocalTrunk(causal))
        self.device = torch.device("cpu")


class _WholeEnds:
    def __init__(self, causal: Any, ends: Ends) -> None:
        self.trainable = {n: p for n, p in causal.named_parameters() if n in ends.trainable}

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.trainable.values())


class _WholeDesign:
    def step(self, model: Any, ends: Any, batch: CausalBatch, generator: Any) -> dict[str, float]:
        output = model.causal(input_ids=batch.ids, attention_mask=real(batch).long()).logits
        learned = batch.learned
        loss = F.cross_entropy(output[learned], batch.ids[:, 1:][learned[:, :-1]])
        loss.backward()
        return {"task": float(loss.detach())}


def test_gradfree_sends_each_example_once_and_no_gradient(setup: MakeSetup) -> None:
    ours = setup(Gradfree(up="fp32", down="fp32"))
    run(ours.trainer(TrainConfig(steps=6, batch_size=4, learning_rate=0.01)))  # one epoch of 24
    once = dict(ours.trunk.traffic)
    run(ours.trainer(TrainConfig(steps=30, batch_size=4, learning_rate=0.01)))  # five more
    assert dict(ours.trunk.traffic) == once
    assert set(once) == {"s_A up", "s_B down"}
    assert not ours.ends.parameters("bottom")


def test_gradfree_learns_from_the_store_what_it_would_learn_over_the_wire(setup: MakeSetup) -> None:
    kept, sent = setup(Gradfree(up="fp32", down="fp32")), setup(Online(up="fp32", down="fp32"), parts=("top",))
    assert [s["task"] for s in run(kept.trainer())] == pytest.approx([s["task"] for s in run(sent.trainer())], rel=1e-4)


def test_gradfree_without_a_store_says_so(setup: MakeSetup) -> None:
    ours = setup(Gradfree())
    ours.model.boundary.store = None
    with pytest.raises(ConfigError, match="store"):
        run(ours.trainer())
    assert not ours.trunk.traffic


def test_a_full_store_is_refused_and_keeps_what_it_has(setup: MakeSetup) -> None:
    ours = setup(Gradfree())
    row = ours.train[0].row
    store = ours.model.boundary.store = ActivationStore(32, "int8", max_bytes=3 * len(row) * 64)
    run(ours.trainer(TrainConfig(steps=1, batch_size=1)))
    held = len(store)
    before = dict(ours.trunk.traffic)
    with pytest.raises(CacheFull, match=r"MiB.*--training cache_mb"):
        run(ours.trainer(TrainConfig(steps=6, batch_size=8)))
    assert len(store) == held
    assert dict(ours.trunk.traffic) == before  # refused before anything was sent


def test_the_store_on_disk_saves_messages_and_refuses_another_bottom(setup: MakeSetup, tmp_path: Path) -> None:
    def on_disk(identity: str) -> ActivationStore:
        return ActivationStore(32, "int8", max_bytes=2**20, folder=tmp_path / "smashed", identity=identity)

    ours = setup(Gradfree())
    store = ours.model.boundary.store = on_disk("one bottom")
    run(ours.trainer(checkpoint=tmp_path, save_every=1))
    row = next(q.row for q in ours.train if q.row in store)
    assert torch.equal(on_disk("one bottom").get([row]), store.get([row]))
    with pytest.raises(CheckpointError, match="another model, bottom or codec"):
        on_disk("another")
    next((tmp_path / "smashed").glob("*.safetensors")).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        on_disk("one bottom")


def test_two_point_estimates_point_along_the_gradient(setup: MakeSetup) -> None:
    """Averaged over directions, the estimate is the bottom's gradient; and it never asks for one."""
    design = Gradfree(up="fp32", down="fp32", zo=True, zo_scale=1e-3)
    ours, exact = setup(design, rank=1, targets=["q_proj"]), setup(rank=1, targets=["q_proj"])
    batch = ours.trainer().batch(0)
    exact.model(batch).backward()
    target = torch.cat([p.grad.flatten() for p in exact.ends.parameters("bottom") if p.grad is not None])
    found: list[Tensor] = []
    for seed in range(120):
        for parameter in ours.ends.parameters():
            parameter.grad = None
        design.step(ours.model, ours.ends, batch, torch.Generator().manual_seed(seed))
        found.append(torch.cat([p.grad.flatten() for p in ours.ends.parameters("bottom") if p.grad is not None]))
    estimates = torch.stack(found)
    # 256 weights, 120 directions: √(120/376) = .56
    assert float(F.cosine_similarity(estimates.sum(0), target, dim=0)) > 0.4
    sizes = estimates.norm(dim=1) / target.norm()
    assert 0.3 < float(sizes.mean()) < 2  # as large as the gradient: clipping both ends together spares the top
    assert set(ours.trunk.traffic) == {"s_A up", "s_B down"}


def test_decorrelation_lowers_what_hidden_states_say_of_tokens(setup: MakeSetup) -> None:
    plain, decorrelated = (
        setup(Online(up="fp32", down="fp32", decorrelation_weight=w), tune="full") for w in (0.0, 5.0)
    )
    config = TrainConfig(steps=25, batch_size=12, learning_rate=0.01)
    assert all("dcor" not in losses for losses in run(plain.trainer(config)))
    losses = run(decorrelated.trainer(config))
    assert sum(s["dcor"] for s in losses[-5:]) < 0.75 * sum(s["dcor"] for s in losses[:3]) * 5 / 3


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("sideways", {}, "online"),
        ("online", {"up": "int2"}, "int2"),
        ("online", {"decorrelation_weight": -1}, "decorrelation_weight"),
        ("online", {"zo": True}, "no option 'zo'"),
        ("offline", {"nosie": 0.1}, r"no option 'nosie'.*It has: .*noise"),
        ("gradfree", {"zo_scale": 0}, "zo_scale"),
        ("gradfree", {"zo": "no"}, "zo = 'no' is neither true nor false"),
        ("online", {"noise": -0.1}, "noise"),
        ("offsite", {"up": "int8"}, "offline"),
        ("offsite", {"tune_emulator": True}, "offline"),
        ("offline", {"tune_emulator": "all"}, "tune_emulator = 'all' is neither true nor false"),
    ],
)
def test_options_that_cannot_work(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_design(name, options)


@pytest.mark.parametrize("options", [{"anonymity": 1}, {"anonymity": -2}, {"anonymity": 4, "zo": True}])
def test_groups_that_hide_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="anonymity"):
        make_design("gradfree", options)
