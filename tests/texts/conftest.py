"""What tests of private texts share."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack
from typing import Any

import pytest

from blindtune.client import Operator, RemoteTrunk, Transport, fetch_part
from blindtune.data.questions import tokenize
from blindtune.models.cut.parts import tie
from blindtune.texts import ActivationStore, CutCausalLM, Design, Ends, Online
from tests.conftest import CutServer
from tests.texts.client import MakeSetup, Setup, questions


@pytest.fixture
def setup(cut_server: CutServer, film_sentences: list[str]) -> Generator[MakeSetup]:
    """`setup(design, key=None, **ends)`: a client of the cut server; fp32 unless the design says otherwise."""
    with ExitStack() as stack:

        def make(design: Design | None = None, *, key: bytes | None = None, **ends: Any) -> Setup:
            design = design or Online(up="fp32", down="fp32")
            transport = Transport(cut_server.url)
            stack.callback(transport.close)
            operator = Operator(transport, None)
            bottom, top = fetch_part(operator, "bottom"), fetch_part(operator, "top")
            tie(bottom, top)
            trunk = RemoteTrunk(operator, up=design.up, down=design.down)
            tuned = Ends(bottom, top, **{"parts": design.parts, "rank": 4, "alpha": 8, **ends})
            rows = tokenize(questions(film_sentences), operator.tokenizer(), max_length=24)
            store = ActivationStore(32, design.down, max_bytes=2**20) if design.stores_activations else None
            boundary = design.boundary(trunk, bottom, store=store, key=key)
            return Setup(CutCausalLM(bottom, top, boundary), tuned, design, rows, trunk, operator)

        yield make
