"""Writes docs/reference/ from the code: the command line, public Python names, errors and attacks. `make docs`."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import typer.main

import blindtune
from blindtune import errors
from blindtune.audit import texts
from blindtune.audit.labels import boosting, catalogue
from blindtune.cli import app

FOLDER = Path(__file__).parent / "reference"
HEAD = "<!-- Made by docs/build_reference.py from the code; run `make docs`. -->\n\n"
GROUPS = (
    ("Private labels", "labels"),
    ("Private texts", "texts"),
    ("Providers", "serve", "token", "emulator"),
    ("Demo", "demo"),
)
MODULES = {
    "labels": (
        "METHODS",
        "DistanceCorrelation",
        "PSLF",
        "RandomizedResponse",
        "make_method",
        "MLPHead",
        "PoolerHead",
        "make_head",
        "scores",
    ),
    "texts": (
        "DESIGNS",
        "Online",
        "Gradfree",
        "Offline",
        "Offsite",
        "make_design",
        "Boundary",
        "CutCausalLM",
        "Ends",
        "TrainConfig",
        "Trainer",
        "evaluate_questions",
    ),
    "audit": ("AuditSettings", "TextsAudit", "Verdict", "write_report"),
}
"""Names of a product or of the audit that `import blindtune as bt` doesn't have."""


def command_line() -> str:
    """Every command, by group, with its options by panel."""
    root: Any = typer.main.get_command(app)
    parts = [
        HEAD,
        "# Command line\n\n"
        "This page lists every command with its options. It is made from the code, and says what `--help` says.\n",
    ]
    for title, *names in GROUPS:
        parts.append(f"\n## {title}\n")
        for name in names:
            for full, command in _commands(name, root.commands[name]):
                parts += [f"\n### blindtune {full}\n\n", _help(command.help), *_panels(command.params)]
    return "".join(parts)


def _commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Every command by its full name, `emulator build` among them."""
    if not hasattr(command, "commands"):
        yield name, command
        return
    for child, below in command.commands.items():
        yield from _commands(f"{name} {child}", below)


def _help(text: str | None) -> str:
    """A command's help as Markdown, its example as a code block."""
    return "\n\n".join(map(_paragraph, inspect.cleandoc(text or "").split("\n\n"))) + "\n"


def _paragraph(text: str) -> str:
    if not text.startswith("Example:"):
        return text
    command = " ".join(text.removeprefix("Example:").split()).replace(" --", "\0--")  # breaks before options alone
    lines = textwrap.wrap(command.replace(" ", "\1").replace("\0", " "), 90, break_on_hyphens=False)
    return "```sh\n" + " \\\n    ".join(lines).replace("\1", " ") + "\n```"


def _panels(parameters: list[Any]) -> Iterator[str]:
    """A table for the arguments, and one for each panel of options."""
    panels: dict[str, list[Any]] = {}
    for parameter in parameters:
        argument = parameter.param_type_name == "argument"
        title = "Arguments" if argument else getattr(parameter, "rich_help_panel", None) or "Options"
        panels.setdefault(title, []).append(parameter)
    for title in sorted(panels, key=lambda name: {"Arguments": 0, "Options": 1}.get(name, 2)):
        yield f"\n| {title} | default | what |\n|---|---|---|\n"
        for parameter in panels[title]:
            shown = parameter.name.upper() if title == "Arguments" else ", ".join(parameter.opts)
            text = (getattr(parameter, "help", "") or "").replace("|", "\\|").replace("\n", " ")
            yield f"| `{shown}` | {'required' if parameter.required else _default(parameter.default)} | {text} |\n"


def _default(value: object) -> str:
    if value is None or value == [] or callable(value) or "UNSET" in repr(value) or isinstance(value, bool):
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(f"`{item}`" for item in value)
    text = str(value)
    home = str(Path.home())
    return "`" + (text.replace(home, "~") if text.startswith(home) else text) + "`"


