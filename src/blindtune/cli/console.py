"""One console for all commands: results and progress to the terminal, errors in one sentence."""

import json
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from blindtune.errors import BlindtuneError

console = Console(width=None if os.environ.get("COLUMNS") or os.isatty(1) else 110)
errors = Console(stderr=True, width=None if os.environ.get("COLUMNS") or os.isatty(2) else 110)


@contextmanager
def reporting_errors() -> Generator[None]:
    """Our own errors become one message and exit status 1; anything else is a bug and keeps its traceback."""
    _quiet_libraries()
    try:
        yield
    except BlindtuneError as error:
        errors.print(f"[bold red]Error:[/] {_escape(error.message)}", soft_wrap=True)
        if error.remedy:
            errors.print(f"[bold]Remedy:[/] {_escape(error.remedy)}", soft_wrap=True)
        raise typer.Exit(1) from error


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """The `--json FILE` that every command with a table has."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")


def _escape(text: str) -> str:
    return text.replace("[", "\\[")


def _quiet_libraries() -> None:
    """Progress bars and notices of other libraries would break ours."""
    import stamina.instrumentation
    from transformers.utils import logging as transformers_logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    stamina.instrumentation.set_on_retry_hooks([])
