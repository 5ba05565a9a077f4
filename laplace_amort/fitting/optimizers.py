"""Optimizers of deterministic objectives, in coordinates where a posterior is standard normal."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy
import scipy.optimize

from laplace_amort.fitting.evaluation import Evaluation, FitStatus, Function, Maximum
from laplace_amort.fitting.identification import is_flat
from laplace_amort.linalg import Whitening
from laplace_amort.types import Vector

__all__ = ["Optimizer", "QuasiNewton", "TrustRegion", "newton_decrement"]

# Evaluations without a better one after which a search is stuck: a trust region is a trillionth by then.
_PATIENCE = 20
# Posterior standard deviations from the optimum within which the gradient judges Newton's step, and no value does.
_NEAR = 0.1
# The same, that one step may go at most.
_FARTHEST = 1e6
# Share of the largest curvature that every direction counts with: one that says nothing has no standard deviation.
_LEAST = 1e-10
# Past this many parameters a dense inverse Hessian costs more than it saves.
_DENSE = 300
# How often SciPy begins anew where it ends short of the tolerance.
_ROUNDS = 6


@runtime_checkable
class Optimizer(Protocol):
    """What makes an objective large; any object with this method."""

    def maximize(self, function: Function, start: Vector, whitening: Callable[[], Whitening]) -> Maximum:
        """Maximize from a start where the function exists.

        :param function: returns an :class:`Evaluation`; one of minus infinity where it does not exist.
        :param Vector start: ``(P,)``.
        :param whitening: returns coordinates in which the function is about spherical.
        """


def newton_decrement(evaluation: Evaluation) -> float:
    """Length of Newton's step to the maximum in standard deviations; infinite where the curvature is not negative."""
    # Of a matrix that is singular but for rounding errors there may be a factor all the same, made of these.
    if evaluation.information is None or is_flat(evaluation.information, evaluation.rounding):
        return math.inf
    try:
        factor = numpy.linalg.cholesky(evaluation.information)
    except numpy.linalg.LinAlgError:
        return math.inf
    return float(numpy.linalg.norm(numpy.linalg.solve(factor, evaluation.gradient)))


class _Climb:
    """The best point of a maximization so far, and whether to go on from it.

    :param function: the objective.
    :param Vector start: ``(P,)``.
    :param norm: of the gradient, in posterior standard deviations.
    :param tolerance: the largest norm that counts as none, at an evaluation.
    :param int max_steps: evaluations at most.
    """

    def __init__(
        self,
        function: Function,
        start: Vector,
        norm: Callable[[Evaluation], float],
        tolerance: Callable[[Evaluation], float],
        max_steps: int,
    ) -> None:
        self.function, self.norm, self.tolerance, self.max_steps = function, norm, tolerance, max_steps
        self.point, self.best = start, function(start)
        self.num_evaluations = self.num_at_best = 1

    def evaluate(self, point: Vector) -> Evaluation:
        """Evaluate the objective, and keep the point if it is the best so far."""
        found = self.function(point)
        self.num_evaluations += 1
        if found.value > self.best.value:
            self.keep(point, found)
        return found

    def keep(self, point: Vector, found: Evaluation) -> None:
        """Go on from a point that was evaluated last."""
        self.point, self.best, self.num_at_best = point, found, self.num_evaluations

    @property
    def begun(self) -> bool:
        """Whether the objective exists at the start."""
        return self.best.value > -math.inf

    @property
    def converged(self) -> bool:
        """Whether the best point is an optimum."""
        return self.begun and (not len(self.point) or self.norm(self.best) <= self.tolerance(self.best))

    @property
    def stuck(self) -> bool:
        """Whether none of the last evaluations was any better."""
        return self.num_evaluations - self.num_at_best >= _PATIENCE

    @property
    def exhausted(self) -> bool:
        """Whether there were as many evaluations as there may be."""
        return self.num_evaluations >= self.max_steps

    @property
    def over(self) -> bool:
        """Whether another evaluation would be of no use."""
        return not self.begun or self.converged or self.stuck or self.exhausted

    def maximum(self) -> Maximum:
        """Return the best point, and how it was found."""
        if not self.begun:
            return Maximum(self.point, self.best, FitStatus.START_FAILED, 0.0)
        norm = self.norm(self.best) if len(self.point) else 0.0
        if self.converged:
            status = FitStatus.CONVERGED
        elif self.exhausted:
            status = FitStatus.MAX_STEPS
        else:
            status = FitStatus.STUCK if math.isfinite(norm) else FitStatus.NO_MAXIMUM
        return Maximum(self.point, self.best, status, norm)


