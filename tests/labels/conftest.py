"""Two operators that host the same small BERT, recording what they see."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from blindtune.client import Backbone
from tests.conftest import StartServer


@dataclass
class Operators:
    """Addresses, and the folders with what each of them saw."""

    urls: list[str]
    folders: list[Path]


@pytest.fixture(scope="session")
def operators(
    start_server: StartServer, tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Generator[Operators]:
    folders = [tmp_path_factory.mktemp("seen") / name for name in "ab"]
    with ExitStack() as stack:
        servers = [stack.enter_context(start_server(tiny_models["bert"], record=folder)) for folder in folders]
        yield Operators([server.url for server in servers], folders)


def bodies_of(backbone: Backbone) -> list[tuple[str, bytes]]:
    """Everything that the backbone posts from now on, to its first operator: path and body of each request."""
    transport = backbone.pool.operators[0].transport
    posted: list[tuple[str, bytes]] = []
    post = transport.post

    def record(path: str, body: bytes) -> bytes:
        posted.append((path, body))
        return post(path, body)

    transport.post = record  # type: ignore[method-assign]
    return posted


@pytest.fixture
def connect(operators: Operators) -> Generator[Callable[..., Backbone]]:
    """`connect(**options)`: a backbone over both operators, or over `count` of them."""
    opened: list[Backbone] = []

    def make(count: int = 2, **options: object) -> Backbone:
        backbone = Backbone(operators.urls[:count], max_length=32, **options)  # type: ignore[arg-type]
        opened.append(backbone)
        return backbone

    yield make
    for backbone in opened:
        backbone.close()
