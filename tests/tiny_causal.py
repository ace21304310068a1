"""Small random decoders with an LM head, deep enough to be cut in three, saved for `load_backbone`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.tiny import END, HEADS, HIDDEN, PAD, POSITIONS, SPREAD, START, VOCABULARY, build_tokenizer

FAMILIES = ("llama", "opt", "qwen2", "qwen3", "mistral")


def build_tiny_causal(name: str, seed: int = 0, layers: int = 5) -> PreTrainedModel:
    """`llama` (head and embeddings tied), `opt` (tied, with projections), `qwen2`, `qwen3`, `mistral` (a head of
    their own; mistral's attention ends after 8 tokens)."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": layers, "pad_token_id": PAD}
    special = {"bos_token_id": START, "eos_token_id": END}
    attention = {**sizes, **special, "num_attention_heads": HEADS, "max_position_embeddings": POSITIONS}
    wide = {**attention, "intermediate_size": 2 * HIDDEN, "num_key_value_heads": 2, "initializer_range": SPREAD}
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**wide, tie_word_embeddings=True))
    if name == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**wide, tie_word_embeddings=False))
    if name == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**wide, head_dim=HIDDEN // HEADS, tie_word_embeddings=False))
    if name == "mistral":
        return MistralForCausalLM(MistralConfig(**wide, sliding_window=8, tie_word_embeddings=False))
    if name == "opt":
        projected = {"ffn_dim": 2 * HIDDEN, "word_embed_proj_dim": HIDDEN // 2, "init_std": SPREAD}
        return OPTForCausalLM(OPTConfig(**attention, **projected))
    raise ValueError(name)


def save_tiny_causal(name: str, folder: Path, texts: Sequence[str], seed: int = 0, layers: int = 5) -> Path:
    """Saves one of `build_tiny_causal` with a tokenizer of the words of `texts`; returns the folder."""
    model = build_tiny_causal(name, seed, layers)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, SPREAD)  # biases start at zero, where mistakes about them don't show
    model.save_pretrained(folder)
    build_tokenizer(texts, start=True, end=False).save_pretrained(folder)
    return folder
