"""The commands as a user runs them: processes, files, exit codes, words."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel

import blindtune
from blindtune.files import read_tensors
from blindtune.privacy.ledger import read_journal
from tests.conftest import Server
from tests.processes import run

SMALL = ["--method", "padded-lora", "--steps", "6", "--batch-size", "12", "--max-length", "32"]


@pytest.fixture(scope="module")
def notes(film_examples, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "notes.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["note", "diagnosis"])
        for text, label in zip(film_examples.texts[:120], film_examples.labels[:120], strict=True):
            writer.writerow([text, ["sick", "healthy"][label]])
    return path


@pytest.fixture(scope="module")
def recorded(start_server, tiny_models, tmp_path_factory):
    """Two recording operators with a small BERT: `(servers, folders)`."""
    folders = [tmp_path_factory.mktemp("seen") / name for name in "ab"]
    with ExitStack() as stack:
        yield [stack.enter_context(start_server(tiny_models["bert"], record=f)) for f in folders], folders


def to(servers: list[Server]) -> list[str]:
    return [part for server in servers for part in ("--server", server.url)]


def columns(path: Path) -> list[object]:
    return ["--data", path, "--text", "note", "--label", "diagnosis"]


def test_train_predict_and_audit_follow_each_other(recorded, notes, tiny_models, tmp_path):
    servers, folders = recorded
    out, results = tmp_path / "out", tmp_path / "train.json"
    features = ["--method", "features", "--set", "classifier=logistic", "--output", tmp_path / "features"]
    run("labels", "train", *to(servers[:1]), *columns(notes), *features)  # which the audit doesn't take for a run
    trained = run("labels", "train", *to(servers), *columns(notes), *SMALL, "--output", out, "--json", results)
    assert trained.stdout.count("sees texts, one adapter under a pad, and one share of each gradient") == 2
    numbers = json.loads(results.read_text())
    assert numbers["steps"] == 6
    assert numbers["validation"]["accuracy"] > 0
    assert 0.15 < numbers["mu"] <= numbers["mu_budget"] == 0.25
    assert (numbers["epsilon"] > 0.5, numbers["delta"]) == (True, 1e-5)
    assert 0 < numbers["information_bits"] < 0.0115
    assert json.loads((out / "blindtune.json").read_text())["classes"] == ["healthy", "sick"]
    stock = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_models["bert"]), out)
    assert any("lora_B" in name and p.abs().sum() > 0 for name, p in stock.named_parameters())

    predicted, scores = tmp_path / "predicted.csv", tmp_path / "predict.json"
    run("labels", "predict", out, *to(servers), *columns(notes), "--output", predicted, "--json", scores)
    with predicted.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 120
    assert set(rows[0]) == {"prediction", "p_healthy", "p_sick"}
    assert all(abs(float(r["p_healthy"]) + float(r["p_sick"]) - 1) < 1e-4 for r in rows)
    assert json.loads(scores.read_text())["accuracy"] > 0

    refused = run("labels", "predict", out, *to(servers[:1]), *columns(notes), check=False)
    assert refused.returncode == 1
    said = " ".join((refused.stdout + refused.stderr).split())
    assert "A padded adapter needs 2 operators that don't collude; 1 is given." in said
    assert "Remedy: Add an operator (--server); this holds for predictions too." in said
    sent = read_journal(out / "ledger.jsonl").messages("adapter")
    run("labels", "predict", out, *to(servers[::-1]), *columns(notes))
    assert read_journal(out / "ledger.jsonl").messages("adapter") == sent + 1, "the other half, under another pad"

    for server in servers:  # so that transcripts are complete
        server.stop()
    report, found = tmp_path / "report.html", tmp_path / "audit.json"
    audit = run(
        "labels", "audit", *folders, "--labels", notes, "--text", "note", "--label", "diagnosis",
        "--points", 2, "--collude", "--report", report, "--json", found,
    )  # fmt: skip
    assert "The strongest attack without labels reaches AUC" in audit.stdout
    assert report.read_text().startswith("<!doctype html>")
    verdict = json.loads(found.read_text())
    names = [str(folder) for folder in folders]
    assert {f["operator"] for f in verdict["findings"]} == {*names, " + ".join(names)}
    assert 0.5 < verdict["chance"]["quantile"] < 1.0
    assert set(verdict["few_labels"]["16 labels"]) == {"strongest", "frozen"}
    assert set(verdict["controls"]) >= {"unprotected", "frozen", "valid"}


def test_ctrl_c_leaves_a_checkpoint_and_resume_ends_with_the_same_weights(two_servers, notes, tmp_path):
    common = [*to(two_servers), *columns(notes), *SMALL, "--steps", "12", "--method", "lora"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run("labels", "train", *common, "--output", whole)

    command = [
        sys.executable,
        "-m",
        "blindtune",
        "labels",
        "train",
        *map(str, common),
        "--output",
        str(broken),
        "--training",
        "save_every=1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (broken / "resume.safetensors").exists():  # the first step is done
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Go on with --resume" in said
    refused = run("labels", "train", *common, "--output", broken, check=False)
    assert refused.returncode == 1
    assert "holds a checkpoint" in refused.stdout + refused.stderr
    done = int(read_tensors(broken / "resume.safetensors")[1]["done"])
    assert 1 <= done < 12

    refused = run("labels", "train", *common[:-1], "padded-lora", "--output", broken, "--resume", check=False)
    assert refused.returncode == 1
    assert "was trained with method = 'lora', not 'padded-lora'" in refused.stdout + refused.stderr
    run("labels", "train", *common, "--output", broken, "--resume")
    for name in ("adapter_model.safetensors", "head.safetensors"):
        left, right = load_file(whole / name), load_file(broken / name)
        assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", "nota"], "has no column 'nota'. Remedy: It has: note, diagnosis"),
        (["--method", "p4eft"], "There is no method 'p4eft'"),
        (["--method", "p3eft", "--set", "n=1"], "P3EFT mixes at least two adapters"),
        (
            ["--method", "p3eft", "--set", "recipe=2023", "--set", "mixing_scale=5"],
            "recipe = 2023 sets mixing_scale = 31.0, not 5. Remedy: Leave out mixing_scale",
        ),
        (["--head", "forest"], "There is no head 'forest'. Remedy: Use one of: linear, mlp, pooler"),
        (
            ["--set", "n=2"],
            "padded-lora has no option ['n']. Remedy: It has: allow_single_operator, batch_size, check_every, ",
        ),
        (["--set", "allow_single_operator=no"], "allow_single_operator = 'no' is neither true nor false"),
        (["--set", "allow_single_operator=true", "--lora", "alpha=0"], "lora_alpha = 0"),
        (["--method", "distance-correlation", "--set", "shift_weight=-1"], "shift_weight = -1 is no weight"),
        (
            ["--method", "distance-correlation", "--set", "epsilon=1"],
            "distance-correlation has no option ['epsilon']. Remedy: It has: activation_weight",
        ),
        (["--method", "pslf", "--set", "epsilon=0"], "epsilon = 0 can't randomise labels"),
        (["--method", "randomized-response", "--set", "epsilon=low"], "epsilon = 'low' can't randomise labels"),
        (["--lora", "target_modules=qkv"], "No layer is called ['qkv']"),
        (["--lora", "dropout=0.1"], "There is no option 'dropout'. Remedy: There are: alpha, target_modules"),
        (
            ["--training", "epoch=2"],
            "There is no training option 'epoch'. Remedy: There are: betas, epochs, floor, head_learning_rate, "
            "max_grad_norm, random_adam_moments, save_every, seed, warmup, weight_decay.",
        ),
        (["--training", "steps=2"], "There is no training option 'steps'."),
        (["--training", "warmup=long"], "--training warmup=long can't be read. Remedy: Write a number"),
        (["--training", "seed=1.5"], "--training seed=1.5 can't be read. Remedy: Write a whole number"),
        (["--training", "save_every=0"], "save_every = 0 is no count"),
        (["--training", "betas=0.9"], "--training betas=0.9 can't be read. Remedy: Write two numbers"),
        (["--lora", "alpha=large"], "--lora alpha=large can't be read. Remedy: Write a number"),
        (["--loss", "hinge"], "There is no loss 'hinge'. Remedy: Use one of: cross_entropy, squared."),
        (["--training", "epochs"], "'epochs' is no setting. Remedy: Write it as name=value"),
        (["--text", "diagnosis", "--text", "note"], "3 columns of texts. Remedy: Give one --text, or two"),
        (["--layers", "7-9"], "No layer is left with --layers 7-9"),
        (["--readout", "last:last"], "offers no pooling 'last'"),
        (["--max-length", "100000"], "max_length is 100000"),
    ],
)
def test_wrong_options_are_answered_with_the_value_and_the_remedy(tiny_server, notes, tmp_path, arguments, words):
    from typer.testing import CliRunner

    from blindtune.cli import app

    command = ["labels", "train", "--server", tiny_server.url, "--model", "bert", *map(str, columns(notes))]
    command += ["--method", "padded-lora", *arguments]
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "out")], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert words in result.output.replace("\n", " ")
    assert "Remedy:" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("method", "setting", "sees", "report"),
    [
        ("distance-correlation", "shift_weight=0.1", "it can learn the labels from gradients", {}),
        ("pslf", "epsilon=0.5", "only labels that were randomised with epsilon 0.5", {"label_epsilon": 0.5}),
        ("randomized-response", "epsilon=2", "only labels that were randomised with epsilon 2", {"label_epsilon": 2.0}),
        ("p3eft", "allow_single_operator=true", "all 2 adapters, and every share, in every step", {}),
        ("padded-lora", "allow_single_operator=true", "it can learn the labels from gradients: their shares meet", {}),
    ],
)
def test_methods_to_compare_with_train_and_predict(tiny_server, notes, tmp_path, method, setting, sees, report):
    from typer.testing import CliRunner

    from blindtune.cli import app

    out, results, scores = tmp_path / "out", tmp_path / "train.json", tmp_path / "predict.json"
    arguments = [
        "labels", "train", "--server", tiny_server.url, "--model", "bert", *map(str, columns(notes)), *SMALL,
        "--method", method, "--set", setting, "--output", str(out), "--json", str(results),
    ]  # fmt: skip
    trained = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    assert trained.exit_code == 0, trained.output
    assert sees in " ".join(trained.output.split())
    numbers = json.loads(results.read_text())
    assert {name: numbers.get(name) for name in report} == report
    assert ("label epsilon (δ = 0)" in trained.output) == ("label_epsilon" in report)
    name, value = setting.split("=")
    assert json.loads((out / "blindtune.json").read_text())["options"][name] == json.loads(value)
    again = CliRunner().invoke(app, [*arguments, "--resume"], env={"COLUMNS": "300"})
    assert "Resumed after step 6" in again.output
    arguments = ["labels", "predict", out, "--server", tiny_server.url, *columns(notes)]
    arguments += ["--output", tmp_path / "predicted.csv", "--json", scores]
    predicted = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "300"})
    assert predicted.exit_code == 0, predicted.output
    assert json.loads(scores.read_text())["accuracy"] > 0


@pytest.mark.parametrize("method", ["padded-lora", "p3eft"])
def test_one_server_is_not_enough_for_two_shares(tiny_server, notes, tmp_path, method):
    from typer.testing import CliRunner

    from blindtune.cli import app

    command = [
        "labels",
        "train",
        "--server",
        tiny_server.url,
        "--model",
        "bert",
        *map(str, columns(notes)),
        "--method",
        method,
    ]
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "out")], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert "2 shares of one gradient need 2 operators that don't collude" in result.output


@pytest.mark.parametrize(
    ("method", "arguments", "rank", "alpha", "lr"),
    [
        ("padded-lora", [], 32, 64, 2e-3),
        ("padded-lora", ["--rank", "4"], 4, 8, 2e-3),
        ("padded-lora", ["--lora", "alpha=16", "--lr", "0.01"], 32, 16, 1e-2),
        ("p3eft", [], 8, 16, 5e-4),
        ("lora", [], 8, 16, 3e-3),
        ("lora", ["--rank", "2", "--lora", "alpha=3", "--lr", "0.02"], 2, 3, 2e-2),
    ],
)
def test_a_method_has_its_own_defaults_and_options_overrule_them(
    four_servers, notes, tmp_path, monkeypatch, method, arguments, rank, alpha, lr
):
    from typer.testing import CliRunner

    from blindtune.cli import app
    from blindtune.labels.trainer import Trainer

    rates = []
    original = Trainer.__init__

    def spy(self, model, train, config, **options):
        rates.append(config.learning_rate)
        original(self, model, train, config, **options)

    monkeypatch.setattr(Trainer, "__init__", spy)
    command = [
        "labels",
        "train",
        *to(four_servers[:2]),
        *map(str, columns(notes)),
        *SMALL,
        "--steps",
        "2",
        "--method",
        method,
    ]
    command += [*arguments, "--output", str(tmp_path)]
    for again in ([], ["--resume"]):
        result = CliRunner().invoke(app, [*command, *again], env={"COLUMNS": "300"})
        assert result.exit_code == 0, result.output
    assert rates == [lr, lr]
    folder = tmp_path / "adapter_0" if method == "p3eft" else tmp_path
    adapter = json.loads((folder / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (rank, alpha)
    options = json.loads((tmp_path / "blindtune.json").read_text())["options"]
    assert options.get("steps") == (None if method == "lora" else 2)


@pytest.mark.parametrize(
    ("arguments", "head", "rates", "norm"),
    [
        ([], "MLPHead", None, 1.0),
        (["--head", "pooler", "--lr", "0.01", "--training", "max_grad_norm=0.5"], "PoolerHead", (0.01, 0.01), 0.5),
        (["--training", "head_learning_rate=0.02", "--lr", "0.01"], "MLPHead", (0.01, 0.02), 1.0),
    ],
)
def test_a_recipe_sets_head_rates_and_clipping_unless_told_otherwise(
    four_servers, notes, tmp_path, monkeypatch, arguments, head, rates, norm
):
    from typer.testing import CliRunner

    from blindtune.cli import app
    from blindtune.labels.trainer import Trainer

    configs = []
    original = Trainer.__init__

    def spy(self, model, train, config, **options):
        configs.append(config)
        original(self, model, train, config, **options)

    monkeypatch.setattr(Trainer, "__init__", spy)
    command = ["labels", "train", *to(four_servers[:2]), *map(str, columns(notes)), *SMALL, "--steps", "2"]
    command += ["--method", "p3eft", "--set", "recipe=2023", *arguments, "--output", str(tmp_path)]
    for again in ([], ["--resume"]):
        result = CliRunner().invoke(app, [*command, *again], env={"COLUMNS": "300"})
        assert result.exit_code == 0, result.output
    config, resumed = configs
    assert resumed == config
    assert (config.learning_rate == config.head_learning_rate) if rates is None else True
    assert rates in (None, (config.learning_rate, config.head_learning_rate))
    assert (config.max_grad_norm, config.weight_decay) == (norm, 0.01)
    summary = json.loads((tmp_path / "blindtune.json").read_text())
    assert (summary["head"], summary["options"]["mixing_scale"]) == (head, 31.0)
    other = CliRunner().invoke(app, [*command, "--resume", "--head", "linear"], env={"COLUMNS": "300"})
    assert "was trained with head" in other.output


def test_a_run_is_as_long_as_its_pads_are_made_for_unless_told_otherwise(four_servers, notes, tmp_path):
    """`steps` of the method: the run's own, or what --set says."""
    from typer.testing import CliRunner

    from blindtune.cli import app

    command = ["labels", "train", *to(four_servers[:2]), *map(str, columns(notes)), *SMALL, "--output", str(tmp_path)]
    result = CliRunner().invoke(app, [*command, "--set", "steps=2"], env={"COLUMNS": "300"})
    said = " ".join(result.output.split())
    assert result.exit_code == 0
    assert re.search(r"Stopped after step [3-6]\. The run was planned for 2 steps", said), "with some to spare"
    assert "validation accuracy" in said, "what was learned can be used"
    assert json.loads((tmp_path / "blindtune.json").read_text())["options"]["steps"] == 2


