"""Options that several commands share, and functions that turn options into objects."""

import ssl
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blindtune.checks import check_counts, check_positive, is_number
from blindtune.cli.console import console
from blindtune.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from peft import LoraConfig

    from blindtune.client import Backbone, Operator
    from blindtune.data import Examples
    from blindtune.training import TrainConfig
    from blindtune.wire import ModelInfo

CONNECTION, DATA, ADAPTERS, TRAINING = "Connection", "Data", "Adapters", "Training"
"""Panels of options in `--help`."""

Servers = Annotated[
    list[str],
    typer.Option("--server", help="Address of an operator; repeat for each one.", rich_help_panel=CONNECTION),
]
CutServer = Annotated[
    str,
    typer.Option("--server", help="Address of the server that hosts the model with --cut.", rich_help_panel=CONNECTION),
]
Token = Annotated[
    list[str] | None,
    typer.Option(
        "--token",
        help="Bearer token; give one for all servers, or repeat it for each server.",
        envvar="BLINDTUNE_TOKEN",
        rich_help_panel=CONNECTION,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="Name of the hosted model. It isn't needed if the server hosts only one.", rich_help_panel=CONNECTION
    ),
]
TlsCa = Annotated[
    Path | None,
    typer.Option(help="File of certificates (PEM) of a private authority to trust.", rich_help_panel=CONNECTION),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure",
        help="Allow plain http to other machines. Use it only in a network that you trust.",
        rich_help_panel=CONNECTION,
    ),
]
Wait = Annotated[
    float,
    typer.Option(help="Seconds to wait for a server that doesn't answer before giving up.", rich_help_panel=CONNECTION),
]
ProviderKey = Annotated[
    str | None,
    typer.Option(help="Public key that must have signed the emulator.", rich_help_panel=CONNECTION),
]
TextColumns = Annotated[
    list[str],
    typer.Option("--text", help="Column of texts; repeat it for pairs of texts.", rich_help_panel=DATA),
]
Validation = Annotated[
    str,
    typer.Option(
        help="Validation data: a file, a hub data set, or a fraction of the data such as 0.1; 0 for none.",
        rich_help_panel=DATA,
    ),
]
ReadoutOption = Annotated[
    str | None,
    typer.Option(
        help="Layers whose hidden states the head reads: last, upper, all, spread (at most eight), or numbers such as "
        "3-6; after a colon, the pooling (cls, mean, max, last or first), as in all:mean. Default: the method's own.",
        rich_help_panel=DATA,
    ),
]
Store = Annotated[
    str | None,
    typer.Option(
        help="Folder that keeps hidden states of the frozen model, so that no text is sent twice; none for no folder. "
        "Default: $BLINDTUNE_HOME/features.",
        rich_help_panel=DATA,
    ),
]
CheckpointFolder = Annotated[Path, typer.Option(help="Folder for the checkpoint.")]
Steps = Annotated[
    int | None, typer.Option(help="Number of training steps. Default: three epochs.", rich_help_panel=TRAINING)
]
BatchSize = Annotated[int, typer.Option(help="Number of examples in a step.", rich_help_panel=TRAINING)]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in --output.")]
Question = Annotated[
    list[str] | None,
    typer.Option(
        "--question",
        help="How to read questions, as name=value: template ('Question: {question}\\nAnswer:', with columns in "
        "braces), the column of choices, answer or label, or classes (names for labels 0, 1, …, separated by commas). "
        "Repeat for more.",
        rich_help_panel=DATA,
    ),
]
More = Annotated[
    list[str] | None,
    typer.Option(
        "--training",
        help="Further training option, as name=value; the names are listed above. Repeat for more.",
        rich_help_panel=TRAINING,
    ),
]
Device = Annotated[str, typer.Option(help="Torch device, such as cpu, cuda or cuda:1.")]
TunedEnds = Annotated[Path, typer.Argument(help="Folder that `blindtune texts train` wrote.")]
Results = Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")]


def parse_names(text: str | None) -> list[str] | None:
    """Returns the names in a list that is separated by commas."""
    return [name.strip() for name in text.split(",")] if text else None


