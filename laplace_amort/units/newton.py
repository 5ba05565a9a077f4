r"""Damped Newton search for the conditional modes of many units at once.

The log joint :math:`f(\theta, y)` is one number for all units, so a step :math:`s` of a unit is judged by its gradient
alone: the slope of :math:`f` along :math:`s` at the end of the step against the slope at its beginning. Damping and
status are each unit's own; units that have converged stand still while the others go on.

Reference: Nocedal & Wright (2006), *Numerical Optimization*, chapter 3 (line searches, Newton's method with a modified
Hessian).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from laplace_amort.autodiff import differentiate, local_curvature
from laplace_amort.linalg import Repair, blocks
from laplace_amort.types import Density, Status

__all__ = ["ModeStatus", "NewtonPoint", "NewtonSearch", "SearchResult", "default_tolerance", "evaluate", "newton_point"]

# A decrement that falls below this share of the last one, from one concave point to another, needs no more questions.
_NEARER = 0.25
# A trial is refused if its slope points back by more than this share of the slope at the beginning of the step.
_OVERSHOOT = 0.9
# Bounds on the share of a refused step that is tried next.
_LEAST, _MOST = 0.1, 0.5
# Where the mean curvature along a step is less than this share of what it was, the next step is longer than Newton's.
_FALLING = 0.75
# Curvature that changes by less than this share along a step makes Newton's model exact enough to halve the decrement.
_STEADY = 0.5
# A unit that ends with trials of less than this share of Newton's step has stalled.
_STALLED = 1e-6
# Differences of this many rounding errors mean nothing: in a pivot, and in a coordinate.
_PIVOT, _COORDINATE = 64, 4


class ModeStatus(Status):
    """How the search for the mode of a unit ended; ``str(status)`` is the sentence that a user reads.

    Example::

        >>> print(ModeStatus(1))
        no convergence in the steps allowed: raise max_steps, or start nearer
    """

    CONVERGED = 0, "the mode was found"
    MAX_STEPS = 1, "no convergence in the steps allowed: raise max_steps, or start nearer"
    NOT_FINITE = 2, "the gradient or the curvature overflows or is NaN where the search begins: start elsewhere"
    STALLED = 3, "steps came to nothing: is there a kink (abs, max, Laplace density) at the mode, or none at all?"
    NOT_MAXIMUM = 4, "the gradient is zero where the log joint is flat or curves upwards: is there a unique mode?"


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

        >>> from laplace_amort.linalg.softabs import SoftAbs
        >>> point = newton_point(torch.zeros(1, 1), torch.tensor([[4.]]), torch.tensor([[[4.]]]), SoftAbs())
        >>> point.step, point.decrement
        (tensor([[1.]]), tensor([2.]))
    """
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


def default_tolerance(dtype: torch.dtype) -> float:
    """Return the Newton decrement that counts as convergence: 4e-10 in float64, 7e-5 in float32."""
    return torch.finfo(dtype).eps ** 0.6


class SearchResult(NamedTuple):
    """How a search ended.

    :param NewtonPoint at: where the units stand.
    :param Tensor gradient: at the last point tried, ``(N, k)``, attached to the globals where these carry a graph. Of
        a unit that has converged, that point is where it stands.
    :param Tensor status: :class:`ModeStatus` of each unit, ``(N,)``.
    :param int num_evaluations: of gradient and curvature, of all units at once.
    """

    at: NewtonPoint
    gradient: Tensor
    status: Tensor
    num_evaluations: int


class _State(NamedTuple):
    """A search under way.

    Of each unit: where it stands, the multiple of Newton's step that it tries next, how often it has turned back,
    whether it was kicked off a point that is no mode, and its status.
    """

    at: NewtonPoint
    multiplier: Tensor
    turns: Tensor
    kicked: Tensor
    status: Tensor

    @property
    def running(self) -> Tensor:
        return self.status == ModeStatus.MAX_STEPS  # which is what it comes to if nothing else happens

    @property
    def trial(self) -> Tensor:
        return torch.addcmul(self.at.local, self.multiplier.unsqueeze(-1), self.at.step)


