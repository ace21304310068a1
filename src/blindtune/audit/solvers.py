"""Numerical methods that several attacks use."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

TINY = 1e-30
"""Lower bound of divisors that may be zero."""


class JacobianProducts:
    """Multiplies J = ∂f/∂x at one point, and its transpose, with vectors, by double backward.

    Jᵀ c is linear in c, and its derivative with respect to c, along v, is J v.

    Attributes:
        output: f(x).
    """

    def __init__(self, function: Callable[[Tensor], Tensor], point: Tensor) -> None:
        self._point = point.requires_grad_()
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivatives
            self.output = function(self._point)
            self._cotangent = torch.zeros_like(self.output, requires_grad=True)
            (self._pulled,) = torch.autograd.grad(self.output, self._point, self._cotangent, create_graph=True)

    def transposed(self, cotangent: Tensor) -> Tensor:
        """Returns Jᵀ c, of the shape of x, for a cotangent of the shape of f(x)."""
        given = cotangent.to(self.output)
        return torch.autograd.grad(self.output, self._point, given, retain_graph=True)[0]

    def times(self, direction: Tensor) -> Tensor:
        """Returns J v, of the shape of f(x), for a direction of the shape of x."""
        given = direction.to(self._pulled)
        return torch.autograd.grad(self._pulled, self._cotangent, given, retain_graph=True)[0]


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    transpose: Callable[[Tensor], Tensor],
    residual: Tensor,
    start: Tensor,
    squared_norm: Callable[[Tensor], Tensor],
    iterations: int,
) -> Tensor:
    """Returns x after some iterations of CGLS from `start` towards the least-squares solution of A x = b.

    Args:
        apply, transpose: A and Aᵀ.
        residual: b − A `start`.
        squared_norm: |·|² of one problem, or of several independent ones, in a shape that broadcasts against x and b.
    """
    solution = start
    direction, size = torch.zeros_like(start), torch.tensor(torch.inf)
    for _ in range(iterations):
        gradient = transpose(residual)
        previous_size, size = size, squared_norm(gradient)
        direction = gradient + size / previous_size.clamp_min(TINY) * direction
        image = apply(direction)
        length = size / squared_norm(image).clamp_min(TINY)
        solution = solution + length * direction
        residual = residual - length * image
    return solution


@contextmanager
def unconverged_fits() -> Generator[None]:
    """Suppresses the warning of logistic regressions (L-BFGS) that stop at their limit of iterations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
