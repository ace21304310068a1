"""Gradient shares: exact together, noise alone. The attack that reads labels from gradients works without them."""

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency

from blindtune.audit.labels import Channel, spectral
from blindtune.audit.statistics import auc
from blindtune.keystream import expand_noise
from blindtune.privacy.randomness import SecureGenerator
from blindtune.privacy.shares import clip_per_example, combine, split_gradient


def generator(seed: int = 0) -> SecureGenerator:
    return SecureGenerator(seed.to_bytes(32, "little"))


@pytest.mark.parametrize("m", [2, 3, 5, 8])
def test_shares_recombine_to_the_gradient(m):
    gradient = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
    split = split_gradient(gradient, m, 1000.0, generator=generator())
    assert split.shares.shape == (m, 2, 16, 64)
    assert split.shares.dtype == torch.float32
    recombined = combine(split.shares, split.coefficients)
    assert (recombined - gradient).norm() / gradient.norm() < 1e-3


def test_recombination_is_linear_in_what_the_server_computes():
    """The server applies a linear map (the Jacobian) to each share."""
    torch.manual_seed(0)
    gradient, jacobian = torch.randn(1, 8, 32), torch.randn(256, 40)
    split = split_gradient(gradient, 2, 10.0, generator=generator())
    results = torch.stack([share.reshape(-1) @ jacobian for share in split.shares])
    expected = gradient.reshape(-1) @ jacobian
    assert (combine(results, split.coefficients) - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize("ratio", [10.0, 100.0, 1000.0])
def test_precision_falls_with_the_noise_and_stays_usable(ratio):
    gradient = torch.randn(1, 32, 384, generator=torch.Generator().manual_seed(0))
    gradient /= gradient.norm(dim=-1, keepdim=True)
    split = split_gradient(gradient, 2, ratio, generator=generator())
    error = (combine(split.shares, split.coefficients) - gradient).norm() / gradient.norm()
    assert error < 2e-6 * ratio


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
    for share in split_gradient(gradients, 2, 1000.0, generator=generator()).shares:
        hidden = spectral(Channel(share[0].numpy()), labels)[:, 0]
        assert abs(auc(hidden, labels == 1) - 0.5) < 0.1


def test_two_shares_that_meet_reveal_the_labels():
    """Why shares of one gradient must not go to one operator: their difference is the gradient (Gram attack)."""
    gradients, labels = planted()
    shares = split_gradient(gradients, 2, 1000.0, generator=generator()).shares[:, 0].double()
    flat = shares.reshape(2, -1)
    values, vectors = torch.linalg.eigh(flat @ flat.T)
    found = torch.tensordot(vectors[:, 0], shares, dims=1)  # the quietest combination
    scores = spectral(Channel(found.numpy()), labels)[:, 0]
    assert max(auc(scores, labels == 1), 1 - auc(scores, labels == 1)) > 0.95
    assert values[0] < values[1]


def test_every_share_has_the_promised_noise_whatever_the_gradient():
    zero, large = torch.zeros(1, 64, 256), torch.full((1, 64, 256), 3.0)
    for gradient in (zero, large):
        for share in split_gradient(gradient, 3, 1000.0, generator=generator(1)).shares:
            assert 950 < float(share.std()) < 1300


def test_the_carrier_is_one_share_and_its_place_is_random():
    places = {split_gradient(torch.ones(1, 1, 4), 2, 1.0, generator=generator(s)).carrier for s in range(40)}
    assert places == {0, 1}
    split = split_gradient(torch.full((1, 1, 4), 1e6), 2, 1.0, generator=generator())
    assert split.shares[split.carrier].abs().min() > 1e5
    assert split.shares[1 - split.carrier].abs().max() < 100


def test_low_bits_of_shares_do_not_tell_two_gradients_apart():
    """Naive float32 noise would: the reachable low-order bits depend on the gradient (Mironov 2012)."""

    def low_bits(gradient: float, seed: int) -> np.ndarray:
        split = split_gradient(torch.full((1, 200, 500), gradient), 2, 1000.0, generator=generator(seed))
        mantissa = split.shares[split.carrier].numpy().view(np.int32) & 7
        return np.bincount(mantissa.ravel(), minlength=8)

    tables = [low_bits(0.5, 1), low_bits(1 / 3, 2)]
    assert chi2_contingency(np.stack(tables)).pvalue > 1e-4
    naive = [np.full(100, 0.5, np.float32) + np.arange(100, dtype=np.float32), np.arange(100, dtype=np.float32)]
    bits = [np.bincount((values.view(np.int32) & 1), minlength=2) + 1 for values in naive]
    assert bits[0].sum() == bits[1].sum()  # same size, and yet a lattice betrays the half:
    assert {float(v) % 1 for v in naive[0]} != {float(v) % 1 for v in naive[1]}


def test_clipping_bounds_all_adapters_of_an_example_together():
    gradient = torch.randn(3, 10, 20, generator=torch.Generator().manual_seed(0)) * 5
    clipped = clip_per_example(gradient, 2.0)
    norms = clipped.permute(1, 0, 2).flatten(1).norm(dim=1)
    assert norms.max() <= 2.0 + 1e-5
    small = gradient / 1000
    assert torch.equal(clip_per_example(small, 2.0), small)


def test_clipping_keeps_the_direction():
    gradient = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)) * 100
    clipped = clip_per_example(gradient, 1.0).permute(1, 0, 2).flatten(1)
    original = gradient.permute(1, 0, 2).flatten(1)
    assert torch.allclose(torch.nn.functional.cosine_similarity(clipped, original), torch.ones(4))


@pytest.mark.parametrize(("m", "sigma"), [(1, 1.0), (2, 0.0), (2, -1.0)])
def test_numbers_that_cannot_hide_anything_are_refused(m, sigma):
    with pytest.raises(ValueError, match="m of at least 2"):
        split_gradient(torch.ones(1, 1, 1), m, sigma, generator=generator())


def test_a_gradient_with_nan_is_refused_before_anything_is_drawn():
    with pytest.raises(ValueError, match="nothing was sent"):
        split_gradient(torch.tensor([float("nan")]), 2, 1.0, generator=generator())


@pytest.mark.parametrize("m", [2, 4])
def test_every_share_but_the_carrier_is_what_its_seed_expands_to(m):
    split = split_gradient(torch.randn(2, 3, 8), m, 50.0, generator=generator())
    for j, (share, seed) in enumerate(zip(split.shares, split.seeds, strict=True)):
        assert (seed is None) == (j == split.carrier)
        if seed is not None:
            assert torch.equal(expand_noise(seed, (2, 3, 8), 50.0), share)
    assert len({seed for seed in split.seeds if seed}) == m - 1
