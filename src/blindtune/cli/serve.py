"""`blindtune serve` and `blindtune token`: the provider's commands."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blindtune.cli import options
from blindtune.cli.console import console, reporting_errors
from blindtune.errors import ConfigError

if TYPE_CHECKING:
    from blindtune.models import Cut


def serve(
    model: Annotated[
        list[str],
        typer.Option(
            help="A hub name, a folder, a .gguf file, `minilm` or `smollm2`. Write NAME=PATH to host it as NAME. "
            "Repeat to host several."
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one and prints it.")] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(help="File of tenants and token hashes, made by `blindtune token`.")
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Serve without tokens; on loopback only.")] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain (PEM) to serve https.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key (PEM) of the certificate.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen without TLS on other addresses than loopback.")
    ] = False,
    device: options.Device = "cpu",
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, float64, bfloat16 or float16. Clients with gradient shares need float32 or float64."
        ),
    ] = "float32",
    split: Annotated[
        str | None,
        typer.Option(
            help="Let clients hold the first and the last blocks of decoders, e.g. 2 or 2,4, with embeddings and LM "
            "head: their texts then stay with them."
        ),
    ] = None,
    emulator: Annotated[
        list[Path] | None,
        typer.Option(
            help="Also offer this emulator of a split model's middle, a folder that `blindtune emulator build` made. "
            "Repeat for several models."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Torch threads of this process; all cores if left out.")] = None,
    max_body_mb: Annotated[int, typer.Option(help="Largest request body, MiB.")] = 256,
    max_tokens: Annotated[int, typer.Option(help="Largest batch: adapters x examples x length.")] = 65_536,
    max_length: Annotated[int, typer.Option(help="Longest sequence, tokens.")] = 512,
    max_adapters: Annotated[int, typer.Option(help="Most adapters in one request.")] = 16,
    max_rank: Annotated[int, typer.Option(help="Largest LoRA rank.")] = 256,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait before clients are told to come back.")] = 64,
    graph_mb: Annotated[int, typer.Option(help="Memory for retained autograd graphs, MiB.")] = 2048,
    adapter_mb: Annotated[int, typer.Option(help="Memory for uploaded adapters, MiB.")] = 1024,
    plugin_mb: Annotated[int, typer.Option(help="Memory for tuned ends that clients plug in, MiB.")] = 1024,
    record: Annotated[
        Path | None, typer.Option(help="Write what this server sees to this folder, for `blindtune audit`.")
    ] = None,
) -> None:
    """Host models and compute forward and backward passes for clients' adapters.

    Weights never leave the server, but for the ends of a model that is served with --split, and its --emulator. Logs
    are JSON lines on stderr, without request bodies; Prometheus metrics are at /metrics. SIGTERM or Ctrl-C finishes the
    requests that are under way.

    Example:  blindtune serve --model minilm --port 8001 --no-auth
    """
    with reporting_errors():
        from blindtune.models import load_backbone
        from blindtune.server import Address, ServerSettings, TokenStore, check_exposure
        from blindtune.server import serve as run_server
        from blindtune.wire import Limits

        address = Address(host, port, tls_cert, tls_key)
        check_exposure(address, no_auth=no_auth, insecure=insecure)
        if token_file is None and not no_auth:
            raise ConfigError(
                "The server needs to know its tenants.",
                remedy="Give --token-file FILE (make one with `blindtune token NAME`), or --no-auth on loopback.",
            )
        tokens = TokenStore.open_to_all() if token_file is None else TokenStore.from_file(token_file)
        limits = Limits(
            max_body_bytes=max_body_mb * 2**20,
            max_tokens=max_tokens,
            max_length=max_length,
            max_adapters=max_adapters,
            max_rank=max_rank,
        )
        settings = ServerSettings(
            tokens=tokens,
            limits=limits,
            graph_bytes=graph_mb * 2**20,
            adapter_bytes=adapter_mb * 2**20,
            plugin_bytes=plugin_mb * 2**20,
            max_queue=max_queue,
            record=record,
            emulators=emulator or [],
        )
        cut = parse_cut(split)
        models = {}
        for entry in model:
            path = entry.split("=", 1)[-1]
            console.print(f"Loading {path} ({dtype}, {device}) …")
            backbone = load_backbone(path, device=device, dtype=dtype, cut=cut)
            models[entry.split("=", 1)[0] if "=" in entry else backbone.source.name] = backbone

        def announce(url: str) -> None:
            console.print(f"Serving {', '.join(models)} on {url}  (pid {os.getpid()})", soft_wrap=True)

        run_server(models, settings, address, threads=threads, on_listen=announce)


def parse_cut(split: str | None) -> "Cut | None":
    """`2` or `2,4`: blocks of the bottom and of the top. Raises `ConfigError`."""
    from blindtune.models import Cut

    if split is None:
        return None
    numbers = [part.strip() for part in split.split(",")]
    if not all(number.isdigit() for number in numbers) or len(numbers) > 2:
        raise ConfigError(f"--split {split} is no cut.", remedy="Write the bottom's blocks and the top's, e.g. 2,2.")
    return Cut(int(numbers[0]), int(numbers[-1]))


def token(
    name: Annotated[str, typer.Argument(help="The tenant's name, a word.")],
    token_file: Annotated[Path, typer.Option(help="File that `blindtune serve --token-file` reads.")] = Path("tokens"),
) -> None:
    """Make a token for a tenant, print it once, and add its hash to the token file."""
    with reporting_errors():
        from blindtune.server import add_token

        typer.echo(add_token(token_file, name))