def test_predictions_over_other_operators_are_counted_in_the_checkpoint(four_servers, notes, tmp_path):
    from typer.testing import CliRunner

    from blindtune.cli import app

    def call(*arguments: object) -> int:
        result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "300"})
        assert result.exit_code == 0, result.output
        return read_journal(tmp_path / "ledger.jsonl").messages("adapter")

    train = ["labels", "train", *to(four_servers[:2]), *columns(notes), *SMALL, "--steps", "2", "--output", tmp_path]
    assert call(*train, "--set", "steps=5") == 3  # two steps and a validation
    predict = ["labels", "predict", tmp_path, *columns(notes), "--output", tmp_path / "predicted.csv"]
    assert call(*predict, *to(four_servers[:2])) == 4
    first, second, third, fourth = four_servers
    assert call(*predict, *to([second, first])) == 5
    assert call(*predict, *to([third, fourth])) == 5
    assert call(*predict, *to([first, third])) == 6


def test_a_method_without_steps_trains_and_predicts_and_its_second_run_sends_no_text(four_servers, notes, tmp_path):
    from typer.testing import CliRunner

    from blindtune.cli import app

    results = []
    for index in range(2):
        out, found = tmp_path / f"out{index}", tmp_path / f"{index}.json"
        options = ["--method", "tangent-sketch", "--set", "directions=9", "--set", "rank=2", "--max-length", "32"]
        train = ["labels", "train", *to(four_servers[:1]), *columns(notes), *options, "--store", tmp_path / "store"]
        result = CliRunner().invoke(app, list(map(str, [*train, "--output", out, "--json", found])))
        assert result.exit_code == 0, result.output
        assert "nothing about labels" in " ".join(result.output.split())
        results.append(json.loads(found.read_text()))
    assert results[0]["chosen"].startswith("sketch on")
    assert results[1]["validation"] == results[0]["validation"]
    assert results[1]["bytes_sent"] < 0.2 * results[0]["bytes_sent"]
    predicted = tmp_path / "predicted.csv"
    predict = ["labels", "predict", out, *to(four_servers[:1]), *columns(notes), "--output", predicted]
    result = CliRunner().invoke(app, list(map(str, predict)))
    assert result.exit_code == 0, result.output
    assert len(predicted.read_text().splitlines()) == 121


