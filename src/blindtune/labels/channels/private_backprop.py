"""Private backpropagation (P3EFT, Algorithm 1): gradients are split into shares, and each operator is sent one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blindtune.checks import check_budget, check_counts, check_positive, check_switches, check_weights
from blindtune.client import OperatorPool, PlainChannel, RemoteBatch
from blindtune.errors import ConfigError, NonFiniteTensor, SingleOperator
from blindtune.lattice import Lattice
from blindtune.privacy.accountant import allowance
from blindtune.privacy.ledger import Ledger, Message, new_id
from blindtune.privacy.randomness import SecureGenerator
from blindtune.privacy.shares import Shares, combine, split_gradient
from blindtune.wire import NoiseShare

MOST_COST = 4.0
"""Largest cost of one share, (2σ)² / σ², whatever allowance is left: the carrier has to stay within the lattice."""


@dataclass(frozen=True)
class PrivateBackpropOptions:
    """Options for sending gradients: in m shares to m operators, or (m = 1) in the clear.

    Args:
        m: number of gradient shares. It needs m operators that don't collude. 1: true gradients in the clear.
        clip_norm: bound C on the norm of one example's gradient at the hidden states of all adapters together, as a
            root mean square over all examples so far. It applies only to shares.
        noise_ratio: σ / C. μ of the shares is 2 √(examples in all steps) / noise_ratio.
        max_mu: budget for μ of the shares. The run stops before the step that would exceed it.
        allow_single_operator: allows sending all shares to one operator. Then there is no gradient privacy.
        adapter_noise: standard deviation of noise on the weights of the adapters that are sent (P3EFT, section 3.2).
            It hides from operators what a step changed. The model that is trained is that of the noisy adapters.
    Raises:
        ConfigError: an option is out of range, or there is a budget or noise on adapters without shares: gradients in
            the clear reveal what a step changed.
    """

    m: int = 1
    clip_norm: float = 10.0
    noise_ratio: float = 100.0
    max_mu: float | None = None
    allow_single_operator: bool = False
    adapter_noise: float = 0.0

    def __post_init__(self) -> None:
        check_counts(m=self.m)
        check_positive(clip_norm=self.clip_norm, noise_ratio=self.noise_ratio)
        check_switches(allow_single_operator=self.allow_single_operator)
        check_budget(self.max_mu)
        check_weights(adapter_noise=self.adapter_noise)
        if self.m == 1 and self.adapter_noise > 0:
            raise ConfigError(
                f"adapter_noise = {self.adapter_noise} hides nothing: gradients travel in the clear.",
                remedy="Use m=2 or more gradient shares, or leave the noise out.",
            )
        if self.m == 1 and self.max_mu is not None:
            raise ConfigError(
                f"max_mu = {self.max_mu} can't be kept: gradients travel in the clear.",
                remedy="Use m=2 or more gradient shares, or leave the budget out.",
            )


class PrivateBackprop(PlainChannel):
    """A channel that sends each operator one share of a gradient at most, and adapters in the clear.

    With m operators or more for each of several adapters, no operator ever sees two adapters.

    The loss is assumed to be a mean over the batch: an example's gradient is B times its row of the cotangent. Each
    example adds (C / σ)² to the allowance, and what a batch doesn't use is left for later batches. A batch that would
    cost more than the allowance is scaled down, so C bounds the root mean square of all examples' gradients so far.

    Each call sends fresh shares. They count even if the same gradient was sent before: whether two gradients are equal
    depends on labels. A share of pure noise is sent as the seed that it is expanded from. The noise is derived from a
    key, the message's salt, the operators in their order, and the gradient, so no two messages have the same noise, and
    no operator collects two shares of one split.

    Args:
        options: m ≥ 2 shares, and their noise. A step that would exceed the budget (`max_mu`) is refused before any of
            its shares are sent. Noise on adapters is drawn anew for new weights: it hides what changed from step to
            step, and operators compute with the noisy adapter.
        generator: secret random generator.
        adapters: n, the number of adapters in batches. With m · n operators or more, each adapter has its own.
        silent: whether a gradient with NaN or infinity is sent as zeros, instead of raising an error: a run that stops
            because its loss explodes reveals something about labels.
    Raises:
        ConfigError: m = 1, or noise that float32 can't hold.
    """

    def __init__(
        self, options: PrivateBackpropOptions, generator: SecureGenerator, *, adapters: int = 1, silent: bool = False
    ) -> None:
        if options.m < 2:
            raise ConfigError(f"m = {options.m} makes no shares.", remedy="Use at least 2 shares.")
        self.options, self.generator, self.adapters, self.silent = options, generator, adapters, silent
        self.nonfinite = 0
        """Number of gradients with NaN or infinity. Zeros were sent instead."""
        self.ledger = Ledger(math.inf if options.max_mu is None else allowance(options.max_mu))
        """The ledger of shares, and of all other messages to operators that depend on labels."""
        try:
            sigma = options.noise_ratio * options.clip_norm
            largest = sigma * math.sqrt(min(MOST_COST, self.ledger.limit))
            self.lattice = Lattice.for_sigma(sigma, terms=options.m - 1, largest=largest)
        except ValueError as error:
            raise ConfigError(
                f"clip_norm = {options.clip_norm} and noise_ratio = {options.noise_ratio}: {error}",
                remedy="Use noise that float32 can hold.",
            ) from None

    @property
    def m(self) -> int:
        """Number of shares of each gradient."""
        return self.options.m

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise in a share. It is public."""
        return self.lattice.sigma

    def brought(self, rows: int) -> float:
        """Returns what the shares of `rows` examples add to the allowance."""
        return rows / self.options.noise_ratio**2

    def check_operators(self, count: int, dtype: str) -> None:
        """Raises `SingleOperator` if there are fewer operators than shares, unless that is allowed, and `ConfigError`
        if the servers' precision is too low for gradients under noise."""
        if count < self.m and not self.options.allow_single_operator:
            raise _too_few(self.m, count)
        if dtype not in ("float32", "float64"):
            raise ConfigError(
                f"The operators compute in {dtype}, which destroys gradients under large noise.",
                remedy="Use operators that serve the model with --dtype float32 (or float64).",
            )

    def report(self) -> dict[str, float]:
        """Returns μ of the shares so far, ε at δ, and the bound on any test's AUC. Adapters aren't included."""
        return {} if self.options.allow_single_operator else self.ledger.guarantee().report("gradient_channel_")

    def apart(self, operators: int) -> bool:
        """Returns whether each of several adapters has its own operators, so that none sees two adapters."""
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
        """Returns the operators of each adapter, which are the same in all steps."""
        return [range(adapter, operators, self.adapters) for adapter in range(self.adapters)]

    def hidden(self, batch: RemoteBatch, pool: OperatorPool, *, retain: bool) -> Tensor:
        def call(part: RemoteBatch) -> Callable[[], Tensor]:
            return lambda: super(PrivateBackprop, self).hidden(part, pool, retain=retain)

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
        if len(batch.operators) < self.m and not self.options.allow_single_operator:
            raise _too_few(self.m, len(batch.operators))
        parts = self._parts(batch, pool)
        pieces = gradient.chunk(len(parts))
        if len(batch.operators) < self.m:  # the user has accepted that one operator gets all shares
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
        """Returns the batches to send: one with all adapters, or one for each adapter, to that adapter's operators."""
        if self.options.adapter_noise > 0:
            generator = self.generator.derive(b"adapter noise", fingerprint(batch.weights))
            noise = self.options.adapter_noise * generator.normal(*batch.weights.shape)
            batch = batch.with_weights((batch.weights.double() + noise).float())
        if not self.apart(len(pool)):
            return [batch]
        return [
            replace(batch, weights=weights, operators=tuple(o for o in batch.operators if o in own))
            for weights, own in zip(batch.weights.split(1), self._owned(len(pool)), strict=True)
        ]

    def _split(self, gradient: Tensor, batch: RemoteBatch, pool: OperatorPool) -> Shares:
        """Splits a gradient `(n, B, ...)`, scaled down to the allowance that is left, and records it in the ledger."""
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
            # with three shares or more, an operator may combine its share with that of the operator with the carrier
            costs = {o: cost if self.m > 2 or j == shares.carrier else 0.0 for j, o in enumerate(operators)}
            self.ledger.record(Message("share", costs, brought, salt))
        return shares

    def _compromise(self) -> None:
        """Records that one operator gets all shares. Raises `ConfigError` if there is a budget to keep."""
        if self.options.max_mu is not None:
            raise ConfigError(
                f"max_mu = {self.options.max_mu} can't be kept if all shares are sent to one operator.",
                remedy="Add operators (--server), or leave the budget out.",
            )
        self.ledger.compromise()


def noise_share(seed: bytes, lattice: Lattice) -> NoiseShare:
    """Returns a share of pure noise as it is sent."""
    return NoiseShare(seed=seed.hex(), exponent=lattice.exponent, steps=lattice.steps)


def _too_few(m: int, count: int) -> SingleOperator:
    return SingleOperator(
        f"{m} shares of one gradient need {m} operators that don't collude; {count} are given.",
        remedy="Add operators (--server), or accept no gradient privacy with allow_single_operator=True.",
    )


def fingerprint(tensor: Tensor) -> bytes:
    """Returns the SHA-256 of a tensor's values."""
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).digest()
