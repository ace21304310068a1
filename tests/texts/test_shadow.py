"""A shadow client trains as a client does: with its texts and its seed it would have its very bottom."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from blindtune.data.questions import Question, TokenizedQuestion, tokenize
from blindtune.errors import CheckpointError, ConfigError
from blindtune.models import Cut, CutModel, Part, Tokenizer, load_backbone
from blindtune.texts import CutCausalLM, Ends, LocalTrunk, TrainConfig, Trainer, make_design
from blindtune.texts.shadow import ShadowClient
from blindtune.training import LabelsSummary, TextsSummary
from blindtune.training.summary import write_summary
from blindtune.wire import Readout
from tests.texts.client import SUMMARY
from tests.tiny_causal import save_tiny_causal

CONFIG = TrainConfig(steps=6, batch_size=8, learning_rate=0.01, warmup=1, seed=3)


def summary(method: str = "online", config: TrainConfig = CONFIG, **told: Any) -> TextsSummary:
    """What a run says of itself, as JSON holds it."""
    options = {"decorrelation_weight": 2.0} if method == "online" else {}
    known = {
        "method": method,
        "options": asdict(make_design(method, options)),
        "training": {**asdict(config), "betas": list(config.betas)},
    }
    return SUMMARY.model_copy(update={"rank": 16, "alpha": 32, **known, **told})


ONLINE = summary()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, film_sentences) -> tuple[CutModel, list[tuple[int, ...]]]:
    texts = [s for s in film_sentences if 4 <= len(s.split()) <= 12][:48]
    backbone = load_backbone(str(save_tiny_causal("llama", tmp_path_factory.mktemp("tiny"), texts)), cut=Cut(2, 2))
    tokenizer = Tokenizer(backbone.tokenizer, pad_token_id=backbone.pad_token_id, with_types=False)
    rows = tokenize([Question("", (text,), 0) for text in texts], tokenizer, max_length=24)
    return backbone.require_cut(), [question.row for question in rows]


def client(cut_model: CutModel, rows: Any, told: TextsSummary, folder: Path) -> Part:
    """A client's bottom after training on these texts."""
    bottom, top = copy.deepcopy(cut_model.parts["bottom"]), copy.deepcopy(cut_model.parts["top"])
    design = make_design(told.method, told.options)
    ends = Ends(bottom, top, design.parts, told.tune, told.rank, told.alpha, seed=CONFIG.seed)
    texts = [TokenizedQuestion((tuple(row),), (1,), (1,), 0) for row in rows]
    model = CutCausalLM(bottom, top, design.boundary(LocalTrunk(cut_model.parts["trunk"]), bottom))
    Trainer(model, ends, design, texts, CONFIG, summary=told, checkpoint=folder).run()
    return bottom


def apart(a: Part, b: Part, rows: list[tuple[int, ...]]) -> float:
    """How far hidden states are from each other, relative to their size."""
    ids, lengths = torch.tensor([rows[0]]), torch.tensor([len(rows[0])])
    with torch.no_grad():
        x, y = a(ids, lengths), b(ids, lengths)
    return float((x - y).norm() / y.norm())


def test_with_the_clients_texts_and_seed_it_is_the_clients_bottom(tiny, tmp_path):
    cut_model, rows = tiny
    before = {name: tensor.clone() for name, tensor in cut_model.parts["bottom"].weights().items()}
    theirs = client(cut_model, rows, ONLINE, tmp_path)
    told: list[str] = []
    shadow = ShadowClient(tmp_path).train(cut_model, rows, seed=3, say=told.append)  # of the folder, its summary alone
    assert apart(cut_model.parts["bottom"], theirs, rows) > 0.01
    # the same texts come in another order, so batches differ
    assert apart(shadow, theirs, rows) < 0.5 * apart(cut_model.parts["bottom"], theirs, rows)
    assert "shadow client: step 6 of 6, task" in told[-1]
    after = cut_model.parts["bottom"].weights()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_was_decorrelated_first_is_followed_too(tiny, tmp_path):
    """Gradfree trains no bottom; it starts from one that Online changed on public text."""
    cut_model, rows = tiny
    theirs = client(cut_model, rows, ONLINE, tmp_path)
    gradfree = summary("gradfree", replace(CONFIG, steps=2), start=ONLINE)
    assert ShadowClient(gradfree).changes_bottom
    assert not ShadowClient(gradfree.model_copy(update={"start": None})).changes_bottom
    shadow = ShadowClient(gradfree).train(cut_model, rows, seed=3)
    assert apart(shadow, theirs, rows) < 0.5 * apart(cut_model.parts["bottom"], theirs, rows)


def test_full_weights_and_two_stages(tiny):
    cut_model, rows = tiny
    both = summary(start=summary(tune="full"))
    assert apart(ShadowClient(both).train(cut_model, rows, seed=3), cut_model.parts["bottom"], rows) > 0.01


def test_stages_are_read_from_what_a_run_tells(tmp_path):
    told = summary(rank=4, alpha=8)
    write_summary(tmp_path, summary(rank=4, alpha=8, start=told))
    known = ShadowClient(tmp_path)
    assert known.stages == [told, summary(rank=4, alpha=8, start=told)]
    assert known.design == make_design("online", {"decorrelation_weight": 2.0})
    assert ShadowClient(told).stages == [told]
    for without in ({}, {key: value for key, value in told.training.items() if key != "learning_rate"}):
        untold = told.model_copy(update={"training": without})
        for run in (untold, told.model_copy(update={"start": untold})):
            with pytest.raises(ConfigError, match="training"):
                ShadowClient(run)


def test_a_start_that_nothing_is_known_of_is_said():
    """No shadow client follows it, and to leave it out would be an attack on another client."""
    told = summary("gradfree", unknown_start=True)
    for run in (told, told.model_copy(update={"unknown_start": False, "start": told})):
        with pytest.raises(ConfigError, match="started from a checkpoint that doesn't say how it was made"):
            ShadowClient(run)


def test_a_run_with_private_labels_is_no_shadow_clients(tmp_path):
    write_summary(
        tmp_path,
        LabelsSummary(
            method="padded-lora", options={}, model="m", base_model_name="m", fingerprint="1" * 64, max_length=8,
            run="", hidden_size=4,
            readout=Readout(pooling="mean"), pairs="joint", codec="fp32", adapters=1, seed=0, head="LinearHead",
            loss="cross_entropy", num_classes=2, classes=["a", "b"],
        ),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"a run of private labels, not of private texts.*`blindtune labels`"):
        ShadowClient(tmp_path)


def test_no_text_no_shadow(tiny):
    with pytest.raises(ConfigError, match="public text"):
        ShadowClient(ONLINE).train(tiny[0], [[1]], seed=0)
