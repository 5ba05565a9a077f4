"""What a fit maximizes when it integrates over each unit, instead of trusting in one Gaussian for all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from laplace_amort.bound import elbo_coordinates
from laplace_amort.evaluation import Maximum
from laplace_amort.family import LaplaceGaussian
from laplace_amort.fit_status import FitStatus
from laplace_amort.identification import is_flat
from laplace_amort.objectives import FixedDrawELBO, MarginalLaplace, Objective
from laplace_amort.optimizers import Optimizer, QuasiNewton, newton_decrement
from laplace_amort.posterior import Posterior, gaussian_sample, marginal_sample
from laplace_amort.rules import GaussHermite, UnitRule
from laplace_amort.run import Run
from laplace_amort.target import Target
from laplace_amort.unit_bounds import BoundNested, BoundUnits
from laplace_amort.unit_draws import NestedUnits, WeightedUnits

__all__ = ["MarginalQuadrature", "NestedELBO"]

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

    :param UnitRule rule: how units are integrated over.
    :param start_with: an objective whose optimum is the start.

    Reference: Pinheiro & Chao (2006), *Efficient Laplacian and adaptive Gaussian quadrature algorithms for multilevel
    generalized linear mixed models*, Journal of Computational and Graphical Statistics 15(1).
    """

    rule: UnitRule = GaussHermite(9)
    start_with: Objective | None = MarginalLaplace()

    def check(self, target: Target) -> None:
        """Refuse what this objective is none for; see :class:`~laplace_amort.objectives.Objective`."""
        target.refuse_model_parameters()
        _ = target.integrals

    def bind(self, target: Target) -> BoundUnits:
        """Return the objective for a guide and its data."""
        return BoundUnits(target, self.rule)

    @property
    def default_optimizer(self) -> Optimizer:
        """What suits it: there is no second derivative."""
        return QuasiNewton()

    def climb(self, run: Run, optimizer: Optimizer) -> Maximum:
        """Maximize from where the guide stands, and put the guide there."""
        bound = self.bind(run.target)
        about = run.timed("coordinates", lambda: elbo_coordinates(run.target, len(bound.point()), with_units=False))
        function = run.function("quadrature", bound, lambda found: about.norm(found.gradient))
        maximum = optimizer.maximize(function, bound.point(), lambda: about)
        bound.move(maximum.point)
        if maximum.status is FitStatus.START_FAILED:
            return maximum
        information = run.timed("curvature", lambda: bound.information(about))
        if not numpy.isfinite(information).all():
            return maximum._replace(status=FitStatus.NO_MAXIMUM)
        evaluation = maximum.evaluation._replace(information=information)
        decrement = newton_decrement(evaluation)
        known = numpy.isfinite(decrement) and not is_flat(information, evaluation.rounding, _CHANCE)
        status = maximum.status if known else FitStatus.NO_MAXIMUM
        return Maximum(maximum.point, evaluation, status, decrement)

    def gaussian(self, target: Target, maximum: Maximum) -> LaplaceGaussian:
        """Return the posterior as a Gaussian, with the curvature of this objective for the globals."""
        return MarginalLaplace().gaussian(target, maximum)

    def posterior(self, target: Target, gaussian: LaplaceGaussian, seed: int) -> Posterior:
        """Return globals by importance sampling of this density, and units by that of the model given each of them."""
        globals_ = marginal_sample(target.integrals, self.rule, gaussian, seed)
        return Posterior(gaussian, globals_, WeightedUnits(gaussian, target.integrals, self.rule), seed)


@dataclass(frozen=True)
class NestedELBO(FixedDrawELBO):
    r"""The ELBO of a guide whose units follow every draw of the globals.

    .. math:: \theta \sim N(\hat\theta, S^{-1}), \qquad
              y_i \mid \theta \sim N\big(\hat y_i(\theta),\; U_i(\theta, \hat y_i(\theta))^{-1}\big),

    with :math:`\hat\theta` as the only parameter: not a linear shift of the mode, but the mode itself, and the
    curvature there. So the guide follows a funnel. The average over a unit is taken by a rule, which leaves draws of
    the globals alone. One evaluation costs as much as about ``3 Q S`` of the log joint, for ``S`` draws and ``Q``
    points of the rule.

    Do not use it for the tails of the units: they are a normal's. :class:`MarginalQuadrature` has no such limit.

    :param UnitRule rule: how units are averaged over: of the normal distribution.

    The other parameters are those of :class:`~laplace_amort.FixedDrawELBO`.
    """

    rule: UnitRule = GaussHermite(5)

    def check(self, target: Target) -> None:
        """Refuse what this objective is none for; see :class:`~laplace_amort.objectives.Objective`."""
        target.refuse_model_parameters()
        _ = target.integrals

    def posterior(self, target: Target, gaussian: LaplaceGaussian, seed: int) -> Posterior:
        """Return the nested guide itself."""
        return Posterior(gaussian, gaussian_sample(gaussian, seed), NestedUnits(gaussian, target.integrals), seed)

    def bind(self, target: Target, num_draws: int, seed: int) -> BoundNested:  # type: ignore[override]
        """Return the objective for a guide, its data, and as many draws."""
        return BoundNested(target, self.rule, num_draws, seed)
