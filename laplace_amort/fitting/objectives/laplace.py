"""The Laplace approximation to the marginal density of the globals, as an objective."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy
import torch

from laplace_amort.fitting.evaluation import Evaluation, Maximum
from laplace_amort.fitting.history import History
from laplace_amort.fitting.objectives.base import Objective, ObjectiveFunction
from laplace_amort.fitting.optimizers import Optimizer, TrustRegion, newton_decrement
from laplace_amort.guide import Head, KnownCurvature, LaplaceGaussian, MarginalCurvature, Problem, to_vector
from laplace_amort.linalg import Whitening
from laplace_amort.posterior import NestedUnits, Posterior, marginal_sample
from laplace_amort.units import NewtonMode, default_tolerance, laplace_marginal

__all__ = ["LaplaceFunction", "MarginalLaplace"]


@dataclass(frozen=True)
class MarginalLaplace:
    r"""The Laplace approximation to the marginal density of the globals: what TMB maximizes.

    .. math:: \log p(\theta, \hat y(\theta), z) - \tfrac12 \sum_i \log|U_i| + \tfrac{N k}{2} \log 2\pi,

    a function of the globals alone, with exact gradient and Hessian through the mode. Its optimum is the posterior mode
    of the globals in unconstrained space, to Laplace order, and its curvature there gives their standard errors and, by
    the delta method, those of the units.

    Do not use it where a unit says little and units are many: its bias does not fall with their number, while the
    standard errors do. And do not compare its value with an ELBO, or with that of another parameterization.

    Reference: Kristensen et al. (2016), *TMB: Automatic Differentiation and Laplace Approximation*, Journal of
    Statistical Software 70(5), https://doi.org/10.18637/jss.v070.i05
    """

    @property
    def start_with(self) -> Objective | None:
        """None: this is what others start with."""
        return None

    def check(self, problem: Problem) -> None:
        """Refuse a model with parameters of its own, which this does not move."""
        problem.refuse_model_parameters()

    def gaussian(self, problem: Problem, maximum: Maximum) -> LaplaceGaussian:
        """Return the posterior as a Gaussian, with the curvature of this objective for the globals."""
        information = maximum.evaluation.information
        head: Head = MarginalCurvature() if information is None else KnownCurvature(information)
        return problem.gaussian(mode=problem.mode, head=head)

    def posterior(self, problem: Problem, gaussian: LaplaceGaussian, seed: int) -> Posterior:
        """Return the globals by importance sampling of this density, and the units as normal given each of them."""
        units = NestedUnits(gaussian, problem.integrals)
        return Posterior(problem, gaussian, marginal_sample(units, seed), units, seed)

    def bind(self, problem: Problem) -> LaplaceFunction:
        """Return the objective for a guide and its data."""
        return LaplaceFunction(problem)

    @property
    def default_optimizer(self) -> Optimizer:
        """What suits it: Newton's method."""
        return TrustRegion()

    def climb(self, history: History, optimizer: Optimizer) -> Maximum:
        """Maximize from where the guide stands, and put the guide there."""
        function = self.bind(history.problem)
        value = history.watched("marginal Laplace", function, newton_decrement)
        start = function.point()

        def whitening() -> Whitening:
            information = value(start).information
            return Whitening.of_information(numpy.eye(len(start)) if information is None else information)

        maximum = history.maximize(optimizer, value, start, whitening)
        function.move(maximum.point)
        return maximum


class LaplaceFunction(ObjectiveFunction):
    """A :class:`~laplace_amort.MarginalLaplace` of one guide at given data.

    :param Problem problem: the guide and the data.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, problem.globals_())
        self.mode = problem.mode
        if isinstance(self.mode, NewtonMode) and self.mode.tolerance is None:
            # A mode is taken one Newton step past where the search ends, and nothing here is differentiated through it.
            # So half as many digits do, which is an evaluation of all units less in every search.
            self.mode = dataclasses.replace(self.mode, tolerance=default_tolerance(problem.loc.dtype) ** 0.5)

    @torch.no_grad()
    def _evaluate(self) -> Evaluation:
        problem, model, global_ = self.problem, self.problem.unit_model, self.problem.loc
        local = self.mode.find(model, global_, problem.start)
        found = laplace_marginal(model.log_joint, global_, local, problem.weight)
        problem.remember(local, found.regression)
        information = found.information.double().cpu().numpy()
        return Evaluation(float(found.value), to_vector([found.gradient]), information)
