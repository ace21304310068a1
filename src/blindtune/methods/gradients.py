"""Private backpropagation (P3EFT, Algorithm 1): gradients are split into shares, and each operator gets one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from blindtune.client import OperatorPool, PlainChannel, RemoteBatch
from blindtune.errors import ConfigError, NonFiniteTensor, SingleOperator
from blindtune.lattice import Lattice
from blindtune.privacy.accountant import allowance
from blindtune.privacy.ledger import Ledger, Message, new_id
from blindtune.privacy.randomness import SecureGenerator
from blindtune.privacy.shares import Shares, combine, split_gradient
from blindtune.wire import NoiseShare

MOST_COST = 4.0
"""No share costs more than this, (2σ)² / σ², whatever is left: the carrier has to stay within the lattice."""


@dataclass
class SharedGradients(PlainChannel):
    """A channel in which no operator sees more than one share of a gradient; adapters travel in the clear.

    Where there are m operators for each of several adapters, no operator ever sees two of them.

    The loss is taken to be a mean over the batch: an example's gradient is B times its row of the cotangent. Each
    example brings an allowance of (C / σ)², and what a batch doesn't need is left for later ones. A batch that would
    cost more than that is scaled down, so C bounds the root mean square of all examples' gradients so far.

    Each call sends fresh shares, which count, also where the gradient is one that was sent before: whether two
    gradients are equal depends on labels. A share that is noise alone travels as the seed that it is made of. Noise
    follows from a key, the message's salt, the operators in their order, and the gradient, so no two messages have the
    same noise, and no operator collects two shares of one split.

    Attributes:
        ledger: counts shares, and whatever else an operator is sent that depends on labels.
    """

    m: int
    clip_norm: float
    noise_ratio: float
    generator: SecureGenerator
    allow_single_operator: bool = False
    max_mu: float | None = None
    """Budget of the run: a step that would exceed it is refused before anything of it is sent."""
    adapters: int = 1
    """n of the batches to come. Over m · n operators or more, each adapter has operators of its own."""
    adapter_noise: float = 0.0
    """Standard deviation of noise on every weight of the adapters that travel (section 3.2): new noise for new weights.
    It hides what changed from step to step, and what is computed with it is that of the noisy adapter."""
    silent: bool = False
    """Whether a gradient with NaN or infinity is sent as zero, in place of an error: when a run breaks off because its
    loss explodes, that tells something of labels."""
    nonfinite: int = field(init=False, default=0)
    """Gradients that were sent as zero for that reason."""
    ledger: Ledger = field(init=False)
    lattice: Lattice = field(init=False)

    def __post_init__(self) -> None:
        if self.m < 2 or self.clip_norm <= 0 or self.noise_ratio <= 0:
            raise ConfigError(
                f"m = {self.m}, clip_norm = {self.clip_norm}, noise_ratio = {self.noise_ratio} can't work.",
                remedy="Use at least 2 shares and positive numbers.",
            )
        self.ledger = Ledger(math.inf if self.max_mu is None else allowance(self.max_mu))
        try:
            sigma = self.noise_ratio * self.clip_norm
            largest = sigma * math.sqrt(min(MOST_COST, self.ledger.limit))
            self.lattice = Lattice.for_sigma(sigma, terms=self.m - 1, largest=largest)
        except ValueError as error:
            raise ConfigError(
                f"clip_norm = {self.clip_norm} and noise_ratio = {self.noise_ratio}: {error}",
                remedy="Use noise that float32 can hold.",
            ) from None

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise; public."""
        return self.lattice.sigma

    def brought(self, rows: int) -> float:
        """The allowance that the shares of so many examples bring."""
        return rows / self.noise_ratio**2

    def check_operators(self, count: int, dtype: str) -> None:
        """Raises `SingleOperator` if shares would meet, `ConfigError` if the servers' precision would destroy them."""
        if count < self.m and not self.allow_single_operator:
            raise _too_few(self.m, count)
        if dtype not in ("float32", "float64"):
            raise ConfigError(
                f"The operators compute in {dtype}, which destroys gradients under large noise.",
                remedy="Use operators that serve the model with --dtype float32 (or float64).",
            )

    def report(self) -> dict[str, float]:
        """μ of the shares so far, the ε that goes with δ, and the AUC that no test exceeds. Adapters come on top."""
        return {} if self.allow_single_operator else self.ledger.guarantee().report("gradient_channel_")

    def apart(self, operators: int) -> bool:
        """Whether no operator sees two of the adapters."""
        return self.adapters > 1 and operators >= self.m * self.adapters

    def choose(self, operators: int, step: int) -> tuple[int, ...]:
        if operators < self.m:
            return (step % operators,)
        if not self.apart(operators):
            return tuple((step * self.m + j) % operators for j in range(self.m))
        owned = self._owned(operators)
        return tuple(own[(step * self.m + j) % len(own)] for own in owned for j in range(self.m))

    def teams(self, operators: int) -> list[tuple[int, ...]]:
        if not self.apart(operators):
            return super().teams(operators)
        return list(zip(*self._owned(operators), strict=False))  # one operator for each adapter

    def _owned(self, operators: int) -> list[range]:
        """Each adapter's operators, always the same ones."""
        return [range(adapter, operators, self.adapters) for adapter in range(self.adapters)]

    def hidden(self, batch: RemoteBatch, pool: OperatorPool, *, retain: bool) -> Tensor:
        def call(part: RemoteBatch) -> Callable[[], Tensor]:
            return lambda: super(SharedGradients, self).hidden(part, pool, retain=retain)

        return torch.cat(pool.parallel([call(part) for part in self._parts(batch, pool)]))

    def gradients(self, cotangent: Tensor, batch: RemoteBatch, pool: OperatorPool) -> Tensor:
        size = cotangent.shape[1]
        gradient = cotangent.double() * size
        if not bool(torch.isfinite(gradient).all()):
            if not self.silent:
                raise NonFiniteTensor(
                    "The loss has a gradient with NaN or infinity; nothing was sent.",
                    remedy="Lower the learning rate; the last complete step is untouched.",
                )
            gradient = torch.zeros_like(gradient)
            self.nonfinite += 1
        if len(batch.operators) < self.m and not self.allow_single_operator:
            raise _too_few(self.m, len(batch.operators))
        parts = self._parts(batch, pool)
        pieces = gradient.chunk(len(parts))
        if len(batch.operators) < self.m:  # the caller accepted that all shares meet here
            self._compromise()
        splits = [self._split(piece, part, pool) for piece, part in zip(pieces, parts, strict=True)]
        if len(batch.operators) < self.m:
            results = [batch.backward(pool, batch.operators[0], splits[0].shares)]
        else:

            def call(part: RemoteBatch, split: Shares, j: int) -> Callable[[], Tensor]:
                seed = split.seeds[j]
                share = split.shares[j : j + 1] if seed is None else noise_share(seed, self.lattice)
                return lambda: part.backward(pool, part.operators[j], share)

            pairs = zip(parts, splits, strict=True)
            answers = pool.parallel([call(part, split, j) for part, split in pairs for j in range(self.m)])
            results = [torch.cat(answers[start : start + self.m]) for start in range(0, len(answers), self.m)]
        return torch.cat([combine(result) for result in results]) / size

    def _parts(self, batch: RemoteBatch, pool: OperatorPool) -> list[RemoteBatch]:
        """What travels to the same operators: all adapters together, or each for itself to those it owns."""
        if self.adapter_noise > 0:
            generator = self.generator.derive(b"adapter noise", fingerprint(batch.weights))
            noise = self.adapter_noise * generator.normal(*batch.weights.shape)
            batch = batch.with_weights((batch.weights.double() + noise).float())
        if not self.apart(len(pool)):
            return [batch]
        return [
            replace(batch, weights=weights, operators=tuple(o for o in batch.operators if o in own))
            for weights, own in zip(batch.weights.split(1), self._owned(len(pool)), strict=True)
        ]

    def _split(self, gradient: Tensor, batch: RemoteBatch, pool: OperatorPool) -> Shares:
        """The shares of a gradient `(n, B, ...)`, scaled down to what there is room for, and written to the ledger."""
        operators, salt = [pool.names[index] for index in batch.operators], new_id()
        context = [salt, repr(self.lattice), *operators]
        key = self.generator.derive(b"shares", *(part.encode() for part in context))
        if self.ledger.compromised:
            points = self.lattice.round_within(gradient, MOST_COST, key)[0]
            return split_gradient(points, self.m, self.lattice, generator=key.bound_to(points))
        brought = self.brought(gradient.shape[1])
        with self.ledger.exclusive():
            self.ledger.enlist(pool.names)
            self.ledger.check(operators, brought)
            room = min(self.ledger.room(operators, brought), MOST_COST)
            points, _ = self.lattice.round_within(gradient, room, key)
            shares = split_gradient(points, self.m, self.lattice, generator=key.bound_to(points))
            cost = self.lattice.cost(points)
            # of three shares or more, any operator may pool its own with one that got the carrier
            costs = {o: cost if self.m > 2 or j == shares.carrier else 0.0 for j, o in enumerate(operators)}
            self.ledger.record(Message("share", costs, brought, salt))
        return shares

    def _compromise(self) -> None:
        if self.max_mu is not None:
            raise ConfigError(
                f"max_mu = {self.max_mu} can't be kept where all shares meet at one operator.",
                remedy="Add operators (--server), or leave the budget out.",
            )
        self.ledger.compromise()


def noise_share(seed: bytes, lattice: Lattice) -> NoiseShare:
    """A share of pure noise, as it travels."""
    return NoiseShare(seed=seed.hex(), exponent=lattice.exponent, steps=lattice.steps)


def _too_few(m: int, count: int) -> SingleOperator:
    return SingleOperator(
        f"{m} shares of one gradient need {m} operators that don't collude; {count} are given.",
        remedy="Add operators (--server), or accept no gradient privacy with allow_single_operator=True.",
    )


def fingerprint(tensor: Tensor) -> bytes:
    """SHA-256 of a tensor's values."""
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).digest()
