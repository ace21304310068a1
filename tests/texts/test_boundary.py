"""What leaves a client: noise of each message's own, tokens in groups, and nothing that isn't finite."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blindtune.errors import NonFiniteTensor
from blindtune.models import Cut, CutModel, load_backbone
from blindtune.texts import Boundary, CausalBatch, CutCausalLM, Gradfree, LocalTrunk, Online, make_design
from tests.texts.client import MakeSetup, Setup, real, run, sent_in_a_step

KEY = bytes(range(32))
NOISY = {"up": "fp32", "down": "fp32", "noise": 0.5, "clip_norm": 2.0}
HIDDEN = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def trunk(tiny_causal: dict[str, Path]) -> LocalTrunk:
    return LocalTrunk(cut_model_of(tiny_causal).parts["trunk"])


def cut_model_of(tiny_causal: dict[str, Path]) -> CutModel:
    return load_backbone(str(tiny_causal["llama"]), cut=Cut(2, 2)).require_cut()


def noisy(trunk: LocalTrunk, key: bytes | None = KEY) -> Boundary:
    """Noise of standard deviation 1 on what is clipped to norm 2."""
    return Boundary(trunk, perturb=Online(noise=0.5, clip_norm=2.0).perturb, key=key)


def messages(boundary: Boundary, step: int, count: int = 2) -> list[Tensor]:
    with boundary.training_step(step):
        return [boundary.perturb(HIDDEN) for _ in range(count)]


def test_a_repeated_step_sends_what_it_sent_before_and_each_message_has_noise_of_its_own(trunk: LocalTrunk) -> None:
    """Also where other messages, such as those of an evaluation, came in between; these have fresh noise."""
    boundary, resumed = noisy(trunk), noisy(trunk)
    first, later = messages(boundary, 3), messages(boundary, 4)
    evaluated = [boundary.perturb(HIDDEN) for _ in range(2)]
    for other in (boundary, resumed):
        assert all(torch.equal(a, b) for a, b in zip(first, messages(other, 3), strict=True))
    for one, another in combinations([*first, *later, *evaluated, *messages(noisy(trunk, None), 3)], 2):
        assert float((one - another).std()) == pytest.approx(2**0.5, rel=0.05)


def test_a_step_that_fails_leaves_no_noise_to_repeat(trunk: LocalTrunk) -> None:
    boundary = noisy(trunk)
    with pytest.raises(ZeroDivisionError), boundary.training_step(0):
        _ = 1 / 0
    assert not torch.equal(boundary.perturb(HIDDEN), boundary.perturb(HIDDEN))
    assert torch.equal(messages(boundary, 0)[0], messages(noisy(trunk), 0)[0])


def test_nothing_is_told_where_nothing_is_sent(trunk: LocalTrunk, tiny_causal: dict[str, Path]) -> None:
    parts = cut_model_of(tiny_causal).parts
    model = CutCausalLM(parts["bottom"], parts["top"], Boundary(trunk))
    told: list[str] = []
    model.boundary.on_sent = lambda name, rows: told.append(name)
    assert torch.isfinite(model(CausalBatch.of([[5, 6, 7]], [1])))
    assert not told
    assert not trunk.traffic


def test_noise_is_secret(setup: MakeSetup) -> None:
    """Whoever knows the program, the seed and all options can't draw the noise again."""
    runs = [setup(Online(**NOISY)) for _ in range(2)] + [setup(Online(**NOISY), key=KEY) for _ in range(2)]
    first, second, one, same = (sent_in_a_step(ours, ours.trainer())[0] for ours in runs)
    assert float((first - second).std()) == pytest.approx(2**0.5, rel=0.15)
    assert torch.equal(one, same)  # as a resumed run has it


