r"""Repair of the two kinds of blocks in an arrowhead: against what each is measured.

A repair has a floor, and a floor has a unit. Of a matrix alone one cannot tell a direction of small precision from one
of none, so each kind of block is held against what is known to be a precision of its coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from laplace_amort.linalg import blocks
from laplace_amort.linalg.softabs import SoftAbs

__all__ = ["RepairFunction", "repair_head", "repair_tails"]

RepairFunction = Callable[..., tuple[Tensor, Any]]
"""Called with matrices and, optionally, a scale; such as any prepared ``Repair``."""

# Of a unit's own precision, and of what is typical of all: small, because a unit without data beside units with
# thousands, or two coordinates that the data hardly tell apart, are no reason for a repair.
_SHARE = 1e-2


def repair_tails(repair: RepairFunction, tail: Tensor) -> tuple[Tensor, Any]:
    r"""Repair the units that need it, each in units of 1 % of its own diagonal.

    :math:`s_{ij} = c \sqrt{U_{ijj}^2 + c^2 \overline{U_{jj}^2}}` with c = 0.01 and the mean over the units: where the
    diagonal of a unit is near zero, 1 % of what is typical of the others takes its place.

    :param repair: of matrices ``(N, k, k)``, prepared.
    :param Tensor tail: ``(N, k, k)``.
    :return: the repaired tails, and a report in units of that scale.

    Example: a unit that says little stays as it is beside one that says much, and one that is negative does not::

        >>> import torch
        >>> repaired, report = repair_tails(SoftAbs(), torch.tensor([1., 1e6, -2.]).reshape(3, 1, 1))
        >>> repaired.flatten(), report.num_repaired
        (tensor([1.0000e+00, 1.0000e+06, 2.0000e+00]), 1)
    """
    if torch.is_grad_enabled():
        with torch.no_grad():  # by far the usual case is that there is nothing to do, and no need for a graph
            values = tail.detach()
            repaired, report = repair_tails(repair, values)
        if repaired is values:
            return tail, report
    diagonal = tail.diagonal(dim1=-2, dim2=-1)
    # Squares of large numbers are infinite: first to the order of 1.
    unit = diagonal.detach().abs().sum(-2, keepdim=True).clamp(min=1)
    squares = ((diagonal / unit) ** 2).mean(-2, keepdim=True) + torch.finfo(tail.dtype).eps / unit**2
    return repair(tail, _SHARE * torch.hypot(diagonal, _SHARE * unit * squares.sqrt()))


def repair_head(repair: RepairFunction, schur_complement: Tensor, head: Tensor) -> tuple[Tensor, Any]:
    r"""Repair the precision of the globals in units of their precision given all units.

    With :math:`G = L L^\top` it works on :math:`L^{-1} S L^{-\top}`, whose eigenvalues are the shares of the complete
    information that are left when the units are unknown. They do not depend on the coordinates of the globals: two
    covariates that are nearly collinear make S ill-conditioned, and leave these shares as they are.

    :param repair: of matrices ``(d, d)``, prepared.
    :param Tensor schur_complement: :math:`S`, ``(d, d)``.
    :param Tensor head: :math:`G`, ``(d, d)``; where it is indefinite, its absolute eigenvalues are taken.
    :return: the repaired matrix, and a report of shares.

    Example: what is nearly collinear but positive definite stays as it is::

        >>> import torch
        >>> head = torch.tensor([[1., 1.], [1., 1.0001]], dtype=torch.float64)
        >>> repaired, report = repair_head(SoftAbs(), head / 2, head)
        >>> torch.equal(repaired, head / 2), round(report.smallest_before, 6)
        (True, 0.5)
    """
    if not len(head):
        return repair(schur_complement)
    if torch.is_grad_enabled():
        with torch.no_grad():
            values = schur_complement.detach()
            repaired, report = repair_head(repair, values, head.detach())
        if repaired is values:
            return schur_complement, report
    # The reference is itself a Hessian block, which away from the mode may be indefinite.
    as_definite = SoftAbs(floor=torch.finfo(head.dtype).eps ** (2 / 3))
    scale = torch.hypot(head.diagonal(), torch.ones_like(head.diagonal()))
    reference = head if as_definite.leaves(head, scale) else as_definite(head, scale)[0]
    factor, _ = blocks.cholesky(reference)
    half = torch.linalg.solve_triangular(factor, schur_complement, upper=False)
    shares = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    shares = (shares + shares.mT) / 2
    repaired, report = repair(shares)
    if repaired is shares:  # nothing to do: no reason for rounding errors either
        return schur_complement, report
    result = factor @ repaired @ factor.mT
    return (result + result.mT) / 2, report  # or rounding errors make it asymmetric
