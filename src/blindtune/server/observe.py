"""Counts and logs requests by route, size and status, without their content."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import structlog
from fastapi import Request, Response

from blindtune.server.metrics import Metrics
from blindtune.server.problems import fault

log = structlog.get_logger("blindtune.server")
UNSEEN_PATH = "other"
"""Name under which requests that match no route are counted."""

Next = Callable[[Request], Awaitable[Response]]
Middleware = Callable[[Request, Next], Awaitable[Response]]


def observer(metrics: Metrics, *, log_requests: bool = True) -> Middleware:
    """Returns the middleware that counts, times and logs every request.

    An exception without a handler is a bug. The middleware logs its traceback, and responds with a problem document.

    Args:
        log_requests: whether each request is logged. Bugs are always logged.
    """

    async def observe(request: Request, call_next: Next) -> Response:
        start = time.perf_counter()
        try:
            response = await call_next(request)
        except Exception as error:
            log.exception("request failed", path=request.url.path)
            response = fault(error)
        seconds = time.perf_counter() - start
        route = getattr(request.scope.get("route"), "path", UNSEEN_PATH).replace(":path", "")
        received = int(request.headers.get("content-length") or 0)
        sent = int(response.headers.get("content-length") or 0)
        metrics.requests.labels(route, str(response.status_code)).inc()
        metrics.seconds.labels(route).observe(seconds)
        metrics.bytes_in.labels(route).inc(received)
        metrics.bytes_out.labels(route).inc(sent)
        if log_requests:
            log.info(
                "request",
                method=request.method,
                route=route,
                status=response.status_code,
                ms=round(seconds * 1000, 1),
                bytes_in=received,
                bytes_out=sent,
            )
        return response

    return observe
