"""`Backbone`: a torch module whose forward and backward passes run on the provider's servers.

hidden = backbone(texts)          # POST forward
loss = criterion(head(hidden), labels)
loss.backward()                   # POST backward; sets the gradients of backbone.parameters()
optimizer.step()
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any, Literal, cast, get_args
from weakref import WeakSet

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from blindtune.client.channel import Channel, PlainChannel, RemoteBatch
from blindtune.client.feature_store import FeatureSource, FeatureStore
from blindtune.client.operators import Operator, OperatorPool
from blindtune.client.state_cache import MEMORY, StateCache
from blindtune.client.transport import Timeout, Traffic, Transport
from blindtune.errors import ConfigError, PrivacyError, SequenceTooLong, UnknownReadout
from blindtune.models import LoraAdapter, Tokenizer
from blindtune.models.readout import check_readout
from blindtune.models.tangents import check_offered
from blindtune.models.tokenizer import Text, TokenRow
from blindtune.wire import CODECS, Codec, Directions, ModelInfo, Pooling, Projection, Readout

DEFAULT_LENGTH = 128
"""Default number of tokens to which texts are truncated."""
INFERENCE_TOKENS = 4096
"""Largest number of tokens in one request without gradient."""
LARGEST = 1e30
"""Bound on products and differences of hidden states, which overflow for an operator's answers alone."""
DIRECTIONS_AT_ONCE = 8
"""Largest number of directions in one request for tangents, and in one entry of the store."""

