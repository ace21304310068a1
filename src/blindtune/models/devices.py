"""Where models run."""

from __future__ import annotations

import torch

from blindtune.errors import ConfigError


def find_device(name: str) -> torch.device:
    """A torch device that is here, such as `cpu`, `cuda` or `cuda:1`.

    Raises:
        ConfigError: no such device, or one that this build of torch can't use.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a build without CUDA knows the name, and meta holds no numbers
    except (RuntimeError, AssertionError, ImportError) as error:  # the last for devices of other packages
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"There is no device {name!r} here: {reason}",
            remedy="Use cpu, or cuda where torch was installed with it and the machine has a GPU (see `nvidia-smi`).",
        ) from None
    return device
