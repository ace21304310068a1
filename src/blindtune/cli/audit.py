"""`blindtune audit`: attack what servers recorded."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from blindtune.cli import options
from blindtune.cli.console import console, reporting_errors, write_json
from blindtune.errors import ConfigError

if TYPE_CHECKING:
    from blindtune.audit import Finding, Verdict, View
    from blindtune.training import Examples


def audit(
    transcripts: Annotated[
        list[Path], typer.Argument(help="Folders that `blindtune serve --record` wrote, one a server.")
    ],
    labels: Annotated[
        str | None, typer.Option(help="The training file with the true labels, for scoring alone.")
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(help="Split decoders: what `train --truth` wrote; then texts are attacked, not labels."),
    ] = None,
    public: Annotated[
        list[Path] | None,
        typer.Option(help="Split decoders: public text that attackers learn from (.txt, JSON lines, …); repeat."),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            help="Split decoders: the folder that `train --output` wrote; its blindtune.json tells an "
            "adaptive attacker the design and for how long (no weights), who trains a shadow client on --public."
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Split decoders: texts to attack at each of three moments.")] = 32,
    device: options.Device = "cpu",
    text: Annotated[str, typer.Option(help="Its column of texts.")] = "text",
    text_pair: Annotated[str | None, typer.Option(help="Its column of second texts.")] = None,
    label: Annotated[str, typer.Option(help="Its column of labels.")] = "label",
    model: Annotated[
        str | None, typer.Option(help="The pretrained model; the one that the transcript names if left out.")
    ] = None,
    control: Annotated[
        list[Path] | None,
        typer.Option(help="Transcripts of an unprotected run as control; a short one is trained here if left out."),
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Whose run, if several tenants were recorded.")] = None,
    points: Annotated[int, typer.Option(help="Points in time to attack, spread over the run.")] = 8,
    max_texts: Annotated[int | None, typer.Option(help="Attack a random sample of texts; all if left out.")] = None,
    collude: Annotated[
        bool, typer.Option("--collude", help="Also attack what any two or more of these servers know together.")
    ] = False,
    updates: Annotated[int, typer.Option(help="Optimizer steps to invert, up to a minute each.")] = 0,
    report: Annotated[Path, typer.Option(help="Where to write the HTML report.")] = Path("audit.html"),
    json: Annotated[Path | None, typer.Option("--json", help="Also write all numbers to this file.")] = None,
) -> None:
    """Attack what servers really received, and report what the strongest attack learned.

    Works from transcripts alone, with the pretrained model at hand: every text under the adapters of every step.
    Unsupervised attacks know nothing; the probe knows all other labels. Two controls stand beside the result: the
    same attacks on unprotected training, which must succeed, and on the frozen model. With --collude, all subsets of
    the servers are attacked too, as if they had pooled what they saw.

    The transcript of a split decoder is attacked for its *texts*: give --truth, which the client wrote, and --public.

    Example:  blindtune audit seen-by-a seen-by-b --labels notes.csv --text note --label diagnosis
    """
    with reporting_errors():
        if truth is not None:
            _audit_texts(transcripts, truth, public or [], model, run, sequences, device, json)
            return
        if labels is None:
            raise ConfigError(
                "An audit is scored against what was secret.",
                remedy="Give --labels, or for a split decoder --truth and --public.",
            )
        from blindtune.training import Columns, load_examples

        examples = load_examples(labels, Columns(text, label, text_pair))
        settings = AuditSettings(
            points=points, max_texts=max_texts, model=model, tenant=tenant, collude=collude, updates=updates,
            device=device,
        )  # fmt: skip
        named = [(str(folder), folder) for folder in transcripts]
        verdict = run_audit(named, examples, settings, control=control or [])
        print_verdict(verdict)
        from blindtune.audit import write_report

        write_report(report, verdict, title="blindtune audit", classes=examples.classes)
        console.print(f"Report: {report.resolve()}", soft_wrap=True)
        write_json(json, verdict.to_json())


def _audit_texts(
    transcripts: list[Path],
    truth: Path,
    public: list[Path],
    model: str | None,
    run: Path | None,
    sequences: int,
    device: str,
    json: Path | None,
) -> None:
    from blindtune.cli.audit_inputs import print_input_audit, run_input_audit

    if len(transcripts) != 1:
        raise ConfigError(
            f"{len(transcripts)} transcripts of a split decoder.",
            remedy="Name the one of the server that has the trunk.",
        )
    found = run_input_audit(
        transcripts[0], truth, public, model=model, run=run, sequences=sequences, device=device, seed=0
    )
    print_input_audit(found)
    write_json(json, found.to_json())


@dataclass(frozen=True)
class AuditSettings:
    """How thorough an audit is."""

    points: int = 8
    probe_points: int = 3
    max_texts: int | None = None
    model: str | None = None
    tenant: str | None = None
    collude: bool = False
    updates: int = 0
    device: str = "cpu"
    """Where texts run under the recorded adapters; attacks on what comes out of that run on the CPU."""


MOST_COLLUDING = 4
"""So many servers have 11 subsets of two or more."""


def colluding(views: "list[View]") -> "list[View]":
    """The joint view of every subset of two or more servers, the small ones first.

    Raises:
        ConfigError: fewer than two servers, or so many that their subsets would take too long.
    """
    from blindtune.audit import join_views

    if not 2 <= len(views) <= MOST_COLLUDING:
        raise ConfigError(
            f"--collude attacks every subset of the servers; {len(views)} transcripts can't be joined.",
            remedy=f"Name 2 to {MOST_COLLUDING} transcripts of one run.",
        )
    return [join_views(subset) for size in range(2, len(views) + 1) for subset in combinations(views, size)]


def run_audit(
    transcripts: list[tuple[str, Path]],
    examples: "Examples",
    settings: AuditSettings,
    *,
    control: Iterable[Path] = (),
    control_findings: "list[Finding] | None" = None,
    backbone: Any = None,
) -> "Verdict":
    """Attacks `(name, folder)` transcripts with a progress bar.

    The unprotected control is `control_findings`, or the transcripts in `control`, or a short run trained here.
    """
    from blindtune.audit import (
        Plan,
        Recomputation,
        Verdict,
        attack_view,
        audited_checkpoints,
        cells,
        read_view,
        unprotected_control,
    )
    from blindtune.audit.control import STEPS
    from blindtune.audit.labels.lattice import on_lattice
    from blindtune.cli.progress import Bars
    from blindtune.errors import TranscriptError
    from blindtune.models import load_backbone
    from blindtune.wire import Transcript

    views = [read_view(Transcript(folder), name, settings.tenant) for name, folder in transcripts]
    views = [view for view in views if view.messages] or views
    control_views = [read_view(Transcript(folder), f"control {folder}") for folder in control]
    recorded = views[0].transcript.recording.models[views[0].model]
    if backbone is None:
        backbone = load_backbone(settings.model or recorded.source, device=settings.device, dtype=recorded.dtype)
    for view in [*views, *control_views]:
        if view.transcript.recording.models[view.model].fingerprint != backbone.fingerprint:
            raise TranscriptError(
                f"{view.transcript.folder} was recorded on other weights than {backbone.source.requested!r}.",
                remedy="Give the same pretrained model with --model.",
            )
    if settings.collude:
        views += colluding(views)
    plan = Plan(
        label_rows(examples, views, backbone),
        settings.points,
        settings.probe_points,
        settings.max_texts,
        settings.updates,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console) as progress:
        recompute = Recomputation(backbone)
        attacked = []
        everything = [*views, *control_views]
        for view in everything:
            rows = [row for row in view.first_seen if row in plan.labels]
            total = min(len(rows), settings.max_texts or len(rows))
            task = progress.add_task(f"{view.operator}: recomputing activations", total=2 * total)
            recompute.on_texts = partial(progress.advance, task)
            attack_task = progress.add_task(f"{view.operator}: attacking channels", total=cells(view, plan))
            attacked.append(attack_view(view, plan, recompute, partial(progress.advance, attack_task)))
            for done in (task, attack_task):
                progress.update(done, completed=progress.tasks[done].total)
        main, others = attacked[: len(views)], attacked[len(views) :]
        if control_findings is None and others:
            control_findings = [finding for result in others for finding in result.findings]
        if control_findings is None:
            trained = next(view for view in views if audited_checkpoints(view, 1))
            task = progress.add_task("control: unprotected training", total=STEPS)
            control_findings = unprotected_control(trained, plan, recompute, lambda: progress.advance(task))
    for view in views:
        if view.gradients or view.moving:
            console.print(f"{on_lattice(view)}.", soft_wrap=True)
    return Verdict(main, control_findings)


def label_rows(examples: "Examples", views: list[Any], backbone: Any) -> dict[tuple[int, ...], int]:
    """Token rows, as the servers saw them, with their labels."""
    from blindtune.models import Tokenizer

    longest = max(len(row) for view in views for row in view.first_seen)
    tokenizer = Tokenizer(backbone.tokenizer, pad_token_id=backbone.pad_token_id, with_types=True)
    rows = tokenizer.rows(examples.texts, max_length=longest)
    return {row.ids: label for row, label in zip(rows, examples.labels or [], strict=True)}


def print_verdict(verdict: "Verdict") -> None:
    """The rich table of an audit and its sentence."""
    table = Table(title="Every channel at its worst moment", title_justify="left")
    for name in ("server", "channel", "attacker knows", "attack", "step"):
        table.add_column(name)
    table.add_column("AUC [95%]", justify="right")
    for finding in verdict.table():
        table.add_row(
            finding.operator,
            finding.channel,
            finding.knows,
            finding.attack,
            str(finding.step),
            finding.interval(),
        )
    console.print(table)
    console.print(verdict.sentence(), style="bold" if verdict.valid else "bold red")
