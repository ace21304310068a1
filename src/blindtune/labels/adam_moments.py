"""Secret random initial values of Adam's moments (P3EFT, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from blindtune.checks import check_positive
from blindtune.errors import ConfigError
from blindtune.privacy.randomness import SecureGenerator

SMALLEST = 0.1
"""Lower bound on the second moments, as a fraction of `size`².

With smaller second moments, some steps would be many times longer than Adam's usual steps.
"""


def randomise_adam_moments(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[Tensor],
    size: float,
    generator: SecureGenerator | None = None,
) -> None:
    """Sets an optimizer's Adam moments to secret random values, as `TrainConfig(random_adam_moments=size)` does.

        m_0 = size · z,    v_0 = max(size² z'², 0.1 size²),    z, z' ~ N(0, 1)

    An observer of consecutive adapters then can't compute the first steps' gradients (P3EFT, section 3.2). The effect
    decays with Adam's averages: after about 1 / (1 − β₁) steps in the first moment and 1 / (1 − β₂) in the second.

        optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=1e-3)
        randomise_adam_moments(optimizer, backbone.parameters(), 0.1)

    Args:
        optimizer: `Adam` or `AdamW`, before its first step.
        parameters: parameters whose moments are set: usually those of the adapters, since operators see adapters.
            Frozen parameters are skipped.
        size: standard deviation of m_0, in units of gradients. A value much smaller than the gradients hides nothing.
        generator: secret random generator. Default: seeded by the operating system.
    Raises:
        ConfigError: the optimizer is of another class or has stepped already, a parameter isn't among the optimizer's,
            or the size isn't positive.
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
                remedy="Create the optimizer with all parameters whose moments are to be random.",
            )
        if optimizer.state.get(parameter):
            raise ConfigError(
                "The optimizer has stepped already.", remedy="Randomise its Adam moments before its first step."
            )
    generator = generator or SecureGenerator()
    for parameter in trained:
        first, second = (size * generator.normal(*parameter.shape) for _ in range(2))
        squares = second.square().clamp_min(SMALLEST * size**2).to(parameter)
        on_device = groups[parameter]["fused"] or groups[parameter]["capturable"]  # torch keeps `step` there too
        step = torch.tensor(0.0, device=parameter.device if on_device else None)
        state = {"step": step, "exp_avg": first.to(parameter), "exp_avg_sq": squares}
        optimizer.state[parameter] = state | (
            {"max_exp_avg_sq": squares.clone()} if groups[parameter]["amsgrad"] else {}
        )
