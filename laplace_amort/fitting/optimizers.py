"""Optimizers of deterministic objectives: SciPy's, in whitening where a posterior is standard normal."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy
import scipy.optimize

from laplace_amort.fitting.evaluation import Evaluation, FitStatus, Function, Maximum
from laplace_amort.fitting.identification import is_flat
from laplace_amort.linalg import Whitening
from laplace_amort.types import Vector

__all__ = ["Optimizer", "QuasiNewton", "TrustRegion", "newton_decrement"]

# Past this many parameters a dense inverse Hessian costs more than it saves.
_DENSE = 300
# How often whitening are taken anew where an optimizer ends short of the tolerance.
_ROUNDS = 6
# Posterior standard deviations from the optimum within which Newton's own step is to be trusted.
_NEAR = 0.1
# The same, that a saddle is left by.
_KICK = 0.1
# The same, that one step may go at most.
_FARTHEST = 1e6
# Evaluations without a better one after which a search is stuck: a trust region is a trillionth by then.
_PATIENCE = 20


@runtime_checkable
class Optimizer(Protocol):
    """What makes an objective large; any object with this method."""

    def maximize(self, function: Function, start: Vector, whitening: Callable[[], Whitening]) -> Maximum:
        """Maximize from a start where the function exists.

        :param function: returns an :class:`Evaluation`; one of minus infinity where it does not exist.
        :param Vector start: ``(P,)``.
        :param whitening: returns some in which the function is about spherical.
        """


@dataclass(frozen=True)
class TrustRegion:
    """Newton's method in a trust region, by SciPy's ``trust-exact``; for objectives that have their second derivative.

    It leaves saddles, and its steps are bounded where the second derivative is no guide. Do not use it for an objective
    without second derivative: :class:`QuasiNewton`.

    :param float tolerance: largest Newton decrement that counts as convergence, in posterior standard deviations. By
        default 1e-6; the last step makes it smaller by orders of magnitude. More in single precision, where rounding
        errors of the gradient are larger.
    :param int max_steps: trial steps at most.
    """

    tolerance: float = 1e-6
    max_steps: int = 200

    def maximize(self, function: Function, start: Vector, whitening: Callable[[], Whitening]) -> Maximum:
        """See :class:`Optimizer`; the whitening are those of the second derivative, taken anew in each round."""
        search = _Search(function, start, newton_decrement, self._tolerance, self.max_steps)
        while not search.over:
            information = search.best.information
            if information is None:
                raise TypeError("TrustRegion needs an objective with second derivatives, such as MarginalLaplace()")
            search.recenter(Whitening.of_information(information))
            search.leave_saddle()
            # Newton's own step is the first trial; where it leads nowhere, the region shrinks at once.
            radius = min(max(1.0, float(numpy.linalg.norm(search.slope(search.best_u)))), _FARTHEST / 2)
            options = {"gtol": 0.0, "maxiter": self.max_steps, "initial_trust_radius": radius}
            options["max_trust_radius"] = _FARTHEST
            search.run("trust-ncg" if search.failed else "trust-exact", hess=search.hessian, options=options)
            search.polish()
        return search.maximum()

    def _tolerance(self, at: Evaluation) -> float:
        """Rounding errors of a sum of many terms are in its gradient as well."""
        return max(self.tolerance, 100 * at.rounding * abs(at.value) ** 0.5)


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
        search = _Search(function, start, lambda found: about.norm(found.gradient), self._tolerance, self.max_steps)
        while not search.over:
            search.recenter(about)
            if len(start) <= _DENSE:
                search.run("BFGS", options={"gtol": 0.0, "maxiter": self.max_steps})
            else:
                options = {"gtol": 0.0, "ftol": 0.0, "maxiter": self.max_steps, "maxfun": self.max_steps, "maxcor": 20}
                search.run("L-BFGS-B", options=options)
        return search.maximum()

    def _tolerance(self, at: Evaluation) -> float:
        """A line search compares values, and below this distance from an optimum they differ by rounding errors."""
        return max(self.tolerance, 2 * (at.rounding * abs(at.value)) ** 0.5)


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


class _Enough(Exception):
    """As many evaluations as there may be; a line search knows no other way to stop."""


class _Search:
    """One maximization under way: what SciPy asks for, in standard deviations from where a round began."""

    def __init__(
        self,
        function: Function,
        start: Vector,
        norm: Callable[[Evaluation], float],
        tolerance: Callable[[Evaluation], float],
        max_steps: int,
    ) -> None:
        self.function, self.norm = function, norm
        self._tolerance, self.max_steps = tolerance, max_steps
        self.point, self.best = start, function(start)
        self.num_steps, self.rounds, self.progress, self.failed = 1, 0, True, False
        self.last_better = 1  # the number of the best evaluation
        self.raised: Exception | None = None

    @property
    def tolerance(self) -> float:
        """Largest gradient that counts as none at the best point so far."""
        return self._tolerance(self.best)

    @property
    def converged(self) -> bool:
        """Whether the best point so far is an optimum."""
        return self.best.value > -math.inf and (not len(self.point) or self.norm(self.best) <= self.tolerance)

    @property
    def over(self) -> bool:
        """Whether another round would be of no use."""
        exhausted = self.num_steps >= self.max_steps or self.rounds >= _ROUNDS or not self.progress
        return exhausted or self.best.value == -math.inf or self.converged

    def recenter(self, whitening: Whitening) -> None:
        """Begin a round: from the best point so far, in these whitening."""
        self.whitening, self.origin, self.level = whitening, self.point, self.best.value
        self.best_u = numpy.zeros_like(self.origin)
        self.last: tuple[Vector, Evaluation] = (self.best_u, self.best)
        self.rounds += 1

    def run(self, method: str, **settings: Any) -> None:
        """Let SciPy work until it has converged, given up or been stopped."""
        before, zero = self.best.value, numpy.zeros_like(self.origin)
        failed = False
        with numpy.errstate(all="ignore"):
            try:
                scipy.optimize.minimize(
                    self.loss, zero, method=method, jac=self.slope, callback=self.after_step, **settings
                )
            except _Enough:
                pass
            except (ValueError, numpy.linalg.LinAlgError, UnboundLocalError) as error:
                if error is self.raised:  # by the objective itself
                    raise
                # Next to where a mode ends, second derivatives are too large even to be squared; and trust-exact of
                # SciPy 1.17 stumbles where its inner iteration does not end. One more round, by another method.
                failed = True
        self.progress = self.best.value > before or (failed and not self.failed)
        self.failed = failed

    def leave_saddle(self) -> None:
        """Where there is no slope but a way up, take a step of it: a method that follows gradients would stay."""
        zero = numpy.zeros_like(self.origin)
        curvature, directions = numpy.linalg.eigh(self.hessian(zero))
        if numpy.linalg.norm(self.slope(zero)) > self.tolerance or curvature[0] >= 0:
            return
        for sign in (_KICK, -_KICK):
            self._at(sign * directions[:, 0])
        self.recenter(self.whitening)

    def polish(self) -> None:
        """Take Newton's own steps, judged by the gradient: values that differ by rounding errors say nothing."""
        norm = self.norm(self.best)
        while self.tolerance < norm < _NEAR:
            step: Vector = numpy.linalg.solve(numpy.asarray(self.best.information), self.best.gradient)
            point = self.point + step
            found = self.function(point)
            self.num_steps += 1
            if not (found.value > -math.inf and self.norm(found) < norm / 2):
                break
            self.point, self.best, norm = point, found, self.norm(found)

    def maximum(self) -> Maximum:
        """Return the best point, and how it was found."""
        if self.best.value == -math.inf:
            status = FitStatus.START_FAILED
        elif self.converged:
            status = FitStatus.CONVERGED
        elif self.num_steps >= self.max_steps:
            status = FitStatus.MAX_STEPS
        else:
            status = FitStatus.STUCK if math.isfinite(self.norm(self.best)) else FitStatus.NO_MAXIMUM
        norm = self.norm(self.best) if self.best.value > -math.inf and len(self.point) else 0.0
        return Maximum(self.point, self.best, status, norm)

    def after_step(self, u: Vector) -> None:
        """Stop SciPy once there is nothing more to do, in a way that it knows."""
        stuck = self.num_steps - self.last_better >= _PATIENCE
        if stuck or self.converged or self.num_steps >= self.max_steps:
            raise StopIteration

    def loss(self, u: Vector) -> float:
        """What SciPy minimizes: how far the value is below that at the beginning of the round."""
        found = self._at(u)
        if found.value == -math.inf:  # a bowl around the best point, so that a search turns back
            return self.level - self.best.value + 1.0 + float(((u - self.best_u) ** 2).sum())
        return self.level - found.value

    def slope(self, u: Vector) -> Vector:
        """Its gradient."""
        found = self._at(u)
        return 2 * (u - self.best_u) if found.value == -math.inf else -self.whitening.vjp(found.gradient)

    def hessian(self, u: Vector) -> Vector:
        """Its second derivative."""
        information = self._at(u).information
        if information is None:
            return numpy.eye(len(u))
        scale = numpy.stack([self.whitening.step(row) for row in numpy.eye(len(u))], axis=1)
        return scale.T @ information @ scale

    def _at(self, u: Vector) -> Evaluation:
        if numpy.array_equal(u, self.last[0]):
            return self.last[1]
        if self.num_steps >= self.max_steps:
            raise _Enough
        point = self.origin + self.whitening.step(u)
        try:
            found = self.function(point)
        except Exception as error:
            self.raised = error
            raise
        self.num_steps += 1
        self.last = (u.copy(), found)
        if found.value > self.best.value:
            self.point, self.best, self.best_u = point, found, u.copy()
            self.last_better = self.num_steps
        return found