# ------------------------------------------------------------------------------------------------------ Newton's method


@dataclass(frozen=True)
class TrustRegion:
    """Newton's method in a trust region; for objectives that have their second derivative.

    It leaves saddles, and its steps are bounded where the second derivative is no guide. Do not use it for an objective
    without second derivative: :class:`QuasiNewton`.

    :param float tolerance: largest Newton decrement that counts as convergence, in posterior standard deviations. By
        default 1e-6; the last step makes it smaller by orders of magnitude. More in single precision, where rounding
        errors of the gradient are larger.
    :param int max_steps: trial steps at most.

    Reference: Nocedal & Wright (2006), *Numerical Optimization*, 2nd edition, chapter 4.
    """

    tolerance: float = 1e-6
    max_steps: int = 200

    def maximize(self, function: Function, start: Vector, whitening: Callable[[], Whitening]) -> Maximum:
        """See :class:`Optimizer`; the coordinates are those of the second derivative at each point, not the given."""
        climb = _Climb(function, start, newton_decrement, self._tolerance, self.max_steps)
        radius = 0.0
        while not climb.over:
            here, quadratic = climb.best, _Quadratic.of(climb.best)
            # Newton's own step is the first trial; where it leads nowhere, the region shrinks at once.
            radius = radius or min(max(1.0, float(numpy.linalg.norm(quadratic.slope))), _FARTHEST)
            step = quadratic.step_within(radius)
            point, gain = climb.point + quadratic.scale @ step, quadratic.gain(step)
            if not gain > 0:  # it is flat
                break
            found, norm = climb.evaluate(point), climb.norm(here)
            if norm < _NEAR and climb.norm(found) < norm / 2:  # values that differ by rounding errors say nothing
                climb.keep(point, found)
            elif climb.best is here and gain <= here.rounding * abs(here.value):
                break
            else:
                radius = _next_radius(radius, float(numpy.linalg.norm(step)), (found.value - here.value) / gain)
        return climb.maximum()

    def _tolerance(self, at: Evaluation) -> float:
        """Rounding errors of a sum of many terms are in its gradient as well."""
        return max(self.tolerance, 100 * at.rounding * abs(at.value) ** 0.5)


class _Quadratic(NamedTuple):
    """An objective around a point to second order, in standard deviations along the eigenvectors of its information.

    :param Vector slope: the gradient, ``(P,)``.
    :param Vector curvature: downwards, ``(P,)``, in ascending order: 1, or -1 where the objective curves upwards, and
        less in size where it is flat.
    :param Vector scale: a standard deviation along each eigenvector, ``(P, P)``, as columns.
    """

    slope: Vector
    curvature: Vector
    scale: Vector

    @classmethod
    def of(cls, at: Evaluation) -> _Quadratic:
        """Return that of an evaluation."""
        if at.information is None:
            raise TypeError("TrustRegion needs an objective with second derivatives, such as MarginalLaplace()")
        curvature, eigenvectors = numpy.linalg.eigh(at.information)
        size = numpy.abs(curvature)
        size = size.clip(min=max(_LEAST * size.max(), numpy.finfo(float).tiny))
        scale = eigenvectors * size**-0.5
        return cls(scale.T @ at.gradient, curvature / size, scale)

    def gain(self, step: Vector) -> float:
        """Return by how much a step improves the objective, to second order."""
        return float(self.slope @ step - self.curvature @ step**2 / 2)

    def step_within(self, radius: float) -> Vector:
        r"""Return the best step no longer than the radius, ``(P,)``.

        It is :math:`p_i = g_i / (c_i + \lambda)` for slope g and curvature c, with the smallest :math:`\lambda \ge 0`
        for which no :math:`c_i + \lambda` is negative and :math:`|p|` is within the radius.
        """

        def step(shift: float) -> Vector:
            return self.slope / (self.curvature + shift)

        def too_short(shift: float) -> float:  # nearly linear in the shift
            return 1 / radius - 1 / float(numpy.linalg.norm(step(shift)))

        if self.curvature[0] > 0 and numpy.linalg.norm(step(0.0)) <= radius:
            return step(0.0)
        least = max(0.0, -self.curvature[0]) * (1 + 1e-12) + 1e-12
        longest = step(least)
        missing = radius**2 - float(longest @ longest)
        if missing >= 0:  # at a saddle without a slope along the way up, and either way is as good
            longest[0] += math.copysign(missing**0.5, longest[0])
            return longest
        # Where all curvatures are the same this is where it lies; a little further, rounding errors hide it no more.
        most = least + (1 + 1e-6) * float(numpy.linalg.norm(self.slope)) / radius
        return step(float(scipy.optimize.brentq(too_short, least, most)))


