"""PEFT's configuration in, PEFT's checkpoint out: every option does what PEFT does with it, or is refused by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from blindtune.errors import CheckpointError, ConfigError, UnknownTargetModule
from blindtune.models import FrozenBackbone, LoraAdapter, lora_spec
from blindtune.models.adapters import read_lora_config
from blindtune.wire import Limits, ModelInfo
from tests.models.test_lora import batch, error, inputs, random_adapters, stock
from tests.tiny import HIDDEN, LAYERS, NAMES

LoadTiny = Callable[..., FrozenBackbone]


@pytest.fixture(scope="session")
def info(tiny_backbone: LoadTiny) -> Callable[[str], ModelInfo]:
    return lambda name: tiny_backbone(name).info(name, Limits())


def peft_layers(config: LoraConfig, source: str) -> set[str]:
    """The layers that stock PEFT adapts under this configuration."""
    model = get_peft_model(AutoModel.from_pretrained(source), config)
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
        for name, _ in model.named_parameters()
        if name.endswith(".lora_A.default.weight")
    } - {"pooler.dense"}


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "list": ("bert", {"target_modules": ["query", "value"]}),
    "list of one full name": ("bert", {"target_modules": ["encoder.layer.1.attention.self.key"]}),
    "regex": ("bert", {"target_modules": r".*layer\.[02]\..*(query|intermediate\.dense)"}),
    "defaults": ("bert", {}),
    "defaults of RoBERTa": ("roberta", {}),
    "defaults of DeBERTa": ("deberta", {}),
    "defaults of T5": ("t5", {}),
    "defaults of Llama": ("llama", {}),
    "defaults of OPT": ("opt", {}),
    "some layers": ("bert", {"target_modules": ["query", "dense"], "layers_to_transform": [0, 2]}),
    "one layer": ("opt", {"target_modules": ["q_proj", "fc2"], "layers_to_transform": 1}),
    "some layers of a pattern": (
        "bert",
        {"target_modules": ["key"], "layers_to_transform": [1], "layers_pattern": "layer"},
    ),
    "excluded": ("bert", {"target_modules": ["query", "dense"], "exclude_modules": r".*layer\.0\..*"}),
    "rank-stabilised": ("bert", {"target_modules": ["query"], "use_rslora": True, "r": 9}),
    "task": ("bert", {"target_modules": ["query"], "task_type": "FEATURE_EXTRACTION"}),
    "many layers": ("t5", {"target_modules": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_configuration_adapts_the_layers_that_peft_adapts_and_saves_what_peft_loads(
    variant: str, tiny_backbone: LoadTiny, tmp_path: Path
):
    name, options = VARIANTS[variant]
    backbone = tiny_backbone(name, "float64")
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, **options})
    _, adapters = random_adapters(backbone, config, 1)
    assert set(adapters[0].named_matrices()) == peft_layers(LoraConfig(**options), backbone.source.location)

    tokens = batch(3, 6)
    with torch.no_grad():
        peft = stock(adapters[0], tmp_path, backbone.source.location)
        expected = peft(**inputs(tokens, backbone.architecture)).last_hidden_state
    vector = adapters[0].vector().detach().double().unsqueeze(0)
    hidden = backbone.forward(tokens, "none", adapters[0].layout, vector)
    assert error(hidden[0], expected) <= 1e-11
    assert error(hidden[0], backbone.forward(tokens, "none")[0]) > 1e-3, "the adapter must matter"


@pytest.mark.parametrize("name", NAMES)
def test_all_linear_means_every_linear_layer_of_the_blocks(name: str, info: Callable[[str], ModelInfo]):
    described = info(name)
    assert lora_spec(LoraConfig(target_modules="all-linear"), described).modules == list(described.modules)


def test_layers_are_counted_where_names_begin_with_the_list_of_layers(tiny_backbone: LoadTiny, tmp_path: Path):
    """PEFT by itself finds none there; it must load the checkpoint all the same."""
    backbone = tiny_backbone("llama", "float64")
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=[1])
    _, (adapter,) = random_adapters(backbone, config, 1)
    assert list(adapter.named_matrices()) == ["layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"]
    tokens = batch(3, 6)
    with torch.no_grad():
        expected = stock(adapter, tmp_path, backbone.source.location)(**inputs(tokens, "decoder")).last_hidden_state
    vector = adapter.vector().detach().double().unsqueeze(0)
    assert error(backbone.forward(tokens, "none", adapter.layout, vector)[0], expected) <= 1e-11


def test_scaling_is_alpha_over_rank_or_over_its_root(info: Callable[[str], ModelInfo]):
    assert lora_spec(LoraConfig(r=4, lora_alpha=6), info("bert")).scaling == 1.5
    assert lora_spec(LoraConfig(r=4, lora_alpha=6, use_rslora=True), info("bert")).scaling == 3.0


def test_dropout_reaches_the_server(info: Callable[[str], ModelInfo]):
    assert lora_spec(LoraConfig(lora_dropout=0.25), info("bert")).dropout == 0.25


@pytest.mark.parametrize("targets", [["queri"], "encoder", ["pooler.dense"], r".*layer\.7\..*"])
def test_a_target_module_that_no_layer_matches_is_refused_by_name(
    targets: str | list[str], info: Callable[[str], ModelInfo]
):
    with pytest.raises(UnknownTargetModule, match=re.escape(repr(targets))) as caught:
        lora_spec(LoraConfig(target_modules=targets), info("bert"))
    assert "'bert'" in caught.value.message
    assert "query" in caught.value.remedy


def test_layers_that_do_not_exist_are_refused(info: Callable[[str], ModelInfo]):
    with pytest.raises(UnknownTargetModule):
        lora_spec(LoraConfig(target_modules=["query"], layers_to_transform=[LAYERS]), info("bert"))


UNSUPPORTED: dict[str, Any] = {
    "use_dora": True,
    "rank_pattern": {"query": 4},
    "alpha_pattern": {"query": 4},
    "modules_to_save": ["classifier"],
    "bias": "all",
    "target_parameters": ["query.weight"],
    "lora_bias": True,
    "trainable_token_indices": [1, 2],
    "layer_replication": [(0, 2), (1, 3)],
    "alora_invocation_tokens": [5],
    "use_qalora": True,
    "fan_in_fan_out": True,
    "megatron_config": {"params_dtype": "float32"},
    "ensure_weight_tying": True,
}


@pytest.mark.parametrize("option", UNSUPPORTED)
def test_an_option_that_is_not_offered_is_refused_by_name(option: str, info: Callable[[str], ModelInfo]):
    config = LoraConfig(target_modules=["query"])
    setattr(config, option, UNSUPPORTED[option])
    with pytest.raises(ConfigError, match=option) as caught:
        lora_spec(config, info("bert"))
    assert repr(UNSUPPORTED[option]) in caught.value.message


def test_every_option_that_peft_knows_is_either_offered_or_refused(info: Callable[[str], ModelInfo]):
    """A new release of PEFT may bring options; each must be looked at once."""
    offered = {
        "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights",
        "layers_to_transform", "layers_pattern",
    }  # fmt: skip
    without_effect = {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "megatron_core", "loftq_config", "qalora_group_size", "runtime_config",
    }  # fmt: skip
    known = set(LoraConfig.__dataclass_fields__)
    refused: set[str] = set()
    for option in known - offered - without_effect:
        config = LoraConfig(target_modules=["query"])
        setattr(config, option, UNSUPPORTED.get(option, {"some": "value"}))
        with pytest.raises(ConfigError, match=option):
            lora_spec(config, info("bert"))
        refused.add(option)
    assert set(UNSUPPORTED) <= refused | (set(UNSUPPORTED) - known)


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq", "eva", "orthogonal"])
def test_an_initialisation_that_needs_the_weights_is_refused_by_name(init: str, info: Callable[[str], ModelInfo]):
    config = LoraConfig(target_modules=["query"])
    config.init_lora_weights = init  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=init):
        LoraAdapter(config, info("bert"))


class TestInitialWeights:
    def test_b_is_zero_and_a_is_pefts_kaiming_uniform(self, info: Callable[[str], ModelInfo]):
        adapter = LoraAdapter(LoraConfig(r=8, target_modules=["query", "dense"]), info("bert"))
        for a, b in adapter.named_matrices().values():
            assert torch.count_nonzero(b) == 0
            bound = 1 / math.sqrt(a.shape[1])  # Kaiming with slope √5
            assert 0.8 * bound < float(a.detach().abs().max()) <= bound
            assert a.dtype == b.dtype == torch.float32

    def test_gaussian_has_pefts_standard_deviation(self, info: Callable[[str], ModelInfo]):
        config = LoraConfig(r=16, target_modules="all-linear", init_lora_weights="gaussian")
        values = torch.cat(
            [a.detach().flatten() for a, _ in LoraAdapter(config, info("bert")).named_matrices().values()]
        )
        assert float(values.std()) == pytest.approx(1 / 16, rel=0.05)
        assert float(values.abs().max()) > 3 / 16

    def test_false_starts_b_away_from_zero_too(self, info: Callable[[str], ModelInfo]):
        config = LoraConfig(r=8, target_modules=["query"], init_lora_weights=False)
        adapter = LoraAdapter(config, info("bert"))
        assert all(torch.count_nonzero(b) == b.numel() for _, b in adapter.named_matrices().values())

    def test_a_generator_makes_it_repeatable_and_adapters_differ(self, info: Callable[[str], ModelInfo]):
        def draw(generator: torch.Generator) -> torch.Tensor:
            return LoraAdapter(LoraConfig(), info("bert"), generator=generator).vector().detach()

        generator = torch.Generator().manual_seed(5)
        first, second = draw(generator), draw(generator)
        assert not torch.equal(first, second)
        assert torch.equal(draw(torch.Generator().manual_seed(5)), first)


SEED = bytes(range(32)).hex()


class TestFixedA:
    """A of a public seed (`LoraSpec.a_seed`): B alone is trained, and B alone travels."""

    def adapter(self, described: ModelInfo, seed: str = SEED, **options: Any) -> LoraAdapter:
        config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["query", "dense"], **options})
        adapter = LoraAdapter(config, described, a_seed=seed)
        for _, b in adapter.named_matrices().values():
            torch.nn.init.normal_(b, std=0.2, generator=torch.Generator().manual_seed(1))
        return adapter

    def test_a_follows_from_the_seed_and_b_starts_at_zero(self, info: Callable[[str], ModelInfo]):
        for init in (True, False, "gaussian"):
            config = LoraConfig(r=4, target_modules=["query", "dense"], init_lora_weights=init)
            adapter = LoraAdapter(config, info("bert"), a_seed=SEED)
            assert adapter.layout.spec.a_seed == SEED
            matrices = list(adapter.named_matrices().values())
            for (a, b), expected in zip(matrices, adapter.layout.fixed_a(), strict=True):
                assert torch.equal(a, expected)
                assert torch.count_nonzero(b) == 0
                assert (a.requires_grad, b.requires_grad) == (False, True)
        assert LoraAdapter(config, info("bert")).layout.spec.a_seed is None

    def test_an_adapter_that_is_changed_does_not_change_the_expansion_of_others(self, info: Callable[[str], ModelInfo]):
        first, second = self.adapter(info("bert")), self.adapter(info("bert"))
        name, (a, _) = next(iter(first.named_matrices().items()))
        with torch.no_grad():
            a.zero_()
        assert torch.count_nonzero(second.named_matrices()[name][0]) > 0
        assert torch.equal(second.named_matrices()[name][0], second.layout.fixed_a()[0])

    def test_the_vector_is_b_and_has_gradients_for_b_alone(self, info: Callable[[str], ModelInfo]):
        adapter = self.adapter(info("bert"))
        vector = adapter.vector()
        assert len(vector) == adapter.layout.size == sum(b.numel() for _, b in adapter.named_matrices().values())
        vector.square().sum().backward()
        for a, b in adapter.named_matrices().values():
            assert a.grad is None
            assert torch.equal(b.grad, 2 * b.detach())

    def test_its_checkpoint_gives_stock_peft_the_same_hidden_states(self, tiny_backbone: LoadTiny, tmp_path: Path):
        backbone = tiny_backbone("bert", "float64")
        adapter = self.adapter(backbone.info("m", Limits()))
        tokens = batch(3, 6)
        with torch.no_grad():
            expected = stock(adapter, tmp_path, backbone.source.location)(**inputs(tokens, "encoder")).last_hidden_state
        vector = adapter.vector().detach().double().unsqueeze(0)
        hidden = backbone.forward(tokens, "none", adapter.layout, vector)
        assert error(hidden[0], expected) <= 1e-11
        assert error(hidden[0], backbone.forward(tokens, "none")[0]) > 1e-3, "the adapter must matter"

    def test_weights_survive_bit_for_bit(self, info: Callable[[str], ModelInfo], tmp_path: Path):
        saved = self.adapter(info("bert"))
        saved.save_pretrained(tmp_path)
        again = LoraAdapter(read_lora_config(tmp_path), info("bert"), a_seed=SEED)
        assert not torch.equal(again.vector(), saved.vector())
        again.load_pretrained(tmp_path)
        assert torch.equal(again.vector(), saved.vector())
        free = LoraAdapter(read_lora_config(tmp_path), info("bert"))  # as any PEFT checkpoint
        free.load_pretrained(tmp_path)
        assert torch.equal(free.vector(), free.layout.join(saved.named_matrices()))

    def test_a_checkpoint_with_another_a_is_refused_and_changes_nothing(
        self, info: Callable[[str], ModelInfo], tmp_path: Path
    ):
        self.adapter(info("bert"), seed="00" * 32).save_pretrained(tmp_path)
        adapter = self.adapter(info("bert"))
        before = adapter.vector().detach().clone()
        with pytest.raises(
            CheckpointError, match=r"another .*lora_A\.weight than the seed of this run gives"
        ) as caught:
            adapter.load_pretrained(tmp_path)
        assert "seed" in caught.value.remedy
        assert torch.equal(adapter.vector(), before)


class TestCheckpoint:
    def test_weights_survive_bit_for_bit(self, tiny_backbone: LoadTiny, tmp_path: Path):
        described, (saved, other) = random_adapters(tiny_backbone("bert"), LoraConfig(target_modules="all-linear"), 2)
        saved.save_pretrained(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        assert not torch.equal(other.vector(), saved.vector())
        other.load_pretrained(tmp_path)
        assert torch.equal(other.vector(), saved.vector())
        again = LoraAdapter(read_lora_config(tmp_path), described)
        again.load_pretrained(tmp_path)
        assert torch.equal(again.vector(), saved.vector())

    def test_the_configuration_names_the_base_model_and_the_users_config_is_left_alone(
        self, tiny_backbone: LoadTiny, tmp_path: Path
    ):
        config = LoraConfig(target_modules=["query"], layers_to_transform=[1])
        _, (adapter,) = random_adapters(tiny_backbone("bert"), config, 1)
        adapter.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == tiny_backbone("bert").source.name
        assert (written["peft_type"], written["inference_mode"]) == ("LORA", True)
        assert config.layers_to_transform == [1]
        assert config.target_modules == {"query"}
        assert config.inference_mode is False

    def test_a_checkpoint_that_peft_wrote_can_be_loaded(self, tiny_backbone: LoadTiny, tmp_path: Path):
        backbone = tiny_backbone("bert")
        config = LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
        theirs = get_peft_model(AutoModel.from_pretrained(backbone.source.location), config)
        theirs.save_pretrained(str(tmp_path))
        adapter = LoraAdapter(read_lora_config(tmp_path), backbone.info("bert", Limits()))
        adapter.load_pretrained(tmp_path)
        tokens = batch(2, 4)
        with torch.no_grad():
            expected = theirs.eval()(**inputs(tokens, "encoder")).last_hidden_state
        hidden = backbone.forward(tokens, "none", adapter.layout, adapter.vector().detach().unsqueeze(0))
        assert error(hidden[0], expected) <= 1e-6

    def test_another_rank_is_refused_with_both_shapes(self, tiny_backbone: LoadTiny, tmp_path: Path):
        described, (adapter,) = random_adapters(tiny_backbone("bert"), LoraConfig(r=4, target_modules=["query"]), 1)
        adapter.save_pretrained(tmp_path)
        wider = LoraAdapter(LoraConfig(r=8, target_modules=["query"]), described)
        with pytest.raises(CheckpointError, match=rf"\(4, {HIDDEN}\).*\(8, {HIDDEN}\)"):
            wider.load_pretrained(tmp_path)

    @pytest.mark.parametrize(("saved", "loaded"), [(["query"], ["query", "key"]), (["query", "key"], ["query"])])
    def test_other_layers_are_refused_by_name_and_change_nothing(
        self, saved: list[str], loaded: list[str], tiny_backbone: LoadTiny, tmp_path: Path
    ):
        described, (adapter,) = random_adapters(tiny_backbone("bert"), LoraConfig(r=4, target_modules=saved), 1)
        adapter.save_pretrained(tmp_path)
        other = LoraAdapter(LoraConfig(r=4, target_modules=loaded), described)
        before = other.vector().detach().clone()
        with pytest.raises(CheckpointError, match="key"):
            other.load_pretrained(tmp_path)
        assert torch.equal(other.vector(), before)

    def test_missing_files_are_named(self, tiny_backbone: LoadTiny, tmp_path: Path):
        _, (adapter,) = random_adapters(tiny_backbone("bert"), LoraConfig(), 1)
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
            adapter.load_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
            read_lora_config(tmp_path)

    def test_files_that_are_damaged_are_named(self, tiny_backbone: LoadTiny, tmp_path: Path):
        _, (adapter,) = random_adapters(tiny_backbone("bert"), LoraConfig(), 1)
        (tmp_path / "adapter_model.safetensors").write_bytes(b"not a tensor file")
        (tmp_path / "adapter_config.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
            adapter.load_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
            read_lora_config(tmp_path)

    def test_weights_that_are_not_finite_are_refused(self, tiny_backbone: LoadTiny, tmp_path: Path):
        _, (adapter,) = random_adapters(tiny_backbone("bert"), LoraConfig(), 1)
        adapter.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "adapter_model.safetensors")
        next(iter(weights.values()))[0, 0] = float("nan")
        save_file(weights, tmp_path / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match="NaN"):
            adapter.load_pretrained(tmp_path)

    def test_another_kind_of_adapter_is_refused_by_name(self, tmp_path: Path):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
        with pytest.raises(CheckpointError, match="IA3"):
            read_lora_config(tmp_path)
