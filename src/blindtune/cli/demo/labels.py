"""The demo's part on private labels: fits a classifier on frozen features, trains plain LoRA and padded LoRA over two
local operators, and attacks what they recorded."""

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from blindtune.cli.console import console
from blindtune.cli.processes import ServerProcess, local_servers

if TYPE_CHECKING:
    from blindtune.audit import Verdict
    from blindtune.data import Examples

OPERATORS = ("operator A", "operator B")
MAX_LENGTH = 32
SOME_LABELS = "64 labels"
FEATURES = "features"
"""The method that sends nothing about labels. Operators see texts alone, so there is nothing to attack but those."""
TITLES = {"lora": "Plain LoRA", "padded-lora": "Padded LoRA"}
"""Methods that train adapters, which are attacked."""


@dataclass(frozen=True)
class DemoPlan:
    """Options that both runs share.

    Attributes:
        model: model that the operators host.
        seed: seed of batches and initial weights.
        steps: number of training steps.
        points: number of snapshots to attack.
        attacked: number of texts to attack.
        output: folder of the demo.
    """

    model: str
    seed: int
    steps: int
    points: int
    attacked: int
    output: Path

    @property
    def transcripts(self) -> dict[str, Path]:
        """The folder of each operator's transcript, which holds the runs of both methods, each with its own tenant."""
        return {operator: self.output / "seen" / operator.replace(" ", "-") for operator in OPERATORS}


@dataclass(frozen=True)
class Run:
    """Result of training one method.

    Attributes:
        accuracy: test accuracy after training.
        seconds: duration of the training, preparation included.
        bytes_per_step: mean bytes of HTTP messages in a step, in both directions.
        report: numbers that the method reports.
    """

    accuracy: float
    seconds: float
    bytes_per_step: float
    report: dict[str, float]


@dataclass(frozen=True)
class FeaturesRun:
    """Result of the method that sends nothing about labels.

    Attributes:
        accuracy: test accuracy.
        chosen: the layers and the classifier that cross-validation chose.
        seconds: duration of the training.
        bytes_per_text: mean bytes of HTTP messages for a text, in both directions.
    """

    accuracy: float
    chosen: str
    seconds: float
    bytes_per_text: float


@dataclass(frozen=True)
class LabelsPart:
    """Results of the part on private labels.

    Attributes:
        summary: numbers of both methods, as JSON values.
        verdicts: verdict of each method's audit.
        classes: class names.
    """

    summary: dict[str, Any]
    verdicts: "dict[str, Verdict]"
    classes: list[str]


