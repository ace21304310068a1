"""Describes what each operator will see of a run, and what it can learn from that.

The command line prints these descriptions before training.
"""

from __future__ import annotations

from blindtune.labels.model import PrivateModel
from blindtune.labels.placement import placement


def exposure(model: PrivateModel, steps: int, *, random_adam_moments: float = 0.0) -> list[str]:
    """Describes, in one line for each operator, what it will see in a run of `steps` steps and can learn from that.

    The lines follow from the method and the operators; nothing is sent. They don't include what the texts themselves
    reveal about labels.

    Args:
        random_adam_moments: size of the secret random Adam moments that the optimizer starts from
            (`blindtune.randomise_adam_moments`); 0 if it starts from zeros.
    Raises:
        SingleOperator: the method sends padded adapters, and there is one operator, without `allow_single_operator`.
    """
    method, operators = model.method, model.backbone.pool.operators
    parts = placement(model.backbone.channel, len(operators), steps)
    lines = [method.exposure(part, len(operators), random_adam_moments=random_adam_moments) for part in parts]
    pairs = zip(operators, lines, strict=True)
    return [f"operator {index}: {operator.transport.url}  {line}" for index, (operator, line) in enumerate(pairs)]
