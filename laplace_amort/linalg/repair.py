"""Repairs of matrices that should be positive definite: each returns the matrix and says how much it moved.

Away from a mode the observed information is often indefinite. A repair must be smooth, must leave a well-conditioned
matrix alone, must report what it did, and must refuse past a bound: one that works hard hides a bug or a bad model.

What is small depends on the unit of each coordinate, so repairs take a ``scale``, a reference precision of every
coordinate, and work on :math:`D^{-1/2} M D^{-1/2}` with :math:`D` = diag(scale). Floors are shares of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from laplace_amort.errors import NotPositiveDefiniteError
from laplace_amort.linalg import symmetric

__all__ = [
    "Change",
    "FlooredRepair",
    "NoRepair",
    "Repair",
    "RepairReport",
]

# A matrix counts as repaired when its precision in some direction moved by more than this share.
NOTICEABLE = 1e-3
# From this many floors on, SoftAbs and its derivatives are the identity to rounding error: 40 exp(-40) < 2e-16.
_UNTOUCHED = 20

Self = TypeVar("Self")


@dataclass(frozen=True)
class RepairReport:
    """What a repair did to a batch of matrices; plain numbers, without a graph.

    Prints as one line. Do not read a small change as a good fit: a repair sees the matrix only, not the posterior. All
    of it is in units of the ``scale`` that the repair was given.

    :param float smallest_before: smallest eigenvalue in the batch before the repair. If nothing came near to needing
        repair, that of the matrix nearest to it by its pivots: exact for a single matrix and for 1x1 matrices, and
        otherwise a value that occurs, so that no decomposition of the whole batch is called for.
    :param float smallest_after: the same after it.
    :param float relative_change: largest ``norm(after - before) / norm(after)`` in the batch (Frobenius): 0 for a
        matrix left alone, 1 for one that was zero, 2 for one that was negative throughout.
    :param int num_repaired: matrices moved by more than 0.1 % in some direction.
    :param int num_matrices: matrices in the batch.
    :param tuple worst: index of the matrix with the largest change, ``()`` for a single matrix or if none was changed.

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


@runtime_checkable
class Repair(Protocol):
    """What turns matrices that should be positive definite into ones that are; any object with these two methods."""

    def prepare(self: Self, size: int, like: Tensor) -> Self:
        """Return a repair for matrices of one size: itself if it has no parameters, else a copy with new ones.

        :param int size: ``n`` of the matrices ``(*, n, n)`` to come.
        :param Tensor like: has the dtype and device of the parameters.
        """

    def __call__(self, matrix: Tensor, scale: Tensor | None = None) -> tuple[Tensor, RepairReport]:
        """Return repaired matrices and a report.

        :param Tensor matrix: symmetric, ``(*, n, n)``.
        :param Tensor scale: positive reference precision of each coordinate, ``(*, n)`` or ``(n,)``; ones by default.
        """


class Change(NamedTuple):
    """What happened to each of the matrices that were examined, ``(T,)`` all; eigenvalues are the smallest ones."""

    before: Tensor
    after: Tensor
    relative: Tensor
    noticeable: Tensor

    @staticmethod
    def of_spectrum(before: Tensor, after: Tensor) -> Change:
        """Compare eigenvalues ``(T, n)`` in a common basis."""
        size = after.amax(dim=-1, keepdim=True)  # first to the order of 1: squares of large numbers are infinite
        relative = ((after - before) / size).norm(dim=-1) / (after / size).norm(dim=-1)
        noticeable = ((after - before) > NOTICEABLE * after).any(dim=-1)
        return Change(before.amin(dim=-1), after.amin(dim=-1), relative, noticeable)


