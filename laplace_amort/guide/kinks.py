r"""Kinks: places where a gradient jumps, which no second derivative sees.

At the tip of :math:`-|y|` autograd has the curvature 0, and on both sides as well. So along a line through a kink the
change of the gradient is more than the integral of the curvature,

.. math:: \phi'(b) - \phi'(a) = \int_a^b \phi''(t) \, dt + \text{jumps between } a \text{ and } b.

What a trapezoid leaves out of the change between two points vanishes when the interval around it is halved again and
again; a jump stays.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from laplace_amort.autodiff import local_information
from laplace_amort.errors import NUMERICAL_ERRORS
from laplace_amort.guide.gaussian import LaplaceGaussian
from laplace_amort.model import UnitModel

__all__ = ["Kink", "curvature_beside", "find_kink"]

# Standard deviations to both sides over which lines go, their intervals, and how often the worst of these is halved.
_REACH, _INTERVALS, _HALVED = 4.0, 64, 40
# Share of all changes of a gradient that is a jump, from which on there is a kink; and of what the trapezoid left out
# of an interval, what must be left when it has been halved: there may be several kinks in it.
_JUMPS, _LEFT = 0.02, 0.1

# Conditional standard deviations beside the mode where curvatures are compared, and by what share they may differ.
_BESIDE, _NOTICEABLE = 1e-3, 0.05

# Slopes and bends of M lines, at a step along each: from ``(M,)`` to ``(M,)`` both.
Lines = Callable[[Tensor], tuple[Tensor, Tensor]]


class Kink(NamedTuple):
    """A kink that was found.

    :param str where: the unit or the globals along whose line it is.
    :param float share: of the changes of the gradient along that line, what its largest jump is.
    :param int number: of units that have one; 0 for a kink in the globals.
    """

    where: str
    share: float
    number: int

    def __str__(self) -> str:
        units = f" ({self.number} units have one)" if self.number else ""
        return (
            f"the density has a kink along {self.where}{units}: {100 * self.share:.0f} % of the changes of its "
            "gradient are in one jump, which no second derivative sees, and modes and curvatures are nothing to go by. "
            "Is there an abs, relu, max, clamp or where, or a Laplace density? Take what is smooth in its place:\n"
            "    dist.SoftLaplace(loc, scale)                       # for dist.Laplace(loc, scale)\n"
            "    torch.nn.functional.softplus(x, beta=10)           # for x.relu(), and x.clamp(min=0)\n"
            "    (x**2 + 0.01).sqrt()                               # for x.abs()\n"
            "or sample it by chains: MCMC(NUTS(model), 1000, warmup_steps=1000).run(*args)"
        )


@torch.no_grad()
def find_kink(model: UnitModel, global_: Tensor, local: Tensor) -> Kink | None:
    """Look for a kink along lines through a point: one in each unit, and one for each site of the globals.

    It costs about a hundred evaluations for each; do not use it before something has gone wrong. A kink that no line
    crosses is not seen.

    :param UnitModel model: at its data.
    :param Tensor global_: ``(d,)``.
    :param Tensor local: ``(N, k)``.
    """
    try:
        return _of_units(model, global_, local) or _of_globals(model, global_, local)
    except NUMERICAL_ERRORS:
        return None


def _of_units(model: UnitModel, global_: Tensor, local: Tensor) -> Kink | None:
    _, tail = local_information(model.log_joint, global_, local)
    direction = _sds(tail.diagonal(dim1=-2, dim2=-1))  # (N, k)

    def lines(steps: Tensor) -> tuple[Tensor, Tensor]:
        gradient, tail = local_information(model.log_joint, global_, local + steps.unsqueeze(-1) * direction)
        bend = -((tail @ direction.unsqueeze(-1)).squeeze(-1) * direction).sum(-1)
        return (gradient * direction).sum(-1), bend

    share = _jumps(lines, local.new_zeros(len(local)))
    if not len(share) or not share.max() > 0:
        return None
    unit = int(share.argmax())
    return Kink(model.describe(unit), float(share[unit]), int((share > 0).sum()))


def _of_globals(model: UnitModel, global_: Tensor, local: Tensor) -> Kink | None:
    begin, found = 0, list[Kink]()
    for name, site in model.layout.global_sites.items():
        direction = torch.zeros_like(global_)
        direction[begin : begin + site.shape.numel()] = 1.0
        begin += site.shape.numel()
        _, bend = _along(model, global_, local, direction)
        direction = direction * _sds(-bend)
        share = _jumps(functools.partial(_line, model, global_, local, direction), global_.new_zeros(1))
        found.append(Kink(f"'{name}'", float(share), 0))
    worst = max(found, key=lambda kink: kink.share, default=None)
    return worst if worst and worst.share > 0 else None


def _line(model: UnitModel, global_: Tensor, local: Tensor, direction: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    slope, bend = _along(model, global_ + steps * direction, local, direction)
    return slope[None], bend[None]


@torch.enable_grad()
def _along(model: UnitModel, global_: Tensor, local: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and bend of the log joint along a direction of the globals, each a scalar."""
    theta = global_.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_joint(theta, local), theta, create_graph=True)
    slope = (gradient * direction).sum()
    if not slope.requires_grad:
        return slope, torch.zeros_like(slope)
    (bend,) = torch.autograd.grad(slope, theta, materialize_grads=True)
    return slope.detach(), (bend * direction).sum()