def test_two_points_have_noise_of_their_own(setup: MakeSetup) -> None:
    """With one noise in both messages their difference would be that of the hidden states, in the clear."""
    ours = setup(Gradfree(**NOISY, zo=True, zo_scale=1e-7))
    plus, minus = sent_in_a_step(ours, ours.trainer())
    assert float((plus - minus).std()) == pytest.approx(2**0.5, rel=0.15)


def test_evaluation_never_repeats_its_noise(setup: MakeSetup) -> None:
    ours = setup(Online(**NOISY), key=KEY)
    batch = ours.trainer().batch(0)
    with torch.no_grad():
        first, second = ours.model.smash(batch), ours.model.smash(batch)
    assert float((first - second)[real(batch)].std()) == pytest.approx(2**0.5, rel=0.15)


def test_noise_has_the_size_that_was_asked_for(setup: MakeSetup) -> None:
    ours = setup(Online(**NOISY))
    batch = ours.trainer().batch(0)
    with torch.no_grad():
        clean = ours.model.bottom(batch.ids, batch.lengths)
        first = ours.model.smash(batch)
    scale = (2.0 / clean.norm(dim=-1, keepdim=True)).clamp_max(1)
    assert float((first - clean * scale)[real(batch)].std()) == pytest.approx(1.0, rel=0.1)


def test_what_was_sent_is_told_for_the_audit(setup: MakeSetup) -> None:
    ours = setup()
    told: dict[str, list[list[int]]] = {}
    ours.model.boundary.on_sent = told.__setitem__
    trainer = ours.trainer()
    run(trainer, 2)
    assert list(told.values()) == [trainer.batch(0).rows(), trainer.batch(1).rows()]
    assert all(len(name) == 64 for name in told)


def test_non_finite_smashed_data_are_not_sent(setup: MakeSetup) -> None:
    ours = setup()
    with torch.no_grad():
        ours.ends.parameters("bottom")[0].fill_(float("nan"))
    with pytest.raises(NonFiniteTensor, match="hidden"):
        run(ours.trainer())
    assert not ours.trunk.traffic


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
    ours = setup(make_design("gradfree", {"anonymity": 4}))
    boundary = ours.model.boundary
    assert boundary.encode is not None
    sent = boundary.encode(torch.arange(ours.model.bottom.causal.config.vocab_size))
    rows = [question.row for question in ours.train[:4]]
    others = [tuple(int((sent == sent[token]).nonzero()[-1, 0]) for token in row) for row in rows]
    assert rows != others
    bodies = Bodies(ours, monkeypatch)
    answers: list[Tensor] = []
    for texts in (rows, others):
        answers.append(ours.model.score(CausalBatch.of(texts, [2] * 4))[0])
    assert bodies.sent[0] == bodies.sent[1]
    assert not torch.allclose(answers[0], answers[1])  # the client knows what it asked
    boundary.encode = None
    ours.model.score(CausalBatch.of(rows, [2] * 4))
    ours.model.score(CausalBatch.of(others, [2] * 4))
    assert bodies.sent[2] != bodies.sent[3]


def test_training_on_groups_goes_on_with_true_tokens(setup: MakeSetup) -> None:
    """What the server can't tell apart is given back in the residual stream: losses are those of the true texts."""
    ours = setup(make_design("gradfree", {"anonymity": 4, "up": "fp32", "down": "fp32"}))
    trainer = ours.trainer()
    batch = trainer.batch(0)
    encode = ours.model.boundary.encode
    assert encode is not None
    sent = CausalBatch(encode(batch.ids), batch.lengths, batch.starts)
    with torch.no_grad():
        trunk_output = ours.model.through(ours.model.smash(batch), batch)
        bottom, trunk = ours.model.bottom, ours.trunk
        of_sent = bottom(sent.ids, sent.lengths)
        expected = trunk(of_sent, batch.lengths) + bottom(batch.ids, batch.lengths) - of_sent
    assert torch.allclose(trunk_output[real(batch)], expected[real(batch)], atol=1e-5)
    losses = run(trainer)
    assert losses[-1]["task"] < losses[0]["task"]