def python() -> str:
    """Public names with signatures and docstrings, by module."""
    parts = [
        HEAD,
        "# Python\n\n"
        "This page lists the public names with their signatures and docstrings, by package. Names that begin with "
        "`bt` are those of `import blindtune as bt`. The page is made from the code.\n\n"
        "```python\nimport blindtune as bt\nfrom blindtune import audit, labels, texts\n```\n",
    ]
    homes: dict[str, list[str]] = {}
    for name in blindtune.__all__:
        package = getattr(blindtune, name).__module__.split(".")[1]
        homes.setdefault(package, []).append(name)
    for package, names in sorted(homes.items()):
        module = import_module(f"blindtune.{package}")
        parts.append(f"\n## blindtune.{package}\n")
        parts += [_entry(f"bt.{name}", getattr(blindtune, name)) for name in names]
        parts += [_entry(f"{package}.{name}", getattr(module, name)) for name in MODULES.get(package, ())]
    return "".join(parts)


def _entry(name: str, thing: Any) -> str:
    """Heading, signature and docstring of a name, then those of its methods."""
    if isinstance(thing, dict):
        return f"\n### {name}\n\nBy name: {', '.join(f'`{key}`' for key in thing)}.\n"
    entry = f"\n### {name}\n\n{_block(name, thing)}\n"
    for method, function in vars(thing).items() if inspect.isclass(thing) else ():
        plain = getattr(function, "__func__", function)  # of a class method
        if not method.startswith("_") and inspect.isfunction(plain) and plain.__doc__:
            entry += f"\n#### {name}.{method}\n\n{_block(f'{name}.{method}', plain)}\n"
    return entry


def _block(name: str, thing: Any) -> str:
    try:
        signature = _short(str(inspect.signature(thing)))
    except ValueError:
        signature = ""
    call = textwrap.fill(f"{name}{signature}", 90, subsequent_indent="    ", break_on_hyphens=False)
    return f"```none\n{call}\n\n{inspect.getdoc(thing) or ''}\n```"


def _short(signature: str) -> str:
    plain = re.sub(r"<function (\S+) at 0x\w+>", r"\1", signature)
    plain = re.sub(r"(: |-> )'([^']*)'", r"\1\2", plain)  # annotations are strings, defaults may be
    return re.sub(r"\bblindtune\.(\w+\.)*", "", plain)


def error_types() -> str:
    """The tree, and each problem type."""
    lines = [
        HEAD,
        "# Errors\n\n"
        "This page lists every exception of blindtune, and the type of each problem document that a server answers "
        "with. It is made from the code.\n\n```text\n",
        inspect.getdoc(errors) or "",
        "\n```\n\n",
    ]
    lines.append("| problem type | status | exception |\n|---|---|---|\n")
    for slug, cls in sorted(errors.PROBLEMS.items()):
        lines.append(f"| `{errors.PROBLEM_PREFIX}{slug}` | {cls.status} | `{cls.__name__}`: {cls.title} |\n")
    return "".join(lines)


def attacks() -> str:
    """The registries of attacks on labels and on texts, with what each observes and needs."""
    parts = [
        HEAD,
        "# Attacks\n\n"
        "This page lists the attacks of an audit: what each observes, and what else it needs to know. It is made from "
        "the registries in the code. [Auditing](../auditing.md) explains how to run them.\n",
    ]
    parts.append(
        "\n## On labels\n\n`blindtune labels audit` runs these.\n\n"
        "| attack | observes | knows of labels | needs |\n|---|---|---|---|\n"
    )
    for a in catalogue():
        name = "XGBoost, or boosted trees without it" if a.name == boosting.NAME else a.name
        parts.append(f"| {name} | {a.observes} | {a.knows} | {', '.join(a.needs) or '–'} |\n")
    parts.append(
        "\nThe command checks whether noise lies on a public lattice, and reports for how many messages it does. For "
        "those the attack `lattice` has nothing to work with. The attack itself needs the gradients that each label "
        "would give (`blindtune.audit.labels.lattice.audit_shares`).\n"
    )
    parts.append(
        "\n## On texts\n\n`blindtune texts audit` runs these on the transcript of a cut model. The two guesses are "
        "floors: they observe nothing.\n\n| attack | observes | needs |\n|---|---|---|\n"
    )
    for a in texts.ATTACKS.values():
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
