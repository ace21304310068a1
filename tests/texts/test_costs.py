"""The memory that training takes is told apart from what loading took before."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from blindtune.texts import costs
from blindtune.texts.costs import peak_memory, reset_peak_memory

BLOCK = 300 * 2**20


def allocate_and_free() -> None:
    block = b"x" * BLOCK
    assert block[-1]


@pytest.mark.skipif(not reset_peak_memory(), reason="this system doesn't let a process forget its peak")
def test_what_was_freed_before_is_not_counted():
    allocate_and_free()
    loading = peak_memory()
    assert reset_peak_memory()
    before = peak_memory()
    assert before < loading - 0.9 * BLOCK
    allocate_and_free()
    assert peak_memory() > before + 0.9 * BLOCK


def test_where_it_cannot_be_reset_it_is_the_processs_peak(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(costs, "PROCESS", Path("nowhere"))
    assert not reset_peak_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak_memory() == pytest.approx(peak if sys.platform == "darwin" else 1024 * peak, rel=0.1)
