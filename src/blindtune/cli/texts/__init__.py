"""`blindtune texts …`: the commands for private texts."""

import typer

from blindtune.cli.console import manual
from blindtune.cli.texts.audit import audit
from blindtune.cli.texts.deploy import deploy
from blindtune.cli.texts.membership import membership
from blindtune.cli.texts.train import train

app = typer.Typer(
    help="Private texts: fine-tune the ends of a hosted decoder on texts that stay here, and audit what is sent.",
    no_args_is_help=True,
)
for command in (train, deploy, membership, audit):
    app.command(help=manual(command))(command)
