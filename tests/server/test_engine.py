"""Forward and backward: caches cost time, never an answer."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from blindtune.errors import AdapterMismatch, UnknownAdapter
from blindtune.models import FrozenBackbone, LoraLayout, ModuleShapes, Tokenizer, Tokens
from blindtune.server.cache import ByteLRU
from blindtune.server.engine import Call, Engine, RetainedGraph, StoredAdapter
from blindtune.wire import LoraSpec, Readout
from tests.models.test_lora import batch, random_adapters
from tests.tiny import NAMES

LoadTiny = Callable[..., FrozenBackbone]
MODULE, OTHER = "encoder.layer.0.attention.self.query", "encoder.layer.2.output.dense"
POOLING = {"t5": "first", "llama": "last", "opt": "last"}


class Bench:
    """An engine with its caches, and adapters that can be put into them."""

    def __init__(self, backbone: FrozenBackbone, *, graph_bytes: int = 2**30, name: str = "m") -> None:
        self.adapters = ByteLRU[tuple[str, str], StoredAdapter](2**30)
        self.graphs = ByteLRU[tuple[str, str], RetainedGraph](graph_bytes)
        self.engine = Engine(name, backbone, self.adapters, self.graphs)
        self.name = name

    def store(self, count: int, tenant: str = "ann", **options: Any) -> list[str]:
        config = LoraConfig(**{"r": 4, "target_modules": "all-linear", **options})
        _, adapters = random_adapters(self.engine.backbone, config, count)
        hashes = [f"{index:064x}" for index in range(count)]
        for sha256, adapter in zip(hashes, adapters, strict=True):
            self.put(tenant, sha256, adapter.layout, adapter.vector().detach())
        return hashes

    @property
    def shapes(self) -> ModuleShapes:
        return self.engine.backbone.lora.shapes

    def put(self, tenant: str, sha256: str, layout: LoraLayout, weights: Tensor) -> None:
        self.adapters.put((tenant, sha256), StoredAdapter(self.name, layout, weights), weights.nbytes)


def call(adapters: list[str], tokens: Tokens | None = None, *, name: str = "bert", **options: Any) -> Call:
    given: dict[str, Any] = {
        "tenant": "ann",
        "readout": Readout(pooling=POOLING.get(name, "mean")),
        "seed": None,
        **options,
    }
    return Call(adapters=adapters, tokens=batch(4, 6) if tokens is None else tokens, **given)


def random_cotangents(hidden: Tensor, m: int) -> Tensor:
    return torch.randn(m, *hidden.shape, generator=torch.Generator().manual_seed(0))


class TestRetainedGraph:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("seed", [None, 5])
    def test_gives_the_gradients_of_a_recomputation_bit_for_bit(
        self, name: str, seed: int | None, tiny_backbone: LoadTiny
    ):
        bench = Bench(tiny_backbone(name))
        asked = call(bench.store(2, lora_dropout=0.2), name=name, seed=seed)
        hidden = bench.engine.forward(asked, retain=True)
        cotangents = random_cotangents(hidden, 3)
        retained, was_retained = bench.engine.backward(asked, cotangents)
        recomputed, was_retained_again = bench.engine.backward(asked, cotangents)
        assert (was_retained, was_retained_again) == (True, False)
        assert torch.count_nonzero(retained) > 0
        assert torch.equal(retained, recomputed)

    def test_of_minilm_on_real_text_too(self, minilm: FrozenBackbone, film_sentences: list[str]):
        bench = Bench(minilm)
        tokenizer = Tokenizer(minilm.tokenizer, pad_token_id=minilm.pad_token_id, with_types=True)
        tokens = tokenizer.pad(tokenizer.rows(film_sentences[:8], max_length=32))
        asked = call(bench.store(2), tokens)
        cotangents = random_cotangents(bench.engine.forward(asked, retain=True), 2)
        retained, recomputed = (bench.engine.backward(asked, cotangents)[0] for _ in range(2))
        assert torch.equal(retained, recomputed)

    def test_is_given_up_after_the_backward_pass(self, tiny_backbone: LoadTiny):
        bench = Bench(tiny_backbone("bert"))
        asked = call(bench.store(1))
        hidden = bench.engine.forward(asked, retain=True)
        assert (len(bench.graphs), bench.graphs.nbytes > hidden.nbytes) == (1, True)
        bench.engine.backward(asked, random_cotangents(hidden, 1))
        assert (len(bench.graphs), bench.graphs.nbytes) == (0, 0)

    @pytest.mark.parametrize(("name", "dtype"), [("bert", "float32"), ("t5", "float64"), ("llama", "bfloat16")])
    def test_is_not_kept_unless_asked_for(self, name: str, dtype: str, tiny_backbone: LoadTiny):
        bench = Bench(tiny_backbone(name, dtype))
        asked = call(bench.store(1), name=name)
        kept = bench.engine.forward(asked, retain=True)
        bench.graphs.pop((bench.name, asked.key()))
        assert torch.equal(bench.engine.forward(asked, retain=False), kept)
        bench.engine.forward(call([], name=name), retain=False)
        assert len(bench.graphs) == 0

    def test_weighs_what_it_holds_and_not_the_models_weights(self, tiny_backbone: LoadTiny):
        """Twice the rows hold about twice the activations."""
        bench = Bench(tiny_backbone("bert"))
        hashes = bench.store(1)
        sizes: list[int] = []
        for rows in (8, 16, 32):
            bench.engine.forward(call(hashes, batch(rows, 20)), retain=True)
            sizes.append(bench.graphs.nbytes - sum(sizes))
        assert 1.7 < (sizes[2] - sizes[1]) / (sizes[1] - sizes[0]) < 2.3
        weights = sum(p.nbytes for p in bench.engine.backbone.model.parameters())
        assert sizes[0] - (sizes[1] - sizes[0]) < weights / 2


class TestEviction:
    def test_the_oldest_graphs_go_and_every_gradient_stays_the_same(self, tiny_backbone: LoadTiny):
        backbone = tiny_backbone("bert")
        roomy = Bench(backbone)
        hashes = roomy.store(2)
        calls = [call(hashes, batch(6, 8, seed=seed)) for seed in range(6)]
        expected = [roomy.engine.forward(c, retain=True) for c in calls]
        each = roomy.graphs.nbytes // 6
        tight = Bench(backbone, graph_bytes=3 * each + each // 2)
        assert tight.store(2) == hashes
        hidden = [tight.engine.forward(c, retain=True) for c in calls]
        assert len(tight.graphs) == 3
        assert tight.graphs.nbytes <= 3 * each + each // 2
        found: list[bool] = []
        for asked, ours, theirs in zip(calls, hidden, expected, strict=True):
            assert torch.equal(ours, theirs)
            cotangents = random_cotangents(ours, 2)
            gradients, retained = tight.engine.backward(asked, cotangents)
            assert torch.equal(gradients, roomy.engine.backward(asked, cotangents)[0])
            found.append(retained)
        assert found == [False, False, False, True, True, True]

    def test_without_room_for_any_graph_everything_still_works(self, tiny_backbone: LoadTiny):
        bench, none = Bench(tiny_backbone("bert")), Bench(tiny_backbone("bert"), graph_bytes=1)
        asked = call(bench.store(1))
        none.store(1)
        hidden = bench.engine.forward(asked, retain=True)
        assert torch.equal(none.engine.forward(asked, retain=True), hidden)
        cotangents = random_cotangents(hidden, 1)
        gradients, retained = none.engine.backward(asked, cotangents)
        assert not retained
        assert torch.equal(gradients, bench.engine.backward(asked, cotangents)[0])

    @pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to tell a process's memory")
    def test_gives_memory_back(self, tiny_backbone: LoadTiny):
        bench = Bench(tiny_backbone("bert"))
        hashes = bench.store(1)
        bench.engine.forward(call(hashes, batch(4_000, 16)), retain=True)
        size, before = bench.graphs.nbytes, resident()
        for seed in range(6):
            bench.engine.forward(call(hashes, batch(4_000, 16, seed=seed)), retain=True)
            bench.graphs.clear()
        assert len(bench.graphs) == bench.graphs.nbytes == 0
        assert size > 50 * 2**20
        assert resident() - before < 1.5 * size


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class TestCotangents:
    @pytest.mark.parametrize("retain", [True, False])
    def test_m_in_one_call_give_what_m_calls_give_bit_for_bit(self, retain: bool, tiny_backbone: LoadTiny):
        bench = Bench(tiny_backbone("bert"))
        asked = call(bench.store(2))
        hidden = bench.engine.forward(asked, retain=retain)
        cotangents = random_cotangents(hidden, 4)
        together, _ = bench.engine.backward(asked, cotangents)
        alone = torch.cat([bench.engine.backward(asked, cotangents[j : j + 1])[0] for j in range(4)])
        assert torch.equal(together, alone)

    def test_the_gradient_is_linear_in_the_cotangent(self, tiny_backbone: LoadTiny):
        """Private backpropagation rests on it."""
        bench = Bench(tiny_backbone("bert", "float64"))
        asked = call(bench.store(2))
        hidden = bench.engine.forward(asked, retain=True)
        a, b = random_cotangents(hidden, 2)
        gradients, _ = bench.engine.backward(asked, torch.stack([a, b, 2 * a - 3 * b]))
        expected = 2 * gradients[0] - 3 * gradients[1]
        assert float((gradients[2] - expected).norm() / expected.norm()) < 1e-6  # cotangents are float32

    @pytest.mark.parametrize("retain", [True, False])
    @pytest.mark.parametrize("shape", [(1, 1, 4, 32), (1, 2, 3, 32), (1, 2, 4, 31), (1, 2, 4, 6, 32)])
    def test_of_a_wrong_shape_are_refused_with_both_shapes(
        self, retain: bool, shape: tuple[int, ...], tiny_backbone: LoadTiny
    ):
        bench = Bench(tiny_backbone("bert"))
        asked = call(bench.store(2))
        bench.engine.forward(asked, retain=retain)
        with pytest.raises(AdapterMismatch, match=str(shape).replace("(", r"\(").replace(")", r"\)")):
            bench.engine.backward(asked, torch.zeros(shape))


class TestWhoSeesWhat:
    def test_tenants_do_not_see_each_others_adapters(self, tiny_backbone: LoadTiny):
        bench = Bench(tiny_backbone("bert"))
        asked = call(bench.store(1, tenant="ann"))
        bench.engine.forward(asked, retain=True)
        with pytest.raises(UnknownAdapter):
            bench.engine.forward(replace(asked, tenant="bob"), retain=True)
        with pytest.raises(UnknownAdapter):
            bench.engine.backward(replace(asked, tenant="bob"), torch.zeros(1, 1, 4, 32))

    def test_tenants_with_the_same_bytes_have_graphs_of_their_own(self, tiny_backbone: LoadTiny):
        bench = Bench(tiny_backbone("bert"))
        bench.store(1, tenant="ann")
        hashes = bench.store(1, tenant="bob")
        hidden = bench.engine.forward(call(hashes, tenant="ann"), retain=True)
        cotangents = random_cotangents(hidden, 1)
        _, retained = bench.engine.backward(call(hashes, tenant="bob"), cotangents)
        assert not retained
        _, retained = bench.engine.backward(call(hashes, tenant="ann"), cotangents)
        assert retained, "the other tenant's call must not take it"

    def test_an_adapter_of_another_model_is_unknown_here(self, tiny_backbone: LoadTiny):
        bench = Bench(tiny_backbone("bert"))
        hashes = bench.store(1)
        elsewhere = Engine("other", bench.engine.backbone, bench.adapters, bench.graphs)
        with pytest.raises(UnknownAdapter, match="'other'") as caught:
            elsewhere.forward(call(hashes), retain=True)
        assert hashes[0][:12] in caught.value.message

    def test_two_models_with_equal_requests_keep_graphs_apart(self, tiny_backbone: LoadTiny):
        bench = Bench(tiny_backbone("bert"))
        hashes = bench.store(1)
        bench.engine.forward(call(hashes), retain=True)
        other = Engine("other", bench.engine.backbone, bench.adapters, bench.graphs)
        with pytest.raises(UnknownAdapter):
            other.backward(call(hashes), torch.zeros(1, 1, 4, 32))

    @pytest.mark.parametrize(
        "options", [{"r": 2}, {"target_modules": ["query"]}, {"lora_alpha": 3}, {"lora_dropout": 0.1}]
    )
    def test_adapters_of_different_form_do_not_run_together(self, options: dict[str, Any], tiny_backbone: LoadTiny):
        bench = Bench(tiny_backbone("bert"))
        first = bench.store(1)
        _, (other,) = random_adapters(
            bench.engine.backbone, LoraConfig(**{"r": 4, "target_modules": "all-linear", **options}), 1
        )
        bench.put("ann", "f" * 64, other.layout, other.vector().detach())
        with pytest.raises(AdapterMismatch, match="rank, scaling, dropout or target modules"):
            bench.engine.forward(call([*first, "f" * 64]), retain=True)

    def test_adapters_over_different_fixed_a_do_not_run_together(self, tiny_backbone: LoadTiny):
        bench = Bench(tiny_backbone("bert"))
        hashes = ["a" * 64, "b" * 64, "c" * 64]
        for sha256, seed in zip(hashes, ("00" * 32, "00" * 32, "11" * 32), strict=True):
            layout = LoraLayout(LoraSpec(modules=[MODULE], rank=4, scaling=1.0, a_seed=seed), bench.shapes)
            bench.put("ann", sha256, layout, torch.ones(layout.size))
        assert bench.engine.forward(call(hashes[:2]), retain=False).shape[0] == 2
        with pytest.raises(AdapterMismatch, match="or in fixed A"):
            bench.engine.forward(call(hashes[1:]), retain=False)


class TestFixedA:
    """Adapters of which B alone travels."""

    def test_give_what_they_give_with_a_sent_along(self, tiny_backbone: LoadTiny):
        """Bit for bit: hidden states with and without a graph, retained and recomputed gradients of B."""
        bench = Bench(tiny_backbone("bert"))
        options = {"modules": [MODULE, OTHER], "rank": 4, "scaling": 1.5}
        short = LoraLayout(LoraSpec(**options, a_seed="5a" * 32), bench.shapes)
        whole = LoraLayout(LoraSpec(**options), bench.shapes)
        only_b = 0.2 * torch.randn(2, short.size, generator=torch.Generator().manual_seed(0))
        hidden: list[Tensor] = []
        gradients: list[Tensor] = []
        for layout, weights in ((short, only_b), (whole, whole.join(short.split(only_b)))):
            hashes = [f"{layout.size:063x}{index}" for index in range(2)]
            for sha256, vector in zip(hashes, weights, strict=True):
                bench.put("ann", sha256, layout, vector)
            hidden += [bench.engine.forward(call(hashes), retain=retain) for retain in (False, True)]
            cotangents = random_cotangents(hidden[0], 2)
            for _ in range(2):
                found, _ = bench.engine.backward(call(hashes), cotangents)
                assert found.shape == (2, 2, layout.size)
                gradients.append(short.join(layout.split(found)))
            assert bench.engine.answer_bytes(call(hashes), 2) == found.nbytes
        assert all(torch.equal(other, hidden[0]) for other in hidden[1:])
        assert all(torch.equal(other, gradients[0]) for other in gradients[1:])
        assert torch.count_nonzero(gradients[0]) > 0


class TestKey:
    BASE = call(["a" * 64, "b" * 64], seed=1)

    @pytest.mark.parametrize(
        "other",
        [
            replace(BASE, tenant="bob"),
            replace(BASE, adapters=["b" * 64, "a" * 64]),
            replace(BASE, adapters=["a" * 64]),
            replace(BASE, readout=Readout(pooling="cls")),
            replace(BASE, readout=Readout(pooling="mean", layers=(0, 1))),
            replace(BASE, seed=2),
            replace(BASE, seed=None),
            replace(BASE, tokens=batch(4, 6, seed=1)),
            replace(BASE, tokens=replace(BASE.tokens, lengths=BASE.tokens.lengths - 1)),
            replace(BASE, tokens=replace(BASE.tokens, token_type_ids=torch.zeros(4, 6, dtype=torch.uint8))),
            replace(BASE, tokens=Tokens(BASE.tokens.input_ids.reshape(6, 4), BASE.tokens.lengths)),
        ],
    )
    def test_everything_that_the_result_depends_on_is_in_it(self, other: Call):
        assert other.key() != self.BASE.key()

    def test_equal_calls_have_equal_keys(self):
        assert call(["a" * 64, "b" * 64], seed=1).key() == self.BASE.key()


class TestDropout:
    def test_survives_eviction(self, tiny_backbone: LoadTiny):
        bench = Bench(tiny_backbone("bert"))
        hashes = bench.store(2, lora_dropout=0.3)
        seeded = call(hashes, seed=11)
        hidden = bench.engine.forward(seeded, retain=True)
        cotangents = random_cotangents(hidden, 1)
        gradients, _ = bench.engine.backward(seeded, cotangents)
        bench.engine.forward(call(hashes, seed=12), retain=True)
        assert torch.equal(bench.engine.backward(seeded, cotangents)[0], gradients)
        assert torch.equal(bench.engine.forward(seeded, retain=False), hidden)
        other, _ = bench.engine.backward(call(hashes, seed=12), cotangents)
        assert not torch.equal(other, gradients)
        plain, _ = bench.engine.backward(call(hashes), cotangents)
        assert not torch.equal(plain, gradients)
