"""The server process: where it may listen, and how it ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from blindtune.errors import ConfigError
from blindtune.models import FrozenBackbone
from blindtune.server import Address, ServerSettings, TokenStore, check_exposure, serve
from blindtune.wire import ForwardResponse, Limits, decode
from tests.server.conftest import Ended

LoadTiny = Callable[..., FrozenBackbone]


class TestExposure:
    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.org", "", "127.0.0.1.example.org"])
    def test_without_tokens_nobody_else_is_served(self, host: str):
        with pytest.raises(ConfigError, match="--no-auth") as caught:
            check_exposure(Address(host), no_auth=True)
        assert "--token-file" in caught.value.remedy

    @pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.7"])
    def test_without_tls_nobody_else_is_served_unless_somebody_insists(self, host: str):
        with pytest.raises(ConfigError, match="in the clear") as caught:
            check_exposure(Address(host), no_auth=False)
        assert "--insecure" in caught.value.remedy
        check_exposure(Address(host), no_auth=False, insecure=True)

    @pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
    def test_loopback_may_go_without(self, host: str):
        check_exposure(Address(host), no_auth=True)

    @pytest.mark.parametrize("half", [{"tls_cert": Path("cert.pem")}, {"tls_key": Path("key.pem")}])
    def test_half_a_certificate_is_refused(self, half: dict[str, Path]):
        with pytest.raises(ConfigError, match="certificate needs its key"):
            check_exposure(Address(**half), no_auth=False)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("options", "message", "remedy"),
        [
            (["--no-auth", "--host", "0.0.0.0"], "0.0.0.0", "--token-file"),
            ([], "tenants", "blindtune token"),
        ],
    )
    def test_the_command_refuses_in_one_sentence(self, options: list[str], message: str, remedy: str):
        command = [sys.executable, "-m", "blindtune", "serve", "--model", "minilm", "--port", "0", *options]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert message in result.stderr
        assert remedy in result.stderr
        assert "Traceback" not in result.stderr


class TestAddress:
    def test_reads_as_a_client_writes_it(self):
        assert Address().url(81) == "http://127.0.0.1:81"
        assert Address("::1").url(81) == "http://[::1]:81"
        assert Address("a.example", tls_cert=Path("c"), tls_key=Path("k")).url(443) == "https://a.example:443"

    def test_that_is_taken_is_refused_by_name(self, tiny_backbone: LoadTiny):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
                serve({"bert": tiny_backbone("bert")}, ServerSettings(), Address(port=port))

    def test_that_is_not_ours_is_refused_by_name(self, tiny_backbone: LoadTiny):
        settings = ServerSettings(tokens=TokenStore({}))
        with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
            serve({"bert": tiny_backbone("bert")}, settings, Address("192.0.2.1", 0))


class TestSigterm:
    def test_a_request_under_way_gets_its_answer(self, ended: Ended):
        message, tensors = decode(ended.last_answer.content, ForwardResponse, Limits())
        assert message.fingerprint == ended.info.fingerprint
        assert tensors["hidden"].shape == (1, len(ended.last_tokens.lengths), ended.info.hidden_size)

    def test_the_process_ends_by_it_and_leaves_no_trace_of_trouble(self, ended: Ended):
        assert ended.status in (0, -signal.SIGTERM)
        assert "Traceback" not in ended.server.log.read_text()

    def test_nobody_is_served_any_more(self, ended: Ended):
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(ended.server.url + "/healthz")
