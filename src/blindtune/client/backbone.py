"""`Backbone`: a torch module whose forward and backward passes run on the provider's servers.

hidden = backbone(texts)          # POST forward
loss = criterion(head(hidden), labels)
loss.backward()                   # POST backward; sets the gradients of backbone.parameters()
optimizer.step()
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast
from weakref import WeakSet

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from blindtune.client.channel import Channel, PlainChannel, RemoteBatch
from blindtune.client.operators import OperatorPool
from blindtune.client.transport import Timeout, Traffic, Transport
from blindtune.errors import ConfigError, SequenceTooLong, UnknownPooling
from blindtune.models import LoraAdapter, Tokenizer
from blindtune.models.tokenizer import Text, TokenRow
from blindtune.wire import Pooling

DEFAULT_LENGTH = 128
"""Default number of tokens to which texts are truncated."""
FROZEN_CACHE_ROWS = 200_000
"""Number of texts whose hidden states under the frozen model are cached."""
INFERENCE_TOKENS = 4096
"""Largest number of tokens in one request without gradient."""


_backbones = WeakSet["Backbone"]()


def _count_step(optimizer: Optimizer, *_: Any) -> None:
    """Counts the step of an optimizer at each backbone whose parameters it holds.

    Tensor versions alone don't show all steps: fused optimizers write to parameters without changing their versions.
    """
    if _backbones:
        stepped: set[Tensor] = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for backbone in _backbones:
            if not stepped.isdisjoint(backbone.parameters()):
                backbone.optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class Backbone(nn.Module):
    """A hosted model with n trainable LoRA adapters, as a torch module.

    Args:
        servers: addresses of the operators that host the model, or an `OperatorPool`. With a pool, `model`, `token` and
            the options of `Transport` have no effect.
        model: name of the hosted model. Default: the only one that the server hosts.
        adapter: PEFT's `LoraConfig`. Default: rank 8 on PEFT's default layers for this architecture.
        num_adapters: n, the number of adapters.
        token: bearer token for all servers, or one for each server.
        pooling: `cls`, `mean`, `last`, `first` or `none`. Default: the model's own.
        max_length: number of tokens to which texts are truncated. Default: 128, or the model's limit if that is less.
        channel: decides what each operator is sent. Default: adapters and gradients in the clear.
        verify, insecure, timeout, on_wait: see `Transport`.
    Raises:
        RequestError, OperatorError: a server refuses a request or doesn't answer (`blindtune.errors`).
    """

    def __init__(
        self,
        servers: str | Sequence[str] | OperatorPool,
        *,
        model: str | None = None,
        adapter: LoraConfig | None = None,
        num_adapters: int = 1,
        token: str | Sequence[str] | None = None,
        pooling: Pooling | None = None,
        max_length: int | None = None,
        channel: Channel | None = None,
        verify: Any = True,
        insecure: bool = False,
        timeout: Timeout | None = None,
        on_wait: Callable[[str, int], None] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(servers, OperatorPool):
            self.pool = servers
        else:
            servers = [servers] if isinstance(servers, str) else servers
            self.pool = _connect(servers, model, token, verify, timeout, on_wait, insecure)
        self.info = self.pool.info
        self.hidden_size = self.info.hidden_size
        self.pooling: Pooling = pooling or self.info.pooling
        if self.pooling not in self.info.poolings:
            raise UnknownPooling(
                f"{self.info.name!r} offers no pooling {self.pooling!r}.",
                remedy=f"Choose among: {', '.join(self.info.poolings)}.",
            )
        max_length = min(DEFAULT_LENGTH, self.info.limits.max_length) if max_length is None else max_length
        if not 1 <= max_length <= self.info.limits.max_length:
            raise SequenceTooLong(
                f"max_length is {max_length}; {self.info.name!r} takes 1 to {self.info.limits.max_length} tokens.",
                remedy="Lower max_length.",
            )
        self.max_length = max_length
        self.channel: Channel = channel or PlainChannel()
        self.tokenizer: Tokenizer = self.pool.tokenizer()
        self.adapter_config = adapter or LoraConfig(r=8, lora_alpha=16)
        self.adapters = nn.ModuleList()
        self.set_adapters(num_adapters)
        self.steps = 0
        """Number of forward passes with gradient so far. The channel chooses the operators of a pass by it."""
        self.optimizer_steps = 0
        """Number of steps so far of optimizers that hold parameters of the adapters."""
        _backbones.add(self)
        self._frozen: OrderedDict[TokenRow, Tensor] = OrderedDict()
        self.on_infer: Callable[[int], None] | None = None
        """Callback invoked with the number of texts in each completed chunk of `infer` and `frozen`.

        Several threads may call it.
        """

    @property
    def num_adapters(self) -> int:
        """n, the number of adapters."""
        return len(self.adapters)

    @property
    def traffic(self) -> Traffic:
        """Requests and bytes of HTTP messages to and from all operators so far."""
        return self.pool.traffic()

    def set_adapters(self, count: int, *, generator: torch.Generator | None = None, a_seed: str | None = None) -> None:
        """Replaces the adapters by `count` new ones with independent A and with B = 0. 0 gives the frozen model.

        Args:
            a_seed: public seed of a fixed A, the same for all adapters (`LoraAdapter`).
        """
        self.adapters = nn.ModuleList(
            LoraAdapter(self.adapter_config, self.info, generator=generator, a_seed=a_seed) for _ in range(count)
        )

    def lora_adapters(self) -> list[LoraAdapter]:
        """Returns the adapters."""
        return [cast(LoraAdapter, adapter) for adapter in self.adapters]

    def rows(self, texts: Sequence[Text] | Sequence[TokenRow]) -> list[TokenRow]:
        """Tokenizes texts. Returns token rows unchanged.

        Raises:
            ConfigError: `texts` is a string, not a list of texts.
        """
        if isinstance(texts, str):
            raise ConfigError(f"{texts[:40]!r} is one text, not a list of texts.", remedy="Write [text].")
        if texts and isinstance(texts[0], TokenRow):
            return list(cast("Sequence[TokenRow]", texts))
        return self.tokenizer.rows(cast("Sequence[Text]", texts), max_length=self.max_length)

    def forward(self, texts: Sequence[Text] | Sequence[TokenRow], *, seed: int | None = None) -> Tensor:
        """Computes hidden states h(x, θ), differentiable in the adapters.

        Args:
            texts: B texts, pairs of texts, or token rows.
            seed: seed of dropout, which is off without one.
        Returns:
            `(B, d)` for one adapter or none, `(n, B, d)` for several; with a position axis before d for pooling `none`.
        """
        hidden = self.all_adapters(texts, seed=seed)
        return hidden[0] if self.num_adapters <= 1 else hidden

    def all_adapters(self, texts: Sequence[Text] | Sequence[TokenRow], *, seed: int | None = None) -> Tensor:
        """Computes hidden states as `forward` does, but always returns `(n, B, d)`."""
        rows = self.rows(texts)
        parameters = [p for adapter in self.lora_adapters() for p in adapter.parameters()]
        if not parameters:
            return self.frozen(rows).unsqueeze(0)
        differentiable = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        if differentiable:
            operators = self.channel.choose(len(self.pool), self.steps)
            self.steps += 1
        else:
            teams = self.channel.teams(len(self.pool))
            operators = teams[self.steps % len(teams)]
        batch = self.batch(rows, operators, seed)
        hidden = self.channel.hidden(batch, self.pool, retain=differentiable)
        return cast(Tensor, _RemoteForward.apply(self, batch, hidden, *parameters)) if differentiable else hidden

    def infer(self, texts: Sequence[Text] | Sequence[TokenRow]) -> Tensor:
        """Computes hidden states of many texts without gradient, in batches of similar length, on all operators.

        Returns:
            `(n, N, d)`; for pooling `none` `(n, N, L, d)`, zero after a text's end.
        """
        rows = self.rows(texts)
        if not self.num_adapters:
            return self.frozen(rows).unsqueeze(0)

        def compute(part: list[TokenRow], team: tuple[int, ...]) -> Tensor:
            return self.channel.hidden(self.batch(part, team, None), self.pool, retain=False)

        return self._infer(rows, self.channel.teams(len(self.pool)), compute)

    def frozen(self, texts: Sequence[Text] | Sequence[TokenRow]) -> Tensor:
        """Computes hidden states h(x, 0) of the frozen model without gradient, and caches them for each text.

        Returns:
            `(N, d)`; for pooling `none` `(N, L, d)`, zero after a text's end.
        """
        rows = self.rows(texts)
        missing = list({row for row in rows if row not in self._frozen})

        def compute(part: list[TokenRow], team: tuple[int, ...]) -> Tensor:
            return self.pool.operators[team[0]].forward(self.tokenizer.pad(part), (), self.pooling, None)

        if missing:
            vectors = self._infer(missing, PlainChannel().teams(len(self.pool)), compute)[0]
            for row, vector in zip(missing, vectors.clone(), strict=True):
                self._frozen[row] = vector[: len(row)] if self.pooling == "none" else vector
        hidden = [self._frozen[row] for row in rows]
        result = pad_sequence(hidden, batch_first=True) if hidden else torch.empty(0, self.hidden_size)
        while len(self._frozen) > FROZEN_CACHE_ROWS:
            self._frozen.popitem(last=False)
        return result

    def _infer(
        self,
        rows: Sequence[TokenRow],
        teams: Sequence[tuple[int, ...]],
        compute: Callable[[list[TokenRow], tuple[int, ...]], Tensor],
    ) -> Tensor:
        """Divides rows into chunks of similar length, which teams of operators compute in parallel.

        Args:
            teams: groups of operators that can each compute a chunk.
            compute: returns a chunk's hidden states `(n, B, d)` or `(n, B, L, d)` from one team.
        Returns:
            `(n, N, d)`, or `(n, N, L, d)`.
        """
        order = sorted(range(len(rows)), key=lambda index: (len(rows[index]), rows[index].ids))
        copies = max(1, self.num_adapters)
        tokens_per_team = sum(len(row) for row in rows) * copies // len(teams) + 1
        max_tokens = min(INFERENCE_TOKENS, tokens_per_team)  # so that few texts are also divided among all teams
        chunks: list[list[int]] = [[]]
        for index in order:
            if chunks[-1] and (len(chunks[-1]) + 1) * len(rows[index]) * copies > max_tokens:
                chunks.append([])
            chunks[-1].append(index)

        def run_team(position: int) -> list[tuple[list[int], Tensor]]:
            results: list[tuple[list[int], Tensor]] = []
            for chunk in chunks[position :: len(teams)]:
                results.append((chunk, compute([rows[index] for index in chunk], teams[position])))
                if self.on_infer is not None:
                    self.on_infer(len(chunk))
            return results

        by_team = self.pool.parallel([partial(run_team, position) for position in range(len(teams))])
        pairs = [pair for results in by_team for pair in results if pair[0]]
        n, _, *positions, dim = pairs[0][1].shape
        if positions:  # pooling none: pad to the longest text
            positions = [max(hidden.shape[2] for _, hidden in pairs)]
        result = torch.zeros(n, len(rows), *positions, dim)
        for chunk, hidden in pairs:
            if positions:
                for index, row in zip(chunk, hidden.unbind(1), strict=True):
                    result[:, index, : len(rows[index])] = row[:, : len(rows[index])]
            else:
                result[:, chunk] = hidden
        return result

    def close(self) -> None:
        """Closes all connections."""
        self.pool.close()

    @property
    def version(self) -> tuple[int, ...]:
        """A value that changes with every step of an optimizer of the adapters, and with every write to them by torch.

        It changes even if the adapters' values stay the same. It doesn't change with writes through `.data`, or with
        writes outside torch.
        """
        parameters = [parameter for adapter in self.lora_adapters() for parameter in adapter.parameters()]
        written = [0 if parameter.is_inference() else parameter._version for parameter in parameters]
        return (self.optimizer_steps, *written)

    def batch(self, rows: Sequence[TokenRow], operators: tuple[int, ...], seed: int | None) -> RemoteBatch:
        """Returns a batch of these texts, with a copy of the adapters' current weights, for a channel."""
        adapters = self.lora_adapters()
        version = self.version  # read before the weights, so that a concurrent write makes it outdated
        with torch.no_grad():
            weights = torch.stack([adapter.vector() for adapter in adapters])
        spec = adapters[0].layout.spec
        tokens = self.tokenizer.pad(rows)
        return RemoteBatch(tuple(rows), tokens, self.info.name, spec, weights, self.pooling, seed, operators, version)

    def backward_batch(self, batch: RemoteBatch, cotangent: Tensor) -> list[Tensor | None]:
        """Returns the gradient of every adapter parameter for a cotangent `(n, B, d)`, in the order of `parameters()`.

        It is None for parameters that need no gradient.
        """
        vectors = self.channel.gradients(cotangent, batch, self.pool).float()  # (n, P)
        gradients: list[Tensor | None] = []
        for adapter, vector in zip(self.lora_adapters(), vectors, strict=True):
            by_module = adapter.layout.split(vector)
            for name, matrices in adapter.named_matrices().items():  # `parameters()` has the same order
                for parameter, gradient in zip(matrices, by_module[name], strict=True):
                    gradients.append(gradient if parameter.requires_grad else None)
        return gradients


def _connect(
    servers: Sequence[str],
    model: str | None,
    token: str | Sequence[str] | None,
    verify: Any,
    timeout: Timeout | None,
    on_wait: Callable[[str, int], None] | None,
    insecure: bool,
) -> OperatorPool:
    """Connects to all servers."""
    tokens = [token] * len(servers) if token is None or isinstance(token, str) else list(token)
    if len(tokens) != len(servers):
        raise ConfigError(f"{len(tokens)} tokens for {len(servers)} servers.", remedy="Give one for each, or one.")
    transports = [
        Transport(url, token=secret, verify=verify, timeout=timeout, on_wait=on_wait, insecure=insecure)
        for url, secret in zip(servers, tokens, strict=True)
    ]
    return OperatorPool.connect(transports, model)


class _RemoteForward(torch.autograd.Function):
    """Makes hidden states that operators computed differentiable: its backward pass asks them for the gradients."""

    @staticmethod
    def forward(ctx: Any, backbone: Backbone, batch: RemoteBatch, hidden: Tensor, *_parameters: Tensor) -> Tensor:
        ctx.backbone, ctx.batch = backbone, batch
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients = ctx.backbone.backward_batch(ctx.batch, grad_outputs[0].contiguous())
        return (None, None, None, *gradients)
