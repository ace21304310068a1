"""Private backpropagation over operators (P3EFT, Algorithm 1): clip, split into shares, one share for each operator."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from blindtune.client import OperatorPool, PlainChannel, RemoteBatch
from blindtune.errors import BudgetSpent, ConfigError, NonFiniteTensor, SingleOperator
from blindtune.privacy.accountant import Accountant, auc_bound, epsilon
from blindtune.privacy.randomness import SecureGenerator
from blindtune.privacy.shares import Shares, clip_per_example, combine, split_gradient
from blindtune.wire import NoiseShare

REPORT_DELTA = 1e-5


@dataclass
class SharedGradients(PlainChannel):
    """A channel in which no operator sees more than one share of a gradient; adapters travel in the clear.

    Where there are m operators for each of several adapters, no operator ever sees two of them.

    The loss is taken to be a mean over the batch: an example's gradient is B times its row of the cotangent. These
    are clipped to `clip_norm` and hidden under noise of standard deviation `noise_ratio * clip_norm`.

    Shares are drawn from a keyed stream that is bound to the gradient, the texts, the adapters and the operators in
    their order. A share that is noise alone travels as the seed that it is made of. A step that is repeated after a
    crash sends each operator the same bytes again; another gradient, or another order of operators, never meets the
    same noise, so no operator can collect two shares of one split.
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
    accountant: Accountant = field(init=False)

    def __post_init__(self) -> None:
        if self.m < 2 or self.clip_norm <= 0 or self.noise_ratio <= 0:
            raise ConfigError(
                f"m = {self.m}, clip_norm = {self.clip_norm}, noise_ratio = {self.noise_ratio} can't work.",
                remedy="Use at least 2 shares and positive numbers.",
            )
        self.accountant = Accountant(self.clip_norm, self.sigma)

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise; public."""
        return self.noise_ratio * self.clip_norm

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
        """μ of the channel so far, the ε that goes with δ, and the AUC that no test of one label exceeds."""
        if self.allow_single_operator:
            return {}
        mu = self.accountant.mu()
        return {
            "gradient_channel_mu": mu,
            "gradient_channel_epsilon": epsilon(mu, REPORT_DELTA),
            "gradient_channel_delta": REPORT_DELTA,
            "gradient_channel_auc_bound": auc_bound(mu),
        }

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
        if not bool(torch.isfinite(cotangent).all()):
            raise NonFiniteTensor(
                "The loss has a gradient with NaN or infinity; nothing was sent.",
                remedy="Lower the learning rate; the last complete step is untouched.",
            )
        if len(batch.operators) < self.m and not self.allow_single_operator:
            raise _too_few(self.m, len(batch.operators))
        gradient = clip_per_example(cotangent * size, self.clip_norm)
        parts = self._parts(batch, pool)
        splits = [self._split(piece, part, pool) for piece, part in zip(gradient.chunk(len(parts)), parts, strict=True)]
        if len(batch.operators) < self.m:  # the caller accepted that all shares meet here
            self._record_meeting()
            results = [batch.backward(pool, batch.operators[0], splits[0].shares)]
        else:
            pairs = zip(parts, splits, strict=True)
            self._record(batch, [_url(pool, part.operators[split.carrier]) for part, split in pairs])

            def call(part: RemoteBatch, split: Shares, j: int) -> Callable[[], Tensor]:
                seed = split.seeds[j]
                share = split.shares[j : j + 1] if seed is None else NoiseShare(seed=seed.hex(), sigma=self.sigma)
                return lambda: part.backward(pool, part.operators[j], share)

            pairs = zip(parts, splits, strict=True)
            answers = pool.parallel([call(part, split, j) for part, split in pairs for j in range(self.m)])
            results = [torch.cat(answers[start : start + self.m]) for start in range(0, len(answers), self.m)]
        return torch.cat([combine(r, s.coefficients) for r, s in zip(results, splits, strict=True)]) / size

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
        generator = self.generator.derive(b"shares", *_identity(gradient, batch), *receivers(batch, pool))
        return split_gradient(gradient, self.m, self.sigma, generator=generator)

    def _record_meeting(self) -> None:
        if self.max_mu is not None:
            raise ConfigError(
                f"max_mu = {self.max_mu} can't be kept where all shares meet at one operator.",
                remedy="Add operators (--server), or leave the budget out.",
            )
        self.accountant.record_meeting()

    def _record(self, batch: RemoteBatch, carriers: list[str]) -> None:
        """Counts a view of each example at each operator whose share has its gradient in it, before it is sent."""
        examples = [_example(row.ids) for row in batch.rows]
        after = max(self.accountant.mu_after(carrier, examples) for carrier in carriers)
        if self.max_mu is not None and after > self.max_mu:
            raise BudgetSpent(
                f"The next step would take the gradient channel to μ = {after:.4f}; the budget is {self.max_mu}.",
                remedy="The last complete step is saved. More noise (noise_ratio) or fewer epochs stay within it.",
            )
        for carrier in carriers:
            self.accountant.record(carrier, examples)  # also if an answer never comes


def _too_few(m: int, count: int) -> SingleOperator:
    return SingleOperator(
        f"{m} shares of one gradient need {m} operators that don't collude; {count} are given.",
        remedy="Add operators (--server), or accept no gradient privacy with allow_single_operator=True.",
    )


def receivers(batch: RemoteBatch, pool: OperatorPool) -> list[bytes]:
    """The batch's operators in their order, for what randomness is bound to."""
    return [_url(pool, index).encode() for index in batch.operators]


def _url(pool: OperatorPool, index: int) -> str:
    return pool.operators[index].transport.url


def _identity(gradient: Tensor, batch: RemoteBatch) -> list[bytes]:
    """What the noise is bound to, beside the operators."""
    tensors = [gradient, *batch.tokens.tensors().values()]
    adapters = b"".join(upload.sha256.encode() for upload in batch.uploads)
    return [*(fingerprint(tensor) for tensor in tensors), adapters, str(batch.seed).encode()]


def fingerprint(tensor: Tensor) -> bytes:
    """SHA-256 of a tensor's values."""
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).digest()


def _example(ids: tuple[int, ...]) -> str:
    return hashlib.sha256(repr(ids).encode()).hexdigest()[:16]
