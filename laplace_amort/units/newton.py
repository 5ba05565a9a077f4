r"""Damped Newton search for the conditional modes of many units at once.

The log joint :math:`f(\theta, y)` is one number for all units, so a step :math:`s` of a unit is judged by its gradient
alone: the slope of :math:`f` along :math:`s` at the end of the step against the slope at its beginning. Damping and
status are each unit's own; units that have converged stand still while the others go on. A unit is in one of these
states:

==================  ==================================  ============================================================
state               how it is known                     what follows
==================  ==================================  ============================================================
under way           status ``MAX_STEPS``                it tries its multiple of Newton's step, 1 at first
taken               its trial is :func:`accepted`       it stands there; the next multiple is 1 again, or longer in a
                                                        falling tail, or bounded if steps were cut or turned back
refused             its trial is not                    it stays; the next multiple is a share of this one
arrived             decrement or step within tolerance  ``CONVERGED`` where concave; else it is kicked off, once
kicked              ``kicked``                          a step of one standard deviation, taken in any case; where it
                                                        is stationary but not concave again, ``NOT_MAXIMUM``
standing still      the trial is where it stood         ``STALLED``, as is what ends with multiples next to nothing
lost                not finite at the start             ``NOT_FINITE``, unless the others' median is a better start
==================  ==================================  ============================================================

Reference: Nocedal & Wright (2006), *Numerical Optimization*, chapter 3 (line searches, Newton's method with a modified
Hessian).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from laplace_amort.linalg import Repair, blocks
from laplace_amort.statuses import Status
from laplace_amort.types import Density
from laplace_amort.units.newton_step import NewtonPoint, evaluate, newton_point

__all__ = ["ModeStatus", "NewtonSearch", "SearchResult", "Trial", "accepted", "default_tolerance"]

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
# A difference of this many rounding errors means nothing in a coordinate.
_COORDINATE = 4


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
    """A search under way; each field has one number for each unit, ``(N,)``.

    :param NewtonPoint at: where it stands.
    :param Tensor multiplier: the multiple of Newton's step that it tries next; 0 where it no longer does.
    :param Tensor turns: how often a step of it has turned back.
    :param Tensor kicked: whether it was kicked off a point that is no mode, bool.
    :param Tensor status: of :class:`ModeStatus`.
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


class Trial(NamedTuple):
    """What the end of a step shows of it, unit by unit, ``(N,)``.

    If Newton's model held, a multiple m of its step would end with a slope of 1 - m, and with a bend of 1.

    :param Tensor slope: along the step, as a share of that at its beginning; minus infinity where anything overflows.
    :param Tensor bend: the curvature along the step, as a share of that at its beginning.
    :param Tensor steady: whether Newton's model is exact but for rounding errors: it was a whole step, so near to the
        mode that one more would end there, and the curvature hardly changed.
    """

    slope: Tensor
    bend: Tensor
    steady: Tensor


