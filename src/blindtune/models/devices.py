"""Checks the names of torch devices, from the command line and from the library's arguments, before use."""

from __future__ import annotations

import torch

from blindtune.errors import ConfigError


def find_device(name: str) -> torch.device:
    """Returns an available torch device by its name, such as `cpu`, `cuda` or `cuda:1`.

    Raises:
        ConfigError: there is no such device, or this build of torch can't use it.
    """
    try:
        device = torch.device(name)
        # `torch.device` accepts `cuda` without CUDA, and `meta`, whose tensors have no values
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # ImportError: backends of other packages
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"There is no device {name!r} here: {reason}",
            remedy="Use cpu, or cuda where torch was installed with it and the machine has a GPU (see `nvidia-smi`).",
        ) from None
    return device