def test_every_operator_is_told_what_it_can_learn_before_the_first_step(four_servers, notes, tmp_path):
    from typer.testing import CliRunner

    from blindtune.cli import app

    command = ["labels", "train", *to(four_servers[:2]), *map(str, columns(notes)), *SMALL, "--method", "lora"]
    for number, (arguments, words) in enumerate(
        [
            ([], "so in consecutive ones: activations and shifts carry the labels; consecutive adapters can tell"),
            (
                ["--training", "random_adam_moments=0.1"],
                "although shares hide it; not the first steps': random Adam moments",
            ),
            (["--set", "adapter_noise=0.01"], "noise of 0.01 on adapters hides what a step changed"),
        ]
    ):
        arguments = ["--set", "m=2", *arguments, "--steps", "2", "--output", str(tmp_path / str(number))]
        result = CliRunner().invoke(app, [*command, *arguments], env={"COLUMNS": "300"})
        assert result.exit_code == 0, result.output
        plan = result.output.partition("frozen features")[0]
        for index, server in enumerate(four_servers[:2]):
            assert f"operator {index}: {server.url}  sees texts, the adapter, and one share of each gradient, " in plan
        assert plan.count(words) == 2
        shown = " ".join(result.output.split())  # lines may be wrapped
        assert re.search(r"μ 0\.\d{3} \(shares\) \(ε 0\.\d{3} at δ 1e-05\)", shown), "while it runs"
        assert "gradient channel epsilon (δ = 1e-05)" in result.output


