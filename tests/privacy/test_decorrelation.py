"""dCor between tokens and smashed data, and the noise that has a guarantee."""

from __future__ import annotations

import math

import pytest
import torch

from blindtune.privacy.decorrelation import decorrelation
from blindtune.privacy.randomness import SecureGenerator
from blindtune.privacy.token_noise import add_token_noise, row_mu

EMBEDDINGS = torch.randn(400, 48, generator=torch.Generator().manual_seed(0))


def dcor(smashed: torch.Tensor, seed: int = 1) -> float:
    return float(decorrelation(EMBEDDINGS, smashed.detach(), torch.Generator().manual_seed(seed)))


def test_one_for_what_is_the_tokens_and_little_for_what_is_not() -> None:
    rotation, _ = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(2)))
    assert dcor(3 * EMBEDDINGS @ rotation) == pytest.approx(1, abs=1e-4)
    independent = torch.randn(400, 48, generator=torch.Generator().manual_seed(3))
    assert dcor(independent) < 0.25  # the plain estimator reads above .9 at this size


def test_its_gradient_takes_the_tokens_out() -> None:
    smashed = (EMBEDDINGS + 0.1 * torch.randn(400, 48, generator=torch.Generator().manual_seed(4))).requires_grad_()
    optimizer = torch.optim.Adam([smashed], lr=0.05)
    before = dcor(smashed)
    for seed in range(150):
        optimizer.zero_grad()
        decorrelation(EMBEDDINGS, smashed, torch.Generator().manual_seed(seed)).backward()
        optimizer.step()
    assert before > 0.9
    assert dcor(smashed) < 0.6


def test_few_tokens_have_no_penalty() -> None:
    smashed = torch.randn(3, 48, requires_grad=True)
    assert float(decorrelation(EMBEDDINGS[:3], smashed, torch.Generator())) == 0


def test_noise_has_the_stated_size_and_rows_are_clipped() -> None:
    smashed = torch.randn(4000, 16, generator=torch.Generator().manual_seed(5)) * 50
    quiet = add_token_noise(smashed, 2.0, 1e-6, generator=SecureGenerator())
    assert float(quiet.norm(dim=1).max()) <= 2.0 * (1 + 1e-4)
    noisy = add_token_noise(smashed, 2.0, 3.0, generator=SecureGenerator())
    assert float((noisy - quiet).std()) == pytest.approx(6.0, rel=0.02)


def test_mu_of_the_noise_is_that_of_the_best_test_between_two_tokens() -> None:
    """Two hidden states 2C apart under noise νC: the best test's AUC is Φ(μ/√2), with μ = 2/ν."""
    noise, clip = 1.5, 1.0
    generator, secret = torch.Generator().manual_seed(7), SecureGenerator(bytes(32))
    direction = torch.nn.functional.normalize(torch.randn(1, 16, generator=generator))
    one, other = (
        (add_token_noise(sign * 9 * direction.expand(20_000, -1), clip, noise, generator=secret) @ direction.T)[:, 0]
        for sign in (1, -1)
    )
    auc = float((one > other).float().mean())
    assert auc == pytest.approx(0.5 * (1 + math.erf(row_mu(noise, 1) / 2)), abs=0.01)
    assert row_mu(noise, 4) == pytest.approx(2 * row_mu(noise, 1))


@pytest.mark.parametrize(("clip", "noise"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_numbers_that_make_no_noise(clip: float, noise: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        add_token_noise(torch.zeros(1, 2), clip, noise, generator=SecureGenerator())
