"""The function behind SoftAbs: the scalar one against mpmath, the matrix function against finite differences."""

import functools
import itertools
import math
import random

import mpmath
import pytest
import torch
from helpers.repairs import MATRICES, check_derivatives
from torch import Tensor
from torch.autograd import gradgradcheck

from laplace_amort.linalg.divided_differences import divided_differences, positions, u_coth
from laplace_amort.linalg.softabs import softabs, softabs_matrix

DIGITS = 150


@functools.cache
def exact(u: float, order: int) -> mpmath.mpf:
    """u coth u and its first derivatives."""
    u = mpmath.mpf(u)
    if abs(u) < 1e-40:
        return (mpmath.mpf(1), 2 * u / 3, mpmath.mpf(2) / 3, -8 * u / 15)[order]
    coth, sinh2 = mpmath.coth(u), mpmath.sinh(u) ** 2
    return (
        u * coth,
        coth - u / sinh2,
        2 * (u * coth - 1) / sinh2,
        2 * (3 * coth - u / sinh2 - 2 * u * coth**2) / sinh2,
    )[order]


def exact_difference(*points: float) -> mpmath.mpf:
    """Divided difference, by its definition."""
    points = tuple(sorted(points))
    low, high, order = points[0], points[-1], len(points) - 1
    if low == high:
        return exact(low, order) / math.factorial(order)
    return (exact_difference(*points[1:]) - exact_difference(*points[:-1])) / (mpmath.mpf(high) - mpmath.mpf(low))


def difference(points: Tensor) -> Tensor:
    """Of the points in the last dimension, from the table that has them all."""
    n = points.shape[-1]
    table = divided_differences(points.sort(dim=-1).values, n - 1)
    return table[..., positions(n, n - 1, points.device)[tuple(range(n))]]


def largest_error(actual: Tensor, expected: list[mpmath.mpf]) -> float:
    """Relative where the exact value is above 1, else absolute."""
    pairs = zip(actual.tolist(), expected, strict=True)
    return max(float(abs(a - e) / max(1, abs(e))) for a, e in pairs)


def scalars() -> list[float]:
    generator = random.Random(0)
    near_zero = [0.0, 1e-300, 1e-100, 1e-16, 1e-8, 1e-4, 0.01]
    switch = [math.nextafter(0.5, 0), 0.5, math.nextafter(0.5, 1), 0.49, 0.4999999, 0.5000001, 0.51]
    large = [20.0, 100.0, 354.0, 356.0, 709.0, 711.0, 1e6, 1e100, 1e300]
    scattered = [10 ** generator.uniform(-12, 3) for _ in range(400)]
    return [sign * point for sign in (1, -1) for point in near_zero + switch + large + scattered]


@pytest.mark.parametrize(("order", "bound"), [(0, 1e-15), (1, 1e-15), (2, 2e-15), (3, 3e-14)])
def test_scalar_function(order: int, bound: float) -> None:
    with mpmath.workdps(DIGITS):
        points = scalars()
        assert largest_error(u_coth(torch.tensor(points), order), [exact(p, order) for p in points]) < bound


def pairs() -> list[tuple[float, float]]:
    """Pairs at every distance: equal, nearly so, around the switch at 0.5, far; also of opposite signs."""
    starts = [0.0, 1e-9, 0.25, 0.4999, 0.5, 0.5001, 1.0, 3.0, 30.0, 400.0, 1e4]
    gaps = [0.0, 1e-12, 1e-7, 1e-3, 0.1, 0.2499, 0.25, 0.4999, 0.5, 0.5001, 0.9, 5.0, 100.0]
    return [(sign * start, sign * start + gap) for start in starts for gap in gaps for sign in (1, -1)]


def third(pair: tuple[float, float]) -> list[float]:
    a, b = pair
    return [a, b, (a + b) / 2, a - 0.1, b + 0.3, b + 0.6, -a, 7.0]


def test_first_divided_difference() -> None:
    with mpmath.workdps(DIGITS):
        points = pairs()
        assert largest_error(difference(torch.tensor(points)), [exact_difference(*p) for p in points]) < 1e-14


def test_second_divided_difference() -> None:
    with mpmath.workdps(DIGITS):
        points = [(*pair, c) for pair in pairs() for c in third(pair)]
        assert largest_error(difference(torch.tensor(points)), [exact_difference(*p) for p in points]) < 1e-14


def test_third_divided_difference() -> None:
    with mpmath.workdps(DIGITS):
        points = [(*pair, c, d) for pair in pairs()[::7] for c in third(pair)[::3] for d in third(pair)[1::3]]
        assert largest_error(difference(torch.tensor(points)), [exact_difference(*p) for p in points]) < 3e-14


def test_planted_subtraction_fails_where_points_are_near() -> None:
    with mpmath.workdps(DIGITS):
        a, b = torch.tensor(pairs()).unbind(-1)
        apart = (a != b) & ((a - b).abs() < 1e-3)
        quotient = ((u_coth(a, 0) - u_coth(b, 0)) / (a - b))[apart]
        expected = [exact_difference(*p) for p, near in zip(pairs(), apart.tolist(), strict=True) if near]
        assert largest_error(quotient, expected) > 1e-6