def accepted(trial: Trial) -> Tensor:
    """Return whether the end of a step is where the unit shall stand, in one of three cases: bool, ``(N,)``.

    - *uphill*: the step ends before the maximum along it;
    - *bracketed*: it ends past the maximum, but not by far, and the log joint curves downwards there;
    - *steady*: whatever the slope says, it consists of rounding errors.

    Example: not past the maximum, past it, too far past it, past an inflection, and a matter of rounding errors::

        >>> slope, bend = torch.tensor([0.3, -0.5, -2., -0.5, -2.]), torch.tensor([-1., 1., 1., -1., 1.])
        >>> accepted(Trial(slope, bend, torch.tensor([False, False, False, False, True])))
        tensor([ True,  True, False, False,  True])
    """
    uphill = trial.slope >= 0
    bracketed = (trial.slope >= -_OVERSHOOT) & (trial.bend > 0)
    return uphill | bracketed | trial.steady


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
        """Take or refuse each trial on its own, where some unit did not do as well as Newton's model has it."""
        old, trial = state.at, self._trial(state, new)
        moved = (new.local != old.local).any(-1)
        taken = ~waiting & moved & accepted(trial)
        turns = state.turns + (taken & (trial.slope < 0))
        after_taking = _next_multiplier(state, new, trial.slope, turns)
        after_refusal = state.multiplier * _share(old.local, new.local, trial.slope)
        judged = _State(
            at=_choose(taken | waiting, new, old),
            multiplier=torch.where(taken, after_taking, after_refusal),
            turns=turns,
            kicked=state.kicked,
            status=state.status.masked_fill(~(moved | waiting), ModeStatus.STALLED),
        )
        # A step that is exact halves the decrement at least, unless it consists of rounding errors.
        return self._settle(judged, rounding=taken & trial.steady & (new.decrement > old.decrement / 2))

    def _trial(self, state: _State, new: NewtonPoint) -> Trial:
        old = state.at
        before = old.decrement**2  # the slope at the beginning of the step, and minus the curvature along it
        slope = ((new.gradient * old.step).sum(-1) / before).masked_fill(~(new.decrement < torch.inf), -torch.inf)
        bend = (blocks.matvec(new.tail, old.step) * old.step).sum(-1) / before
        near = old.concave & (old.decrement.maximum(new.decrement) <= self._near(old.decrement.dtype))
        return Trial(slope, bend, near & (state.multiplier == 1) & ((bend - 1).abs() < _STEADY))

    def _near(self, dtype: torch.dtype) -> float:
        """Decrement below which rounding errors may be all there is: one more step would end at the tolerance."""
        return max(self.tolerance, default_tolerance(dtype)) ** 0.5

    def _settle(self, state: _State, rounding: Tensor | None = None) -> _State:
        """Give a status to units that have arrived, and a kick to those at a point that is stationary but no mode.

        :param Tensor rounding: bool, ``(N,)``: units whose decrement is a matter of rounding errors.
        """
        arrived = self._small(state.at)
        arrived = state.running & (arrived if rounding is None else arrived | rounding)
        status = state.status.masked_fill(arrived & state.at.concave, ModeStatus.CONVERGED)
        at, no_mode = state.at, arrived & ~state.at.concave
        if no_mode.any():
            status = status.masked_fill(no_mode & state.kicked, ModeStatus.NOT_MAXIMUM)
            at = _kick(at, no_mode & ~state.kicked)
        multiplier = state.multiplier.masked_fill(no_mode, 1.0).masked_fill(status != ModeStatus.MAX_STEPS, 0.0)
        return _State(at, multiplier, state.turns, state.kicked | no_mode, status)

    def _small(self, at: NewtonPoint) -> Tensor:
        """Whether a step is within the tolerance, or of the size of rounding errors in every coordinate: ``(N,)``."""
        small = at.decrement <= self.tolerance
        if small.all():
            return small
        resolution = _COORDINATE * torch.finfo(at.step.dtype).eps * at.local.abs()
        return small | (at.step.abs() <= resolution).all(-1)


def _kick(at: NewtonPoint, units: Tensor) -> NewtonPoint:
    """Replace the step of some units by one of a standard deviation in every direction, to be taken in any case."""
    step = blocks.covariance_tril(at.factor).sum(-1).where(units.unsqueeze(-1), at.step)
    return at._replace(step=step, decrement=at.decrement.masked_fill(units, torch.inf))


def _next_multiplier(state: _State, new: NewtonPoint, slope: Tensor, turns: Tensor) -> Tensor:
    """The multiple of Newton's step to try after a trial that was taken: one, or two in a falling tail, in bounds.

    A step that was cut, or that turned back, bounds the length of the next. The more often a unit has turned, the more
    its steps shrink when it turns, and the less they grow when it does not: so none goes to and fro for ever.
    """
    # As in the tail of exp: all along the step, the slope fell by less than Newton's model has it.
    falling = (slope > 0) & (1 - slope < _FALLING * state.multiplier) & (state.multiplier >= 1)
    wanted = torch.where(falling, 2 * state.multiplier, torch.ones_like(slope))
    last = (state.multiplier.unsqueeze(-1) * state.at.step).unsqueeze(-1)
    length = (new.factor * last).sum(-2).norm(dim=-1)  # of L^T s: of the last step, in the new precision
    held = (state.multiplier < 1) | (turns > 0)
    growth = torch.where(held, 1 + 1 / turns.clamp(min=1), torch.inf)
    longest = torch.where(slope < 0, 1 / (1 + turns), growth) * length
    return wanted.minimum(longest / new.decrement.clamp(min=torch.finfo(slope.dtype).tiny))


def _share(local: Tensor, trial: Tensor, slope: Tensor) -> Tensor:
    """The share of a refused step to try next: to where the slope vanishes on a line between the two, within bounds.

    A step that is far longer than the way so far is cut by half its orders of magnitude: after an overflow there may be
    many of them.
    """
    length, size = (value.abs().amax(-1) for value in (trial - local, local))
    least = (size.clamp(min=1) / length).sqrt().clamp(max=_LEAST)
    return (1 / (1 - slope)).nan_to_num(nan=0.0).clamp(max=_MOST).maximum(least)


def _choose(taken: Tensor, new: NewtonPoint, old: NewtonPoint) -> NewtonPoint:
    if taken.all():
        return new
    pairs = zip(new, old, strict=True)
    return NewtonPoint(*(torch.where(taken.reshape(-1, *(1,) * (a.dim() - 1)), a, b) for a, b in pairs))
