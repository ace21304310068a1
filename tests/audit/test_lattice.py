"""The low-order bits of a share: they tell labels where noise was rounded, and nothing where it lies on the lattice.

Old construction: noise was rounded to float32, multiplied by a secret coefficient, and rounded again. It is kept
as it was in `tests.audit.constructions`. New construction: the package's own functions.
"""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import norm

from blindtune.audit.labels import catalogue
from blindtune.audit.labels.lattice import (
    DECLARATION,
    audit_shares,
    blind_signs,
    label_scores,
    noise_mass,
    public_step,
    reachable,
    recover_coefficient,
    row_reachable,
    row_scores,
    unknown_label_scores,
)
from blindtune.audit.statistics import auc
from blindtune.lattice import Lattice
from blindtune.privacy.pads import PadScale, pad_pair
from blindtune.privacy.randomness import SecureGenerator
from blindtune.privacy.token_noise import add_token_noise, clip_rows
from tests.audit.constructions import (
    Array,
    generator,
    new_split,
    new_split_of_known,
    old_split,
    old_token_noise,
)

SIGMA, DIM = 1000.0, 384
NARROW = (1.15, 1.2)
"""Span of |α| where a test asks what α tells, and not whether it is found among all."""


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def examples(rows: int, classes: int, dim: int = DIM, seed: int = 0, size: float = 0.05) -> tuple[Array, NDArray]:
    """Gradients `(rows, classes, dim)` float32 that examples would have under each label, and their labels."""
    random = np.random.default_rng(seed)
    hypotheses = random.normal(0, size, (rows, classes, dim)).astype(np.float32)
    return hypotheses, random.integers(0, classes, rows)


def true(hypotheses: Array, labels: NDArray) -> Array:
    return hypotheses[np.arange(len(labels)), labels]


def pair_auc(scores: Array, labels: NDArray) -> tuple[float, float]:
    """AUC of two hypotheses' difference in scores `(N, 2)`, and its standard error (Hanley and McNeil 1982)."""
    positive = labels == 1
    value, n, m = auc(scores[:, 1] - scores[:, 0], positive), int(positive.sum()), int((~positive).sum())
    both = (n - 1) * (value / (2 - value) - value**2) + (m - 1) * (2 * value**2 / (1 + value) - value**2)
    return value, math.sqrt((value * (1 - value) + both) / (n * m))


def at_chance(scores: Array, labels: NDArray) -> bool:
    positive = int((labels == 1).sum())
    error = math.sqrt((len(labels) + 1) / (12 * positive * (len(labels) - positive)))  # of ranks that mean nothing
    return abs(pair_auc(scores, labels)[0] - 0.5) <= 3 * error


def as_good_as_the_bound(scores: Array, labels: NDArray, mu: float) -> bool:
    """At most Φ(μ / √2), the AUC of N(0, 1) against N(μ, 1); and no less, so the attack is the best one."""
    value, error = pair_auc(scores, labels)
    return abs(value - norm.cdf(mu / math.sqrt(2))) <= 3 * error


def apart(rows: int, dim: int, distance: float, seed: int = 0, size: float = 0.5) -> tuple[Array, NDArray]:
    """Pairs `(rows, 2, dim)` float32 of vectors of norm `size` that are `distance` apart, and which is sent."""
    random = np.random.default_rng(seed)
    first, way = random.normal(size=(2, rows, dim))
    first *= size / np.linalg.norm(first, axis=1, keepdims=True)
    way *= distance / np.linalg.norm(way, axis=1, keepdims=True)
    return np.stack([first, first + way], axis=1).astype(np.float32), random.integers(0, 2, rows)


def test_the_attack_is_declared():
    assert DECLARATION in catalogue()


