"""The control of an audit of labels: the same attacks on unprotected training, which must succeed.

If the attacks fail on a plain LoRA adapter that was trained on the same texts and labels, their failure on a defended
run proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blindtune.audit.attackers import Attacked, Finding, scored_rows
from blindtune.audit.attackers import Plan as AttackPlan
from blindtune.audit.channel_id import ChannelId, ChannelKind
from blindtune.audit.labels import Channel
from blindtune.audit.observe import Row, View
from blindtune.audit.recompute import Recomputation, token_batch
from blindtune.models import LoraLayout

STEPS, BATCH, TEXTS, RATE = 100, 32, 1000, 2e-3


def unprotected_control(
    view: View, plan: AttackPlan, recompute: Recomputation, on_step: Callable[[], None] | None = None
) -> list[Finding]:
    """Trains one unprotected adapter of the run's shape on the run's texts; attacks its activations and shifts."""
    rows = scored_rows(view, plan)
    chosen = np.random.default_rng(0).permutation(len(rows))[:TEXTS]
    rows = [rows[index] for index in chosen]
    layout, weights = _train(view, rows, plan.labels, recompute, on_step)
    backbone = recompute.backbone
    parts: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(rows), BATCH):
            tokens = token_batch(view, rows[start : start + BATCH], backbone)
            parts.append(backbone.forward(tokens, view.readout, layout, weights)[0].cpu())
    hidden = torch.cat(parts).numpy()
    shift = hidden - recompute.hidden(view, (), rows)[0]
    labels = np.array([plan.labels[row] for row in rows], dtype=np.int64)
    result = Attacked("unprotected control", 1, len(rows))
    for kind, features in ((ChannelKind.ACTIVATION, hidden), (ChannelKind.SHIFT, shift)):
        channel = Channel(features, len(np.unique(labels)))
        result.attack(ChannelId(kind, adapter=0), STEPS, channel, rows, labels)
    result.finish()
    return result.findings


def _train(
    view: View, rows: list[Row], labels: Mapping[Row, int], recompute: Recomputation, on_step: Callable[[], None] | None
) -> tuple[LoraLayout, Tensor]:
    """Trains plain LoRA with a linear head for `STEPS` steps. Returns the adapter's layout and weights `(1, P)`."""
    backbone = recompute.backbone
    layout = recompute.layout(view)
    rank = layout.spec.rank
    random = torch.Generator().manual_seed(0)
    matrices = {
        name: (
            torch.randn(1, rank, in_features, generator=random) / in_features**0.5,
            torch.zeros(1, out_features, rank),
        )
        for name, out_features, in_features in layout.shapes
    }
    weights = layout.join(matrices).requires_grad_()
    classes = sorted({labels[row] for row in rows})
    head = nn.Linear(backbone.hidden_size, len(classes))
    optimizer = torch.optim.AdamW([weights, *head.parameters()], lr=RATE, weight_decay=0.0)
    scale = recompute.hidden(view, (), rows)[0].std()
    for step in range(STEPS):
        start = step * BATCH % len(rows)
        batch = rows[start : start + BATCH]
        hidden = backbone.forward(token_batch(view, batch, backbone), view.readout, layout, weights)[0]
        target = torch.tensor([classes.index(labels[row]) for row in batch])
        loss = F.cross_entropy(head(hidden.cpu() / float(scale)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if on_step is not None:
            on_step()
    return layout, weights.detach()
