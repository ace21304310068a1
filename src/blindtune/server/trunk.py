"""The middle of a split model: hidden states in, hidden states out, and cotangents back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from blindtune.errors import EmptyBatch, GraphLost, InvalidTensor, SequenceTooLong
from blindtune.models import FrozenBackbone
from blindtune.models.split import pack, unpack
from blindtune.server.cache import ByteLRU
from blindtune.server.engine import RetainedGraph, keep_graph
from blindtune.wire import Limits, TrunkRequest, TrunkResponse, dequantize, quantize

Answer = tuple[TrunkResponse, dict[str, Tensor]]


class Trunk:
    """Runs one model's trunk. Not thread-safe: it shares the engine's thread."""

    def __init__(self, name: str, backbone: FrozenBackbone, graphs: ByteLRU[tuple[str, str], RetainedGraph]) -> None:
        if backbone.split is None:
            raise ValueError(f"{name} is not split")
        self.name, self.backbone = name, backbone
        self._part = backbone.split.parts["trunk"]
        self._dim = int(backbone.config.hidden_size)
        self._graphs = graphs

    @staticmethod
    def check_lengths(lengths: Tensor, limits: Limits) -> None:
        """Raises `EmptyBatch` or `SequenceTooLong` before anything is allocated."""
        if len(lengths) == 0 or int(lengths.min()) < 1:
            raise EmptyBatch(
                f"The batch has {len(lengths)} examples, or one without tokens.",
                remedy="Send at least one example with at least one token each.",
            )
        longest = int(lengths.max())
        if longest > limits.max_length:
            raise SequenceTooLong(
                f"An example is {longest} tokens long; the limit is {limits.max_length}.",
                remedy=f"Truncate to {limits.max_length} tokens (--max-length).",
            )
        if longest * len(lengths) > limits.max_tokens:
            raise SequenceTooLong(
                f"{len(lengths)} examples of {longest} tokens are {longest * len(lengths)}; the limit is "
                f"{limits.max_tokens}.",
                remedy="Send a smaller batch.",
            )

    def forward(self, tenant: str, body_sha: str, request: TrunkRequest, received: Mapping[str, Tensor]) -> Answer:
        """s_B for s_A. `retain` keeps the graph for `backward`.

        Args:
            body_sha: SHA-256 of the request's body, the name of the graph.
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
        """Gradients with respect to s_A, for cotangents with respect to s_B.

        Raises:
            GraphLost: the forward pass isn't in memory, and the request doesn't hold s_A.
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
