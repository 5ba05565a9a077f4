"""Batches of symmetric matrices: which of them are near indefinite, how to take those out, and how to put them back.

In a large batch most matrices are in order, and finding that out must cost less than one factorization of it: small
blocks are screened by their pivots alone, and only those that fail are looked at further.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_amort.errors import NotPositiveDefiniteError

__all__ = ["eigh", "put", "screen", "select", "symmetric_part", "unravel"]

# Blocks up to this size are unrolled: batched LAPACK on CPU goes matrix by matrix.
_UNROLLED = 3


def symmetric_part(matrix: Tensor) -> Tensor:
    """Return the symmetric part; of matrices that are exactly symmetric, themselves, at a fraction of the cost.

    :param Tensor matrix: ``(*, n, n)``.
    :return: ``(*, n, n)``.
    :raises ValueError: if the matrices are not square, or differ from their transposes by more than 0.1 %.
    :raises NotPositiveDefiniteError: if an element that has no equal across the diagonal is not finite.

    Example::

        >>> import torch
        >>> symmetric_part(torch.tensor([[1., 1.5], [1.5001, 4.]]))
        tensor([[1.0000, 1.5001],
                [1.5001, 4.0000]])
    """
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"expected square matrices of shape (*, n, n), got {tuple(matrix.shape)}")
    n, values = matrix.shape[-1], matrix.detach()
    if n > _UNROLLED:
        exact = torch.equal(values, values.mT)
    else:  # element by element: the transpose of a batch is a slow walk through memory
        exact = all(torch.equal(values[..., i, j], values[..., j, i]) for i in range(n) for j in range(i))
    if exact:
        return matrix
    _check_finite(values)
    defect = (values - values.mT).abs()
    size = values.abs().amax(dim=(-2, -1), keepdim=True)
    if (defect > 1e-3 * size + torch.finfo(values.dtype).tiny).any():  # below tiny all digits are lost
        raise ValueError(
            f"the matrix is not symmetric: it differs from its transpose by {float(defect.max()):.3g}; a precision "
            "matrix is symmetric, so look at how it was assembled"
        )
    return (matrix + matrix.mT) / 2


@torch.no_grad()
def screen(matrix: Tensor, scale: Tensor | None, shift: float) -> tuple[Tensor | None, Tensor | None]:
    r"""Find the matrices whose smallest eigenvalue, in units of the scale, is not above a shift.

    It is above exactly if Cholesky's elimination of :math:`M - \text{shift} \cdot D` has positive pivots only, with
    :math:`D` = diag(scale), for that is congruent to :math:`D^{-1/2} M D^{-1/2} - \text{shift}`.

    :param Tensor matrix: symmetric, ``(*, n, n)``.
    :param Tensor scale: ``(*, n)`` or ``(n,)``, or None for ones.
    :param float shift: any number.
    :return: their flat indices in the batch, ``(T,)``, or None if there are none; and then the flat index of the matrix
        with the smallest pivot, ``()``, or None if all is empty.
    :raises ValueError: if the scale has another shape, or is not positive and finite.
    :raises TypeError: if the scale has another dtype or device.
    :raises NotPositiveDefiniteError: if a matrix is not finite.

    Example::

        >>> import torch
        >>> screen(torch.tensor([2., 0., 3., -1.]).reshape(4, 1, 1), scale=None, shift=0.)
        (tensor([1, 3]), None)
        >>> screen(torch.tensor([2., 1., 3.]).reshape(3, 1, 1), scale=None, shift=0.)
        (None, tensor(1))
    """
    n = matrix.shape[-1]
    _check_scale(scale, matrix)
    if matrix.numel() == 0:
        return None, None
    unit = matrix.new_ones(n) if scale is None else scale
    pivots = [pivot / unit[..., j] for j, pivot in enumerate(_pivots(matrix, shift * unit))]
    lows, highs = zip(*(map(float, torch.aminmax(pivot)) for pivot in pivots), strict=True)
    if not all(low > 0 and high < math.inf for low, high in zip(lows, highs, strict=True)):  # or NaN
        _check_finite(matrix)
        above = torch.stack([(pivot > 0).reshape(-1) for pivot in pivots]).all(dim=0)
        if not above.all():
            return (~above).nonzero().squeeze(-1), None
    return None, pivots[lows.index(min(lows))].argmin()


def select(matrix: Tensor, scale: Tensor | None, index: Tensor) -> tuple[Tensor, Tensor | None]:
    r"""Return matrices at flat indices and what their elements are to be divided by, for a scale of one.

    :param Tensor matrix: ``(*, n, n)``.
    :param Tensor scale: ``(*, n)`` or ``(n,)``, or None for ones.
    :param Tensor index: ``(T,)``.
    :return: matrices ``(T, n, n)``; and :math:`\sqrt{s_i s_j}`, ``(T, n, n)`` or ``(n, n)``, or None without a scale.
    """
    some, root = _take(matrix, index, 2), None
    if scale is not None:
        root = (_take(scale, index, 1) if scale.dim() > 1 else scale).sqrt()
    return some, None if root is None else root.unsqueeze(-1) * root.unsqueeze(-2)


def put(matrix: Tensor, index: Tensor, replacement: Tensor) -> Tensor:
    """Return the matrices ``(*, n, n)`` with those at flat indices ``(T,)`` replaced by others, ``(T, n, n)``."""
    if len(index) == matrix.shape[:-2].numel():
        return replacement.reshape(matrix.shape)
    flat = matrix.reshape(-1, *matrix.shape[-2:])
    return flat.index_copy(0, index, replacement).reshape(matrix.shape)


def unravel(index: Tensor, batch: torch.Size) -> tuple[int, ...]:
    """Return a flat index ``()`` as one index for each batch dimension."""
    return tuple(int(i) for i in torch.unravel_index(index, batch)) if batch else ()


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues in ascending order and eigenvectors of symmetric matrices; one Jacobi rotation for 2x2.

    Do not differentiate it: the derivatives of eigenvectors are infinite at repeated eigenvalues.

    :param Tensor matrix: symmetric, ``(*, n, n)``.
    :return: ``(*, n)`` and, in columns, ``(*, n, n)``.
    """
    if matrix.shape[-1] != 2:
        return torch.linalg.eigh(matrix)
    first, second, coupling = matrix[..., 0, 0], matrix[..., 1, 1], matrix[..., 1, 0]
    # Halves first: the sum of two large numbers may be infinite.
    mean, half_gap = first / 2 + second / 2, first / 2 - second / 2
    radius, angle = torch.hypot(half_gap, coupling), torch.atan2(coupling, half_gap) / 2
    cos, sin = torch.cos(angle), torch.sin(angle)
    eigenvectors = torch.stack([-sin, cos, cos, sin], dim=-1).reshape(matrix.shape)
    return torch.stack([mean - radius, mean + radius], dim=-1), eigenvectors


