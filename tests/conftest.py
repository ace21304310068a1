"""What all tests share: real texts, small models of every architecture, and real server processes.

| fixture | scope | what |
|---|---|---|
| `film_examples` | session | the demo's film reviews, with labels |
| `film_sentences` | session | their texts |
| `tiny_models` | session | name -> folder of a small random model with its tokenizer |
| `tiny_backbone` | session | name -> one of them, loaded into this process |
| `tiny_causal` | session | name -> folder of a small random decoder with an LM head, five blocks |
| `cut_server` | session | one process that lets clients hold two blocks of each end of the small Llama, and records |
| `minilm` | session | MiniLM, loaded into this process |
| `start_server` | session | context manager: `with start_server("minilm", threads=1) as server: server.url` |
| `two_servers` | session | two MiniLM processes |
| `four_servers` | session | four that host the small BERT |
| `tiny_server` | session | one process that hosts every tiny model |
| `strict_server` | session | one that wants tokens and TLS, has low limits, and records |
| `connect` | function | `connect(server, **options)`: a `Backbone`, closed after the test |
"""

from __future__ import annotations

import os
import re
import signal
import ssl
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")  # before transformers is imported
os.environ["BLINDTUNE_HOME"] = tempfile.mkdtemp(prefix="blindtune-home-")  # of fixtures that several tests share
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # before numpy is; also what tests start

import httpx2
import pytest
import torch
import trustme
from hypothesis import HealthCheck, settings

from blindtune.client import Backbone, Timeout, Transport
from blindtune.data import Examples
from blindtune.models import FrozenBackbone, load_backbone
from blindtune.server import add_token
from tests.processes import Command, start
from tests.tiny import build_tiny_models
from tests.tiny_causal import FAMILIES, save_tiny_causal

CACHE = Path(__file__).parent.parent / ".cache"
DEVICE = os.environ.get("BLINDTUNE_TEST_DEVICE", "cpu")
"""Where servers of tests run; `cuda` on a machine that has it."""

settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")


