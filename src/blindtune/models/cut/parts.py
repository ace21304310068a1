"""A decoder cut into three parts: bottom (embeddings, first blocks), trunk (the middle), top (last blocks, LM head).

    tokens ──▶ bottom ──▶ s_A ──▶ trunk ──▶ s_B ──▶ top ──▶ logits

Each part is an instance of the model's own class in transformers without the modules of the other parts. So it computes
bit for bit what the whole model computes in these blocks, and its weights have the same names as in the whole model.
The final norm belongs to the top.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from blindtune.errors import CheckpointError, ConfigError

PartName = Literal["bottom", "trunk", "top"]
PARTS: tuple[PartName, ...] = get_args(PartName)
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
CUTTABLE = (*LLAMA_LIKE, "opt")


@dataclass(frozen=True)
class Cut:
    """The numbers of blocks in the bottom and in the top. The trunk has all other blocks."""

    bottom: int
    top: int

    def check(self, layers: int) -> None:
        """Raises `ConfigError` unless each of the three parts of a model with `layers` blocks has a block."""
        if min(self.bottom, self.top) < 1 or self.bottom + self.top >= layers:
            raise ConfigError(
                f"A bottom of {self.bottom} and a top of {self.top} blocks, of {layers}: every part needs a block.",
                remedy=f"Use numbers of at least 1 that add up to at most {layers - 1}.",
            )

    def blocks(self, part: PartName, layers: int) -> range:
        """Returns the indices of a part's blocks in the whole model."""
        first, last = {
            "bottom": (0, self.bottom),
            "trunk": (self.bottom, layers - self.top),
            "top": (layers - self.top, layers),
        }[part]
        return range(first, last)


class Part(nn.Module):
    """One part of a cut decoder, or an emulator of its trunk.

    Attributes:
        causal: an instance of the model's own class without the modules of the other parts.
        name: `bottom`, `trunk` or `top`; an emulator's is `trunk`.
        blocks: indices of its blocks in the whole model; consecutive, except in an emulator.
    """

    def __init__(self, causal: nn.Module, name: PartName, blocks: Sequence[int]) -> None:
        super().__init__()
        self.causal, self.name, self.blocks = causal, name, blocks

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """Returns the part's hidden states `(B, L, d)`; the top's are the inputs of the LM head.

        Args:
            inputs: tokens `(B, L)` for the bottom, hidden states `(B, L, d)` for the other parts.
            lengths: number of tokens of each example, `(B,)`; positions to the right are padding.
        """
        mask = padding_mask(lengths, inputs.shape[1]).to(inputs.device)
        arguments = {"input_ids": inputs} if self.name == "bottom" else {"inputs_embeds": inputs}
        arguments |= {"attention_mask": mask, "use_cache": False}
        return cast(Tensor, decoder_of(self.causal)(**arguments).last_hidden_state)

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the logits `(…, V)` for the top's hidden states `(…, d)`."""
        return cast(Tensor, cast(Any, self.causal).lm_head(hidden))

    @property
    def device(self) -> torch.device:
        """The device of the part's weights."""
        return next(self.parameters()).device

    def embeddings(self) -> Tensor:
        """Returns the bottom's frozen embeddings of all tokens, `(V, d)`."""
        vocabulary = int(cast(Any, self.causal).config.vocab_size)
        return self.embed(torch.arange(vocabulary, device=self.device))

    def embed(self, ids: Tensor) -> Tensor:
        """Returns the bottom's frozen embeddings `(…, d)` of token ids `(…)`."""
        return cast(Tensor, decoder_of(self.causal).embed_tokens(ids))

    def weights(self) -> dict[str, Tensor]:
        """Returns this part's tensors under the whole model's names, without a head that is tied to the embeddings."""
        tied = _tied(self.causal)
        return {
            name: tensor
            for name, tensor in self.causal.state_dict().items()
            if not (tied and self.name == "top" and name == HEAD)
        }


HEAD = "lm_head.weight"


