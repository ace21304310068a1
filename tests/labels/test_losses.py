"""Losses by name."""

from __future__ import annotations

import torch

from blindtune.labels import LOSSES, squared_error


def test_the_squared_error_is_least_at_plus_and_minus_one():
    labels = torch.tensor([2, 0])
    targets = torch.tensor([[-1.0, -1.0, 1.0], [1.0, -1.0, -1.0]])
    assert float(squared_error(targets, labels)) == 0
    logits = torch.randn(2, 3, requires_grad=True, generator=torch.Generator().manual_seed(0))
    squared_error(logits, labels).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, (logits.detach() - targets) / len(labels))


def test_losses_are_means_over_the_batch():
    logits, labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    for loss in LOSSES.values():
        torch.testing.assert_close(loss(logits, labels), loss(logits.repeat(3, 1), labels.repeat(3)))