def test_positions_are_those_of_the_set() -> None:
    points = torch.tensor([-1.3, 0.2, 0.4])
    table, position = divided_differences(points, 2), positions(3, 2, points.device)
    with mpmath.workdps(DIGITS):
        indices = list(itertools.product(range(3), repeat=3))
        actual = torch.stack([table[position[index]] for index in indices])
        assert largest_error(actual, [exact_difference(*points[list(index)].tolist()) for index in indices]) < 1e-14


@pytest.mark.parametrize("floor", [1e-3, 0.5, 20.0])
def test_softabs(floor: float) -> None:
    values = torch.tensor([-7.0, -0.1, 0.0, 0.03, 5.0], requires_grad=True)
    result = softabs(values, floor)
    orders = [result]
    for _ in range(3):
        orders.append(torch.autograd.grad(orders[-1].sum(), values, create_graph=True)[0])
    with mpmath.workdps(DIGITS):
        for order, actual in enumerate(orders):
            expected = [floor * exact(v / floor, order) for v in values.tolist()]
            assert largest_error(actual * floor**order, expected) < 1e-14 * max(1, floor)
    assert result.min() >= floor


def by_eigh(matrix: Tensor, floor: float = 0.5) -> Tensor:
    """Planted: the same values, with the derivatives of ``torch.linalg.eigh``."""
    eigenvalues, q = torch.linalg.eigh((matrix + matrix.mT) / 2)
    u = eigenvalues / floor
    return (q * (floor * u / torch.tanh(u)).unsqueeze(-2)) @ q.mT


def function(matrix: Tensor, floor: float = 0.5) -> Tensor:
    matrix = (matrix + matrix.mT) / 2
    return softabs_matrix(matrix, *torch.linalg.eigh(matrix.detach()), floor)


@pytest.mark.parametrize("name", MATRICES)
def test_derivatives(name: str) -> None:
    check_derivatives(function, MATRICES[name])


@pytest.mark.parametrize("name", ["zero 2x2", "indefinite 2x2", "repeated"])
def test_third_derivative(name: str) -> None:
    """Second derivatives of the gradient, of a function that has mixed ones."""

    def gradient(matrix: Tensor) -> Tensor:
        value = (function(matrix) * weight).sum()
        return torch.autograd.grad(value, matrix, create_graph=True)[0]

    matrix = MATRICES[name].clone().requires_grad_()
    weight = torch.arange(matrix.numel(), dtype=torch.float64).reshape(matrix.shape).cos()
    gradgradcheck(gradient, matrix)


@pytest.mark.parametrize("name", ["repeated", "multiple of the identity", "indefinite", "negative", "batch"])
def test_planted_eigh_fails_at_repeated_eigenvalues(name: str) -> None:
    torch.testing.assert_close(by_eigh(MATRICES[name]), function(MATRICES[name]))
    with pytest.raises((RuntimeError, AssertionError)):  # GradcheckError, or eigh's own complaint
        check_derivatives(by_eigh, MATRICES[name])


def test_planted_eigh_gives_nan() -> None:
    matrix = MATRICES["multiple of the identity"].clone().requires_grad_()
    weights = torch.arange(9.0).reshape(3, 3)
    for repair, finite in ((function, True), (by_eigh, False)):
        (gradient,) = torch.autograd.grad((weights * repair(matrix)).sum(), matrix)
        assert bool(torch.isfinite(gradient).all()) is finite


def test_planted_eigh_agrees_at_distinct_eigenvalues() -> None:
    """So it fails for the coincidence and nothing else; and it is a second route to both derivatives."""
    check_derivatives(by_eigh, MATRICES["distinct"])
    matrix = MATRICES["distinct"].clone().requires_grad_()
    hessians = [torch.autograd.functional.hessian(lambda m, f=f: f(m).sin().sum(), matrix) for f in (function, by_eigh)]
    torch.testing.assert_close(*hessians)


@pytest.mark.parametrize("name", ["repeated", "spread"])
def test_torch_func(name: str) -> None:
    eigenvalues, eigenvectors = torch.linalg.eigh(MATRICES[name])

    def loss(matrix: Tensor) -> Tensor:
        return softabs_matrix((matrix + matrix.mT) / 2, eigenvalues, eigenvectors, 0.5).sin().sum()

    actual = torch.func.jacrev(torch.func.jacrev(loss))(MATRICES[name])
    expected = torch.autograd.functional.hessian(lambda m: function(m).sin().sum(), MATRICES[name])
    torch.testing.assert_close(actual, expected)


def test_float32() -> None:
    for matrix in MATRICES.values():
        single, double = matrix.float().requires_grad_(), matrix.clone().requires_grad_()
        results = [function(m) for m in (single, double)]
        assert results[0].dtype == torch.float32
        torch.testing.assert_close(results[0], results[1].float(), rtol=1e-5, atol=1e-5)
        gradients = [torch.autograd.grad(r.sin().sum(), m)[0] for r, m in zip(results, (single, double), strict=True)]
        torch.testing.assert_close(gradients[0], gradients[1].float(), rtol=1e-4, atol=1e-4)
