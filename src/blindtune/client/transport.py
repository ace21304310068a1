"""One HTTP connection pool to one server: time-outs, retries with the identical bytes, problem documents.

A retry resends the bytes that were sent before. Drawing a share again for a retry would hand the server a second
view of the same gradient.
"""

from __future__ import annotations

import ipaddress
import json
import ssl
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx2
import stamina

from blindtune.errors import ConfigError, OperatorError, OperatorUnreachable, RequestError, TooBusy
from blindtune.wire import MEDIA_TYPE

RETRY_STATUS = (502, 503, 504)


@dataclass
class Traffic:
    """Requests, and bytes of HTTP messages, head and body, by direction. TLS adds some 30 bytes to each 16 KiB."""

    sent: int = 0
    received: int = 0
    requests: int = 0


@dataclass(frozen=True)
class Patience:
    """How long to wait (seconds): to connect, for one answer, and in all for a server that is away."""

    connect: float = 5.0
    answer: float = 300.0
    total: float = 600.0


@dataclass
class Transport:
    """HTTP to one server.

    Args:
        url: `https://host[:port]`; plain `http` is for loopback and trusted networks.
        token: bearer token, if the server wants one.
        verify: certificate checks: True, or a context that trusts a private authority.
        on_wait: told `(url, attempt)` before each repeated attempt.
        insecure: allows plain http to other machines: whoever sees the traffic of two operators has both shares.
    """

    url: str
    token: str | None = None
    verify: ssl.SSLContext | bool = True
    patience: Patience = field(default_factory=Patience)
    on_wait: Callable[[str, int], None] | None = None
    insecure: bool = False
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{self.url!r} is no server address.", remedy="Write it as https://host:port.")
        if parts.scheme == "http" and not self.insecure and not _is_loopback(parts.hostname):
            raise ConfigError(
                f"{self.url} would carry texts, tokens and shares in the clear.",
                remedy="Use https, or insecure=True (--insecure) in a network that you trust.",
            )
        self.url = self.url.rstrip("/")
        headers = {"authorization": f"Bearer {self.token}"} if self.token else {}
        self._http = httpx2.Client(
            base_url=self.url,
            headers=headers,
            verify=self.verify,
            timeout=httpx2.Timeout(self.patience.answer, connect=self.patience.connect),
        )
        self._close = weakref.finalize(self, self._http.close)  # also where nobody calls `close`

    def get(self, path: str) -> Any:
        """The JSON at `path`."""
        return self._json(self._send("GET", path, None))

    def fetch(self, path: str) -> bytes:
        """The body at `path`."""
        return self._send("GET", path, None)

    def put(self, path: str, body: bytes) -> Any:
        """Uploads; returns the JSON answer."""
        return self._json(self._send("PUT", path, body))

    def post(self, path: str, body: bytes) -> bytes:
        """The answer's body."""
        return self._send("POST", path, body)

    def close(self) -> None:
        self._close()

    def _json(self, answer: bytes) -> Any:
        try:
            return json.loads(answer)
        except ValueError:
            raise not_blindtune(self.url) from None

    def _send(self, method: str, path: str, body: bytes | None) -> bytes:
        """One request, repeated byte for byte while the server is away or busy.

        Raises:
            RequestError: the server's refusal, as its own class.
            OperatorUnreachable: no answer within `patience.total` seconds, or a certificate that isn't trusted.
        """
        headers = {"content-type": MEDIA_TYPE} if body is not None else {}
        try:
            for attempt in stamina.retry_context(
                on=_may_pass,
                attempts=None,
                timeout=self.patience.total,
                wait_initial=0.2,
                wait_max=5.0,
                wait_jitter=0.2,
            ):
                with attempt:
                    if attempt.num > 1 and self.on_wait is not None:
                        self.on_wait(self.url, attempt.num)
                    response = self._http.request(method, path, content=body, headers=headers)
                    self.traffic.requests += 1
                    self.traffic.sent += _request_head(response.request) + len(body or b"")
                    self.traffic.received += _response_head(response) + len(response.content)
                    if response.status_code in RETRY_STATUS:
                        raise _Away(_refusal(response))
                    if response.status_code >= 400:
                        raise _refusal(response)
                    return response.content
        except (httpx2.TransportError, _Away) as error:
            if isinstance(error, _Away) and isinstance(error.refusal, TooBusy):
                raise error.refusal from error
            if _untrusted(error):
                raise OperatorUnreachable(
                    f"The certificate of {self.url} is not trusted: {error}.",
                    remedy="Check the address, or pass verify= with a context that trusts the operator's authority.",
                ) from error
            raise OperatorUnreachable(
                f"No answer from {self.url} within {self.patience.total:.0f} s: {error}.",
                remedy="Check that the server runs and the address is right; a checkpoint lets you resume.",
            ) from error
        raise AssertionError("stamina ended without a result")  # pragma: no cover


def _request_head(request: httpx2.Request) -> int:
    """Bytes of the request line and headers, as HTTP/1.1 writes them."""
    line = len(request.method) + len(request.url.raw_path) + len(b"  HTTP/1.1\r\n")
    return line + _header_bytes(request.headers)


def _response_head(response: httpx2.Response) -> int:
    line = len(response.http_version) + len(response.reason_phrase) + len(b" 200 \r\n")
    return line + _header_bytes(response.headers)


def _header_bytes(headers: httpx2.Headers) -> int:
    return sum(len(name) + len(value) + len(b": \r\n") for name, value in headers.raw) + len(b"\r\n")


class _Away(Exception):
    """The server, or a proxy before it, asks us to come back later, and says why."""

    def __init__(self, refusal: RequestError) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _may_pass(error: Exception) -> bool:
    """Whether trying again can help."""
    return isinstance(error, (httpx2.TransportError, _Away)) and not _untrusted(error)


def _untrusted(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error is not None


def not_blindtune(url: str) -> OperatorError:
    """The error for something that answers, but in another language."""
    return OperatorError(f"{url} is no blindtune server.", remedy="Check the address and the port.")


def _refusal(response: httpx2.Response) -> RequestError:
    try:
        problem = response.json()
    except ValueError:
        problem = {"detail": f"Status {response.status_code}: {response.text[:200]}"}
    return RequestError.from_problem(problem if isinstance(problem, dict) else {}, response.status_code)
