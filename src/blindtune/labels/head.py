"""Heads: they compute logits from the hidden states that the operators return, and never leave the client.

All of them standardise their input, and can be fitted on frozen features at once. The heads of methods that train
adapters are linear: they are fitted first and then fine-tuned with the adapters (linear probing, then fine-tuning).
`blindtune.labels.classifiers` chooses among all of them for the method `features`.

The heads of P3EFT's authors start from random weights instead.
"""

from __future__ import annotations

import math
import secrets
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blindtune.errors import ConfigError

LARGEST = 1e3
"""Bound on the absolute value of standardised features.

No model gives larger ones. With the bound, an operator's responses can't make the fit fail. That matters because
whether a fit fails could depend on labels, and the operator sees whether the client goes on.
"""
AT_ONCE = 4096
"""Number of examples whose statistics are computed at once."""
CENTRES = 8192
"""Largest number of training examples that a kernel classifier keeps."""


class Head(nn.Module):
    """Base class of heads: standardises features `(B, d)`, or chosen parts of them, with fixed statistics.

    Args:
        dim: d, the number of features.
        classes: K.
        parts: which of `of` equal parts of the features are read, in rising order; None for all. With a readout of k
            layers the parts are the layers.
    """

    mean: Tensor
    """Mean of the features that are read, `(d',)`."""
    scale: Tensor
    """Standard deviation of the features that are read, `(d',)`, with a lower bound."""

    def __init__(self, dim: int, classes: int, *, parts: Sequence[int] | None = None, of: int = 1) -> None:
        super().__init__()
        self.dim, self.classes, self.of = dim, classes, of
        self.parts = list(range(of)) if parts is None else list(parts)
        self.read = len(self.parts) * (dim // of)
        """d', the number of features that are read."""
        self.register_buffer("mean", torch.zeros(self.read))
        self.register_buffer("scale", torch.ones(self.read))

    def forward(self, features: Tensor) -> Tensor:
        return self.logits(self.bounded(self.select(features)))

    def bounded(self, features: Tensor) -> Tensor:
        """Returns standardised features `(…, d')` with a bound on their absolute value."""
        return ((features - self.mean) / self.scale).clamp(-LARGEST, LARGEST)

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Returns logits `(B, K)` for standardised features `(B, d')`."""

    @abstractmethod
    def fit(self, features: Tensor, labels: Tensor) -> None:
        """Sets the statistics, and fits the head on features `(N, d)` and labels `(N,)`."""

    def config(self) -> dict[str, Any]:
        """Returns the arguments that `build` needs to make an unfitted head of this shape."""
        return {"dim": self.dim, "classes": self.classes, "parts": self.parts, "of": self.of}

    @classmethod
    def build(cls, config: Mapping[str, Any]) -> Self:
        """Makes a head from `config`. Its tensors are loaded with `load_state_dict`."""
        return cls(**config)

    def select(self, features: Tensor) -> Tensor:
        """Returns the parts of the features that are read, `(B, d')`."""
        if len(self.parts) == self.of:
            return features
        return features.unflatten(-1, (self.of, -1))[..., self.parts, :].flatten(-2)

    def standardise(self, features: Tensor) -> Tensor:
        """Sets the statistics from features `(N, d)`. Returns the standardised features `(N, d')`, bounded."""
        features = self.select(features).nan_to_num()
        mean, deviation = _statistics(features)
        self.mean, self.scale = mean, self._scales(deviation)
        return self.bounded(features)

    def _scales(self, deviation: Tensor) -> Tensor:
        """Returns standard deviations with a lower bound."""
        varying = deviation[deviation > 0]  # dividing by the deviation of a constant dimension would give infinity
        return deviation.clamp_min(0.2 * float(varying.median()) if len(varying) else 1.0)


def _statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean and the standard deviation of features `(N, d)`, which may be as large as float32 goes."""
    count = len(features)
    mean = sum((part.double().sum(0) for part in features.split(AT_ONCE)), torch.zeros(())) / max(1, count)
    squares = sum(((part.double() - mean).square().sum(0) for part in features.split(AT_ONCE)), torch.zeros(()))
    deviation = (squares / max(1, count - 1)).sqrt()
    return mean.float(), deviation.clamp_max(1e30).float()


def _solve(system: Tensor, right: Tensor) -> Tensor:
    """Returns the solution of a system `(M, M)` that is positive definite except for rounding, for `right` `(M, K)`.

    If Cholesky's method fails, it adds to the diagonal until it doesn't. It raises nothing, whatever the numbers are.
    """
    system, right = system.double(), right.double()
    size = float(system.diagonal().mean())
    for extra in (0.0, *(10.0**power * size for power in range(-12, 3))):
        system.diagonal().add_(extra)
        factor, failed = torch.linalg.cholesky_ex(system)
        if not bool(failed):
            solved = torch.cholesky_solve(right, factor).float().contiguous()
            if bool(torch.isfinite(solved).all()):
                return solved
    return torch.zeros_like(right, dtype=torch.float32)


class LinearHead(Head):
    """Multinomial logistic regression with a penalty on the weights.

    Args:
        l2: weight of the penalty |W|² / 2, relative to the loss of one example.
        iterations: number of L-BFGS iterations.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        l2: float = 500.0,
        iterations: int = 100,
        parts: Sequence[int] | None = None,
        of: int = 1,
    ) -> None:
        super().__init__(dim, classes, parts=parts, of=of)
        self.l2, self.iterations = l2, iterations
        self.linear = nn.Linear(self.read, classes)

    def forward(self, features: Tensor) -> Tensor:
        # without the bound: adapters are trained through it, and a bound would give no gradient
        return self.logits((self.select(features) - self.mean) / self.scale)

    def logits(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def fit(self, features: Tensor, labels: Tensor) -> None:
        x = self.standardise(features)
        if not self._minimise(x, labels):  # very badly scaled features: with more digits, and a bound that is closer
            self.linear.double()
            fitted = self._minimise(x.double().clamp(-10, 10), labels)
            self.linear.float()
            if not fitted:
                self._reset()
                warnings.warn("The features are so badly scaled that no linear head fits them.", stacklevel=2)

    def _reset(self) -> None:
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def _minimise(self, x: Tensor, labels: Tensor) -> bool:
        """Fits the weights from zero. Returns whether they are finite; L-BFGS may fail where numbers overflow."""
        self._reset()
        parameters = list(self.linear.parameters())
        optimizer = torch.optim.LBFGS(parameters, max_iter=self.iterations, line_search_fn="strong_wolfe")

        def objective() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(self.linear(x), labels)
            loss = loss + self.l2 / (2 * len(labels)) * self.linear.weight.pow(2).sum()
            loss.backward()
            return loss

        objective()  # what fails here is no matter of numbers
        try:
            optimizer.step(objective)  # pyright: ignore[reportArgumentType]
        except RuntimeError:  # L-BFGS fails so where numbers overflow
            return False
        finally:
            optimizer.zero_grad()
        return all(bool(torch.isfinite(parameter).all()) for parameter in parameters)


class KernelHead(Head):
    """Kernel ridge regression on labels ±1 with the kernel exp(−γ |x − x'|² / d') + ½, as logits with a temperature.

    With more than `CENTRES` examples, a random part of them are the centres (Nyström's method).

    Args:
        gamma: γ.
        ridge: penalty on the squared norm in the kernel's space, relative to the squared error of one example.
        temperature: factor on the regression's output, which `fit_temperature` sets from held-out examples.
        centres: number of centres; set by the fit.
    """

    centres: Tensor
    """Standardised features of training examples, `(M, d')`, times 1 / √d'."""
    coefficients: Tensor
    """`(M, K)`."""
    temperature: Tensor

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        gamma: float = 0.5,
        ridge: float = 0.3,
        centres: int = 0,
        parts: Sequence[int] | None = None,
        of: int = 1,
    ) -> None:
        super().__init__(dim, classes, parts=parts, of=of)
        self.gamma, self.ridge = gamma, ridge
        self.register_buffer("centres", torch.zeros(centres, self.read))
        self.register_buffer("coefficients", torch.zeros(centres, classes))
        self.register_buffer("temperature", torch.tensor(4.0))

    def config(self) -> dict[str, Any]:
        return super().config() | {"gamma": self.gamma, "ridge": self.ridge, "centres": len(self.centres)}

    def logits(self, x: Tensor) -> Tensor:
        return self.temperature * (self._kernel(self._scaled(x)) @ self.coefficients)

    def fit(self, features: Tensor, labels: Tensor) -> None:
        x = self._scaled(self.standardise(features))
        targets = 2.0 * F.one_hot(labels, self.classes).to(x) - 1.0
        if len(x) <= CENTRES:
            self.centres = x
            system, right = self._kernel(x), targets
        else:
            chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:CENTRES]
            self.centres = x[chosen]
            system, right = torch.zeros(CENTRES, CENTRES), torch.zeros(CENTRES, self.classes)
            for part, wanted in zip(x.split(CENTRES), targets.split(CENTRES), strict=True):
                kernel = self._kernel(part)
                system.addmm_(kernel.T, kernel)
                right.addmm_(kernel.T, wanted)
            system = system / self.ridge + self._kernel(self.centres)
            right = right / self.ridge
        diagonal = self.ridge if len(x) <= CENTRES else 1e-4 * float(system.diagonal().mean())
        system.diagonal().add_(diagonal)
        self.coefficients = _solve(system, right)

    def fit_temperature(self, features: Tensor, labels: Tensor) -> None:
        """Sets the temperature to the one with the smallest loss on held-out features `(N, d)`."""
        with torch.no_grad():
            raw = self(features) / self.temperature
        options = torch.logspace(-1, 1.5, 40)
        losses = torch.stack([F.cross_entropy(option * raw, labels) for option in options])
        self.temperature = options[losses.argmin()]

    def _scaled(self, x: Tensor) -> Tensor:
        """Scales standardised features `(B, d')` for the kernel."""
        return x / math.sqrt(self.read)

    def _kernel(self, x: Tensor) -> Tensor:
        """Returns the kernel of scaled features `(B, d')` and the centres, `(B, M)`."""
        return self._radial(x, self.centres)

    def _radial(self, x: Tensor, centres: Tensor) -> Tensor:
        squares = x.square().sum(1, keepdim=True) + centres.square().sum(1)
        distances = torch.addmm(squares, x, centres.T, alpha=-2.0).clamp_min_(0.0)
        return distances.mul_(-self.gamma).exp_().add_(0.5)


