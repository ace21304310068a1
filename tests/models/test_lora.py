"""n adapters in one pass give what stock PEFT gives for each of them alone: hidden states and gradients.

In float64, where a mistake of any size stands out from rounding.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModel

from blindtune.errors import AdapterMismatch, UnknownTargetModule
from blindtune.keystream import Keystream
from blindtune.models import FrozenBackbone, LoraAdapter, LoraLayout, Tokens
from blindtune.models.lora import expand_a, find_blocks
from blindtune.wire import Limits, LoraSpec, ModelInfo
from tests.tiny import HEADS, HIDDEN, LAYERS, NAMES, PAD, VOCABULARY

LoadTiny = Callable[..., FrozenBackbone]
EXACT = 1e-11
"""Relative error that rounding in float64 explains."""

PLACES = {
    "all layers": r".*",
    "upper layer": rf".*\.{LAYERS - 1}\..*",
    "middle layer": r".*(layer|layers)\.1\..*",
}
T5_PLACES = {
    "both sides": r".*",
    "encoder": r"encoder\..*",
    "decoder": r"decoder\..*",
    "encoder, middle layer": r"encoder\.block\.1\..*",
    "decoder, upper layer": rf"decoder\.block\.{LAYERS - 1}\..*",
    "encoder and decoder, upper layers": rf".*\.{LAYERS - 1}\..*",
}
CASES = [(name, place) for name in NAMES for place in (T5_PLACES if name == "t5" else PLACES)]

BATCHES = [
    (1, 6),  # one row, like the tensors that all rows share
    (5, 5),  # as many rows as positions
    (HEADS, 7),  # as many rows as heads
    (16, 3),  # as many rows as relative positions (DeBERTa)
    (3, 9),  # as many rows as adapters
    (2, 1),  # one position
]


def batch(rows: int, length: int, seed: int = 0) -> Tokens:
    """Random words, the first row full, the others of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (rows, length), generator=generator, dtype=torch.int32)
    lengths = torch.randint(1, length + 1, (rows,), generator=generator, dtype=torch.int32)
    lengths[0] = length
    ids[torch.arange(length) >= lengths[:, None]] = PAD
    return Tokens(ids, lengths)


def inputs(tokens: Tokens, architecture: str) -> dict[str, Tensor]:
    """The same batch as stock transformers take it."""
    mask = torch.arange(tokens.input_ids.shape[1]) < tokens.lengths[:, None]
    arguments = {"input_ids": tokens.input_ids.long(), "attention_mask": mask.long()}
    if architecture == "encoder-decoder":
        arguments["decoder_input_ids"] = torch.full((len(tokens), 1), PAD)
    return arguments


def random_adapters(backbone: FrozenBackbone, config: LoraConfig, count: int) -> tuple[ModelInfo, list[LoraAdapter]]:
    """Adapters as they are in the middle of a training run: A and B both away from their start."""
    info = backbone.info("m", Limits())
    generator = torch.Generator().manual_seed(1)
    adapters = [LoraAdapter(config, info, generator=generator) for _ in range(count)]
    for adapter in adapters:
        for _, b in adapter.named_matrices().values():
            nn.init.normal_(b, std=0.2, generator=generator)
    return info, adapters


def stock(adapter: LoraAdapter, folder: Path, source: str) -> PeftModel:
    """Our checkpoint on the original model, by PEFT alone."""
    adapter.save_pretrained(folder)
    model = AutoModel.from_pretrained(source, dtype=torch.float64)
    return PeftModel.from_pretrained(model, str(folder), is_trainable=True).double().eval()


