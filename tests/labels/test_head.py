"""The linear head."""

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from blindtune.errors import ConfigError
from blindtune.labels import HEADS, LinearHead, make_head


def test_the_fit_agrees_with_scikit_learn():
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (300,), generator=random)
    features = 5 + 2 * torch.randn(300, 12, generator=random) + 3 * torch.nn.functional.one_hot(labels, 12)
    head = LinearHead(12, 3, l2=1.0, iterations=500)
    head.fit(features, labels)
    standard = ((features - head.mean) / head.scale).numpy()
    stock = LogisticRegression(C=1.0, max_iter=2000, tol=1e-8).fit(standard, labels.numpy())
    found = head(features).softmax(-1).detach()
    assert torch.allclose(found, torch.tensor(stock.predict_proba(standard), dtype=torch.float32), atol=5e-3)


def test_a_dead_dimension_does_not_explode():
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    features[:, 2] = 1e-30 * features[:, 2]
    head = LinearHead(6, 2)
    head.fit(features, torch.arange(50) % 2)
    moved = features.clone()
    moved[:, 2] += 0.01
    assert (head(moved) - head(features)).abs().max() < 1


@pytest.mark.parametrize("value", [0.0, 7.5, math.nan, math.inf, 1e38])
def test_a_fit_on_features_that_no_model_gives_is_not_broken_off(value):
    """An operator may answer anything; an error must not depend on it together with labels."""
    head = LinearHead(4, 2)
    head.fit(torch.full((20, 4), value), torch.arange(20) % 2)
    features = torch.randn(20, 4)
    features[3] = value
    head.fit(features, torch.arange(20) % 2)


@pytest.mark.parametrize("name", list(HEADS))
def test_heads_give_a_logit_for_each_class(name):
    assert make_head(name, 12, 3)(torch.randn(5, 12)).shape == (5, 3)


def test_initial_weights_follow_the_seed_and_are_secret_without_one():
    first, again, other, secret = (
        make_head("mlp", 12, 3, **({} if seed is None else {"seed": seed}))(torch.ones(1, 12))
        for seed in (1, 1, 2, None)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, secret)
    assert not torch.equal(secret, make_head("mlp", 12, 3)(torch.ones(1, 12)))


def test_a_head_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match=r"no head 'forest'.*linear, mlp, pooler"):
        make_head("forest", 12, 3)