def read_readout(readout: str | None) -> dict[str, Any]:
    """Returns the arguments of `Backbone` that `--readout` names: `readout` and `pooling`, or neither.

    Raises:
        ConfigError: the option can't be read.
    """
    layers, _, pooling = (readout or "").partition(":")
    named: dict[str, Any] = {"pooling": pooling} if pooling else {}
    if layers in ("last", "upper", "all", "spread"):
        named["readout"] = layers
    elif layers:
        named["readout"] = sorted(_numbers(f"--readout {readout}", layers, "last, upper, all, spread"))
    return named


def store_folder(store: str | None) -> Path | None:
    """Returns the folder of `--store`; None for none."""
    from blindtune.files import home

    if store is None:
        return home() / "features"
    return None if store == "none" else Path(store)


def connect(
    servers: list[str],
    *,
    token: list[str] | None,
    tls_ca: Path | None,
    wait: float,
    insecure: bool = False,
    **options: Any,
) -> "Backbone":
    """Returns a backbone over the operators, which announces retries on the console."""
    from blindtune.client import Backbone, Timeout

    tokens = token[0] if token and len(token) == 1 else token or None
    return Backbone(
        servers,
        token=tokens,
        verify=_verify(tls_ca),
        insecure=insecure,
        timeout=Timeout(total=wait),
        on_wait=_announce,
        **options,
    )


def connect_operator(
    server: str, *, token: list[str] | None, tls_ca: Path | None, wait: float, insecure: bool, model: str | None
) -> "Operator":
    """Returns the operator of one server, which announces retries on the console."""
    from blindtune.client import Operator, Timeout, Transport

    transport = Transport(
        server,
        token=token[0] if token else None,
        verify=_verify(tls_ca),
        timeout=Timeout(total=wait),
        on_wait=_announce,
        insecure=insecure,
    )
    return Operator(transport, model)


def _verify(tls_ca: Path | None) -> ssl.SSLContext | bool:
    if tls_ca is None:
        return True
    if not tls_ca.is_file():
        raise ConfigError(f"There is no file {tls_ca}.", remedy="Give the authority's certificate (--tls-ca).")
    return ssl.create_default_context(cafile=str(tls_ca))


def _announce(url: str, attempt: int) -> None:
    console.print(f"[yellow]Waiting for {url} (attempt {attempt}); the same bytes are sent again.[/]")


def read_examples(
    data: str, text: list[str], label: str | None, *, classes: list[str] | None = None, split: str = "train"
) -> "Examples":
    """Reads labelled texts, or pairs of texts. Raises `ConfigError` for more than two columns of texts."""
    from blindtune.data import Columns, load_examples

    if len(text) > 2:
        raise ConfigError(
            f"There are {len(text)} columns of texts.", remedy="Give one --text, or two for pairs of texts."
        )
    columns = Columns(text[0], label, text[1] if len(text) > 1 else None)
    return load_examples(data, columns, classes=classes, split=split)


def fraction_of(validation: str) -> float | None:
    """Returns the fraction of the data to validate on, or None if `--validation` isn't a number.

    Raises:
        ConfigError: the number isn't a fraction below 1.
    """
    try:
        fraction = float(validation)
    except ValueError:
        return None
    if not 0 <= fraction < 1:
        raise ConfigError(
            f"A validation fraction of {validation} can't work.", remedy="Use a fraction below 1; 0 for no validation."
        )
    return fraction


def refuse_checkpoint(output: Path) -> None:
    """Raises `CheckpointError` if the folder for a new run's checkpoint already holds one."""
    from blindtune.files import SUMMARY

    if (output / SUMMARY).is_file():
        raise CheckpointError(f"{output} holds a checkpoint.", remedy="Use another --output, or go on with --resume.")


def read_training(
    config: "type[TrainConfig]", settings: list[str] | None, extra: Sequence[str] = (), **given: Any
) -> dict[str, Any]:
    """Reads options of a training configuration from `--training`, and adds the `given` ones that aren't None.

    Args:
        extra: names that are accepted although they aren't fields of the configuration, beside `epochs` and
            `save_every`.
    Raises:
        ConfigError: the configuration has no such option, or a value isn't a number.
    """
    known = {f.name for f in fields(config)} - set(given) | {"epochs", "save_every", *extra}
    chosen = parse_settings(settings)
    unknown = sorted(set(chosen) - known)
    if unknown:
        raise ConfigError(
            f"There is no training option {unknown[0]!r}.", remedy=f"There are: {', '.join(sorted(known))}."
        )
    numbers = {name: _read_numbers(name, value) for name, value in chosen.items()}
    return {**{name: value for name, value in given.items() if value is not None}, **numbers}


