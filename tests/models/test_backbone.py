"""A frozen model: what it tells about itself, what it refuses, and when it is random."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, ViTConfig

from blindtune.errors import ConfigError, EmptyBatch, InvalidTensor, SequenceTooLong, UnknownModel
from blindtune.models import FrozenBackbone, Tokenizer, Tokens, load_backbone
from blindtune.wire import Limits
from tests.models.test_lora import batch, error, inputs, random_adapters
from tests.tiny import HIDDEN, LAYERS, NAMES, POSITIONS, VOCABULARY, save_tiny_model

LoadTiny = Callable[..., FrozenBackbone]


class TestFrozenModel:
    @pytest.mark.parametrize("name", NAMES)
    def test_hidden_states_equal_stock_transformers(self, name: str, tiny_backbone: LoadTiny):
        backbone = tiny_backbone(name, "float64")
        model = AutoModel.from_pretrained(backbone.source.location, dtype=torch.float64)
        tokens = batch(5, 8)
        with torch.no_grad():
            expected = model(**inputs(tokens, backbone.architecture)).last_hidden_state
        assert error(backbone.forward(tokens, "none")[0], expected) <= 1e-11

    def test_token_types_reach_the_model(self, tiny_backbone: LoadTiny):
        backbone = tiny_backbone("bert", "float64")
        model = AutoModel.from_pretrained(backbone.source.location, dtype=torch.float64)
        types = (torch.arange(8) > 3).repeat(5, 1)
        tokens = replace(batch(5, 8), token_type_ids=types.to(torch.uint8))
        with torch.no_grad():
            expected = model(**inputs(tokens, "encoder"), token_type_ids=types.long()).last_hidden_state
        assert error(backbone.forward(tokens, "none")[0], expected) <= 1e-11
        assert error(backbone.forward(batch(5, 8), "none")[0], expected) > 1e-3

    def test_minilm_gives_its_sentence_vectors(self, minilm: FrozenBackbone, film_sentences: list[str]):
        texts = film_sentences[:8]
        stock = AutoTokenizer.from_pretrained(minilm.source.location)(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = AutoModel.from_pretrained(minilm.source.location)(**stock).last_hidden_state
        mask = stock["attention_mask"].unsqueeze(-1)
        expected = (hidden * mask).sum(1) / mask.sum(1)
        tokenizer = Tokenizer(minilm.tokenizer, pad_token_id=minilm.pad_token_id, with_types=True)
        tokens = tokenizer.pad(tokenizer.rows(texts, max_length=128))
        assert minilm.info("minilm", Limits()).pooling == "mean"
        assert error(minilm.forward(tokens, "mean")[0], expected) <= 1e-6

    def test_no_weight_can_be_trained(self, tiny_backbone: LoadTiny):
        backbone = tiny_backbone("bert")
        assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
        assert not backbone.forward(batch(2, 3), "cls").requires_grad


class TestDescription:
    @pytest.mark.parametrize("name", NAMES)
    def test_it_names_what_a_client_needs(self, name: str, tiny_backbone: LoadTiny):
        info = tiny_backbone(name).info("hosted", Limits())
        assert info.name == "hosted"
        assert info.layers == (2 * LAYERS if name == "t5" else LAYERS)
        assert info.hidden_size == (HIDDEN // 2 if name == "opt" else HIDDEN)  # OPT projects its output
        assert info.dtype == "float32"
        assert info.token_type_ids == (name == "bert")
        assert info.limits.max_length == (512 if name == "t5" else POSITIONS)
        architectures = {"t5": "encoder-decoder", "llama": "decoder", "opt": "decoder"}
        assert info.architecture == architectures.get(name, "encoder")

    def test_the_servers_limit_counts_where_it_is_lower(self, tiny_backbone: LoadTiny):
        assert tiny_backbone("bert").info("m", Limits(max_length=7)).limits.max_length == 7

    @pytest.mark.parametrize("name", NAMES)
    def test_the_longest_sequence_that_it_offers_works(self, name: str, tiny_backbone: LoadTiny):
        backbone = tiny_backbone(name)
        length = backbone.info("m", Limits()).limits.max_length
        assert torch.isfinite(backbone.forward(batch(1, length), "none")).all()


class TestFingerprint:
    def test_equal_weights_have_equal_fingerprints_and_one_changed_number_shows(
        self, tiny_models: dict[str, Path], tmp_path: Path
    ):
        folder = tmp_path / "copy"
        shutil.copytree(tiny_models["bert"], folder)
        original = load_backbone(str(tiny_models["bert"])).fingerprint
        assert load_backbone(str(folder)).fingerprint == original
        weights = load_file(folder / "model.safetensors")
        weights["encoder.layer.1.output.dense.bias"][3] += 1e-6
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        assert load_backbone(str(folder)).fingerprint != original

    def test_another_dtype_has_another_fingerprint(self, tiny_backbone: LoadTiny):
        assert tiny_backbone("bert").fingerprint != tiny_backbone("bert", "bfloat16").fingerprint


class TestLoading:
    def test_an_unknown_dtype_is_refused_with_what_there_is(self, tiny_models: dict[str, Path]):
        with pytest.raises(ConfigError, match="'int4'") as caught:
            load_backbone(str(tiny_models["bert"]), dtype="int4")
        assert "float32" in caught.value.remedy

    @pytest.mark.parametrize("name", ["./no-such-folder", "no-such-model-anywhere"])
    def test_a_model_that_is_not_there_is_refused_by_name(self, name: str):
        with pytest.raises(UnknownModel, match=name):
            load_backbone(name)

    def test_a_folder_without_a_model_is_refused(self, tmp_path: Path):
        with pytest.raises(UnknownModel, match=str(tmp_path)):
            load_backbone(str(tmp_path))

    def test_a_model_of_another_kind_is_refused_by_its_type(self, tiny_models: dict[str, Path], tmp_path: Path):
        folder = tmp_path / "vit"
        shutil.copytree(tiny_models["bert"], folder)
        ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32).save_pretrained(
            folder
        )
        with pytest.raises(UnknownModel, match="vit"):
            load_backbone(str(folder))

    def test_a_checkpoint_that_lacks_weights_is_refused_by_name(self, tiny_models: dict[str, Path], tmp_path: Path):
        folder = tmp_path / "incomplete"
        shutil.copytree(tiny_models["bert"], folder)
        weights = load_file(folder / "model.safetensors")
        del weights["encoder.layer.1.output.dense.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UnknownModel, match=r"encoder\.layer\.1\.output\.dense\.weight"):
            load_backbone(str(folder))

    def test_damaged_weights_are_refused(self, tiny_models: dict[str, Path], tmp_path: Path):
        folder = tmp_path / "damaged"
        shutil.copytree(tiny_models["bert"], folder)
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(UnknownModel, match="damaged"):
            load_backbone(str(folder))

    def test_a_tokenizer_that_pads_or_truncates_by_itself_is_told_not_to(
        self, tiny_models: dict[str, Path], tmp_path: Path
    ):
        folder = tmp_path / "bert"
        shutil.copytree(tiny_models["bert"], folder)
        stock = AutoTokenizer.from_pretrained(folder)
        stock.backend_tokenizer.enable_padding(length=40)
        stock.backend_tokenizer.enable_truncation(3)
        stock.save_pretrained(folder)
        tokenizer = Tokenizer(load_backbone(str(folder)).tokenizer, pad_token_id=0, with_types=False)
        assert len(tokenizer.rows(["a b c d e f"], max_length=20)[0]) == 8

    @pytest.mark.timeout(300)
    def test_a_gguf_model_is_a_decoder_like_any_other(self):
        backbone = load_backbone("smollm2")
        info = backbone.info("smollm2", Limits())
        assert (info.architecture, info.model_type, info.pooling) == ("decoder", "llama", "last")
        tokenizer = Tokenizer(backbone.tokenizer, pad_token_id=info.pad_token_id, with_types=info.token_type_ids)
        _, adapters = random_adapters(backbone, LoraConfig(r=2), 2)
        tokens = tokenizer.pad(tokenizer.rows(["A good film.", "Not what I had hoped for."], max_length=32))
        leaf = torch.stack([adapter.vector().detach() for adapter in adapters]).requires_grad_()
        hidden = backbone.forward(tokens, "last", adapters[0].layout, leaf)
        (gradient,) = torch.autograd.grad(hidden.square().sum(), leaf)
        assert hidden.shape == (2, 2, info.hidden_size)
        assert torch.isfinite(gradient).all()
        assert torch.count_nonzero(gradient[0]) > 0


class TestRefusals:
    def ids(self, rows: int = 2, length: int = 3) -> torch.Tensor:
        return torch.full((rows, length), 9, dtype=torch.int32)

    def refused(self, backbone: FrozenBackbone, kind: type[Exception], match: str, ids: torch.Tensor, *lengths: int):
        with pytest.raises(kind, match=match):
            backbone.forward(Tokens(ids, torch.tensor(lengths, dtype=torch.int32)), "none")

    def test_a_batch_without_examples_or_tokens(self, tiny_backbone: LoadTiny):
        backbone = tiny_backbone("bert")
        self.refused(backbone, EmptyBatch, r"\(0, 3\)", self.ids(0, 3))
        self.refused(backbone, EmptyBatch, r"\(2, 0\)", self.ids(2, 0), 0, 0)
        self.refused(backbone, EmptyBatch, "without tokens", self.ids(), 3, 0)

    @pytest.mark.parametrize("name", NAMES)
    def test_more_tokens_than_the_model_takes(self, name: str, tiny_backbone: LoadTiny):
        backbone = tiny_backbone(name)
        if name == "t5":
            assert backbone.max_length > 10**6, "T5 has no longest sequence"
            return
        assert backbone.max_length == POSITIONS
        self.refused(backbone, SequenceTooLong, f"{POSITIONS + 1} tokens", self.ids(1, POSITIONS + 1), POSITIONS + 1)

    def test_a_length_beyond_the_batch(self, tiny_backbone: LoadTiny):
        self.refused(tiny_backbone("bert"), InvalidTensor, "length of 4", self.ids(), 3, 4)

    @pytest.mark.parametrize("bad", [-1, VOCABULARY, 2**31 - 1])
    def test_a_token_outside_the_vocabulary(self, bad: int, tiny_backbone: LoadTiny):
        ids = self.ids()
        ids[1, 2] = bad
        self.refused(tiny_backbone("bert"), InvalidTensor, str(bad), ids, 3, 3)

    def test_a_token_type_that_the_model_does_not_know(self, tiny_backbone: LoadTiny):
        for name, bad in (("bert", 2), ("roberta", 1), ("llama", 1)):
            types = torch.zeros(2, 3, dtype=torch.uint8)
            types[1, 1] = bad
            tokens = Tokens(self.ids(), torch.tensor([3, 3], dtype=torch.int32), types)
            backbone = tiny_backbone(name)
            with pytest.raises(InvalidTensor, match=f"token type of {bad}"):
                backbone.forward(tokens, "none")


class TestDropout:
    @pytest.fixture
    def dropping(self, tiny_backbone: LoadTiny):
        """Output under adapters with dropout: the model itself drops too."""
        backbone = tiny_backbone("bert")
        _, adapters = random_adapters(backbone, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3), 2)
        weights = torch.stack([adapter.vector().detach() for adapter in adapters])
        return lambda seed, n=2: backbone.forward(batch(3, 5), "none", adapters[0].layout, weights[:n], seed=seed)

    def test_is_off_without_a_seed(self, dropping: Callable[..., torch.Tensor]):
        assert torch.equal(dropping(None), dropping(None))

    def test_is_on_with_a_seed_and_the_same_for_the_same_seed(self, dropping: Callable[..., torch.Tensor]):
        assert not torch.equal(dropping(1), dropping(None))
        assert not torch.equal(dropping(1), dropping(2))
        assert torch.equal(dropping(1), dropping(1))

    def test_is_off_again_after_a_call_with_a_seed(self, dropping: Callable[..., torch.Tensor]):
        before = dropping(None)
        dropping(1)
        assert torch.equal(dropping(None), before)

    def test_leaves_the_random_numbers_of_the_process_alone(self, dropping: Callable[..., torch.Tensor]):
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        dropping(1)
        assert torch.equal(torch.rand(3), expected)

    def test_of_the_adapter_counts_beside_that_of_the_model(self, tmp_path: Path, film_sentences: list[str]):
        folder = save_tiny_model("llama", tmp_path / "llama", film_sentences[:100])  # no dropout of its own
        backbone = load_backbone(str(folder))
        plain = LoraConfig(r=4, target_modules="all-linear")
        for config, differs in ((plain, False), (LoraConfig(**{**plain.to_dict(), "lora_dropout": 0.5}), True)):
            _, (adapter,) = random_adapters(backbone, config, 1)
            weights = adapter.vector().detach().unsqueeze(0)
            outputs = [backbone.forward(batch(3, 5), "last", adapter.layout, weights, seed=s) for s in (None, 1)]
            assert torch.equal(*outputs) is not differs

    def test_of_two_models_in_one_process_do_not_disturb_each_other(self, tiny_backbone: LoadTiny):
        """A server runs each model on a thread of its own."""
        one, two = tiny_backbone("bert"), tiny_backbone("roberta")
        expected = [one.forward(batch(3, 5), "none", seed=s) for s in range(40)]
        stop = threading.Event()

        def perturb() -> None:
            while not stop.is_set():
                two.forward(batch(3, 5), "none", seed=7)

        thread = threading.Thread(target=perturb)
        thread.start()
        try:
            found = [one.forward(batch(3, 5), "none", seed=s) for s in range(40)]
        finally:
            stop.set()
            thread.join()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
