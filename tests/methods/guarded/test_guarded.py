"""Training over a real server is training of the whole model, and each design sends what it says."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from blindtune.client import Operator, RemoteTrunk, Transport, fetch_part
from blindtune.errors import BlindtuneError, CacheFull, CheckpointError, ConfigError, NonFiniteTensor
from blindtune.methods.guarded import CausalBatch, Ends, Gradfree, Online, SmashedStore, SplitCausalLM, make_design
from blindtune.methods.guarded.designs import Design
from blindtune.methods.guarded.ends import WHOLE, merge_checkpoint, read_ends, read_tuned
from blindtune.models import Cut, load_backbone
from blindtune.models.plugged import plug_in
from blindtune.models.split import tie
from blindtune.training.guarded import GuardedConfig, GuardedTrainer, evaluate_questions
from blindtune.training.questions import Question, TokenizedQuestion, tokenize
from tests.conftest import SplitServer

CONFIG = GuardedConfig(steps=4, batch_size=4, learning_rate=0.01, warmup=1)


@dataclass
class Setup:
    """A client of the split server."""

    model: SplitCausalLM
    ends: Ends
    design: Any
    train: list[TokenizedQuestion]
    trunk: RemoteTrunk
    operator: Operator

    def trainer(self, config: GuardedConfig = CONFIG, **options: Any) -> GuardedTrainer:
        return GuardedTrainer(self.model, self.ends, self.design, self.train, config, **options)


MakeSetup = Callable[..., Setup]


def questions(sentences: list[str]) -> list[Question]:
    """Which of two words ends a film review's sentence."""
    found: list[Question] = []
    for index, sentence in enumerate(sentences):
        words = sentence.split()
        if 6 <= len(words) <= 16 and len(found) < 24:
            found.append(Question(" ".join(words[:-1]), (" good", " bad"), index % 2))
    return found


@pytest.fixture
def setup(split_server: SplitServer, film_sentences: list[str]) -> Generator[MakeSetup]:
    """`setup(design, **ends)`: fp32 unless the design says otherwise."""
    with ExitStack() as stack:

        def make(design: Design | None = None, **ends: Any) -> Setup:
            design = design or Online(up="fp32", down="fp32")
            transport = Transport(split_server.url)
            stack.callback(transport.close)
            operator = Operator(transport, None)
            bottom, top = fetch_part(operator, "bottom"), fetch_part(operator, "top")
            tie(bottom, top)
            up, down = design.codecs()
            trunk = RemoteTrunk(operator, up=up, down=down)
            tuned = Ends(bottom, top, **{"parts": design.parts, "rank": 4, "alpha": 8, **ends})
            rows = tokenize(questions(film_sentences), operator.tokenizer(), max_length=24)
            if isinstance(design, Gradfree):
                design.store = SmashedStore(32, down, max_bytes=2**20)
            return Setup(SplitCausalLM(bottom, top, trunk), tuned, design, rows, trunk, operator)

        yield make


def run(trainer: GuardedTrainer, steps: int | None = None) -> list[dict[str, float]]:
    losses: list[dict[str, float]] = []
    for step in trainer.steps():
        losses.append(step.losses)
        if len(losses) == steps:
            break
    return losses


def logits(causal: Any, batch: CausalBatch) -> Tensor:
    mask = (torch.arange(batch.ids.shape[1]) < batch.lengths.unsqueeze(1)).long()
    with torch.no_grad():
        return causal(input_ids=batch.ids, attention_mask=mask).logits[mask.bool()]


def split_logits(setup: Setup, batch: CausalBatch) -> Tensor:
    with torch.no_grad():
        carried = setup.model.through(setup.model.smash(batch), batch)
        hidden = setup.model.top(carried, batch.lengths)
    mask = torch.arange(batch.ids.shape[1]) < batch.lengths.unsqueeze(1)
    return setup.model.top.logits(hidden).detach()[mask]


def test_a_peft_checkpoint_that_stock_peft_loads(setup: MakeSetup, split_server: SplitServer, tmp_path: Path) -> None:
    ours = setup()
    trainer = ours.trainer(checkpoint=tmp_path, summary={"base_model": str(split_server.model)})
    run(trainer)
    trainer.save()
    base = AutoModelForCausalLM.from_pretrained(split_server.model)
    batch = trainer.batch(0)
    untrained = logits(base, batch)
    stock = PeftModel.from_pretrained(base, tmp_path)
    assert torch.allclose(logits(stock, batch), split_logits(ours, batch), atol=1e-4)
    assert not torch.allclose(untrained, split_logits(ours, batch), atol=1e-2)
    assert read_ends(tmp_path)["rank"] == 4


