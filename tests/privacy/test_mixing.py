"""Secret mixing weights (P3EFT, eq. 3 to 5)."""

import pytest
import torch

from blindtune.privacy.mixing import mix, mixing_weights
from blindtune.privacy.randomness import SecureGenerator


@pytest.mark.parametrize("n", [2, 3, 5])
def test_equal_adapters_mix_into_themselves(n):
    weights = mixing_weights(n, 64, 5.0, generator=SecureGenerator(bytes(32)))
    hidden = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0)).expand(n, -1, -1)
    assert torch.allclose(mix(hidden, weights), hidden[0], atol=1e-4)


def test_weights_have_the_scale_that_was_asked_for():
    weights = mixing_weights(2, 20_000, 5.0, generator=SecureGenerator(bytes(32)))
    assert abs(float((weights[0] - 0.5).std()) - 5.0) < 0.15
    assert torch.allclose(weights.sum(0), torch.ones(20_000), atol=1e-5)


def test_a_difference_between_adapters_is_amplified():
    weights = mixing_weights(2, 64, 20.0, generator=SecureGenerator(bytes(32)))
    base = torch.zeros(2, 1, 64)
    base[0] = 0.01
    assert mix(base, weights).abs().mean() > 0.05


@pytest.mark.parametrize(("n", "scale"), [(1, 1.0), (2, 0.0)])
def test_mixing_needs_two_adapters_and_a_scale(n, scale):
    with pytest.raises(ValueError, match="two adapters"):
        mixing_weights(n, 4, scale, generator=SecureGenerator())


@pytest.mark.parametrize("n", [2, 3])
def test_without_a_centre_equal_adapters_mix_into_zero(n):
    weights = mixing_weights(n, 64, 31.0, generator=SecureGenerator(bytes(32)), centre=False)
    assert torch.allclose(weights.sum(0), torch.zeros(64), atol=1e-4)
    assert 20 < float(weights.std()) < 60
