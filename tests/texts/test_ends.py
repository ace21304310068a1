"""Checkpoints of tuned ends: stock tools load them, and they hold what they started from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from blindtune.errors import BlindtuneError, CheckpointError
from blindtune.models import Cut, load_backbone
from blindtune.models.cut.merge import with_tuned_parts
from blindtune.texts import Gradfree, merge_checkpoint, read_ends, read_tuned_parts
from blindtune.texts.ends import WHOLE
from tests.conftest import CutServer
from tests.texts.client import SUMMARY, MakeSetup, cut_logits, logits, run


def test_a_peft_checkpoint_that_stock_peft_loads(setup: MakeSetup, cut_server: CutServer, tmp_path: Path) -> None:
    ours = setup()
    told = SUMMARY.model_copy(update={"base_model_name": str(cut_server.model)})
    trainer = ours.trainer(checkpoint=tmp_path, summary=told)
    run(trainer)
    trainer.save()
    base = AutoModelForCausalLM.from_pretrained(cut_server.model)
    batch = trainer.batch(0)
    untrained = logits(base, batch)
    stock = PeftModel.from_pretrained(base, tmp_path)
    assert torch.allclose(logits(stock, batch), cut_logits(ours, batch), atol=1e-4)
    assert not torch.allclose(untrained, cut_logits(ours, batch), atol=1e-2)
    assert read_ends(tmp_path)["rank"] == 4


def test_weights_that_stock_transformers_load(setup: MakeSetup, cut_server: CutServer, tmp_path: Path) -> None:
    ours = setup(tune="full")
    trainer = ours.trainer(checkpoint=tmp_path)
    run(trainer)
    trainer.save()
    causal = AutoModelForCausalLM.from_pretrained(cut_server.model)
    tuned = load_file(tmp_path / "model.safetensors")
    missing, unexpected = causal.load_state_dict(tuned, strict=False)
    assert not unexpected
    assert {name.split(".")[2] for name in tuned} == {"0", "1", "3", "4"}  # blocks of the ends
    assert "model.layers.2.mlp.up_proj.weight" in missing
    batch = trainer.batch(0)
    assert torch.allclose(logits(causal, batch), cut_logits(ours, batch), atol=1e-4)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_tuned_ends_are_a_start(setup: MakeSetup, tmp_path: Path, tune: str) -> None:
    tuned = setup(tune=tune)
    trainer = tuned.trainer(checkpoint=tmp_path)
    run(trainer)
    trainer.save()
    fresh = setup(Gradfree(up="fp32", down="fp32"))
    merge_checkpoint(fresh.ends, tmp_path)
    batch = trainer.batch(0)
    assert torch.allclose(cut_logits(fresh, batch), cut_logits(tuned, batch), atol=1e-4)


@pytest.mark.parametrize(
    "kinds", [("lora", "lora"), ("lora", "full"), ("full", "lora"), ("full", "full"), ("lora", "lora", "lora")], ids=str
)
def test_a_checkpoint_holds_what_it_started_from(
    setup: MakeSetup, cut_server: CutServer, tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    """Whoever loads it gets the model that was trained: with a bottom of the first run that the last one didn't train,
    and layers of the first that the last doesn't have."""
    told = SUMMARY.model_copy(update={"base_model_name": str(cut_server.model)})
    out: Path | None = None
    for number, kind in enumerate(kinds):
        last = number == len(kinds) - 1
        design = Gradfree(up="fp32", down="fp32") if last else None
        ours = setup(design, tune=kind, **({"rank": 2, "alpha": 6, "targets": ["q_proj"]} if last else {}))
        if out is not None:
            merge_checkpoint(ours.ends, out)
        out = tmp_path / str(number)
        trainer = ours.trainer(checkpoint=out, summary=told)
        run(trainer)
        trainer.save()
    assert out is not None
    batch = trainer.batch(0)
    expected = cut_logits(ours, batch)
    cut_model = load_backbone(str(cut_server.model), cut=Cut(2, 2)).require_cut()
    assert not torch.allclose(logits(cut_model.causal, batch), expected, atol=0.1)
    assert torch.allclose(logits(with_tuned_parts(cut_model, *read_tuned_parts(out)), batch), expected, atol=1e-4)
    stock: Any = AutoModelForCausalLM.from_pretrained(cut_server.model)
    if set(kinds) == {"lora"}:
        stock = PeftModel.from_pretrained(stock, out)
    else:
        assert not stock.load_state_dict(load_file(out / "model.safetensors"), strict=False).unexpected_keys
    assert torch.allclose(logits(stock, batch), expected, atol=1e-4)
    state = load_file(out / "resume.safetensors")
    assert {n for n in state if n.startswith("parameter.")} == {f"parameter.{n}" for n in ours.ends.trainable}


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
        read_tuned_parts(tmp_path)


def test_a_start_that_changes_more_than_blocks_of_the_ends(setup: MakeSetup, tmp_path: Path) -> None:
    """Its embeddings would be in no checkpoint of ours."""
    ours = setup()
    save_file({"model.embed_tokens.weight": ours.model.bottom.causal.model.embed_tokens.weight + 1}, tmp_path / WHOLE)
    with pytest.raises(CheckpointError, match="no weight that may be tuned"):
        merge_checkpoint(ours.ends, tmp_path)


def test_layers_that_no_block_has(setup: MakeSetup) -> None:
    with pytest.raises(BlindtuneError, match=r"query.*q_proj"):
        setup(targets=["query"])
