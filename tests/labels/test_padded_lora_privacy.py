"""From end to end on MiniLM: the attacks that read labels off plain LoRA read nothing off padded LoRA's adapters."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pytest

from blindtune.audit import Recomputation, Row, View, read_view
from blindtune.audit.labels import ATTACKS, Channel
from blindtune.audit.labels.lattice import on_lattice
from blindtune.audit.statistics import best_auc, mean_auc
from blindtune.cli.options import make_lora_config
from blindtune.client import Backbone
from blindtune.data import Examples
from blindtune.labels import LinearHead, LoRA, PaddedLoRA, PrivateModel
from blindtune.labels.trainer import TrainConfig, Trainer
from blindtune.models import FrozenBackbone
from blindtune.privacy.randomness import SecureGenerator
from blindtune.wire import Transcript
from tests.conftest import several

STEPS, ROWS = 20, 300


@dataclass
class Run:
    """What two operators recorded of a short run, and what only the client knows."""

    views: list[View]
    labels: dict[Row, int]
    own: np.ndarray
    """h' − h(x, 0) of all texts at the end, as the client has it."""

    def seen(
        self, view: View, recompute: Recomputation, looks: slice, *, knowing: bool = True
    ) -> tuple[list[np.ndarray], np.ndarray, list[int]]:
        """For the texts that this operator saw: shifts under these of its adapters, frozen features, labels.

        Not `knowing`: under adapters that have the same weights in random order.
        """
        rows = [row for row in self.labels if row in view.types]
        frozen = recompute.hidden(view, (), rows)[0]
        adapters = [look.adapters if knowing else look.shuffled for look in view.moving[looks]]
        recompute.ensure(view, adapters, rows)  # the layers below the adapters run once
        shifts = [recompute.hidden(view, chosen, rows)[0] - frozen for chosen in adapters]
        return shifts, frozen, [self.labels[row] for row in rows]


@pytest.fixture(scope="module")
def runs(film_examples: Examples, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    examples = film_examples.take(range(ROWS))
    return {method.name: run(method, examples, tmp_path_factory) for method in (LoRA(), PaddedLoRA(steps=STEPS))}


def run(method: LoRA | PaddedLoRA, examples: Examples, folders: pytest.TempPathFactory) -> Run:
    records = [folders.mktemp(method.name) for _ in range(2)]
    with ExitStack() as stack:
        servers = [stack.enter_context(several(1, "minilm", folders, record=record))[0] for record in records]
        backbone = Backbone([server.url for server in servers], max_length=32, num_adapters=0)
        rank = method.default_rank
        backbone.adapter_config = make_lora_config(
            backbone.info, rank=rank, alpha=2 * rank, targets=None, layers="upper"
        )
        head = LinearHead(backbone.hidden_size, 2)
        model = PrivateModel(backbone, head, method, generator=SecureGenerator(bytes(range(32))))
        trainer = Trainer(model, examples, TrainConfig(steps=STEPS, learning_rate=method.default_lr))
        trainer.prepare()
        list(trainer.steps())
        own = backbone.infer(examples.texts)[0] - backbone.frozen(examples.texts)
        rows = [row.ids for row in backbone.rows(examples.texts)]
        backbone.close()
    views = [read_view(Transcript(record), record.name) for record in records]
    return Run(views, dict(zip(rows, examples.labels, strict=True)), own.numpy())


@pytest.fixture(scope="module")
def recompute(minilm: FrozenBackbone) -> Recomputation:
    return Recomputation(minilm)


def score(name: str, features: np.ndarray, labels: list[int]) -> float:
    attack, truth = ATTACKS[name], np.array(labels)
    scores = attack.run(Channel(features), truth)
    assert scores is not None
    return mean_auc(scores, truth)[0] if scores.ndim == 3 else best_auc(scores, truth, symmetric=attack.symmetric)[0]


def test_under_lora_shifts_tell_the_labels(runs: dict[str, Run], recompute: Recomputation):
    """To an attacker who knows none, and to one who knows most of them better than the text does."""
    for view in runs["lora"].views:
        [shift], frozen, labels = runs["lora"].seen(view, recompute, slice(-1, None))
        assert score("spectral", shift, labels) > 0.8
        assert score("logistic regression", shift, labels) > score("logistic regression", frozen, labels) + 0.06


def test_under_padded_lora_they_tell_what_the_text_tells_and_no_more(runs: dict[str, Run], recompute: Recomputation):
    """Under each pad the text is seen from another side, and one look does better by chance, as does one order of the
    control's weights: so one operator's odd looks and the other's even ones together, as their pads are the same."""
    margins = {"spectral": 0.05, "logistic regression": 0.02}
    own, control = ({attack: list[float]() for attack in margins} for _ in range(2))
    for first, view in enumerate(runs["padded-lora"].views):
        for knowing, found in ((True, own), (False, control)):
            shifts, _, labels = runs["padded-lora"].seen(view, recompute, slice(first, None, 2), knowing=knowing)
            for attack, scores in found.items():
                scores += [score(attack, shift, labels) for shift in shifts]
    for attack, margin in margins.items():
        assert np.mean(own[attack]) < np.mean(control[attack]) + margin


def test_under_padded_lora_the_client_has_learned_what_operators_have_not(runs: dict[str, Run]):
    """The same attack on what only the difference of both operators' answers gives."""
    labels = list(runs["padded-lora"].labels.values())
    assert len(labels) == len(runs["padded-lora"].own)
    assert score("spectral", runs["padded-lora"].own, labels) > 0.8


def test_what_padded_lora_sends_lies_on_a_public_lattice_and_what_lora_sends_does_not(runs: dict[str, Run]):
    """So its low-order bits tell nothing. The audit looks for that in every transcript."""
    for name, lies in (("padded-lora", True), ("lora", False)):
        for view in runs[name].views:
            found = on_lattice(view)
            assert found.of_gradients >= STEPS // 2
            assert found.of_adapters > 1
            assert found.gradients == lies * found.of_gradients
            assert found.adapters == lies * found.of_adapters
