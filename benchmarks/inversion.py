"""Optimizer inversion needs each text's gradient: with adapters of its own for each text, against text by text."""

from __future__ import annotations

import torch
from peft import LoraConfig
from torch import Tensor

from benchmarks.common import BATCH, MODEL, interleaved, ratio, sentences, write
from blindtune.models import LoraAdapter, Tokenizer, Tokens, load_backbone
from blindtune.wire import Limits


def main() -> None:
    torch.set_num_threads(1)
    backbone = load_backbone(MODEL)
    texts, _ = sentences(BATCH)
    tokenizer = Tokenizer(backbone.tokenizer, pad_token_id=backbone.pad_token_id, with_types=True)
    rows = tokenizer.rows(texts, max_length=24)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], layers_to_transform=[4, 5])
    adapter = LoraAdapter(config, backbone.info(MODEL, Limits()))
    weights, cotangent = adapter.vector().detach().unsqueeze(0), torch.randn(1, 1, backbone.hidden_size)

    def gradients(batch: Tokens, copies: Tensor) -> Tensor:
        hidden = backbone.forward(batch, "mean", adapter.layout, copies.requires_grad_())
        return torch.autograd.grad(hidden, copies, cotangent.expand_as(hidden))[0]

    def together() -> None:
        gradients(tokenizer.pad(rows), weights.unsqueeze(1).repeat(1, BATCH, 1))

    def one_by_one() -> None:
        for row in rows:
            gradients(tokenizer.pad([row]), weights.clone())

    seconds = interleaved({"together": together, "one by one": one_by_one}, 15)
    write(
        "inversion",
        {"gradients of each of 32 texts: in one pass / text by text": ratio(seconds, "together", "one by one")},
    )


if __name__ == "__main__":
    main()
