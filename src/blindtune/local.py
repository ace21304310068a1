"""Operators that run in this process, without a server or a network: for tests, notebooks and small experiments.

    backbone = bt.Backbone(bt.local_operators("minilm"))

Only the sockets are replaced: the requests are handled by the same application as that of `blindtune serve`, with its
engine, caches and recorder. Operators in one process can read each other's memory, so local operators give no privacy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import httpx2

from blindtune.client import OperatorPool, Transport
from blindtune.extras import requires
from blindtune.models import Cut, FrozenBackbone, load_backbone

with requires("server", "A local operator"):
    from fastapi import FastAPI

    from blindtune.server import ServerSettings, create_app


class InProcess(httpx2.BaseTransport):
    """An HTTP transport that passes requests to an ASGI application in this process.

    Args:
        app: application that `blindtune.server.create_app` made. `close` closes it too.
        lock: lock held while a request is answered. Applications that share a model in memory need one common lock.
    """

    def __init__(self, app: FastAPI, lock: AbstractContextManager[Any] | None = None) -> None:
        self._app = app
        self._lock = lock or Lock()
        self._asgi = httpx2.ASGITransport(app=app)
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="local operator", daemon=True)
        self._thread.start()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Returns the application's response to a request. Several threads may call it at the same time."""
        body = request.read()
        with self._lock:
            return asyncio.run_coroutine_threadsafe(self._answer(request, body), self._loop).result()

    async def _answer(self, request: httpx2.Request, body: bytes) -> httpx2.Response:
        copy = httpx2.Request(request.method, request.url, headers=request.headers, content=body)
        response = await self._asgi.handle_async_request(copy)
        return httpx2.Response(response.status_code, headers=response.headers, content=await response.aread())

    def close(self) -> None:
        """Closes the application, which then completes its transcript."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._app.state.host.close()


def local_operators(
    model: str | FrozenBackbone = "minilm",
    *,
    count: int = 2,
    cut: Cut | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    record: Sequence[str | Path] | None = None,
    emulators: Sequence[str | Path] = (),
) -> OperatorPool:
    """Starts operators in this process that host one model. They share its weights in memory.

    Args:
        model: a loaded model, or a name or path that `blindtune serve --model` accepts.
        count: number of operators. With `record`, it is the number of folders there.
        cut: sizes of the bottom and the top into which a decoder is cut.
        dtype, device: dtype and torch device of the model.
        record: a folder for the transcript of each operator. Transcripts are complete when the pool is closed.
        emulators: folders of emulators of the model's trunk.
    Returns:
        A pool that `Backbone(...)` accepts in place of addresses.
    Raises:
        UnknownModel, ConfigError: see `load_backbone`.
        MissingExtra: the packages of the extra `server` aren't installed.
    """
    backbone = model if isinstance(model, FrozenBackbone) else load_backbone(model, device=device, dtype=dtype, cut=cut)
    folders = [None] * count if record is None else [Path(folder) for folder in record]
    lock, transports = Lock(), list[Transport]()
    for index, folder in enumerate(folders):
        settings = ServerSettings(record=folder, emulators=[Path(path) for path in emulators], log_requests=False)
        app = create_app({backbone.source.name: backbone}, settings)
        transports.append(Transport(f"http://local-{index}", http=InProcess(app, lock)))
    return OperatorPool.connect(transports, None)
