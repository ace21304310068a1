"""`blindtune labels audit`: attacks what servers recorded, and scores the attacks with the true labels."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from blindtune.cli import options
from blindtune.cli.console import console, reporting_errors, write_json

if TYPE_CHECKING:
    from blindtune.audit import Verdict


def audit(
    transcripts: Annotated[
        list[Path], typer.Argument(help="Folders that `blindtune serve --record` wrote, one for each server.")
    ],
    labels: Annotated[
        str,
        typer.Option(
            help="Training file with the true labels, which are used for scoring only.", rich_help_panel=options.DATA
        ),
    ],
    text: options.TextColumns = ["text"],  # noqa: B006 - Typer copies it
    label: Annotated[str, typer.Option(help="Column of labels.", rich_help_panel=options.DATA)] = "label",
    model: Annotated[
        str | None, typer.Option(help="Pretrained model. Default: the one that the transcript names.")
    ] = None,
    control: Annotated[
        list[Path] | None,
        typer.Option(
            help="Transcript of an unprotected run, as the control; repeat for more. Default: a short run, trained now."
        ),
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Tenant whose run is attacked, if several were recorded.")] = None,
    points: Annotated[int, typer.Option(help="Number of snapshots to attack, spread over the run.")] = 8,
    max_texts: Annotated[
        int | None, typer.Option(help="Number of texts to attack, chosen at random. Default: all.")
    ] = None,
    collude: Annotated[
        bool, typer.Option("--collude", help="Also attack any two or more of these servers as if they had colluded.")
    ] = False,
    updates: Annotated[int, typer.Option(help="Number of optimizer steps to invert, up to a minute each.")] = 0,
    device: options.Device = "cpu",
    report: Annotated[Path, typer.Option(help="File for the HTML report.")] = Path("audit.html"),
    json: Annotated[Path | None, typer.Option("--json", help="Also write all numbers to this file.")] = None,
) -> None:
    """Attack what servers really received, and report what the strongest attack learned of the labels.

    The attacks use only the transcripts and the pretrained model, with which a server can run every text under the
    adapters of every step. Unsupervised attacks know no label; the probe knows all other labels. The result is compared
    with two controls: the same attacks on unprotected training, which must succeed, and on the frozen model. With
    --collude, all subsets of the servers are attacked too, as if they had shared what they saw.

    Example: blindtune labels audit seen-by-a seen-by-b --labels notes.csv --text note --label diagnosis
    """
    with reporting_errors():
        from blindtune.audit import AuditSettings, audit_labels, write_report
        from blindtune.cli.progress import audit_progress

        examples = options.read_examples(labels, text, label)
        settings = AuditSettings(
            points=points, max_texts=max_texts, model=model, tenant=tenant, collude=collude, updates=updates,
            device=device,
        )  # fmt: skip
        with audit_progress(console) as begin:
            verdict = audit_labels(
                transcripts, examples.texts, examples.labels or [], settings, control=control or [], begin=begin
            )
        print_verdict(verdict)
        write_report(report, verdict, title="blindtune audit", classes=examples.classes)
        console.print(f"Report: {report.resolve()}", soft_wrap=True)
        write_json(json, verdict.to_json())


def print_verdict(verdict: "Verdict") -> None:
    """Prints an audit's notes, its table, and its conclusion."""
    for note in verdict.notes:
        console.print(note, soft_wrap=True)
    table = Table(title="Every channel at the snapshot with the strongest attack", title_justify="left")
    for name in ("server", "channel", "attacker knows", "attack", "step"):
        table.add_column(name)
    table.add_column("AUC [95%]", justify="right")
    for finding in verdict.table():
        table.add_row(
            finding.operator,
            str(finding.channel),
            finding.knows,
            finding.attack,
            str(finding.step),
            finding.interval(),
        )
    console.print(table)
    console.print(verdict.sentence(), style="bold" if verdict.valid else "bold red")
