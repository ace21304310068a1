"""Converts errors to problem documents (RFC 9457)."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from blindtune.errors import PROBLEM_PREFIX, MalformedMessage, RequestError, ServerFault, TooBusy

PROBLEM_TYPE = "application/problem+json"


def add_problem_handlers(app: FastAPI) -> None:
    """Registers handlers that return problem documents for refused requests, unknown routes and invalid parameters."""
    app.exception_handler(RequestError)(_refused)
    app.exception_handler(HTTPException)(_no_route)
    app.exception_handler(RequestValidationError)(_no_fit)


def problem(error: RequestError) -> Response:
    """Returns the response to a request that the server refuses."""
    headers = {"Retry-After": "1"} if isinstance(error, TooBusy) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.to_problem(), error.status, headers, media_type=PROBLEM_TYPE)


def fault(error: Exception) -> Response:
    """Returns the response to a request that failed because of a bug. It names the error's class, without details."""
    return problem(ServerFault(f"{type(error).__name__} on the server.", remedy="Tell the provider."))


async def _refused(_: Request, error: Exception) -> Response:
    if not isinstance(error, RequestError):
        raise error
    return problem(error)


async def _no_route(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    body = {
        "type": f"{PROBLEM_PREFIX}http-{error.status_code}",
        "title": str(error.detail),
        "status": error.status_code,
        "detail": f"{error.detail}: no such route or method.",
        "remedy": "See the API's routes at /docs.",
    }
    return JSONResponse(body, error.status_code, media_type=PROBLEM_TYPE)


async def _no_fit(_: Request, error: Exception) -> Response:
    """Responds with the invalid parameters. The error's own text is left out, because it names the server's source."""
    if not isinstance(error, RequestValidationError):
        raise error
    wrong = "; ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors())
    return problem(MalformedMessage(f"The request doesn't fit the route: {wrong}.", remedy="See /docs."))
