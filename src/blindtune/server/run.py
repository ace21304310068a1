"""Runs a server in this process: socket, TLS, threads and logs. A shutdown waits for the requests in progress."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
import uvicorn

from blindtune.errors import ConfigError
from blindtune.models import FrozenBackbone
from blindtune.server.app import create_app
from blindtune.server.host import ServerSettings

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Address:
    """The address that a server listens on, and its certificate and key (PEM). Port 0 selects a free port."""

    host: str = "127.0.0.1"
    port: int = 8000
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def url(self, port: int) -> str:
        """Returns the URL for clients, with the port on which the server really listens."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls_cert else 'http'}://{host}:{port}"


def check_exposure(address: Address, *, no_auth: bool, insecure: bool = False) -> None:
    """Checks that strangers can neither use the server at this address nor read its traffic.

    Args:
        no_auth: whether the server requires no tokens.
        insecure: whether to accept addresses other than loopback without TLS.
    Raises:
        ConfigError: the address isn't loopback and lacks tokens or TLS, or a certificate or its key is missing.
    """
    if no_auth and address.host not in LOOPBACK:
        raise ConfigError(
            f"--no-auth on {address.host} would serve everybody.",
            remedy="Use --token-file, or listen on 127.0.0.1 only.",
        )
    if (address.tls_cert is None) != (address.tls_key is None):
        raise ConfigError("A certificate needs its key.", remedy="Give both --tls-cert and --tls-key.")
    if address.tls_cert is None and address.host not in LOOPBACK and not insecure:
        raise ConfigError(
            f"Without TLS, {address.host} would get texts, tokens and shares in the clear.",
            remedy="Give --tls-cert and --tls-key, or --insecure behind a proxy that adds TLS.",
        )


def serve(
    models: dict[str, FrozenBackbone],
    settings: ServerSettings,
    address: Address,
    *,
    threads: int | None = None,
    on_listen: Callable[[str], None] = print,
) -> None:
    """Serves until SIGINT or SIGTERM, and then completes the requests in progress, for up to 30 seconds.

    Args:
        models: the hosted models: name -> backbone.
        settings: settings of the server.
        address: address to listen on.
        threads: number of torch threads; None: it isn't changed.
        on_listen: callback invoked with the server's URL when its socket listens.
    Raises:
        ConfigError: the address is in use, or isn't an address of this machine.
        EmulatorError, TranscriptError: see `create_app`.
    """
    listener = _listen(address)
    _configure_logs()
    if threads is not None:
        torch.set_num_threads(threads)
    port = listener.getsockname()[1]
    config = uvicorn.Config(
        create_app(models, settings),
        log_config=None,
        access_log=False,
        ssl_certfile=address.tls_cert,
        ssl_keyfile=address.tls_key,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=30,
    )
    on_listen(address.url(port))
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        listener.close()


def _listen(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    # asyncio sets TCP_NODELAY on accepted connections only if the listener names its protocol
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address.host, address.port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"Can't listen on {address.host}:{address.port}: {error.strerror}.", remedy="Choose another --port."
        ) from None
    return listener


def _configure_logs() -> None:
    """Configures logs as JSON lines on stderr, also those of libraries: uvicorn logs invalid HTTP."""
    shared: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer()],
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
