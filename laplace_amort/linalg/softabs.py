r"""The matrix function behind the SoftAbs repair: :math:`f(A) = Q\, f(\Lambda)\, Q^\top` with stable derivatives.

``torch.linalg.eigh`` has infinite or NaN derivatives where eigenvalues coincide, although :math:`f(A)` is smooth there.
Its derivatives of every order need divided differences only (Daleckii & Krein), which are finite everywhere:

.. math::

    D^m f(A)[E_1, \dots, E_m] = Q \Big( \sum_{\pi} \sum_{k_1 \dots k_{m-1}}
    f[\lambda_i, \lambda_{k_1}, \dots, \lambda_{k_{m-1}}, \lambda_j]\,
    (\tilde E_{\pi_1})_{i k_1} \cdots (\tilde E_{\pi_m})_{k_{m-1} j} \Big) Q^\top, \qquad \tilde E = Q^\top E Q,

summed over the permutations :math:`\pi` of the directions. The form :math:`\operatorname{tr}(G\, D^m f(A)[E_1, \dots])`
is symmetric in :math:`G` and the directions, so that one Function is the backward of itself.

Here :math:`f(\lambda) = \lambda \coth(\lambda / c)` with a floor :math:`c > 0`, written as :math:`c\, g(\lambda / c)`.

References:

[1] Higham (2008), *Functions of Matrices*, theorem 3.11 (Daleckii & Krein), equation 3.13.
[2] Betancourt (2013), *A General Metric for Riemannian Manifold Hamiltonian Monte Carlo*, equation 12 (SoftAbs),
    https://arxiv.org/abs/1212.4693
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from laplace_amort.linalg import symmetric
from laplace_amort.linalg.repair import (
    Change,
    FlooredRepair,
)

__all__ = ["SoftAbs", "softabs", "softabs_matrix"]

# Where arguments are closer than this, divided differences come from quadrature instead of subtraction. Functions g
# with poles at +-i pi: six Gauss-Legendre nodes on an interval of this length are exact to rounding error.
_NEAR = 0.5
_RULE = (  # nodes and weights on [0, 1]
    (0.03376524289842403, 0.08566224618958514),
    (0.16939530676686776, 0.18038078652406936),
    (0.38069040695840156, 0.23395696728634552),
    (0.6193095930415985, 0.23395696728634552),
    (0.8306046932331322, 0.18038078652406936),
    (0.9662347571015759, 0.08566224618958514),
)
_SERIES_TERMS = 12


def softabs(values: Tensor, floor: float) -> Tensor:
    r"""Return :math:`\lambda \coth(\lambda / c)`, a smooth absolute value that never falls below the floor ``c``.

    :param Tensor values: any shape; gradients of any order flow to it.
    :param float floor: the value at 0, in the unit of ``values``; positive.
    :return: the shape of ``values``.

    Example::

        >>> import torch
        >>> softabs(torch.tensor([-3., 0., 3.]), floor=0.1)
        tensor([3.0000, 0.1000, 3.0000])
    """
    return floor * _Elementwise.apply(values / floor, 0)


def softabs_matrix(matrix: Tensor, eigenvalues: Tensor, eigenvectors: Tensor, floor: float) -> Tensor:
    r"""Apply :func:`softabs` to the eigenvalues of symmetric matrices; differentiable to any order in ``matrix``.

    Derivatives of order ``m`` take ``n ** (m + 1)`` numbers for each matrix. Do not use it for 1x1 matrices, where
    :func:`softabs` itself is all there is.

    :param Tensor matrix: symmetric, ``(*, n, n)``; gradients flow to it.
    :param Tensor eigenvalues: of the matrix in ascending order, ``(*, n)``, without a graph.
    :param Tensor eigenvectors: in columns, ``(*, n, n)``, without a graph.
    :param float floor: the smallest eigenvalue that can result.
    :return: ``(*, n, n)``, symmetric.
    """
    return _MatrixFunction.apply(matrix, eigenvalues, eigenvectors, floor)


class _Elementwise(Function):
    """The derivative of g of a given order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, order: int) -> Tensor:
        return _g(u, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.order = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return grad_outputs[0] * _Elementwise.apply(ctx.saved_tensors[0], ctx.order + 1), None


class _MatrixFunction(Function):
    """f(A), or its derivative in as many directions as are given."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, eigenvalues: Tensor, eigenvectors: Tensor, floor: float, *directions: Tensor) -> Tensor:
        if not directions:
            return (eigenvectors * (floor * _g(eigenvalues / floor, 0)).unsqueeze(-2)) @ eigenvectors.mT
        rotated = [eigenvectors.mT @ direction @ eigenvectors for direction in directions]
        return eigenvectors @ _daleckii_krein(eigenvalues / floor, floor, rotated) @ eigenvectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        matrix, eigenvalues, eigenvectors, ctx.floor, *directions = inputs
        ctx.save_for_backward(matrix, eigenvalues, eigenvectors, *directions)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        matrix, eigenvalues, eigenvectors, *directions = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]]
        # One order higher for the matrix; for a direction, the gradient takes its place.
        arguments = [[*directions, *grad_outputs]]
        arguments += [[*directions[:i], grad_outputs[0], *directions[i + 1 :]] for i in range(len(directions))]
        grads = [
            _MatrixFunction.apply(matrix, eigenvalues, eigenvectors, ctx.floor, *args) if want else None
            for want, args in zip(wanted, arguments, strict=True)
        ]
        return grads[0], None, None, None, *grads[1:]


def _daleckii_krein(scaled: Tensor, floor: float, directions: Sequence[Tensor]) -> Tensor:
    """The sum over permutations, in the basis of eigenvectors; ``scaled`` are the eigenvalues over the floor."""
    order, n = len(directions), scaled.shape[-1]

    def factor(direction: Tensor, i: int) -> Tensor:  # written out: batched reverse passes have no rule for einsum
        shape = [n if axis in (i, i + 1) else 1 for axis in range(order + 1)]
        return direction.reshape(*direction.shape[:-2], *shape)

    products = [
        math.prod((factor(e, i) for i, e in enumerate(permuted[1:], start=1)), start=factor(permuted[0], 0))
        for permuted in itertools.permutations(directions)
    ]
    differences = _divided_differences(scaled, order)[..., _positions(n, order, scaled.device)]
    total = differences * sum(products[1:], start=products[0]) / floor ** (order - 1)
    return total.sum(dim=tuple(range(-order, -1))) if order > 1 else total


def _divided_differences(points: Tensor, order: int) -> Tensor:
    """All divided differences g[a, b, ...] of points ``(*, n)`` in ascending order, each set of points once.

    By the recursion over the widest pair, or where all are near, as the mean of the derivative of that order over the
    simplex that they span (Hermite & Genocchi). First come the sets of one point repeated, then :func:`_combinations`.
    """
    if order == 0:
        return _g(points, 0)
    n, device = points.shape[-1], points.device
    chosen = _combinations(n, order, device)
    lower, position = _divided_differences(points, order - 1), _positions(n, order - 1, device)
    upper_part, lower_part = (lower[..., position[part.unbind(-1)]] for part in (chosen[:, 1:], chosen[:, :-1]))
    spread = points[..., chosen]
    gap = spread[..., -1] - spread[..., 0]
    near = gap < _NEAR
    apart = (upper_part - lower_part) / torch.where(near, torch.ones_like(gap), gap)
    several = torch.where(near, _simplex_mean(spread.unbind(-1), order), apart)
    return torch.cat([_g(points, order) / math.factorial(order), several], dim=-1)


def _combinations(n: int, order: int, device: torch.device) -> Tensor:
    """Ascending choices of ``order + 1`` out of ``n`` with repetition, not all the same."""
    chosen = torch.combinations(torch.arange(n, device=device), order + 1, with_replacement=True)
    return chosen[chosen[:, 0] != chosen[:, -1]]


def _positions(n: int, order: int, device: torch.device) -> Tensor:
    """Where :func:`_divided_differences` has g[a, b, ...], for indices in any order: ``(n,) * (order + 1)``."""
    alike = torch.arange(n, device=device).unsqueeze(-1).expand(n, order + 1)
    listed = torch.cat([alike, _combinations(n, order, device)]) if order else alike
    position = torch.zeros((n,) * (order + 1), dtype=torch.long, device=device)
    position[listed.unbind(-1)] = torch.arange(len(listed), device=device)
    ascending = torch.ones_like(position).nonzero().sort(dim=-1).values
    return position[ascending.unbind(-1)].reshape(position.shape)


def _simplex_mean(points: Sequence[Tensor], order: int) -> Tensor:
    """The integral of the derivative of g over the unit simplex, by a product rule in Duffy's coordinates."""
    steps = [end - start for start, end in itertools.pairwise(points)]
    nodes, shares = torch.tensor(_RULE, dtype=points[0].dtype, device=points[0].device).unbind(-1)
    total = torch.zeros_like(points[0])
    for outer in itertools.product(_RULE, repeat=order - 1):  # the innermost rule is all at once
        start, weight, reach = points[0], 1.0, 1.0
        for depth, (node, share) in enumerate(outer):
            reach *= node
            weight *= share * node ** (order - 1 - depth)
            start = start + reach * steps[depth]
        inner = start.unsqueeze(-1) + reach * steps[-1].unsqueeze(-1) * nodes
        total = total + (_g(inner, order) * (weight * shares)).sum(-1)
    return total


def _g(u: Tensor, order: int) -> Tensor:
    """u coth u, or its derivative of any order; by series near zero, where the closed forms cancel."""
    small = u.abs() < 0.5
    away = torch.where(small, torch.ones_like(u), u)
    coth, slope = 1 / torch.tanh(away), -1 / torch.sinh(away) ** 2
    closed = away * _coth(coth, slope, order)
    if order:
        closed = closed + order * _coth(coth, slope, order - 1)
    return torch.where(small, _series(torch.where(small, u, torch.zeros_like(u)), order), closed)


def _coth(coth: Tensor, slope: Tensor, order: int) -> Tensor:
    """A derivative of the hyperbolic cotangent from it and its slope; every term has the same sign."""
    terms = [factor * coth**i * slope**j for (i, j), factor in _coth_polynomial(order).items()]
    return sum(terms[1:], start=terms[0])


@functools.cache
def _coth_polynomial(order: int) -> dict[tuple[int, int], int]:
    """Exponents and coefficients of that derivative in t = coth u and w = t' = 1 - t**2, with w' = -2 t w."""
    if order == 0:
        return {(1, 0): 1}
    terms: dict[tuple[int, int], int] = {}
    for (i, j), factor in _coth_polynomial(order - 1).items():
        for exponents, multiple in (((i - 1, j + 1), i), ((i + 1, j), -2 * j)):
            if multiple:
                terms[exponents] = terms.get(exponents, 0) + factor * multiple
    return terms


def _series_coefficients(terms: int) -> list[float]:
    """Taylor coefficients of u coth u in u**2: 2**(2n) B_2n / (2n)!, from the recursion of the Bernoulli numbers."""
    bernoulli: list[Fraction] = []
    for m in range(2 * terms):
        total = sum((math.comb(m + 1, k) * bernoulli[k] for k in range(m)), start=Fraction(0))
        bernoulli.append(Fraction(1) if m == 0 else -total / (m + 1))
    return [float(4**n * bernoulli[2 * n] / math.factorial(2 * n)) for n in range(terms)]


_SERIES = _series_coefficients(_SERIES_TERMS)


def _series(u: Tensor, order: int) -> Tensor:
    """The Taylor series of u coth u at 0, or of its derivative; for abs(u) <= 1/2."""
    square, total = u**2, torch.zeros_like(u)
    for n in reversed(range((order + 1) // 2, _SERIES_TERMS)):
        total = total * square + _SERIES[n] * math.perm(2 * n, order)
    return total * u if order % 2 else total


@dataclass(frozen=True)
class SoftAbs(FlooredRepair):
    r"""Replace every eigenvalue :math:`\lambda` by :math:`\lambda\coth(\lambda / c)`, a smooth absolute value.

    Eigenvalues well above the floor :math:`c` stay as they are (by a relative :math:`2 e^{-2\lambda/c}`), negative ones
    change sign, and none falls below :math:`c`. Values and derivatives are exact at repeated eigenvalues too.

    Do not use it to hide a matrix that is indefinite *at the optimum*: read the report. The floor is a share of the
    scale, so no direction gets a standard deviation above ``1 / sqrt(floor)`` of the reference, 32 by default; without
    a scale it is a precision. Raise it where a fit stays stuck with a negative eigenvalue: on its way to positive it
    has to pass zero, where the draws of the guide are that wide and the ELBO is low.

    :param float floor: smallest eigenvalue that can result, as a share of the scale; positive.
    :param float max_relative_change: bound on the report's ``relative_change``. The default allows everything: a
        negative number changes by twice its size. Lower it to refuse, say, information of the wrong sign: 1.9.
    :raises ValueError: if the floor is not positive or the bound is negative.

    Calling it takes symmetric matrices of shape ``(*, n, n)`` and optionally a positive ``scale`` of shape ``(*, n)``
    or ``(n,)``, and returns ``(repaired, report)``; gradients flow through both. It raises
    :class:`~laplace_amort.NotPositiveDefiniteError` past the bound, or if an element is not finite, and
    ``ValueError`` or ``TypeError`` if matrices or scales are not such. A matrix left alone is returned as it is.

    Example::

        >>> import torch
        >>> repaired, report = SoftAbs()(torch.tensor([[1., 2.], [2., 1.]]))     # eigenvalues 3 and -1
        >>> repaired
        tensor([[2.0000, 1.0000],
                [1.0000, 2.0000]])
        >>> print(report)
        repaired 1 of 1 matrix; smallest eigenvalue -1 -> 1; largest relative change 0.6325

    Reference: Betancourt (2013), *A General Metric for Riemannian Manifold Hamiltonian Monte Carlo*, equation 12,
    https://arxiv.org/abs/1212.4693
    """

    def _repair(self, matrix: Tensor) -> tuple[Tensor, Change]:
        if matrix.shape[-1] == 1:
            repaired = softabs(matrix, self.floor)
            return repaired, Change.of_spectrum(matrix.detach().squeeze(-1), repaired.detach().squeeze(-1))
        eigenvalues, eigenvectors = symmetric.eigh(matrix.detach())
        repaired = softabs_matrix(matrix, eigenvalues, eigenvectors, self.floor)
        return repaired, Change.of_spectrum(eigenvalues, softabs(eigenvalues, self.floor))
