"""A short look for other modes of the globals than the one that a fit found."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy
import torch
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor

from laplace_amort.evidence import other_peaks
from laplace_amort.fitting.evaluation import Evaluation, Maximum
from laplace_amort.fitting.found import Found
from laplace_amort.fitting.objectives.laplace import LaplaceFunction, MarginalLaplace
from laplace_amort.fitting.optimizers import TrustRegion
from laplace_amort.fitting.search import random_starts
from laplace_amort.guide import Problem
from laplace_amort.linalg import Whitening
from laplace_amort.posterior import Posterior
from laplace_amort.types import Vector, to_numpy

__all__ = ["other_optimum"]

# Draws of the prior, along each of which the density is looked at; peaks that are climbed; and other starts.
_DRAWS, _PEAKS, _STARTS = 16, 4, 2
# Evaluations for all climbs: as many as the fit took, and at least; more where an evaluation is cheap, by the numbers
# that the curvatures of units have. And of one climb.
_LEAST, _CHEAP, _LEAST_IF_CHEAP, _MOST = 16, 4000, 40, 20
# Posterior standard deviations from the optimum within which a climb has come back to it.
_HOME = 2.0
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
        here, *others = _optima(problem, result.posterior, max(len(result.history), _least(problem)))
        return max((_left_out(result, here, other) for other in others), default=0.0) if here.status.ok else 0.0
    finally:
        problem.move(point)
        problem.recall(memory)


def _optima(problem: Problem, posterior: Posterior, evaluations: int) -> Iterator[Maximum]:
    """Yield the optimum where the fit stands, and those that other starts lead to, with so many evaluations in all."""
    function = _Counted(MarginalLaplace().bind(problem))
    here = function.climbed(_MOST)
    yield here
    function.leave(here)
    for start in _starts(problem, posterior):
        left = evaluations - function.number
        if left <= 0:
            return
        problem.place(start)
        with contextlib.suppress(_CameHomeError):
            found = function.climbed(min(left, _MOST))
            if found.status.ok:
                yield found


def _starts(problem: Problem, posterior: Posterior) -> Iterator[Tensor]:
    """Yield the mirror image, peaks along each global as far as its prior reaches, and starts at random."""
    yield -posterior.gaussian.global_loc
    prior = torch.stack(list(random_starts(problem, _DRAWS, _SEED, init_to_sample)))
    for peak in other_peaks(posterior, to_numpy(prior))[:_PEAKS]:
        yield torch.from_numpy(peak)
    for pair in zip(prior, random_starts(problem, _STARTS, _SEED), strict=False):
        yield from pair


class _CameHomeError(Exception):
    """A climb has come back to the optimum that is known."""


def _least(problem: Problem) -> int:
    units, k = problem.start.shape
    return _LEAST_IF_CHEAP if units * k**2 <= _CHEAP else _LEAST


class _Counted:
    """An objective whose evaluations are counted, climbed from where the problem stands.

    :param function: the objective.
    """

    def __init__(self, function: LaplaceFunction) -> None:
        self.function, self.number = function, 0
        self._home: tuple[Vector, Whitening] | None = None

    def leave(self, home: Maximum) -> None:
        """Count anew, and end every climb that comes back to an optimum."""
        self.number = 0
        if home.status.ok:
            self._home = home.point, Whitening.of_information(_information(home))

    def __call__(self, point: Vector) -> Evaluation:
        if self._home is not None and self._home[1].distance(point - self._home[0]) < _HOME:
            raise _CameHomeError
        self.number += 1
        return self.function(point)

    def climbed(self, max_steps: int) -> Maximum:
        """Maximize with Newton's method."""
        start = self.function.point()
        about = Whitening.of_information(numpy.eye(len(start)))
        return TrustRegion(max_steps=max_steps).maximize(self, start, lambda: about)


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