def test_weights_that_stock_transformers_load(setup: MakeSetup, split_server: SplitServer, tmp_path: Path) -> None:
    ours = setup(trained="full")
    trainer = ours.trainer(checkpoint=tmp_path)
    run(trainer)
    trainer.save()
    causal = AutoModelForCausalLM.from_pretrained(split_server.model)
    tuned = load_file(tmp_path / "model.safetensors")
    missing, unexpected = causal.load_state_dict(tuned, strict=False)
    assert not unexpected
    assert {name.split(".")[2] for name in tuned} == {"0", "1", "3", "4"}  # blocks of the ends
    assert "model.layers.2.mlp.up_proj.weight" in missing
    batch = trainer.batch(0)
    assert torch.allclose(logits(causal, batch), split_logits(ours, batch), atol=1e-4)


def test_online_training_is_training_of_the_whole_model(setup: MakeSetup, split_server: SplitServer) -> None:
    """fp32: the same gradients as one process has, step by step, so the same weights."""
    ours = setup(trained="full")
    trainer = ours.trainer()
    whole: Any = AutoModelForCausalLM.from_pretrained(split_server.model)
    whole.requires_grad_(False)
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_(name in ours.ends.trainable)
    reference = GuardedTrainer(
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
        self.bottom = self.middle = self.disturb = self.encode = None
        self.device = torch.device("cpu")


class _WholeEnds:
    def __init__(self, causal: Any, ends: Ends) -> None:
        self.trainable = {n: p for n, p in causal.named_parameters() if n in ends.trainable}
        self.trained, self.rank, self.alpha = "full", 0, 0

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.trainable.values())


class _WholeDesign:
    def encoder(self, bottom: Any) -> None:
        return None

    def step(self, model: Any, ends: Any, batch: CausalBatch, generator: Any) -> dict[str, float]:
        mask = (torch.arange(batch.ids.shape[1]) < batch.lengths.unsqueeze(1)).long()
        output = model.causal(input_ids=batch.ids, attention_mask=mask).logits
        learned = batch.learned
        loss = F.cross_entropy(output[learned], batch.ids[:, 1:][learned[:, :-1]])
        loss.backward()
        return {"task": float(loss.detach())}


def test_operations_of_attention_are_counted_whichever_kernel_computes_it(setup: MakeSetup) -> None:
    (fused,) = [step.flops for step in setup().trainer(GuardedConfig(steps=1, batch_size=4)).steps()]
    with sdpa_kernel(SDPBackend.MATH):  # plain products of matrices
        (plain,) = [step.flops for step in setup().trainer(GuardedConfig(steps=1, batch_size=4)).steps()]
    assert plain <= fused < 1.05 * plain  # a fused backward pass computes one of seven products again


def test_gradfree_sends_each_example_once_and_no_gradient(setup: MakeSetup) -> None:
    ours = setup(Gradfree(up="fp32", down="fp32"))
    run(ours.trainer(GuardedConfig(steps=6, batch_size=4, learning_rate=0.01)))  # one epoch of 24
    once = dict(ours.trunk.traffic)
    run(ours.trainer(GuardedConfig(steps=30, batch_size=4, learning_rate=0.01)))  # five more
    assert dict(ours.trunk.traffic) == once
    assert set(once) == {"s_A up", "s_B down"}
    assert not ours.ends.parameters("bottom")


def test_gradfree_learns_from_the_store_what_it_would_learn_over_the_wire(setup: MakeSetup) -> None:
    kept, sent = setup(Gradfree(up="fp32", down="fp32")), setup(Online(up="fp32", down="fp32"), parts=("top",))
    assert [s["task"] for s in run(kept.trainer())] == pytest.approx([s["task"] for s in run(sent.trainer())], rel=1e-4)


