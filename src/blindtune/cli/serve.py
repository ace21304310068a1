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
            help="Model to host: a hub name, a folder, a .gguf file, `minilm` or `smollm2`. Write NAME=PATH to host it "
            "as NAME. Repeat to host several."
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 chooses a free port and prints it.")] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(help="File of tenants and token hashes that `blindtune token` wrote.")
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Serve without tokens, which is allowed on loopback only.")
    ] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain (PEM) for https.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key (PEM) of the certificate.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow listening without TLS on other addresses than loopback.")
    ] = False,
    device: options.Device = "cpu",
    dtype: Annotated[
        str,
        typer.Option(
            help="Dtype of the model: float32, float64, bfloat16 or float16. Gradient shares need float32 or float64."
        ),
    ] = "float32",
    cut: Annotated[
        str | None,
        typer.Option(
            help="Cut decoders: let clients download the first and the last blocks (e.g. 2 for both, or 2,4) with "
            "embeddings and LM head, so that texts can stay with the clients."
        ),
    ] = None,
    emulator: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of an emulator to offer for a cut model's trunk, which `blindtune emulator build` wrote. "
            "Repeat for several models."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Number of torch threads. Default: all cores.")] = None,
    max_body_mb: Annotated[int, typer.Option(help="Largest size of a request body in MiB.")] = 256,
    max_tokens: Annotated[
        int, typer.Option(help="Largest number of tokens in a batch: adapters x examples x length.")
    ] = 65_536,
    max_length: Annotated[int, typer.Option(help="Largest number of tokens in a sequence.")] = 512,
    max_adapters: Annotated[int, typer.Option(help="Largest number of adapters in a request.")] = 16,
    max_rank: Annotated[int, typer.Option(help="Largest LoRA rank.")] = 256,
    max_queue: Annotated[
        int, typer.Option(help="Number of requests that may wait or run; clients have to repeat further ones later.")
    ] = 64,
    graph_mb: Annotated[int, typer.Option(help="Memory for retained autograd graphs in MiB.")] = 2048,
    adapter_mb: Annotated[int, typer.Option(help="Memory for uploaded adapters in MiB.")] = 1024,
    tuned_parts_mb: Annotated[int, typer.Option(help="Memory for tuned parts that clients deploy in MiB.")] = 1024,
    record: Annotated[
        Path | None,
        typer.Option(help="Folder for a transcript of what this server sees, for audits."),
    ] = None,
) -> None:
    """Host models and compute forward and backward passes for clients' adapters.

    Weights never leave the server, except for the ends of a model that is served with --cut, and its --emulator. The
    server writes logs to stderr as JSON lines, without request bodies, and offers Prometheus metrics at /metrics. On
    SIGTERM or Ctrl-C it finishes the requests in progress and exits.

    Example: blindtune serve --model minilm --port 8001 --no-auth
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
            tuned_parts_bytes=tuned_parts_mb * 2**20,
            max_queue=max_queue,
            record=record,
            emulators=emulator or [],
        )
        parsed = parse_cut(cut)
        models = {}
        for entry in model:
            path = entry.split("=", 1)[-1]
            console.print(f"Loading {path} ({dtype}, {device}) …")
            backbone = load_backbone(path, device=device, dtype=dtype, cut=parsed)
            models[entry.split("=", 1)[0] if "=" in entry else backbone.source.name] = backbone

        def announce(url: str) -> None:
            console.print(f"Serving {', '.join(models)} on {url}  (pid {os.getpid()})", soft_wrap=True)

        run_server(models, settings, address, threads=threads, on_listen=announce)


def parse_cut(cut: str | None) -> "Cut | None":
    """Parses the numbers of blocks in bottom and top, `2` for both or `2,4`. Raises `ConfigError`."""
    from blindtune.models import Cut

    if cut is None:
        return None
    numbers = [part.strip() for part in cut.split(",")]
    if not all(number.isdigit() for number in numbers) or len(numbers) > 2:
        raise ConfigError(
            f"--cut {cut} can't be read.", remedy="Write the numbers of blocks in bottom and top, e.g. 2,4."
        )
    return Cut(int(numbers[0]), int(numbers[-1]))


def token(
    name: Annotated[str, typer.Argument(help="Name of the tenant, one word.")],
    token_file: Annotated[Path, typer.Option(help="File that `blindtune serve --token-file` reads.")] = Path("tokens"),
) -> None:
    """Make a token for a tenant, print it once, and add its hash to the token file."""
    with reporting_errors():
        from blindtune.server import add_token

        typer.echo(add_token(token_file, name))
