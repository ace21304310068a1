"""Gradient shares: exact together, noise alone. The attack that reads labels from gradients works without them."""

import numpy as np
import pytest
import torch

from blindtune.audit.labels import Channel, spectral
from blindtune.audit.statistics import auc
from blindtune.lattice import Lattice, LatticeOverflow, expand_noise
from blindtune.privacy.randomness import SecureGenerator
from blindtune.privacy.shares import Shares, combine, split_gradient


def generator(seed: int = 0) -> SecureGenerator:
    return SecureGenerator(seed.to_bytes(32, "little"))


def split(gradient: torch.Tensor, m: int, sigma: float, seed: int = 0) -> tuple[Shares, torch.Tensor]:
    """The shares of a gradient, and the gradient on the lattice in real units."""
    lattice, secret = Lattice.for_sigma(sigma, terms=m - 1), generator(seed)
    points = lattice.round(gradient, secret)
    return split_gradient(points, m, lattice, generator=secret), points * lattice.step


@pytest.mark.parametrize("m", [2, 3, 5, 8])
def test_shares_add_up_to_the_gradient_on_the_lattice_to_the_last_bit(m):
    gradient = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
    shares, rounded = split(gradient, m, 1000.0)
    assert shares.shares.shape == (m, 2, 16, 64)
    assert shares.shares.dtype == torch.float32
    assert torch.equal(shares.shares.double().sum(0), rounded)
    assert (combine(shares.shares) - gradient).norm() / gradient.norm() < 1e-3 * m**0.5


def test_recombination_is_linear_in_what_the_server_computes():
    """The server applies a linear map (the Jacobian) to each share."""
    torch.manual_seed(0)
    gradient, jacobian = torch.randn(1, 8, 32), torch.randn(256, 40)
    shares, _ = split(gradient, 2, 10.0)
    results = torch.stack([share.reshape(-1) @ jacobian for share in shares.shares])
    expected = gradient.reshape(-1) @ jacobian
    assert (combine(results) - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize("ratio", [10.0, 100.0, 1000.0])
def test_the_lattice_costs_half_a_millionth_of_the_noise(ratio):
    """√(d / 6) steps of σ / 1.5 million (at most twice that) for a vector of d values; here one of norm 1."""
    gradient = torch.randn(1, 32, 384, generator=torch.Generator().manual_seed(0))
    gradient /= gradient.norm(dim=-1, keepdim=True)
    shares, _ = split(gradient, 2, ratio)
    error = (combine(shares.shares) - gradient).norm() / gradient.norm()
    assert error < 1.1 * (384 / 6) ** 0.5 / 770_000 * ratio


def planted(rows: int = 512, dim: int = 64) -> tuple[torch.Tensor, np.ndarray]:
    """Gradients of a binary task: ± one direction, unit norm."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (rows,), generator=random)
    direction = torch.nn.functional.normalize(torch.randn(dim, generator=random), dim=0)
    gradients = (2.0 * labels - 1).unsqueeze(1) * direction + 0.05 * torch.randn(rows, dim, generator=random)
    return gradients.unsqueeze(0), labels.numpy()


def test_the_spectral_attack_reads_labels_from_plain_gradients_and_not_from_shares():
    gradients, labels = planted()
    clear = spectral(Channel(gradients[0].numpy()), labels)[:, 0]
    assert max(auc(clear, labels == 1), 1 - auc(clear, labels == 1)) > 0.99
    for share in split(gradients, 2, 1000.0)[0].shares:
        hidden = spectral(Channel(share[0].numpy()), labels)[:, 0]
        assert abs(auc(hidden, labels == 1) - 0.5) < 0.1


def test_two_shares_that_meet_reveal_the_labels():
    """Why shares of one gradient must not go to one operator: their sum is the gradient."""
    gradients, labels = planted()
    scores = spectral(Channel(combine(split(gradients, 2, 1000.0)[0].shares)[0].numpy()), labels)[:, 0]
    assert max(auc(scores, labels == 1), 1 - auc(scores, labels == 1)) > 0.95


def test_fewer_than_all_shares_are_noise_whatever_the_gradient():
    for gradient in (torch.zeros(1, 64, 256), torch.full((1, 64, 256), 3.0)):
        shares, _ = split(gradient, 3, 1000.0, seed=1)
        for j, share in enumerate(shares.shares):
            wanted = 1000 * 2**0.5 if j == shares.carrier else 1000
            assert float(share.std()) == pytest.approx(wanted, rel=0.03)
            assert float((shares.shares.sum(0) - share).std()) > 950, "all but one of them"


def test_the_carrier_is_one_share_and_its_place_is_random():
    places = {split(torch.ones(1, 1, 4), 2, 1.0, seed)[0].carrier for seed in range(40)}
    assert places == {0, 1}
    shares, _ = split(torch.full((1, 1, 4), 8.0), 2, 1.0)
    assert shares.shares[shares.carrier].abs().min() > 2
    assert shares.shares[1 - shares.carrier].abs().max() < 5


def test_a_gradient_far_larger_than_the_noise_is_refused_and_never_rounded():
    with pytest.raises(LatticeOverflow):
        split(torch.full((1, 1, 4), 100.0), 2, 1.0)


def test_one_share_is_refused():
    with pytest.raises(ValueError, match="at least 2 shares"):
        split_gradient(torch.ones(1, dtype=torch.int64), 1, Lattice.for_sigma(1.0), generator=generator())


@pytest.mark.parametrize("m", [2, 4])
def test_every_share_but_the_carrier_is_what_its_seed_expands_to(m):
    shares, _ = split(torch.randn(2, 3, 8), m, 50.0)
    lattice = Lattice.for_sigma(50.0, terms=m - 1)
    for j, (share, seed) in enumerate(zip(shares.shares, shares.seeds, strict=True)):
        assert (seed is None) == (j == shares.carrier)
        if seed is not None:
            assert torch.equal(expand_noise(seed, (2, 3, 8), lattice), share)
    assert len({seed for seed in shares.seeds if seed}) == m - 1