def _sds(information: Tensor) -> Tensor:
    """What stands for a standard deviation: 1 where the curvature says nothing of one."""
    return torch.where(information > 0, information, torch.ones_like(information)).rsqrt()


def _jumps(lines: Lines, zeros: Tensor) -> Tensor:
    """Return the largest jump of the slopes along lines, as a share of all their changes, ``(M,)``; 0 for none."""
    grid = torch.linspace(-_REACH, 1.01 * _REACH, _INTERVALS + 1)  # not the same to both sides, where data may be
    slopes, bends = (torch.stack(parts) for parts in zip(*(lines(zeros + step) for step in grid.tolist()), strict=True))
    steps = grid.to(zeros).unsqueeze(-1) + zeros
    ends = [_Ends(*parts) for parts in zip(steps, slopes, bends, strict=True)]
    missing = torch.stack([_missing(a, b) for a, b in itertools.pairwise(ends)])
    first, at = missing.max(0)
    left, right = (_Ends(*(part.gather(0, at[None] + i)[0] for part in (steps, slopes, bends))) for i in (0, 1))
    for _ in range(_HALVED):
        step = (left.step + right.step) / 2
        middle = _Ends(step, *lines(step))
        nearer = _missing(left, middle) > _missing(middle, right)
        left, right = left.where(nearer, middle), middle.where(nearer, right)
    jump, total = _missing(left, right), slopes.diff(dim=0).abs().sum(0)
    rounding = torch.finfo(zeros.dtype).eps ** 0.5 * slopes.abs().amax(0)
    return torch.where((jump > _LEFT * first) & (jump > _JUMPS * total) & (jump > rounding), jump / total, 0.0)


class _Ends(NamedTuple):
    """A point on each line, ``(M,)``: where it is, slope and bend."""

    step: Tensor
    slope: Tensor
    bend: Tensor

    def where(self, condition: Tensor, other: _Ends) -> _Ends:
        return _Ends(*(torch.where(condition, a, b) for a, b in zip(self, other, strict=True)))


def _missing(left: _Ends, right: _Ends) -> Tensor:
    """What a trapezoid of the bends leaves out of the change of the slope, ``(M,)``."""
    found = right.slope - left.slope - (right.step - left.step) * (left.bend + right.bend) / 2
    return found.abs().nan_to_num(nan=0.0, posinf=0.0)


@torch.no_grad()
def curvature_beside(model: UnitModel, gaussian: LaplaceGaussian) -> list[str]:
    """Say so if the curvature of a unit at its mode is not that beside it: autograd sees none at the tip of a kink.

    :param UnitModel model: at its data.
    :param LaplaceGaussian gaussian: of these units.
    """
    tail = gaussian.precision.tail
    beside = gaussian.local_loc + _BESIDE * gaussian.precision.local_scale_tril.sum(-1)
    _, there = local_information(model.log_joint, gaussian.global_loc, beside)
    there = there / model.layout.weight
    change = ((there - tail).flatten(1).norm(dim=1) / tail.flatten(1).norm(dim=1)).nan_to_num(nan=0.0)
    if not len(change) or change.max() < _NOTICEABLE:
        return []
    unit = int(change.argmax())
    return [
        f"the curvature of {model.describe(unit)} changes by {100 * float(change[unit]):.0f} % within {_BESIDE:g} "
        f"standard deviations of its mode ({int((change > _NOTICEABLE).sum())} of {len(change)} units): do not "
        "rely on it. Is there a kink, such as abs, max or clamp, in the density?"
    ]
