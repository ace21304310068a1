"""`Backbone`: a torch module whose forward and backward passes run on the provider's servers.

hidden = backbone(texts)          # POST forward
loss = criterion(head(hidden), labels)
loss.backward()                   # POST backward; gradients arrive in backbone.parameters()
optimizer.step()
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
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
from blindtune.client.transport import Patience, Traffic, Transport
from blindtune.errors import ConfigError, SequenceTooLong, UnknownPooling
from blindtune.models import LoraAdapter, Tokenizer
from blindtune.models.tokenizer import Text, TokenRow
from blindtune.wire import Pooling

DEFAULT_LENGTH = 128
FROZEN_CACHE_ROWS = 200_000
INFERENCE_TOKENS = 4096
"""Tokens in one request without gradient."""


_backbones = WeakSet["Backbone"]()


def _count_step(optimizer: Optimizer, *_: Any) -> None:
    """After each step of any optimizer: fused ones write to parameters without changing their versions."""
    if _backbones:
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for backbone in _backbones:
            backbone.optimizer_steps += any(id(parameter) in stepped for parameter in backbone.parameters())


register_optimizer_step_post_hook(_count_step)


class Backbone(nn.Module):
    """A hosted model with n trainable LoRA adapters, as a torch module.

    Args:
        servers: addresses of the operators that host the model, or operators that are connected already; then `model`,
            `token` and the connection's options have no effect.
        model: the hosted name; may be left out where a server hosts one model.
        adapter: PEFT's `LoraConfig`; rank 8 on PEFT's default layers for this architecture if left out.
        num_adapters: n.
        token: bearer token for all servers, or one for each.
        pooling: `cls`, `mean`, `last`, `first` or `none`; the model's default if left out.
        max_length: tokens to which texts are truncated; 128 if left out, or as many as the model takes if fewer.
        channel: what operators are sent; adapters and gradients in the clear if left out.
        verify, insecure, patience, on_wait: see `Transport`.
    Raises:
        RequestError, OperatorError: what the servers answer, see `blindtune.errors`.
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
        patience: Patience | None = None,
        on_wait: Callable[[str, int], None] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(servers, OperatorPool):
            self.pool = servers
        else:
            servers = [servers] if isinstance(servers, str) else servers
            self.pool = _connect(servers, model, token, verify, patience, on_wait, insecure)
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
        """Forward passes so far that had a gradient; decides which operators see the next one."""
        self.optimizer_steps = 0
        """Steps so far of optimizers that hold parameters of the adapters."""
        _backbones.add(self)
        self._frozen: OrderedDict[TokenRow, Tensor] = OrderedDict()
        self.on_infer: Callable[[int], None] | None = None
        """Told how many texts each answered chunk of `infer` or `frozen` had; called from several threads."""

    @property
    def num_adapters(self) -> int:
        return len(self.adapters)

    @property
    def traffic(self) -> Traffic:
        """Body bytes sent to and received from all operators so far."""
        return self.pool.traffic()

    def set_adapters(self, count: int, *, generator: torch.Generator | None = None, a_seed: str | None = None) -> None:
        """Replaces the adapters by `count` new ones: independent A, B = 0. None at all for a frozen model.

        Args:
            a_seed: fixes A, see `LoraAdapter`; the same for all of them.
        """
        self.adapters = nn.ModuleList(
            LoraAdapter(self.adapter_config, self.info, generator=generator, a_seed=a_seed) for _ in range(count)
        )

    def lora_adapters(self) -> list[LoraAdapter]:
        return [cast(LoraAdapter, adapter) for adapter in self.adapters]

    def rows(self, texts: Sequence[Text] | Sequence[TokenRow]) -> list[TokenRow]:
        """Tokenized examples; token rows pass through.

        Raises:
            ConfigError: one text in place of a list.
        """
        if isinstance(texts, str):
            raise ConfigError(f"{texts[:40]!r} is one text, not a list of texts.", remedy="Write [text].")
        if texts and isinstance(texts[0], TokenRow):
            return list(cast("Sequence[TokenRow]", texts))
        return self.tokenizer.rows(cast("Sequence[Text]", texts), max_length=self.max_length)

    def forward(self, texts: Sequence[Text] | Sequence[TokenRow], *, seed: int | None = None) -> Tensor:
        """Hidden states h(x, θ), differentiable in the adapters.

        Args:
            texts: B texts, pairs of texts, or token rows.
            seed: switches dropout on, with this seed.
        Returns:
            `(B, d)` for one adapter, `(n, B, d)` for several; with a position axis before d for pooling `none`.
        """
        hidden = self.all_adapters(texts, seed=seed)
        return hidden[0] if self.num_adapters <= 1 else hidden

    def all_adapters(self, texts: Sequence[Text] | Sequence[TokenRow], *, seed: int | None = None) -> Tensor:
        """As `forward`, but always `(n, B, d)`."""
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
        """Hidden states of many texts without gradient, `(n, N, d)`: batched by length, over all operators at once.

        For pooling `none` `(n, N, L, d)`, zero behind a text's end.
        """
        rows = self.rows(texts)
        if not self.num_adapters:
            return self.frozen(rows).unsqueeze(0)

        def answer(part: list[TokenRow], team: tuple[int, ...]) -> Tensor:
            return self.channel.hidden(self.batch(part, team, None), self.pool, retain=False)

        return self._infer(rows, self.channel.teams(len(self.pool)), answer)

    def frozen(self, texts: Sequence[Text] | Sequence[TokenRow]) -> Tensor:
        """h(x, 0) of the model without adapters: `(N, d)`, no gradient. Each text is asked for once, then cached."""
        rows = self.rows(texts)
        missing = list({row for row in rows if row not in self._frozen})

        def answer(part: list[TokenRow], team: tuple[int, ...]) -> Tensor:
            hidden = self.pool.operators[team[0]].forward(self.tokenizer.pad(part), (), self.pooling, None)
            assert hidden is not None  # noqa: S101 - it was asked for
            return hidden

        if missing:
            vectors = self._infer(missing, PlainChannel().teams(len(self.pool)), answer)[0]
            for row, vector in zip(missing, vectors.clone(), strict=True):
                self._frozen[row] = vector[: len(row)] if self.pooling == "none" else vector
        known = [self._frozen[row] for row in rows]
        result = pad_sequence(known, batch_first=True) if known else torch.empty(0, self.hidden_size)
        while len(self._frozen) > FROZEN_CACHE_ROWS:
            self._frozen.popitem(last=False)
        return result

    def _infer(
        self,
        rows: Sequence[TokenRow],
        teams: Sequence[tuple[int, ...]],
        answer: Callable[[list[TokenRow], tuple[int, ...]], Tensor],
    ) -> Tensor:
        """`(n, N, d)`: chunks of similar length, dealt out to teams of operators, which work at the same time."""
        order = sorted(range(len(rows)), key=lambda index: (len(rows[index]), rows[index].ids))
        copies = max(1, self.num_adapters)
        share = sum(len(row) for row in rows) * copies // len(teams) + 1
        most = min(INFERENCE_TOKENS, share)  # few texts are dealt out too
        chunks: list[list[int]] = [[]]
        for index in order:
            if chunks[-1] and (len(chunks[-1]) + 1) * len(rows[index]) * copies > most:
                chunks.append([])
            chunks[-1].append(index)

        def work(position: int) -> list[tuple[list[int], Tensor]]:
            done: list[tuple[list[int], Tensor]] = []
            for chunk in chunks[position :: len(teams)]:
                done.append((chunk, answer([rows[index] for index in chunk], teams[position])))
                if self.on_infer is not None:
                    self.on_infer(len(chunk))
            return done

        parts = self.pool.parallel([lambda p=position: work(p) for position in range(len(teams))])
        pairs = [pair for part in parts for pair in part if pair[0]]
        n, _, *positions, dim = pairs[0][1].shape
        if positions:  # pooling none: as long as the longest text
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
        """Changes whenever an optimizer of the adapters steps, or torch writes to them, whatever it writes.

        Writes through `.data` don't change it, and neither do those that torch doesn't see.
        """
        parameters = [parameter for adapter in self.lora_adapters() for parameter in adapter.parameters()]
        written = [0 if parameter.is_inference() else parameter._version for parameter in parameters]
        return (self.optimizer_steps, *written)

    def batch(self, rows: Sequence[TokenRow], operators: tuple[int, ...], seed: int | None) -> RemoteBatch:
        """These texts under the adapters as they are now, for a channel."""
        adapters = self.lora_adapters()
        version = self.version  # first: whoever writes meanwhile changes it
        with torch.no_grad():
            weights = torch.stack([adapter.vector() for adapter in adapters])
        spec = adapters[0].layout.spec
        tokens = self.tokenizer.pad(rows)
        return RemoteBatch(tuple(rows), tokens, self.info.name, spec, weights, self.pooling, seed, operators, version)

    def backward_batch(self, batch: RemoteBatch, cotangent: Tensor) -> list[Tensor | None]:
        """Gradients for every adapter parameter, in the order of `parameters()`, for a cotangent `(n, B, d)`."""
        vectors = self.channel.gradients(cotangent, batch, self.pool).float()  # (n, P)
        gradients: list[Tensor | None] = []
        for adapter, vector in zip(self.lora_adapters(), vectors, strict=True):
            by_module = adapter.layout.split(vector)
            of_parameter: dict[int, Tensor] = {}
            for name, (a, b) in adapter.named_matrices().items():
                of_parameter[id(a)], of_parameter[id(b)] = by_module[name]
            gradients += [of_parameter[id(p)] if p.requires_grad else None for p in adapter.parameters()]
        return gradients


def _connect(
    servers: Sequence[str],
    model: str | None,
    token: str | Sequence[str] | None,
    verify: Any,
    patience: Patience | None,
    on_wait: Callable[[str, int], None] | None,
    insecure: bool,
) -> OperatorPool:
    tokens = [token] * len(servers) if token is None or isinstance(token, str) else list(token)
    if len(tokens) != len(servers):
        raise ConfigError(f"{len(tokens)} tokens for {len(servers)} servers.", remedy="Give one for each, or one.")
    transports = [
        Transport(url, secret, verify, patience or Patience(), on_wait, insecure)
        for url, secret in zip(servers, tokens, strict=True)
    ]
    return OperatorPool.connect(transports, model)


class _RemoteForward(torch.autograd.Function):
    """Hidden states that came over the network; the backward pass goes back there."""

    @staticmethod
    def forward(ctx: Any, backbone: Backbone, batch: RemoteBatch, hidden: Tensor, *_parameters: Tensor) -> Tensor:
        ctx.backbone, ctx.batch = backbone, batch
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients = ctx.backbone.backward_batch(ctx.batch, grad_outputs[0].contiguous())
        return (None, None, None, *gradients)