def _take(tensor: Tensor, index: Tensor, event_dims: int) -> Tensor:
    """Members of a batch at flat indices, all in order if there are as many."""
    flat = tensor.reshape(-1, *tensor.shape[-event_dims:])
    return flat if len(index) == len(flat) else flat.index_select(0, index)


def _pivots(matrix: Tensor, shift: Tensor) -> Sequence[Tensor]:
    """Pivots ``(*,)`` of Cholesky's elimination, with ``shift (*, n)`` taken off the diagonal.

    All are positive and finite exactly if what is left is positive definite and finite.
    """
    n = matrix.shape[-1]
    if n > _UNROLLED:
        factor, info = torch.linalg.cholesky_ex(matrix - torch.diag_embed(shift))
        valid = info.unsqueeze(-1) == 0
        return torch.where(valid, factor.diagonal(dim1=-2, dim2=-1) ** 2, math.nan).unbind(-1)
    pivots, rest = [], matrix
    for j in range(n):
        pivot, column = rest[..., 0, 0] - shift[..., j], rest[..., 1:, 0]
        pivots.append(pivot)
        products = column.unsqueeze(-1) * column.unsqueeze(-2)
        rest = rest[..., 1:, 1:] - products / pivot[..., None, None]
    return pivots


def _check_finite(matrix: Tensor) -> None:
    finite = torch.isfinite(matrix)
    if not finite.all():
        index = [int(i) for i in (~finite).nonzero()[0]]
        raise NotPositiveDefiniteError(f"the matrix is {matrix[tuple(index)].item()} at index {index}")


def _check_scale(scale: Tensor | None, matrix: Tensor) -> None:
    if scale is None:
        return
    if scale.shape not in (matrix.shape[:-1], matrix.shape[-1:]):
        raise ValueError(
            f"scale has shape {tuple(scale.shape)}; for matrices {tuple(matrix.shape)} it must be "
            f"{tuple(matrix.shape[:-1])} or {tuple(matrix.shape[-1:])}"
        )
    if scale.dtype != matrix.dtype or scale.device != matrix.device:
        raise TypeError(
            f"scale is {scale.dtype} on {scale.device}, but the matrices are {matrix.dtype} on {matrix.device}; "
            "convert it: scale.to(matrix)"
        )
    valid = (scale > 0) & (scale < math.inf)
    if not valid.all():
        index = [int(i) for i in (~valid).nonzero()[0]]
        raise ValueError(
            f"scale is {scale[tuple(index)].item()} at index {index}; it is a precision that must be positive, such as "
            "the root mean square of the diagonals"
        )
