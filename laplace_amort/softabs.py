r"""The matrix function behind the SoftAbs repair: :math:`f(A) = Q\, f(\Lambda)\, Q^\top` with stable derivatives.

``torch.linalg.eigh`` has infinite or NaN derivatives where eigenvalues coincide, although :math:`f(A)` is smooth there.
Its first and second derivatives need divided differences only (Daleckii & Krein), which are finite everywhere:

.. math::

    Df(A)[E] = Q \big( f[\lambda_i, \lambda_j] \circ \tilde E \big) Q^\top, \qquad
    D^2f(A)[E, H] = Q \Big( \sum_k f[\lambda_i, \lambda_k, \lambda_j]
        (\tilde E_{ik} \tilde H_{kj} + \tilde H_{ik} \tilde E_{kj}) \Big) Q^\top, \qquad \tilde E = Q^\top E Q.

Here :math:`f(\lambda) = \lambda \coth(\lambda / c)` with a floor :math:`c > 0`, written as :math:`c\, g(\lambda / c)`.

References:

[1] Higham (2008), *Functions of Matrices*, theorem 3.11 (Daleckii & Krein), equation 3.13.
[2] Betancourt (2013), *A General Metric for Riemannian Manifold Hamiltonian Monte Carlo*, equation 12 (SoftAbs),
    https://arxiv.org/abs/1212.4693
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

__all__ = ["softabs", "softabs_matrix"]

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

    :param Tensor values: any shape.
    :param float floor: the value at 0, in the unit of ``values``; positive.
    :return: the shape of ``values``.

    Example::

        >>> import torch
        >>> softabs(torch.tensor([-3., 0., 3.]), floor=0.1)
        tensor([3.0000, 0.1000, 3.0000])
    """
    return floor * _g(values / floor, 0)


def softabs_matrix(matrix: Tensor, eigenvalues: Tensor, eigenvectors: Tensor, floor: float) -> Tensor:
    r"""Apply :func:`softabs` to the eigenvalues of symmetric matrices; twice differentiable in ``matrix``.

    :param Tensor matrix: symmetric, ``(*, n, n)``; gradients flow to it.
    :param Tensor eigenvalues: of the matrix, ``(*, n)``, without a graph.
    :param Tensor eigenvectors: in columns, ``(*, n, n)``, without a graph.
    :param float floor: the smallest eigenvalue that can result.
    :return: ``(*, n, n)``, symmetric.
    """
    return _MatrixFunction.apply(matrix, eigenvalues, eigenvectors, floor)


def _rotate(tensor: Tensor, eigenvectors: Tensor) -> Tensor:
    return eigenvectors.mT @ tensor @ eigenvectors


def _rotate_back(tensor: Tensor, eigenvectors: Tensor) -> Tensor:
    return eigenvectors @ tensor @ eigenvectors.mT


