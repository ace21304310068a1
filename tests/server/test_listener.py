"""The listening socket, and the connections that a server accepts on it."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Generator

import httpx2
import pytest
import uvicorn

from blindtune.server import Address, ServerSettings, serve


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Generator[uvicorn.Server]:
    """`serve` without models on a thread of this process, with one open connection."""
    servers: list[uvicorn.Server] = []

    class Watched(uvicorn.Server):
        def __init__(self, config: uvicorn.Config) -> None:
            super().__init__(config)
            servers.append(self)

    monkeypatch.setattr(uvicorn, "Server", Watched)
    monkeypatch.setattr("blindtune.server.run._configure_logs", lambda: None)  # it changes the whole process
    urls: queue.Queue[str] = queue.Queue()
    arguments = ({}, ServerSettings(), Address(port=0))
    thread = threading.Thread(target=serve, args=arguments, kwargs={"on_listen": urls.put}, daemon=True)
    thread.start()
    with httpx2.Client(base_url=urls.get(timeout=60), timeout=60) as client:
        client.get("/healthz").raise_for_status()
        yield servers[0]
    servers[0].should_exit = True
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_an_accepted_connection_sends_small_packets_at_once(connected: uvicorn.Server):
    (connection,) = connected.server_state.connections
    accepted = connection.transport.get_extra_info("socket")
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