class TestNoiseThatWasRounded:
    """The old construction."""

    def test_the_secret_coefficient_is_found_with_known_gradients(self):
        """Eight rows of 384 values, |α| anywhere in [1, 1.25)."""
        gradient = true(*examples(8, 3))
        carrier, alpha = old_split(gradient, SIGMA, generator("coefficient"))
        assert abs(alpha) > 1.08
        found = recover_coefficient(carrier, gradient)
        assert found == pytest.approx(abs(alpha), abs=1e-9)
        assert public_step(carrier) is None
        assert reachable(carrier, gradient, alpha).all()
        assert reachable(carrier, gradient + 0.01, alpha).mean() < 0.97

    def test_wrong_gradients_find_no_coefficient(self):
        gradient = true(*examples(8, 3))
        carrier, _ = old_split(gradient, SIGMA, generator("coefficient"), 1.17)
        assert recover_coefficient(carrier, gradient + np.float32(0.01), span=NARROW) is None

    def test_the_label_of_one_example_is_decoded_even_if_it_is_not_in_the_batch(self):
        """All other labels are known: 12 of 12. A head that was fitted to all of 64 labels makes the gradients.

        Six of the twelve are in the batch of 32, six are not. A flipped label changes the head, so it changes all rows.
        """
        random = np.random.default_rng(0)
        texts, labels = random.normal(0, 1 / math.sqrt(DIM), (64, DIM)), random.integers(0, 2, 64)

        def gradients(truth: NDArray) -> Array:
            """Of the logistic loss at the texts' hidden states, with a ridge regression as head."""
            head = np.linalg.solve(texts.T @ texts + 0.1 * np.eye(DIM), texts.T @ (2.0 * truth - 1))
            return ((1 / (1 + np.exp(-texts[:32] @ head)) - truth[:32])[:, None] * head).astype(np.float32).ravel()

        carrier, alpha = old_split(gradients(labels), SIGMA, generator("one"), 1.17)
        found = recover_coefficient(carrier[: 16 * DIM], gradients(labels)[: 16 * DIM], span=NARROW)
        assert found == pytest.approx(abs(alpha), abs=1e-9)
        for index in [*range(6), *range(40, 46)]:
            both = np.repeat(labels[None], 2, axis=0)
            both[:, index] = (0, 1)
            scores = label_scores(
                carrier[None], np.stack([gradients(truth) for truth in both])[None], coefficient=found
            )
            assert scores[0].argmax() == labels[index]
            assert abs(scores[0, 0] - scores[0, 1]) > 100  # nats

    def test_eight_unknown_labels_of_a_batch_are_decoded_exactly(self):
        """Of 32 rows, 24 are known. They tell α, and α tells the others' labels."""
        hypotheses, labels = examples(32, 3)
        carrier, _ = old_split(true(hypotheses, labels), SIGMA, generator("eight"), 1.17)
        known = np.where(np.arange(32) < 8, -1, labels)
        scores = label_scores(carrier, hypotheses, known=known)
        assert (scores.argmax(1) == labels).all()

    def test_clipped_gradients_are_read_with_no_label_known(self):
        """Two classes, all gradients ± one vector of norm C = 0.5, B = 64, d = 384, σ = 2,000 C, |α| = 1.17 known."""
        random = np.random.default_rng(0)
        direction, labels = random.normal(size=DIM), random.integers(0, 2, 64)
        direction *= 0.5 / np.linalg.norm(direction)
        carrier, alpha = old_split((np.outer(2 * labels - 1, direction)).astype(np.float32), SIGMA, generator(4), 1.17)
        value = auc(blind_signs(carrier, alpha, 0.5), labels == 1)
        assert max(value, 1 - value) > 0.9

    def test_rows_of_hidden_states_are_told_apart(self):
        """.01 apart under noise that allows for AUC .503."""
        rows, sent = apart(400, DIM, 0.01)
        noisy = old_token_noise(true(rows, sent), 1.0, 1.0, generator("rows"))
        assert row_reachable(noisy, true(rows, sent)).all()
        assert pair_auc(row_scores(noisy, rows), sent)[0] > 0.95

    def test_an_audit_of_shares_reads_the_carrier(self):
        """Two adapters, 16 rows: each row's label is unknown, and the others tell α."""
        hypotheses, labels = examples(16, 2, dim=2 * 192)
        carrier, _ = old_split(true(hypotheses, labels), SIGMA, generator("audit"), 1.2)
        share = carrier.reshape(16, 2, 192).swapaxes(0, 1)
        assert audit_shares(share[None], hypotheses.reshape(16, 2, 2, 192), labels) == [1.0]


