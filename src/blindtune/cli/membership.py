"""`blindtune membership`: what tuned ends would tell a provider about the texts that they were tuned on."""

import copy
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from blindtune.cli import options
from blindtune.cli.console import console, reporting_errors, write_json
from blindtune.cli.plugin import chosen_fields, read_test
from blindtune.errors import ConfigError, UnknownPart

if TYPE_CHECKING:
    import torch

    from blindtune.audit.membership import Membership, Scored
    from blindtune.client import Operator
    from blindtune.training.guarded import Scorer
    from blindtune.training.questions import TokenizedQuestion

AROUND = ("emulator", "trunk")


def membership(
    checkpoint: options.TunedEnds,
    server: options.SplitServer,
    members: Annotated[str, typer.Option(help="Questions that the ends were tuned on.")],
    others: Annotated[str, typer.Option(help="Questions of the same kind that they were not tuned on.")],
    around: Annotated[
        str,
        typer.Option(
            help="emulator: nothing of the texts is sent. trunk: the ends and the texts go to the server, as after "
            "`plug-in`; for texts that it may see."
        ),
    ] = "emulator",
    limit: Annotated[int, typer.Option(help="Most questions of each file, the first ones.")] = 500,
    provider_key: Annotated[str | None, typer.Option(help="Public key that must have signed the emulator.")] = None,
    device: Annotated[
        str, typer.Option(help="Torch device for --around emulator, which runs here: cpu, cuda, cuda:1.")
    ] = "cpu",
    model: options.Model = None,
    token: options.Token = None,
    tls_ca: options.TlsCa = None,
    wait: options.Wait = 600.0,
    insecure: options.Insecure = False,
    json: options.Results = None,
) -> None:
    """Attack tuned ends before you hand them over: which texts were they tuned on, and which do they know by heart?

    Whoever holds the tuned ends can compare how likely a text is with them and without. Members and others should be
    random parts of the same data; the difference before tuning, which is printed too, should be near zero.

    Example:  blindtune membership out/ --server https://a.example --members train.jsonl --others validation.jsonl
    """
    with reporting_errors():
        from blindtune.audit.membership import attack_membership
        from blindtune.methods.guarded import read_run
        from blindtune.models.devices import find_device

        if around not in AROUND:
            raise ConfigError(f"There is no {around!r} to put ends around.", remedy=f"Use {' or '.join(AROUND)}.")
        place = find_device(device)
        operator = options.connect_operator(
            server, token=token, tls_ca=tls_ca, wait=wait, insecure=insecure, model=model
        )
        trained = read_run(checkpoint)
        fields, length = chosen_fields(trained, {}), int(trained.get("max_length", 128))
        files = [read_test(operator, path, fields, None, "train", length)[:limit] for path in (members, others)]
        before, tuned = _models(operator, checkpoint, around, provider_key, place)
        scored = [
            tuple(_score(model, questions, f"{which}, {title}") for questions, title in zip(files, TITLES, strict=True))
            for model, which in ((tuned, "tuned"), (before, "before"))
        ]
        found = attack_membership((scored[0][0], scored[0][1]), (scored[1][0], scored[1][1]))
        _print(found, around)
        write_json(json, {"around": around, **asdict(found)})


TITLES = ("members", "others")


def _models(
    operator: "Operator", checkpoint: Path, around: str, provider_key: str | None, device: "torch.device"
) -> tuple["Scorer", "Scorer"]:
    """The model as it was, and with tuned ends."""
    from blindtune.client import RemotePlugin, fetch_emulator, fetch_part
    from blindtune.methods.guarded import Ends, SplitCausalLM, read_tuned
    from blindtune.methods.guarded.ends import merge_checkpoint
    from blindtune.models.split import tie
    from blindtune.training.guarded import Plugged

    if around == "trunk":
        return Plugged(RemotePlugin(operator)), Plugged(RemotePlugin(operator, *read_tuned(checkpoint)))
    bottom, top = (fetch_part(operator, name).float() for name in ("bottom", "top"))
    try:
        emulator, _ = fetch_emulator(operator, provider_key)
    except UnknownPart as error:
        raise ConfigError(error.message, remedy="Use --around trunk, if the server may see the texts.") from None
    before = (bottom, top, emulator.float())
    tuned = copy.deepcopy(before)
    for parts in (before, tuned):
        tie(*parts[:2])
    merge_checkpoint(Ends(*tuned[:2], parts=(), emulator=tuned[2]), checkpoint)
    for part in (*before, *tuned):
        part.to(device)
    return SplitCausalLM(*before), SplitCausalLM(*tuned)


def _score(model: "Scorer", questions: list["TokenizedQuestion"], title: str) -> "Scored":
    """The right continuation of each question, with progress."""
    from blindtune.audit.membership import Scored
    from blindtune.cli.progress import Bars
    from blindtune.training.guarded import score_answers

    losses: list[float] = []
    greedy: list[bool] = []
    with Bars(console=console) as progress:
        task = progress.add_task(title, total=len(questions))
        for loss, by_heart in score_answers(model, questions):
            losses.append(loss)
            greedy.append(by_heart)
            progress.advance(task)
    return Scored(losses, greedy)


def _print(found: "Membership", around: str) -> None:
    table = Table(title=f"Membership, around the {around}: {found.members} members, {found.others} others")
    for column in ("attack", "AUC", "95%", "members found at 1% false alarms"):
        table.add_column(column, justify="left" if column == "attack" else "right")
    for f in found.findings:
        table.add_row(f.attack, f"{f.auc:.3f}", f"{f.low:.3f} to {f.high:.3f}", f"{f.found:.1%}")
    console.print(table)
    console.print(
        f"Answers known by heart: {found.heart[0]:.1%} of members, {found.heart[1]:.1%} of others "
        f"(before tuning {found.heart_before[0]:.1%} and {found.heart_before[1]:.1%})."
    )
    console.print(
        f"Others lose {found.gap:+.3f} nats a token more than members; before tuning {found.gap_before:+.3f}.",
        soft_wrap=True,
    )
    best = found.strongest
    console.print(
        f"Whoever holds these weights tells members from others with AUC {best.auc:.2f} ({best.attack}; 0.50 is "
        f"guessing).",
        soft_wrap=True,
    )
