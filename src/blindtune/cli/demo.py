"""`blindtune demo`: two local operators, plain LoRA, then P3EFT, and an attack on what the operators recorded."""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from blindtune.cli.audit import AuditSettings, run_audit
from blindtune.cli.console import console, reporting_errors, write_json
from blindtune.cli.processes import local_servers

if TYPE_CHECKING:
    from blindtune.audit import Verdict
    from blindtune.training import Examples

OPERATORS = ("operator A", "operator B")
MAX_LENGTH = 48
SOME_LABELS = "64 labels"
CACHE = Path.home() / ".cache" / "blindtune"


def demo(
    output: Annotated[Path, typer.Option(help="Folder for transcripts, checkpoints and the report.")] = Path(
        "out/demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of batches and initial weights; the secrets are always fresh.")] = 0,
    steps: Annotated[int, typer.Option(help="Training steps of each method.")] = 150,
    train: Annotated[int, typer.Option(help="Training sentences.")] = 4800,
    test: Annotated[int, typer.Option(help="Test sentences.")] = 1500,
    points: Annotated[int, typer.Option(help="Points in time to attack.")] = 5,
    attacked: Annotated[int, typer.Option(help="Attack a random sample of so many training sentences.")] = 800,
    model: Annotated[str, typer.Option(help="Model that the operators host.")] = "minilm",
    cache: Annotated[Path, typer.Option(help="Where downloads are kept.")] = CACHE,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
) -> None:
    """Fine-tune a hosted model on film reviews, with labels that neither of two servers learns, and attack it.

    Starts two operators as processes of their own, trains plain LoRA and then P3EFT over them with the same budget,
    audits what each operator recorded, and prints accuracy beside the best attack. No account, hub or GPU.
    """
    with reporting_errors():
        from blindtune.cli.progress import Interrupted
        from blindtune.cli.reviews import film_reviews

        start = time.perf_counter()
        console.rule("[bold]blindtune demo")
        console.print(
            "Data: sentences from film reviews, rated by people; the sign of the rating is the private label."
        )
        everything = film_reviews(cache)
        test_set = everything.take(range(test))
        train_set = everything.take(range(test, min(len(everything), test + train)))
        plan = DemoPlan(model, seed, steps, points, attacked, output)
        shutil.rmtree(output, ignore_errors=True)
        try:
            runs = {name: _train(name, plan, train_set, test_set) for name in ("lora", "p3eft")}
        except (Interrupted, KeyboardInterrupt):
            console.print("Stopped.")
            raise typer.Exit(130) from None
        verdicts = _audit(plan, train_set, runs)
        result = _summarise(runs, verdicts)
        result |= {"seed": seed, "steps": steps, "train": len(train_set), "test": len(test_set)}
        result["seconds"] = time.perf_counter() - start
        _print(result)
        _report(output, runs, verdicts, train_set)
        write_json(json, result)


@dataclass(frozen=True)
class DemoPlan:
    """What both runs share."""

    model: str
    seed: int
    steps: int
    points: int
    attacked: int
    output: Path

    def transcripts(self, name: str) -> list[Path]:
        return [self.output / name / operator.replace(" ", "-") for operator in OPERATORS]


@dataclass(frozen=True)
class Run:
    """What one method achieved."""

    frozen_accuracy: float
    accuracy: float
    seconds: float
    bytes_per_step: float
    report: dict[str, float]