class SketchHead(KernelHead):
    """Kernel ridge regression on frozen features and a sketch s of the Jacobian, the last values of the input.

    The kernel is exp(−γ |x − x'|² / d') + ½ + w ⟨s, s'⟩ / S: that of `KernelHead`, and the sketched neural tangent
    kernel of LoRA (`blindtune.models.tangents`).

    Args:
        sketch: S, the number of values of the sketch; with 0 the head is a `KernelHead`.
        weight: w.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        sketch: int = 0,
        weight: float = 1.0,
        gamma: float = 0.5,
        ridge: float = 0.3,
        centres: int = 0,
        parts: Sequence[int] | None = None,
        of: int = 1,
    ) -> None:
        super().__init__(dim - sketch, classes, gamma=gamma, ridge=ridge, parts=parts, of=of)
        self.sketch, self.weight, self.states = sketch, weight, self.read
        self.dim, self.read = dim, self.states + sketch
        self.register_buffer("mean", torch.zeros(self.read))
        self.register_buffer("scale", torch.ones(self.read))
        self.register_buffer("centres", torch.zeros(centres, self.read))
        self.register_buffer("coefficients", torch.zeros(centres, classes))

    def config(self) -> dict[str, Any]:
        return super().config() | {"sketch": self.sketch, "weight": self.weight}

    def select(self, features: Tensor) -> Tensor:
        states, sketch = features.split([self.dim - self.sketch, self.sketch], dim=-1)
        return torch.cat([super().select(states), sketch], dim=-1)

    def _scales(self, deviation: Tensor) -> Tensor:
        # apart, since states and sketch differ in size
        return torch.cat([super(SketchHead, self)._scales(part) for part in self._split(deviation)])

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        states, sketch = x.split([self.states, self.sketch], dim=-1)
        return states, sketch

    def _scaled(self, x: Tensor) -> Tensor:
        states, sketch = self._split(x)
        return torch.cat(
            [states / math.sqrt(self.states), sketch * math.sqrt(self.weight / max(1, self.sketch))], dim=-1
        )

    def _kernel(self, x: Tensor) -> Tensor:
        (states, sketch), (centres, others) = self._split(x), self._split(self.centres)
        return self._radial(states, centres).addmm_(sketch, others.T)


class TwoLayerHead(Head):
    """Two layers, tanh between them: d' → width → K, fitted with AdamW.

    Args:
        width: size of the hidden layer.
        dropout: dropout rate on the standardised features, in the fit.
        epochs: number of passes over the training examples.
        learning_rate, weight_decay: of AdamW.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        width: int = 128,
        dropout: float = 0.5,
        epochs: int = 15,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        parts: Sequence[int] | None = None,
        of: int = 1,
    ) -> None:
        super().__init__(dim, classes, parts=parts, of=of)
        self.width, self.dropout, self.epochs = width, dropout, epochs
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.first, self.second = nn.Linear(self.read, width), nn.Linear(width, classes)

    def config(self) -> dict[str, Any]:
        return super().config() | {"width": self.width}

    def logits(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())

    def fit(self, features: Tensor, labels: Tensor) -> None:
        x = self.standardise(features)
        generator = torch.Generator().manual_seed(0)
        for layer in (self.first, self.second):
            nn.init.zeros_(layer.bias)
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        batches = math.ceil(len(x) / 64)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, self.epochs * batches)
        for _ in range(self.epochs):
            for indices in torch.randperm(len(x), generator=generator).chunk(batches):
                kept = torch.rand(len(indices), self.read, generator=generator) >= self.dropout
                dropped = x[indices] * kept / (1.0 - self.dropout)
                optimizer.zero_grad()
                F.cross_entropy(self.logits(dropped), labels[indices]).backward()
                optimizer.step()
                schedule.step()
        optimizer.zero_grad()