Layers = Literal["last", "upper", "all", "spread"] | Sequence[int]
"""Names the layers of a readout: the last, the upper half, all, at most eight of them, or indices of states."""
SPREAD = 8
"""Largest number of layers in the readout `spread`."""
PUBLIC_SEED = hashlib.sha256(b"blindtune projection").hexdigest()
"""Default seed of projections. It isn't secret: a projection only saves bytes."""
Pairs = Literal["joint", "apart", "both"]
"""How pairs of texts are read: as one sequence, each text alone, or both."""
PAIR_COPIES: dict[Pairs, int] = {"joint": 1, "apart": 2, "both": 3}
"""Number of vectors that a pair is read as, and of sequences that are sent for it."""
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
        readout: the layers whose hidden states are returned for each text: `last` (the model's output), `upper` (the
            upper half of the blocks), `all`, `spread` (at most eight at equal distances), or indices of states from 0
            (the input of the first block) to N (the output of the last of N blocks). The hidden states of k layers are
            concatenated to k · d values.
        pooling: `cls`, `mean`, `max`, `last`, `first` or `none`. Default: the model's own.
        pairs: how pairs of texts are read: `joint` (as one sequence), `apart` (each text alone, u and v, combined to
            |u − v| and u · v), or `both`. Adapters need `joint`. Single texts have no pairs, so this has no effect.
        projection: public random projection of each layer's states on the server, or its size; None for none. If the
            states have no more values than that size, they aren't projected.
        codec: codec in which hidden states of the frozen model are sent: fp32, fp16, int8 or int4.
        store: folder in which hidden states of the frozen model are kept, or a `FeatureStore`, so that later runs don't
            send the same texts again. Default: none; one `Backbone` never sends a text twice.
        memory: size in bytes beyond which hidden states of the frozen model are moved from memory to a temporary file.
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
        readout: Layers = "last",
        pooling: Pooling | None = None,
        pairs: Pairs = "joint",
        projection: Projection | int | None = None,
        codec: Codec = "fp32",
        store: str | Path | FeatureStore | None = None,
        memory: int = MEMORY,
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
        layers = select_layers(self.info, readout)
        if isinstance(projection, int):
            small = projection >= self.info.hidden_size
            projection = None if small else Projection(seed=PUBLIC_SEED, size=projection)
        self.readout = Readout(pooling=pooling or self.info.pooling, layers=layers, projection=projection)
        check_readout(self.readout, self.info.poolings, self.info.states, self.info.hidden_size)
        if pairs not in get_args(Pairs) or (pairs != "joint" and self.readout.pooling == "none"):
            raise ConfigError(
                f"Pairs can't be read with pairs = {pairs!r} and the pooling {self.readout.pooling!r}.",
                remedy=f"Use one of: {', '.join(get_args(Pairs))}; apart and both need another pooling than none.",
            )
        self.pairs: Pairs = pairs
        self.hidden_size = self.readout.size(self.info.hidden_size) * PAIR_COPIES[pairs]
        """Number of values for each text: k · d; for pairs read apart 2 k · d, and 3 k · d for both."""
        if codec not in CODECS:
            raise ConfigError(f"There is no codec {codec!r}.", remedy=f"Use one of: {', '.join(CODECS)}.")
        self._source = FeatureSource(self.info, self.readout, codec)
        self._cache = StateCache(FeatureStore(store) if isinstance(store, str | Path) else store, memory)
        self._offline, self._fetching = 0, RLock()
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
        self.on_infer: Callable[[int], None] | None = None
        """Callback invoked with the number of texts in each completed chunk of `infer` and `frozen`.

        Several threads may call it.
        """

    @property
    def pooling(self) -> Pooling:
        """How hidden states of all positions are reduced to one vector for each text."""
        return self.readout.pooling

    @property
    def codec(self) -> Codec:
        """Codec in which hidden states of the frozen model are sent."""
        return self._source.codec

    @property
    def parts(self) -> int:
        """Number of equal parts of a text's values: k layers, for each vector that a pair is read as."""
        return self.readout.width * PAIR_COPIES[self.pairs]

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
        Raises:
            ConfigError: pairs of texts are read apart.
        """
        if count and self.pairs != "joint":
            raise ConfigError(
                "Adapters need pairs of texts that are read as one sequence.", remedy="Use pairs='joint'."
            )
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
            `(B, k · d)` for one adapter or none, `(n, B, k · d)` for several; with a position axis before the last for
            pooling `none`.
        """
        hidden = self.all_adapters(texts, seed=seed)
        return hidden[0] if self.num_adapters <= 1 else hidden

    def all_adapters(self, texts: Sequence[Text] | Sequence[TokenRow], *, seed: int | None = None) -> Tensor:
        """Computes hidden states as `forward` does, but always returns `(n, B, k · d)`."""
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
            `(n, N, k · d)`; for pooling `none` `(n, N, L, k · d)`, zero after a text's end.
        """
        rows = self.rows(texts)
        if not self.num_adapters:
            return self.frozen(rows).unsqueeze(0)

        def compute(part: list[TokenRow], team: tuple[int, ...]) -> Tensor:
            return self.channel.hidden(self.batch(part, team, None), self.pool, retain=False)

        return self._infer(rows, self.channel.teams(len(self.pool)), compute)

    def frozen(self, texts: Sequence[Text] | Sequence[TokenRow]) -> Tensor:
        """Computes hidden states h(x, 0) of the frozen model without gradient, and caches them for each text.

        Each text is sent once, to one operator. With a store, texts of earlier runs aren't sent at all.

        Returns:
            `(N, k · d)`; for pooling `none` `(N, L, k · d)`, zero after a text's end. For pairs read apart
            `(N, 2 k · d)`, |u − v| and u · v, and `(N, 3 k · d)` with the pair as one sequence before them.
        Raises:
            CheckpointError: the store is damaged.
            ConfigError: pairs are read apart, and an example is no pair.
        """
        rows = self.rows(texts)
        if self.pairs == "joint":
            return self._frozen_stack(rows)
        if any(len(row.parts) != 2 for row in rows):
            raise ConfigError("There are single texts among pairs that are read apart.", remedy="Use pairs='joint'.")
        first, second = ([row.parts[side] for row in rows] for side in (0, 1))
        everything = self._frozen_stack([*(rows if self.pairs == "both" else []), *first, *second])
        *joint, u, v = everything.split(len(rows)) if rows else (everything,) * 3
        apart = torch.cat([(u - v).abs(), u * v], dim=-1).clamp(-LARGEST, LARGEST)
        return torch.cat([*joint[: int(self.pairs == "both")], apart], dim=-1)

    def fetch(self, rows: Sequence[TokenRow]) -> None:
        """Fetches what `frozen` will need for these rows, so that it sends nothing later.

        The order in which texts are sent doesn't depend on the order of the rows.
        """
        parts = [part for row in rows for part in row.parts] if self.pairs != "joint" else []
        self._fetch(self._source, [*(rows if self.pairs != "apart" else []), *parts], self._ask_states)

    @contextmanager
    def offline(self) -> Generator[None]:
        """Context in which texts whose hidden states haven't been fetched are refused instead of sent, in all threads.

        Raises:
            PrivacyError: in the context, for such texts.
        """
        with self._fetching:
            self._offline += 1
        try:
            yield
        finally:
            with self._fetching:
                self._offline -= 1

    def frozen_states(self, rows: Sequence[TokenRow]) -> list[Tensor]:
        """Returns h(x, 0) of each token row, from memory, from disk, or from an operator.

        Returns:
            `(k · d,)` for each row; for pooling `none` `(L, k · d)`, with the row's own L.
        Raises:
            CheckpointError: the store is damaged.
            PrivacyError: texts would be sent inside of `offline`.
        """
        self._fetch(self._source, rows, self._ask_states)
        return self._cache.take(self._source, rows)

    def _ask_states(self, part: list[TokenRow], operator: Operator) -> list[Tensor]:
        hidden = operator.forward(self.tokenizer.pad(part), (), self.readout, None, codec=self._source.codec)
        by_token = self.pooling == "none"
        return [h[: len(row)] if by_token else h for row, h in zip(part, hidden[0], strict=True)]

    def _frozen_stack(self, rows: Sequence[TokenRow]) -> Tensor:
        hidden = self.frozen_states(rows)
        return pad_sequence(hidden, batch_first=True) if hidden else torch.empty(0, self.hidden_size)

    def tangents(
        self,
        texts: Sequence[Text] | Sequence[TokenRow],
        directions: Directions,
        *,
        readout: Readout | None = None,
        codec: Codec = "fp16",
    ) -> Tensor:
        """Computes J(x) v, how hidden states change along public directions of adapters (`blindtune.models.tangents`).

        Texts are sent and cached as by `frozen`, once for every 8 directions; pairs as one sequence.

        Args:
            readout: which states, with another pooling than `none`. Default: the model's output, pooled as by `frozen`.
        Returns:
            `(N, count, k · d)`.
        Raises:
            ConfigError: the servers don't offer as many directions, or such a rank; or the pooling is `none`.
        """
        readout = Readout(pooling=self.pooling) if readout is None else readout
        check_offered(directions, readout, self.info)
        limits, last = self.info.limits, directions.first + directions.count
        rows = self.rows(texts)
        # it is the same in every call, or else texts would be sent again in other groups of directions
        size = max(1, min(DIRECTIONS_AT_ONCE, limits.max_tokens // self.max_length))
        width = readout.size(self.info.hidden_size)
        parts: list[Tensor] = []
        for first in range(directions.first, last, size):
            some = directions.model_copy(update={"first": first, "count": min(size, last - first)})

            def fetch(part: list[TokenRow], operator: Operator, some: Directions = some) -> list[Tensor]:
                return list(operator.tangents(self.tokenizer.pad(part), readout, some, codec=codec).unbind(1))

            source = FeatureSource(self.info, readout, codec, some)
            self._fetch(source, rows, fetch, some.count)
            states = self._cache.take(source, rows)
            parts.append(torch.stack(states) if states else torch.empty(0, some.count, width))
        return torch.cat(parts, dim=1)

    def _fetch(
        self,
        source: FeatureSource,
        rows: Sequence[TokenRow],
        ask: Callable[[list[TokenRow], Operator], list[Tensor]],
        copies: int = 1,
    ) -> None:
        """Sees to it that what a source gives for each row is kept, and asks the operators for what isn't.

        Args:
            ask: asks an operator for the states of some rows.
            copies: number of copies of a row that the operator computes.
        """

        def compute(part: list[TokenRow], team: tuple[int, ...]) -> Tensor:
            self._cache.add(source, part, ask(part, self.pool.operators[team[0]]))
            return torch.empty(0)

        with self._fetching:
            missing = self._cache.missing(source, rows)
            if missing and self._offline:
                raise PrivacyError(
                    f"{len(missing)} texts were not fetched before labels were used. Sending them now could reveal "
                    "labels.",
                    remedy="Call fetch(texts) or prepare(texts, labels) of the model first, with all texts it needs.",
                )
            if missing:
                self._in_chunks(missing, PlainChannel().teams(len(self.pool)), compute, copies)

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
            `(n, N, k · d)`, or `(n, N, L, k · d)`.
        """
        pairs = self._in_chunks(rows, teams, compute)
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

    def _in_chunks(
        self,
        rows: Sequence[TokenRow],
        teams: Sequence[tuple[int, ...]],
        compute: Callable[[list[TokenRow], tuple[int, ...]], Tensor],
        copies: int | None = None,
    ) -> list[tuple[list[int], Tensor]]:
        """Computes rows as `_infer` does. Returns the indices of each chunk's rows with its hidden states."""
        order = sorted(range(len(rows)), key=lambda index: (len(rows[index]), rows[index].ids, rows[index].types))
        copies = max(1, self.num_adapters) if copies is None else copies
        tokens_per_team = sum(len(row) for row in rows) * copies // len(teams) + 1
        max_tokens = min(
            INFERENCE_TOKENS, self.info.limits.max_tokens, tokens_per_team
        )  # so that few texts are also divided among all teams
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
        return [pair for results in by_team for pair in results if pair[0]]

    def close(self) -> None:
        """Closes all connections and the store."""
        self.pool.close()
        self._cache.close()

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
        return RemoteBatch(tuple(rows), tokens, self.info.name, spec, weights, self.readout, seed, operators, version)

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


def select_layers(info: ModelInfo, layers: Layers) -> tuple[int, ...]:
    """Returns the indices of the named states in rising order; none for the last state alone.

    Raises:
        UnknownReadout: the model doesn't have these layers.
    """
    last = info.states - 1
    if layers == "last" or (not isinstance(layers, str) and list(layers) == [last]):
        return ()
    if isinstance(layers, str):
        if layers not in ("upper", "all", "spread"):
            raise UnknownReadout(
                f"There are no layers {layers!r}.", remedy="Write last, upper, all, spread, or numbers such as 3-6."
            )
        if layers == "spread" and last >= SPREAD:
            return tuple(round(last * (i + 1) / SPREAD) for i in range(SPREAD))
        return tuple(range(info.states // 2 if layers == "upper" else 0, info.states)) if last else ()
    if not layers:
        raise UnknownReadout("The readout has no layers.", remedy="Name at least one, or last, upper or all.")
    return tuple(sorted(set(layers)))


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