@dataclass(frozen=True)
class NewtonSearch:
    """Damped Newton steps of all units at once, until each has converged or cannot.

    Newton's own step is the first trial. It is refused where gradient or curvature overflow, or where it went too far:
    past the maximum along the step, to where the slope back is nearly as steep, or the log joint curves upwards. Then
    the unit tries a shorter one. A unit whose steps prove too short, as in the tail of ``exp``, doubles them; and one
    that keeps turning back is held to ever shorter ones. A start right at a minimum or a saddle is left by a kick of
    one standard deviation; one where everything overflows is replaced by the median of the other units'.

    :param float tolerance: largest Newton decrement of a unit that has converged. Where rounding errors keep it larger,
        a unit counts as converged once steps move it by rounding errors only, or fail where Newton's model is exact.
    :param int max_steps: trials at most, refused ones included.
    :param repair: of tails that are not positive definite, so that steps lead uphill.
    """

    tolerance: float
    max_steps: int
    repair: Repair

    def __call__(self, log_joint: Density, global_: Tensor, start: Tensor) -> SearchResult:
        """Search from ``start (N, k)`` at globals ``(d,)``."""
        gradient, at = self._look(log_joint, global_, start.detach())
        num_evaluations = 1
        lost = at.decrement == torch.inf
        if lost.any() and not lost.all():
            # Units are alike: the middle of the others is a start as good as any.
            middle = at.local[~lost].median(dim=0).values
            del gradient
            gradient, at = self._look(log_joint, global_, torch.where(lost.unsqueeze(-1), middle, at.local))
            num_evaluations += 1
        state = self._begin(at)
        while num_evaluations <= self.max_steps and state.running.any():
            del gradient  # and with it the graph of that evaluation, before the next one makes its own
            gradient, new = self._look(log_joint, global_, state.trial)
            state = self._proceed(state, new)
            num_evaluations += 1
        stalled = state.running & (state.multiplier < _STALLED)
        return SearchResult(state.at, gradient, state.status.masked_fill(stalled, ModeStatus.STALLED), num_evaluations)

    def _look(self, log_joint: Density, global_: Tensor, local: Tensor) -> tuple[Tensor, NewtonPoint]:
        """The gradient at a point, attached to the globals, and Newton's step from there."""
        gradient, tail = evaluate(log_joint, global_, local)
        return gradient, newton_point(local, gradient.detach(), tail, self.repair)

    def _near(self, dtype: torch.dtype) -> float:
        """Decrement below which rounding errors may be all there is: one more step would end at the tolerance."""
        return max(self.tolerance, default_tolerance(dtype)) ** 0.5

    def _begin(self, at: NewtonPoint) -> _State:
        ones, never = torch.ones_like(at.decrement), torch.zeros_like(at.concave)
        status = torch.where(at.decrement < torch.inf, ModeStatus.MAX_STEPS, ModeStatus.NOT_FINITE)
        return self._settle(_State(at, ones, torch.zeros_like(ones), never, status))

    def _proceed(self, state: _State, new: NewtonPoint) -> _State:
        """Take or refuse the trial of each unit that is under way."""
        waiting = ~state.running  # these have not moved
        nearer = (
            state.at.concave & new.concave & (state.multiplier == 1) & (new.decrement < _NEARER * state.at.decrement)
        )
        if (nearer | waiting).all():  # as in most fits in most steps: nothing more to look at
            return self._settle(state._replace(at=new))
        return self._judge(state, new, waiting)

    def _judge(self, state: _State, new: NewtonPoint, waiting: Tensor) -> _State:
        """The same, where some unit did not do as well as Newton's model has it."""
        old = state.at
        slope = old.decrement**2  # at the beginning of the step, and minus the curvature along it
        finite = new.decrement < torch.inf
        ratio = ((new.gradient * old.step).sum(-1) / slope).masked_fill(~finite, -torch.inf)
        bend = (blocks.matvec(new.tail, old.step) * old.step).sum(-1) / slope
        near = old.concave & (old.decrement.maximum(new.decrement) <= self._near(old.decrement.dtype))
        exact = near & (state.multiplier == 1) & ((bend - 1).abs() < _STEADY)
        bracketed = (ratio >= -_OVERSHOOT) & (bend > 0)
        moved = (new.local != old.local).any(-1)
        taken = ~waiting & moved & finite & (exact | bracketed | (ratio >= 0))
        turns = state.turns + (taken & (ratio < 0))
        multiplier = torch.where(
            taken,
            _next_multiplier(state, new, ratio, turns),
            state.multiplier * _share(old.local, new.local, ratio),
        )
        status = state.status.masked_fill(~(moved | waiting), ModeStatus.STALLED)
        at = _choose(taken | waiting, new, old)
        rounding = taken & exact & (new.decrement > old.decrement / 2)
        return self._settle(_State(at, multiplier, turns, state.kicked, status), rounding)

    def _settle(self, state: _State, rounding: Tensor | None = None) -> _State:
        """Give a status to units that have arrived, and a kick to those at a point that is stationary but no mode.

        :param Tensor rounding: bool, ``(N,)``: units whose decrement is a matter of rounding errors.
        """
        at, status = state.at, state.status
        small = at.decrement <= self.tolerance
        if not small.all():
            resolution = _COORDINATE * torch.finfo(at.step.dtype).eps * at.local.abs()
            small = small | (at.step.abs() <= resolution).all(-1)
        stationary = state.running & (small if rounding is None else small | rounding)
        status = status.masked_fill(stationary & at.concave, ModeStatus.CONVERGED)
        saddle = stationary & ~at.concave
        if saddle.any():
            status = status.masked_fill(saddle & state.kicked, ModeStatus.NOT_MAXIMUM)
            at = _kick(at, saddle & ~state.kicked)
        multiplier = state.multiplier.masked_fill(saddle, 1.0).masked_fill(status != ModeStatus.MAX_STEPS, 0.0)
        return _State(at, multiplier, state.turns, state.kicked | saddle, status)


