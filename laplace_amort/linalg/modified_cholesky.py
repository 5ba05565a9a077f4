r"""The modified Cholesky repair of Gill, Murray and Wright, made smooth: :math:`A + E = L D L^\top` with diagonal E."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_amort.linalg.repair import NOTICEABLE, Change, FlooredRepair
from laplace_amort.linalg.softabs import softabs
from laplace_amort.linalg.symmetric import eigh

__all__ = ["ModifiedCholesky"]


@dataclass(frozen=True)
class ModifiedCholesky(FlooredRepair):
    r"""Raise the diagonal of a matrix just enough, pivot by pivot, for its Cholesky elimination to be stable.

    Column ``j`` of the elimination has a pivot :math:`c_{jj}` and below it :math:`c_{ij}`; the pivot is raised to

    .. math:: d_j = \max\nolimits_\delta\Big( |c_{jj}|_\delta,\ \sum_{i > j} c_{ij}^2 / \beta^2 \Big), \qquad
              \beta^2 = \sum_i |a_{ii}|_\delta + \Big( \delta^2 + \sum_{i \ne j} \frac{a_{ij}^2}{n^2 - 1} \Big)^{1/2},

    with the floor :math:`\delta`, the smooth absolute value :math:`|c|_\delta = c \coth(c / \delta)`, and the maximum
    :math:`\max_\delta(a, b) = (a + b + |a - b|_\delta) / 2`. These are smooth upper bounds of what Gill, Murray and
    Wright take the maximum of, and there is no pivoting, which would be a jump. Every :math:`d_j` is at least the
    floor, no element of the factor exceeds :math:`\beta`, and a matrix all of whose eigenvalues are above 20 floors
    stays as it is.

    It never changes an element off the diagonal. Do not use it where directions that are no coordinates matter, or
    where the order of the coordinates should not: the result depends on it, while :class:`SoftAbs` rotates with the
    matrix. No eigenvalue of the result is bounded by the floor itself, only the pivots are.

    :param float floor: smallest pivot that can result, as a share of the scale; positive.
    :param float max_relative_change: bound on the report's ``relative_change``; the default allows everything, for
        :math:`E_{jj} \le 2 d_j`.
    :raises ValueError: if the floor is not positive or the bound is negative.

    Calling it is calling :class:`~laplace_amort.SoftAbs`, with the same shapes, result and errors. It takes a
    loop over the ``n`` columns, each step batched.

    Example::

        >>> import torch
        >>> repaired, report = ModifiedCholesky()(torch.tensor([[2., 1.], [1., -1.]]))
        >>> repaired                                  # the second pivot is -1 - 1 / 2, and becomes 1.5
        tensor([[2., 1.],
                [1., 2.]])
        >>> report.num_repaired
        1

    References:

    [1] Gill, Murray & Wright (1981), *Practical Optimization*, section 4.4.2.2.
    [2] Fang & O'Leary (2008), *Modified Cholesky algorithms: a catalog with new approaches*, Mathematical Programming
        115, https://doi.org/10.1007/s10107-007-0177-6
    """

    def _repair(self, matrix: Tensor) -> tuple[Tensor, Change]:
        repaired = matrix + torch.diag_embed(_diagonal_increase(matrix, self.floor))
        return repaired, _change(matrix.detach(), repaired.detach())


def _diagonal_increase(matrix: Tensor, floor: float) -> Tensor:
    """The diagonal of E, ``(*, n)``, by elimination of one column after the other."""
    bound, rest, increases = _element_bound(matrix, floor), matrix, []
    for _ in range(matrix.shape[-1]):
        pivot, column = rest[..., 0, 0], rest[..., 1:, 0]
        raised = softabs(pivot, floor)
        if column.shape[-1]:
            least = (column**2).sum(-1) / bound
            raised = (raised + least + softabs(raised - least, floor)) / 2
        increases.append(raised - pivot)
        products = column.unsqueeze(-1) * column.unsqueeze(-2)
        rest = rest[..., 1:, 1:] - products / raised[..., None, None]
    return torch.stack(increases, dim=-1)


def _element_bound(matrix: Tensor, floor: float) -> Tensor:
    """The square of beta, ``(*,)``. At least the trace: then no positive definite matrix is changed on its account."""
    diagonal, n = matrix.diagonal(dim1=-2, dim2=-1), matrix.shape[-1]
    off_diagonal = matrix - torch.diag_embed(diagonal)
    mean_square = (off_diagonal**2).sum(dim=(-2, -1)) / max(n**2 - 1, 1)
    return softabs(diagonal, floor).sum(-1) + (floor**2 + mean_square).sqrt()


def _change(before: Tensor, after: Tensor) -> Change:
    size = after.abs().amax(dim=(-2, -1), keepdim=True)  # squares of large numbers are infinite
    moved = torch.linalg.matrix_norm((after - before) / size) / torch.linalg.matrix_norm(after / size)
    # Some direction moved by more than a share if the increase less that share of the result has a positive eigenvalue.
    noticeable = eigh((after - before) - NOTICEABLE * after)[0][..., -1] > 0
    return Change(eigh(before)[0][..., 0], eigh(after)[0][..., 0], moved, noticeable)
