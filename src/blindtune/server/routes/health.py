"""The routes for health checks and metrics. They require no token."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from blindtune.server.routes.handler import host_of

router = APIRouter()


@router.get("/healthz")
@router.get("/readyz")
async def healthy() -> dict[str, str]:
    """Returns that the server is alive and ready: models are loaded before the socket listens."""
    return {"status": "ok"}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Returns the metrics in Prometheus' format."""
    return Response(generate_latest(host_of(request).metrics.registry), media_type=CONTENT_TYPE_LATEST)
