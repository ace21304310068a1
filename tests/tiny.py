"""Small random models of every supported architecture, saved as folders that `load_backbone` takes.

The weights are larger than at a usual initialisation, so that every layer, and every adapter on it, changes the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    LlamaConfig,
    LlamaModel,
    OPTConfig,
    OPTModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
)

PAD, START, END, UNKNOWN = 0, 1, 2, 3
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
VOCABULARY = 600
HIDDEN, LAYERS, HEADS, POSITIONS = 32, 3, 4, 64
SPREAD = 0.15
"""Standard deviation of the weights."""


def build_tokenizer(texts: Sequence[str], *, start: bool, end: bool) -> PreTrainedTokenizerFast:
    """Words of `texts`, with the special tokens around them that the architecture expects."""
    backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL))
    first, last = ["[CLS]"] * start, ["[SEP]"] * end
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join([*first, "$A", *last]),
        pair=" ".join([*first, "$A", *last, "$B:1", *(f"{token}:1" for token in last)]),
        special_tokens=[("[CLS]", START), ("[SEP]", END)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )


def build_model(name: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "pad_token_id": PAD}
    attention = {**sizes, "num_attention_heads": HEADS, "initializer_range": SPREAD}
    wide = {**attention, "intermediate_size": 2 * HIDDEN, "max_position_embeddings": POSITIONS}
    if name == "bert":
        return BertModel(BertConfig(**wide), add_pooling_layer=False)
    if name == "roberta":
        config = RobertaConfig(**{**wide, "max_position_embeddings": POSITIONS + PAD + 1, "type_vocab_size": 1})
        return RobertaModel(config, add_pooling_layer=False)
    if name.startswith("deberta"):
        relative = {
            "relative_attention": True,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "type_vocab_size": 0,
        }
        convolution = {"conv_kernel_size": 3, "conv_act": "gelu"} if name == "deberta-conv" else {}
        return DebertaV2Model(DebertaV2Config(**wide, **relative, **convolution))
    if name == "t5":
        size = {"d_model": HIDDEN, "d_kv": HIDDEN // HEADS, "d_ff": 2 * HIDDEN, "num_heads": HEADS}
        depth = {"num_layers": LAYERS, "num_decoder_layers": LAYERS, "vocab_size": VOCABULARY}
        special = {"pad_token_id": PAD, "decoder_start_token_id": PAD, "eos_token_id": END}
        return T5Model(T5Config(**size, **depth, **special, feed_forward_proj="gated-gelu", initializer_factor=2.0))
    if name == "llama":
        return LlamaModel(LlamaConfig(**wide, num_key_value_heads=2, bos_token_id=START, eos_token_id=END))
    if name == "opt":
        config = OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            ffn_dim=2 * HIDDEN,
            word_embed_proj_dim=HIDDEN // 2,
            max_position_embeddings=POSITIONS,
            pad_token_id=PAD,
            bos_token_id=START,
            eos_token_id=END,
            init_std=SPREAD,
        )
        return OPTModel(config)
    raise ValueError(name)


NAMES = ("bert", "roberta", "deberta", "deberta-conv", "t5", "llama", "opt")


def save_tiny_model(name: str, folder: Path, texts: Sequence[str], seed: int = 0) -> Path:
    model = build_model(name, seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, SPREAD)  # biases start at zero, where mistakes about them don't show
    model.save_pretrained(folder)
    decoder = name in ("llama", "opt")
    build_tokenizer(texts, start=name != "t5", end=not decoder).save_pretrained(folder)
    return folder


def build_tiny_models(folder: Path, texts: Sequence[str]) -> dict[str, Path]:
    return {name: save_tiny_model(name, folder / name, texts) for name in NAMES}
