"""The next rung of a fit: the same posterior with better integrals over the units, which it is compared with."""

from __future__ import annotations

from laplace_amort.fitting import FitResult, MarginalQuadrature
from laplace_amort.posterior import Posterior, WeightedUnits, marginal_sample
from laplace_amort.units import GRID_DIM, GaussHermite, Laplace, QuadratureRule, StudentPoints

__all__ = ["next_posterior", "next_rule", "rule_of"]

# Numbers of all units together that are averaged over, by which the draws of the globals are fewer; and these at least.
_AVERAGED, _LEAST = 2**21, 128


def rule_of(result: FitResult) -> QuadratureRule:
    """Return how a fit integrates over units: of all but a quadrature, one point each.

    :param FitResult result: the fit.
    """
    objective = result.maximized
    return objective.rule if isinstance(objective, MarginalQuadrature) else Laplace()


def next_rule(result: FitResult) -> QuadratureRule:
    """Return the rule to compare with: more points, and from one point to enough of them.

    :param FitResult result: the fit.
    """
    rule, k = rule_of(result), result.problem.start.shape[1]
    if isinstance(rule, Laplace):
        return GaussHermite(9 if k <= 2 else 5) if k <= GRID_DIM else StudentPoints(256)
    return rule.finer(k)


def next_posterior(result: FitResult, seed: int) -> Posterior:
    """Return the posterior by the next rule, with the same draws as far as possible.

    :param FitResult result: the fit, with a posterior.
    :param int seed: added to that of the fit, for the draws of the globals.
    """
    gaussian, integrals = result.posterior.gaussian, result.problem.integrals
    rule = next_rule(result)
    globals_ = marginal_sample(integrals, rule, gaussian, result.seed + seed)
    averaged = max(_LEAST, _AVERAGED // max(gaussian.local_loc.numel(), 1))
    units = WeightedUnits(gaussian, integrals, rule)
    return Posterior(result.problem, gaussian, globals_, units, result.posterior.seed, averaged)