def _train(name: str, plan: DemoPlan, train_set: "Examples", test_set: "Examples") -> Run:
    """Trains over two fresh server processes and evaluates."""
    from blindtune.cli.options import connect, make_lora_config
    from blindtune.cli.progress import inference_progress, run_steps
    from blindtune.methods import METHODS, LinearHead, PrivateModel, make_method
    from blindtune.training import TrainConfig, Trainer, evaluate

    console.rule(f"[bold]{name}")
    cores = os.cpu_count() or 2
    threads = cores if name == "lora" else max(1, cores // len(OPERATORS))  # under plain LoRA they take turns
    with local_servers(plan.model, plan.transcripts(name), threads=threads) as servers:
        for operator, server in zip(OPERATORS, servers, strict=True):
            console.print(f"{operator}: {server.url} (process {server.process.pid})")
        backbone = connect(
            [server.url for server in servers],
            token=None,
            tls_ca=None,
            wait=60.0,
            max_length=MAX_LENGTH,
            num_adapters=0,
        )
        method = make_method(name, {} if name == "lora" else {"steps": plan.steps})
        rank = METHODS[name].default_rank
        backbone.adapter_config = make_lora_config(
            backbone.info, rank=rank, alpha=2 * rank, targets=None, layers="upper"
        )
        head = LinearHead(backbone.hidden_size, len(train_set.classes))
        private = PrivateModel(backbone, head, method, seed=plan.seed)
        config = TrainConfig(steps=plan.steps, seed=plan.seed, learning_rate=METHODS[name].default_lr)
        trainer = Trainer(private, train_set, config, checkpoint=plan.output / name / "model")
        begin = time.perf_counter()
        with inference_progress(backbone, console, "frozen features", len(train_set)):
            trainer.prepare()
        frozen = _frozen_accuracy(private, test_set) if name == "lora" else 0.0
        done = run_steps(trainer, console, name)
        seconds = time.perf_counter() - begin
        trainer.save()
        with inference_progress(backbone, console, "test", len(test_set)):
            accuracy = evaluate(private, test_set)["accuracy"]
        backbone.close()
    console.print(f"{name}: test accuracy {accuracy:.3f}")
    traffic = sum(step.bytes_sent + step.bytes_received for step in done) / len(done)
    return Run(frozen, accuracy, seconds, traffic, private.method.report())


def _frozen_accuracy(private: Any, test_set: "Examples") -> float:
    """Accuracy of the head on frozen features, before any adapter is trained."""
    import torch

    from blindtune.training import scores

    with torch.no_grad():
        chances = private.head(private.backbone.frozen(test_set.texts)).softmax(-1)
    return scores(chances, torch.tensor(test_set.labels))["accuracy"]


def _audit(plan: DemoPlan, train_set: "Examples", runs: dict[str, Run]) -> dict[str, "Verdict"]:
    """Attacks both operators of both runs; plain LoRA is the control of both."""
    from blindtune.audit import Verdict
    from blindtune.models import load_backbone

    console.rule("[bold]audit: what did the operators learn?")
    backbone = load_backbone(plan.model)
    verdicts: dict[str, Verdict] = {}
    control = None
    for name in runs:
        points = plan.points if name != "lora" else (plan.points + 1) // 2  # fewer looks only make the control weaker
        settings = AuditSettings(points=points, probe_points=1, max_texts=plan.attacked)
        named = list(zip([f"{operator}, {name}" for operator in OPERATORS], plan.transcripts(name), strict=True))
        verdict = run_audit(named, train_set, settings, control_findings=control or [], backbone=backbone)
        control = control or verdict.findings
        verdicts[name] = Verdict(verdict.attacked, control)
        console.print(verdicts[name].sentence(), style="bold")
    return verdicts


def _summarise(runs: dict[str, Run], verdicts: dict[str, "Verdict"]) -> dict[str, Any]:
    methods: dict[str, Any] = {}
    for name, run in runs.items():
        verdict = verdicts[name]
        methods[name] = {
            "accuracy": run.accuracy,
            "best_attack_auc": verdict.headline.auc,
            "best_attack": f"{verdict.headline.attack} on {verdict.headline.channel}",
            "activations_and_shifts_auc": _auc(verdict.best_on("activation", "shift", "sent")),
            "activations_and_shifts_auc_by_attack": verdict.best_of_each("activation", "shift", "sent"),
            "gradients_auc": _auc(verdict.best_on("gradient")),
            "best_component_auc": verdict.component.auc,
            "probe_auc": verdict.probe.auc,
            "few_label_auc": {knows: best.auc for knows, (best, _) in verdict.few_labels.items()},
            "chance_auc": verdict.chance.quantile,
            "seconds": run.seconds,
            "bytes_per_step": run.bytes_per_step,
            **run.report,
        }
    frozen = verdicts["p3eft"]
    return {
        "methods": methods,
        "frozen_accuracy": runs["lora"].frozen_accuracy,
        "frozen_attack_auc": frozen.frozen.auc,
        "frozen_component_auc": frozen.frozen_component.auc,
        "frozen_probe_auc": frozen.frozen_probe.auc,
        "frozen_few_label_auc": {knows: control.auc for knows, (_, control) in frozen.few_labels.items() if control},
    }


def _auc(finding: Any) -> float:
    return finding.auc if finding is not None else 0.5


def _print(result: dict[str, Any]) -> None:
    from blindtune.cli.progress import human_bytes

    table = Table(title="What was taught, and what the operators learned", title_justify="left")
    columns = (
        "method",
        "accuracy",
        "best attack",
        "on gradients",
        "with 64 labels",
        "μ",
        "ε",
        "bits",
        "bytes/step",
        "seconds",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    frozen = [f"{result['frozen_attack_auc']:.2f}", _with_some_labels(result["frozen_few_label_auc"])]
    table.add_row("frozen model", f"{result['frozen_accuracy']:.3f}", frozen[0], "–", frozen[1], *"–––––")
    for name, run in result["methods"].items():
        mu, epsilon, bits = run.get("mu"), run.get("epsilon"), run.get("information_bits")
        table.add_row(
            {"lora": "plain LoRA", "p3eft": "P3EFT"}[name],
            f"{run['accuracy']:.3f}",
            f"{run['best_attack_auc']:.2f}",
            f"{run['gradients_auc']:.2f}",
            _with_some_labels(run["few_label_auc"]),
            "none" if mu is None else f"{mu:.2f}",
            "none" if epsilon is None else f"{epsilon:.2f}",
            "all" if bits is None else f"{bits:.3f}",
            human_bytes(run["bytes_per_step"]),
            f"{run['seconds']:.0f}",
        )
    console.print()
    console.print(table)
    console.print(
        "Best attack: AUC of the strongest attack that knows no label (spectral, norm, k-means, the most two-humped "
        "component, what adapters share) on activations, shifts and received gradients of either operator, at its best "
        "moment of the run; 0.5 is guessing. With 64 labels: the best probe of an attacker who knows the labels of 64 "
        "texts. The frozen model's row is what the texts tell by themselves, attacked as often, with adapters in "
        "random order. μ, ε (at δ = 1e-5) and bits bound what everything that one operator sees in the run reveals of "
        f"all {result['train']} labels together, and so of any one of them."
    )
    console.print(f"{result['seconds']:.0f} s in all.")


def _with_some_labels(probes: dict[str, float]) -> str:
    return f"{probes[SOME_LABELS]:.2f}" if SOME_LABELS in probes else "–"


def _report(output: Path, runs: dict[str, Run], verdicts: dict[str, "Verdict"], train_set: "Examples") -> None:
    from blindtune.audit import write_report

    facts = [
        (name, f"test accuracy {run.accuracy:.3f}; best attack AUC {verdicts[name].headline.auc:.2f}")
        for name, run in runs.items()
    ]
    titles = {"lora": "Plain LoRA: what the operators learned", "p3eft": "P3EFT: what the operators learned"}
    for name, verdict in verdicts.items():
        path = output / f"report-{name}.html"
        write_report(path, verdict, title=titles[name], classes=train_set.classes, facts=facts)
        console.print(f"Report: {path.resolve()}", soft_wrap=True)
