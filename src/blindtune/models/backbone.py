"""A frozen pretrained transformer with n adapters on it: h(x, θ_1), …, h(x, θ_n).

Used by the server to answer requests and by the audit to recompute what a server could have computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from blindtune.errors import ConfigError, EmptyBatch, InvalidTensor, SequenceTooLong, UnknownModel, UnknownPooling
from blindtune.models.devices import find_device
from blindtune.models.lora import LoraLayout, LoraPass
from blindtune.models.pooling import POOLINGS, default_pooling, pool
from blindtune.models.sources import ModelSource, find_source
from blindtune.models.split import PARTS, Cut, SplitModel, check_splittable, layers_of
from blindtune.wire import Architecture, Limits, ModelInfo, Pooling, SplitInfo

TORCH_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Tokens:
    """A right-padded batch: `input_ids (B, L)` int32, `lengths (B,)` int32, `token_type_ids (B, L)` uint8."""

    input_ids: Tensor
    lengths: Tensor
    token_type_ids: Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """As they travel and are recorded."""
        named = {"input_ids": self.input_ids, "lengths": self.lengths}
        return named if self.token_type_ids is None else {**named, "token_type_ids": self.token_type_ids}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> Tokens:
        return Tokens(tensors["input_ids"], tensors["lengths"], tensors.get("token_type_ids"))


class FrozenBackbone:
    """A pretrained model whose weights never change, with room for n LoRA adapters at once.

    Not thread-safe: one call at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        source: ModelSource,
        tokenizer: str,
        pad_token_id: int,
        split: SplitModel | None = None,
    ) -> None:
        self.model: nn.Module = model.eval().requires_grad_(False)
        self.split = split
        """The same model with its LM head, in three parts, if clients may hold its ends."""
        self.source = source
        self.tokenizer = tokenizer
        """JSON of the `tokenizers` library."""
        self.config: Any = model.config
        self.pad_token_id = pad_token_id
        self.architecture: Architecture = _architecture(self.config)
        self.lora = LoraPass(model)
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.max_length = _max_length(self.config)
        self.vocabulary_size = int(self.config.vocab_size)
        self.fingerprint = fingerprint(model)
        self.hidden_size = int(
            getattr(self.config, "word_embed_proj_dim", None) or self.config.hidden_size
        )  # OPT projects
        self._type_vocabulary = int(getattr(self.config, "type_vocab_size", 0) or 0)

    def info(self, name: str, limits: Limits) -> ModelInfo:
        """What a client may know of the model."""
        return ModelInfo(
            name=name,
            architecture=self.architecture,
            model_type=str(self.config.model_type),
            hidden_size=self.hidden_size,
            layers=len(self.lora.blocks),
            dtype=str(self.dtype).removeprefix("torch."),
            modules=self.lora.shapes,
            pooling=default_pooling(self.architecture, self.source.location),
            poolings=POOLINGS[self.architecture],
            token_type_ids=self._type_vocabulary > 1,
            pad_token_id=self.pad_token_id,
            fingerprint=self.fingerprint,
            base_model_name=self.source.name,
            limits=limits.model_copy(update={"max_length": min(limits.max_length, self.max_length)}),
            split=self._split_info(),
        )

    def _split_info(self) -> SplitInfo | None:
        if self.split is None:
            return None
        cut, shared = self.split.cut, self.split.weights_shared()
        offered: list[str] = [part for part in PARTS if part != "trunk"]
        return SplitInfo(bottom=cut.bottom, top=cut.top, parts=offered, weights_shared=round(shared, 4))

    def forward(
        self,
        tokens: Tokens,
        pooling: Pooling,
        layout: LoraLayout | None = None,
        weights: Tensor | None = None,
        *,
        seed: int | None = None,
    ) -> Tensor:
        """h(x, θ_i) for weight vectors `(n, P)`: `(n, B, d)`, `(n, B, L, d)` for pooling `none`.

        With `(n, B, P)` each text has vectors of its own, so that one backward pass gives each text's gradients.
        float32, or float64 from a model in float64.

        Without adapters the frozen model's output, n = 1. Dropout is on if and only if there is a seed; all
        adapters share one random stream, so the same call gives the same answer. Differentiable in `weights`, which
        may be on another device than the model.

        Raises:
            UnknownPooling: a pooling that this architecture doesn't offer.
            EmptyBatch, SequenceTooLong, InvalidTensor: tokens that the model can't take.
        """
        if pooling not in POOLINGS[self.architecture]:
            raise UnknownPooling(
                f"This {self.architecture} offers no pooling {pooling!r}.",
                remedy=f"Choose among: {', '.join(POOLINGS[self.architecture])}.",
            )
        self.check_tokens(tokens)
        with _randomness(self.model, seed):
            if layout is None or weights is None:
                with torch.no_grad():
                    return self._run(tokens, pooling, 1).unsqueeze(0)
            here = weights.to(self.device)
            with self.lora.adapters(layout, here, len(tokens), train=seed is not None) as repeat:
                hidden = self._run(tokens, pooling, repeat)  # (n B, ...)
        return hidden.reshape(len(weights), len(tokens), *hidden.shape[1:])

    def check_tokens(self, tokens: Tokens) -> None:
        """Raises `EmptyBatch`, `SequenceTooLong` or `InvalidTensor` before the model would fail or read wild."""
        ids, lengths = tokens.input_ids, tokens.lengths
        if ids.shape[0] == 0 or ids.shape[1] == 0 or int(lengths.min()) < 1:
            raise EmptyBatch(
                f"The batch has shape {tuple(ids.shape)} or an example without tokens.",
                remedy="Send at least one example with at least one token each.",
            )
        if ids.shape[1] > self.max_length:
            raise SequenceTooLong(
                f"The batch is {ids.shape[1]} tokens long, the model takes {self.max_length}.",
                remedy=f"Truncate to {self.max_length} tokens (--max-length).",
            )
        if int(lengths.max()) > ids.shape[1]:
            raise InvalidTensor(
                f"A length of {int(lengths.max())} is beyond the {ids.shape[1]} tokens of the batch.",
                remedy=f"Send lengths of at most {ids.shape[1]}.",
            )
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary_size:
            raise InvalidTensor(
                f"Token ids reach from {int(ids.min())} to {int(ids.max())}; the vocabulary: {self.vocabulary_size}.",
                remedy="Use the tokenizer that the server offers.",
            )
        types = tokens.token_type_ids
        if types is not None and int(types.max()) >= max(self._type_vocabulary, 1):
            known = max(self._type_vocabulary, 1)
            raise InvalidTensor(
                f"A token type of {int(types.max())}; the model knows {known}.",
                remedy=f"Send token types from 0 to {known - 1}.",
            )

    def _run(self, tokens: Tokens, pooling: Pooling, repeat: int) -> Tensor:
        """Pooled hidden states of the inputs repeated `repeat` times."""
        ids = tokens.input_ids.to(self.device, torch.long).repeat(repeat, 1)
        lengths = tokens.lengths.to(self.device, torch.long).repeat(repeat)
        mask = (torch.arange(ids.shape[1], device=self.device) < lengths.unsqueeze(1)).long()  # (B, L)
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if tokens.token_type_ids is not None and self._type_vocabulary > 1:
            arguments["token_type_ids"] = tokens.token_type_ids.to(self.device, torch.long).repeat(repeat, 1)
        if self.architecture == "encoder-decoder":
            encoded = cast(Any, self.model).get_encoder()(**arguments).last_hidden_state  # more rows if repeated inside
            mask = mask.repeat(len(encoded) // len(mask), 1)
            start = ids.new_full((len(encoded), 1), int(self.config.decoder_start_token_id))
            arguments = {"encoder_outputs": (encoded,), "attention_mask": mask, "decoder_input_ids": start}
        if self.architecture != "encoder":
            arguments["use_cache"] = False
        hidden = cast(Tensor, self.model(**arguments).last_hidden_state)
        if self.architecture == "encoder-decoder":
            mask = mask.new_ones(hidden.shape[:2])
        elif len(hidden) != len(mask):
            mask = mask.repeat(len(hidden) // len(mask), 1)
        pooled = pool(hidden, mask, pooling)
        return pooled if pooled.dtype == torch.float64 else pooled.float()


def load_backbone(
    name_or_path: str, *, device: str = "cpu", dtype: str = "float32", cut: Cut | None = None
) -> FrozenBackbone:
    """Loads a hub model, a folder, a GGUF file or a packaged model (`minilm`, `smollm2`).

    Args:
        cut: where to split a decoder into bottom, trunk and top; then its LM head is loaded too.
    Raises:
        UnknownModel: nothing is there, or it can't be loaded as a transformer.
        ConfigError: a dtype that isn't float64, float32, bfloat16 or float16; a device that isn't here; a cut that the
            model doesn't allow.
    """
    place = find_device(device)  # before anything is read
    if dtype not in TORCH_DTYPES:
        raise ConfigError(f"There is no dtype {dtype!r} here.", remedy=f"Use one of: {', '.join(TORCH_DTYPES)}.")
    source = find_source(name_or_path)
    try:
        config = AutoConfig.from_pretrained(source.location, **source.arguments)
        _architecture(config)  # raises before any weights are read
        kind: Any = AutoModel
        if cut is not None:
            check_splittable(config)
            cut.check(layers_of(config))
            kind = AutoModelForCausalLM
        whole, loading = kind.from_pretrained(
            source.location, dtype=TORCH_DTYPES[dtype], output_loading_info=True, **source.arguments
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(source.location, **source.arguments)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnknownModel(
            f"The model {name_or_path!r} can't be loaded: {reason}",
            remedy="Name a hub model (with a network), a folder, a .gguf file, or minilm or smollm2.",
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise UnknownModel(
            f"The tokenizer of {name_or_path!r} has no form for the tokenizers library.",
            remedy="Convert it once with transformers and save the folder.",
        )
    missing = [name for name in sorted(loading["missing_keys"]) if not name.startswith("pooler.")]
    if missing:  # transformers would fill them with random numbers, other ones on every server
        raise UnknownModel(
            f"The checkpoint of {name_or_path!r} lacks {len(missing)} weights, e.g. {missing[0]}.",
            remedy="Host a complete pretrained model.",
        )
    whole = whole.to(place)
    model = whole if cut is None else whole.base_model
    if hasattr(model, "pooler"):
        model.pooler = None  # not part of the hidden states, and often not part of the checkpoint
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (config.pad_token_id or 0)
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    split = None if cut is None else SplitModel.of(whole.eval().requires_grad_(False), cut)
    return FrozenBackbone(model, source, backend.to_str(), int(pad), split)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, dtypes and bytes of all weights: equal exactly if the hosted weights are equal."""
    return tensors_sha256(model.state_dict())


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _architecture(config: Any) -> Architecture:
    if config.is_encoder_decoder:
        return "encoder-decoder"
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "encoder"
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "decoder"
    raise UnknownModel(
        f"Models of type {config.model_type!r} can't be hosted.",
        remedy="Use an encoder (BERT, RoBERTa, DeBERTa-v2), a decoder (Llama, OPT) or T5.",
    )


def _max_length(config: Any) -> int:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return 2**20  # relative positions only (T5): the server's own limit applies
    offset = int(config.pad_token_id) + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    return int(positions) - offset


_SEEDED = Lock()
"""Torch's random stream belongs to the process; two models' passes with dropout take turns."""


@contextmanager
def _randomness(model: nn.Module, seed: int | None) -> Generator[None]:
    """Dropout off; or on, from a stream that this call owns."""
    if seed is None:
        yield
        return
    with _SEEDED, torch.random.fork_rng():
        torch.manual_seed(seed)
        model.train()
        try:
            yield
        finally:
            model.eval()
