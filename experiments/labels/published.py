"""P3EFT's own measure: what each adapter's activations reveal at the last step, on training and on validation texts.

Shifts and the difference of two adapters, which the paper doesn't measure, are scored in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from blindtune.audit.labels.published import worst_adapter
from blindtune.audit.observe import Features, View
from blindtune.audit.recompute import Recomputation, adapter_weights
from blindtune.data import Examples
from blindtune.models import FrozenBackbone, Tokenizer
from blindtune.wire import Pooling


def published(
    backbone: FrozenBackbone, view: View, parts: dict[str, Examples], most: int, max_length: int
) -> dict[str, Any]:
    """Part of the data -> channel -> measure, with the newest adapters that an operator received.

    Args:
        parts: examples by the name of the part.
        most: random examples to score of each part.
    """
    layout = Recomputation(backbone).layout(view)
    weights = adapter_weights(view, layout, view.moving[-1].adapters)
    found: dict[str, Any] = {}
    for name, examples in parts.items():
        chosen = np.random.default_rng(0).permutation(len(examples))[:most]
        texts = [examples.texts[index] for index in chosen]
        labels = np.array(examples.labels, dtype=np.int64)[chosen]
        hidden, frozen = (
            _run(backbone, texts, view.readout, max_length, *adapters) for adapters in ((layout, weights), ())
        )
        channels = {"activations": hidden, "shifts": hidden - frozen, "frozen": frozen}
        if len(hidden) > 1:
            channels["differences"] = hidden[:1] - hidden[1:]
        found[name] = {
            "texts": len(chosen),
            **{channel: _rounded(worst_adapter(vectors, labels)) for channel, vectors in channels.items()},
            "spread": round(float(np.std(hidden - frozen)), 4),
            "frozen spread": round(float(np.std(frozen - frozen.mean(1, keepdims=True))), 4),
        }
    return found


def binary_f1(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """GLUE's F1 of the second class."""
    hits = int(((predicted == 1) & (labels == 1)).sum())
    return 2 * hits / max(1, int((predicted == 1).sum()) + int((labels == 1).sum()))


def _rounded(measures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in measures.items()}


def _run(backbone: FrozenBackbone, texts: Sequence[Any], pooling: Pooling, max_length: int, *adapters: Any) -> Features:
    """Hidden states `(n, N, d)` of texts; n = 1 without adapters."""
    tokenizer = Tokenizer(backbone.tokenizer, pad_token_id=backbone.pad_token_id, with_types=True)
    rows = tokenizer.rows(texts, max_length=max_length)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    found: list[Any] = [None] * len(rows)
    for start in range(0, len(order), 64):
        part = order[start : start + 64]
        with torch.no_grad():
            hidden = backbone.forward(tokenizer.pad([rows[i] for i in part]), pooling, *adapters)
        for place, index in enumerate(part):
            found[index] = hidden.reshape(-1, len(part), hidden.shape[-1])[:, place].numpy()
    return np.stack(found, axis=1)
