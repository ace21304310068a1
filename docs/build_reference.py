"""Writes docs/reference/ from the code: the command line's help, public docstrings, error types,
attacks. `make docs`."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

import blindtune
from blindtune import errors
from blindtune.audit import inputs
from blindtune.audit.labels import boosting, catalogue
from blindtune.cli import app

FOLDER = Path(__file__).parent / "reference"
HEAD = "<!-- Made by docs/build_reference.py from the code; run `make docs`. -->\n\n"


def command_line() -> str:
    """Every command with its options."""
    root: Any = typer.main.get_command(app)
    parts = [HEAD, "# Command line\n"]
    for name, command in _commands(root):
        parts.append(
            f"\n## blindtune {name}\n\n{inspect.cleandoc(command.help or '')}\n\n"
            "| option | default | what |\n|---|---|---|\n"
        )
        for parameter in command.params:
            shown = parameter.name.upper() if parameter.param_type_name == "argument" else ", ".join(parameter.opts)
            help_text = (getattr(parameter, "help", "") or "").replace("|", "\\|")
            default = "required" if parameter.required else _default(parameter.default)
            parts.append(f"| `{shown}` | {default} | {help_text} |\n")
    return "".join(parts)


def _commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every command by its full name, `emulator build` among them."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def _default(value: object) -> str:
    if value is None or value == [] or callable(value) or "UNSET" in repr(value) or isinstance(value, bool):
        return ""
    text = str(value)
    home = str(Path.home())
    return "`" + (text.replace(home, "~") if text.startswith(home) else text) + "`"


def python() -> str:
    """Public names with signatures and docstrings."""
    parts = [HEAD, "# Python\n\n    import blindtune as bt\n"]
    for name in blindtune.__all__:
        thing = getattr(blindtune, name)
        try:
            signature = str(inspect.signature(thing))
        except ValueError:
            signature = ""
        parts.append(f"\n## {name}\n\n    {name}{_short(signature)}\n\n{_block(thing)}\n")
        for method, function in vars(thing).items() if inspect.isclass(thing) else ():
            if not method.startswith("_") and inspect.isfunction(function) and function.__doc__:
                parts.append(f"\n### {name}.{method}{_short(str(inspect.signature(function)))}\n\n{_block(function)}\n")
    return "".join(parts)


def _short(signature: str) -> str:
    plain = re.sub(r"<function (\w+) at 0x\w+>", r"\1", signature)
    return plain.replace("blindtune.", "").replace("'", "")


def _block(thing: object) -> str:
    text = inspect.getdoc(thing) or ""
    return "```text\n" + text + "\n```"


def error_types() -> str:
    """The tree, and each problem type."""
    lines = [HEAD, "# Errors\n\n```text\n", inspect.getdoc(errors) or "", "\n```\n\n"]
    lines.append("| problem type | status | exception |\n|---|---|---|\n")
    for slug, cls in sorted(errors.PROBLEMS.items()):
        lines.append(f"| `{errors.PROBLEM_PREFIX}{slug}` | {cls.status} | `{cls.__name__}`: {cls.title} |\n")
    return "".join(lines)


def attacks() -> str:
    """The registries of attacks on labels and on texts, with what each observes and needs."""
    parts = [HEAD, "# Attacks\n\nWhat `blindtune audit` tries, from its registries.\n"]
    parts.append("\n## On labels\n\n| attack | observes | knows of labels | needs |\n|---|---|---|---|\n")
    for a in catalogue():
        name = "XGBoost, or boosted trees without it" if a.name == boosting.NAME else a.name
        parts.append(f"| {name} | {a.observes} | {a.knows} | {', '.join(a.needs) or '–'} |\n")
    parts.append(
        "\n`blindtune audit` looks whether noise lies on a public lattice, and says how many messages do: "
        "there `lattice` has nothing to go by. The attack itself needs the gradients that each label would give "
        "(`blindtune.audit.labels.lattice.audit_shares`).\n"
    )
    parts.append("\n## On texts (split models)\n\n| attack | observes | needs |\n|---|---|---|\n")
    for a in inputs.ATTACKS.values():
        parts.append(f"| {a.name} | {', '.join(a.observes) or 'nothing'} | {', '.join(a.needs) or '–'} |\n")
    return "".join(parts)


PAGES = {"cli.md": command_line, "python.md": python, "errors.md": error_types, "attacks.md": attacks}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, build in PAGES.items():
        (FOLDER / name).write_text(build())
        print(f"docs/reference/{name}", file=sys.stderr)


if __name__ == "__main__":
    main()
