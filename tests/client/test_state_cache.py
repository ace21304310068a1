"""States in memory and in a temporary file."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import torch

from blindtune.client.feature_store import FeatureSource, FeatureStore
from blindtune.client.state_cache import StateCache
from blindtune.models import FrozenBackbone, load_backbone
from blindtune.models.tokenizer import TokenRow
from blindtune.wire import Limits, Readout

ROWS = [TokenRow((index, index + 1), (0, 0)) for index in range(20)]


def source_of(backbone: FrozenBackbone, codec: str = "fp32") -> FeatureSource:
    return FeatureSource(backbone.info("bert", Limits()), Readout(pooling="mean"), codec)  # type: ignore[arg-type]


def folder_of(cache: StateCache) -> Path:
    assert cache._file is not None
    return cache._file.path.parent


def test_what_exceeds_the_memory_is_in_a_file_that_only_its_owner_can_read(tiny_models):
    source = source_of(load_backbone(str(tiny_models["bert"])))
    states = list(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)))
    cache = StateCache(None, memory=5 * 32)
    cache.add(source, ROWS, states)
    assert cache.missing(source, ROWS) == []
    assert len(cache._known) == 5
    for found, state in zip(cache.take(source, [*ROWS, ROWS[0]]), [*states, states[0]], strict=True):
        assert torch.equal(found, state)
    folder = folder_of(cache)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    cache.close()
    cache.close()
    assert not folder.exists()


def test_the_stores_states_are_moved_too(tiny_models, tmp_path):
    source = source_of(load_backbone(str(tiny_models["bert"])))
    states = list(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)))
    first = StateCache(FeatureStore(tmp_path), memory=2**20)
    first.add(source, ROWS, states)
    first.close()
    second = StateCache(FeatureStore(tmp_path), memory=5 * 32)
    assert second.missing(source, ROWS) == []
    assert all(torch.equal(a, b) for a, b in zip(second.take(source, ROWS), states, strict=True))
    second.close()


def test_a_forked_process_doesnt_delete_the_file(tiny_models):
    script = f"""
import os, sys, torch
from tests.client.test_state_cache import ROWS, StateCache, folder_of, load_backbone, source_of
cache = StateCache(None, memory=0)
cache.add(source_of(load_backbone({str(tiny_models["bert"])!r})), ROWS, list(torch.ones(20, 8)))
child = os.fork()
if child == 0:
    sys.exit(0)
os.waitpid(child, 0)
print(folder_of(cache), folder_of(cache).exists())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    folder, there = done.stdout.split()
    assert there == "True"
    assert not Path(folder).exists()  # after the end of the process that made it