def test_the_list_of_methods_names_every_method_and_its_options():
    from typer.testing import CliRunner

    from blindtune.cli import app
    from blindtune.labels import METHODS
    from blindtune.labels.methods.base import option_names

    listed = CliRunner().invoke(app, ["labels", "methods"], env={"COLUMNS": "400"})
    assert listed.exit_code == 0, listed.output
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in listed.output.splitlines() if "│" in line]
    rows: dict[str, str] = {}
    last = ""
    for name, _, options in cells:  # a row of several lines has its name in the first
        last = name or last
        rows[last] = f"{rows.get(last, '')} {options}".strip()
    assert set(rows) == set(METHODS)
    for name, kind in METHODS.items():
        assert rows[name] == (", ".join(option_names(kind)) or "–")
    assert "m, clip_norm, noise_ratio" in rows["lora"], "a composed option stands for its fields"
    manual = " ".join(CliRunner().invoke(app, ["labels", "train", "--help"], env={"COLUMNS": "400"}).output.split())
    assert "`blindtune labels methods`" in manual


def test_the_manual_of_train_names_every_training_option():
    from dataclasses import fields

    from typer.testing import CliRunner

    from blindtune.cli import app
    from blindtune.labels import TrainConfig

    manual = " ".join(CliRunner().invoke(app, ["labels", "train", "--help"], env={"COLUMNS": "400"}).output.split())
    options_of_their_own = {"steps", "batch_size", "learning_rate"}
    for name in {f.name for f in fields(TrainConfig)} - options_of_their_own | {"epochs", "save_every"}:
        assert re.search(rf"\b{name}\b", manual), name


