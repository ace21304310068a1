"""A frozen pretrained transformer that computes hidden states under n adapters at once: h(x, θ_1), …, h(x, θ_n).

The server uses it to answer requests, and the audit to recompute what a server could have computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
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

from blindtune.errors import (
    ConfigError,
    EmptyBatch,
    InvalidTensor,
    SequenceTooLong,
    UnknownModel,
    UnknownPart,
)
from blindtune.extras import requires
from blindtune.models.cut.parts import PARTS, Cut, CutModel, check_cuttable, layers_of
from blindtune.models.devices import find_device
from blindtune.models.lora import LoraLayout, LoraPass
from blindtune.models.readout import POOLINGS, check_readout, default_pooling, read_out
from blindtune.models.sources import ModelSource, find_source
from blindtune.wire import Architecture, CutInfo, Limits, ModelInfo, Pooling, Readout

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
        """Returns the batch as named tensors, as in messages and transcripts."""
        named = {"input_ids": self.input_ids, "lengths": self.lengths}
        return named if self.token_type_ids is None else {**named, "token_type_ids": self.token_type_ids}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> Tokens:
        """Returns the batch that `tensors` wrote."""
        return Tokens(tensors["input_ids"], tensors["lengths"], tensors.get("token_type_ids"))


class FrozenBackbone:
    """A pretrained model with frozen weights that runs n LoRA adapters in one pass.

    It is not thread-safe.
    """

    def __init__(
        self,
        model: nn.Module,
        source: ModelSource,
        tokenizer: str,
        pad_token_id: int,
        cut_model: CutModel | None = None,
    ) -> None:
        self.model: nn.Module = model.eval().requires_grad_(False)
        self.cut_model = cut_model
        """The same model with its LM head, cut into three parts; None if it was loaded without a cut."""
        self.source = source
        self.tokenizer = tokenizer
        """The tokenizer as JSON of the `tokenizers` library."""
        self.config: Any = model.config
        self.pad_token_id = pad_token_id
        self.architecture: Architecture = _architecture(self.config)
        self.lora = LoraPass(model)
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.max_length = _max_length(self.config)
        self.vocabulary_size = int(self.config.vocab_size)
        self.fingerprint = fingerprint(model)
        # OPT may project its hidden states to another size
        self.hidden_size = int(getattr(self.config, "word_embed_proj_dim", None) or self.config.hidden_size)
        self.states = self._count_states()
        """Number of states that a readout can choose from."""
        self._type_vocabulary = int(getattr(self.config, "type_vocab_size", 0) or 0)

    def info(self, name: str, limits: Limits) -> ModelInfo:
        """Returns the model's description for clients."""
        return ModelInfo(
            name=name,
            architecture=self.architecture,
            model_type=str(self.config.model_type),
            hidden_size=self.hidden_size,
            layers=len(self.lora.blocks),
            states=self.states,
            dtype=str(self.dtype).removeprefix("torch."),
            modules=self.lora.shapes,
            pooling=default_pooling(self.architecture, self.source.location),
            poolings=POOLINGS[self.architecture],
            token_type_ids=self._type_vocabulary > 1,
            pad_token_id=self.pad_token_id,
            fingerprint=self.fingerprint,
            base_model_name=self.source.name,
            limits=limits.model_copy(update={"max_length": min(limits.max_length, self.max_length)}),
            cut=self._cut_info(),
        )

    def require_cut(self) -> CutModel:
        """Returns the cut model.

        Raises:
            UnknownPart: the model was loaded without a cut.
        """
        if self.cut_model is None:
            raise UnknownPart(f"{self.source.name!r} is not cut here.", remedy="Load or serve it with a cut (--cut).")
        return self.cut_model

    def _cut_info(self) -> CutInfo | None:
        """Returns the description of the cut for clients; None if the model isn't cut."""
        if self.cut_model is None:
            return None
        cut, shared = self.cut_model.cut, self.cut_model.weights_shared()
        offered: list[str] = [part for part in PARTS if part != "trunk"]
        return CutInfo(bottom=cut.bottom, top=cut.top, parts=offered, weights_shared=round(shared, 4))

    def forward(
        self,
        tokens: Tokens,
        readout: Readout | Pooling,
        layout: LoraLayout | None = None,
        weights: Tensor | None = None,
        *,
        seed: int | None = None,
    ) -> Tensor:
        """Computes the hidden states h(x, θ_i) for n adapters.

        Args:
            readout: which states to return, and how they are pooled. A pooling alone means the last state.
            layout: the layers that the adapters change. Without it, the result is that of the frozen model, n = 1.
            weights: weight vectors `(n, P)`, on any device. With `(n, B, P)` each text has vectors of its own, so that
                one backward pass gives each text's gradients.
            seed: seed of dropout, which is off without one. All adapters share one random stream, so equal calls give
                equal results.
        Returns:
            `(n, B, k · d)` for k states, or `(n, B, L, k · d)` for pooling `none`; differentiable in `weights`;
            float32, or float64 from a model in float64.
        Raises:
            UnknownReadout: the model doesn't offer the readout.
            EmptyBatch, SequenceTooLong, InvalidTensor: the model can't process the tokens.
        """
        readout = readout if isinstance(readout, Readout) else Readout(pooling=readout)
        self.check_readout(readout)
        self.check_tokens(tokens)
        with _randomness(self.model, seed):
            if layout is None or weights is None:
                with torch.no_grad():
                    return self._run(tokens, readout, 1).unsqueeze(0)
            on_device = weights.to(self.device)
            with self.lora.adapters(layout, on_device, len(tokens), train=seed is not None) as repeat:
                hidden = self._run(tokens, readout, repeat)  # (n B, ...)
        return hidden.reshape(len(weights), len(tokens), *hidden.shape[1:])

    def check_readout(self, readout: Readout) -> None:
        """Raises `UnknownReadout` if the model doesn't offer the readout."""
        check_readout(readout, POOLINGS[self.architecture], self.states, self.hidden_size)

    def check_tokens(self, tokens: Tokens) -> None:
        """Raises `EmptyBatch`, `SequenceTooLong` or `InvalidTensor` for tokens that the model can't process.

        Without these checks the model would fail, or index outside its embeddings.
        """
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
                f"Token ids range from {int(ids.min())} to {int(ids.max())}; the vocabulary: {self.vocabulary_size}.",
                remedy="Use the tokenizer that the server offers.",
            )
        types = tokens.token_type_ids
        if types is not None and int(types.max()) >= max(self._type_vocabulary, 1):
            count = max(self._type_vocabulary, 1)
            raise InvalidTensor(
                f"There is a token type of {int(types.max())}; the model has {count}.",
                remedy=f"Send token types from 0 to {count - 1}.",
            )

    def _count_states(self) -> int:
        """Returns N + 1 for N blocks (of the decoder), or 1 for models whose states differ in size."""
        if self.hidden_size != int(self.config.hidden_size):
            return 1
        blocks = getattr(self.config, "num_decoder_layers", None) if self.architecture == "encoder-decoder" else None
        return 1 + int(blocks or self.config.num_hidden_layers)

    def _run(self, tokens: Tokens, readout: Readout, repeat: int) -> Tensor:
        """Returns what the readout asks for of the inputs, repeated `repeat` times, of the active adapters."""
        ids = tokens.input_ids.to(self.device, torch.long).repeat(repeat, 1)
        lengths = tokens.lengths.to(self.device, torch.long).repeat(repeat)
        mask = (torch.arange(ids.shape[1], device=self.device) < lengths.unsqueeze(1)).long()  # (B, L)
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if tokens.token_type_ids is not None and self._type_vocabulary > 1:
            arguments["token_type_ids"] = tokens.token_type_ids.to(self.device, torch.long).repeat(repeat, 1)
        if self.architecture == "encoder-decoder":
            # the encoder returns more rows than it gets if `LoraPass` repeats them at a later block
            encoded = cast(Any, self.model).get_encoder()(**arguments).last_hidden_state
            mask = mask.repeat(len(encoded) // len(mask), 1)
            start = ids.new_full((len(encoded), 1), int(self.config.decoder_start_token_id))
            arguments = {"encoder_outputs": (encoded,), "attention_mask": mask, "decoder_input_ids": start}
        if self.architecture != "encoder":
            arguments["use_cache"] = False
        below = [layer for layer in readout.layers if layer < self.states - 1]
        output = self.model(**arguments, output_hidden_states=bool(below))
        hidden = cast(Tensor, output.last_hidden_state)
        if self.architecture == "encoder-decoder":
            mask = mask.new_ones(hidden.shape[:2])
        elif len(hidden) != len(mask):
            mask = mask.repeat(len(hidden) // len(mask), 1)
        kept: Any = None
        if below:
            kept = output.decoder_hidden_states if self.architecture == "encoder-decoder" else output.hidden_states
        # states below the first adapted block have one row for each text, which all adapters share
        lower = [_all_rows(cast(Tensor, kept[layer]), len(hidden)) for layer in below]
        upper = [] if readout.layers and len(below) == len(readout.layers) else [hidden]
        pooled = read_out([*lower, *upper], mask, readout)
        return pooled if pooled.dtype == torch.float64 else pooled.float()


def _all_rows(states: Tensor, rows: int) -> Tensor:
    """Returns states `(B, L, d)` repeated to `rows` rows, adapter-major."""
    return states if len(states) == rows else states.repeat(rows // len(states), 1, 1)


def load_backbone(
    name_or_path: str, *, device: str = "cpu", dtype: str = "float32", cut: Cut | None = None
) -> FrozenBackbone:
    """Loads a hub model, a folder, a GGUF file or a packaged model (`minilm`, `smollm2`).

    Args:
        cut: where to cut a decoder into bottom, trunk and top. With it, the LM head is loaded too.
    Raises:
        UnknownModel: there is no such model, or it can't be loaded as a transformer.
        ConfigError: the dtype isn't float64, float32, bfloat16 or float16; the device isn't available; or the model
            doesn't allow the cut.
    """
    torch_device = find_device(device)  # fails before any file is read
    if dtype not in TORCH_DTYPES:
        raise ConfigError(f"There is no dtype {dtype!r} here.", remedy=f"Use one of: {', '.join(TORCH_DTYPES)}.")
    source = find_source(name_or_path)
    if source.gguf_file is not None:
        with requires("server", "A .gguf file"):
            import_module("gguf")  # transformers needs it to read such files
    try:
        config = AutoConfig.from_pretrained(source.location, **source.arguments)
        _architecture(config)  # raises before any weights are read
        kind: Any = AutoModel
        if cut is not None:
            check_cuttable(config)
            cut.check(layers_of(config))
            kind = AutoModelForCausalLM
        whole, loading = kind.from_pretrained(
            source.location, config=config, dtype=TORCH_DTYPES[dtype], output_loading_info=True, **source.arguments
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
    if missing:  # transformers would initialise them at random, differently on every server
        raise UnknownModel(
            f"The checkpoint of {name_or_path!r} lacks {len(missing)} weights, e.g. {missing[0]}.",
            remedy="Host a complete pretrained model.",
        )
    whole = whole.to(torch_device)
    model = whole if cut is None else whole.base_model
    if hasattr(model, "pooler"):
        model.pooler = None  # not part of the hidden states, and often not part of the checkpoint
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (config.pad_token_id or 0)
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    cut_model = None if cut is None else CutModel.of(whole.eval().requires_grad_(False), cut)
    return FrozenBackbone(model, source, backend.to_str(), int(pad), cut_model)


def fingerprint(model: nn.Module) -> str:
    """Returns the SHA-256 over names, dtypes, shapes and bytes of all weights. It identifies the hosted weights."""
    return tensors_sha256(model.state_dict())


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 over the tensors' names, dtypes, shapes and bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _architecture(config: Any) -> Architecture:
    """Returns a model's architecture. Raises `UnknownModel` for model types that can't be hosted."""
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
    """Returns the largest number of tokens in a sequence that the model can process."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return 2**20  # relative positions only (T5): the server's own limit applies
    offset = int(config.pad_token_id) + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    return int(positions) - offset


_SEEDED = Lock()
"""Lock held during a pass with dropout, because all threads of the process share torch's default generator."""


@contextmanager
def _randomness(model: nn.Module, seed: int | None) -> Generator[None]:
    """Context manager for one pass: with a seed, dropout is on and draws from a generator with this seed alone."""
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