@dataclass(frozen=True)
class CutModel:
    """A whole causal language model and its three parts, which share its memory."""

    causal: nn.Module
    cut: Cut
    parts: dict[PartName, Part]

    @staticmethod
    def of(causal: nn.Module, cut: Cut) -> CutModel:
        """Cuts a causal language model. Raises `ConfigError` as `cut_model` does."""
        return CutModel(causal, cut, cut_model(causal, cut))

    @property
    def config(self) -> Any:
        """The model's configuration in transformers."""
        return cast(Any, self.causal).config

    def weights_shared(self) -> float:
        """Returns the fraction of the model's weights that is in the bottom and the top."""
        ends = sum(t.numel() for name in ("bottom", "top") for t in self.parts[name].weights().values())
        return ends / (ends + sum(t.numel() for t in self.parts["trunk"].weights().values()))


class _Absent(nn.Module):
    """Replaces a block of another part: returns its input."""

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden_states


class _NoPositions(nn.Module):
    """Replaces OPT's position embeddings in trunk and top, whose inputs already include them: returns zero."""

    def forward(self, mask: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return torch.zeros((), device=mask.device)


def padding_mask(lengths: Tensor, length: int) -> Tensor:
    """Returns the attention mask `(B, L)`: 1 for tokens, 0 for padding."""
    return (torch.arange(length, device=lengths.device) < lengths.unsqueeze(1)).long()


def pad_rows(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Returns the right-padded ids `(B, L)`, with zeros as padding, and the lengths `(B,)` of token rows."""
    lengths = torch.tensor([len(row) for row in rows])
    return unpack(torch.tensor([token for row in rows for token in row]), lengths), lengths


def pack(padded: Tensor, lengths: Tensor) -> Tensor:
    """Removes padding: `(B, L, …)` becomes `(N, …)`, the tokens of all examples one after the other."""
    return padded[padding_mask(lengths, padded.shape[1]).bool()]


def unpack(packed: Tensor, lengths: Tensor) -> Tensor:
    """The inverse of `pack`: `(N, d)` becomes `(B, L, d)`, with zeros as padding. Differentiable."""
    length = int(lengths.max())
    padded = packed.new_zeros(len(lengths), length, *packed.shape[1:])
    return padded.masked_scatter(_as_mask(lengths, length, packed), packed)


def _as_mask(lengths: Tensor, length: int, packed: Tensor) -> Tensor:
    """Returns a boolean padding mask that broadcasts to `(B, L, …)`."""
    mask = padding_mask(lengths, length).bool().to(packed.device)
    return mask.reshape(*mask.shape, *(1 for _ in packed.shape[1:]))


def answer_scores(logits: Tensor, targets: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Scores each text's answer, the tokens that training learns to predict.

    Args:
        logits, targets: `(T, V)` and `(T,)`, for the answer tokens of all texts one after the other.
        counts: number of answer tokens of each text, `(B,)`.
    Returns:
        The sum of log p over each answer's tokens `(B,)`, in nats, and whether each of its tokens is the likeliest one
        `(B,)`.
    """
    losses = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    hits = logits.argmax(-1) == targets
    sizes: list[int] = counts.tolist()
    return (
        torch.stack([-part.sum() for part in losses.split(sizes)]),
        torch.stack([part.all() for part in hits.split(sizes)]),
    )


def decoder_of(causal: nn.Module) -> Any:
    """Returns the module that contains the blocks and the embeddings."""
    model = cast(Any, causal).model
    return model.decoder if causal_type(causal) == "opt" else model


def blocks_name(causal: nn.Module) -> str:
    """Returns the name of the list of blocks in the whole model, such as `model.layers`."""
    blocks = decoder_of(causal).layers
    return next(name for name, module in causal.named_modules() if module is blocks)


def causal_type(causal: nn.Module) -> str:
    """Returns the model family's name in transformers, such as `llama`."""
    return str(cast(Any, causal).config.model_type)


def check_cuttable(config: Any) -> None:
    """Raises `ConfigError` for model families that can't be cut."""
    if config.model_type not in CUTTABLE:
        raise ConfigError(
            f"Models of type {config.model_type!r} can't be cut into bottom, trunk and top.",
            remedy=f"Use a decoder of one of these families: {', '.join(CUTTABLE)}.",
        )


def layers_of(config: Any) -> int:
    """Returns the number of a model's blocks."""
    return int(config.num_hidden_layers)


def cut_model(causal: nn.Module, cut: Cut) -> dict[PartName, Part]:
    """Returns the three parts of a causal language model. They share its modules: no weight is copied.

    Raises:
        ConfigError: the cut is out of range, or models of this family can't be cut.
    """
    config = cast(Any, causal).config
    check_cuttable(config)
    cut.check(layers_of(config))
    return {name: _part(config, name, cut, causal) for name in PARTS}


def build_part(
    config: PretrainedConfig,
    name: PartName,
    cut: Cut,
    weights: Mapping[str, Tensor],
    *,
    blocks: Sequence[int] | None = None,
) -> Part:
    """Builds one part alone, frozen, from the tensors of `Part.weights`. For a tied head see `tie`.

    Args:
        blocks: indices of the blocks in the whole model, if they aren't all of the part's blocks.
    Raises:
        ConfigError: the cut is out of range, or models of this family can't be cut.
        CheckpointError: weights are missing, superfluous or of another shape.
    """
    check_cuttable(config)
    cut.check(layers_of(config))
    part = _part(config, name, cut, None, blocks)
    expected = part.weights()
    wrong = sorted(set(expected) ^ set(weights))
    wrong += [key for key, tensor in expected.items() if key in weights and weights[key].shape != tensor.shape]
    if wrong:
        raise CheckpointError(
            f"The {name} of this model doesn't fit its weights, e.g. {wrong[0]}.", remedy="Ask for the part again."
        )
    part.causal.load_state_dict(dict(weights), strict=False, assign=True)
    return part.requires_grad_(False)


def tie(bottom: Part, top: Part) -> None:
    """Makes the top's LM head share the bottom's embeddings, if the model ties them."""
    if _tied(top.causal):
        cast(Any, top.causal).lm_head.weight = decoder_of(bottom.causal).embed_tokens.weight


def _tied(causal: nn.Module) -> bool:
    """Returns whether the model's LM head shares the weights of its embeddings."""
    return bool(cast(Any, causal).config.tie_word_embeddings)


def thin_trunk(causal: nn.Module, cut: Cut, blocks: Sequence[int]) -> Part:
    """Returns the trunk with only these blocks (indices in the whole model). It shares the model's modules."""
    return _part(cast(Any, causal).config, "trunk", cut, causal, blocks)


def _part(config: Any, name: PartName, cut: Cut, source: nn.Module | None, blocks: Sequence[int] | None = None) -> Part:
    """Builds a part with the modules of the whole model `source`, or with empty modules on the meta device."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(config)
    decoder, whole = decoder_of(skeleton), None if source is None else decoder_of(source)
    blocks = cut.blocks(name, layers_of(config)) if blocks is None else blocks
    for index in range(layers_of(config)):
        if index not in blocks:
            decoder.layers[index] = _Absent()
        elif whole is not None:
            decoder.layers[index] = whole.layers[index]
    opt = causal_type(skeleton) == "opt"
    norm = "final_layer_norm" if opt else "norm"
    kept = {"embed_tokens": name == "bottom", norm: name == "top"}
    if opt:
        kept |= {"embed_positions": name == "bottom", "project_in": name == "bottom", "project_out": name == "top"}
    for attribute, keep in kept.items():
        if not keep:
            setattr(decoder, attribute, _replacement(attribute))
        elif whole is not None:
            setattr(decoder, attribute, getattr(whole, attribute))
    if not opt:  # rotary embeddings have no weights: their frequencies are computed from the configuration
        decoder.rotary_emb = type(decoder.rotary_emb)(config=config) if whole is None else whole.rotary_emb
    if name != "top":
        skeleton.lm_head = None
    elif source is not None:
        skeleton.lm_head = cast(Any, source).lm_head
    return Part(skeleton.eval(), name, blocks)


def _replacement(attribute: str) -> nn.Module | None:
    """Returns the module that replaces one that a part doesn't have."""
    if attribute == "norm":
        return nn.Identity()
    return _NoPositions() if attribute == "embed_positions" else None


def config_from_json(text: str) -> PretrainedConfig:
    """Parses the configuration that a provider sent. Only the families in `CUTTABLE` are accepted, so no code is run.

    Raises:
        ConfigError: the configuration is of another family.
    """
    fields = json.loads(text)
    kind = fields.pop("model_type", None)
    if kind not in CUTTABLE:
        raise ConfigError(f"Models of type {kind!r} can't be cut.", remedy=f"Known: {', '.join(CUTTABLE)}.")
    return AutoConfig.for_model(kind, **fields)
