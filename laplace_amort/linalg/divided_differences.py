r"""The function :math:`g(u) = u \coth u`, its derivatives, and its divided differences of any order.

A divided difference of order m takes m + 1 points, in any order and with repetition:

.. math:: g[a] = g(a), \qquad g[a, \dots, b] = \frac{g[\dots, b] - g[a, \dots]}{b - a}, \qquad
          g[a, \dots, a] = g^{(m)}(a) / m!

For n points these are ``n ** (m + 1)`` numbers of which few differ, since the order of the points does not matter. So
each is computed once, in a list, and :func:`positions` says where in it each of the ``n ** (m + 1)`` is.

Worked for two points, :math:`\lambda_0 \le \lambda_1`, and order 1. The list has first the sets of one point repeated
and then the others,

.. math:: g[\lambda_0, \lambda_0] = g'(\lambda_0), \qquad g[\lambda_1, \lambda_1] = g'(\lambda_1), \qquad
          g[\lambda_0, \lambda_1] = \frac{g(\lambda_1) - g(\lambda_0)}{\lambda_1 - \lambda_0},

and the matrix of all of them takes the third twice::

    >>> import torch
    >>> positions(2, 1, torch.device("cpu"))
    tensor([[0, 2],
            [2, 1]])
    >>> listed = divided_differences(torch.tensor([0., 2.]), 1)
    >>> listed[positions(2, 1, torch.device("cpu"))]     # g'(0) = 0, and (g(2) - g(0)) / 2 = coth 2 - 1/2
    tensor([[0.0000, 0.5373],
            [0.5373, 0.8853]])

For order 2 the list is of 000, 111, 001 and 011, each a difference of two in the list before: 001 is 01 less 00.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy
import scipy.special
import torch
from torch import Tensor

__all__ = ["divided_differences", "positions", "u_coth"]

# Where arguments are closer than this, divided differences come from quadrature instead of subtraction. Functions g
# with poles at +-i pi: six Gauss-Legendre nodes on an interval of this length are exact to rounding error.
_NEAR = 0.5
_NODES, _WEIGHTS = numpy.polynomial.legendre.leggauss(6)
_RULE = list(zip(((_NODES + 1) / 2).tolist(), (_WEIGHTS / 2).tolist(), strict=True))  # on [0, 1]
# Terms of the series of g at zero that are not lost in rounding errors for abs(u) <= 1/2, derivatives included.
_SERIES_TERMS = 12


def u_coth(u: Tensor, order: int) -> Tensor:
    r"""Return :math:`u \coth u`, or its derivative of any order; by series near zero, where the closed forms cancel.

    :param Tensor u: any shape.
    :param int order: of the derivative, 0 for the function itself.
    """
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


# Taylor coefficients of u coth u in u**2, 2**(2n) B_2n / (2n)!, by Euler's formula: scipy.special.bernoulli is good to
# 1e-12 only.
_SERIES = [1.0]
_SERIES += [-2 * (-1) ** n * float(scipy.special.zeta(2 * n)) / math.pi ** (2 * n) for n in range(1, _SERIES_TERMS)]


def _series(u: Tensor, order: int) -> Tensor:
    """The Taylor series of u coth u at 0, or of its derivative; for abs(u) <= 1/2."""
    square, total = u**2, torch.zeros_like(u)
    for n in reversed(range((order + 1) // 2, _SERIES_TERMS)):
        total = total * square + _SERIES[n] * math.perm(2 * n, order)
    return total * u if order % 2 else total


def divided_differences(points: Tensor, order: int) -> Tensor:
    """List all divided differences g[a, b, ...], each set of points once; see the module.

    By the recursion over the widest pair, or where all are near, as the mean of the derivative of that order over the
    simplex that they span (Hermite & Genocchi). First come the sets of one point repeated, then :func:`_combinations`.

    :param Tensor points: in ascending order, ``(*, n)``.
    :param int order: one less than the number of points in a difference.
    :return: ``(*, M)``, of which :func:`positions` takes each one where it belongs.
    """
    if order == 0:
        return u_coth(points, 0)
    n, device = points.shape[-1], points.device
    chosen = _combinations(n, order, device)  # of points by index, a row for each difference
    lower, position = divided_differences(points, order - 1), positions(n, order - 1, device)
    upper_part, lower_part = (lower[..., position[part.unbind(-1)]] for part in (chosen[:, 1:], chosen[:, :-1]))
    spread = points[..., chosen]
    gap = spread[..., -1] - spread[..., 0]
    near = gap < _NEAR
    apart = (upper_part - lower_part) / torch.where(near, torch.ones_like(gap), gap)
    several = torch.where(near, _simplex_mean(spread.unbind(-1), order), apart)
    return torch.cat([u_coth(points, order) / math.factorial(order), several], dim=-1)


def _combinations(n: int, order: int, device: torch.device) -> Tensor:
    """Ascending choices of ``order + 1`` out of ``n`` with repetition, not all the same."""
    chosen = torch.combinations(torch.arange(n, device=device), order + 1, with_replacement=True)
    return chosen[chosen[:, 0] != chosen[:, -1]]


def positions(n: int, order: int, device: torch.device) -> Tensor:
    """Return where :func:`divided_differences` has g[a, b, ...], for indices in any order.

    :return: indices into the list, ``(n,) * (order + 1)``.
    """
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
        total = total + (u_coth(inner, order) * (weight * shares)).sum(-1)
    return total