def test_a_full_store_is_refused_and_keeps_what_it_has(setup: MakeSetup) -> None:
    design = Gradfree()
    ours = setup(design)
    row = ours.train[0].row
    design.store = SmashedStore(32, "int8", max_bytes=3 * len(row) * 64)
    run(ours.trainer(GuardedConfig(steps=1, batch_size=1)))
    held = len(design.store)
    before = dict(ours.trunk.traffic)
    with pytest.raises(CacheFull, match=r"MiB.*--cache-mb"):
        run(ours.trainer(GuardedConfig(steps=6, batch_size=8)))
    assert len(design.store) == held
    assert dict(ours.trunk.traffic) == before  # refused before anything was sent


def test_the_store_on_disk_saves_messages_and_refuses_another_bottom(setup: MakeSetup, tmp_path: Path) -> None:
    design = Gradfree()
    ours = setup(design)
    design.store = SmashedStore(32, "int8", max_bytes=2**20, folder=tmp_path / "smashed", identity="one bottom")
    run(ours.trainer(checkpoint=tmp_path, save_every=1))
    again = SmashedStore(32, "int8", max_bytes=2**20, folder=tmp_path / "smashed", identity="one bottom")
    row = next(q.row for q in ours.train if q.row in design.store)
    assert torch.equal(again.get([row]), design.store.get([row]))
    with pytest.raises(CheckpointError, match="another model, bottom or codec"):
        SmashedStore(32, "int8", max_bytes=2**20, folder=tmp_path / "smashed", identity="another")
    next((tmp_path / "smashed").glob("*.safetensors")).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        SmashedStore(32, "int8", max_bytes=2**20, folder=tmp_path / "smashed", identity="one bottom")


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
    plain, guarded = (setup(Online(up="fp32", down="fp32", decorrelation_weight=w), trained="full") for w in (0.0, 5.0))
    config = GuardedConfig(steps=25, batch_size=12, learning_rate=0.01)
    run(plain.trainer(config))
    losses = run(guarded.trainer(config))
    assert sum(s["dcor"] for s in losses[-5:]) < 0.75 * sum(s["dcor"] for s in losses[:3]) * 5 / 3


def noise_of(setup: Setup, trainer: GuardedTrainer) -> Tensor:
    """What is added to the first batch's hidden states in the first message of the first step."""
    sent: list[Tensor] = []
    forward = setup.trunk.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup.trunk, "forward", _kept(forward, sent))
        run(trainer, 1)
    return sent[0]


def _kept(forward: Any, sent: list[Tensor]) -> Any:
    def call(packed: Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(packed.detach().clone())
        return forward(packed, *arguments, **options)

    return call


def test_noise_is_secret(setup: MakeSetup) -> None:
    """Whoever knows the program, the seed and all options can't draw the noise again."""
    design = {"up": "fp32", "down": "fp32", "noise": 0.5, "clip_norm": 2.0}
    runs = [setup(Online(**design)) for _ in range(4)]
    first, second = (noise_of(ours, ours.trainer()) for ours in runs[:2])
    assert float((first - second).std()) == pytest.approx(2**0.5, rel=0.15)
    one, same = (noise_of(ours, ours.trainer(key=bytes(range(32)))) for ours in runs[2:])  # as a resumed run has it
    assert torch.equal(one, same)


def test_two_points_have_noise_of_their_own(setup: MakeSetup) -> None:
    """With one noise in both messages their difference would be that of the hidden states, in the clear."""
    ours = setup(Gradfree(up="fp32", down="fp32", zo=True, zo_scale=1e-7, noise=0.5, clip_norm=2.0))
    sent: list[Tensor] = []
    forward = ours.trunk.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours.trunk, "forward", _kept(forward, sent))
        run(ours.trainer(), 1)
    plus, minus = sent
    assert float((plus - minus).std()) == pytest.approx(2**0.5, rel=0.15)


def test_evaluation_never_repeats_its_noise(setup: MakeSetup) -> None:
    ours = setup(Online(up="fp32", down="fp32", noise=0.5, clip_norm=2.0))
    trainer = ours.trainer()
    batch = trainer.batch(0)
    with torch.no_grad():
        first, second = ours.model.smash(batch), ours.model.smash(batch)
    mask = torch.arange(batch.ids.shape[1]) < batch.lengths.unsqueeze(1)
    assert float((first - second)[mask].std()) == pytest.approx(2**0.5, rel=0.15)


