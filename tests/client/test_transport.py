"""One connection to one server: the same bytes again after every fault, and an own error for every refusal."""

from __future__ import annotations

import gc
import socket
import ssl
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blindtune.client import Backbone, Operator, Timeout, Transport
from blindtune.errors import (
    BodyTooLarge,
    ConfigError,
    MalformedMessage,
    OperatorError,
    OperatorUnreachable,
    RequestError,
    Unauthenticated,
    UnknownModel,
    UnknownReadout,
)
from tests.client.faults import BUSY, CUT_ANSWER, DROP, LOSE_ANSWER, PASS, faulty_proxy
from tests.conftest import Server, StrictServer

BRIEF = Timeout(connect=2, answer=30, total=1.5)


class TestAddress:
    @pytest.mark.parametrize("url", ["127.0.0.1:8001", "ftp://a.example", "http://", "https:///v1", "", "localhost"])
    def test_that_is_none_is_refused_by_name(self, url: str):
        with pytest.raises(ConfigError, match="no server address") as caught:
            Transport(url)
        assert repr(url) in caught.value.message
        assert "https://host:port" in caught.value.remedy

    def test_may_end_in_a_slash(self, tiny_server: Server):
        transport = Transport(tiny_server.url + "/")
        assert transport.url == tiny_server.url
        assert "bert" in transport.get("/v1/models")["models"]


class TestFaults:
    @pytest.mark.parametrize("fault", [DROP, LOSE_ANSWER, CUT_ANSWER, BUSY])
    def test_a_request_is_repeated_byte_for_byte(self, fault: str, tiny_server: Server):
        waits: list[tuple[str, int]] = []
        with faulty_proxy(tiny_server.port, fault, fault) as proxy:
            transport = Transport(proxy.url, on_wait=lambda url, attempt: waits.append((url, attempt)))
            with pytest.raises(MalformedMessage):
                transport.post("/v1/models/bert/forward", b"x" * 100_000)
            transport.close()
        assert len(proxy.requests) == 3
        assert proxy.requests[0] == proxy.requests[1] == proxy.requests[2]
        assert proxy.requests[0].endswith(b"x" * 100_000)
        assert waits == [(proxy.url, 2), (proxy.url, 3)]

    def test_a_training_step_survives_them_all_and_sends_no_second_view_of_a_gradient(
        self, tiny_server: Server, film_sentences: list[str]
    ):
        """Each message is sent again as it was, and the gradients are those of a good network."""
        once_each = [DROP, PASS, LOSE_ANSWER, PASS, CUT_ANSWER, PASS, LOSE_ANSWER, PASS]
        gradients: list[torch.Tensor] = []
        for faults in ([], once_each):
            with faulty_proxy(tiny_server.port) as proxy:
                backbone = Backbone([proxy.url], model="bert", max_length=16)
                backbone.set_adapters(2, generator=torch.Generator().manual_seed(0))
                proxy.faults += faults
                hidden = backbone(film_sentences[:4])
                hidden.square().sum().backward()
                backbone.close()
            gradients.append(torch.cat([p.grad.flatten() for p in backbone.parameters() if p.grad is not None]))
            sent = [request for request in proxy.requests if request.startswith((b"POST", b"PUT"))]
            assert len(set(sent)) == 4, "two adapters, one forward, one backward"
            assert len(sent) == (8 if faults else 4)
        assert torch.equal(*gradients)

    def test_a_refusal_is_not_repeated(self, tiny_server: Server):
        with faulty_proxy(tiny_server.port) as proxy:
            transport = Transport(proxy.url)
            with pytest.raises(UnknownModel):
                transport.get("/v1/models/gpt5")
            transport.close()
        assert len(proxy.requests) == 1

    def test_connections_are_used_again(self, tiny_server: Server):
        with faulty_proxy(tiny_server.port) as proxy:
            transport = Transport(proxy.url)
            for _ in range(5):
                transport.get("/healthz")
            transport.close()
            assert (len(proxy.requests), len(proxy._open)) == (5, 1)


