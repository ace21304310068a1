"""The command line, one file for each command. A command parses its options, calls the library, and prints results."""

from importlib.metadata import version
from typing import Annotated

import typer

from blindtune.cli.console import manual
from blindtune.cli.demo import demo
from blindtune.cli.emulator import app as emulator
from blindtune.cli.labels import app as labels
from blindtune.cli.serve import serve, token
from blindtune.cli.texts import app as texts

app = typer.Typer(
    name="blindtune",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"blindtune {version('blindtune')}")
        raise typer.Exit


@app.callback()
def common(
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Fine-tune a language model that someone else hosts, without showing them what you teach it."""


app.add_typer(labels, name="labels")
app.add_typer(texts, name="texts")
for command in (serve, token, demo):
    app.command(help=manual(command))(command)
app.add_typer(emulator, name="emulator")


def main() -> None:
    """Runs the `blindtune` command."""
    app()
