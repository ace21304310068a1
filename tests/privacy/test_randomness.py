"""Secret randomness: repeatable with a key, unpredictable without, and of the distribution it claims."""

import pytest
import torch
from scipy.stats import kstest

from blindtune.privacy.randomness import SecureGenerator


def test_equal_keys_give_equal_streams_and_fresh_generators_differ():
    key = bytes(range(32))
    assert torch.equal(SecureGenerator(key).normal(100), SecureGenerator(key).normal(100))
    assert not torch.equal(SecureGenerator().normal(100), SecureGenerator().normal(100))


def test_stream_is_chacha20_with_a_known_first_block():
    """RFC 8439's keystream for the all-zero key and nonce (appendix A.1, vector 1)."""
    assert SecureGenerator(bytes(32)).bytes(8).hex() == "76b8e0ada0f13d90"


def test_derived_generators_depend_on_every_part_of_the_context():
    root = SecureGenerator(bytes(32))
    streams = [root.derive(*c).bytes(16) for c in ([b"a"], [b"b"], [b"a", b""], [b"", b"a"], [b"ab"])]
    assert len(set(streams)) == len(streams)
    assert root.derive(b"a").bytes(16) == streams[0]


def test_normals_pass_a_kolmogorov_smirnov_test():
    sample = SecureGenerator(bytes(32)).normal(50_000).numpy()
    assert kstest(sample, "norm").pvalue > 0.001


def test_uniforms_lie_in_the_open_closed_unit_interval():
    sample = SecureGenerator(bytes(32)).uniform(10_000)
    assert sample.min() > 0
    assert sample.max() <= 1


def test_permutations_are_permutations_and_vary():
    generator = SecureGenerator(bytes(32))
    orders = [tuple(generator.permutation(3)) for _ in range(200)]
    assert {tuple(sorted(order)) for order in orders} == {(0, 1, 2)}
    assert len(set(orders)) == 6


def test_a_key_of_another_length_is_refused():
    with pytest.raises(ValueError, match="31 bytes"):
        SecureGenerator(bytes(31))