def stock_gradient(model: PeftModel, adapter: LoraAdapter) -> Tensor:
    parameters = dict(model.named_parameters())

    def gradient(name: str, part: str) -> Tensor:
        found = parameters[f"base_model.model.{name}.{part}.default.weight"].grad
        assert found is not None
        return found

    modules = adapter.named_matrices()
    return adapter.layout.join({n: (gradient(n, "lora_A"), gradient(n, "lora_B")) for n in modules})


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize(("name", "place"), CASES)
def test_hidden_states_and_gradients_equal_stock_peft(name: str, place: str, tiny_backbone: LoadTiny, tmp_path: Path):
    backbone = tiny_backbone(name, "float64")
    pattern = (T5_PLACES if name == "t5" else PLACES)[place]
    targets = [module for module in backbone.lora.shapes if re.fullmatch(pattern, module)]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets)
    _, adapters = random_adapters(backbone, config, 3)
    peft = [stock(a, tmp_path / str(i), backbone.source.location) for i, a in enumerate(adapters)]
    layout = adapters[0].layout
    for rows, length in BATCHES:
        tokens = batch(rows, length)
        arguments = inputs(tokens, backbone.architecture)
        cotangents: list[Tensor] = []
        expected: list[tuple[Tensor, Tensor]] = []
        for index, (model, adapter) in enumerate(zip(peft, adapters, strict=True)):
            hidden = model(**arguments).last_hidden_state
            torch.manual_seed(index)
            cotangents.append(torch.randn_like(hidden))
            model.zero_grad()
            hidden.backward(cotangents[-1])
            expected.append((hidden.detach(), stock_gradient(model, adapter)))
        for n in (1, 2, 3):
            weights = torch.stack([a.vector().detach().double() for a in adapters[:n]]).requires_grad_()
            hidden = backbone.forward(tokens, "none", layout, weights)
            (gradients,) = torch.autograd.grad(hidden, weights, torch.stack(cotangents[:n]))
            for i in range(n):
                where = f"n={n}, adapter {i}, batch {(rows, length)}"
                assert error(hidden[i], expected[i][0]) <= EXACT, where
                assert error(gradients[i], expected[i][1]) <= EXACT, where


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_neither_sees_nor_changes_the_others(name: str, tiny_backbone: LoadTiny):
    backbone = tiny_backbone(name)
    _, adapters = random_adapters(backbone, LoraConfig(r=4, target_modules="all-linear"), 3)
    weights = torch.stack([adapter.vector().detach() for adapter in adapters])
    tokens, layout = batch(3, 5), adapters[0].layout
    leaf = weights.clone().requires_grad_()
    hidden = backbone.forward(tokens, "none", layout, leaf)
    (gradients,) = torch.autograd.grad(hidden[1].sum(), leaf)
    assert torch.count_nonzero(gradients[0]) == torch.count_nonzero(gradients[2]) == 0
    assert torch.count_nonzero(gradients[1]) > 0
    changed = weights.clone()
    changed[1] *= -2
    after = backbone.forward(tokens, "none", layout, changed)
    assert torch.equal(after[0], hidden[0])
    assert torch.equal(after[2], hidden[2])
    assert error(after[1], hidden[1]) > 1e-2


@pytest.mark.parametrize("place", ["all layers", "upper layer"])
@pytest.mark.parametrize("name", NAMES)
def test_texts_with_adapters_of_their_own(name: str, place: str, tiny_backbone: LoadTiny):
    """Weights `(n, B, P)`: what each text gives alone, hidden states and gradients."""
    backbone = tiny_backbone(name, "float64")
    targets = [module for module in backbone.lora.shapes if re.fullmatch(PLACES[place], module)]
    _, adapters = random_adapters(backbone, LoraConfig(r=2, target_modules=targets), 6)
    layout = adapters[0].layout
    weights = torch.stack([a.vector().detach().double() for a in adapters]).reshape(2, 3, -1)
    tokens, leaf = batch(3, 7), weights.clone().requires_grad_()
    hidden = backbone.forward(tokens, "none", layout, leaf)
    torch.manual_seed(0)
    cotangents = torch.randn_like(hidden)
    (gradients,) = torch.autograd.grad(hidden, leaf, cotangents)
    for b in range(3):
        alone = Tokens(tokens.input_ids[b : b + 1], tokens.lengths[b : b + 1])
        own = weights[:, b].clone().requires_grad_()
        expected = backbone.forward(alone, "none", layout, own)
        assert error(hidden[:, b : b + 1], expected) <= EXACT
        assert error(gradients[:, b], torch.autograd.grad(expected, own, cotangents[:, b : b + 1])[0]) <= EXACT


