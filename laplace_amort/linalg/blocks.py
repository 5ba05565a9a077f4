r"""Algebra of many small symmetric positive definite blocks: unrolled up to 3x3, by batched LAPACK beyond.

Batched LAPACK on CPU goes matrix by matrix, and the backward passes of a factorization are several such walks. So small
blocks are taken apart into their elements, each contiguous over the batch, and a formula is a few elementwise kernels.
What comes out keeps that layout in memory: blocks ``(*, k, k)`` are then a view of ``(k, k, *)``.

All of it is made of operations that torch differentiates to any order, forward and backward, and batches. Nothing
raises because of a value, and nothing warns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["cholesky", "cholesky_solve", "covariance_tril", "log_det", "matvec", "multiply", "scale_tril"]

# Sizes of blocks that are unrolled.
_UNROLLED = (1, 2, 3)

# Elements (*,) by row and column; of a triangular block only those of the triangle.
_Elements = list[list[Tensor]]


def cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    r"""Factor :math:`U = L L^\top` with a lower triangular :math:`L`.

    Do not use the factor without a look at ``failed``: where a block is not positive definite and finite, its factor is
    NaN or meaningless. For draws from a precision, :func:`scale_tril` is all that is needed.

    :param Tensor matrix: symmetric, ``(*, k, k)``; only the lower triangle is read.
    :return: the factor ``(*, k, k)``; and where it failed, bool, ``(*,)``.

    Example::

        >>> import torch
        >>> factor, failed = cholesky(torch.tensor([[[4., 2.], [2., 5.]], [[1., 2.], [2., 1.]]]))
        >>> factor[0], failed
        (tensor([[2., 0.],
                [1., 2.]]), tensor([False,  True]))
    """
    if matrix.shape[-1] not in _UNROLLED:
        factor, info = torch.linalg.cholesky_ex(matrix)
        return factor, _failed_in_lapack(factor, info)
    below, pivots, _ = _eliminate(_elements(matrix))
    rows = [[*row, pivot.sqrt()] for row, pivot in zip(below, pivots, strict=True)]
    return _assemble_lower(rows), _failed(pivots)


def scale_tril(precision: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the lower triangular :math:`T` with :math:`T T^\top = U^{-1}`, straight from the precision :math:`U`.

    It is all that a normal distribution needs, and by multiplication only: draws :math:`T \epsilon`, solutions
    :math:`T (T^\top b)`, and :math:`\log|U| = -2 \sum_j \log T_{jj}`. With the order of the coordinates reversed,
    :math:`U = L L^\top` and :math:`T = L^{-\top}`.

    Do not use it without a look at ``failed``, as with :func:`cholesky`.

    :param Tensor precision: symmetric, ``(*, k, k)``; only the lower triangle is read.
    :return: the scale ``(*, k, k)``; and where it failed, bool, ``(*,)``.

    Example::

        >>> import torch
        >>> scale, failed = scale_tril(torch.tensor([[5., 2.], [2., 4.]]))
        >>> scale
        tensor([[ 0.5000,  0.0000],
                [-0.2500,  0.5000]])
    """
    if precision.shape[-1] not in _UNROLLED:
        factor, info = torch.linalg.cholesky_ex(precision.mT.flip(-2, -1))
        identity = torch.eye(precision.shape[-1], dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
        return inverse.flip(-2, -1).mT, _failed_in_lapack(factor, info)
    reversed_ = [row[::-1] for row in reversed(_transposed(_elements(precision)))]
    elimination = _eliminate(reversed_)
    inverse_rows = _invert_lower(elimination)
    n = len(inverse_rows)
    rows = [[inverse_rows[n - 1 - j][n - 1 - i] for j in range(i + 1)] for i in range(n)]
    return _assemble_lower(rows), _failed(elimination.pivots)


def covariance_tril(factor: Tensor) -> Tensor:
    r"""Return the lower triangular :math:`T` with :math:`T T^\top = U^{-1}`, from the factor of :math:`U = L L^\top`.

    Where the matrix itself is at hand, :func:`scale_tril` is the shorter way.

    :param Tensor factor: ``(*, k, k)``, of :func:`cholesky`.
    :return: ``(*, k, k)``.

    Example::

        >>> import torch
        >>> covariance_tril(torch.tensor([[[4.]], [[0.5]]])).squeeze()
        tensor([0.2500, 2.0000])
    """
    return scale_tril(multiply(factor, factor.mT))[0]


def cholesky_solve(rhs: Tensor, factor: Tensor) -> Tensor:
    r"""Solve :math:`L L^\top x = b` by substitution.

    :param Tensor rhs: ``(*, k, m)``.
    :param Tensor factor: lower triangular, ``(*, k, k)``; the upper triangle is not read.
    :return: ``(*, k, m)``.

    Example::

        >>> import torch
        >>> cholesky_solve(torch.tensor([[8.], [9.]]), torch.tensor([[2., 0.], [1., 2.]])).squeeze()
        tensor([1.3750, 1.2500])
    """
    n = factor.shape[-1]
    if n not in _UNROLLED:
        half = torch.linalg.solve_triangular(factor, rhs, upper=False)
        return torch.linalg.solve_triangular(factor.mT, half, upper=True)
    rows = [[element.unsqueeze(-1) for element in row] for row in _elements(factor)]
    forward: list[Tensor] = []
    for i, b in enumerate(rhs.unbind(-2)):
        forward.append(_minus_dot(b, rows[i][:i], forward) / rows[i][i])
    solution: list[Tensor] = []  # from the last to the first
    for i in reversed(range(n)):
        column = [rows[j][i] for j in reversed(range(i + 1, n))]
        solution.append(_minus_dot(forward[i], column, solution) / rows[i][i])
    return torch.stack(solution[::-1]).movedim(0, -2)


def log_det(factor: Tensor) -> Tensor:
    r"""Return :math:`\log|L L^\top| = 2 \sum_j \log L_{jj}`.

    :param Tensor factor: triangular, ``(*, k, k)``.
    :return: ``(*,)``.

    Example::

        >>> import torch
        >>> log_det(torch.eye(2).expand(3, 2, 2) * 2)
        tensor([2.7726, 2.7726, 2.7726])
    """
    return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """Multiply matrices with vectors, or each with many; matrices are not copied for that.

    :param Tensor matrix: ``(*, m, n)``.
    :param Tensor vector: ``(*, n)``, after dimensions of samples.
    :return: ``(*, m)``, after the same.

    Example::

        >>> import torch
        >>> matvec(torch.tensor([[1., 2.], [0., 1.]]), torch.ones(3, 2))
        tensor([[3., 1.],
                [3., 1.],
                [3., 1.]])
    """
    m, n = matrix.shape[-2:]
    if matrix.dim() == 2:
        return vector @ matrix.mT
    if m == n == 1:
        return matrix.squeeze(-1) * vector
    if m == n and n in _UNROLLED:
        values = vector.unbind(-1)
        return torch.stack([_dot(row, values) for row in _elements(matrix)]).movedim(0, -1)
    samples = vector.shape[: vector.dim() - matrix.dim() + 1]
    rows = vector.reshape(samples.numel(), *vector.shape[len(samples) :]).movedim(0, -2)
    product = (rows @ matrix.mT).movedim(-2, 0)
    return product.reshape(*samples, *product.shape[1:])


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Multiply blocks with matrices; leading dimensions broadcast.

    :param Tensor left: ``(*, k, k)``.
    :param Tensor right: ``(*, k, m)``.
    :return: ``(*, k, m)``.

    Example::

        >>> import torch
        >>> multiply(torch.full((2, 1, 1), 3.), torch.ones(2, 1, 2))
        tensor([[[3., 3.]],
                [[3., 3.]]])
    """
    return left * right if left.shape[-1] == 1 else left @ right


class _Elimination(NamedTuple):
    """Cholesky's: elements of the factor below the diagonal, its diagonal squared, and the inverse of its diagonal."""

    below: _Elements
    pivots: list[Tensor]
    inverse_diagonal: list[Tensor]


def _eliminate(matrix: _Elements) -> _Elimination:
    """Take the elements of a symmetric block from its lower triangle."""
    below: _Elements = []
    pivots: list[Tensor] = []
    inverse_diagonal: list[Tensor] = []
    for i in range(len(matrix)):
        row: list[Tensor] = []
        for j in range(i):
            row.append(_minus_dot(matrix[i][j], row, below[j]) * inverse_diagonal[j])
        below.append(row)
        pivots.append(_minus_dot(matrix[i][i], row, row))
        inverse_diagonal.append(pivots[i].rsqrt())
    return _Elimination(below, pivots, inverse_diagonal)


def _invert_lower(factor: _Elimination) -> _Elements:
    """The rows of the inverse factor."""
    inverse: _Elements = []
    for i, (row, diagonal) in enumerate(zip(factor.below, factor.inverse_diagonal, strict=True)):
        sums = [_dot(row[j:], [inverse[m][j] for m in range(j, i)]) for j in range(i)]
        inverse.append([*(-total * diagonal for total in sums), diagonal])
    return inverse


def _elements(matrix: Tensor) -> _Elements:
    """Taken apart, contiguous over the batch."""
    n = matrix.shape[-1]
    if n == 1:
        return [[matrix.squeeze(-1).squeeze(-1)]]
    flat = matrix.movedim((-2, -1), (0, 1)).flatten(0, 1).contiguous().unbind(0)
    return [list(flat[i * n : (i + 1) * n]) for i in range(n)]


def _transposed(elements: _Elements) -> _Elements:
    return [list(row) for row in zip(*elements, strict=True)]


def _assemble_lower(rows: _Elements) -> Tensor:
    """Put together, with zeros above the diagonal."""
    n = len(rows)
    if n == 1:
        return rows[0][0].unsqueeze(-1).unsqueeze(-1)
    zero = torch.zeros_like(rows[0][0])
    flat = torch.stack([rows[i][j] if j <= i else zero for i in range(n) for j in range(n)])
    return flat.unflatten(0, (n, n)).movedim((0, 1), (-2, -1))


def _failed(pivots: Sequence[Tensor]) -> Tensor:
    """One that is not positive makes the last one NaN or negative; infinite ones are left to find."""
    values = [pivot.detach() for pivot in pivots]
    total = sum(values[1:], start=values[0])
    return ~((values[-1] > 0) & (total < torch.inf))


def _failed_in_lapack(factor: Tensor, info: Tensor) -> Tensor:
    return (info != 0) | ~torch.isfinite(factor.detach().diagonal(dim1=-2, dim2=-1)).all(-1)


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    total = left[0] * right[0]
    for x, y in zip(left[1:], right[1:], strict=True):
        total = torch.addcmul(total, x, y)
    return total


def _minus_dot(total: Tensor, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    for x, y in zip(left, right, strict=True):
        total = torch.addcmul(total, x, y, value=-1)
    return total
