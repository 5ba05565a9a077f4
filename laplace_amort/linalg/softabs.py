r"""The matrix function behind the SoftAbs repair: :math:`f(A) = Q\, f(\Lambda)\, Q^\top` with stable derivatives.

``torch.linalg.eigh`` has infinite or NaN derivatives where eigenvalues coincide, although :math:`f(A)` is smooth there.
Its derivatives of every order need divided differences only (Daleckii & Krein), which are finite everywhere:

.. math::

    D^m f(A)[E_1, \dots, E_m] = Q \Big( \sum_{\pi} \sum_{k_1 \dots k_{m-1}}
    f[\lambda_i, \lambda_{k_1}, \dots, \lambda_{k_{m-1}}, \lambda_j]\,
    (\tilde E_{\pi_1})_{i k_1} \cdots (\tilde E_{\pi_m})_{k_{m-1} j} \Big) Q^\top, \qquad \tilde E = Q^\top E Q,

summed over the permutations :math:`\pi` of the directions. The form :math:`\operatorname{tr}(G\, D^m f(A)[E_1, \dots])`
is symmetric in :math:`G` and the directions, so that one Function is the backward of itself.

Here :math:`f(\lambda) = \lambda \coth(\lambda / c)` with a floor :math:`c > 0`, written as :math:`c\, g(\lambda / c)`
with :math:`g(u) = u \coth u`.

References:

[1] Higham (2008), *Functions of Matrices*, theorem 3.11 (Daleckii & Krein), equation 3.13.
[2] Betancourt (2013), *A General Metric for Riemannian Manifold Hamiltonian Monte Carlo*, equation 12 (SoftAbs),
    https://arxiv.org/abs/1212.4693
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd import Function

from laplace_amort.linalg import symmetric
from laplace_amort.linalg.divided_differences import divided_differences, positions, u_coth
from laplace_amort.linalg.repair import Change, FlooredRepair

__all__ = ["SoftAbs", "softabs", "softabs_matrix"]


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
        return u_coth(u, order)

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
            result = (eigenvectors * (floor * u_coth(eigenvalues / floor, 0)).unsqueeze(-2)) @ eigenvectors.mT
            return result / 2 + result.mT / 2  # exactly symmetric; halves first, as a sum may be infinite
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
    """The sum over permutations, in the basis of eigenvectors; ``scaled`` are the eigenvalues over the floor.

    One axis for each index. Of one direction, in two dimensions::

        g[i, j] E[i, j]                              axes i, j
            = [[g'(0) E[0, 0],  g[0, 1] E[0, 1]],
               [g[0, 1] E[1, 0],  g'(1) E[1, 1]]]

    and of two, of which E lies along the first two axes, F along the last two, and the middle one is summed over::

        sum_k g[i, k, j] (E[i, k] F[k, j] + F[i, k] E[k, j])             axes i, k, j
    """
    order, n = len(directions), scaled.shape[-1]

    def factor(direction: Tensor, i: int) -> Tensor:  # written out: batched reverse passes have no rule for einsum
        shape = [n if axis in (i, i + 1) else 1 for axis in range(order + 1)]
        return direction.reshape(*direction.shape[:-2], *shape)

    products = [
        math.prod((factor(e, i) for i, e in enumerate(permuted[1:], start=1)), start=factor(permuted[0], 0))
        for permuted in itertools.permutations(directions)
    ]
    differences = divided_differences(scaled, order)[..., positions(n, order, scaled.device)]
    total = differences * sum(products[1:], start=products[0]) / floor ** (order - 1)
    return total.sum(dim=tuple(range(-order, -1))) if order > 1 else total


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