@pytest.mark.parametrize("name", NAMES)
def test_every_adapted_layer_matters(name: str, tiny_backbone: LoadTiny):
    """Otherwise the comparisons here would prove little."""
    backbone = tiny_backbone(name)
    _, adapters = random_adapters(backbone, LoraConfig(r=2, target_modules="all-linear"), 1)
    layout = adapters[0].layout
    leaf = adapters[0].vector().detach().unsqueeze(0).requires_grad_()
    torch.manual_seed(0)
    hidden = backbone.forward(batch(4, 6), "none", layout, leaf)
    (gradient,) = torch.autograd.grad(hidden, leaf, torch.randn_like(hidden))
    single_position = name == "t5"  # attention over one position gives the same whatever query and key say
    for module, parts in layout.split(gradient[0]).items():
        if single_position and re.search(r"decoder.*SelfAttention\.[qk]$", module):
            continue
        assert all(float(part.norm()) > 0 for part in parts), module


@pytest.mark.parametrize("name", NAMES)
def test_with_b_at_zero_every_adapter_gives_the_frozen_model(name: str, tiny_backbone: LoadTiny):
    backbone = tiny_backbone(name)
    info = backbone.info("m", Limits())
    adapters = [LoraAdapter(LoraConfig(r=4, target_modules="all-linear"), info) for _ in range(2)]
    tokens = batch(4, 5)
    frozen = backbone.forward(tokens, "none")
    hidden = backbone.forward(
        tokens, "none", adapters[0].layout, torch.stack([adapter.vector().detach() for adapter in adapters])
    )
    assert frozen.shape[0] == 1
    for i in range(2):
        assert error(hidden[i], frozen[0]) <= 1e-6


def test_adapters_of_one_request_leave_nothing_behind(tiny_backbone: LoadTiny):
    backbone = tiny_backbone("bert")
    tokens = batch(2, 4)
    before = backbone.forward(tokens, "none")
    _, adapters = random_adapters(backbone, LoraConfig(r=4, target_modules="all-linear"), 1)
    weights = adapters[0].vector().detach().unsqueeze(0)
    backbone.forward(tokens, "none", adapters[0].layout, weights)
    with pytest.raises(RuntimeError), backbone.lora.adapters(adapters[0].layout, weights, 2, train=False):
        raise RuntimeError("as if the pass had failed")
    assert torch.equal(backbone.forward(tokens, "none"), before)


class TestLayout:
    SHAPES: ClassVar = {"a": (3, 5), "b": (4, 2)}

    def test_join_is_the_inverse_of_split(self):
        layout = LoraLayout(LoraSpec(modules=["b", "a"], rank=2, scaling=1.0), self.SHAPES)
        vectors = torch.randn(3, layout.size)
        matrices = layout.split(vectors)
        assert [(k, a.shape, b.shape) for k, (a, b) in matrices.items()] == [
            ("b", (3, 2, 2), (3, 4, 2)),
            ("a", (3, 2, 5), (3, 3, 2)),
        ]
        assert torch.equal(layout.join(matrices), vectors)

    def test_the_vector_holds_a_then_b_row_by_row_in_the_order_of_the_modules(self):
        layout = LoraLayout(LoraSpec(modules=["b", "a"], rank=1, scaling=1.0), self.SHAPES)
        matrices = layout.split(torch.arange(14.0))
        assert matrices["b"][0].tolist() == [[0, 1]]
        assert matrices["b"][1].tolist() == [[2], [3], [4], [5]]
        assert matrices["a"][0].tolist() == [[6, 7, 8, 9, 10]]
        assert matrices["a"][1].tolist() == [[11], [12], [13]]

    @pytest.mark.parametrize("size", [0, 13, 15])
    def test_a_vector_of_another_length_is_refused_with_both_lengths(self, size: int):
        layout = LoraLayout(LoraSpec(modules=["b", "a"], rank=1, scaling=1.0), self.SHAPES)
        with pytest.raises(AdapterMismatch, match=f"{size} weights.*needs 14"):
            layout.split(torch.zeros(size))

    def test_an_unknown_module_is_refused_by_name_with_what_there_is(self):
        with pytest.raises(UnknownTargetModule, match="'c'") as caught:
            LoraLayout(LoraSpec(modules=["a", "c"], rank=1, scaling=1.0), self.SHAPES)
        assert "a, b" in caught.value.remedy

    def test_a_module_named_twice_is_refused(self):
        with pytest.raises(UnknownTargetModule, match="'a', twice"):
            LoraLayout(LoraSpec(modules=["a", "b", "a"], rank=1, scaling=1.0), self.SHAPES)

    def test_a_rank_above_a_modules_side_is_refused_with_both(self):
        with pytest.raises(AdapterMismatch, match=r"Rank 3 .*'b': 4 and 2"):
            LoraLayout(LoraSpec(modules=["a", "b"], rank=3, scaling=1.0), self.SHAPES)


