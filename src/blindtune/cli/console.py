"""The consoles of all commands: one for results and progress, one for errors."""

import inspect
import json
import logging
import os
from collections.abc import Callable, Generator
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
    """Prints a `BlindtuneError` of this context as one message, and exits with status 1.

    Any other exception is a bug and keeps its traceback.
    """
    quiet_libraries()
    try:
        yield
    except BlindtuneError as error:
        errors.print(f"[bold red]Error:[/] {_escape(error.message)}", soft_wrap=True)
        if error.remedy:
            errors.print(f"[bold]Remedy:[/] {_escape(error.remedy)}", soft_wrap=True)
        raise typer.Exit(1) from error


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Writes results to the file of `--json`, if that is given."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")


def manual(command: Callable[..., None]) -> str:
    """Returns a command's docstring with each paragraph on one line, so that `--help` wraps it to the terminal."""
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _escape(text: str) -> str:
    return text.replace("[", "\\[")


def quiet_libraries() -> None:
    """Turns off the progress bars and notices of other libraries, which would disturb the command's own output."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    import stamina.instrumentation
    from transformers.utils import logging as transformers_logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    stamina.instrumentation.set_on_retry_hooks([])