class TestTimeout:
    def test_ends_with_the_address_and_what_to_do(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        waits: list[int] = []
        with pytest.raises(OperatorUnreachable, match=url) as caught:
            Transport(url, timeout=BRIEF, on_wait=lambda _, attempt: waits.append(attempt)).get("/healthz")
        assert "2 s" in caught.value.message
        assert "server runs" in caught.value.remedy
        assert waits[0] == 2

    def test_ends_for_a_server_that_takes_the_request_and_never_answers(self):
        with socket.create_server(("127.0.0.1", 0)) as mute:
            url = f"http://127.0.0.1:{mute.getsockname()[1]}"
            with pytest.raises(OperatorUnreachable, match=url):
                Transport(url, timeout=Timeout(connect=1, answer=0.3, total=1)).get("/healthz")

    def test_ends_for_a_server_that_stays_busy_and_says_so(self, tiny_server: Server):
        with faulty_proxy(tiny_server.port, *[BUSY] * 50) as proxy:
            transport = Transport(proxy.url, timeout=BRIEF)
            with pytest.raises(OperatorUnreachable, match="503"):
                transport.get("/healthz")
            transport.close()
        assert len(proxy.requests) > 1

    def test_lasts_until_the_server_is_there(self, tiny_server: Server):
        """A server that is being restarted is waited for."""
        with faulty_proxy(tiny_server.port, *[DROP] * 4) as proxy:
            transport = Transport(proxy.url, timeout=Timeout(connect=2, answer=10, total=60))
            assert transport.get("/healthz") == {"status": "ok"}
            transport.close()


class TestRefusals:
    def test_each_arrives_as_its_own_class(self, strict_server: StrictServer):
        transport = strict_server.transport()
        with pytest.raises(UnknownModel, match="'gpt5'"):
            transport.get("/v1/models/gpt5")
        with pytest.raises(MalformedMessage, match="5 bytes"):
            transport.post("/v1/models/bert/forward", b"12345")
        with pytest.raises(Unauthenticated):
            Transport(strict_server.url, token="wrong", verify=strict_server.trust).get("/v1/models")

    @pytest.mark.parametrize("size", [2**20 + 1, 3 * 2**20, 40 * 2**20])
    def test_a_body_over_the_limit_is_refused_with_the_limit_and_not_taken_for_a_broken_connection(
        self, size: int, strict_server: StrictServer
    ):
        transport = strict_server.transport()
        with pytest.raises(BodyTooLarge, match=str(2**20)):
            transport.post("/v1/models/bert/forward", bytes(size))
        assert transport.get("/healthz") == {"status": "ok"}

    def test_a_wrong_token_is_told_even_if_the_body_is_large(self, strict_server: StrictServer):
        transport = Transport(strict_server.url, token="wrong", verify=strict_server.trust, timeout=BRIEF)
        with pytest.raises(Unauthenticated):
            transport.post("/v1/models/bert/forward", bytes(40 * 2**20))

    def test_a_page_that_is_no_problem_document_is_quoted(self):
        page = b"HTTP/1.1 418 I'm a teapot\r\ncontent-length: 11\r\n\r\nshort&stout"
        with fake_server(page) as url, pytest.raises(RequestError, match="418: short&stout"):
            Transport(url, timeout=BRIEF).get("/v1/models")


class fake_server:  # noqa: N801 - used like a function
    """Something that isn't a blindtune server: the same answer to every request."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def __enter__(self) -> str:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(self._answer)

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.mark.parametrize("page", [b"<html>hello</html>", b'{"fruit": "apple"}', b"[1, 2]", b"null", b"\xff\xfe"])
def test_another_kind_of_server_is_recognised_as_such(page: bytes):
    head = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(page)
    with fake_server(head + page) as url, pytest.raises(OperatorError, match="no blindtune server") as caught:
        Operator(Transport(url, timeout=BRIEF), None)
    assert url in caught.value.message


class TestTls:
    def test_works_with_the_authoritys_certificate(self, strict_server: StrictServer, connect: Callable[..., Any]):
        assert strict_server.url.startswith("https://")
        backbone = connect(strict_server, model="bert")
        assert backbone(["a film"]).shape == (1, 32)

    def test_works_under_the_other_name_in_the_certificate(self, strict_server: StrictServer):
        url = strict_server.url.replace("127.0.0.1", "localhost")
        transport = Transport(url, token=strict_server.tokens["ann"], verify=strict_server.trust)
        assert "bert" in transport.get("/v1/models")["models"]

    @pytest.mark.parametrize("verify", [True, ssl.create_default_context()])
    def test_an_unknown_authority_is_refused_at_once_and_the_token_stays_here(
        self, verify: Any, strict_server: StrictServer
    ):
        waits: list[int] = []
        timeout = Timeout(connect=5, answer=30, total=600)
        transport = Transport(
            strict_server.url,
            token=strict_server.tokens["ann"],
            verify=verify,
            timeout=timeout,
            on_wait=lambda _, attempt: waits.append(attempt),
        )
        with pytest.raises(OperatorUnreachable, match="certificate") as caught:
            transport.get("/v1/models")
        assert strict_server.url in caught.value.message
        assert "verify" in caught.value.remedy
        assert waits == [], "trying again would not change the certificate"

    def test_plain_http_to_a_tls_port_ends_with_an_error(self, strict_server: StrictServer):
        with pytest.raises(OperatorUnreachable):
            Transport(strict_server.url.replace("https", "http"), timeout=BRIEF).get("/v1/models")


class TestTraffic:
    def test_counts_what_crosses_the_wire(self, tiny_server: Server):
        with faulty_proxy(tiny_server.port) as proxy:
            transport = Transport(proxy.url)
            transport.get("/v1/models")
            with pytest.raises(MalformedMessage):
                transport.post("/v1/models/bert/forward", b"x" * 1000)
            transport.close()
        assert transport.traffic.requests == 2
        assert transport.traffic.sent == sum(map(len, proxy.requests)) > 1000
        assert transport.traffic.received == sum(map(len, proxy.answers))


class TestClosing:
    def test_a_client_that_nobody_closes_leaves_no_socket_behind(
        self, tiny_server: Server, tiny_models: dict[str, Path]
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Transport(tiny_server.url).get("/healthz")
            with pytest.raises(UnknownReadout):
                Backbone([tiny_server.url], model="bert", pooling="last")
            gc.collect()
        assert [str(w.message) for w in caught if issubclass(w.category, ResourceWarning)] == []

    def test_closing_twice_does_no_harm(self, tiny_server: Server):
        transport = Transport(tiny_server.url)
        transport.get("/healthz")
        transport.close()
        transport.close()