SEED = bytes(range(32)).hex()


class TestFixedA:
    """A of a public seed: both sides expand it, and B alone travels."""

    SHAPES: ClassVar = {"a": (3, 5), "b": (4, 2)}
    VECTOR: ClassVar = [-0.120977819, -0.30221948, 0.34468469, 0.0818403438, 0.194576934]

    def layout(self, **changes: Any) -> LoraLayout:
        spec = LoraSpec(**{"modules": ["b", "a"], "rank": 2, "scaling": 1.0, "a_seed": SEED, **changes})
        return LoraLayout(spec, self.SHAPES)

    def test_the_vector_holds_b_alone_row_by_row_in_the_order_of_the_modules(self):
        layout = self.layout()
        assert layout.size == 2 * 4 + 2 * 3
        matrices = layout.split(torch.arange(14.0))
        assert matrices["b"][1].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
        assert matrices["a"][1].tolist() == [[8, 9], [10, 11], [12, 13]]
        with pytest.raises(AdapterMismatch, match=r"28 weights.*needs 14"):
            layout.split(torch.zeros(28))

    def test_join_is_the_inverse_of_split_and_a_is_the_same_for_every_vector(self):
        layout = self.layout()
        vectors = torch.randn(3, layout.size, dtype=torch.float64)
        matrices = layout.split(vectors)
        assert [(k, a.shape, b.shape) for k, (a, b) in matrices.items()] == [
            ("b", (3, 2, 2), (3, 4, 2)),
            ("a", (3, 2, 5), (3, 3, 2)),
        ]
        for index, name in enumerate(("b", "a")):
            assert matrices[name][0].dtype == torch.float64
            assert all(torch.equal(a.float(), layout.fixed_a()[index]) for a in matrices[name][0])
        assert torch.equal(layout.join(matrices), vectors)

    def test_without_a_seed_nothing_is_fixed(self):
        layout = self.layout(a_seed=None)
        assert (layout.fixed_a(), layout.size) == ((), 2 * (4 + 2 + 3 + 5))

    def test_a_is_what_it_was(self):
        """Test vector: another implementation must give these, or two operators' adapters don't belong together."""
        found = expand_a(SEED, 1, (2, 3))
        assert [a.shape for a in found] == [(1, 2), (1, 3)]
        assert torch.cat(found, dim=1).flatten().tolist() == pytest.approx(self.VECTOR, rel=1e-7)

    def test_a_is_made_of_the_stream_by_exact_arithmetic(self):
        """The same formula in plain Python, from the raw bytes."""
        sizes = (2921, 3, 3541)
        words = struct.unpack(f"<{2 * sum(sizes)}Q", Keystream(bytes.fromhex(SEED)).bytes(16 * sum(sizes)))
        found = expand_a(SEED, 2, sizes)
        for a, size in zip(found, sizes, strict=True):
            part, words = words[: 2 * size], words[2 * size :]
            exact = [(2.0 * ((word >> 11) + 1) * 2.0**-53 - 1.0) / math.sqrt(size) for word in part]
            assert torch.equal(a, torch.tensor(exact, dtype=torch.float64).float().reshape(2, size))

    def test_a_is_deterministic_and_another_seeds_is_another(self):
        first = expand_a(SEED, 4, (50,))[0].clone()
        expand_a.cache_clear()
        assert torch.equal(expand_a(SEED, 4, (50,))[0], first)
        assert not torch.equal(expand_a("00" * 32, 4, (50,))[0], first)

    def test_a_is_uniform_as_peft_initialises_it(self):
        (a,) = expand_a(SEED, 64, (400,))
        values = a.double().flatten() * 20.0  # times √in
        assert float(values.abs().max()) <= 1.0
        assert abs(float(values.mean())) < 5 / (3 * len(values)) ** 0.5
        assert float(values.square().mean()) == pytest.approx(1 / 3, rel=0.02)

    @pytest.mark.parametrize("name", NAMES)
    def test_gives_what_the_same_a_sent_along_gives(self, name: str, tiny_backbone: LoadTiny):
        """Hidden states of n adapters, and the gradients of B; in a float64 model, which takes A as it is."""
        backbone = tiny_backbone(name, "float64")
        modules = list(backbone.lora.shapes)
        short = LoraLayout(LoraSpec(modules=modules, rank=4, scaling=1.5, a_seed=SEED), backbone.lora.shapes)
        whole = LoraLayout(LoraSpec(modules=modules, rank=4, scaling=1.5), backbone.lora.shapes)
        only_b = 0.2 * torch.randn(2, short.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        both = whole.join(short.split(only_b))
        assert both.shape == (2, whole.size)
        hidden: list[Tensor] = []
        gradients: list[Tensor] = []
        for layout, weights in ((short, only_b), (whole, both)):
            leaf = weights.clone().requires_grad_()
            hidden.append(backbone.forward(batch(3, 6), "none", layout, leaf))
            cotangent = torch.randn(hidden[-1].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            of_matrices = layout.split(torch.autograd.grad(hidden[-1], leaf, cotangent)[0])
            gradients.append(short.join(of_matrices))  # B's part
        assert error(hidden[0], hidden[1]) <= EXACT
        assert error(hidden[0][0], hidden[0][1]) > 1e-3
        assert error(gradients[0], gradients[1]) <= EXACT


class TestBlocks:
    @pytest.mark.parametrize("name", NAMES)
    def test_the_blocks_are_the_models_layers_in_order(self, name: str, tiny_backbone: LoadTiny):
        backbone = tiny_backbone(name)
        assert len(backbone.lora.blocks) == (2 * LAYERS if name == "t5" else LAYERS)
        numbers = [int(re.findall(r"\.(\d+)\.", f".{module}")[0]) for module in backbone.lora.shapes]
        per_layer = {"bert": 6, "roberta": 6, "llama": 7, "opt": 6, "deberta": 6, "deberta-conv": 6}
        if name == "t5":
            assert numbers == [i for i in range(LAYERS) for _ in range(7)] + [
                i for i in range(LAYERS) for _ in range(11)
            ]
        else:
            assert numbers == [i for i in range(LAYERS) for _ in range(per_layer[name])]

    @pytest.mark.parametrize("name", NAMES)
    def test_every_linear_layer_of_a_block_takes_adapters(self, name: str, tiny_backbone: LoadTiny):
        backbone = tiny_backbone(name)
        linear = {n: (m.out_features, m.in_features) for n, m in backbone.model.named_modules() if type(m) is nn.Linear}
        outside = {n for n in linear if not re.search(r"\.\d+\.", f".{n}")}
        assert outside <= {"pooler.dense", "decoder.project_in", "decoder.project_out"}
        assert backbone.lora.shapes == {n: linear[n] for n in linear if n not in outside}

    def test_a_model_without_blocks_is_refused(self):
        with pytest.raises(UnknownTargetModule, match="no list of transformer blocks"):
            find_blocks(nn.Sequential(nn.Linear(HIDDEN, HIDDEN)))
