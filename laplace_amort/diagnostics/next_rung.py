"""The next rung of a fit: the same posterior with better integrals over the units, which it is compared with."""

from __future__ import annotations

import dataclasses

import numpy

from laplace_amort.fitting import FitResult, MarginalQuadrature
from laplace_amort.posterior import NestedUnits, Posterior, WeightedUnits, log_densities, marginal_sample
from laplace_amort.units import GRID_DIM, GaussHermite, Laplace, QuadratureRule, StudentPoints

__all__ = ["against_next", "next_rule", "rule_of"]

# Draws of the globals at which two rules are compared, and for each global at least.
_DRAWS, _EACH = 128, 4


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


def against_next(result: FitResult, seed: int) -> tuple[Posterior, Posterior]:
    """Return the posterior of a fit, and that by the next rule, at the same draws of the globals.

    Of a Gaussian, the draws are others: its own would not show what it leaves out.

    :param FitResult result: the fit, with a posterior.
    :param int seed: added to that of the fit, for the draws of the globals where these are others.
    """
    own, rule = result.posterior, next_rule(result)
    known = own.units
    if not isinstance(known, NestedUnits) or numpy.isnan(own.log_evidence):
        units = WeightedUnits(own.gaussian, result.problem.integrals, rule)
        sample = marginal_sample(units, result.seed + seed)
        reference = Posterior(result.problem, own.gaussian, sample, units, own.seed)
        return own, reference
    own = own.part(max(_DRAWS, _EACH * own.gaussian.global_loc.numel()))
    units, (globals_, _) = known.by(rule), own.weighted_globals()
    there = units.conditionals(globals_)
    old, new = (log_densities(units, one, globals_, there) for one in (rule_of(result), rule))
    return own, dataclasses.replace(own, globals_=own.globals_.reweighted(new - old), units=units)
