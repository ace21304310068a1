"""Commands as a user runs them, in this process: loading Python's libraries takes longer than the runs."""

from __future__ import annotations

from click.testing import Result
from typer.testing import CliRunner

from blindtune.cli import app


def run(*arguments: object, check: bool = True) -> Result:
    """`blindtune` with these arguments; fails the test if the command fails, unless that is what is tested."""
    done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "160"})
    assert not check or done.exit_code == 0, done.output
    return done
