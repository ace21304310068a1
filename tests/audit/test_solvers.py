"""Numerical methods against direct computations."""

import torch
from torch import nn

from blindtune.audit.solvers import JacobianProducts, conjugate_gradients


def test_conjugate_gradients_solve_least_squares():
    random = torch.Generator().manual_seed(0)
    a = torch.randn(30, 6, generator=random, dtype=torch.float64)
    b = torch.randn(30, generator=random, dtype=torch.float64)
    start = torch.randn(6, generator=random, dtype=torch.float64)
    solution = conjugate_gradients(
        lambda x: a @ x, lambda y: a.T @ y, b - a @ start, start, lambda x: x.square().sum(), iterations=6
    )
    torch.testing.assert_close(solution, torch.linalg.lstsq(a, b[:, None]).solution[:, 0])


def test_independent_problems_do_not_influence_each_other():
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 20, 4, generator=random), torch.randn(3, 20, 1, generator=random)
    scales = torch.tensor([1e-3, 1.0, 1e3])[:, None, None]

    def solve(b: torch.Tensor) -> torch.Tensor:
        return conjugate_gradients(
            lambda x: a @ x, lambda y: a.mT @ y, b, torch.zeros(3, 4, 1), lambda x: x.square().sum((1, 2), True), 4
        )

    torch.testing.assert_close(solve(b * scales) / scales, solve(b), rtol=1e-3, atol=1e-4)


def test_products_with_a_jacobian_and_its_transpose():
    layer = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    point = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    jacobian = torch.autograd.functional.jacobian(layer, point)
    products = JacobianProducts(layer, point.clone())
    cotangent, direction = torch.arange(3.0, dtype=torch.float64), torch.arange(5.0, dtype=torch.float64)
    torch.testing.assert_close(products.transposed(cotangent), jacobian.T @ cotangent)
    torch.testing.assert_close(products.times(direction), jacobian @ direction)
    torch.testing.assert_close(products.output, layer(point))
