"""Forward and backward for n adapters at once, with retained autograd graphs.

Stateless to the outside: adapters and graphs are caches. A backward call that finds no graph runs the
forward pass again and gets the identical answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blindtune.errors import AdapterMismatch, UnknownAdapter
from blindtune.models import FrozenBackbone, LoraLayout, Tokens
from blindtune.server.cache import ByteLRU
from blindtune.wire import LoraSpec, Pooling


@dataclass(frozen=True)
class StoredAdapter:
    """Uploaded weights `(P,)` float32 and where each matrix lies in them."""

    model: str
    layout: LoraLayout
    weights: Tensor


@dataclass(frozen=True)
class RetainedGraph:
    """The output of a forward pass, `(n, B, d)` or a trunk's `(N, d)`, with its autograd graph, and the leaf that it
    depends on: weights `(n, P)` or a trunk's input `(N, d)`."""

    hidden: Tensor
    leaf: Tensor


@dataclass(frozen=True)
class Call:
    """A forward pass: who asks, which adapters (by content), pooling, seed, and the tokens."""

    tenant: str
    adapters: list[str]
    pooling: Pooling
    seed: int | None
    tokens: Tokens

    def key(self) -> str:
        """SHA-256 of everything that the result depends on."""
        digest = hashlib.sha256(repr((self.tenant, self.adapters, self.pooling, self.seed)).encode())
        for name, tensor in self.tokens.tensors().items():
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


class Engine:
    """Runs one hosted model. Not thread-safe: the app gives each engine a thread of its own."""

    def __init__(
        self,
        name: str,
        backbone: FrozenBackbone,
        adapters: ByteLRU[tuple[str, str], StoredAdapter],
        graphs: ByteLRU[tuple[str, str], RetainedGraph],
    ) -> None:
        self.name, self.backbone = name, backbone
        self._adapters, self._graphs = adapters, graphs

    def layout(self, spec: LoraSpec) -> LoraLayout:
        """Where the matrices of an adapter lie; raises `UnknownTargetModule` or `AdapterMismatch`."""
        return LoraLayout(spec, self.backbone.lora.shapes)

    def forward(self, call: Call, *, retain: bool) -> Tensor:
        """h(x, θ_i): `(n, B, d)` or `(n, B, L, d)`, float32, on the CPU. `retain` keeps the graph for `backward`."""
        if not call.adapters:
            return self.backbone.forward(call.tokens, call.pooling, seed=call.seed).float().cpu()
        layout, weights = self._stack(call)
        if not retain:
            with torch.no_grad():
                return self.backbone.forward(call.tokens, call.pooling, layout, weights, seed=call.seed).float().cpu()
        graph, nbytes = self._graph(call, layout, weights)
        self._graphs.put((self.name, call.key()), graph, nbytes)
        return graph.hidden.detach().float().cpu()

    def answer_bytes(self, call: Call, cotangents: int) -> int:
        """Size of the gradients for so many cotangents. Raises `UnknownAdapter` or `AdapterMismatch`."""
        layout, _ = self._stored(call)
        return cotangents * len(call.adapters) * layout.size * self._precision.itemsize

    def backward(self, call: Call, cotangents: Tensor) -> tuple[Tensor, bool]:
        """Vector-Jacobian products (P3EFT, eq. 1) for cotangents `(m, n, B, d)`.

        Returns:
            Gradients `(m, n, P)` on the CPU, float32 (float64 from a model in float64), and whether the graph had been
            retained.
        Raises:
            AdapterMismatch: cotangents whose shape isn't that of the hidden states.
        """
        graph = self._graphs.pop((self.name, call.key()))
        retained = graph is not None
        if graph is None:
            layout, weights = self._stack(call)
            expected = (len(call.adapters), len(call.tokens))
            if tuple(cotangents.shape[1:3]) != expected:  # before any work is done for it
                raise _misfit(cotangents, expected)
            graph, _ = self._graph(call, layout, weights)
        if cotangents.shape[1:] != graph.hidden.shape:
            raise _misfit(cotangents, tuple(graph.hidden.shape))
        gradients: list[Tensor] = []
        for index, cotangent in enumerate(cotangents):
            (gradient,) = torch.autograd.grad(
                graph.hidden,
                graph.leaf,
                cotangent.to(graph.hidden),
                retain_graph=index < len(cotangents) - 1,
            )
            gradients.append(gradient.cpu())
        return torch.stack(gradients), retained

    @property
    def _precision(self) -> torch.dtype:
        """Of adapters and their gradients."""
        return torch.float64 if self.backbone.dtype == torch.float64 else torch.float32

    def _stack(self, call: Call) -> tuple[LoraLayout, Tensor]:
        """The adapters' common layout and their weights `(n, P)`, where the model is."""
        layout, weights = self._stored(call)
        return layout, torch.stack(weights).to(self.backbone.device, self._precision)

    def _stored(self, call: Call) -> tuple[LoraLayout, list[Tensor]]:
        """The adapters' common layout and their weights as they came, `(P,)` each."""
        stored: list[StoredAdapter] = []
        for sha256 in call.adapters:
            adapter = self._adapters.get((call.tenant, sha256))
            if adapter is None or adapter.model != self.name:
                raise UnknownAdapter(
                    f"No adapter {sha256[:12]}… for the model {self.name!r} is in the cache.", remedy="Upload it again."
                )
            stored.append(adapter)
        first = stored[0].layout
        for adapter in stored[1:]:
            if adapter.layout.spec != first.spec:
                raise AdapterMismatch(
                    "The adapters of one request differ in rank, scaling, dropout or target modules, or in fixed A.",
                    remedy="Send adapters of different shape in requests of their own.",
                )
        return first, [adapter.weights for adapter in stored]

    def _graph(self, call: Call, layout: LoraLayout, weights: Tensor) -> tuple[RetainedGraph, int]:
        """The forward pass with its graph, and the bytes that the graph holds beyond the model's own weights."""
        leaf = weights.detach().requires_grad_()
        return keep_graph(
            self.backbone.model,
            leaf,
            lambda: self.backbone.forward(call.tokens, call.pooling, layout, leaf, seed=call.seed),
        )


def keep_graph(model: nn.Module, leaf: Tensor, run: Callable[[], Tensor]) -> tuple[RetainedGraph, int]:
    """What `run` computes from `leaf`, with its graph, and the bytes that the graph holds beyond the model's own."""
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would keep its graph alive, and that the tensor, for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, _same):
        hidden = run()
    return RetainedGraph(hidden, leaf), sum(held.values()) + hidden.nbytes + leaf.nbytes


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _misfit(cotangents: Tensor, expected: tuple[int, ...]) -> AdapterMismatch:
    return AdapterMismatch(
        f"Cotangents have shape {tuple(cotangents.shape)}; the hidden states begin with {expected}.",
        remedy="Send cotangents of shape (m, n, B, d), the hidden states' shape after m.",
    )
