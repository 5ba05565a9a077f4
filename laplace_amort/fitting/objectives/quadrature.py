"""The marginal density of the globals with each unit integrated over by a rule, as an objective."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy
import torch

from laplace_amort.fitting.evaluation import Evaluation, FitStatus, Maximum
from laplace_amort.fitting.history import History
from laplace_amort.fitting.identification import is_flat
from laplace_amort.fitting.objectives.base import Objective, ObjectiveFunction, posterior_whitening, refuse_lost_units
from laplace_amort.fitting.objectives.laplace import MarginalLaplace
from laplace_amort.fitting.optimizers import Optimizer, QuasiNewton, newton_decrement
from laplace_amort.guide import LaplaceGaussian, Problem, to_vector
from laplace_amort.linalg import Whitening
from laplace_amort.posterior import Posterior, WeightedUnits, marginal_sample
from laplace_amort.types import Vector
from laplace_amort.units import GaussHermite, QuadraturePoints, QuadratureRule

__all__ = ["MarginalQuadrature", "QuadratureFunction"]

# Share of the curvature of each global by itself that differences of gradients leave by chance.
_CHANCE = 1e-6
# Posterior standard deviations between the gradients whose difference is a curvature: the error is a few 1e-7 of it.
_STEP = 1e-3


@dataclass(frozen=True)
class MarginalQuadrature:
    r"""The marginal density of the globals, each unit integrated over by a rule around its mode.

    .. math:: \log p(\theta, z) \approx g(\theta) + \sum_i \log \int p(y_i, z_i \mid \theta) dy_i,

    where :math:`g` has the priors of the globals. Its gradient is exact, points that move with the mode included; its
    curvature, taken once at the optimum, is from differences of gradients. With :class:`~laplace_amort.GaussHermite`
    this is what lme4 calls ``nAGQ``, for units of one dimension to three; with :class:`~laplace_amort.StudentPoints` it
    is importance sampling of each unit, in any dimension. One evaluation costs as much as about ``3 Q`` of the log
    joint for ``Q`` points, and a search for the modes. Where one point per unit is enough, take
    :class:`~laplace_amort.MarginalLaplace`, which has second derivatives.

    Do not use it for units whose conditionals have several modes: it looks around one of them.

    :param QuadratureRule rule: how units are integrated over.
    :param start_with: an objective whose optimum is the start.

    Reference: Pinheiro & Chao (2006), *Efficient Laplacian and adaptive Gaussian quadrature algorithms for multilevel
    generalized linear mixed models*, Journal of Computational and Graphical Statistics 15(1).
    """

    rule: QuadratureRule = GaussHermite(9)
    start_with: Objective | None = MarginalLaplace()

    def check(self, problem: Problem) -> None:
        """Refuse what this objective is none for; see :class:`~laplace_amort.fitting.objectives.base.Objective`."""
        problem.refuse_model_parameters()
        _ = problem.integrals

    def bind(self, problem: Problem) -> QuadratureFunction:
        """Return the objective for a guide and its data."""
        return QuadratureFunction(problem, self.rule)

    @property
    def default_optimizer(self) -> Optimizer:
        """What suits it: there is no second derivative."""
        return QuasiNewton()

    def climb(self, history: History, optimizer: Optimizer) -> Maximum:
        """Maximize from where the guide stands, and put the guide there."""
        function = self.bind(history.problem)
        about = history.timed(
            "whitening", lambda: posterior_whitening(history.problem, len(function.point()), with_units=False)
        )
        value = history.watched("quadrature", function, lambda found: about.norm(found.gradient))
        maximum = history.maximize(optimizer, value, function.point(), lambda: about)
        function.move(maximum.point)
        if maximum.status is FitStatus.START_FAILED:
            return maximum
        information = history.timed("curvature", lambda: function.information(about))
        if not numpy.isfinite(information).all():
            return maximum._replace(status=FitStatus.NO_MAXIMUM)
        evaluation = maximum.evaluation._replace(information=information)
        decrement = newton_decrement(evaluation)
        known = numpy.isfinite(decrement) and not is_flat(information, evaluation.rounding, _CHANCE)
        status = maximum.status if known else FitStatus.NO_MAXIMUM
        return maximum._replace(evaluation=evaluation, status=status, gradient_norm=decrement)

    def gaussian(self, problem: Problem, maximum: Maximum) -> LaplaceGaussian:
        """Return the posterior as a Gaussian, with the curvature of this objective for the globals."""
        return MarginalLaplace().gaussian(problem, maximum)

    def posterior(self, problem: Problem, gaussian: LaplaceGaussian, seed: int) -> Posterior:
        """Return globals by importance sampling of this density, and units by that of the model given each of them."""
        units = WeightedUnits(gaussian, problem.integrals, self.rule)
        return Posterior(problem, gaussian, marginal_sample(units, seed), units, seed)


class QuadratureFunction(ObjectiveFunction):
    """A :class:`~laplace_amort.MarginalQuadrature` of one guide at given data.

    :param Problem problem: the guide and the data.
    :param QuadratureRule rule: how units are integrated over.
    """

    def __init__(self, problem: Problem, rule: QuadratureRule) -> None:
        super().__init__(problem, problem.globals_())
        self.rule = rule

    @cached_property
    def points(self) -> QuadraturePoints:
        """The points of the rule, made when they are needed first."""
        return self.rule.points(self.problem.start.shape[1], self.problem.loc)

    def whitening(self) -> Whitening:
        """Return coordinates in which the posterior is standard normal, as far as the marginal curvature knows it."""
        return posterior_whitening(self.problem, len(self.problem.loc), with_units=False)

    def _evaluate(self) -> Evaluation:
        problem, globals_ = self.problem, self.problem.loc.unsqueeze(0)
        found = problem.integrals.values_and_gradients(
            self.points, QuadraturePoints.log_integral, globals_, problem.start.unsqueeze(0)
        )
        refuse_lost_units(problem, found)
        problem.remember(found.mode[0])
        return Evaluation(float(found.values), to_vector([found.gradients[0]]))

    def information(self, whitening: Whitening) -> Vector:
        """Return minus the second derivative where the guide stands, from differences of exact gradients, ``(d, d)``.

        :param Whitening whitening: has the steps.
        """
        d, loc = len(self.problem.loc), self.problem.loc
        if d == 0:
            return numpy.zeros((0, 0))
        steps = numpy.array([whitening.step(row) for row in numpy.eye(d)]).reshape(d, d)
        moves = _STEP * torch.from_numpy(steps).to(loc)
        globals_ = torch.cat([loc + moves, loc - moves])
        found = self.problem.integrals.values_and_gradients(
            self.points, QuadraturePoints.log_integral, globals_, self.problem.start_at(globals_)
        )
        ahead, behind = found.gradients.double().cpu().numpy().reshape(2, d, d)
        along = numpy.linalg.solve(steps, (behind - ahead) / (2 * _STEP))
        symmetric: Vector = (along + along.T) / 2
        return symmetric
