"""The next rung of a posterior: the same with better integrals over the units, which it is compared with."""

from __future__ import annotations

import dataclasses

import numpy

from laplace_amort.posterior import NestedUnits, Posterior, WeightedUnits, log_densities, marginal_sample
from laplace_amort.units import Laplace, QuadratureRule, accurate_rule

__all__ = ["against_next", "next_rule"]

# Draws of the globals at which two rules are compared, and for each global at least. Fewer tell where the rules differ
# by a constant: means then move by no more standard deviations than the difference of their logarithms varies by.
_DRAWS, _EACH, _FEW, _CONSTANT = 128, 4, 16, 0.01


def next_rule(rule: QuadratureRule, local_dim: int) -> QuadratureRule:
    """Return the rule to compare with: more points, and from one point to enough of them.

    :param QuadratureRule rule: how units are integrated over.
    :param int local_dim: dimensions of a unit, ``k``.
    """
    if isinstance(rule, Laplace):
        return accurate_rule(local_dim)
    return rule.finer(local_dim)


def against_next(
    own: Posterior, rule: QuadratureRule, seed: int, finer: QuadratureRule | None = None
) -> tuple[Posterior, Posterior]:
    """Return a posterior, and that by a finer rule, at the same draws of the globals.

    Of a Gaussian, the draws are others: its own would not show what it leaves out.

    :param Posterior own: of some fit.
    :param QuadratureRule rule: by which its units are integrated over.
    :param int seed: of the draws of the globals where these are others.
    :param finer: the rule to compare with, by default the next.
    """
    known, finer = own.units, finer or next_rule(rule, own.gaussian.local_loc.shape[1])
    if not isinstance(known, NestedUnits) or numpy.isnan(own.log_evidence):
        units = WeightedUnits(own.gaussian, own.problem.integrals, finer)
        return own, Posterior(own.problem, own.gaussian, marginal_sample(units, seed), units, own.seed)
    units = known.by(finer)
    part, difference = own, numpy.zeros(0)
    for number in (_FEW, max(_DRAWS, _EACH * own.gaussian.global_loc.numel())):
        part = own.part(number)
        globals_, _ = part.weighted_globals()
        there = units.conditionals(globals_)
        old, new = (log_densities(units, one, globals_, there) for one in (rule, finer))
        difference = new - old
        if numpy.ptp(difference) <= _CONSTANT:
            break
    return part, dataclasses.replace(part, globals_=part.globals_.reweighted(difference), units=units)