class MLPHead(nn.Sequential):
    """Computes logits `(B, K)` from features `(B, d)`: a pooler, then hidden layers of 128 and 32 units (ReLU).

    It is the head of P3EFT's code of 2023, with random initial weights. The pooler is DeBERTa's: a linear layer from d
    to d, then GELU.
    """

    def __init__(self, dim: int, classes: int) -> None:
        hidden = (nn.Linear(dim, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU())
        super().__init__(nn.Linear(dim, dim), nn.GELU(), *hidden, nn.Linear(32, classes))


class PoolerHead(nn.Sequential):
    """Computes logits `(B, K)` from features `(B, d)`: a pooler, then a linear layer.

    It is the head of P3EFT's code of 2025 for DeBERTa, with random initial weights.
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, classes))


HEADS: dict[str, type[LinearHead] | type[MLPHead] | type[PoolerHead]] = {
    "linear": LinearHead,
    "mlp": MLPHead,
    "pooler": PoolerHead,
}
"""Classes of heads for training in steps, by name. Each takes d and K."""


def make_head(name: str, dim: int, classes: int, *, seed: int | None = None) -> nn.Module:
    """Creates the head with this name.

    Args:
        dim: d, the dimension of features.
        classes: K, the number of classes.
        seed: seed of the initial weights. Default: a random, secret one.
    Raises:
        ConfigError: no head has this name.
    """
    if name not in HEADS:
        raise ConfigError(f"There is no head {name!r}.", remedy=f"Use one of: {', '.join(HEADS)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(secrets.randbits(63) if seed is None else seed)
        return HEADS[name](dim, classes)
