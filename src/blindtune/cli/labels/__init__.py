"""`blindtune labels …`: the commands for private labels."""

import typer

from blindtune.cli.console import manual
from blindtune.cli.labels.audit import audit
from blindtune.cli.labels.predict import predict
from blindtune.cli.labels.train import methods, train

app = typer.Typer(
    help="Private labels: fine-tune on labels that servers aren't sent, and audit what servers learn of them.",
    no_args_is_help=True,
)
for command in (train, predict, audit, methods):
    app.command(help=manual(command))(command)