class _Derivative(Function):
    """Shared context of f and its derivatives: every input is kept, the last is the floor."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:-1])
        ctx.floor = inputs[-1]


class _MatrixFunction(_Derivative):
    """f(A)."""

    @staticmethod
    def forward(matrix: Tensor, eigenvalues: Tensor, eigenvectors: Tensor, floor: float) -> Tensor:
        return (eigenvectors * softabs(eigenvalues, floor).unsqueeze(-2)) @ eigenvectors.mT

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        matrix, eigenvalues, eigenvectors = ctx.saved_tensors
        grad = _FirstDerivative.apply(matrix, grad_outputs[0], eigenvalues, eigenvectors, ctx.floor)
        return grad, None, None, None


class _FirstDerivative(_Derivative):
    """Df(A)[E]; the Frechet derivative of a function of symmetric matrices is its own adjoint."""

    @staticmethod
    def forward(matrix: Tensor, direction: Tensor, eigenvalues: Tensor, eigenvectors: Tensor, floor: float) -> Tensor:
        scaled = eigenvalues / floor
        differences = _first_difference(scaled.unsqueeze(-1), scaled.unsqueeze(-2))
        return _rotate_back(differences * _rotate(direction, eigenvectors), eigenvectors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        matrix, direction, eigenvalues, eigenvectors = ctx.saved_tensors
        eigen = eigenvalues, eigenvectors, ctx.floor
        grad_matrix = _SecondDerivative.apply(matrix, direction, grad_outputs[0], *eigen)
        return grad_matrix, _FirstDerivative.apply(matrix, grad_outputs[0], *eigen), None, None, None


class _SecondDerivative(_Derivative):
    """D2f(A)[E, H], the end of the line."""

    @staticmethod
    def forward(
        matrix: Tensor, first: Tensor, second: Tensor, eigenvalues: Tensor, eigenvectors: Tensor, floor: float
    ) -> Tensor:
        scaled = eigenvalues / floor
        differences = _second_difference(
            scaled[..., :, None, None], scaled[..., None, :, None], scaled[..., None, None, :]
        )
        left, right = _rotate(first, eigenvectors), _rotate(second, eigenvectors)
        # Indices i, k, j; written out because batched reverse passes have no rule for einsum.
        products = left.unsqueeze(-1) * right.unsqueeze(-3) + right.unsqueeze(-1) * left.unsqueeze(-3)
        total = (differences * products).sum(-2)
        return _rotate_back(total / floor, eigenvectors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("SoftAbs is differentiable twice; its third derivative is not implemented")


def _first_difference(a: Tensor, b: Tensor) -> Tensor:
    """g[a, b], by subtraction where the two are apart, else as the mean of g' between them (Hermite-Genocchi)."""
    gap = a - b
    near = gap.abs() < _NEAR
    apart = (_g(a, 0) - _g(b, 0)) / torch.where(near, torch.ones_like(gap), gap)
    mean = torch.zeros_like(gap)
    for node, weight in _RULE:
        mean = mean + weight * _g(b + node * gap, 1)
    return torch.where(near, mean, apart)


def _second_difference(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """g[a, b, c]: the recursion over the widest pair, or the mean of g'' over the simplex where all are near."""
    low, middle, high = torch.stack(torch.broadcast_tensors(a, b, c)).sort(dim=0).values.unbind(0)
    gap = high - low
    near = gap < _NEAR
    apart = (_first_difference(high, middle) - _first_difference(middle, low)) / torch.where(
        near, torch.ones_like(gap), gap
    )
    mean = torch.zeros_like(gap)
    for t, outer in _RULE:
        for s, inner in _RULE:
            mean = mean + outer * inner * t * _g(low + t * (middle - low) + t * s * (high - middle), 2)
    return torch.where(near, mean, apart)


def _series_coefficients(terms: int) -> list[float]:
    """Taylor coefficients of u coth u in u**2: 2**(2n) B_2n / (2n)!, from the recursion of the Bernoulli numbers."""
    bernoulli: list[Fraction] = []
    for m in range(2 * terms):
        total = sum((math.comb(m + 1, k) * bernoulli[k] for k in range(m)), start=Fraction(0))
        bernoulli.append(Fraction(1) if m == 0 else -total / (m + 1))
    return [float(4**n * bernoulli[2 * n] / math.factorial(2 * n)) for n in range(terms)]


_SERIES = _series_coefficients(_SERIES_TERMS)


def _series(u: Tensor, order: int) -> Tensor:
    """The Taylor series of u coth u at 0, or of its first or second derivative; for abs(u) <= 1/2."""
    total = torch.zeros_like(u)
    for n in reversed(range(1 if order else 0, _SERIES_TERMS)):
        total = total * u**2 + _SERIES[n] * math.perm(2 * n, order)
    return total * u if order == 1 else total


def _g(u: Tensor, order: int) -> Tensor:
    """u coth u, or its first or second derivative; by series near zero, where the closed forms cancel."""
    small = u.abs() < 0.5
    away = torch.where(small, torch.ones_like(u), u)
    coth, sinh2 = 1 / torch.tanh(away), torch.sinh(away) ** 2
    closed = (away * coth, coth - away / sinh2, 2 * (away * coth - 1) / sinh2)[order]
    return torch.where(small, _series(torch.where(small, u, torch.zeros_like(u)), order), closed)