class TestNoiseOnTheLattice:
    """The new construction. The attacker knows all secrets but the noise: coefficient, carrier, rounding."""

    def test_no_coefficient_is_found(self):
        gradient = true(*examples(8, 3))
        carrier, others, rounded = new_split(gradient, SIGMA, generator(0))
        assert public_step(carrier) == public_step(others) == Lattice.for_sigma(SIGMA).exponent
        assert recover_coefficient(carrier, gradient) is recover_coefficient(carrier, rounded) is None

    @pytest.mark.parametrize("m", [2, 3])
    def test_all_hypotheses_have_one_score(self, m: int):
        hypotheses, labels = examples(32, 3)
        carrier, _, rounded = new_split(true(hypotheses, labels), SIGMA, generator(m), m)
        step = 2.0 ** Lattice.for_sigma(SIGMA, terms=m - 1).exponent
        on_lattice = np.round(hypotheses.astype(np.float64) / step) * step
        on_lattice[np.arange(32), labels] = rounded  # the right one is known to the last bit
        known = np.where(np.arange(32) < 8, -1, labels)
        for gradients in (hypotheses, on_lattice):
            assert (label_scores(carrier, gradients, known=known) == 0).all()
            assert (label_scores(carrier, gradients, coefficient=-1.0) == 0).all()
            assert (unknown_label_scores(carrier, gradients, labels) == 0).all()

    def test_an_audit_of_shares_is_at_chance_for_each(self):
        hypotheses, labels = examples(32, 3)
        carrier, others, _ = new_split(true(hypotheses, labels), SIGMA, generator(1), 3)
        found = audit_shares(np.stack([others[0], carrier, others[1]])[:, None], hypotheses[:, :, None], labels)
        assert found == [0.5, 0.5, 0.5]

    @pytest.mark.parametrize("coefficient", [-1.0, 1.0, 1.17])
    def test_float_noise_explains_no_gradient_better_than_another(self, coefficient: float):
        """The old attack's likelihood, which takes noise for float32 numbers, with nothing else to go by."""
        hypotheses, sent = apart(4000, 64, 0.5, size=1.0)
        carrier, rounded, _ = new_split_of_known(hypotheses, sent, SIGMA, generator(2))
        for gradients in (hypotheses, rounded):
            mass = noise_mass(carrier[:, None], gradients, coefficient)
            assert at_chance(np.log(np.maximum(mass, 2.0**-10)).sum(-1), sent)

    @pytest.mark.parametrize("alpha", [1.0, 1.17])
    def test_clipped_gradients_are_not_read(self, alpha: float):
        """In the regime where the old construction is read without any label; scores have a direction that is unknown.

        With the coefficient that is used, the likelihood is flat and there is nothing to go by.
        """
        random = np.random.default_rng(0)
        found, luck = [], []
        for trial in range(3):
            direction, labels = random.normal(size=DIM), random.integers(0, 2, 64)
            direction *= 0.5 / np.linalg.norm(direction)
            gradient = np.outer(2 * labels - 1, direction).astype(np.float32)
            scores = blind_signs(new_split(gradient, SIGMA, generator("blind", trial))[0], alpha, 0.5)
            assert scores.any() == (alpha != 1.0)
            values = [abs(auc(scores, drawn == 1) - 0.5) for drawn in (labels, *random.permuted([labels] * 99, axis=1))]
            found.append(values[0])
            luck.append(values[1:])
        assert np.mean(found) <= np.mean(luck) + 3 * np.std(np.mean(luck, axis=0))

    @pytest.mark.parametrize(("coefficient", "expected"), [(1, 0.5), (2, 1.0), (3, 1.0)])
    def test_noise_in_multiples_of_a_coarser_step_would_be_read(self, coefficient: int, expected: float):
        """On the lattice a coefficient other than ±1 leaves the gradient's remainder: why the proof asks for ±1."""
        hypotheses, labels = examples(64, 2)
        lattice, key = Lattice.for_sigma(SIGMA / coefficient, terms=16), generator("coefficient", coefficient)
        points = lattice.round(torch.from_numpy(hypotheses), key).numpy()  # (64, 2, d)
        noise = lattice.noise(key, (64, DIM)).numpy()
        carrier = ((points[np.arange(64), labels] - coefficient * noise) * lattice.step).astype(np.float32)
        for gradients in (hypotheses, points * lattice.step):
            assert pair_auc(label_scores(carrier, gradients, coefficient=coefficient), labels)[0] == expected

    @pytest.mark.parametrize("mu", [0.1, 0.5, 2.0])
    def test_a_likelihood_ratio_reaches_the_bound_and_no_more(self, mu: float):
        """Of the two gradients, as rounded: the attacker knows these too."""
        hypotheses, sent = apart(4000, 32, mu * SIGMA, size=SIGMA)
        key = generator("ratio", mu)
        carrier, rounded, lattice = new_split_of_known(hypotheses, sent, SIGMA, key, 4 * SIGMA)
        scores = label_scores(carrier, rounded, coefficient=-1.0, sigma=lattice.sigma)
        assert as_good_as_the_bound(scores, sent, mu)

    def test_all_shares_but_one_reach_the_bound_and_no_more(self):
        """Two of three: the carrier, and one share that is noise and can be taken off."""
        hypotheses, sent = apart(4000, 32, SIGMA, size=SIGMA / 10)
        carrier, others, _ = new_split(true(hypotheses, sent), SIGMA, generator("two"), 3)
        sum_of_two = carrier + others[0]
        assert (sum_of_two == carrier.astype(np.float64) + others[0]).all()
        scores = label_scores(sum_of_two, hypotheses, sigma=SIGMA)
        assert as_good_as_the_bound(scores, sent, 1.0)


