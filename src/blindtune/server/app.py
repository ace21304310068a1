"""Builds the provider's HTTP API, version 1 (see `blindtune.wire.schema` for the messages).

request ──▶ tenant ──▶ queue slot ──▶ body, within the limits ──▶ handler, on the model's thread ──▶ response

Errors become problem documents. Every request is counted and logged, without its content.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from blindtune.models import FrozenBackbone
from blindtune.server.host import Host, ServerSettings
from blindtune.server.observe import observer
from blindtune.server.problems import add_problem_handlers
from blindtune.server.routes import ROUTERS


def create_app(models: dict[str, FrozenBackbone], settings: ServerSettings | None = None) -> FastAPI:
    """Returns an ASGI application that hosts `models` (name -> backbone).

    Raises:
        EmulatorError, TranscriptError: see `Host`.
    """
    host = Host(models, settings or ServerSettings())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        host.close()

    app = FastAPI(title="blindtune", version="1", lifespan=lifespan)
    app.state.host = host
    app.middleware("http")(observer(host.metrics, log_requests=host.settings.log_requests))
    add_problem_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    return app