@dataclass(frozen=True)
class FlooredRepair(ABC):
    """Base of the repairs that leave alone whatever is 20 floors away from indefinite, and bound the change.

    A subclass repairs the others, in units of the scale, by a function that is the identity from there on to rounding
    error. So value and derivatives have no step between a matrix that is repaired and one that is not.
    """

    floor: float = 1e-3
    max_relative_change: float = 2.0

    def __post_init__(self) -> None:
        if not (self.floor > 0 and math.isfinite(self.floor)):
            raise ValueError(f"floor must be a positive share of the scale, got {self.floor}; the default is 1e-3")
        if not self.max_relative_change >= 0:
            raise ValueError(f"max_relative_change must not be negative, got {self.max_relative_change}")

    def prepare(self: Self, size: int, like: Tensor) -> Self:
        """Return itself: there are no parameters."""
        return self

    def leaves(self, matrix: Tensor, scale: Tensor | None = None) -> bool:
        """Tell whether exactly symmetric matrices ``(*, n, n)`` would be left alone, without a report."""
        return torch.equal(matrix, matrix.mT) and symmetric.screen(matrix, scale, _UNTOUCHED * self.floor)[0] is None

    def __call__(self, matrix: Tensor, scale: Tensor | None = None) -> tuple[Tensor, RepairReport]:
        """Repair ``matrix``, ``(*, n, n)``, in units of ``scale``, ``(*, n)`` or ``(n,)``; return it and a report."""
        matrix = symmetric.symmetric_part(matrix)
        needed, nearest = symmetric.screen(matrix, scale, _UNTOUCHED * self.floor)
        if needed is None:
            return matrix, _report_of_none(matrix, scale, nearest)
        some, unit = symmetric.select(matrix, scale, needed)
        repaired, change = self._repair(some if unit is None else some / unit)
        report = _report(change, needed, matrix.shape[:-2])
        self._check_bound(report, matrix.dtype)
        return symmetric.put(matrix, needed, repaired if unit is None else repaired * unit), report

    @abstractmethod
    def _repair(self, matrix: Tensor) -> tuple[Tensor, Change]:
        """Repair symmetric matrices ``(T, n, n)`` of unit scale, and say what happened to each."""

    def _check_bound(self, report: RepairReport, dtype: torch.dtype) -> None:
        # A negative number moves by twice its size, give or take a rounding error: no reason to refuse.
        if report.relative_change <= self.max_relative_change + 64 * torch.finfo(dtype).eps:
            return
        where = f" {list(report.worst)}" if report.worst else ""
        raise NotPositiveDefiniteError(
            f"matrix{where} is too far from positive definite: {report}, bound {self.max_relative_change:g}. Has "
            "the information the wrong sign (it is the NEGATIVE Hessian of the log joint)? Is this point far from "
            "the mode, so that the fit should start elsewhere? To allow it all the same:\n"
            f"    {type(self).__name__}(max_relative_change=2)"
        )


@dataclass(frozen=True)
class NoRepair:
    """Return matrices as they are, and raise if one is not positive definite.

    Do not use it to start a fit far from the mode: the observed information is often indefinite there. It is for
    models whose information cannot be, so that anything else is an error.

    Calling it takes what :class:`SoftAbs` takes; the scale is what the report's eigenvalues are measured by. It raises
    :class:`~laplace_amort.NotPositiveDefiniteError` with the index and eigenvalue of the worst matrix.

    Example::

        >>> import torch
        >>> print(NoRepair()(torch.eye(2).expand(3, 2, 2))[1])
        repaired 0 of 3 matrices; smallest eigenvalue 1 -> 1; largest relative change 0
    """

    def prepare(self: Self, size: int, like: Tensor) -> Self:
        """Return itself: there are no parameters."""
        return self

    def __call__(self, matrix: Tensor, scale: Tensor | None = None) -> tuple[Tensor, RepairReport]:
        """Return ``matrix``, ``(*, n, n)``, and a report."""
        matrix = symmetric.symmetric_part(matrix)
        failed, nearest = symmetric.screen(matrix, scale, 0.0)
        if failed is None:
            return matrix, _report_of_none(matrix, scale, nearest)
        some, unit = symmetric.select(matrix.detach(), None if scale is None else scale.detach(), failed)
        smallest = symmetric.eigh(some if unit is None else some / unit)[0][:, 0]
        worst = symmetric.unravel(failed[smallest.argmin()], matrix.shape[:-2])
        raise NotPositiveDefiniteError(
            f"matrix{f' {list(worst)}' if worst else ''} is not positive definite: its smallest eigenvalue is "
            f"{float(smallest.min()):.4g} ({len(failed)} of {matrix.shape[:-2].numel()} are not). Is this point far "
            "from the mode, so that the fit should start elsewhere? To repair such matrices, smoothly:\n"
            "    SoftAbs()"
        )


def _report(change: Change, index: Tensor, batch: torch.Size) -> RepairReport:
    worst = int(change.relative.argmax())
    return RepairReport(
        smallest_before=float(change.before.min()),
        smallest_after=float(change.after.min()),
        relative_change=float(change.relative[worst]),
        num_repaired=int(change.noticeable.sum()),
        num_matrices=batch.numel(),
        worst=symmetric.unravel(index[worst], batch),
    )


@torch.no_grad()
def _report_of_none(matrix: Tensor, scale: Tensor | None, nearest: Tensor | None) -> RepairReport:
    smallest, batch = math.inf, matrix.shape[:-2]
    if nearest is not None:
        some, unit = symmetric.select(matrix, scale, nearest.reshape(1))
        unscaled = some if unit is None else some / unit
        smallest = float(unscaled if unscaled.shape[-1] == 1 else torch.linalg.eigvalsh(unscaled).min())
    return RepairReport(smallest, smallest, 0.0, 0, batch.numel())
