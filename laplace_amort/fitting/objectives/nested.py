"""The ELBO of a guide whose units follow every draw of the globals, as an objective."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from laplace_amort.fitting.evaluation import Evaluation
from laplace_amort.fitting.objectives.base import ObjectiveFunction, posterior_whitening, refuse_lost_units
from laplace_amort.fitting.objectives.draws import antithetic_draws, mean_of_pairs
from laplace_amort.fitting.objectives.elbo import FixedDrawELBO
from laplace_amort.guide import LaplaceGaussian, Problem, to_vector
from laplace_amort.linalg import Whitening
from laplace_amort.posterior import NestedUnits, Posterior, gaussian_sample
from laplace_amort.units import FreeMode, GaussHermite, QuadraturePoints, QuadratureRule

__all__ = ["NestedELBO", "NestedFunction"]


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

    :param QuadratureRule rule: how units are averaged over: of the normal distribution.

    The other parameters are those of :class:`~laplace_amort.FixedDrawELBO`.
    """

    rule: QuadratureRule = GaussHermite(5)

    def check(self, problem: Problem) -> None:
        """Refuse what this objective is none for; see :class:`~laplace_amort.fitting.objectives.base.Objective`."""
        problem.refuse_model_parameters()
        _ = problem.integrals

    def posterior(self, problem: Problem, gaussian: LaplaceGaussian, seed: int) -> Posterior:
        """Return the nested guide itself."""
        return Posterior(
            problem, gaussian, gaussian_sample(gaussian, seed), NestedUnits(gaussian, problem.integrals), seed
        )

    def bind(self, problem: Problem, num_draws: int, seed: int) -> NestedFunction:  # type: ignore[override]
        """Return the objective for a guide, its data, and as many draws."""
        return NestedFunction(problem, self.rule, num_draws, seed)


class NestedFunction(ObjectiveFunction):
    """A :class:`~laplace_amort.NestedELBO` of one guide at given data, with its draws of the globals.

    :param Problem problem: the guide and the data.
    :param QuadratureRule rule: how units are averaged over.
    :param int num_draws: number of draws.
    :param int seed: of the draws.
    """

    def __init__(self, problem: Problem, rule: QuadratureRule, num_draws: int, seed: int) -> None:
        leaves = [leaf for leaf in problem.parameters() if not _is_center(problem, leaf)]
        super().__init__(problem, leaves)
        self.num_draws, self.seed = num_draws, seed
        self.points = rule.points(problem.start.shape[1], problem.loc)

    @cached_property
    def noise(self) -> Tensor:
        """The draws of the globals, ``(S, d)``."""
        return antithetic_draws(self.num_draws, self.problem.loc, self.problem.start[:0], self.seed).global_

    def whitening(self) -> Whitening:
        """Return coordinates in which the posterior is standard normal, as far as the marginal curvature knows it."""
        return posterior_whitening(self.problem, sum(p.numel() for p in self.parameters), with_units=False)

    def _evaluate(self) -> Evaluation:
        with torch.enable_grad():
            gaussian = self._gaussian()
            globals_ = self._at(gaussian)
            log_det = gaussian.precision.global_scale_tril.diagonal().log().sum()
        fixed = globals_.detach()
        found = self.problem.integrals.values_and_gradients(
            self.points, QuadraturePoints.mean_gain, fixed, self.problem.start_at(fixed)
        )
        refuse_lost_units(self.problem, found)
        with torch.enable_grad():
            surrogate = (found.gradients * globals_).sum() / self.num_draws + log_det
        value, error = mean_of_pairs(found.values + self._entropy(log_det))
        return Evaluation(value, to_vector(self._gradients_of(surrogate)), standard_error=error)

    @torch.no_grad()
    def values(self) -> Tensor:
        """Return the terms whose mean is the value, ``(S,)``, pairs of draws half the number apart."""
        gaussian = self._gaussian()
        globals_ = self._at(gaussian)
        found = self.problem.integrals.values(
            self.points, QuadraturePoints.mean_gain, globals_, self.problem.start_at(globals_)
        )
        return found.values + self._entropy(gaussian.precision.global_scale_tril.diagonal().log().sum())

    def _gaussian(self) -> LaplaceGaussian:
        return self.problem.gaussian(mode=self.problem.mode)

    def _at(self, gaussian: LaplaceGaussian) -> Tensor:
        return gaussian.global_loc + self.noise @ gaussian.precision.global_scale_tril.mT

    def _entropy(self, log_det: Tensor) -> Tensor:
        """Return minus the log density of the globals at their draws, ``(S,)``, without a graph."""
        return (self.noise**2).sum(-1) / 2 + self.noise.shape[1] / 2 * math.log(2 * math.pi) + log_det.detach()


def _is_center(problem: Problem, leaf: Tensor) -> bool:
    """Whether a parameter is the centers of units, of which nothing here depends."""
    mode = problem.guide.mode
    return isinstance(mode, FreeMode) and any(leaf is parameter for parameter in mode.parameters())