def _read_numbers(name: str, value: Any) -> Any:
    """Returns the number of a training option, or both numbers of `betas`. Raises `ConfigError`."""
    numbers = [_value(part) for part in str(value).split(",")]
    counts = ("save_every", "cache_mb")
    whole = name in (*counts, "seed", "warmup")
    if len(numbers) != (2 if name == "betas" else 1) or not all(is_number(number) for number in numbers):
        example = "two numbers, e.g. betas=0.9,0.99" if name == "betas" else "a number"
        raise ConfigError(f"--training {name}={value} can't be read.", remedy=f"Write {example}.")
    if whole and type(numbers[0]) is not int:
        raise ConfigError(f"--training {name}={value} can't be read.", remedy="Write a whole number.")
    if name in counts:
        check_counts(**{name: numbers[0]})
    if name == "epochs":
        check_positive(epochs=numbers[0])
    return tuple(numbers) if name == "betas" else numbers[0]


def read_lora(settings: list[str] | None, rank: int) -> dict[str, Any]:
    """Reads `alpha` and `targets` from `--lora`, as `make_lora_config` accepts them. Raises `ConfigError`."""
    chosen = parse_settings(settings, {"alpha": 0, "target_modules": ""})
    alpha, targets = chosen.get("alpha", 2 * rank), chosen.get("target_modules")
    if not is_number(alpha):
        raise ConfigError(f"--lora alpha={alpha} can't be read.", remedy="Write a number, e.g. alpha=64.")
    return {"alpha": alpha, "targets": None if targets is None else parse_names(str(targets))}


def choose_modules(info: "ModelInfo", targets: list[str] | None, layers: str) -> list[str]:
    """Returns the full names of the layers that get adapters.

    Args:
        targets: last components of layer names (`query`, `value`). Default: all linear layers.
        layers: `all`, `upper` (the upper half), or block numbers such as `3-5,8`.
    Raises:
        ConfigError: `layers` can't be read, or selects no layer.
        UnknownTargetModule: no layer has one of these names.
    """
    from blindtune.errors import UnknownTargetModule

    names = [n for n in info.modules if targets is None or any(n == t or n.endswith("." + t) for t in targets)]
    if not names:
        some = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in info.modules}))
        raise UnknownTargetModule(f"No layer is called {targets}.", remedy=f"Choose among: {some}.")
    count = 1 + max(_layer(name) for name in info.modules)
    wanted = _layer_numbers(layers, count)
    chosen = [name for name in names if _layer(name) in wanted]
    if not chosen:
        raise ConfigError(f"No layer is left with --layers {layers}.", remedy=f"Choose numbers from 0 to {count - 1}.")
    return chosen


def _layer(name: str) -> int:
    """Returns the block number in a module name: 3 in `encoder.layer.3.attention.self.query`."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def _layer_numbers(layers: str, count: int) -> set[int]:
    if layers == "all":
        return set(range(count))
    if layers == "upper":
        return set(range(count // 2, count))
    return _numbers(f"--layers {layers}", layers, "all, upper")


def _numbers(option: str, text: str, names: str) -> set[int]:
    """Returns the numbers in a text such as `3-5,8`. Raises `ConfigError` that names the option."""
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise ConfigError(f"{option} can't be read.", remedy=f"Write {names}, or numbers such as 3-5,8.")
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def make_lora_config(
    info: "ModelInfo", *, rank: int, alpha: int, targets: list[str] | None, layers: str
) -> "LoraConfig":
    """Returns PEFT's configuration for the chosen layers."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=choose_modules(info, targets, layers))


def parse_settings(settings: list[str] | None, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Parses `name=value` pairs, and converts values that are numbers or booleans.

    Args:
        known: allowed names. Default: any.
    Raises:
        ConfigError: a setting isn't a pair, or its name is unknown.
    """
    parsed: dict[str, Any] = {}
    for setting in settings or []:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"{setting!r} is no setting.", remedy="Write it as name=value, e.g. --set n=3.")
        parsed[name.strip().replace("-", "_")] = _value(value.strip())
    unknown = sorted(set(parsed) - set(known)) if known is not None else []
    if unknown and known is not None:
        raise ConfigError(f"There is no option {unknown[0]!r}.", remedy=f"There are: {', '.join(known)}.")
    return parsed


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
