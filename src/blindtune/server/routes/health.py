"""Health and metrics, which are open to everybody."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from blindtune.server.routes.handler import host_of

router = APIRouter()


@router.get("/healthz")
@router.get("/readyz")
async def healthy() -> dict[str, str]:
    """Alive; models are loaded before the socket opens, so alive is ready."""
    return {"status": "ok"}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    return Response(generate_latest(host_of(request).metrics.registry), media_type=CONTENT_TYPE_LATEST)
