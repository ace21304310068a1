"""A shadow client trains as a client does: with its texts and its seed it would have its very bottom."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from blindtune.errors import ConfigError
from blindtune.methods.guarded import Ends, SplitCausalLM, make_design
from blindtune.methods.guarded.ends import merge_checkpoint
from blindtune.models import Cut, Part, SplitModel, Tokenizer, load_backbone
from blindtune.training.guarded import GuardedConfig, GuardedTrainer
from blindtune.training.questions import Question, TokenizedQuestion, tokenize
from blindtune.training.shadow import Recipe, shadow_bottom
from tests.tiny_causal import save_tiny_causal

CONFIG = GuardedConfig(steps=6, batch_size=8, learning_rate=0.01, warmup=1, seed=3)
ONLINE = Recipe("guarded-online", asdict(make_design("guarded-online", {"decorrelation_weight": 2.0})), training=CONFIG)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, film_sentences) -> tuple[SplitModel, list[tuple[int, ...]]]:
    texts = [s for s in film_sentences if 4 <= len(s.split()) <= 12][:48]
    backbone = load_backbone(str(save_tiny_causal("llama", tmp_path_factory.mktemp("tiny"), texts)), cut=Cut(2, 2))
    assert backbone.split is not None
    tokenizer = Tokenizer(backbone.tokenizer, pad_token_id=backbone.pad_token_id, with_types=False)
    rows = tokenize([Question("", (text,), 0) for text in texts], tokenizer, max_length=24)
    return backbone.split, [question.row for question in rows]


def client(split: SplitModel, rows: Any, recipe: Recipe, folder: Any = None, start: Any = None) -> Part:
    """A client's bottom after training on these texts."""
    bottom, top = copy.deepcopy(split.parts["bottom"]), copy.deepcopy(split.parts["top"])
    design = make_design(recipe.method, recipe.options)
    ends = Ends(bottom, top, design.parts, recipe.trained, recipe.rank, recipe.alpha, seed=recipe.training.seed)
    if start is not None:
        merge_checkpoint(ends, start)
    texts = [TokenizedQuestion((tuple(row),), (1,), (1,), 0) for row in rows]
    model = SplitCausalLM(bottom, top, split.parts["trunk"])
    trainer = GuardedTrainer(model, ends, design, texts, recipe.training, checkpoint=folder)
    for _ in trainer.steps():
        pass
    trainer.save()
    return bottom


def apart(a: Part, b: Part, rows: list[tuple[int, ...]]) -> float:
    """How far hidden states are from each other, relative to their size."""
    ids, lengths = torch.tensor([rows[0]]), torch.tensor([len(rows[0])])
    with torch.no_grad():
        x, y = a(ids, lengths), b(ids, lengths)
    return float((x - y).norm() / y.norm())


def test_with_the_clients_texts_and_seed_it_is_the_clients_bottom(tiny, tmp_path):
    split, rows = tiny
    before = {name: tensor.clone() for name, tensor in split.parts["bottom"].weights().items()}
    theirs = client(split, rows, ONLINE, tmp_path)
    told: list[str] = []
    shadow = shadow_bottom(split, ONLINE, rows, seed=3, progress=told.append)
    assert apart(split.parts["bottom"], theirs, rows) > 0.01
    # the same texts come in another order, so batches differ
    assert apart(shadow, theirs, rows) < 0.5 * apart(split.parts["bottom"], theirs, rows)
    assert "shadow client: step 6 of 6, task" in told[-1]
    after = split.parts["bottom"].weights()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_was_decorrelated_first_is_followed_too(tiny, tmp_path):
    """Gradfree trains no bottom; it starts from one that Online changed on public text."""
    split, rows = tiny
    theirs = client(split, rows, ONLINE, tmp_path)
    gradfree = Recipe("guarded-gradfree", {}, training=replace(CONFIG, steps=2), start=ONLINE)
    assert gradfree.changes_bottom
    assert not replace(gradfree, start=None).changes_bottom
    shadow = shadow_bottom(split, gradfree, rows, seed=3)
    assert apart(shadow, theirs, rows) < 0.5 * apart(split.parts["bottom"], theirs, rows)


def test_full_weights_and_two_stages(tiny):
    split, rows = tiny
    both = replace(ONLINE, start=replace(ONLINE, trained="full"))
    assert apart(shadow_bottom(split, both, rows, seed=3), split.parts["bottom"], rows) > 0.01


def test_a_recipe_is_read_from_what_a_run_tells():
    summary = {
        "method": "guarded-online", "options": ONLINE.options, "trained": "lora", "rank": 4, "alpha": 8,
        "targets": None, "training": asdict(CONFIG), "start": None,
    }  # fmt: skip
    assert Recipe.of(summary) == replace(ONLINE, rank=4, alpha=8)
    assert Recipe.of({**summary, "start": summary}).stages() == [
        Recipe.of(summary),
        Recipe.of({**summary, "start": summary}),
    ]
    with pytest.raises(ConfigError, match="training"):
        Recipe.of({key: value for key, value in summary.items() if key != "training"})


def test_a_start_that_nothing_is_known_of_is_said():
    """No shadow client follows it, and to leave it out would be an attack on another client."""
    summary = {
        "method": "guarded-gradfree", "options": {}, "trained": "lora", "rank": 4, "alpha": 8,
        "targets": None, "training": asdict(CONFIG), "start": {},
    }  # fmt: skip
    for run in (summary, {**summary, "start": summary}):
        with pytest.raises(ConfigError, match="started from a checkpoint that doesn't tell how it was made"):
            Recipe.of(run)


def test_no_text_no_shadow(tiny):
    with pytest.raises(ConfigError, match="public text"):
        shadow_bottom(tiny[0], ONLINE, [[1]], seed=0)