LONGEST = ("test_demo.py", "test_reconstruction.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Equal sums on every machine, and no fight with the servers over the cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_history(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of other tests, and of whoever works here, don't count as earlier runs on the same labels."""
    monkeypatch.setenv("BLINDTUNE_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="session")
def film_examples() -> Examples:
    """Sentences of film reviews with their class: 0 negative, 1 positive. Fixed random order."""
    from blindtune.data.film_reviews import film_reviews

    return film_reviews(CACHE)


@pytest.fixture(scope="session")
def film_sentences(film_examples: Examples) -> list[str]:
    return [str(text) for text in film_examples.texts]


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory, film_sentences: list[str]) -> dict[str, Path]:
    """bert, roberta, deberta, deberta-conv, t5, llama and opt, with random weights."""
    return build_tiny_models(tmp_path_factory.mktemp("tiny-models"), film_sentences[:400])


@pytest.fixture(scope="session")
def tiny_backbone(tiny_models: dict[str, Path]) -> Callable[..., FrozenBackbone]:
    """`tiny_backbone(name, dtype="float32")`: a tiny model in this process, loaded once."""

    def load(name: str, dtype: str = "float32") -> FrozenBackbone:
        return load_backbone(str(tiny_models[name]), dtype=dtype)

    return cache(load)


@pytest.fixture(scope="session")
def minilm() -> FrozenBackbone:
    """MiniLM in this process."""
    return load_backbone("minilm")


@dataclass
class Server:
    """A `blindtune serve` process of ours."""

    process: Command
    url: str = ""

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def log(self) -> Path:
        return self.process.errors

    def wait(self) -> Server:
        """Until it listens."""
        self.url = self.process.first_line("Serving").split(" on ")[1].split()[0]
        return self

    def metrics(self, verify: ssl.SSLContext | bool = True) -> dict[str, float]:
        """Prometheus samples: name with labels -> value."""
        lines = httpx2.get(self.url + "/metrics", verify=verify).text.splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}

    def answered(self, verify: ssl.SSLContext | bool = True) -> Counter[str]:
        """How often each route has answered with success."""
        samples = self.metrics(verify).items()
        matches = [(re.match(r'blindtune_requests_total\{route="(.*)",status="200"\}', name), n) for name, n in samples]
        return Counter({match[1].rsplit("/", 1)[-1]: int(n) for match, n in matches if match})

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends it and returns its exit status; may be called again."""
        return self.process.stop(number)

    def kill(self) -> None:
        """As a crash would."""
        self.stop(signal.SIGKILL)


def launch(folder: Path, model: str | Path | Sequence[str], **options: Any) -> Server:
    """Starts a server process without waiting for it. Options are those of `blindtune serve`; see `start_server`."""
    models = [str(model)] if isinstance(model, (str, Path)) else list(model)
    options = {"port": 0, "threads": 1, "device": DEVICE, **options}
    if "token_file" not in options:
        options.setdefault("no_auth", True)
    command = ["serve"]
    for entry in models:
        command += ["--model", entry]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        command += [flag] if value is True else [] if value is False else [flag, str(value)]
    return Server(start(command, folder))


StartServer = Callable[..., AbstractContextManager[Server]]


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> StartServer:
    """`with start_server(model, **options) as server`: a process on a free port of 127.0.0.1, one thread, no tokens.

    `model` is what `--model` takes, or a list of it. Options are the command's, with underscores; True for a switch.
    """

    @contextmanager
    def started(model: str | Path | Sequence[str], **options: Any) -> Generator[Server]:
        server = launch(tmp_path_factory.mktemp("server"), model, **options)
        try:
            yield server.wait()
        finally:
            server.stop()

    return started


@contextmanager
def several(count: int, model: str | Path, folders: pytest.TempPathFactory, **options: Any) -> Generator[list[Server]]:
    """Operators that start at the same time."""
    with ExitStack() as stack:
        servers = [launch(folders.mktemp("server"), model, **options) for _ in range(count)]
        for server in servers:
            stack.callback(server.stop)
        yield [server.wait() for server in servers]


@pytest.fixture(scope="session")
def two_servers(tmp_path_factory: pytest.TempPathFactory) -> Generator[list[Server]]:
    """Two operators that host MiniLM."""
    with several(2, "minilm", tmp_path_factory) as servers:
        yield servers


@pytest.fixture(scope="session")
def four_servers(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Generator[list[Server]]:
    """Four operators that host the small BERT."""
    with several(4, tiny_models["bert"], tmp_path_factory) as servers:
        yield servers


@pytest.fixture(scope="session")
def tiny_server(start_server: StartServer, tiny_models: dict[str, Path]) -> Generator[Server]:
    """One operator that hosts every tiny model under its name."""
    with start_server([f"{name}={folder}" for name, folder in tiny_models.items()]) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_causal(tmp_path_factory: pytest.TempPathFactory, film_sentences: list[str]) -> dict[str, Path]:
    """llama (tied head), opt (projections) and qwen2 (a head of its own)."""
    folder = tmp_path_factory.mktemp("tiny-causal")
    return {name: save_tiny_causal(name, folder / name, film_sentences[:400]) for name in FAMILIES}


@dataclass
class CutServer:
    """A server of a cut model, and the folder that it records into."""

    server: Server
    record: Path
    model: Path

    @property
    def url(self) -> str:
        return self.server.url


@pytest.fixture(scope="session")
def cut_server(
    start_server: StartServer, tiny_causal: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Generator[CutServer]:
    record = tmp_path_factory.mktemp("split") / "record"
    with start_server(tiny_causal["llama"], cut=2, record=record, max_length=32) as server:
        yield CutServer(server, record, tiny_causal["llama"])


@dataclass
class StrictServer:
    """Two tenants, a certificate that only `trust` knows, low limits and small caches."""

    server: Server
    tokens: dict[str, str]
    trust: ssl.SSLContext
    token_file: Path
    record: Path

    @property
    def url(self) -> str:
        return self.server.url

    def client(self, tenant: str | None = "ann") -> httpx2.Client:
        """Plain HTTP, for requests that our own client would never send."""
        headers = {"authorization": f"Bearer {self.tokens[tenant]}"} if tenant else {}
        return httpx2.Client(base_url=self.url, headers=headers, verify=self.trust, timeout=60)

    def transport(self, tenant: str = "ann") -> Transport:
        return Transport(
            self.url,
            token=self.tokens[tenant],
            verify=self.trust,
            timeout=Timeout(connect=5, answer=60, total=5),
        )


STRICT = {"max_body_mb": 1, "max_length": 32, "max_tokens": 2048, "max_adapters": 4, "max_rank": 8}


@pytest.fixture(scope="session")
def strict_server(
    start_server: StartServer, tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Generator[StrictServer]:
    """Hosts the tiny `bert` and `llama` for the tenants ann and bob."""
    folder = tmp_path_factory.mktemp("strict")
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    tokens = {name: add_token(folder / "tokens", name) for name in ("ann", "bob")}
    options = {"token_file": folder / "tokens", "tls_cert": folder / "cert.pem", "tls_key": folder / "key.pem"}
    caches = {"adapter_mb": 1, "graph_mb": 1, "record": folder / "record"}
    models = [f"{name}={tiny_models[name]}" for name in ("bert", "llama")]
    with start_server(models, **options, **STRICT, **caches) as server:
        yield StrictServer(server, tokens, trust, folder / "tokens", folder / "record")


@pytest.fixture
def connect() -> Generator[Callable[..., Backbone]]:
    """`connect(servers, **options)`: a backbone over one server or several, each a fixture's server or an address."""
    with ExitStack() as stack:

        def make(servers: Any, **options: Any) -> Backbone:
            several = servers if isinstance(servers, (list, tuple)) else [servers]
            strict = [server for server in several if isinstance(server, StrictServer)]
            if strict:
                tokens = [s.tokens["ann"] if isinstance(s, StrictServer) else None for s in several]
                options = {"verify": strict[0].trust, "token": tokens, **options}
            options = {"timeout": Timeout(connect=5, answer=120, total=20), **options}
            backbone = Backbone([s if isinstance(s, str) else s.url for s in several], **options)
            stack.callback(backbone.close)
            return backbone

        yield make
