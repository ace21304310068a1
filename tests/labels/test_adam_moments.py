"""Random initial moments in a plain torch loop."""

import pytest
import torch

from blindtune.errors import ConfigError
from blindtune.labels.adam_moments import randomise_adam_moments
from blindtune.privacy.randomness import SecureGenerator

RATE = 1e-3


def quadratic(
    size: float, key: bytes = bytes(32), steps: int = 1, **options: object
) -> tuple[torch.Tensor, list[float]]:
    """A plain loop on |w|²: what the first step changed, and the losses."""
    weights = torch.nn.Parameter(torch.randn(4000, generator=torch.Generator().manual_seed(0)))
    start = weights.detach().clone()
    optimizer = torch.optim.AdamW([weights], lr=RATE, betas=(0.9, 0.99), weight_decay=0.0, **options)
    if size > 0:
        randomise_adam_moments(optimizer, [weights], size, SecureGenerator(key))
    change, losses = None, []
    for _ in range(steps):
        loss = 0.5 * weights.square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        (loss * len(weights)).backward()
        optimizer.step()
        change = weights.detach() - start if change is None else change
    return change, losses


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"foreach": True}, {"fused": True}])
def test_the_first_step_no_longer_tells_its_gradients_signs(options):
    start = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    plain, _ = quadratic(0.0, **options)
    assert ((plain.sign() == -start.sign()).float().mean()) > 0.99
    random, _ = quadratic(30.0, **options)
    assert abs(float((random.sign() == -start.sign()).float().mean()) - 0.5) < 0.05
    other, _ = quadratic(30.0, bytes([1] * 32), **options)
    assert abs(float(torch.corrcoef(torch.stack([random, other]))[0, 1])) < 0.1
    assert float(random.std()) < 3 * RATE  # no longer than Adam's own


def test_what_is_trained_is_the_same_in_the_end():
    _, losses = quadratic(1.0, steps=800)
    _, plain = quadratic(0.0, steps=800)
    assert losses[-1] < 0.3 * losses[0]
    assert losses[-1] < 1.5 * plain[-1]


def test_the_operating_system_is_asked_for_a_key_if_none_is_given():
    moments = []
    for _ in range(2):
        weights = torch.nn.Parameter(torch.zeros(1000))
        optimizer = torch.optim.Adam([weights])
        randomise_adam_moments(optimizer, [weights], 0.1)
        moments.append(optimizer.state[weights])
        assert 0.09 < float(moments[-1]["exp_avg"].std()) < 0.11
        assert float(moments[-1]["exp_avg_sq"].min()) >= 0.099 * 0.1**2
    assert not torch.equal(moments[0]["exp_avg"], moments[1]["exp_avg"])


def test_parameters_that_are_not_trained_are_left_alone_and_types_are_kept():
    weights = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    frozen = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    optimizer = torch.optim.AdamW([weights, frozen])
    randomise_adam_moments(optimizer, [weights, frozen], 0.1)
    assert set(optimizer.state) == {weights}
    assert optimizer.state[weights]["exp_avg"].dtype == torch.float64


@pytest.mark.parametrize("size", [0, -1.0, float("nan"), float("inf")])
def test_a_size_has_to_be_positive(size):
    weights = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ConfigError, match="size = "):
        randomise_adam_moments(torch.optim.AdamW([weights]), [weights], size)


def test_only_adams_moments_can_be_random_and_only_before_the_first_step():
    weights = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ConfigError, match=r"SGD has no moments.*AdamW"):
        randomise_adam_moments(torch.optim.SGD([weights], lr=0.1), [weights], 0.1)
    optimizer = torch.optim.AdamW([weights])
    with pytest.raises(ConfigError, match="not among the optimizer's"):
        randomise_adam_moments(optimizer, [torch.nn.Parameter(torch.ones(3))], 0.1)
    weights.sum().backward()
    optimizer.step()
    with pytest.raises(ConfigError, match="has stepped already"):
        randomise_adam_moments(optimizer, [weights], 0.1)
