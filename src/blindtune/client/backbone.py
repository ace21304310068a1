"""`Backbone`: a torch module whose forward and backward passes run on the provider's servers.

hidden = backbone(texts)          # POST forward
loss = criterion(head(hidden), labels)
loss.backward()                   # POST backward; gradients arrive in backbone.parameters()
optimizer.step()
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from blindtune.client.operators import OperatorPool, Upload
from blindtune.client.transport import Patience, Traffic, Transport
from blindtune.errors import ConfigError, SequenceTooLong, UnknownPooling
from blindtune.models import LoraAdapter, Tokenizer, Tokens
from blindtune.models.tokenizer import Text, TokenRow
from blindtune.wire import NoiseShare, Pooling

DEFAULT_LENGTH = 128
FROZEN_CACHE_ROWS = 200_000
INFERENCE_TOKENS = 4096
"""Tokens in one request without gradient."""


@dataclass(frozen=True)
class RemoteBatch:
    """One forward pass that was made: what was sent where. `operators` hold its graph."""

    rows: tuple[TokenRow, ...]
    tokens: Tokens
    uploads: tuple[Upload, ...]
    seed: int | None
    operators: tuple[int, ...]


BackwardCall = Callable[[int, Tensor | NoiseShare], Tensor]
"""Sends cotangents `(m, n, B, d)`, or one that is noise alone, to one operator of the batch; returns gradients
`(m, n, P)`."""


class GradientChannel(Protocol):
    """How the gradient of a batch reaches the operators."""

    def choose(self, operators: int, step: int) -> tuple[int, ...]:
        """Which operators will take part in the backward pass of this step; the first one sends hidden states."""
        ...

    def send(self, cotangent: Tensor, batch: RemoteBatch, pool: OperatorPool, backward: BackwardCall) -> Tensor:
        """Parameter gradients `(n, P)` for a cotangent `(n, B, d)`."""
        ...


class PlainChannel:
    """The true gradient, in the clear, to one operator after the other. No label privacy."""

    def choose(self, operators: int, step: int) -> tuple[int, ...]:
        return (step % operators,)

    def send(self, cotangent: Tensor, batch: RemoteBatch, pool: OperatorPool, backward: BackwardCall) -> Tensor:
        return backward(batch.operators[0], cotangent.unsqueeze(0))[0]


class Backbone(nn.Module):
    """A hosted model with n trainable LoRA adapters, as a torch module.

    Args:
        servers: addresses of the operators that host the model.
        model: the hosted name; may be left out where a server hosts one model.
        adapter: PEFT's `LoraConfig`; rank 8 on PEFT's default layers for this architecture if left out.
        num_adapters: n.
        token: bearer token for all servers, or one for each.
        pooling: `cls`, `mean`, `last`, `first` or `none`; the model's default if left out.
        max_length: tokens to which texts are truncated; 128 if left out, or as many as the model takes if fewer.
        channel: how gradients travel; in the clear if left out.
        verify, insecure, patience, on_wait: see `Transport`.
    Raises:
        RequestError, OperatorError: what the servers answer, see `blindtune.errors`.
    """

    def __init__(
        self,
        servers: str | Sequence[str],
        *,
        model: str | None = None,
        adapter: LoraConfig | None = None,
        num_adapters: int = 1,
        token: str | Sequence[str] | None = None,
        pooling: Pooling | None = None,
        max_length: int | None = None,
        channel: GradientChannel | None = None,
        verify: Any = True,
        insecure: bool = False,
        patience: Patience | None = None,
        on_wait: Callable[[str, int], None] | None = None,
    ) -> None:
        super().__init__()
        servers = [servers] if isinstance(servers, str) else servers
        tokens = [token] * len(servers) if token is None or isinstance(token, str) else list(token)
        if len(tokens) != len(servers):
            raise ConfigError(f"{len(tokens)} tokens for {len(servers)} servers.", remedy="Give one for each, or one.")
        transports = [
            Transport(url, secret, verify, patience or Patience(), on_wait, insecure)
            for url, secret in zip(servers, tokens, strict=True)
        ]
        self.pool = OperatorPool(transports, model)
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
        self.channel: GradientChannel = channel or PlainChannel()
        self.tokenizer: Tokenizer = self.pool.operators[0].tokenizer()
        self.adapter_config = adapter or LoraConfig(r=8, lora_alpha=16)
        self.adapters = nn.ModuleList()
        self.set_adapters(num_adapters)
        self.steps = 0
        """Forward passes so far that had a gradient; decides which operators see the next one."""
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

    def set_adapters(self, count: int, *, generator: torch.Generator | None = None) -> None:
        """Replaces the adapters by `count` new ones: independent A, B = 0. None at all for a frozen model."""
        self.adapters = nn.ModuleList(
            LoraAdapter(self.adapter_config, self.info, generator=generator) for _ in range(count)
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
        operators = self.channel.choose(len(self.pool), self.steps)
        if differentiable:
            self.steps += 1
        else:
            operators = operators[:1]
        batch = RemoteBatch(tuple(rows), self.tokenizer.pad(rows), self._uploads(), seed, operators)
        hidden = self._forward(batch, retain=differentiable)
        return cast(Tensor, _RemoteForward.apply(self, batch, hidden, *parameters)) if differentiable else hidden

    def infer(self, texts: Sequence[Text] | Sequence[TokenRow]) -> Tensor:
        """Hidden states of many texts without gradient, `(n, N, d)`: batched by length, over all operators at once.

        For pooling `none` `(n, N, L, d)`, zero behind a text's end.
        """
        rows = self.rows(texts)
        return self._infer(rows, self._uploads()) if self.num_adapters else self.frozen(rows).unsqueeze(0)

    def frozen(self, texts: Sequence[Text] | Sequence[TokenRow]) -> Tensor:
        """h(x, 0) of the model without adapters: `(N, d)`, no gradient. Each text is asked for once, then cached."""
        rows = self.rows(texts)
        missing = list({row for row in rows if row not in self._frozen})
        if missing:
            vectors = self._infer(missing, ())[0]
            for row, vector in zip(missing, vectors.clone(), strict=True):
                self._frozen[row] = vector[: len(row)] if self.pooling == "none" else vector
        known = [self._frozen[row] for row in rows]
        result = pad_sequence(known, batch_first=True) if known else torch.empty(0, self.hidden_size)
        while len(self._frozen) > FROZEN_CACHE_ROWS:
            self._frozen.popitem(last=False)
        return result

    def _infer(self, rows: Sequence[TokenRow], uploads: tuple[Upload, ...]) -> Tensor:
        """`(n, N, d)`: chunks of similar length, dealt out to the operators, which work at the same time."""
        order = sorted(range(len(rows)), key=lambda index: (len(rows[index]), rows[index].ids))
        share = sum(len(row) for row in rows) * max(1, len(uploads)) // len(self.pool) + 1
        most = min(INFERENCE_TOKENS, share)  # few texts are dealt out too
        chunks: list[list[int]] = [[]]
        for index in order:
            if chunks[-1] and (len(chunks[-1]) + 1) * len(rows[index]) * max(1, len(uploads)) > most:
                chunks.append([])
            chunks[-1].append(index)

        def work(position: int) -> list[tuple[list[int], Tensor]]:
            done: list[tuple[list[int], Tensor]] = []
            for chunk in chunks[position :: len(self.pool)]:
                tokens = self.tokenizer.pad([rows[index] for index in chunk])
                hidden = self.pool.operators[position].forward(tokens, uploads, self.pooling, None)
                assert hidden is not None  # noqa: S101 - it was asked for
                done.append((chunk, hidden))
                if self.on_infer is not None:
                    self.on_infer(len(chunk))
            return done

        parts = self.pool.parallel([lambda p=position: work(p) for position in range(len(self.pool))])
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

    def _uploads(self) -> tuple[Upload, ...]:
        with torch.no_grad():
            return tuple(
                Upload.of(self.info.name, adapter.layout.spec, adapter.vector()) for adapter in self.lora_adapters()
            )

    def _forward(self, batch: RemoteBatch, *, retain: bool) -> Tensor:
        """All operators of the batch compute (and keep the graph if asked); the first one sends hidden states."""

        def call(index: int) -> Callable[[], Tensor | None]:
            operator = self.pool.operators[index]
            first = index == batch.operators[0]
            return lambda: operator.forward(
                batch.tokens, batch.uploads, self.pooling, batch.seed, retain=retain, want_hidden=first
            )

        hidden = self.pool.parallel([call(index) for index in batch.operators])[0]
        assert hidden is not None  # noqa: S101 - it was asked for
        return hidden

    def backward_batch(self, batch: RemoteBatch, cotangent: Tensor) -> list[Tensor | None]:
        """Gradients for every adapter parameter, in the order of `parameters()`, for a cotangent `(n, B, d)`."""

        def backward(index: int, cotangents: Tensor | NoiseShare) -> Tensor:
            operator = self.pool.operators[index]
            return operator.backward(batch.tokens, batch.uploads, self.pooling, batch.seed, cotangents)

        vectors = self.channel.send(cotangent, batch, self.pool, backward).float()  # (n, P)
        gradients: list[Tensor | None] = []
        for adapter, vector in zip(self.lora_adapters(), vectors, strict=True):
            by_module = adapter.layout.split(vector)
            of_parameter: dict[int, Tensor] = {}
            for name, (a, b) in adapter.named_matrices().items():
                of_parameter[id(a)], of_parameter[id(b)] = by_module[name]
            gradients += [of_parameter[id(p)] if p.requires_grad else None for p in adapter.parameters()]
        return gradients


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
