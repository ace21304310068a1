"""`blindtune texts membership`: measures what tuned parts would reveal to a provider about their training texts."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from blindtune.checks import check_counts
from blindtune.cli import options
from blindtune.cli.console import console, reporting_errors, write_json
from blindtune.cli.texts.deploy import chosen_fields, read_questions, read_summary_if_any
from blindtune.errors import ConfigError

if TYPE_CHECKING:
    from blindtune.audit.membership import Membership, Scored
    from blindtune.data.questions import TokenizedQuestion
    from blindtune.texts import Scorer

AROUND = ("emulator", "trunk")
TITLES = ("members", "others")


def membership(
    checkpoint: options.TunedEnds,
    server: options.CutServer,
    members: Annotated[
        str, typer.Option(help="File of questions that the parts were tuned on.", rich_help_panel=options.DATA)
    ],
    others: Annotated[
        str,
        typer.Option(
            help="File of questions of the same kind that they were not tuned on.", rich_help_panel=options.DATA
        ),
    ],
    around: Annotated[
        str,
        typer.Option(
            help="Part of the model between the ends: emulator (no text is sent), or trunk (the tuned parts and the "
            "texts are sent to the server, as after `deploy`; only for texts that it may see)."
        ),
    ] = "emulator",
    limit: Annotated[
        int, typer.Option(help="Largest number of questions to read from each file, from its start.")
    ] = 500,
    device: Annotated[
        str, typer.Option(help="Torch device for --around emulator, such as cpu, cuda or cuda:1.")
    ] = "cpu",
    model: options.Model = None,
    token: options.Token = None,
    tls_ca: options.TlsCa = None,
    wait: options.Wait = 600.0,
    insecure: options.Insecure = False,
    provider_key: options.ProviderKey = None,
    json: options.Results = None,
) -> None:
    """Attack tuned parts before you hand them over: which texts were they tuned on, and which are memorized?

    Anyone who has the tuned parts can compare the likelihoods of a text with and without them. Members and others
    should be random parts of the same data; the difference before tuning, which is printed too, should be near zero.

    Example: blindtune texts membership out/ --server https://a.example --members train.jsonl
    --others validation.jsonl
    """
    with reporting_errors():
        from blindtune.audit.membership import attack_membership
        from blindtune.models.devices import find_device
        from blindtune.texts.handover import models_around

        check_counts(limit=limit)
        if around not in AROUND:
            raise ConfigError(f"--around {around} is unknown.", remedy=f"Use {' or '.join(AROUND)}.")
        find_device(device)  # raises before anything is sent
        operator = options.connect_operator(
            server, token=token, tls_ca=tls_ca, wait=wait, insecure=insecure, model=model
        )
        trained = read_summary_if_any(checkpoint)
        fields, length = chosen_fields(trained, None, None), 128 if trained is None else trained.max_length
        files = [read_questions(operator, path, fields, "train", length)[:limit] for path in (members, others)]
        before, tuned = models_around(operator, checkpoint, around == "trunk", trusted_key=provider_key, device=device)
        scored = [
            tuple(_score(model, questions, f"{which}, {title}") for questions, title in zip(files, TITLES, strict=True))
            for model, which in ((tuned, "tuned"), (before, "before"))
        ]
        result = attack_membership((scored[0][0], scored[0][1]), (scored[1][0], scored[1][1]))
        _print(result, around)
        write_json(json, {"around": around, **asdict(result)})


def _score(model: "Scorer", questions: list["TokenizedQuestion"], title: str) -> "Scored":
    """Scores the right continuation of each question, with a progress bar."""
    from blindtune.audit.membership import Scored
    from blindtune.cli.progress import Bars
    from blindtune.texts import score_answers

    losses: list[float] = []
    greedy: list[bool] = []
    with Bars(console=console) as progress:
        task = progress.add_task(title, total=len(questions))
        for loss, memorized in score_answers(model, questions):
            losses.append(loss)
            greedy.append(memorized)
            progress.advance(task)
    return Scored(losses, greedy)


def _print(result: "Membership", around: str) -> None:
    table = Table(title=f"Membership, around the {around}: {result.members} members, {result.others} others")
    for column in ("attack", "AUC", "95%", "members found at 1% false alarms"):
        table.add_column(column, justify="left" if column == "attack" else "right")
    for f in result.findings:
        table.add_row(f.attack, f"{f.auc:.3f}", f"{f.low:.3f} to {f.high:.3f}", f"{f.found:.1%}")
    console.print(table)
    console.print(
        f"Memorized answers: {result.memorized[0]:.1%} of members, {result.memorized[1]:.1%} of others "
        f"(before tuning {result.memorized_before[0]:.1%} and {result.memorized_before[1]:.1%})."
    )
    console.print(
        f"The loss of others minus that of members is {result.gap:+.3f} nats per token; before tuning it was "
        f"{result.gap_before:+.3f}.",
        soft_wrap=True,
    )
    best = result.strongest
    console.print(
        f"Anyone who has these weights tells members from others with AUC {best.auc:.2f} ({best.attack}; 0.50 is "
        f"guessing).",
        soft_wrap=True,
    )
