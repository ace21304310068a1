"""Distillation: what it minimises, what it changes, and what it refuses."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from blindtune.errors import ConfigError, SequenceTooLong
from blindtune.models import Cut, FrozenBackbone, Part, Tokenizer, Tokens, load_backbone
from blindtune.models.backbone import fingerprint
from blindtune.models.cut.distill import MSE_WEIGHT, distill, evaluate
from blindtune.models.cut.emulator import make_emulator
from tests.tiny import POSITIONS
from tests.tiny_causal import save_tiny_causal

FAMILIES = ("llama", "opt", "qwen2")


@pytest.fixture(scope="module")
def backbones(tmp_path_factory, film_sentences) -> dict[str, FrozenBackbone]:
    """Seven blocks, of which the trunk has 2 … 4, after 100 steps of pretraining: the trunk is of use."""
    folder = tmp_path_factory.mktemp("causal")
    loaded: dict[str, FrozenBackbone] = {}
    for name in FAMILIES:
        save_tiny_causal(name, folder / name, film_sentences[:600], layers=7)
        pretrain(folder / name, folder / "llama", film_sentences[80:600])
        loaded[name] = load_backbone(str(folder / name), cut=Cut(2, 2))
    return loaded


def pretrain(folder: Path, words: Path, sentences: list[str]) -> None:
    """With the tokenizer in `words`, that of `text`."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(words)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for start in range(100):
        some = [sentences[(start * 8 + i) % len(sentences)] for i in range(8)]
        batch = tokenizer(some, padding=True, truncation=True, max_length=24, return_tensors="pt")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def text(backbones, film_sentences) -> list[Tokens]:
    """Ten batches of eight film sentences that the models haven't seen."""
    tokenizer = Tokenizer(backbones["llama"].tokenizer, pad_token_id=0, with_types=False)
    rows = tokenizer.rows(film_sentences[:80], max_length=24)
    return [tokenizer.pad(rows[start : start + 8]) for start in range(0, 80, 8)]


def trunk_of(backbone: FrozenBackbone) -> Part:
    return backbone.require_cut().parts["trunk"]


@pytest.mark.parametrize("family", FAMILIES)
def test_distillation_lowers_the_held_out_loss_and_the_error(backbones, text, family):
    backbone, held_out = backbones[family], text[8:]
    emulator = make_emulator(backbone.require_cut(), 1)
    full, before = (evaluate(backbone, middle, held_out) for middle in (trunk_of(backbone), emulator))
    steps = list(distill(backbone, emulator, cycle(text[:8]), steps=60, lr=3e-3))
    after = evaluate(backbone, emulator, held_out)
    assert after.mse < before.mse / 2
    assert after.lm_loss < before.lm_loss
    assert abs(after.lm_loss - full.lm_loss) < (before.lm_loss - full.lm_loss) / 2
    assert [step.step for step in steps] == list(range(1, 61))
    assert steps[-1].loss < steps[0].loss / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_models_loss_is_the_one_that_transformers_computes(backbones, text, family):
    backbone = backbones[family]
    total = count = 0.0
    for tokens in text[:2]:
        mask = torch.arange(tokens.input_ids.shape[1]) < tokens.lengths.unsqueeze(1)
        ids = tokens.input_ids.long()
        labels = ids.masked_fill(~mask, -100)
        with torch.no_grad():
            loss = backbone.require_cut().causal(input_ids=ids, attention_mask=mask.long(), labels=labels).loss
        following = int((labels[:, 1:] != -100).sum())
        total, count = total + float(loss) * following, count + following
    found = evaluate(backbone, trunk_of(backbone), text[:2])
    assert found.lm_loss == pytest.approx(total / count, rel=1e-5)
    assert found.mse == 0


def test_a_step_minimises_cross_entropy_and_thirty_times_the_relative_error(backbones, text):
    backbone, tokens = backbones["llama"], text[0]
    emulator = make_emulator(backbone.require_cut(), 2)
    bottom = backbone.require_cut().parts["bottom"]
    hidden = bottom(tokens.input_ids.long(), tokens.lengths)
    wanted, found = trunk_of(backbone)(hidden, tokens.lengths), emulator(hidden, tokens.lengths)
    ratios = [
        float((found[i, t] - wanted[i, t]).norm() ** 2 / wanted[i, t].norm() ** 2)
        for i, length in enumerate(tokens.lengths.tolist())
        for t in range(length)
    ]
    expected = evaluate(backbone, emulator, [tokens])
    (step,) = distill(backbone, emulator, [tokens], steps=1, lr=1e-3)
    assert step.mse == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    assert (step.lm_loss, step.mse) == pytest.approx((expected.lm_loss, expected.mse), rel=1e-5)
    assert step.loss == pytest.approx(step.lm_loss + 30 * step.mse, rel=1e-5)
    assert MSE_WEIGHT == 30
    assert step.tokens == int(tokens.lengths.sum())