def test_noise_has_the_size_that_was_asked_for(setup: MakeSetup) -> None:
    ours = setup(Online(up="fp32", down="fp32", noise=0.5, clip_norm=2.0))
    trainer = ours.trainer()
    batch = trainer.batch(0)
    with torch.no_grad():
        clean = ours.model.bottom(batch.ids, batch.lengths)
        first = ours.model.smash(batch)
    mask = torch.arange(batch.ids.shape[1]) < batch.lengths.unsqueeze(1)
    scale = (2.0 / clean.norm(dim=-1, keepdim=True)).clamp_max(1)
    assert float((first - clean * scale)[mask].std()) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("design", [Online(), Online(noise=0.1, decorrelation_weight=0.1), Gradfree(zo=True)], ids=str)
def test_a_resumed_run_ends_where_an_uninterrupted_one_ends(setup: MakeSetup, tmp_path: Path, design: Design) -> None:
    whole, key = setup(design), bytes(range(32))
    run(whole.trainer(key=key))
    first = setup(design)
    broken = first.trainer(checkpoint=tmp_path, key=key)
    run(broken, 2)
    broken.save()
    second = setup(design)
    trainer = second.trainer(checkpoint=tmp_path)
    trainer.resume()
    assert trainer.done == 2
    run(trainer)
    for name, parameter in whole.ends.trainable.items():
        assert torch.equal(parameter, second.ends.trainable[name]), name


TOLD = {"fingerprint": "1" * 64, "cut": [2, 2], "emulator": {"tensors_sha256": "2" * 64}}


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"fingerprint": "3" * 64}, "model"),
        ({"cut": [1, 3]}, "cut"),
        ({"emulator": {"tensors_sha256": "4" * 64}}, "emulator"),
        ({"emulator": None, "cut": [1, 3]}, "cut; emulator"),
    ],
)
def test_resume_refuses_another_model(setup: MakeSetup, tmp_path: Path, told: dict[str, Any], says: str) -> None:
    """Even one whose weights have the same shapes."""
    ours = setup()
    trainer = ours.trainer(checkpoint=tmp_path, summary=TOLD)
    run(trainer, 1)
    trainer.save()
    with pytest.raises(CheckpointError, match=rf"differs in: {says}\."):
        setup().trainer(checkpoint=tmp_path, summary={**TOLD, **told}).resume()
    setup().trainer(checkpoint=tmp_path, summary=TOLD).resume()


def test_resume_refuses_another_run(setup: MakeSetup, tmp_path: Path) -> None:
    ours = setup()
    trainer = ours.trainer(checkpoint=tmp_path / "out")
    run(trainer, 1)
    trainer.save()
    with pytest.raises(CheckpointError, match=r"differs in: method or its options\."):
        setup(Online()).trainer(checkpoint=tmp_path / "out").resume()
    with pytest.raises(CheckpointError, match="steps, batch size, rate or seed"):
        setup().trainer(GuardedConfig(steps=5), checkpoint=tmp_path / "out").resume()
    with pytest.raises(CheckpointError, match="what of the ends is tuned"):
        setup(parts=("top",)).trainer(checkpoint=tmp_path / "out").resume()
    started = setup()
    merge_checkpoint(started.ends, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"differs in: --start\."):
        started.trainer(checkpoint=tmp_path / "out").resume()
    with pytest.raises(CheckpointError, match="can't be read"):
        setup().trainer(checkpoint=tmp_path / "nowhere").resume()


@pytest.mark.parametrize("trained", ["lora", "full"])
def test_tuned_ends_are_a_start(setup: MakeSetup, tmp_path: Path, trained: str) -> None:
    tuned = setup(trained=trained)
    trainer = tuned.trainer(checkpoint=tmp_path)
    run(trainer)
    trainer.save()
    fresh = setup(Gradfree(up="fp32", down="fp32"))
    merge_checkpoint(fresh.ends, tmp_path)
    batch = trainer.batch(0)
    assert torch.allclose(split_logits(fresh, batch), split_logits(tuned, batch), atol=1e-4)


