"""The command line: one file for each command."""

import typer

from blindtune.cli.audit import audit
from blindtune.cli.demo import demo
from blindtune.cli.emulator import app as emulator
from blindtune.cli.membership import membership
from blindtune.cli.plugin import plug_in
from blindtune.cli.serve import serve, token
from blindtune.cli.train import predict, train

app = typer.Typer(
    name="blindtune",
    help="Fine-tune a language model that someone else hosts, without showing them what you teach it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for command in (train, predict, audit, demo, serve, token):
    app.command()(command)
app.command("plug-in")(plug_in)
app.command()(membership)
app.add_typer(emulator, name="emulator")


def main() -> None:
    """Entry point of the `blindtune` command."""
    app()
