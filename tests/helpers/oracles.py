"""What the properties are held to, in plain torch: finite differences, and the ELBO without any code of the package."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable

import torch
from torch import Tensor

from helpers.strategies import Problem


def finite_difference(fn: Callable[[Tensor], Tensor], point: Tensor, step: float = 0.1, levels: int = 12) -> Tensor:
    """Jacobian ``(*out, *in)`` of a smooth function by central differences, extrapolated to step zero (Ridders)."""
    flat, columns = point.detach().reshape(-1), []
    for direction in torch.eye(flat.numel(), dtype=flat.dtype):

        def along(h: float, direction: Tensor = direction) -> Tensor:
            up, down = (fn((flat + s * direction).reshape(point.shape)).detach() for s in (h, -h))
            return (up - down) / (2 * h)

        columns.append(_extrapolate(along, step, levels))
    return torch.stack(columns, dim=-1).reshape(columns[0].shape + point.shape)


def slope(fn: Callable[[Tensor], Tensor], point: Tensor, direction: Tensor, step: float = 0.1) -> Tensor:
    """Derivative of a smooth function at a point along a direction, by the same finite differences."""
    zero = torch.zeros((), dtype=point.dtype)
    return finite_difference(lambda t: fn(point.detach() + t * direction), zero, step)


def _extrapolate(along: Callable[[float], Tensor], step: float, levels: int) -> Tensor:
    """Neville's table in h**2 over halved steps; returns the entry that differs least from its two neighbors."""
    best, smallest, previous = None, float("inf"), []
    for level in range(levels):
        row = [along(step / 2**level)]
        for order, older in enumerate(previous, start=1):
            row.append(row[-1] + (row[-1] - older) / (4**order - 1))
            change = float(torch.maximum((row[-1] - row[-2]).abs().max(), (row[-1] - older).abs().max()))
            if change <= smallest:
                best, smallest = row[-1], change
        if best is not None and smallest <= 1e-12 * float(best.abs().max()):
            break  # nothing but rounding error left to gain
        previous = row
    assert best is not None, "the function is not finite around this point"
    return best


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest element expected (at least 1e-2, where rounding error rules)."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if expected.numel() == 0:
        return 0.0
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1e-2))


def softabs_by_doubling(matrix: Tensor, floor: float, doublings: int = 16) -> Tensor:
    """SoftAbs without eigenvalues, hence differentiable by torch at repeated ones, to any order.

    g(u) = u coth u obeys g(2u) = g(u) + u g(u)**-1 u. Starting where its Taylor series is exact to rounding error, that
    recursion holds for symmetric matrices as it stands, and every step of it is a sum of positive terms.
    """
    u = matrix / (floor * 2**doublings)
    identity, square = torch.eye(u.shape[-1], dtype=u.dtype), u @ u
    g = identity + square @ (identity / 3 - square @ (identity / 45 - square * (2 / 945)))
    for _ in range(doublings):
        g = g + u @ torch.linalg.solve(g, u)
        u = 2 * u
    return floor * g


class Figures(collections.defaultdict):
    """The largest error seen under each name, and the number of comparisons behind it."""

    def __init__(self) -> None:
        super().__init__(lambda: (0.0, 0))

    def add(self, name: str, error: float) -> float:
        """Record one relative error and hand it on."""
        largest, count = self[name]
        self[name] = (max(largest, error), count + 1)
        return error


def unpack(problem: Problem, flat: Tensor) -> tuple[Tensor, Tensor]:
    """Split the concatenation of theta and y, ``(size,)``, and reshape."""
    count = torch.Size(problem.theta_shape).numel()
    return flat[:count].reshape(problem.theta_shape), flat[count:].reshape(problem.y_shape)


def oracle_elbo(problem: Problem, mean: Tensor, curvature: Tensor) -> Tensor:
    """The ELBO for fixed noise: the Hessian of a function of one vector knows nothing of what it is taken at.

    The two arguments are the same theta; they are apart so that torch.func can differentiate along each path.
    """

    def log_joint(flat: Tensor) -> Tensor:
        return problem.log_joint(*unpack(problem, flat))

    y = problem.mode(mean).reshape(-1)
    hessian = torch.func.hessian(log_joint)(torch.cat([curvature.reshape(-1), y]))
    precision = softabs_by_doubling(-hessian, problem.floor)
    center, root = torch.cat([mean.reshape(-1), y]), torch.linalg.cholesky(precision).mT
    log_probs = [log_joint(center + torch.linalg.solve(root, noise)) for noise in problem.noise]
    entropy = problem.size / 2 * math.log(2 * math.pi * math.e) - torch.logdet(precision) / 2
    return sum(log_probs) / len(log_probs) + entropy


def oracle_gradient(problem: Problem) -> Tensor:
    """The gradient at ``problem.theta``, through both paths."""
    return torch.func.grad(lambda theta: oracle_elbo(problem, theta, theta))(problem.theta)
