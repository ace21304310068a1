"""The adversary: finds labels that are there, and its penalty moves features until it doesn't."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from blindtune.privacy.adversary import Adversary


def labelled(rows: int = 32, dim: int = 48, seed: int = 0, signal: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (rows,), generator=random)
    features = torch.randn(1, rows, dim, generator=random)
    features[0, :, 0] += signal * (2.0 * labels - 1)
    return features, labels


def accuracy(adversary: Adversary, features: torch.Tensor, labels: torch.Tensor) -> float:
    """Of the fitted classifier on data that it hasn't seen."""
    standard = (features - features.mean(1, keepdim=True)) / features.std()
    logits = standard @ adversary.weights[:, :-1] + adversary.weights[:, -1:]
    return float((logits[0].argmax(-1) == labels).float().mean())


def test_a_buffer_of_batches_generalises_where_one_batch_does_not():
    unseen = labelled(2000, seed=99, signal=1.0)
    scores = {}
    for buffer in (1, 30):
        adversary = Adversary(1, 48, 2, buffer=buffer, iterations=30)
        for step in range(30):
            adversary.penalty(*labelled(seed=step, signal=1.0))
        scores[buffer] = accuracy(adversary, *unseen)
    assert scores[30] > 0.8
    assert scores[30] > scores[1] + 0.03


def test_with_as_many_dimensions_as_examples_a_penalised_fit_guesses_better_and_pulls_less():
    """Fitting noise makes no stronger adversary, but gradients that drown those of the task."""
    unseen, scores, pulls = labelled(2000, 384, seed=99, signal=1.0), {}, {}
    for l2 in (1.0, Adversary(1, 384, 2).l2):
        adversary = Adversary(1, 384, 2, l2=l2)
        for step in range(25):
            features, labels = labelled(32, 384, seed=step, signal=1.0)
            penalty = adversary.penalty(features.requires_grad_(), labels).sum()
        (gradient,) = torch.autograd.grad(penalty, features)
        scores[l2], pulls[l2] = accuracy(adversary, *unseen), float(gradient.norm())
    weak, strong = scores
    assert scores[strong] > scores[weak] + 0.02
    assert pulls[strong] < pulls[weak] / 5


@pytest.mark.parametrize("form", ["confusion", "flip", "reversal"])
def test_following_the_penalty_takes_the_label_out_of_the_features(form):
    adversary = Adversary(1, 48, 2, form=form, buffer=5)
    features, labels = labelled(256)
    before = class_distance(features, labels)
    moving = features.clone().requires_grad_()
    optimizer = torch.optim.Adam([moving], lr=0.02)
    for _ in range(160):
        optimizer.zero_grad()
        adversary.penalty(moving, labels).sum().backward()
        optimizer.step()
    assert before > 3
    assert abs(class_distance(moving.detach(), labels)) < before / 4


def class_distance(features: torch.Tensor, labels: torch.Tensor) -> float:
    """Signed distance of the class means along the direction that carries the label."""
    carrier = features[0, :, 0]
    return float(carrier[labels == 1].mean() - carrier[labels == 0].mean())


def test_channels_are_fitted_independently():
    features, labels = labelled(128)
    noise = torch.randn(1, 128, 48, generator=torch.Generator().manual_seed(5))
    adversary = Adversary(2, 48, 2, buffer=10, iterations=30)
    for seed in range(10):
        features, labels = labelled(128, seed=seed)
        losses = adversary.penalty(torch.cat([features, noise]), labels)
    assert losses.shape == (2,)
    assert losses[0] > 2 * losses[1]


def test_three_classes():
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (300,), generator=random)
    features = torch.randn(1, 300, 8, generator=random) + 3 * torch.nn.functional.one_hot(labels, 8)
    adversary = Adversary(1, 8, 3, iterations=30)
    adversary.penalty(features, labels)
    assert accuracy(adversary, features, labels) > 0.9


def test_state_restores_fit_and_buffer_and_is_not_changed_by_later_steps():
    adversary = Adversary(1, 48, 2, buffer=3)
    adversary.penalty(*labelled(seed=1))
    state = adversary.state_dict()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    first = adversary.penalty(*labelled(seed=2))
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    again = Adversary(1, 48, 2, buffer=3)
    again.load_state_dict(state)
    assert torch.equal(again.penalty(*labelled(seed=2)), first)


@pytest.mark.parametrize("scale", [1.0, 0.003])
@pytest.mark.parametrize(("classes", "present"), [(2, [0, 1]), (3, [0, 1, 2]), (4, [0, 2, 3])])
@pytest.mark.parametrize("l2", [1.0, 0.1])
def test_a_fit_on_one_batch_is_that_of_scikit_learn(classes, present, l2, scale):
    """On raw features, whatever their scale, and on the classes that are there."""
    random = torch.Generator().manual_seed(0)
    labels = torch.tensor(present)[torch.randint(len(present), (32,), generator=random)]
    channels = scale * (0.5 + torch.randn(2, 32, 384, generator=random))
    adversary = Adversary(2, 384, classes, form="flip", l2=l2, fit="batch")
    penalty = adversary.penalty(channels, labels)
    for channel, weights, loss in zip(channels.double(), adversary.weights.double(), penalty, strict=True):
        stock = LogisticRegression(C=1 / l2, max_iter=10_000, tol=1e-10).fit(channel.numpy(), labels.numpy())
        expected = stock.predict_log_proba(channel.numpy())
        logits = (channel @ weights[:-1] + weights[-1])[:, present]
        assert np.allclose(logits.softmax(-1).numpy(), np.exp(expected), atol=1e-4)
        wrong = 1 - torch.nn.functional.one_hot(labels, classes)[:, present].double()
        flipped = -(torch.tensor(expected) * wrong).sum(-1).mean() / (len(present) - 1)
        assert float(loss) == pytest.approx(float(flipped), rel=1e-3)


def test_a_fit_on_one_batch_remembers_no_other():
    adversary, fresh = (Adversary(1, 48, 2, form="flip", l2=1.0, fit="batch") for _ in range(2))
    adversary.penalty(*labelled(seed=1))
    assert torch.equal(adversary.penalty(*labelled(seed=2)), fresh.penalty(*labelled(seed=2)))
    assert set(adversary.state_dict()) == {"weights"}


def test_a_batch_of_one_class_has_no_penalty_and_no_gradient():
    features = torch.randn(2, 8, 5, requires_grad=True)
    penalty = Adversary(2, 5, 3, form="flip", fit="batch").penalty(features, torch.ones(8, dtype=torch.long))
    (gradient,) = torch.autograd.grad(penalty.sum(), features)
    assert not penalty.any()
    assert not gradient.any()
