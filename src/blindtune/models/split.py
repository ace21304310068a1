"""A decoder in three parts: bottom (embeddings, first blocks), trunk (the middle), top (last blocks, norm, LM head).

    tokens ──▶ bottom ──▶ s_A ──▶ trunk ──▶ s_B ──▶ top ──▶ logits

Each part is the model's own class in transformers with the other parts' modules taken out, so it computes what the
whole model computes there, bit for bit, and its weights keep the names that they have in the whole model.
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
SPLITTABLE = (*LLAMA_LIKE, "opt")


@dataclass(frozen=True)
class Cut:
    """Blocks of the bottom and of the top; the trunk has the rest.

    Raises:
        ConfigError: see `check`.
    """

    bottom: int
    top: int

    def check(self, layers: int) -> None:
        """Raises `ConfigError` unless all three parts have a block."""
        if min(self.bottom, self.top) < 1 or self.bottom + self.top >= layers:
            raise ConfigError(
                f"A bottom of {self.bottom} and a top of {self.top} blocks, of {layers}: every part needs a block.",
                remedy=f"Use numbers of at least 1 that add up to at most {layers - 1}.",
            )

    def blocks(self, part: PartName, layers: int) -> range:
        """Indices of a part's blocks in the whole model."""
        first, last = {
            "bottom": (0, self.bottom),
            "trunk": (self.bottom, layers - self.top),
            "top": (layers - self.top, layers),
        }[part]
        return range(first, last)


class Part(nn.Module):
    """Blocks of a decoder: consecutive ones, or a trunk's that an emulator keeps.

    Attributes:
        causal: the model's own class, with the other parts' modules taken out.
        blocks: their indices in the whole model.
    """

    def __init__(self, causal: nn.Module, name: PartName, blocks: Sequence[int]) -> None:
        super().__init__()
        self.causal, self.name, self.blocks = causal, name, blocks

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """From tokens `(B, L)` (bottom) or hidden states `(B, L, d)` to hidden states; of the top, what the head reads.

        Args:
            lengths: `(B,)`, tokens of each example; what stands to the right of them is padding.
        """
        mask = padding_mask(lengths, inputs.shape[1]).to(inputs.device)
        given = {"input_ids": inputs} if self.name == "bottom" else {"inputs_embeds": inputs}
        given |= {"attention_mask": mask, "use_cache": False}
        return cast(Tensor, decoder_of(self.causal)(**given).last_hidden_state)

    def logits(self, hidden: Tensor) -> Tensor:
        """`(…, V)` for the top's hidden states `(…, d)`."""
        return cast(Tensor, cast(Any, self.causal).lm_head(hidden))

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.parameters()).device

    def embeddings(self) -> Tensor:
        """The bottom's frozen embeddings of all tokens, `(V, d)`."""
        vocabulary = int(cast(Any, self.causal).config.vocab_size)
        return self.embed(torch.arange(vocabulary, device=self.device))

    def embed(self, ids: Tensor) -> Tensor:
        """The bottom's frozen token embeddings, `(…, d)`."""
        return cast(Tensor, decoder_of(self.causal).embed_tokens(ids))

    def weights(self) -> dict[str, Tensor]:
        """This part's tensors under the whole model's names; a head that shares the embeddings' memory is left out."""
        tied = _tied(self.causal)
        return {
            name: tensor
            for name, tensor in self.causal.state_dict().items()
            if not (tied and self.name == "top" and name == HEAD)
        }


HEAD = "lm_head.weight"


@dataclass(frozen=True)
class SplitModel:
    """A causal language model, whole, and its three parts, which share its memory."""

    causal: nn.Module
    cut: Cut
    parts: dict[PartName, Part]

    @staticmethod
    def of(causal: nn.Module, cut: Cut) -> SplitModel:
        """Raises `ConfigError` as `cut_model`."""
        return SplitModel(causal, cut, cut_model(causal, cut))

    @property
    def config(self) -> Any:
        return cast(Any, self.causal).config

    def weights_shared(self) -> float:
        """Part of the weights that bottom and top hold, by number."""
        ends = sum(t.numel() for name in ("bottom", "top") for t in self.parts[name].weights().values())
        return ends / (ends + sum(t.numel() for t in self.parts["trunk"].weights().values()))


class _Absent(nn.Module):
    """Where another part's block was: hands on what it gets."""

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden_states


