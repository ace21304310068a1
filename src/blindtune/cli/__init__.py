"""The command line, one file for each command. A command parses its options, calls the library, and prints results."""

import typer

from blindtune.cli.console import manual
from blindtune.cli.demo import demo
from blindtune.cli.emulator import app as emulator
from blindtune.cli.labels import app as labels
from blindtune.cli.serve import serve, token
from blindtune.cli.texts import app as texts

app = typer.Typer(
    name="blindtune",
    help="Fine-tune a language model that someone else hosts, without showing them what you teach it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(labels, name="labels")
app.add_typer(texts, name="texts")
for command in (serve, token, demo):
    app.command(help=manual(command))(command)
app.add_typer(emulator, name="emulator")


def main() -> None:
    """Runs the `blindtune` command."""
    app()
