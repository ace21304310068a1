"""Decoys: they hide a label direction from the spectral attack, carry no label, and the client can take them out."""

import pytest
import torch

from blindtune.audit.channels import common_variates
from blindtune.audit.labels import ATTACKS, Channel
from blindtune.audit.statistics import best_auc
from blindtune.privacy.decoys import Decoys, draw_decoys
from blindtune.privacy.mixing import mix, mixing_weights
from blindtune.privacy.randomness import SecureGenerator

N, DIM, ROWS, K = 2, 64, 800, 4


def frozen_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated features, of which one direction weakly tells the label."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (ROWS,), generator=random)
    features = torch.randn(ROWS, DIM, generator=random) @ torch.randn(DIM, DIM, generator=random)
    features[:, 0] += 4.0 * labels
    return features, labels


def drawn() -> tuple[Decoys, torch.Tensor, torch.Tensor]:
    frozen, labels = frozen_and_labels()
    return draw_decoys(frozen, labels, N, K, components=32, generator=SecureGenerator(bytes(32))), frozen, labels


def largest_direction(features: torch.Tensor, labels: torch.Tensor) -> float:
    """The best of the attacks that decoys are made against: those on the largest direction of variance."""
    found = [ATTACKS[name].run(Channel(features.numpy()), labels.numpy()) for name in ("spectral", "norm", "k-means")]
    return max(best_auc(scores, labels.numpy(), symmetric=True)[0] for scores in found)


def perfect_shifts(decoys: Decoys, frozen: torch.Tensor, amplitude: float) -> torch.Tensor:
    """Shifts `(n, B, d)` whose decoy coordinates are exactly on target."""
    targets = amplitude * decoys.targets(frozen) * decoys.spread / K**0.5
    return torch.einsum("nbk,ndk->nbd", targets, decoys.directions)


def test_a_label_direction_is_found_without_decoys_and_hidden_by_them():
    decoys, frozen, labels = drawn()
    direction = torch.nn.functional.normalize(torch.randn(DIM, generator=torch.Generator().manual_seed(1)), dim=0)
    label_shift = 0.1 * decoys.spread * (2.0 * labels - 1).unsqueeze(1) * direction
    assert largest_direction(label_shift + 0.1 * torch.randn(ROWS, DIM), labels) > 0.95
    for adapter in perfect_shifts(decoys, frozen, 0.5):
        assert largest_direction(label_shift + adapter, labels) < 0.65


def test_the_label_is_found_as_what_adapters_share_unless_they_share_decoys():
    frozen, labels = frozen_and_labels()
    random = torch.Generator().manual_seed(2)
    found: dict[int, float] = {}
    for shared in (0, 1):
        decoys = draw_decoys(frozen, labels, N, K, shared=shared, components=32, generator=SecureGenerator(bytes(32)))
        shifts = perfect_shifts(decoys, frozen, 0.5) + 0.02 * decoys.spread * torch.randn(
            N, ROWS, DIM, generator=random
        )
        for adapter in shifts:
            direction = torch.nn.functional.normalize(torch.randn(DIM, generator=random), dim=0)
            adapter += 0.06 * decoys.spread * (2.0 * labels - 1).unsqueeze(1) * direction
        common = common_variates(shifts[0].numpy(), shifts[1].numpy())
        found[shared] = best_auc(common, labels.numpy(), symmetric=True)[0]
    assert found[0] > 0.95
    assert found[1] < 0.65


def test_shared_decoys_are_the_same_functions_and_own_ones_are_not():
    frozen, labels = frozen_and_labels()
    decoys = draw_decoys(frozen, labels, N, 3, shared=1, components=32, generator=SecureGenerator(bytes(32)))
    first, second = decoys.targets(frozen)
    assert torch.allclose(first[:, 0], second[:, 0], atol=1e-5)
    assert torch.corrcoef(torch.cat([first, second], 1).T)[1:3, 4:].abs().max() < 0.1
    assert not torch.allclose(decoys.directions[0], decoys.directions[1])


def test_saturated_decoys_draw_the_search_for_two_humps_away_from_the_label():
    frozen, labels = frozen_and_labels()
    random = torch.Generator().manual_seed(3)
    direction = torch.nn.functional.normalize(torch.randn(DIM, generator=random), dim=0)
    found: dict[float, float] = {}
    for saturation in (0.0, 2.0):
        decoys = draw_decoys(
            frozen, labels, N, K, saturation=saturation, components=32, generator=SecureGenerator(bytes(32))
        )
        noise = 0.09 * decoys.spread * torch.randn(ROWS, DIM, generator=random)
        label_shift = 0.1 * decoys.spread * (2.0 * labels - 1).unsqueeze(1) * direction
        shift = label_shift + noise + perfect_shifts(decoys, frozen, 0.5)[0]
        scores = ATTACKS["bimodal component"].run(Channel(shift.numpy()), labels.numpy())
        found[saturation] = best_auc(scores, labels.numpy(), symmetric=True)[0]
    assert found[0.0] > 0.9
    assert found[2.0] < 0.65


def test_decoys_themselves_do_not_tell_labels_apart():
    decoys, frozen, labels = drawn()
    targets = decoys.targets(frozen)
    assert targets.shape == (N, ROWS, K)
    gap = targets[:, labels == 1].mean(1) - targets[:, labels == 0].mean(1)
    assert gap.abs().max() < 0.15  # linear functions are orthogonal to it, a tanh of them nearly
    assert torch.allclose(targets.std(1), torch.ones(N, K), atol=0.05)


def test_the_penalty_is_zero_on_target_and_positive_elsewhere():
    decoys, frozen, _ = drawn()
    shifts = perfect_shifts(decoys, frozen, 0.3)
    assert float(decoys.penalty(shifts, frozen, 0.3)) < 1e-8
    assert float(decoys.penalty(torch.zeros_like(shifts), frozen, 0.3)) == pytest.approx(0.09, rel=0.1)


def test_the_client_removes_decoys_from_what_its_head_reads():
    decoys, frozen, _ = drawn()
    weights = mixing_weights(N, DIM, 1.0, generator=SecureGenerator(bytes(32)))
    plain = mix(frozen.expand(N, -1, -1), weights)
    with_decoys = mix(frozen + perfect_shifts(decoys, frozen, 0.5), weights)
    assert (with_decoys - plain).norm() > 0.1 * plain.norm()
    difference = decoys.remove(with_decoys, weights) - decoys.remove(plain, weights)
    assert difference.norm() < 1e-3 * plain.norm()


def test_secrets_differ_between_keys():
    frozen, labels = frozen_and_labels()
    one = draw_decoys(frozen, labels, N, K, components=32, generator=SecureGenerator())
    two = draw_decoys(frozen, labels, N, K, components=32, generator=SecureGenerator())
    assert not torch.allclose(one.directions, two.directions)


def test_more_decoys_than_the_features_have_room_for_are_refused():
    frozen, labels = frozen_and_labels()
    with pytest.raises(ValueError, match="components"):
        draw_decoys(frozen, labels, N, 20, components=8, generator=SecureGenerator())
