"""A short look for other modes of the globals than the one that a fit found."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor

from laplace_amort.fitting.evaluation import Evaluation, Maximum
from laplace_amort.fitting.found import Found
from laplace_amort.fitting.objectives.laplace import LaplaceFunction, MarginalLaplace
from laplace_amort.fitting.optimizers import TrustRegion
from laplace_amort.fitting.search import random_starts
from laplace_amort.guide import Problem
from laplace_amort.linalg import Whitening
from laplace_amort.types import Vector

__all__ = ["other_optimum"]

# Starts of each kind besides the mirror image, and evaluations for all of them: as many as the fit took, and at least;
# more where an evaluation is cheap, by the numbers that the curvatures of units have.
_STARTS, _LEAST, _CHEAP, _LEAST_IF_CHEAP = 2, 16, 4000, 48
_MOST = 30  # of one start
# Seeds of starts from here on are not those of a fit.
_SEED = 77_000
# Posterior standard deviations from which on an optimum is another one.
_APART = 1.0
# Share of the draws that should lie about a mode, of which so many must for it to count as covered.
_COVERED = 0.3


def other_optimum(result: Found) -> float:
    """Return the share of the mass at the best other mode of the globals that the draws of a posterior leave out.

    It climbs the Laplace approximation of the marginal density from the mirror image of where the fit stands and from
    a few starts at random, and takes few more evaluations than the fit did. Do not take 0 for a proof.

    :param Found result: the fit.
    """
    problem = result.problem
    if not len(problem.loc) or problem.model_parameters:
        return 0.0
    point, memory = problem.state()
    try:
        here, *others = _optima(problem, max(len(result.history), _least(problem)))
        return max((_left_out(result, here, other) for other in others), default=0.0) if here.status.ok else 0.0
    finally:
        problem.move(point)
        problem.recall(memory)


def _optima(problem: Problem, evaluations: int) -> Iterator[Maximum]:
    """Yield the optimum where the fit stands, and those that other starts lead to, with so many evaluations in all."""
    function = _Counted(MarginalLaplace().bind(problem))
    center = problem.loc.clone()
    yield function.climbed(_MOST)
    function.number = 0
    for start in (-center, *_starts(problem)):
        left = evaluations - function.number
        if left <= 0:
            return
        problem.place(start)
        found = function.climbed(min(left, _MOST))
        if found.status.ok:
            yield found


def _starts(problem: Problem) -> Iterator[Tensor]:
    """Yield starts that know nothing of the fit, by turns uniform and from the prior, which knows how far to look."""
    uniform = random_starts(problem, _STARTS, _SEED)
    prior = random_starts(problem, _STARTS, _SEED, init_to_sample)
    for pair in zip(prior, uniform, strict=True):
        yield from pair


def _least(problem: Problem) -> int:
    units, k = problem.start.shape
    return _LEAST_IF_CHEAP if units * k**2 <= _CHEAP else _LEAST


class _Counted:
    """An objective whose evaluations are counted, climbed from where the problem stands.

    :param function: the objective.
    """

    def __init__(self, function: LaplaceFunction) -> None:
        self.function, self.number = function, 0

    def __call__(self, point: Vector) -> Evaluation:
        self.number += 1
        return self.function(point)

    def climbed(self, max_steps: int) -> Maximum:
        """Maximize with Newton's method."""
        start = self.function.point()
        return TrustRegion(max_steps=max_steps).maximize(
            self, start, lambda: Whitening.of_information(numpy.eye(len(start)))
        )


def _left_out(result: Found, here: Maximum, other: Maximum) -> float:
    """Return the share of the mass at another optimum that the draws do not have, both optima taken for normal."""
    about = Whitening.of_information(_information(other))
    if about.distance(here.point - other.point) < _APART:
        return 0.0
    difference = _log_mass(here) - _log_mass(other)
    share = 1 / (1 + math.exp(min(difference, 700.0)))
    globals_ = result.posterior.globals_
    near = numpy.array([about.distance(draw - other.point) for draw in globals_.draws]) < math.sqrt(len(here.point))
    return 0.0 if globals_.weights[near].sum() > _COVERED * share else share


def _log_mass(maximum: Maximum) -> float:
    """Return the logarithm of the integral of a density that is normal around its maximum, but for a constant."""
    log_det = float(numpy.linalg.slogdet(_information(maximum))[1])
    return maximum.evaluation.value - log_det / 2


def _information(maximum: Maximum) -> Vector:
    """Return minus the second derivative at an optimum that was found by it."""
    information = maximum.evaluation.information
    assert information is not None
    return information