def test_padding_changes_nothing(backbones, text):
    backbone, tokens = backbones["opt"], text[0]
    emulator = make_emulator(backbone.require_cut(), 2)
    padded = Tokens(torch.nn.functional.pad(tokens.input_ids, (0, 9), value=7), tokens.lengths)
    plain, wide = (evaluate(backbone, emulator, [batch]) for batch in (tokens, padded))
    assert (plain.lm_loss, plain.mse) == pytest.approx((wide.lm_loss, wide.mse), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_emulators_blocks_learn(backbones, text, family):
    backbone = backbones[family]
    causal = backbone.require_cut().causal
    before = fingerprint(causal)
    emulator = make_emulator(backbone.require_cut(), 2)
    start = {name: weight.clone() for name, weight in emulator.weights().items()}
    for _ in distill(backbone, emulator, text, steps=3, lr=1e-3):
        assert all(p.requires_grad for p in emulator.parameters())
    assert fingerprint(causal) == before
    assert all(p.grad is None and not p.requires_grad for p in causal.parameters())
    assert all(p.grad is None and not p.requires_grad for p in emulator.parameters())
    assert sum(not torch.equal(w, start[name]) for name, w in emulator.weights().items()) == len(start)


def test_a_run_that_is_given_up_leaves_the_emulator_frozen(backbones, text):
    emulator = make_emulator(backbones["llama"].require_cut(), 1)
    steps = distill(backbones["llama"], emulator, text, steps=5, lr=1e-3)
    next(steps)
    steps.close()
    assert not any(p.requires_grad for p in emulator.parameters())


def test_an_emulator_in_float32_learns_from_a_model_in_bfloat16(tmp_path, film_sentences, text):
    folder = save_tiny_causal("llama", tmp_path, film_sentences[:400])
    backbone = load_backbone(str(folder), dtype="bfloat16", cut=Cut(1, 1))
    emulator = make_emulator(backbone.require_cut(), 1).float()
    before = evaluate(backbone, emulator, text[8:])
    list(distill(backbone, emulator, cycle(text[:8]), steps=20, lr=3e-3))
    assert evaluate(backbone, emulator, text[8:]).mse < before.mse
    assert next(emulator.parameters()).dtype == torch.float32


def test_a_loss_that_is_not_finite_ends_the_run(backbones, text):
    emulator = make_emulator(backbones["llama"].require_cut(), 2)
    with pytest.raises(ConfigError, match=r"loss of step \d+ is (nan|inf).*--lr"):
        list(distill(backbones["llama"], emulator, cycle(text), steps=9, lr=1e30))


def test_too_little_text_is_refused(backbones, text):
    emulator = make_emulator(backbones["llama"].require_cut(), 2)
    with pytest.raises(ConfigError, match="batches for 2 of 3 steps"):
        list(distill(backbones["llama"], emulator, text[:2], steps=3, lr=1e-3))
    single = Tokens(torch.tensor([[5]], dtype=torch.int32), torch.tensor([1], dtype=torch.int32))
    with pytest.raises(ConfigError, match="no token to predict"):
        evaluate(backbones["llama"], emulator, [single])


def test_batches_beyond_the_models_positions_are_refused(backbones):
    ids = torch.full((1, POSITIONS + 1), 5, dtype=torch.int32)
    tokens = Tokens(ids, torch.tensor([POSITIONS + 1], dtype=torch.int32))
    with pytest.raises(SequenceTooLong, match="--max-length"):
        evaluate(backbones["opt"], trunk_of(backbones["opt"]), [tokens])


def test_a_model_that_is_not_cut_is_refused(tiny_backbone, backbones, text):
    emulator = make_emulator(backbones["llama"].require_cut(), 1)
    with pytest.raises(ConfigError, match="not cut"):
        list(distill(tiny_backbone("llama"), emulator, text, steps=1, lr=1e-3))
