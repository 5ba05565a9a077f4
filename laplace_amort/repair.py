"""Repairs of matrices that should be positive definite: each returns the matrix and says how much it moved.

Away from a mode the observed information is often indefinite. A repair must be smooth, must leave a well-conditioned
matrix alone, must report what it did, and must refuse past a bound: one that works hard hides a bug or a bad model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_amort.errors import NotPositiveDefiniteError
from laplace_amort.softabs import softabs, softabs_matrix

__all__ = ["RepairReport", "SoftAbs"]

# A matrix counts as repaired when its precision in some direction moved by more than this share.
_NOTICEABLE = 1e-3
# From this many floors on, SoftAbs and its derivatives are the identity to rounding error: 40 exp(-40) < 2e-16.
_UNTOUCHED = 20


@dataclass(frozen=True)
class RepairReport:
    """What a repair did to a batch of matrices; plain numbers, without a graph.

    Prints as one line. Do not read a small change as a good fit: a repair sees the matrix only, not the posterior.

    :param float smallest_before: smallest eigenvalue in the batch before the repair.
    :param float smallest_after: smallest eigenvalue in the batch after it.
    :param float relative_change: largest ``norm(after - before) / norm(after)`` in the batch (Frobenius): 0 for a
        matrix left alone, 1 for one that was zero, 2 for one that was negative throughout.
    :param int num_repaired: matrices moved by more than 0.1 % in some direction.
    :param int num_matrices: matrices in the batch.
    :param tuple worst: index of the matrix with the largest change, ``()`` for a single matrix.

    Example::

        >>> print(RepairReport(-1.0, 1.0, 0.5, 1, 3, (2,)))
        repaired 1 of 3 matrices; smallest eigenvalue -1 -> 1; largest relative change 0.5 (at [2])
    """

    smallest_before: float
    smallest_after: float
    relative_change: float
    num_repaired: int
    num_matrices: int
    worst: tuple[int, ...] = ()

    def __str__(self) -> str:
        where = f" (at {list(self.worst)})" if self.worst else ""
        return (
            f"repaired {self.num_repaired} of {self.num_matrices} "
            f"{'matrix' if self.num_matrices == 1 else 'matrices'}; smallest eigenvalue {self.smallest_before:.4g} -> "
            f"{self.smallest_after:.4g}; largest relative change {self.relative_change:.4g}{where}"
        )


@dataclass(frozen=True)
class SoftAbs:
    r"""Replace every eigenvalue :math:`\lambda` by :math:`\lambda\coth(\lambda / c)`, a smooth absolute value.

    Eigenvalues well above the floor :math:`c` stay as they are (by a relative :math:`2 e^{-2\lambda/c}`), negative ones
    change sign, and none falls below :math:`c`. Values, first and second derivatives are exact at repeated
    eigenvalues too.

    Do not use it to hide a matrix that is indefinite *at the optimum*: read the report. The floor is a precision in
    unconstrained coordinates, so no direction gets a standard deviation above ``1 / sqrt(floor)``; where a prior is
    vaguer than that (10 by default), lower it. And raise it where a fit stays stuck with a negative eigenvalue: on its
    way to positive it has to pass zero, where the draws of the guide are that wide and the ELBO is low.

    :param float floor: smallest eigenvalue that can result; positive.
    :param float max_relative_change: bound on the report's ``relative_change``, between 0 and 2. The default refuses
        only a matrix that is negative almost throughout, the mark of a wrong sign.
    :raises ValueError: if the floor is not positive or the bound is negative.

    Calling it takes symmetric matrices of shape ``(*, n, n)`` and returns ``(repaired, report)``; it raises
    :class:`~laplace_amort.errors.NotPositiveDefiniteError` past the bound, or if an element is not finite.

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

    floor: float = 1e-2
    max_relative_change: float = 1.9

    def __post_init__(self) -> None:
        if not (self.floor > 0 and math.isfinite(self.floor)):
            raise ValueError(f"floor must be a positive precision, got {self.floor}; the default is 1e-2")
        if not self.max_relative_change >= 0:
            raise ValueError(f"max_relative_change must not be negative, got {self.max_relative_change}")

    def __call__(self, matrix: Tensor) -> tuple[Tensor, RepairReport]:
        """Repair ``matrix`` of shape ``(*, n, n)``."""
        matrix = _checked_symmetric(matrix)
        eigenvalues, eigenvectors = torch.linalg.eigh(matrix.detach())
        report = _report(eigenvalues, softabs(eigenvalues, self.floor))
        if report.smallest_before >= _UNTOUCHED * self.floor:
            return matrix, report
        repaired = softabs_matrix(matrix, eigenvalues, eigenvectors, self.floor)
        if report.relative_change > self.max_relative_change:
            where = f" {list(report.worst)}" if report.worst else ""
            raise NotPositiveDefiniteError(
                f"matrix{where} is too far from positive definite: {report}, bound {self.max_relative_change:g}. Has "
                "the information the wrong sign (it is the NEGATIVE Hessian of the log joint)? Is this point far from "
                "the mode, so that the fit should start elsewhere? To allow it all the same:\n"
                "    SoftAbs(max_relative_change=2)"
            )
        return repaired, report


def _checked_symmetric(matrix: Tensor) -> Tensor:
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"expected square matrices of shape (*, n, n), got {tuple(matrix.shape)}")
    finite = torch.isfinite(matrix)
    if not finite.all():
        index = [int(i) for i in (~finite).nonzero()[0]]
        raise NotPositiveDefiniteError(f"the matrix is {matrix[tuple(index)].item()} at index {index}")
    defect = (matrix - matrix.mT).abs()
    if (defect > 1e-3 * matrix.abs().amax(dim=(-2, -1), keepdim=True)).any() if matrix.numel() else False:
        raise ValueError(
            f"the matrix is not symmetric: it differs from its transpose by {float(defect.max()):.3g}; a precision "
            "matrix is symmetric, so look at how it was assembled"
        )
    return (matrix + matrix.mT) / 2


def _report(before: Tensor, after: Tensor) -> RepairReport:
    if before.numel() == 0:
        return RepairReport(math.inf, math.inf, 0.0, 0, before.shape[:-1].numel())
    change = ((after - before).norm(dim=-1) / after.norm(dim=-1)).reshape(-1)
    moved = ((after - before) > _NOTICEABLE * after).any(dim=-1)
    worst = torch.unravel_index(change.argmax(), before.shape[:-1]) if before.dim() > 1 else ()
    return RepairReport(
        smallest_before=float(before.min()),
        smallest_after=float(after.min()),
        relative_change=float(change.max()),
        num_repaired=int(moved.sum()),
        num_matrices=change.numel(),
        worst=tuple(int(i) for i in worst),
    )