class TestPadsAndTokenNoise:
    """On the lattice too, with the same functions: p ± δ/2s, and clipped rows with noise."""

    AMPLIFICATION = 500.0

    def halves(self, updates: Array, sigma: float, key: SecureGenerator) -> tuple[PadScale, Array, Array, Array]:
        """(scale, p + δ/2s, p − δ/2s, δ/2s as rounded), each `(N, d)`."""
        scale = PadScale(Lattice.for_sigma(sigma, largest=4 * sigma), self.AMPLIFICATION)
        points = scale.lattice.round(torch.from_numpy(updates) / (2 * scale.amplification), key)
        plus, minus = pad_pair(points, scale.lattice, generator=key)
        return scale, plus.numpy(), minus.numpy(), points.double().numpy() * scale.lattice.step

    @pytest.mark.parametrize("half", [0, 1])
    def test_one_pad_explains_all_updates(self, half: int):
        updates, sent = apart(500, 64, 0.5)
        _, *halves, rounded = self.halves(true(updates, sent), 0.02, generator("pads"))
        sign = (1, -1)[half]
        hypotheses = sign * updates / (2 * self.AMPLIFICATION)
        assert (row_scores(halves[half], hypotheses) == 0).all()
        assert (row_scores(halves[half], sign * rounded[:, None]) == 0).all()
        for coefficient in (1.0, 1.17):
            mass = noise_mass(halves[half][:, None], hypotheses, coefficient)
            assert at_chance(np.log(np.maximum(mass, 2.0**-10)).sum(-1), sent)

    @pytest.mark.parametrize("half", [0, 1])
    def test_a_likelihood_ratio_on_one_pad_reaches_the_bound_and_no_more(self, half: int):
        mu, sigma = 0.7, 0.02
        updates, sent = apart(4000, 32, mu * sigma * 2 * self.AMPLIFICATION, size=10.0)
        scale, *halves, _ = self.halves(true(updates, sent), sigma, generator("pad ratio", half))
        hypotheses = (1, -1)[half] * updates / (2 * self.AMPLIFICATION)
        assert as_good_as_the_bound(row_scores(halves[half], hypotheses, sigma=scale.lattice.sigma), sent, mu)

    def test_noisy_rows_explain_all_rows(self):
        rows, sent = apart(400, DIM, 0.01)
        noisy = add_token_noise(torch.from_numpy(true(rows, sent)), 1.0, 1.0, generator=generator("rows")).numpy()
        assert (row_scores(noisy, rows) == 0).all()
        for coefficient in (-1.0, 1.17):
            mass = noise_mass(noisy[:, None], rows, coefficient)
            assert at_chance(np.log(np.maximum(mass, 2.0**-10)).sum(-1), sent)

    @pytest.mark.parametrize("distance", [0.01, 1.0])
    def test_a_likelihood_ratio_on_rows_reaches_the_bound_and_no_more(self, distance: float):
        rows, sent = apart(4000, 32, distance, size=0.4)
        clipped = clip_rows(torch.from_numpy(rows), 1.0).numpy()
        noisy = add_token_noise(
            torch.from_numpy(true(rows, sent)), 1.5, 1.0 / 1.5, generator=generator("row", distance)
        )
        assert as_good_as_the_bound(row_scores(noisy.numpy(), clipped, sigma=1.0), sent, distance)


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_noise_mass_counts_every_float32(alpha: float):
    """Against all 1,201 float32 numbers around the likeliest noise."""
    random = np.random.default_rng(0)
    noise, gradient = random.normal(size=(2, 2000)).astype(np.float32)
    carrier = (gradient - alpha * noise.astype(np.float64)).astype(np.float32)
    for hypothesis in (gradient.astype(np.float64), gradient + 0.01):
        nearest = ((hypothesis - carrier) / alpha).astype(np.float32)
        around = (nearest.view(np.int32)[:, None] + np.arange(-600, 601, dtype=np.int32)).view(np.float32)
        hits = (hypothesis[:, None] - alpha * around.astype(np.float64)).astype(np.float32) == carrier[:, None]
        inside = ~(hits[:, 0] | hits[:, -1]) & (np.abs(nearest) > 1e-30)
        assert inside.mean() > 0.99
        assert ((noise_mass(carrier, hypothesis, alpha) > 0) == hits.any(1))[inside].all()


def test_a_public_step_is_found_whatever_zeros_there_are():
    share = np.array([0.0, 3.0, -5.0, 0.0, 64.0]) * 2.0**-40
    assert public_step(share.astype(np.float32)) == -40
    assert public_step(np.zeros(5, np.float32)) is None
    assert public_step(np.array([1.0, 2.0**-30], np.float32)) is None