def _next_radius(radius: float, length: float, share: float) -> float:
    """Return the radius after a step of some length that brought a share of what was expected of it."""
    if not share >= 0.25:
        return length / 4
    return min(max(radius, 2 * length), _FARTHEST) if share > 0.75 else radius


# ----------------------------------------------------------------------------------------------------------------- BFGS


@dataclass(frozen=True)
class QuasiNewton:
    """SciPy's ``BFGS``, or ``L-BFGS-B`` for many parameters: no second derivative is needed.

    Do not use it for a noisy objective: :class:`~laplace_amort.Stochastic`.

    :param float tolerance: largest gradient that counts as convergence, in posterior standard deviations; more where
        values cannot be told apart: in float32, and in sums of thousands.
    :param int max_steps: evaluations at most.
    """

    tolerance: float = 1e-3
    max_steps: int = 500

    def maximize(self, function: Function, start: Vector, whitening: Callable[[], Whitening]) -> Maximum:
        """See :class:`Optimizer`."""
        about = whitening()
        climb = _Climb(function, start, lambda found: about.norm(found.gradient), self._tolerance, self.max_steps)
        for _ in range(_ROUNDS):
            before = climb.best
            if not climb.over:
                self._minimize(_Loss(climb, about), len(start))
            if climb.best is before:
                break
        return climb.maximum()

    def _minimize(self, loss: _Loss, size: int) -> None:
        """Let SciPy work until it gives up, or the loss says that it is enough."""
        options: dict[str, Any] = {"gtol": 0.0, "maxiter": self.max_steps}
        if size > _DENSE:
            options |= {"ftol": 0.0, "maxfun": self.max_steps, "maxcor": 20}
        method = "L-BFGS-B" if size > _DENSE else "BFGS"
        with numpy.errstate(all="ignore"), contextlib.suppress(_Enough):
            scipy.optimize.minimize(loss, numpy.zeros(size), method=method, jac=True, options=options)

    def _tolerance(self, at: Evaluation) -> float:
        """A line search compares values, and below this distance from an optimum they differ by rounding errors."""
        return max(self.tolerance, 2 * (at.rounding * abs(at.value)) ** 0.5)


class _Enough(Exception):
    """Another evaluation would be of no use; a line search knows no other way to stop."""


class _Loss:
    """What SciPy minimizes: how far an objective is below its value at an origin, in standard deviations from there.

    :param _Climb climb: the origin is the best point that it has now.
    :param Whitening whitening: has the standard deviations.
    """

    def __init__(self, climb: _Climb, whitening: Whitening) -> None:
        self.climb, self.whitening = climb, whitening
        self.origin, self.at_origin = climb.point, climb.best
        self.best, self.best_u = climb.best, numpy.zeros_like(climb.point)

    def __call__(self, u: Vector) -> tuple[float, Vector]:
        """Return the loss and its gradient ``(P,)`` at a point ``(P,)``."""
        if not u.any():
            found = self.at_origin
        elif self.climb.over:
            raise _Enough
        else:
            found = self.climb.evaluate(self.origin + self.whitening.step(u))
        if self.climb.best is not self.best:
            self.best, self.best_u = self.climb.best, u.copy()
        if found.value == -math.inf:  # a bowl around the best point, so that a search turns back
            away = u - self.best_u
            return self.at_origin.value - self.best.value + 1.0 + float(away @ away), 2 * away
        return self.at_origin.value - found.value, -self.whitening.vjp(found.gradient)
