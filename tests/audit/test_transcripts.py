"""The audit on transcripts of real servers: from what crossed the wire, to what could be learned from it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig

import blindtune as bt
from blindtune.audit import (
    AuditSettings,
    ChannelKind,
    Plan,
    Recomputation,
    Verdict,
    attack_view,
    audited_checkpoints,
    read_view,
    write_report,
)
from blindtune.audit.labels.run import label_rows
from blindtune.client import Backbone
from blindtune.errors import ConfigError, TranscriptError
from blindtune.labels import LinearHead, LoRA, PrivateModel
from blindtune.labels.trainer import TrainConfig, Trainer
from blindtune.models import load_backbone
from blindtune.wire import Transcript

STEPS, ROWS = 12, 200


@pytest.fixture(scope="module")
def lora_run(start_server, film_examples, tmp_path_factory):
    """Plain LoRA on MiniLM for a few steps: the transcript, the model as trained, its examples."""
    folder = tmp_path_factory.mktemp("lora-run") / "seen"
    examples = film_examples.take(range(ROWS))
    with start_server("minilm", record=folder) as server:
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], layers_to_transform=[4, 5])
        backbone = Backbone([server.url], adapter=config, max_length=32)
        model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), LoRA())
        trainer = Trainer(model, examples, TrainConfig(steps=STEPS, batch_size=32, learning_rate=1e-2))
        trainer.prepare()
        initial = [a.vector().detach() for a in backbone.lora_adapters()]
        list(trainer.steps())
        with torch.no_grad():
            final = backbone.infer(examples.texts)
            frozen = backbone.frozen(examples.texts)
        rows = [row.ids for row in backbone.rows(examples.texts)]
        backbone.close()
    return folder, examples, rows, initial, final.numpy(), frozen.numpy()


@pytest.fixture(scope="module")
def minilm():
    return load_backbone("minilm")


@pytest.fixture(scope="module")
def view(lora_run):
    return read_view(Transcript(lora_run[0]), "operator A")


def test_the_view_holds_every_text_and_every_set_of_adapters(view, lora_run):
    _, _, rows, _, _, _ = lora_run
    assert set(view.first_seen) == set(rows)
    assert len(view.checkpoints) == STEPS + 1  # one a step, and the final ones with which the run was evaluated
    assert len(view.sightings) >= 2 * STEPS


def test_recomputed_activations_equal_what_the_servers_computed(view, lora_run, minilm):
    _, _, rows, _, final, frozen = lora_run
    recompute = Recomputation(minilm)
    hidden = recompute.hidden(view, view.checkpoints[-1].adapters, rows)
    np.testing.assert_allclose(hidden, final, atol=2e-5)
    np.testing.assert_allclose(recompute.hidden(view, (), rows)[0], frozen, atol=2e-5)


def test_each_text_is_computed_once(view, lora_run, minilm):
    rows = lora_run[2]
    counted = []
    recompute = Recomputation(minilm, counted.append)
    recompute.ensure(view, [c.adapters for c in view.checkpoints[-3:]], rows[:50])
    assert sum(counted) == 50
    recompute.ensure(view, [view.checkpoints[-1].adapters], rows[:60])
    assert sum(counted) == 60


def test_plain_lora_gives_its_labels_away(view, lora_run, minilm):
    """The attack succeeds where there is no defence: on gradients completely, and on shifts."""
    _, examples, _, _, _, _ = lora_run
    plan = Plan(label_rows(examples.texts, examples.labels, [view], minilm), points=2, probe_points=1)
    attacked = attack_view(view, plan, Recomputation(minilm))
    verdict = Verdict([attacked], attacked.findings)
    assert verdict.valid
    assert verdict.best_on(ChannelKind.GRADIENT).auc > 0.95
    assert verdict.best_on(ChannelKind.SHIFT).auc > verdict.frozen.auc + 0.1
    steps = {f.step for f in attacked.findings if str(f.channel) == "shift 0"}
    assert {f.step for f in attacked.findings if str(f.channel) == "frozen model, shuffled adapter: shift 0"} == steps
    assert verdict.frozen.channel.is_control
    assert verdict.headline.low <= verdict.headline.auc <= verdict.headline.high
    assert all(finding.low is not None for finding in verdict.table())
    assert {str(f.channel) for f in attacked.findings} >= {"activation 0", "shift 0", "gradient 0", "sent activation 0"}


def test_shuffled_labels_are_not_found(view, lora_run, minilm):
    """A null transcript: the same vectors, labels that have nothing to do with them."""
    _, examples, _, _, _, _ = lora_run
    labels = label_rows(examples.texts, examples.labels, [view], minilm)
    shuffled = dict(zip(labels, np.random.default_rng(0).permutation(list(labels.values())).tolist(), strict=True))
    attacked = attack_view(view, Plan(shuffled, points=2, probe_points=1), Recomputation(minilm))
    assert max(f.auc for f in attacked.findings if f.knows == "nothing") < 0.65


def test_points_in_time_are_spread_and_end_with_the_last(view):
    steps = [checkpoint.step for checkpoint in audited_checkpoints(view, 4)]
    assert steps == [3, 6, 9, 12]
    assert audited_checkpoints(view, 100)[-1].step == STEPS


def test_the_report_is_one_file_with_pictures_and_numbers(view, lora_run, minilm, tmp_path):
    _, examples, _, _, _, _ = lora_run
    known = label_rows(examples.texts, examples.labels, [view], minilm)
    attacked = attack_view(view, Plan(known, 2, 1), Recomputation(minilm))
    verdict = Verdict([attacked], attacked.findings)
    path = tmp_path / "report.html"
    write_report(path, verdict, title="A run <b>", classes=["bad & worse", "good"])
    page = path.read_text()
    assert "http" not in page.replace("http-equiv", "")  # nothing is loaded from elsewhere
    assert "A run &lt;b&gt;" in page
    assert "bad &amp; worse" in page
    assert page.count("<svg") >= 5
    assert f"{verdict.headline.auc:.2f}" in page


def test_an_audit_without_a_control_says_so(lora_run, minilm, tmp_path):
    folder, examples, *_ = lora_run
    few = AuditSettings(points=1, probe_points=1, max_texts=60)
    verdict = bt.audit_labels([folder], examples.texts, examples.labels, few, control_findings=(), backbone=minilm)
    assert "no control was attacked" in verdict.sentence()
    assert verdict.to_json()["controls"]["unprotected"] is None
    write_report(tmp_path / "report.html", verdict, title="Audit", classes=examples.classes)
    assert "unprotected training" not in (tmp_path / "report.html").read_text()


def test_an_audit_is_three_lines_of_python(lora_run, tmp_path):
    """It loads the model that the transcript names, and trains an unprotected run to compare with."""
    folder, examples, *_ = lora_run
    few = AuditSettings(points=1, probe_points=1)
    verdict = bt.audit_labels([folder], examples.texts, examples.labels, few)
    print(verdict.sentence())
    write_report(tmp_path / "report.html", verdict, title="Audit", classes=examples.classes)
    assert verdict.valid
    assert max(f.auc for f in verdict.control if f.knows == "nothing") > 0.75, "the unprotected control is read"
    assert verdict.best_on(ChannelKind.GRADIENT).auc > 0.95
    assert {finding.operator for finding in verdict.findings} == {str(folder)}
    assert max(finding.auc for finding in verdict.control if finding.knows == "nothing") > 0.75
    assert "The strongest attack without labels reaches AUC" in verdict.sentence()
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_an_audit_of_other_weights_is_refused(lora_run, tiny_backbone):
    folder, examples, *_ = lora_run
    with pytest.raises(TranscriptError, match="was recorded on other weights than"):
        bt.audit_labels([folder], examples.texts, examples.labels, backbone=tiny_backbone("bert"))


def test_one_server_cannot_collude(lora_run, minilm):
    folder, examples, *_ = lora_run
    settings = AuditSettings(collude=True)
    with pytest.raises(ConfigError, match="1 transcripts can't be joined"):
        bt.audit_labels([folder], examples.texts, examples.labels, settings, backbone=minilm)


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for path in map(shutil.which, BROWSERS) if path), None)
MEASURE = """<script>document.title = JSON.stringify({
  beyond: document.documentElement.scrollWidth - window.innerWidth,
  smallest: Math.min(...[...document.querySelectorAll("svg text")].map(t => t.getBoundingClientRect().height)),
  empty: [...document.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().height < 50).length,
  cut: [...document.querySelectorAll("table")].filter(t => t.scrollWidth > t.parentElement.clientWidth
       && getComputedStyle(t.parentElement).overflowX != "auto").length})</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 500])
