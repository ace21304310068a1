"""Secret random moments that Adam starts from (P3EFT, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from blindtune.errors import ConfigError
from blindtune.methods.options import check_positive
from blindtune.privacy.randomness import SecureGenerator

SMALLEST = 0.1
"""Second moments are at least this part of `size`², so that no step is many times longer than Adam's own."""


def randomise_moments(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[Tensor],
    size: float,
    generator: SecureGenerator | None = None,
) -> None:
    """Lets an optimizer begin with secret random moments, as `TrainConfig(random_moments=size)` does.

        m_0 = size · z,    v_0 = max(size² z'², 0.1 size²),    z, z' ~ N(0, 1)

    Whoever sees consecutive adapters can't compute the first steps' gradients then (P3EFT, section 3.2). That wears off
    as Adam forgets: after some 1 / (1 − β₁) steps in the first moment and 1 / (1 − β₂) in the second.

        optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=1e-3)
        randomise_moments(optimizer, backbone.parameters(), 0.1)

    Args:
        optimizer: `Adam` or `AdamW`, before its first step.
        parameters: whose moments; those of the adapters are what operators could compute. Frozen ones are left alone.
        size: standard deviation of m_0, in units of gradients. One much smaller than they are hides nothing.
        generator: secret randomness; from the operating system if left out.
    Raises:
        ConfigError: another optimizer, one that has stepped already, a parameter that isn't its own, or a size that
            isn't positive.
    """
    check_positive(size=size)
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        raise ConfigError(
            f"{type(optimizer).__name__} has no moments that could be random.", remedy="Use torch.optim.AdamW or Adam."
        )
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        if parameter not in groups:
            raise ConfigError(
                f"A parameter of shape {tuple(parameter.shape)} is not among the optimizer's.",
                remedy="Give the optimizer all parameters whose moments shall be random.",
            )
        if optimizer.state.get(parameter):
            raise ConfigError("The optimizer has stepped already.", remedy="Randomise moments before its first step.")
    generator = generator or SecureGenerator()
    for parameter in trained:
        first, second = (size * generator.normal(*parameter.shape) for _ in range(2))
        squares = second.square().clamp_min(SMALLEST * size**2).to(parameter)
        on_device = groups[parameter]["fused"] or groups[parameter]["capturable"]  # as torch makes it
        step = torch.tensor(0.0, device=parameter.device if on_device else None)
        state = {"step": step, "exp_avg": first.to(parameter), "exp_avg_sq": squares}
        optimizer.state[parameter] = state | (
            {"max_exp_avg_sq": squares.clone()} if groups[parameter]["amsgrad"] else {}
        )
