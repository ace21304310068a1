"""`blindtune texts audit`: measures how much of the texts a cut model's server could read."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from blindtune.cli import options
from blindtune.cli.console import console, reporting_errors, write_json

if TYPE_CHECKING:
    from blindtune.audit.texts import TextsAudit


def audit(
    transcript: Annotated[
        Path, typer.Argument(help="Folder that the server with the trunk wrote (`blindtune serve --cut … --record`).")
    ],
    ground_truth: Annotated[
        Path,
        typer.Option(help="File that `blindtune texts train --ground-truth` wrote, which is used for scoring only."),
    ],
    public: Annotated[
        list[Path],
        typer.Option(
            help="File of public text that attackers learn from: .txt, JSON lines, …. Repeat for more.",
            default_factory=list,
        ),
    ],
    run: Annotated[
        Path | None,
        typer.Option(
            help="Folder that `blindtune texts train --output` wrote. An adaptive attacker reads the design and the "
            "training options in its blindtune.json (no weights), and trains a shadow client on --public."
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Number of texts to attack at each of three stages of the run.")] = 32,
    model: Annotated[
        str | None, typer.Option(help="Pretrained model. Default: the one that the transcript names.")
    ] = None,
    device: options.Device = "cpu",
    json: Annotated[Path | None, typer.Option("--json", help="Also write all numbers to this file.")] = None,
) -> None:
    """Attack what a cut model's server really received, and report how much of the texts it could read.

    The static attacker has the pretrained model and knows the codec. With --run an adaptive attacker also knows the
    design and its options. As a control, the same attacks run on what undefended split learning would have sent, where
    they must succeed.

    Example: blindtune texts audit seen-by-a --ground-truth sent.jsonl --public news.txt --run out/
    """
    with reporting_errors():
        from blindtune.audit import audit_texts
        from blindtune.texts.shadow import ShadowClient

        result = audit_texts(
            transcript,
            ground_truth,
            public,
            model=model,
            adaptive=None if run is None else ShadowClient(run),
            sequences=sequences,
            device=device,
            say=partial(console.print, soft_wrap=True, highlight=False),
        )
        print_audit(result)
        write_json(json, result.to_json())


def print_audit(audit: "TextsAudit") -> None:
    """Prints an audit's table and its conclusion."""
    table = Table(title="What the server could read of the texts", title_justify="left")
    for name in ("attack", "attacker", "stage"):
        table.add_column(name)
    for name in ("tokens in place [95%]", "ROUGE-L", "undefended"):
        table.add_column(name, justify="right")
    both = [(r, "static") for r in audit.results] + [(r, "adaptive") for r in audit.adaptive or [] if not r.floor]
    for result, attacker in sorted(both, key=lambda pair: (pair[0].floor, -pair[0].accuracy)):
        accuracy = result.metrics["accuracy"]
        same = [c.accuracy for c in audit.control if c.attack == result.attack]
        table.add_row(
            result.attack + (" (observes nothing)" if result.floor else ""),
            "–" if result.floor else attacker,
            result.stage,
            f"{accuracy.mean:.1%} [{accuracy.low:.1%}, {accuracy.high:.1%}]",
            f"{result.metrics['rougeL'].mean:.2f}",
            f"{max(same):.1%}" if same else "–",
        )
    console.print(table)
    console.print(audit.sentence(), style="bold" if audit.valid else "bold red", soft_wrap=True)