def test_serve_refuses_to_be_open_to_the_world():
    from typer.testing import CliRunner

    from blindtune.cli import app

    for arguments, words in (
        (["--host", "0.0.0.0", "--no-auth"], "would serve everybody"),
        ([], "needs to know its tenants"),
        (["--no-auth", "--tls-cert", "x.pem"], "A certificate needs its key"),
    ):
        result = CliRunner().invoke(app, ["serve", "--model", "minilm", *arguments], env={"COLUMNS": "300"})
        assert result.exit_code == 1
        assert words in result.output


def test_every_command_has_a_manual():
    from typer.testing import CliRunner

    from blindtune.cli import app

    commands = ("demo", "serve", "token", "labels train", "labels predict", "labels audit", "emulator build")
    for name in (*commands, "texts train", "texts deploy", "texts membership", "texts audit"):
        result = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "200"})
        assert result.exit_code == 0
        assert len(result.output.splitlines()) > 8
    assert "--json" in CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "200"}).output


def test_help_does_not_load_torch():
    """`blindtune --help` answers at once."""
    code = "import sys, blindtune.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_are_sorted_documented_and_importable():
    names = blindtune.__all__
    assert len(names) <= 30
    for name in names:
        assert getattr(blindtune, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = blindtune.nothing


def test_runs_on_the_same_labels_add_up_in_the_plan(four_servers, notes, tmp_path):
    """Also of other methods and seeds: what one operator saw of all of them is what counts."""
    from typer.testing import CliRunner

    from blindtune.cli import app

    plans = []
    for number, seed in enumerate((0, 1, 2)):
        output = tmp_path / str(number)
        command = ["labels", "train", *to(four_servers[:2]), *map(str, columns(notes)), *SMALL, "--output", str(output)]
        result = CliRunner().invoke(app, [*command, "--training", f"seed={seed}"], env={"COLUMNS": "300"})
        assert result.exit_code == 0, result.output
        plans.append(result.output.partition("frozen features")[0])
    assert "earlier run" not in plans[0]
    for count, plan in enumerate(plans[1:], 1):
        found = re.search(rf"{count} earlier run\(s\) on this machine used labels.*: μ = ([\d.]+), ε = [\d.]+", plan)
        assert found, plan
        spent = [read_journal(tmp_path / str(number) / "ledger.jsonl").guarantee().mu for number in range(count)]
        assert float(found[1]) == pytest.approx((0.25**2 + sum(mu**2 for mu in spent)) ** 0.5, abs=0.002)


def test_the_version_is_shown():
    from importlib.metadata import version

    from typer.testing import CliRunner

    from blindtune.cli import app

    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output.strip()) == (0, f"blindtune {version('blindtune')}")
