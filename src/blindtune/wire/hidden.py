"""The tensors of a forward response: hidden states of k layers, in the codec that the request named.

In fp32 there is one tensor, `hidden [n, B, k, d]` or `[n, B, L, k, d]` for pooling `none`; without the axis k if the
request names no layers. In other codecs each state is a row of its own (`blindtune.wire.quantize`), and padding isn't
sent.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from blindtune.wire.codec import check_tensor
from blindtune.wire.quantize import dequantize, quantize
from blindtune.wire.schema import Codec, Readout


def encode_hidden(hidden: Tensor, lengths: Tensor, readout: Readout, codec: Codec) -> dict[str, Tensor]:
    """Returns the tensors that represent hidden states `(n, B, k · d)` or `(n, B, L, k · d)`, float32.

    Args:
        lengths: number of tokens of each text, `(B,)`.
    """
    if codec == "fp32":
        return {"hidden": by_layer(hidden, readout)}
    states = hidden.unflatten(-1, (readout.width, -1))
    if readout.pooling == "none":
        states = states[:, _mask(lengths, hidden.shape[2])]  # (n, tokens, k, d)
    return quantize("hidden", states.reshape(-1, states.shape[-1]), codec)


def decode_hidden(
    tensors: Mapping[str, Tensor], adapters: int, lengths: Tensor, readout: Readout, codec: Codec, hidden_size: int
) -> Tensor:
    """Returns what `encode_hidden` encoded, zero after a text's end.

    Args:
        adapters: n.
        lengths: number of tokens of each text, `(B,)`.
        hidden_size: d.
    Raises:
        InvalidTensor, NonFiniteTensor, CodecMismatch: the tensors don't fit the request.
    """
    by_token, width = readout.pooling == "none", readout.width
    size = readout.size(hidden_size) // width
    texts, longest = len(lengths), int(lengths.max())
    if codec == "fp32":
        positions = (longest,) if by_token else ()
        shape = (adapters, texts, *positions, *layer_axes(readout, hidden_size))
        return flat(check_tensor(tensors, "hidden", shape, torch.float32), readout)
    count = int(lengths.sum()) if by_token else texts
    rows = dequantize("hidden", tensors, codec, size)
    check_tensor({"hidden": rows}, "hidden", (adapters * count * width, size), torch.float32)
    states = rows.reshape(adapters, count, width * size)
    if not by_token:
        return states
    result = torch.zeros(adapters, texts, longest, width * size)
    result[:, _mask(lengths, longest)] = states
    return result


def layer_axes(readout: Readout, hidden_size: int) -> tuple[int, ...]:
    """Returns the sizes of the last axes of states on the wire: k and d if the request names k layers, else d alone."""
    size = readout.size(hidden_size) // readout.width
    return (readout.width, size) if readout.layers else (size,)


def by_layer(states: Tensor, readout: Readout) -> Tensor:
    """Returns states `(…, k · d)` as they are sent, with an axis of k if the request names k layers."""
    return states.unflatten(-1, (readout.width, -1)).contiguous() if readout.layers else states.contiguous()


def flat(states: Tensor, readout: Readout) -> Tensor:
    """Returns states as `(…, k · d)`. The inverse of `by_layer`."""
    return states.flatten(-2) if readout.layers else states


def _mask(lengths: Tensor, longest: int) -> Tensor:
    """Returns a mask `(B, L)` of the tokens that aren't padding."""
    return torch.arange(longest) < lengths.unsqueeze(1)
