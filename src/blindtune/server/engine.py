"""Runs forward and backward passes for n adapters at once, and retains autograd graphs.

Adapters and graphs are in caches, which may drop them at any time. A client uploads a dropped adapter again. If the
graph of a backward call was dropped, the forward pass runs again, and the response is identical.

B: examples; L: tokens; n: adapters; m: cotangents; k: states; d: hidden size; P: weights of an adapter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blindtune.errors import AdapterMismatch, UnknownAdapter
from blindtune.models import FrozenBackbone, LoraLayout, Tokens
from blindtune.models.tangents import directions_layout, tangents
from blindtune.server.cache import ByteLRU
from blindtune.wire import Directions, LoraSpec, Readout


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter uploaded for one model: its weights `(P,)`, float32, and the positions of its matrices in them."""

    model: str
    layout: LoraLayout
    weights: Tensor


@dataclass(frozen=True)
class RetainedGraph:
    """A forward pass whose autograd graph is kept for a backward pass.

    Attributes:
        hidden: output of the pass: `(n, B, k · d)`, `(n, B, L, k · d)`, or `(N, d)` for a trunk and N packed tokens.
        leaf: tensor with respect to which gradients are computed: the weights `(n, P)`, or the trunk's input `(N, d)`.
    """

    hidden: Tensor
    leaf: Tensor


@dataclass(frozen=True)
class Call:
    """Everything that determines the result of a forward pass, apart from the model.

    Attributes:
        adapters: SHA-256 hashes of uploads.
        seed: seed of dropout, which is off if it is None.
        directions: directions of tangents, which the pass returns in place of hidden states; None for none.
    """

    tenant: str
    adapters: list[str]
    readout: Readout
    seed: int | None
    tokens: Tokens
    directions: Directions | None = None

    @property
    def copies(self) -> int:
        """n, the number of adapters or directions; 1 without any."""
        return max(1, len(self.adapters)) if self.directions is None else self.directions.count

    def key(self) -> str:
        """Returns the SHA-256 of the call in hexadecimal, under which its graph is cached."""
        digest = hashlib.sha256(repr((self.tenant, self.adapters, self.readout, self.seed)).encode())
        for name, tensor in self.tokens.tensors().items():
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


class Engine:
    """Runs one hosted model. It is not thread-safe: the host runs each engine in a thread of its own.

    Args:
        name: name of the hosted model.
        backbone: the hosted model.
        adapters: cache of adapters by tenant and SHA-256, shared by all models.
        graphs: cache of graphs by model and `Call.key()`, shared by all models.
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
        """Returns the positions of an adapter's matrices in its weight vector.

        Raises:
            UnknownTargetModule, AdapterMismatch: see `LoraLayout`.
        """
        return LoraLayout(spec, self.backbone.lora.shapes)

    def forward(self, call: Call, *, retain: bool) -> Tensor:
        """Computes hidden states h(x, θ_i), or tangents J(x) v_i.

        Args:
            retain: whether to keep the graph for `backward`.
        Returns:
            `(n, B, k · d)`, or `(n, B, L, k · d)` for the pooling `none`; float32, on the CPU. Without adapters n is 1.
        Raises:
            UnknownAdapter: an adapter isn't in the cache, or belongs to another model.
            AdapterMismatch: the adapters differ in shape.
            UnknownTargetModule, AdapterMismatch: see `LoraLayout`, for directions.
        """
        if call.directions is not None:
            return tangents(self.backbone, call.tokens, call.readout, call.directions).float().cpu()
        if not call.adapters:
            return self.backbone.forward(call.tokens, call.readout, seed=call.seed).float().cpu()
        layout, weights = self._stack(call)
        if not retain:
            with torch.no_grad():
                return self.backbone.forward(call.tokens, call.readout, layout, weights, seed=call.seed).float().cpu()
        graph, nbytes = self._graph(call, layout, weights)
        self._graphs.put((self.name, call.key()), graph, nbytes)
        return graph.hidden.detach().float().cpu()

    def check_directions(self, directions: Directions) -> None:
        """Raises `UnknownTargetModule` or `AdapterMismatch` for directions that the model doesn't have."""
        directions_layout(directions, self.backbone.lora.shapes)

    def answer_bytes(self, call: Call, cotangents: int) -> int:
        """Returns the size in bytes of the gradients for a number of cotangents.

        Raises:
            UnknownAdapter, AdapterMismatch: see `forward`.
        """
        layout, _ = self._stored(call)
        return cotangents * len(call.adapters) * layout.size * self._precision.itemsize

    def backward(self, call: Call, cotangents: Tensor) -> tuple[Tensor, bool]:
        """Computes vector-Jacobian products (P3EFT, eq. 1) for cotangents `(m, n, B, k · d)` or
        `(m, n, B, L, k · d)`.

        Returns:
            Gradients `(m, n, P)` on the CPU, float32 (float64 from a model in float64), and whether the graph was in
            the cache.
        Raises:
            UnknownAdapter: the graph isn't in the cache, and an adapter isn't either, or belongs to another model.
            AdapterMismatch: the adapters differ in shape, or the cotangents don't have the hidden states' shape.
        """
        graph = self._graphs.pop((self.name, call.key()))
        retained = graph is not None
        if graph is None:
            layout, weights = self._stack(call)
            expected = (len(call.adapters), len(call.tokens))
            if tuple(cotangents.shape[1:3]) != expected:  # checked before the forward pass
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
        """Returns the adapters' common layout and their weights `(n, P)`, on the model's device."""
        layout, weights = self._stored(call)
        return layout, torch.stack(weights).to(self.backbone.device, self._precision)

    def _stored(self, call: Call) -> tuple[LoraLayout, list[Tensor]]:
        """Returns the adapters' common layout and their weights as uploaded, `(P,)` each."""
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
                    remedy="Send adapters of different shapes in requests of their own.",
                )
        return first, [adapter.weights for adapter in stored]

    def _graph(self, call: Call, layout: LoraLayout, weights: Tensor) -> tuple[RetainedGraph, int]:
        """Runs the forward pass. Returns its graph, and the size of the graph in bytes without the model's weights."""
        leaf = weights.detach().requires_grad_()
        return keep_graph(
            self.backbone.model,
            leaf,
            lambda: self.backbone.forward(call.tokens, call.readout, layout, leaf, seed=call.seed),
        )


def keep_graph(model: nn.Module, leaf: Tensor, run: Callable[[], Tensor]) -> tuple[RetainedGraph, int]:
    """Calls `run` and keeps its autograd graph.

    Args:
        model: model whose weights aren't counted in the size of the graph.
        leaf: tensor from which `run` computes its result, and with respect to which gradients are computed.
    Returns:
        The graph, and its size in bytes.
    """
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # otherwise the tensor and its graph would keep each other alive

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