def train_all(plan: DemoPlan, train_set: "Examples", test_set: "Examples") -> tuple[FeaturesRun, dict[str, Run]]:
    """Trains over two servers, each method as a tenant of its own. Returns the run of `features`, and those of methods
    that train adapters, by method."""
    from blindtune.server.auth import add_token

    token_file = plan.output / "tenants.txt"
    tokens = {name: add_token(token_file, name) for name in (FEATURES, *TITLES)}
    console.print("Starting two servers …")
    threads = max(1, (os.cpu_count() or 2) // len(OPERATORS))
    with local_servers(plan.model, list(plan.transcripts.values()), threads=threads, token_file=token_file) as servers:
        for operator, server in zip(OPERATORS, servers, strict=True):
            console.print(f"{operator}: {server.url} (process {server.process.pid})")
        features = _fit_features(plan, servers[0], tokens[FEATURES], train_set, test_set)
        return features, {name: _train(name, plan, servers, tokens[name], train_set, test_set) for name in TITLES}


def attack_both(plan: DemoPlan, train_set: "Examples", features: FeaturesRun, runs: dict[str, Run]) -> LabelsPart:
    """Attacks what the operators recorded of the runs with adapters, prints a table, and writes a report of each."""
    verdicts = _audit(plan, train_set, runs)
    summary = _summarise(features, runs, verdicts)
    _print(summary, len(train_set))
    _report(plan.output, runs, verdicts, train_set)
    return LabelsPart(summary, verdicts, train_set.classes)


def _fit_features(
    plan: DemoPlan, server: ServerProcess, token: str, train_set: "Examples", test_set: "Examples"
) -> FeaturesRun:
    """Fits a classifier on frozen features that one server computes, and evaluates it."""
    from blindtune.cli.options import connect
    from blindtune.cli.progress import fit_frozen
    from blindtune.labels import Features, LinearHead, PrivateModel, evaluate

    console.rule(f"[bold]{FEATURES}")
    method = Features()
    reads = {name: value for name, value in method.reads.items() if name != "pairs"}
    backbone = connect(
        [server.url], token=[token], tls_ca=None, wait=60.0, max_length=MAX_LENGTH, num_adapters=0, store=None, **reads
    )
    head = LinearHead(backbone.hidden_size, len(train_set.classes))
    private = PrivateModel(backbone, head, method, seed=plan.seed)
    begin = time.perf_counter()
    fit_frozen(private, train_set, test_set.texts, console)
    seconds = time.perf_counter() - begin
    traffic = backbone.traffic.sent + backbone.traffic.received
    accuracy = evaluate(private, test_set)["accuracy"]
    backbone.close()
    chosen = "" if private.choice is None else str(private.choice.chosen)
    console.print(f"{FEATURES}: test accuracy {accuracy:.3f}, {chosen}")
    return FeaturesRun(accuracy, chosen, seconds, traffic / (len(train_set) + len(test_set)))


def _train(
    name: str, plan: DemoPlan, servers: list[ServerProcess], token: str, train_set: "Examples", test_set: "Examples"
) -> Run:
    """Trains a method over the servers as a tenant of its own, and evaluates it."""
    from blindtune.cli.options import connect, make_lora_config
    from blindtune.cli.progress import StepBar, inference_progress, labels_status
    from blindtune.labels import METHODS, LinearHead, PrivateModel, TrainConfig, Trainer, evaluate, make_method

    console.rule(f"[bold]{name}")
    backbone = connect(
        [server.url for server in servers],
        token=[token],
        tls_ca=None,
        wait=60.0,
        max_length=MAX_LENGTH,
        num_adapters=0,
    )
    method = make_method(name, steps=plan.steps)
    rank = METHODS[name].default_rank
    backbone.adapter_config = make_lora_config(backbone.info, rank=rank, alpha=2 * rank, targets=None, layers="upper")
    head = LinearHead(backbone.hidden_size, len(train_set.classes))
    private = PrivateModel(backbone, head, method, seed=plan.seed)
    config = TrainConfig(steps=plan.steps, seed=plan.seed, learning_rate=METHODS[name].default_lr)
    trainer = Trainer(private, train_set, config, checkpoint=plan.output / name / "model")
    begin = time.perf_counter()
    with inference_progress(backbone, console, "frozen features", len(train_set)):
        trainer.prepare()
    done = trainer.run([StepBar(console, name, labels_status)])
    seconds = time.perf_counter() - begin
    with inference_progress(backbone, console, "test", len(test_set)):
        accuracy = evaluate(private, test_set)["accuracy"]
    backbone.close()
    console.print(f"{name}: test accuracy {accuracy:.3f}")
    traffic = sum(step.bytes_sent + step.bytes_received for step in done) / len(done)
    return Run(accuracy, seconds, traffic, private.method.report())


def _audit(plan: DemoPlan, train_set: "Examples", runs: dict[str, Run]) -> dict[str, "Verdict"]:
    """Attacks what both operators of both runs recorded. The run of plain LoRA is the control of both audits."""
    from blindtune.audit import AuditSettings, Verdict, audit_labels
    from blindtune.cli.progress import audit_progress
    from blindtune.models import load_backbone

    console.rule("[bold]audit: what did the operators learn?")
    backbone = load_backbone(plan.model)
    verdicts: dict[str, Verdict] = {}
    control = None
    for name in runs:
        # with fewer snapshots the attack on plain LoRA can only be weaker, which favours it
        points = plan.points if name != "lora" else (plan.points + 1) // 2
        settings = AuditSettings(points=points, probe_points=1, max_texts=plan.attacked, tenant=name)
        folders = {f"{operator}, {name}": folder for operator, folder in plan.transcripts.items()}
        with audit_progress(console) as begin:
            verdict = audit_labels(
                folders, train_set.texts, train_set.labels or [], settings, control_findings=control or (),
                backbone=backbone, begin=begin,
            )  # fmt: skip
        control = control or verdict.findings
        verdicts[name] = Verdict(verdict.attacked, control)
        console.print(verdicts[name].sentence(), style="bold")
    return verdicts


def _summarise(features: FeaturesRun, runs: dict[str, Run], verdicts: dict[str, "Verdict"]) -> dict[str, Any]:
    from blindtune.audit import ChannelKind

    computed = (ChannelKind.ACTIVATION, ChannelKind.SHIFT, ChannelKind.SENT_ACTIVATION)
    methods: dict[str, Any] = {}
    for name, run in runs.items():
        verdict = verdicts[name]
        methods[name] = {
            "accuracy": run.accuracy,
            "best_attack_auc": verdict.headline.auc,
            "best_attack": f"{verdict.headline.attack} on {verdict.headline.channel}",
            "activations_and_shifts_auc": _auc(verdict.best_on(*computed)),
            "activations_and_shifts_auc_by_attack": verdict.best_of_each(*computed),
            "gradients_auc": _auc(verdict.best_on(ChannelKind.GRADIENT)),
            "best_component_auc": verdict.component.auc,
            "probe_auc": verdict.probe.auc,
            "few_label_auc": {knows: best.auc for knows, (best, _) in verdict.few_labels.items()},
            "chance_auc": verdict.chance.quantile,
            "seconds": run.seconds,
            "bytes_per_step": run.bytes_per_step,
            **run.report,
        }
    frozen = verdicts["padded-lora"]
    return {
        "methods": methods,
        "features": asdict(features),
        "frozen_attack_auc": frozen.frozen.auc,
        "frozen_component_auc": frozen.frozen_component.auc,
        "frozen_probe_auc": frozen.frozen_probe.auc,
        "frozen_few_label_auc": {knows: control.auc for knows, (_, control) in frozen.few_labels.items() if control},
    }


def _auc(finding: Any) -> float:
    return finding.auc if finding is not None else 0.5


def _print(result: dict[str, Any], examples: int) -> None:
    from blindtune.cli.progress import human_bytes

    table = Table(title="Accuracy, and what the operators learned about the labels", title_justify="left")
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
    features = result["features"]
    table.add_row(
        "Features",
        f"{features['accuracy']:.3f}",
        frozen[0],
        "–",
        frozen[1],
        *("0", "0", "0"),
        "–",
        f"{features['seconds']:.0f}",
    )
    for name, run in result["methods"].items():
        mu, epsilon, bits = run.get("mu"), run.get("epsilon"), run.get("information_bits")
        table.add_row(
            TITLES[name],
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
        "Best attack: AUC of the strongest attack that knows no label (spectral, norm, k-means, the most bimodal "
        "component, what adapters share) on activations, shifts and received gradients of either operator, at the best "
        "snapshot of the run; 0.5 is guessing. With 64 labels: the best probe of an attacker who knows the labels of "
        "64 texts. With features, operators see texts and nothing that depends on labels: its row shows what texts "
        "themselves reveal, with as many attacks, and adapters in random order. μ, ε (at δ = 1e-5) and bits bound what "
        "everything that one operator sees in the run "
        f"reveals of all {examples} labels together, and so of any one of them."
    )


def _with_some_labels(probes: dict[str, float]) -> str:
    return f"{probes[SOME_LABELS]:.2f}" if SOME_LABELS in probes else "–"


def _report(output: Path, runs: dict[str, Run], verdicts: dict[str, "Verdict"], train_set: "Examples") -> None:
    from blindtune.audit import write_report

    facts = [
        (name, f"test accuracy {run.accuracy:.3f}; best attack AUC {verdicts[name].headline.auc:.2f}")
        for name, run in runs.items()
    ]
    titles = {
        "lora": "Plain LoRA: what the operators learned",
        "padded-lora": "Padded LoRA: what the operators learned",
    }
    for name, verdict in verdicts.items():
        path = output / f"report-{name}.html"
        write_report(path, verdict, title=titles[name], classes=train_set.classes, facts=facts)
        console.print(f"Report: {path.resolve()}", soft_wrap=True)
