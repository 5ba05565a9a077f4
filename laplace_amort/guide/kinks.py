r"""Kinks: places where a gradient jumps, which no second derivative sees.

At the tip of :math:`-|y|` autograd has the curvature 0, and on both sides as well. So along a line through a kink the
change of the gradient is more than the integral of the curvature, however finely that is taken:

.. math:: \phi'(t_n) - \phi'(t_0) = \sum_i \int_{t_i}^{t_{i+1}} \phi''(t) \, dt + \text{jumps}.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from laplace_amort.autodiff import local_information
from laplace_amort.errors import NUMERICAL_ERRORS

if TYPE_CHECKING:
    from laplace_amort.guide.problem import Problem

__all__ = ["Kink", "find_kink"]

# Standard deviations to both sides over which lines go, and intervals of the finest of their divisions.
_REACH, _INTERVALS = 4.0, 256
# Share of all changes of a gradient that is in jumps, from which on there is a kink; and by what factor the division of
# a line into four times as many parts must lower it where there is none: 16, if it is fine enough.
_JUMPS, _FALLS = 0.02, 0.5


class Kink(NamedTuple):
    """A kink that was found.

    :param str where: the unit or the globals along whose line it is.
    :param float share: of the changes of the gradient along that line, what its curvature does not account for.
    :param int number: of units that have one; 0 for a kink in the globals.
    """

    where: str
    share: float
    number: int

    def __str__(self) -> str:
        units = f" ({self.number} units have one)" if self.number else ""
        return (
            f"the density has a kink along {self.where}{units}: {100 * self.share:.0f} % of the changes of its gradient "
            "are jumps, which no second derivative sees, and modes and curvatures are nothing to go by. Is there an "
            "abs, relu, max, clamp or where, or a Laplace density? Take what is smooth in its place:\n"
            "    dist.SoftLaplace(loc, scale)                       # for dist.Laplace(loc, scale)\n"
            "    torch.nn.functional.softplus(x, beta=10)           # for x.relu(), and x.clamp(min=0)\n"
            "    (x**2 + 0.01).sqrt()                               # for x.abs()\n"
            "or sample it by chains: MCMC(NUTS(model), 1000, warmup_steps=1000).run(*args)"
        )


@torch.no_grad()
def find_kink(problem: Problem) -> Kink | None:
    """Look for a kink along lines through the first start: one in each unit, and one for each site of the globals.

    It costs some hundreds of evaluations; do not use it before something has gone wrong. A kink that no line crosses is
    not seen.

    :param Problem problem: the model at its data.
    """
    memory = problem.memory()
    try:
        problem.recall()
        global_, local = problem.first_loc, problem.start_at(problem.first_loc)
        return _of_units(problem, global_, local) or _of_globals(problem, global_, local)
    except NUMERICAL_ERRORS:
        return None
    finally:
        problem.recall(memory)


def _of_units(problem: Problem, global_: Tensor, local: Tensor) -> Kink | None:
    model = problem.unit_model
    _, tail = local_information(model.log_joint, global_, local)
    direction = _sds(tail.diagonal(dim1=-2, dim2=-1))  # (N, k)
    slopes, bends = [], []
    for step in _steps(local):
        gradient, tail = local_information(model.log_joint, global_, local + step * direction)
        slopes.append((gradient * direction).sum(-1))
        bends.append(-((tail @ direction.unsqueeze(-1)).squeeze(-1) * direction).sum(-1))
    share = _jumps(torch.stack(slopes), torch.stack(bends))
    if not len(share) or not share.max() > 0:
        return None
    unit = int(share.argmax())
    return Kink(model.describe(unit), float(share[unit]), int((share > 0).sum()))


@torch.enable_grad()
def _of_globals(problem: Problem, global_: Tensor, local: Tensor) -> Kink | None:
    if not len(global_):
        return None
    log_joint = problem.unit_model.log_joint

    def along(direction: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Slope and bend of the log joint along a line."""
        theta = (global_ + step * direction).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(log_joint(theta, local), theta, create_graph=True)
        slope = (gradient * direction).sum()
        bend = torch.autograd.grad(slope, theta, materialize_grads=True)[0] @ direction if slope.requires_grad else 0.0
        return slope.detach(), torch.as_tensor(bend).detach().to(slope)

    worst, where, begin = 0.0, "", 0
    for name, site in problem.unit_model.layout.global_sites.items():
        one = torch.zeros_like(global_)
        one[begin : begin + site.shape.numel()] = 1.0
        begin += site.shape.numel()
        one = one * _sds(-along(one, global_.new_zeros(()))[1])
        slopes, bends = zip(*(along(one, step) for step in _steps(global_)), strict=True)
        share = float(_jumps(torch.stack(slopes)[:, None], torch.stack(bends)[:, None])[0])
        if share > worst:
            worst, where = share, name
    return Kink(f"'{where}'", worst, 0) if worst > 0 else None


def _sds(information: Tensor) -> Tensor:
    """What stands for a standard deviation: 1 where the curvature says nothing of one."""
    return torch.where(information > 0, information, torch.ones_like(information)).rsqrt()


def _steps(like: Tensor) -> Tensor:
    """Steps along a line ``(n + 1,)``, at no round number, where the data may be."""
    return torch.linspace(-_REACH, _REACH * 1.0123456, _INTERVALS + 1, dtype=like.dtype, device=like.device)


def _jumps(slopes: Tensor, bends: Tensor) -> Tensor:
    """Return the share of the changes of slopes that is in jumps, ``(M,)``, for lines ``(n + 1, M)``; 0 for none."""
    fine, coarse = (_missing(slopes[::every], bends[::every]) for every in (1, 4))
    return torch.where((fine > _JUMPS) & (fine > _FALLS * coarse), fine, torch.zeros_like(fine)).nan_to_num(nan=0.0)


def _missing(slopes: Tensor, bends: Tensor) -> Tensor:
    """The share of the changes of slopes that trapezoids of the bends do not account for, ``(M,)``."""
    width = 2.0123456 * _REACH / (len(slopes) - 1)
    changes = slopes.diff(dim=0)
    return (changes - width * (bends[1:] + bends[:-1]) / 2).abs().sum(0) / changes.abs().sum(0)
