"""The adversary that adapters are trained against (P3EFT, section 3.3, after Ganin and Lempitsky 2015).

For every channel that an operator can observe (an adapter's activations h_i, or their shift h_i − h(x, 0)), a linear
classifier of labels is fitted. It is then held fixed, and a penalty trains the adapters so that the classifier fails.

With d ≫ B a classifier separates any single batch perfectly, which says nothing about the channel, so it is fitted on a
buffer of recent batches. All channels are fitted in one L-BFGS run, which starts from the last step's weights. The
authors' own fit, from scratch on one batch, is there for comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Form = Literal["flip", "reversal", "confusion"]
Fit = Literal["buffer", "batch"]
BATCH_ITERATIONS = 150
"""Largest number of L-BFGS iterations of a fit on one batch, as in the authors' code."""


@dataclass
class Adversary:
    """Linear label classifiers on c channels, and the penalty that makes them fail.

    Args:
        channels: c, the number of channels.
        dim: d, the dimension of each channel.
        classes: K, the number of classes.
        form: the objective of the penalty. "flip" (the authors') is the cross entropy to the wrong classes, "reversal"
            maximises the classifier's loss, "confusion" moves all logits to their mean.
        buffer: number of recent batches on which the classifiers are fitted; not used by the fit "batch".
        iterations: L-BFGS iterations in each step; not used by the fit "batch", which has up to 150.
        l2: strength of the penalty on the classifiers' weights, in units of one example. A smaller value gives no
            stronger adversary: if d is of the order of the buffer's examples, the classifier fits noise, guesses worse,
            and its gradients are many times larger.
        fit: what the classifiers are fitted on. "buffer": recent batches, on features of unit variance, from the last
            step's weights. "batch" (the authors'): this batch alone, on raw features, from zero weights until the fit
            converges. That is the solution of scikit-learn's logistic regression with C = 1 / l2. Classes that the
            batch lacks take no part, and with one class in the batch the penalty is zero.
    """

    channels: int
    dim: int
    classes: int
    form: Form = "confusion"
    buffer: int = 20
    iterations: int = 10
    l2: float = 100.0
    fit: Fit = "buffer"
    weights: Tensor = field(init=False)
    """Weights of the classifiers, `(c, d + 1, K)`; the last row is the bias."""
    _recent: list[tuple[Tensor, Tensor]] = field(init=False, default_factory=list[tuple[Tensor, Tensor]])

    def __post_init__(self) -> None:
        self.weights = torch.zeros(self.channels, self.dim + 1, self.classes)

    def penalty(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Fits the classifiers (on the buffer, which this batch joins), then computes the penalty of each channel.

        Args:
            hidden: the channels, `(c, B, d)`.
            labels: `(B,)`.
        Returns:
            One penalty for each channel, `(c,)`, differentiable in `hidden`.
        """
        if self.fit == "batch":
            return self._batch_penalty(hidden, labels)
        # a new list, so that earlier results of `state_dict` don't change
        self._recent = [*self._recent, (hidden.detach(), labels)][-self.buffer :]
        past = torch.cat([batch for batch, _ in self._recent], dim=1)  # (c, N, d)
        past_labels = torch.cat([batch_labels for _, batch_labels in self._recent])
        mean = past.mean(1, keepdim=True)
        scale = (past - mean).pow(2).mean((1, 2), keepdim=True).sqrt().clamp_min(1e-6)
        self.weights = _fit((past - mean) / scale, past_labels, self.weights, self.iterations, self.l2)
        return _loss(self.form, _logits((hidden - mean) / scale, self.weights), labels)

    def _batch_penalty(self, hidden: Tensor, labels: Tensor) -> Tensor:
        present, index = labels.unique(return_inverse=True)
        if len(present) < 2:
            return hidden.flatten(1).sum(1) * 0.0
        # with two classes, scikit-learn penalises w = w_1 - w_0, where |w|² = 2 (|w_0|² + |w_1|²) at the optimum
        l2 = self.l2 * (2 if len(present) == 2 else 1)
        start = torch.zeros(self.channels, self.dim + 1, len(present), dtype=torch.float64)
        weights = _fit(hidden.detach().double(), index, start, BATCH_ITERATIONS, l2).to(hidden.dtype)
        self.weights = torch.zeros(self.channels, self.dim + 1, self.classes).index_copy(2, present, weights.float())
        return _loss(self.form, _logits(hidden, weights), index)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns weights and buffer. Later steps replace these tensors and never change them in place."""
        state = {"weights": self.weights}
        for index, (hidden, labels) in enumerate(self._recent):
            state[f"hidden.{index}"], state[f"labels.{index}"] = hidden, labels
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` returned."""
        self.weights = state["weights"]
        count = sum(name.startswith("hidden.") for name in state)
        self._recent = [(state[f"hidden.{index}"], state[f"labels.{index}"]) for index in range(count)]


def _logits(hidden: Tensor, weights: Tensor) -> Tensor:
    """Returns the logits `(c, B, K)` for channels `(c, B, d)` and weights `(c, d + 1, K)`."""
    return torch.baddbmm(weights[:, -1:], hidden, weights[:, :-1])


def _fit(hidden: Tensor, labels: Tensor, start: Tensor, iterations: int, l2: float) -> Tensor:
    """Fits a multinomial logistic regression on each channel of `(c, N, d)`. Returns the weights `(c, d + 1, K)`."""
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=iterations, history_size=8, line_search_fn="strong_wolfe")
    targets = labels.repeat(len(hidden))

    def objective() -> Tensor:
        optimizer.zero_grad()
        logits = _logits(hidden, weights)
        loss = F.cross_entropy(logits.flatten(0, 1), targets) * len(hidden)
        loss = loss + l2 / (2 * len(labels)) * weights[:, :-1].pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(objective)  # pyright: ignore[reportArgumentType]
    return weights.detach()


def _loss(form: Form, logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the penalty of each channel, `(c,)`, for logits `(c, B, K)`."""
    log_p = F.log_softmax(logits, dim=-1)
    true = F.one_hot(labels, logits.shape[-1]).to(logits.dtype)  # (B, K)
    if form == "confusion":
        return (logits - logits.mean(-1, keepdim=True)).pow(2).sum(-1).mean(-1)
    if form == "reversal":
        return (log_p * true).sum(-1).mean(-1)
    others = (1 - true) / (logits.shape[-1] - 1)
    return -(log_p * others).sum(-1).mean(-1)


def stack_channels(channels: Sequence[Tensor]) -> Tensor:
    """Concatenates groups of channels, each `(n, B, d)`, to `(c, B, d)`."""
    return torch.cat(list(channels))
