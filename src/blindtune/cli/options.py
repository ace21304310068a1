"""Options that several commands share, and how they become objects."""

import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blindtune.cli.console import console
from blindtune.errors import ConfigError

if TYPE_CHECKING:
    from peft import LoraConfig

    from blindtune.client import Backbone, Operator
    from blindtune.wire import ModelInfo

Servers = Annotated[list[str], typer.Option("--server", help="Address of an operator; repeat for each one.")]
Token = Annotated[
    list[str] | None,
    typer.Option("--token", help="Bearer token, for all servers or one for each.", envvar="BLINDTUNE_TOKEN"),
]
Model = Annotated[str | None, typer.Option(help="Hosted model's name; not needed where a server hosts one.")]
TlsCa = Annotated[Path | None, typer.Option(help="Certificates (PEM) of a private authority to trust.")]
TextColumn = Annotated[str, typer.Option(help="Column of texts.")]
TextPair = Annotated[str | None, typer.Option(help="Column of second texts, for tasks on pairs.")]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Allow plain http to other machines, in a network that you trust.")
]
Wait = Annotated[float, typer.Option(help="Seconds to wait for a server that is away before giving up.")]


Device = Annotated[str, typer.Option(help="Torch device: cpu, cuda, cuda:1.")]
SplitServer = Annotated[str, typer.Option(help="Address of the server that hosts the model with --split.")]
TunedEnds = Annotated[Path, typer.Argument(help="Folder that `blindtune train --method guarded-…` wrote.")]
Results = Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")]


def parse_names(text: str | None) -> list[str] | None:
    """Names between commas."""
    return [name.strip() for name in text.split(",")] if text else None


def connect(
    servers: list[str],
    *,
    token: list[str] | None,
    tls_ca: Path | None,
    wait: float,
    insecure: bool = False,
    **options: Any,
) -> "Backbone":
    """A backbone over the operators, with retries announced on the console."""
    from blindtune.client import Backbone, Patience

    tokens = token[0] if token and len(token) == 1 else token or None
    return Backbone(
        servers,
        token=tokens,
        verify=_verify(tls_ca),
        insecure=insecure,
        patience=Patience(total=wait),
        on_wait=_announce,
        **options,
    )


def connect_operator(
    server: str, *, token: list[str] | None, tls_ca: Path | None, wait: float, insecure: bool, model: str | None
) -> "Operator":
    """One server, as `connect`."""
    from blindtune.client import Operator, Patience, Transport

    patience = Patience(total=wait)
    transport = Transport(server, token[0] if token else None, _verify(tls_ca), patience, _announce, insecure)
    return Operator(transport, model)


def _verify(tls_ca: Path | None) -> ssl.SSLContext | bool:
    if tls_ca is None:
        return True
    if not tls_ca.is_file():
        raise ConfigError(f"There is no file {tls_ca}.", remedy="Give the authority's certificate (--tls-ca).")
    return ssl.create_default_context(cafile=str(tls_ca))


def _announce(url: str, attempt: int) -> None:
    console.print(f"[yellow]Waiting for {url} (attempt {attempt}); the same bytes are sent again.[/]")


def choose_modules(info: "ModelInfo", targets: list[str] | None, layers: str) -> list[str]:
    """Full names of the layers that get adapters.

    Args:
        targets: last parts of names (`query`, `value`); all linear layers if left out.
        layers: `all`, `upper` (the upper half), or numbers such as `3-5,8`.
    Raises:
        ConfigError, UnknownTargetModule: a wrong range, or names that no layer has.
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
    """The block's number in a module name: 3 in `encoder.layer.3.attention.self.query`."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def _layer_numbers(layers: str, count: int) -> set[int]:
    if layers == "all":
        return set(range(count))
    if layers == "upper":
        return set(range(count // 2, count))
    numbers: set[int] = set()
    for part in layers.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise ConfigError(f"--layers {layers} can't be read.", remedy="Write all, upper, or numbers such as 3-5,8.")
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def make_lora_config(
    info: "ModelInfo", *, rank: int, alpha: int, targets: list[str] | None, layers: str
) -> "LoraConfig":
    """PEFT's configuration for the chosen layers."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=choose_modules(info, targets, layers))


def parse_settings(settings: list[str] | None) -> dict[str, Any]:
    """`name=value` pairs with numbers and booleans as such."""
    parsed: dict[str, Any] = {}
    for setting in settings or []:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"{setting!r} is no setting.", remedy="Write it as name=value, e.g. --set n=3.")
        parsed[name.strip().replace("-", "_")] = _value(value.strip())
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
