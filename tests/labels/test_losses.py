"""Losses by name."""

from __future__ import annotations

import pytest
import torch

from blindtune.labels import LOSSES, squared_error


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_squared_error_is_least_where_the_right_class_has_95_percent(classes: int):
    logits = torch.zeros(2, classes, requires_grad=True)
    labels = torch.tensor([classes - 1, 0])
    optimizer = torch.optim.LBFGS([logits], max_iter=50)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = squared_error(logits, labels)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    assert float(squared_error(logits.detach(), labels)) < 1e-8
    torch.testing.assert_close(logits.softmax(-1)[[0, 1], labels].detach(), torch.tensor([0.95, 0.95]))


def test_losses_are_means_over_the_batch():
    logits, labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    for loss in LOSSES.values():
        torch.testing.assert_close(loss(logits, labels), loss(logits.repeat(3, 1), labels.repeat(3)))
