"""What a fit maximizes when it integrates over each unit, instead of trusting in one Gaussian for all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy
import torch

from laplace_amort.errors import ModeNotFoundError
from laplace_amort.fitting.evaluation import Evaluation, FitStatus, Maximum
from laplace_amort.fitting.history import History
from laplace_amort.fitting.identification import is_flat
from laplace_amort.fitting.objectives.base import Objective, ObjectiveFunction
from laplace_amort.fitting.objectives.elbo import elbo_whitening
from laplace_amort.fitting.objectives.laplace import MarginalLaplace
from laplace_amort.fitting.optimizers import Optimizer, QuasiNewton, newton_decrement
from laplace_amort.guide import LaplaceGaussian, Problem, to_vector
from laplace_amort.linalg import Whitening
from laplace_amort.posterior import Posterior, WeightedUnits, marginal_sample
from laplace_amort.types import Vector
from laplace_amort.units import GaussHermite, Integrals, ModeStatus, QuadraturePoints, QuadratureRule

__all__ = [
    "MarginalQuadrature",
    "QuadratureFunction",
]

# Share of the curvature of each global by itself that differences of gradients leave by chance.
_CHANCE = 1e-6


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

    def climb(self, run: History, optimizer: Optimizer) -> Maximum:
        """Maximize from where the guide stands, and put the guide there."""
        function = self.bind(run.problem)
        about = run.timed("whitening", lambda: elbo_whitening(run.problem, len(function.point()), with_units=False))
        value = run.function("quadrature", function, lambda found: about.norm(found.gradient))
        maximum = optimizer.maximize(value, function.point(), lambda: about)
        function.move(maximum.point)
        if maximum.status is FitStatus.START_FAILED:
            return maximum
        information = run.timed("curvature", lambda: function.information(about))
        if not numpy.isfinite(information).all():
            return maximum._replace(status=FitStatus.NO_MAXIMUM)
        evaluation = maximum.evaluation._replace(information=information)
        decrement = newton_decrement(evaluation)
        known = numpy.isfinite(decrement) and not is_flat(information, evaluation.rounding, _CHANCE)
        status = maximum.status if known else FitStatus.NO_MAXIMUM
        return Maximum(maximum.point, evaluation, status, decrement)

    def gaussian(self, problem: Problem, maximum: Maximum) -> LaplaceGaussian:
        """Return the posterior as a Gaussian, with the curvature of this objective for the globals."""
        return MarginalLaplace().gaussian(problem, maximum)

    def posterior(self, problem: Problem, gaussian: LaplaceGaussian, seed: int) -> Posterior:
        """Return globals by importance sampling of this density, and units by that of the model given each of them."""
        globals_ = marginal_sample(problem.integrals, self.rule, gaussian, seed)
        return Posterior(problem, gaussian, globals_, WeightedUnits(gaussian, problem.integrals, self.rule), seed)


# Posterior standard deviations between the gradients whose difference is a curvature: the error is a few 1e-7 of it.
_STEP = 1e-3


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
        """Those of the rule."""
        return self.rule.points(self.problem.start.shape[1], self.problem.loc)

    def _evaluate(self) -> Evaluation:
        problem, globals_ = self.problem, self.problem.loc.unsqueeze(0)
        found = problem.integrals.values_and_gradients(
            self.points, QuadraturePoints.log_integral, globals_, problem.start.unsqueeze(0)
        )
        _refuse_lost(problem, found)
        problem.remember(found.mode[0])
        return Evaluation(float(found.values), to_vector([found.gradients[0]]))

    def information(self, whitening: Whitening) -> Vector:
        """Return minus the second derivative where the guide stands, from differences of exact gradients, ``(d, d)``.

        :param Whitening whitening: have the steps.
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


def _refuse_lost(problem: Problem, found: Integrals) -> None:
    """Raise where the mode of a unit was not found.

    :raises ModeNotFoundError: naming the first.
    """
    lost = found.lost.any(0).nonzero().squeeze(-1).tolist()
    if lost:
        raise ModeNotFoundError(
            f"the conditional mode was not found for {len(lost)} of {found.lost.shape[1]} units, the first of them "
            f"{problem.unit_model.describe(lost[0])}. Did the globals run away? Start elsewhere:\n"
            "    fit(model, guide, *args, starts=20)",
            units=problem.unit_model.units[lost].tolist(),
            status=[ModeStatus.MAX_STEPS] * len(lost),
        )