class _NoPositions(nn.Module):
    """Where OPT adds positions to what is embedded: they have been added already."""

    def forward(self, mask: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return torch.zeros((), device=mask.device)


def padding_mask(lengths: Tensor, length: int) -> Tensor:
    """`(B, L)`: 1 where there is a token."""
    return (torch.arange(length, device=lengths.device) < lengths.unsqueeze(1)).long()


def pad_rows(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids `(B, L)` (0 where there is padding) and lengths `(B,)` of token rows."""
    lengths = torch.tensor([len(row) for row in rows])
    return unpack(torch.tensor([token for row in rows for token in row]), lengths), lengths


def pack(padded: Tensor, lengths: Tensor) -> Tensor:
    """`(B, L, …)` to `(N, …)`: the tokens of all examples one after the other, without padding."""
    return padded[padding_mask(lengths, padded.shape[1]).bool()]


def unpack(packed: Tensor, lengths: Tensor) -> Tensor:
    """The inverse of `pack`: `(N, d)` to `(B, L, d)`, zero where there is padding. Differentiable."""
    length = int(lengths.max())
    padded = packed.new_zeros(len(lengths), length, *packed.shape[1:])
    return padded.masked_scatter(_as_mask(lengths, length, packed), packed)


def _as_mask(lengths: Tensor, length: int, packed: Tensor) -> Tensor:
    mask = padding_mask(lengths, length).bool().to(packed.device)
    return mask.reshape(*mask.shape, *(1 for _ in packed.shape[1:]))


def answer_scores(logits: Tensor, targets: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """log p of each text's learned tokens together `(B,)`, and whether each of them is the likeliest one `(B,)`.

    Args:
        logits, targets: `(T, V)` and `(T,)`, of the learned tokens of all texts one after the other.
        counts: `(B,)`, learned tokens of each text.
    """
    losses = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    hits = logits.argmax(-1) == targets
    sizes: list[int] = counts.tolist()
    return (
        torch.stack([-part.sum() for part in losses.split(sizes)]),
        torch.stack([part.all() for part in hits.split(sizes)]),
    )


def decoder_of(causal: nn.Module) -> Any:
    """The module that holds blocks and embeddings."""
    model = cast(Any, causal).model
    return model.decoder if causal_type(causal) == "opt" else model


def blocks_name(causal: nn.Module) -> str:
    """The name of the list of blocks in the whole model, such as `model.layers`."""
    blocks = decoder_of(causal).layers
    return next(name for name, module in causal.named_modules() if module is blocks)


def causal_type(causal: nn.Module) -> str:
    return str(cast(Any, causal).config.model_type)


def check_splittable(config: Any) -> None:
    """Raises `ConfigError` for models that have no decoder stack that we know how to cut."""
    if config.model_type not in SPLITTABLE:
        raise ConfigError(
            f"Models of type {config.model_type!r} can't be split into bottom, trunk and top.",
            remedy=f"Use a decoder of one of these families: {', '.join(SPLITTABLE)}.",
        )


def layers_of(config: Any) -> int:
    return int(config.num_hidden_layers)


def cut_model(causal: nn.Module, cut: Cut) -> dict[PartName, Part]:
    """The three parts of a causal language model. They share its modules: no weight is copied.

    Raises:
        ConfigError: cuts out of range, or a family that isn't known.
    """
    config = cast(Any, causal).config
    check_splittable(config)
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
    """A part of its own, from tensors as `Part.weights` gives them. A tied head is the embeddings' memory: see `tie`.

    Args:
        blocks: indices in the whole model, if not all of the part's blocks are there.
    Raises:
        ConfigError: cuts out of range, or a family that isn't known.
        CheckpointError: weights that are missing, superfluous or of another shape.
    """
    check_splittable(config)
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
    """Gives the top's head the bottom's embeddings, if the model ties them."""
    if _tied(top.causal):
        cast(Any, top.causal).lm_head.weight = decoder_of(bottom.causal).embed_tokens.weight


def _tied(causal: nn.Module) -> bool:
    return bool(cast(Any, causal).config.tie_word_embeddings)


def thin_trunk(causal: nn.Module, cut: Cut, blocks: Sequence[int]) -> Part:
    """The trunk with these blocks only (indices in the whole model). It shares the model's modules."""
    return _part(cast(Any, causal).config, "trunk", cut, causal, blocks)


def _part(config: Any, name: PartName, cut: Cut, source: nn.Module | None, blocks: Sequence[int] | None = None) -> Part:
    """The skeleton of a part with the modules of `source`, or with empty ones (on no device)."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(config)
    own, theirs = decoder_of(skeleton), None if source is None else decoder_of(source)
    blocks = cut.blocks(name, layers_of(config)) if blocks is None else blocks
    for index in range(layers_of(config)):
        if index not in blocks:
            own.layers[index] = _Absent()
        elif theirs is not None:
            own.layers[index] = theirs.layers[index]
    opt = causal_type(skeleton) == "opt"
    norm = "final_layer_norm" if opt else "norm"
    kept = {"embed_tokens": name == "bottom", norm: name == "top"}
    if opt:
        kept |= {"embed_positions": name == "bottom", "project_in": name == "bottom", "project_out": name == "top"}
    for attribute, keep in kept.items():
        if not keep:
            setattr(own, attribute, _replacement(attribute))
        elif theirs is not None:
            setattr(own, attribute, getattr(theirs, attribute))
    if not opt:  # its frequencies follow from the configuration
        own.rotary_emb = type(own.rotary_emb)(config=config) if theirs is None else theirs.rotary_emb
    if name != "top":
        skeleton.lm_head = None
    elif source is not None:
        skeleton.lm_head = cast(Any, source).lm_head
    return Part(skeleton.eval(), name, blocks)


def _replacement(attribute: str) -> nn.Module | None:
    if attribute == "norm":
        return nn.Identity()
    return _NoPositions() if attribute == "embed_positions" else None


def config_from_json(text: str) -> PretrainedConfig:
    """The configuration that a provider sent; of the families above, never code.

    Raises:
        ConfigError: another family.
    """
    fields = json.loads(text)
    kind = fields.pop("model_type", None)
    if kind not in SPLITTABLE:
        raise ConfigError(f"Models of type {kind!r} can't be split.", remedy=f"Known: {', '.join(SPLITTABLE)}.")
    return AutoConfig.for_model(kind, **fields)