def _kick(at: NewtonPoint, units: Tensor) -> NewtonPoint:
    """Replace the step of some units by one of a standard deviation in every direction, to be taken in any case."""
    step = blocks.covariance_tril(at.factor).sum(-1).where(units.unsqueeze(-1), at.step)
    return at._replace(step=step, decrement=at.decrement.masked_fill(units, torch.inf))


def _next_multiplier(state: _State, new: NewtonPoint, ratio: Tensor, turns: Tensor) -> Tensor:
    """The multiple of Newton's step to try after a trial that was taken.

    A step that was cut, or that turned back, bounds the length of the next. The more often a unit has turned, the more
    its steps shrink when it turns, and the less they grow when it does not: so none goes to and fro for ever.
    """
    last = (state.multiplier.unsqueeze(-1) * state.at.step).unsqueeze(-1)
    length = (new.factor * last).sum(-2).norm(dim=-1)  # of L^T s: of the last step, in the new precision
    growth = torch.where((state.multiplier < 1) | (turns > 0), 1 + 1 / turns.clamp(min=1), torch.inf)
    bound = torch.where(ratio < 0, 1 / (1 + turns), growth) * length
    falling = (ratio > 0) & (1 - ratio < _FALLING * state.multiplier) & (state.multiplier >= 1)
    wanted = torch.where(falling, 2 * state.multiplier, torch.ones_like(ratio))
    return wanted.minimum(bound / new.decrement.clamp(min=torch.finfo(ratio.dtype).tiny))


def _share(local: Tensor, trial: Tensor, ratio: Tensor) -> Tensor:
    """The share of a refused step to try next: to where the slope vanishes on a line between the two, within bounds.

    A step that is far longer than the way so far is cut by half its orders of magnitude: after an overflow there may be
    many of them.
    """
    length, size = (value.abs().amax(-1) for value in (trial - local, local))
    least = (size.clamp(min=1) / length).sqrt().clamp(max=_LEAST)
    return (1 / (1 - ratio)).nan_to_num(nan=0.0).clamp(max=_MOST).maximum(least)


def _choose(taken: Tensor, new: NewtonPoint, old: NewtonPoint) -> NewtonPoint:
    if taken.all():
        return new
    pairs = zip(new, old, strict=True)
    return NewtonPoint(*(torch.where(taken.reshape(-1, *(1,) * (a.dim() - 1)), a, b) for a, b in pairs))


def evaluate(log_joint: Density, global_: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """Return gradient and negative Hessian of a log joint in the latents of each unit; the latter is a constant.

    :param log_joint: a function of both tensors that returns a scalar.
    :param Tensor global_: ``(d,)``.
    :param Tensor local: ``(N, k)``, taken as a constant.
    :return: the gradient ``(N, k)``, attached to the globals and to all else that ``log_joint`` depends on, and the
        tails ``(N, k, k)``, without a graph.
    """
    with torch.enable_grad():
        y = local.detach().requires_grad_()
        (found,) = differentiate(log_joint(global_, y), [y], ["argument 'local'"], "first")
    gradient = torch.zeros_like(y) if found is None else found
    with torch.no_grad():
        return gradient, local_curvature(gradient, y)
