"""Runs forward and backward passes for n adapters at once, and retains autograd graphs.

Adapters and graphs lie in caches, which may drop them at any time. A client uploads a dropped adapter again. A backward
call that finds no graph runs the forward pass again and gets the identical answer.

B: examples; L: tokens; n: adapters; m: cotangents; d: hidden size; P: weights of an adapter.
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
    """An upload for one model: its weights `(P,)` float32, and the layout that says where each matrix lies in them."""

    model: str
    layout: LoraLayout
    weights: Tensor


@dataclass(frozen=True)
class RetainedGraph:
    """A forward pass whose autograd graph is kept for a backward pass.

    `hidden` is its output: `(n, B, d)`, `(n, B, L, d)` or, of a trunk, `(N, d)` for N packed tokens. `leaf` is what
    gradients are taken of: the weights `(n, P)`, or the trunk's input `(N, d)`.
    """

    hidden: Tensor
    leaf: Tensor


@dataclass(frozen=True)
class Call:
    """All that the result of a forward pass depends on, apart from the model.

    `adapters` are SHA-256 hashes of uploads. Without a `seed` there is no dropout.
    """

    tenant: str
    adapters: list[str]
    pooling: Pooling
    seed: int | None
    tokens: Tokens

    def key(self) -> str:
        """The SHA-256 of the call in hexadecimal, under which its graph is kept."""
        digest = hashlib.sha256(repr((self.tenant, self.adapters, self.pooling, self.seed)).encode())
        for name, tensor in self.tokens.tensors().items():
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


class Engine:
    """Runs one hosted model. It is not thread-safe: the host gives each engine a thread of its own.

    Args:
        name: the hosted model's.
        adapters: the cache (tenant, SHA-256) -> adapter, which all models share.
        graphs: the cache (model, `Call.key()`) -> graph, which all models share.
    """

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
        """Where the matrices of an adapter lie in its weights. Raises `UnknownTargetModule` or `AdapterMismatch`."""
        return LoraLayout(spec, self.backbone.lora.shapes)

    def forward(self, call: Call, *, retain: bool) -> Tensor:
        """Computes h(x, θ_i). `retain` keeps the graph for `backward`.

        Returns:
            `(n, B, d)`, or `(n, B, L, d)` for the pooling `none`; float32, on the CPU. Without adapters n is 1.
        Raises:
            UnknownAdapter: an adapter isn't in the cache, or is another model's.
            AdapterMismatch: the adapters differ in shape.
        """
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
        """Bytes of the gradients for a number of cotangents. Raises `UnknownAdapter` or `AdapterMismatch`."""
        layout, _ = self._stored(call)
        return cotangents * len(call.adapters) * layout.size * self._precision.itemsize

    def backward(self, call: Call, cotangents: Tensor) -> tuple[Tensor, bool]:
        """Computes vector-Jacobian products (P3EFT, eq. 1) for cotangents `(m, n, B, d)` or `(m, n, B, L, d)`.

        Returns:
            Gradients `(m, n, P)` on the CPU, float32 (float64 from a model in float64), and whether the graph had been
            retained.
        Raises:
            UnknownAdapter: an adapter isn't in the cache, or is another model's.
            AdapterMismatch: the adapters differ in shape, or the cotangents don't have the hidden states' shape.
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
        """The dtype of adapters and their gradients."""
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
    """Calls `run` and keeps its autograd graph.

    Args:
        model: its weights don't count as the graph's.
        leaf: the tensor that `run` computes its result from, and that gradients are taken of.
    Returns:
        The graph, and its bytes without the model's weights.
    """
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor and its graph would keep each other alive

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