def test_the_report_can_be_read_in_a_browser(view, lora_run, minilm, tmp_path, width):
    _, examples, _, _, _, _ = lora_run
    known = label_rows(examples.texts, examples.labels, [view], minilm)
    attacked = attack_view(view, Plan(known, 2, 1), Recomputation(minilm))
    path = tmp_path / "report.html"
    write_report(path, Verdict([attacked], attacked.findings), title="A run", classes=["bad", "good"])
    path.write_text(path.read_text().replace("</body>", MEASURE + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    flags += [f"--user-data-dir={tmp_path / 'browser'}", f"--window-size={width},900", "--dump-dom"]
    page = subprocess.run([BROWSER, *flags, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    found = re.search("<title>(.*?)</title>", page.stdout)
    assert found is not None
    measured = json.loads(html.unescape(found[1]))
    assert measured["beyond"] <= 0  # nothing is wider than the window
    assert measured["empty"] == measured["cut"] == 0
    assert measured["smallest"] >= 10  # pixels


def test_labels_of_other_texts_are_refused(view, minilm):
    with pytest.raises(TranscriptError, match=r"0 of the 200 texts .* have a label"):
        attack_view(view, Plan({(1, 2, 3): 0}), Recomputation(minilm))


def test_a_folder_without_a_transcript_is_named(tmp_path: Path):
    with pytest.raises(TranscriptError, match=r"holds no index\.jsonl"):
        Transcript(tmp_path)
