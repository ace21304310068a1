"""Sends HTTP requests to one server, with timeouts and retries, and raises its problem documents as exceptions.

A retry resends exactly the bytes that were sent before. A share that was drawn again for a retry would give the server
a second view of the same gradient.
"""

from __future__ import annotations

import ipaddress
import json
import ssl
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2
import stamina
from pydantic import SecretStr

from blindtune.errors import ConfigError, OperatorError, OperatorUnreachable, RequestError, TooBusy
from blindtune.wire import MEDIA_TYPE

RETRYABLE_STATUS = (502, 503, 504)


@dataclass
class Traffic:
    """Number of requests, and bytes of HTTP messages, head and body, by direction.

    The overhead of TLS isn't counted: some 30 bytes for each 16 KiB.
    """

    sent: int = 0
    received: int = 0
    requests: int = 0


@dataclass(frozen=True)
class Timeout:
    """Time limits in seconds."""

    connect: float = 5.0
    """Limit for opening a connection."""
    answer: float = 300.0
    """Limit for receiving the response to one attempt."""
    total: float = 600.0
    """Limit for one request with all its retries."""


class Transport:
    """An HTTP client for one server.

    Args:
        url: `https://host[:port]`; plain `http` is for loopback and trusted networks.
        token: bearer token, if the server requires one. It is never printed.
        verify: certificate checks: True, or a context that trusts a private authority.
        timeout: time limits.
        on_wait: callback invoked with `(url, attempt)` before each retry.
        insecure: allows plain http to other machines. An observer of the traffic to two operators has both shares then.
        http: HTTP transport that is used instead of the network, such as `blindtune.local.InProcess`.
    Raises:
        ConfigError: the URL is no server address, or plain http to another machine.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | SecretStr | None = None,
        verify: ssl.SSLContext | bool = True,
        timeout: Timeout | None = None,
        on_wait: Callable[[str, int], None] | None = None,
        insecure: bool = False,
        http: httpx2.BaseTransport | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is no server address.", remedy="Write it as https://host:port.")
        if parts.scheme == "http" and not insecure and http is None and not _is_loopback(parts.hostname):
            raise ConfigError(
                f"{url} would carry texts, tokens and shares in the clear.",
                remedy="Use https, or insecure=True (--insecure) in a network that you trust.",
            )
        self.url = url.rstrip("/")
        self.timeout = timeout or Timeout()
        self.traffic = Traffic()
        """Traffic of this transport so far."""
        self._on_wait = on_wait
        secret = SecretStr(token) if isinstance(token, str) else token
        self._http = httpx2.Client(
            base_url=self.url,
            headers={} if secret is None else {"authorization": f"Bearer {secret.get_secret_value()}"},
            verify=verify,
            timeout=httpx2.Timeout(self.timeout.answer, connect=self.timeout.connect),
            transport=http,
        )
        self._close = weakref.finalize(self, self._http.close)  # closes the connections even without `close`

    def __repr__(self) -> str:
        return f"Transport({self.url!r})"

    def get(self, path: str) -> Any:
        """Downloads the JSON at `path`."""
        return self._json(self._send("GET", path, None))

    def fetch(self, path: str) -> bytes:
        """Downloads the body at `path`."""
        return self._send("GET", path, None)

    def put(self, path: str, body: bytes) -> Any:
        """Uploads a body. Returns the JSON of the response."""
        return self._json(self._send("PUT", path, body))

    def post(self, path: str, body: bytes) -> bytes:
        """Posts a body. Returns the body of the response."""
        return self._send("POST", path, body)

    def close(self) -> None:
        """Closes all connections."""
        self._close()

    def _json(self, answer: bytes) -> Any:
        try:
            return json.loads(answer)
        except ValueError:
            raise not_blindtune(self.url) from None

    def _send(self, method: str, path: str, body: bytes | None) -> bytes:
        """Sends a request, and retries it with identical bytes while the server is unreachable or busy.

        Raises:
            RequestError: the server refuses the request; the class depends on the problem.
            OperatorUnreachable: there is no answer within `timeout.total` seconds, or the certificate isn't trusted.
        """
        headers = {"content-type": MEDIA_TYPE} if body is not None else {}
        try:
            for attempt in stamina.retry_context(
                on=_is_retryable,
                attempts=None,
                timeout=self.timeout.total,
                wait_initial=0.2,
                wait_max=5.0,
                wait_jitter=0.2,
            ):
                with attempt:
                    if attempt.num > 1 and self._on_wait is not None:
                        self._on_wait(self.url, attempt.num)
                    response = self._http.request(method, path, content=body, headers=headers)
                    self.traffic.requests += 1
                    self.traffic.sent += _request_head(response.request) + len(body or b"")
                    self.traffic.received += _response_head(response) + len(response.content)
                    if response.status_code in RETRYABLE_STATUS:
                        raise _RetryableResponse(_request_error(response))
                    if response.status_code >= 400:
                        raise _request_error(response)
                    return response.content
        except (httpx2.TransportError, _RetryableResponse) as error:
            if isinstance(error, _RetryableResponse) and isinstance(error.error, TooBusy):
                raise error.error from error
            if _certificate_untrusted(error):
                raise OperatorUnreachable(
                    f"The certificate of {self.url} is not trusted: {error}.",
                    remedy="Check the address, or pass verify= with a context that trusts the operator's authority.",
                ) from error
            raise OperatorUnreachable(
                f"No answer from {self.url} within {self.timeout.total:.0f} s: {error}.",
                remedy="Check that the server runs and the address is right; a checkpoint lets you resume.",
            ) from error
        raise AssertionError("stamina ended without a result")  # pragma: no cover


def _request_head(request: httpx2.Request) -> int:
    """Returns the bytes of the request line and headers in HTTP/1.1."""
    line = len(request.method) + len(request.url.raw_path) + len(b"  HTTP/1.1\r\n")
    return line + _header_bytes(request.headers)


def _response_head(response: httpx2.Response) -> int:
    """Returns the bytes of the status line and headers in HTTP/1.1."""
    line = len(response.http_version) + len(response.reason_phrase) + len(b" 200 \r\n")
    return line + _header_bytes(response.headers)


def _header_bytes(headers: httpx2.Headers) -> int:
    return sum(len(name) + len(value) + len(b": \r\n") for name, value in headers.raw) + len(b"\r\n")


class _RetryableResponse(Exception):
    """The server, or a proxy before it, answered with a status for which a retry may succeed."""

    def __init__(self, error: RequestError) -> None:
        super().__init__(error.message)
        self.error = error


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_retryable(error: Exception) -> bool:
    """Returns whether a retry may succeed."""
    return isinstance(error, (httpx2.TransportError, _RetryableResponse)) and not _certificate_untrusted(error)


def _certificate_untrusted(error: BaseException | None) -> bool:
    """Returns whether an untrusted certificate is among the causes of an error."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error is not None


def not_blindtune(url: str) -> OperatorError:
    """Returns the error for a server that answers, but not as a blindtune server does."""
    return OperatorError(f"{url} is no blindtune server.", remedy="Check the address and the port.")


def _request_error(response: httpx2.Response) -> RequestError:
    """Returns the exception for an error response."""
    try:
        problem = response.json()
    except ValueError:
        problem = {"detail": f"Status {response.status_code}: {response.text[:200]}"}
    return RequestError.from_problem(problem if isinstance(problem, dict) else {}, response.status_code)
