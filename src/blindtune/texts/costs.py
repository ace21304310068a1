"""Measures a run's costs for the client: bytes of messages, seconds, floating-point operations, memory."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

PROCESS = Path("/proc/self")
Shape = tuple[int, ...]


def _attention(query: Shape, key: Shape, value: Shape, *_args: object, **_kwargs: object) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    gradient: Shape, query: Shape, key: Shape, value: Shape, *_args: object, **_kwargs: object
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


ATTENTION_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Attention on the CPU. Torch's counter of operations includes only attention kernels of GPUs."""


@dataclass(frozen=True)
class Costs:
    """The costs of a run for the client.

    Attributes:
        traffic: bytes of the trunk's HTTP messages by kind.
        sent, received: bytes of all HTTP messages.
        seconds: duration of the training steps.
        flops: floating-point operations in the client's process.
        memory: peak memory in bytes.
    """

    traffic: dict[str, int] = field(default_factory=dict[str, int])
    sent: int = 0
    received: int = 0
    seconds: float = 0.0
    flops: int = 0
    memory: int = 0

    def __add__(self, other: Costs) -> Costs:
        """Returns the costs of two consecutive processes: sums, and the larger peak memory."""
        return Costs(
            dict(Counter(self.traffic) + Counter(other.traffic)), self.sent + other.sent,
            self.received + other.received, self.seconds + other.seconds, self.flops + other.flops,
            max(self.memory, other.memory),
        )  # fmt: skip


def reset_peak_memory() -> bool:
    """Resets the peak that `peak_memory` returns. Returns whether it could be reset, which works on Linux only."""
    try:
        (PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """Returns the process's peak memory in bytes, Python and its libraries included, since `reset_peak_memory`.

    If the peak can't be reset, it is the peak since the process started; 0 if the platform doesn't report one.
    """
    try:
        status = (PROCESS / "status").read_text()
    except OSError:
        status = ""
    match = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    if match:
        return 1024 * int(match[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_device_memory(device: torch.device) -> int:
    """Returns the peak memory of tensors on a GPU in bytes, since the process started; 0 for the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
