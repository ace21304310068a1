"""Runs a server in this process: its socket, TLS, threads and logs. A shutdown finishes the requests under way."""

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
    """Where a server listens, and with which certificate (PEM) and key. Port 0 takes a free port."""

    host: str = "127.0.0.1"
    port: int = 8000
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def url(self, port: int) -> str:
        """The address as a client writes it, with the port that was taken."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls_cert else 'http'}://{host}:{port}"


def check_exposure(address: Address, *, no_auth: bool, insecure: bool = False) -> None:
    """Refuses addresses at which strangers could use the server or read its traffic.

    Args:
        no_auth: the server asks for no tokens.
        insecure: the operator accepts traffic without TLS outside loopback.
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
    """Serves until SIGINT or SIGTERM. Requests that are under way then get their answers.

    Args:
        models: name -> backbone.
        threads: torch's threads; None leaves their number as it is.
        on_listen: is called with the server's URL once its socket listens.
    Raises:
        ConfigError: the address is in use, or isn't one of this machine's.
        EmulatorError, TranscriptError: as `create_app`.
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
    """Writes logs as JSON lines to stderr, those of libraries too: uvicorn warns of bytes that are no HTTP."""
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