@pytest.mark.parametrize(
    "kinds", [("lora", "lora"), ("lora", "full"), ("full", "lora"), ("full", "full"), ("lora", "lora", "lora")], ids=str
)
def test_a_checkpoint_holds_what_it_started_from(
    setup: MakeSetup, split_server: SplitServer, tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    """Whoever loads it gets the model that was trained: with a bottom of the first run that the last one didn't train,
    and layers of the first that the last doesn't have."""
    out: Path | None = None
    for number, kind in enumerate(kinds):
        last = number == len(kinds) - 1
        design = Gradfree(up="fp32", down="fp32") if last else None
        ours = setup(design, trained=kind, **({"rank": 2, "alpha": 6, "targets": ["q_proj"]} if last else {}))
        if out is not None:
            merge_checkpoint(ours.ends, out)
        out = tmp_path / str(number)
        trainer = ours.trainer(checkpoint=out, summary={"base_model": str(split_server.model)})
        run(trainer)
        trainer.save()
    assert out is not None
    batch = trainer.batch(0)
    expected = split_logits(ours, batch)
    split = load_backbone(str(split_server.model), cut=Cut(2, 2)).split
    assert split is not None
    assert not torch.allclose(logits(split.causal, batch), expected, atol=0.1)
    assert torch.allclose(logits(plug_in(split, *read_tuned(out)), batch), expected, atol=1e-4)
    stock: Any = AutoModelForCausalLM.from_pretrained(split_server.model)
    if set(kinds) == {"lora"}:
        stock = PeftModel.from_pretrained(stock, out)
    else:
        assert not stock.load_state_dict(load_file(out / "model.safetensors"), strict=False).unexpected_keys
    assert torch.allclose(logits(stock, batch), expected, atol=1e-4)
    state = load_file(out / "resume.safetensors")
    assert {n for n in state if n.startswith("weights.")} == {f"weights.{n}" for n in ours.ends.trainable}


def test_a_run_with_a_start_goes_on_from_the_same_start(setup: MakeSetup, tmp_path: Path) -> None:
    first = setup()
    trainer = first.trainer(checkpoint=tmp_path / "first")
    run(trainer)
    trainer.save()
    ends: list[dict[str, Tensor]] = []
    for stop in (None, 2):
        out = tmp_path / f"{stop}"
        for steps in (stop, None):
            ours = setup()
            merge_checkpoint(ours.ends, tmp_path / "first")
            trainer = ours.trainer(checkpoint=out)
            if (out / "resume.safetensors").is_file():
                trainer.resume()
            run(trainer, steps)
            trainer.save()
        ends.append(load_file(out / "adapter_model.safetensors"))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


@pytest.mark.parametrize(
    ("name", "value"), [("use_rslora", True), ("alpha_pattern", {"q_proj": 4}), ("rank_pattern", {"q_proj": 4})]
)
def test_a_foreign_checkpoint_that_would_be_read_wrongly(
    setup: MakeSetup, tmp_path: Path, name: str, value: Any
) -> None:
    """Its matrices alone don't say what it does to the weights."""
    setup().ends.save(tmp_path, "tiny")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(CheckpointError, match=name):
        read_tuned(tmp_path)


def test_a_start_that_changes_more_than_blocks_of_the_ends(setup: MakeSetup, tmp_path: Path) -> None:
    """Its embeddings would be in no checkpoint of ours."""
    ours = setup()
    save_file({"model.embed_tokens.weight": ours.model.bottom.causal.model.embed_tokens.weight + 1}, tmp_path / WHOLE)
    with pytest.raises(CheckpointError, match="no weight that may be tuned"):
        merge_checkpoint(ours.ends, tmp_path)


def test_evaluation_by_likelihood(setup: MakeSetup, split_server: SplitServer) -> None:
    ours = setup()
    *_, (count, scores) = evaluate_questions(ours.model, ours.train)
    causal: Any = AutoModelForCausalLM.from_pretrained(split_server.model)
    right = 0
    for question in ours.train:
        values: list[float] = []
        for row, start in zip(question.rows, question.starts, strict=True):
            with torch.no_grad():
                chances = causal(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
            values.append(sum(float(chances[t - 1, row[t]]) for t in range(start, len(row))))
        right += values.index(max(values)) == question.answer
    assert count == len(ours.train)
    assert scores["accuracy"] == right / count


def test_what_was_sent_is_told_for_the_audit(setup: MakeSetup) -> None:
    ours = setup()
    told: dict[str, list[list[int]]] = {}
    ours.model.on_sent = told.__setitem__
    trainer = ours.trainer()
    run(trainer, 2)
    assert list(told.values()) == [trainer.batch(0).rows(), trainer.batch(1).rows()]
    assert all(len(name) == 64 for name in told)


def test_a_loss_that_explodes_sends_no_gradient(setup: MakeSetup) -> None:
    ours = setup()
    with torch.no_grad():
        ours.ends.parameters("top")[0].fill_(float("inf"))
    with pytest.raises(NonFiniteTensor, match="no gradient was sent"):
        run(ours.trainer())
    assert "g_B up" not in ours.trunk.traffic


def test_non_finite_smashed_data_are_not_sent(setup: MakeSetup) -> None:
    ours = setup()
    with torch.no_grad():
        ours.ends.parameters("bottom")[0].fill_(float("nan"))
    with pytest.raises(NonFiniteTensor, match="hidden"):
        run(ours.trainer())
    assert not ours.trunk.traffic


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("guarded-sideways", {}, "guarded-online"),
        ("guarded-online", {"up": "int2"}, "int2"),
        ("guarded-online", {"decorrelation_weight": -1}, "decorrelation_weight"),
        ("guarded-online", {"zo": True}, "no option 'zo'"),
        ("guarded-gradfree", {"zo_scale": 0}, "zo_scale"),
        ("guarded-gradfree", {"zo": "no"}, "zo = 'no' is neither true nor false"),
        ("guarded-online", {"noise": -0.1}, "noise"),
        ("offsite", {"up": "int8"}, "guarded-offline"),
        ("offsite", {"tune_emulator": True}, "guarded-offline"),
        ("guarded-offline", {"tune_emulator": "all"}, "tune_emulator = 'all' is neither true nor false"),
    ],
)
def test_options_that_cannot_work(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_design(name, options)


def test_layers_that_no_block_has(setup: MakeSetup) -> None:
    with pytest.raises(BlindtuneError, match=r"query.*q_proj"):
        setup(targets=["query"])


class Bodies:
    """Bodies of what a client posts."""

    def __init__(self, setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[bytes] = []
        transport = setup.operator.transport
        post = transport.post

        def keep(path: str, body: bytes) -> bytes:
            self.sent.append(body)
            return post(path, body)

        monkeypatch.setattr(transport, "post", keep)


def test_texts_of_the_same_groups_are_the_same_to_the_server(setup: MakeSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bit that leaves depends on groups alone, for training and for evaluation."""
    ours = setup(make_design("guarded-gradfree", {"anonymity": 4}))
    ours.trainer()
    encode = ours.model.encode
    assert encode is not None
    sent = encode(torch.arange(ours.model.bottom.causal.config.vocab_size))
    rows = [question.row for question in ours.train[:4]]
    others = [tuple(int((sent == sent[token]).nonzero()[-1, 0]) for token in row) for row in rows]
    assert rows != others
    bodies = Bodies(ours, monkeypatch)
    answers: list[Tensor] = []
    for texts in (rows, others):
        answers.append(ours.model.score(CausalBatch.of(texts, [2] * 4))[0])
    assert bodies.sent[0] == bodies.sent[1]
    assert not torch.allclose(answers[0], answers[1])  # the client knows what it asked
    ours.model.encode = None
    ours.model.score(CausalBatch.of(rows, [2] * 4))
    ours.model.score(CausalBatch.of(others, [2] * 4))
    assert bodies.sent[2] != bodies.sent[3]


def test_training_on_groups_goes_on_with_true_tokens(setup: MakeSetup) -> None:
    """What the server can't tell apart is given back in the residual stream: losses are those of the true texts."""
    ours = setup(make_design("guarded-gradfree", {"anonymity": 4, "up": "fp32", "down": "fp32"}))
    trainer = ours.trainer()
    batch = trainer.batch(0)
    encode = ours.model.encode
    assert encode is not None
    sent = CausalBatch(encode(batch.ids), batch.lengths, batch.starts)
    with torch.no_grad():
        carried = ours.model.through(ours.model.smash(batch), batch)
        bottom, trunk = ours.model.bottom, ours.trunk
        of_sent = bottom(sent.ids, sent.lengths)
        expected = trunk(of_sent, batch.lengths) + bottom(batch.ids, batch.lengths) - of_sent
    real = torch.arange(batch.ids.shape[1]) < batch.lengths.unsqueeze(1)
    assert torch.allclose(carried[real], expected[real], atol=1e-5)
    losses = run(trainer)
    assert losses[-1]["task"] < losses[0]["task"]


@pytest.mark.parametrize("options", [{"anonymity": 1}, {"anonymity": -2}, {"anonymity": 4, "zo": True}])
def test_groups_that_hide_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="anonymity"):
        make_design("guarded-gradfree", options)
