"""A side network: a small network on the token states of several layers, trained on the client alone.

    x_t  = (R^T h_1,t, …, R^T h_k,t)                  from the server: projected by a public seed, quantized
    z_t  = W₂ gelu(W₁ x_t)                            for each token
    out  = W [Σ_t a_t z_t; mean_t z_t; max_t z_t] + V mean_t x_t,    a = softmax(Q z) over tokens

It follows Ladder Side-Tuning (Sung et al. 2022) in reading every layer's states without a backward pass through the
hosted model, and Head2Toe (Evci et al. 2022) in giving them all to the classifier. The ladder's own blocks, with
attention between tokens, gained nothing here (experiments/LOG.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from blindtune.labels.head import Head

STATISTICS = 1000
"""Number of texts from which the mean and the deviation of token states are computed."""
QUERIES = 4
Read = Callable[[Sequence[int]], list[Tensor]]
"""Returns the token states `(L, d)` of the texts with these indices."""


class SideHead(Head):
    """Computes logits `(B, K)` from token states `(B, L, d)`, which are zero after a text's end.

    Args:
        dim: d, the number of values for each token.
        classes: K.
        width: size of the hidden layers.
        dropout: dropout rate in the fit.
        epochs: number of passes over the training examples; more if they are few, up to `steps` steps.
        steps: smallest number of steps.
        learning_rate, weight_decay: of AdamW.
        smoothing: label smoothing.
        seed: seed of the initial weights, of dropout and of the batches.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        width: int = 96,
        dropout: float = 0.3,
        epochs: int = 8,
        steps: int = 600,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.05,
        smoothing: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__(dim, classes)
        self.width, self.dropout, self.epochs, self.steps = width, dropout, epochs, steps
        self.learning_rate, self.weight_decay, self.smoothing, self.seed = learning_rate, weight_decay, smoothing, seed
        self.first, self.second = nn.Linear(dim, width), nn.Linear(width, width)
        self.queries = nn.Linear(width, QUERIES)
        self.out, self.direct = nn.Linear(width * (QUERIES + 2), classes), nn.Linear(dim, classes)

    def config(self) -> dict[str, Any]:
        return {"dim": self.dim, "classes": self.classes, "width": self.width}

    def forward(self, features: Tensor) -> Tensor:
        states = features if features.ndim == 3 else features.unsqueeze(1)
        mask = (states != 0).any(-1)
        mask[:, 0] = True  # a text has at least one token
        x = self.bounded(states)
        return self._network(x * mask.unsqueeze(-1), mask, lambda value, _rate: value)

    def logits(self, x: Tensor) -> Tensor:
        """Returns logits `(B, K)` for standardised states `(B, L, d)` without padding."""
        return self._network(x, torch.ones(x.shape[:2], dtype=torch.bool), lambda value, _rate: value)

    def fit(self, features: Tensor, labels: Tensor) -> None:
        """Fits the network on token states `(N, L, d)` without padding."""
        self.fit_tokens(
            lambda indices: [features[index] for index in indices], [features.shape[1]] * len(labels), labels
        )

    def fit_tokens(
        self,
        read: Read,
        lengths: Sequence[int],
        labels: Tensor,
        on_step: Callable[[int, int], None] | None = None,
        batch_size: int = 32,
    ) -> None:
        """Fits the network with AdamW on batches of texts of similar length.

        Args:
            read: returns the token states of some texts.
            lengths: number of tokens of each text.
            labels: `(N,)`.
            on_step: callback with the number of steps done and the number of all.
        """
        random = torch.Generator().manual_seed(self.seed)
        self._initialise(random)
        some = torch.randperm(len(labels), generator=random)[:STATISTICS].tolist()
        self.standardise(torch.cat(read(some)))
        per_epoch = math.ceil(len(labels) / batch_size)
        epochs = max(self.epochs, math.ceil(self.steps / per_epoch))
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        total = epochs * per_epoch
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, total))

        def drop(value: Tensor, rate: float) -> Tensor:
            kept = torch.rand(value.shape, generator=random) >= rate
            return value * kept / (1.0 - rate)

        done = 0
        for _ in range(epochs):
            for indices in _batches(lengths, batch_size, random):
                states = read(indices)
                mask = torch.arange(max(map(len, states))) < torch.tensor([len(s) for s in states]).unsqueeze(1)
                x = pad_sequence([self.bounded(s) for s in states], batch_first=True)
                loss = F.cross_entropy(self._network(x, mask, drop), labels[indices], label_smoothing=self.smoothing)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                done += 1
                if on_step is not None:
                    on_step(done, total)
        optimizer.zero_grad()

    def _initialise(self, random: torch.Generator) -> None:
        for layer in (self.first, self.second, self.queries, self.out):
            nn.init.uniform_(layer.weight, -(layer.in_features**-0.5), layer.in_features**-0.5, generator=random)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.direct.weight)
        nn.init.zeros_(self.direct.bias)

    def _network(self, x: Tensor, mask: Tensor, drop: Callable[[Tensor, float], Tensor]) -> Tensor:
        """Returns logits for standardised states `(B, L, d)`, zero in padding, with a mask `(B, L)`."""
        inside, count = mask.unsqueeze(-1), mask.sum(1, keepdim=True)
        hidden = F.gelu(self.first(drop(x, self.dropout)))
        z = F.gelu(self.second(drop(hidden, self.dropout)))  # (B, L, width)
        weights = self.queries(z).masked_fill(~inside, -torch.inf).softmax(1)  # (B, L, queries)
        attended = (weights.transpose(1, 2) @ z).flatten(1)
        mean = (z * inside).sum(1) / count
        largest = z.masked_fill(~inside, -torch.inf).amax(1)
        direct = self.direct(drop(x.sum(1) / count, 0.5)) / 8.0
        return self.out(drop(torch.cat([attended, mean, largest], 1), self.dropout)) + direct


def _rate(step: int, total: int) -> float:
    """Returns the factor on the learning rate: a rise over a tenth of the steps, then half a cosine to zero."""
    rise = max(1, total // 10)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1.0 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def _batches(lengths: Sequence[int], size: int, random: torch.Generator) -> list[list[int]]:
    """Returns the texts of one epoch in batches of similar length, in random order."""
    order: list[int] = torch.randperm(len(lengths), generator=random).tolist()
    batches: list[list[int]] = []
    for start in range(0, len(order), 50 * size):
        part = sorted(order[start : start + 50 * size], key=lambda index: lengths[index])
        batches += [part[first : first + size] for first in range(0, len(part), size)]
    return [batches[index] for index in torch.randperm(len(batches), generator=random).tolist()]
