"""Runs forward and backward passes of a cut model's trunk.

s_A is the trunk's input and s_B its output, both packed `(N, d)`: the N tokens of a batch without padding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from blindtune.errors import GraphLost, InvalidTensor
from blindtune.models import FrozenBackbone
from blindtune.models.cut.parts import pack, unpack
from blindtune.server.cache import ByteLRU
from blindtune.server.engine import RetainedGraph, keep_graph
from blindtune.wire import TrunkRequest, TrunkResponse, dequantize, quantize

Answer = tuple[TrunkResponse, dict[str, Tensor]]
"""The response's message, and its tensors in the codec `down` of the request."""


class Trunk:
    """Runs one model's trunk. It is not thread-safe; the host runs it in the engine's thread.

    Args:
        name: name of the hosted model.
        backbone: the hosted model, which must be cut.
        graphs: cache of retained graphs, shared by all models.
    Raises:
        UnknownPart: the model isn't cut.
    """

    def __init__(self, name: str, backbone: FrozenBackbone, graphs: ByteLRU[tuple[str, str], RetainedGraph]) -> None:
        self.name, self.backbone = name, backbone
        self._part = backbone.require_cut().parts["trunk"]
        self._dim = int(backbone.config.hidden_size)
        self._graphs = graphs

    def forward(self, tenant: str, body_sha: str, request: TrunkRequest, received: Mapping[str, Tensor]) -> Answer:
        """Computes s_B from s_A. If `request.retain` is true, the graph is kept for `backward`.

        Args:
            tenant: name of the tenant.
            body_sha: SHA-256 of the request's body, under which the graph is cached.
            received: `lengths (B,)` int32, and s_A as `hidden`, in the codec `request.up`.
        Returns:
            s_B as `hidden`, in the codec `request.down`.
        Raises:
            InvalidTensor, CodecMismatch: s_A doesn't fit the lengths or the codec.
        """
        lengths = received["lengths"]
        hidden = self._packed("hidden", request, lengths, received)
        if request.retain:
            graph, nbytes = self._graph(hidden, lengths)
            self._graphs.put((self.name, tenant + body_sha), graph, nbytes)
            result = graph.hidden.detach()
        else:
            with torch.no_grad():
                result = self._run(hidden, lengths)
        sent = quantize("hidden", result.float().cpu(), request.down)
        return TrunkResponse(fingerprint=self.backbone.fingerprint), sent

    def backward(self, tenant: str, body_sha: str, request: TrunkRequest, received: Mapping[str, Tensor]) -> Answer:
        """Computes gradients with respect to s_A from cotangents with respect to s_B.

        Args:
            tenant: name of the tenant.
            body_sha: SHA-256 of the request's body, the seed of the stochastic rounding of the gradients.
            received: `lengths (B,)` int32, and `cotangents` and, if sent again, `hidden` in the codec `request.up`.
        Returns:
            `gradients (N, d)`, in the codec `request.down`.
        Raises:
            GraphLost: the graph of the forward pass isn't in the cache, and the request doesn't contain s_A.
            InvalidTensor, CodecMismatch: a tensor doesn't fit the lengths, the codec or the forward pass.
        """
        lengths = received["lengths"]
        cotangents = self._packed("cotangents", request, lengths, received)
        graph = self._graphs.pop((self.name, tenant + request.forward)) if request.forward else None
        retained = graph is not None
        if graph is None:
            if "hidden.values" not in received:
                raise GraphLost(
                    "The forward pass of this call is no longer in memory.", remedy="Send its hidden states again."
                )
            graph, _ = self._graph(self._packed("hidden", request, lengths, received), lengths)
        if graph.hidden.shape != cotangents.shape:
            raise InvalidTensor(
                f"Cotangents have shape {tuple(cotangents.shape)}, the forward pass had {tuple(graph.hidden.shape)}.",
                remedy="Name the forward call that they belong to.",
            )
        (gradient,) = torch.autograd.grad(graph.hidden, graph.leaf, cotangents.to(graph.hidden))
        generator = torch.Generator().manual_seed(int(body_sha[:14], 16))
        sent = quantize("gradients", gradient.float().cpu(), request.down, generator=generator)
        return TrunkResponse(fingerprint=self.backbone.fingerprint, retained=retained), sent

    def _packed(self, name: str, request: TrunkRequest, lengths: Tensor, received: Mapping[str, Tensor]) -> Tensor:
        packed = dequantize(name, received, request.up, self._dim)
        if len(packed) != int(lengths.sum()):
            raise InvalidTensor(
                f"{name!r} has {len(packed)} tokens; the lengths add up to {int(lengths.sum())}.",
                remedy="Send packed hidden states, without padding.",
            )
        return packed.to(self.backbone.device, self.backbone.dtype)

    def _run(self, packed: Tensor, lengths: Tensor) -> Tensor:
        on_device = lengths.to(packed.device)
        return pack(self._part(unpack(packed, on_device), on_device), on_device)

    def _graph(self, packed: Tensor, lengths: Tensor) -> tuple[RetainedGraph, int]:
        leaf = packed.detach().requires_grad_()
        return keep_graph(self.backbone.model, leaf, lambda: self._run(leaf, lengths))
