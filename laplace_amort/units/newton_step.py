"""Newton's step from where the units stand: gradient and curvature of all units, and what makes a step of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from laplace_amort.autodiff import Recording, differentiate, local_curvature
from laplace_amort.linalg import Repair, blocks
from laplace_amort.types import Density

__all__ = ["NewtonPoint", "attached_gradient", "evaluate", "newton_point"]

# A pivot of less than this many rounding errors means nothing.
_PIVOT = 64


def evaluate(log_joint: Density, global_: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """Return gradient and negative Hessian of a log joint in the latents of each unit; the latter is a constant.

    :param log_joint: a function of both tensors that returns a scalar.
    :param Tensor global_: ``(d,)``.
    :param Tensor local: ``(N, k)``, taken as a constant.
    :return: the gradient ``(N, k)``, attached to the globals and to all else that ``log_joint`` depends on, unless its
        derivatives are recorded; and the tails ``(N, k, k)``, without a graph.
    """
    if isinstance(log_joint, Recording) and log_joint.information is not None:
        with torch.no_grad():
            return log_joint.information.look(global_, local)
    with torch.enable_grad():
        y = local.detach().requires_grad_()
        (found,) = differentiate(log_joint(global_, y), [y], ["argument 'local'"], "first")
    gradient = torch.zeros_like(y) if found is None else found
    with torch.no_grad():
        return gradient, local_curvature(gradient, y)


def attached_gradient(log_joint: Density, global_: Tensor, local: Tensor, gradient: Tensor) -> Tensor:
    """Return a gradient that :func:`evaluate` returned, attached in any case.

    :param log_joint: a function of both tensors that returns a scalar.
    :param Tensor global_: ``(d,)``.
    :param Tensor local: ``(N, k)``, taken as a constant.
    :param Tensor gradient: there, ``(N, k)``.
    """
    if isinstance(log_joint, Recording) and log_joint.information is not None:
        return log_joint.information.gradient(global_, local.detach())
    return gradient


class NewtonPoint(NamedTuple):
    r"""Where the units stand and Newton's step from there, without a graph.

    :param Tensor local: ``(N, k)``.
    :param Tensor gradient: :math:`g`, ``(N, k)``; zero for a unit where it, or the tail, is not finite.
    :param Tensor tail: negative Hessian blocks, ``(N, k, k)``; then the identity.
    :param Tensor step: :math:`P^{-1} g`, ``(N, k)``, with a positive definite :math:`P`: the tail, repaired if need be.
    :param Tensor factor: lower Cholesky factor of :math:`P`, ``(N, k, k)``.
    :param Tensor decrement: :math:`\sqrt{g^\top P^{-1} g}`, ``(N,)``: the length of the step in conditional standard
        deviations; infinite where gradient or tail is not finite.
    :param Tensor concave: ``(N,)``, whether the tail needed no repair.
    """

    local: Tensor
    gradient: Tensor
    tail: Tensor
    step: Tensor
    factor: Tensor
    decrement: Tensor
    concave: Tensor


def newton_point(local: Tensor, gradient: Tensor, tail: Tensor, repair: Repair) -> NewtonPoint:
    """Return Newton's step from the gradient and curvature of all units.

    :param Tensor local: ``(N, k)``.
    :param Tensor gradient: of the log joint, ``(N, k)``.
    :param Tensor tail: negative Hessian blocks, ``(N, k, k)``.
    :param repair: of tails that are not positive definite; no other is touched.

    Example: :math:`f = -2 (y - 1)^2`, taken at 0::

        >>> from laplace_amort.linalg import SoftAbs
        >>> point = newton_point(torch.zeros(1, 1), torch.tensor([[4.]]), torch.tensor([[[4.]]]), SoftAbs())
        >>> point.step, point.decrement
        (tensor([[1.]]), tensor([2.]))
    """
    if tail.shape[-1] == 1 and (scalars := _of_scalars(local, gradient, tail)) is not None:
        return scalars
    finite = _finite(gradient, tail)
    if not finite.all():
        identity = torch.eye(tail.shape[-1], dtype=tail.dtype, device=tail.device)
        gradient, tail = gradient.where(finite[:, None], 0 * identity[0]), tail.where(finite[:, None, None], identity)
    factor, failed = blocks.cholesky(tail)
    failed = failed | _has_vanishing_pivots(factor, tail)
    if failed.any():
        index, diagonal = failed.nonzero().squeeze(-1), tail.diagonal(dim1=-2, dim2=-1)
        repaired, _ = repair(tail[index], diagonal[index].abs().maximum(_typical(diagonal)))
        factor = factor.index_copy(0, index, blocks.cholesky(repaired)[0])
    step = blocks.cholesky_solve(gradient.unsqueeze(-1), factor).squeeze(-1)
    decrement = (gradient * step).sum(-1).clamp_(min=0).sqrt_().masked_fill_(~finite, torch.inf)
    return NewtonPoint(local, gradient, tail, step, factor, decrement, finite & ~failed)


def _of_scalars(local: Tensor, gradient: Tensor, tail: Tensor) -> NewtonPoint | None:
    """The step where each unit is one number, and all are in order: the usual case of these, in a few operations."""
    if not tail.numel():
        return None
    low, high = map(float, torch.aminmax(tail))
    if not 0 < low <= high < torch.finfo(tail.dtype).max ** 0.5:
        return None
    step = gradient / tail.squeeze(-1)
    decrement = (gradient * step).squeeze(-1).sqrt_()
    if not float(decrement.max()) < torch.inf:
        return None
    return NewtonPoint(
        local, gradient, tail, step, tail.sqrt(), decrement, torch.ones_like(decrement, dtype=torch.bool)
    )


def _finite(gradient: Tensor, tail: Tensor) -> Tensor:
    """Whether the numbers of a unit, and their squares, are finite: bool, ``(N,)``."""
    bound = torch.finfo(tail.dtype).max ** 0.5
    if tail.numel() and all(-bound < float(end) < bound for part in (gradient, tail) for end in torch.aminmax(part)):
        return torch.ones_like(gradient[:, 0], dtype=torch.bool)  # by far the usual case, and the cheap one
    return (gradient.abs() < bound).all(-1) & (tail.abs() < bound).flatten(1).all(-1)


def _has_vanishing_pivots(factor: Tensor, tail: Tensor) -> Tensor:
    """Whether a pivot is nothing but rounding errors, which would make a step without bound: bool, ``(N,)``."""
    if tail.shape[-1] == 1:
        return torch.zeros_like(tail[:, 0, 0], dtype=torch.bool)
    pivots, diagonal = factor.diagonal(dim1=-2, dim2=-1) ** 2, tail.diagonal(dim1=-2, dim2=-1)
    return ~(pivots > _PIVOT * torch.finfo(tail.dtype).eps * diagonal).all(-1)


def _typical(diagonal: Tensor) -> Tensor:
    """A precision for each coordinate, ``(k,)``: medians, which no single unit moves, however wild."""
    median = diagonal.abs().median(dim=0).values
    return torch.where(median > 0, median, torch.ones_like(median))
