r"""The marginal density of the globals at many draws.

Every draw has the Laplace approximation, of one point for each unit. What a rule of many points adds to it,

.. math:: c(\theta) = \sum_i M_i(\theta) - \sum_i M_i^\text{Laplace}(\theta),

is a smooth function of few variables, the sum over all units: a polynomial through some of the draws gives it at the
others. How well it does so is seen at the draws themselves; where it does not, every draw has all points.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from laplace_amort.posterior.importance import ImportanceSampler
from laplace_amort.posterior.unit_draws import NestedUnits
from laplace_amort.posterior.weighted import ImportanceSample
from laplace_amort.types import Vector, to_numpy
from laplace_amort.units import Conditionals, Laplace, QuadraturePoints, QuadratureRule

__all__ = ["MarginalDensity", "log_densities", "marginal_sample"]

# Points of a rule from which on it is worth a regression.
_MANY = 8
# Draws for each coefficient, and coefficients of all products of two globals at most; beyond, squares alone.
_EACH, _COEFFICIENTS = 3, 45
# Standard deviation of what the polynomial leaves, in logarithms of the density. It is unlike the globals and their
# squares, so that it moves means by far less standard deviations than that.
_ACCURACY = 0.05
# How far a polynomial reaches, as a multiple of where the draws are that it goes through, and at least.
_REACH, _LEAST = 1.5, 4.0
# Draws of every later call at which the polynomial is tried.
_TRIED = 16


def marginal_sample(
    units: NestedUnits,
    seed: int,
    sampler: ImportanceSampler = ImportanceSampler(),  # noqa: B008 (never changes)
) -> ImportanceSample:
    """Draw globals from their marginal density.

    :param NestedUnits units: given the globals; their Gaussian is the first proposal.
    :param int seed: of the draws.
    :param ImportanceSampler sampler: how many, in what rounds; its seed is added.
    """
    precision = units.gaussian.precision
    sampler = dataclasses.replace(sampler, seed=sampler.seed + seed)
    with torch.no_grad():
        log_density = MarginalDensity(units)
        loc, scale_tril = to_numpy(units.gaussian.global_loc), to_numpy(precision.global_scale_tril)
        return sampler(log_density, loc, scale_tril, rough=log_density.rough)


def log_densities(units: NestedUnits, rule: QuadratureRule, globals_: Tensor, there: Conditionals) -> Vector:
    """Return marginal log densities by a rule, ``(S,)``; NaN where a mode was not found.

    :param NestedUnits units: given the globals.
    :param QuadratureRule rule: how they are integrated over.
    :param Tensor globals_: ``(S, d)``.
    :param Conditionals there: of the units at these globals.
    """
    points = rule.points(there.mode.shape[-1], globals_)
    values: Vector = to_numpy(
        units.integrals.values_given(there, points, QuadraturePoints.log_integral, globals_).values
    )
    return values


class MarginalDensity:
    """The marginal log density at draws of the globals, to be called with ``(S, d)``; returns ``(S,)``.

    NaN where a mode was not found. The first draws that it is called with are those that the polynomial goes through.

    :param NestedUnits units: given the globals.
    """

    def __init__(self, units: NestedUnits) -> None:
        self.units = units
        gaussian = units.gaussian
        self._loc, self._tril = to_numpy(gaussian.global_loc), to_numpy(gaussian.precision.global_scale_tril)
        num_points = len(units.how.points(gaussian.local_loc.shape[1], gaussian.global_loc).points)
        self._polynomial: _Polynomial | None = None
        self._is_direct = num_points < _MANY or not len(self._loc)

    def __call__(self, draws: Vector) -> Vector:
        """Evaluate it; see the class."""
        globals_ = torch.from_numpy(draws).to(self.units.gaussian.global_loc)
        there = self.units.conditionals(globals_)
        some = self._looked_at(draws)
        if not some:
            return self._by(self.units.how, globals_, there)
        rough = self._by(Laplace(), globals_, there)
        exact = self._by(self.units.how, globals_[:some], Conditionals(*(part[:some] for part in there)))
        z: Vector = numpy.linalg.solve(self._tril, (draws - self._loc).T).T.astype(float)
        if self._polynomial is None:
            self._polynomial = _Polynomial.through(z[:some], exact, rough[:some])
            self._is_direct = self._polynomial is None
        known = self._polynomial
        if known is None or not known.holds(z[:some], exact, rough[:some]):
            return self._by(self.units.how, globals_, there)
        values: Vector = numpy.concatenate([exact, rough[some:] + known.at(z[some:])])
        return values

    def rough(self, draws: Vector) -> Vector:
        """Evaluate the Laplace approximation alone, ``(S,)``."""
        globals_ = torch.from_numpy(draws).to(self.units.gaussian.global_loc)
        return self._by(Laplace(), globals_, self.units.conditionals(globals_))

    def _looked_at(self, draws: Vector) -> int:
        """At how many draws to look at all points beside the one; 0 where all draws have them."""
        if self._is_direct:
            return 0
        some = _TRIED if self._polynomial else _EACH * len(_products(draws.shape[1]))
        return some if 2 * some <= len(draws) else 0

    def _by(self, rule: QuadratureRule, globals_: Tensor, there: Conditionals) -> Vector:
        return log_densities(self.units, rule, globals_, there)


def _products(dim: int) -> list[tuple[int, ...]]:
    """The products of coordinates that a polynomial of second degree has: all of them, or no mixed ones."""
    every = [pick for degree in range(3) for pick in itertools.combinations_with_replacement(range(dim), degree)]
    return every if len(every) <= _COEFFICIENTS else [pick for pick in every if len(set(pick)) < 2]


@dataclass(frozen=True)
class _Polynomial:
    """What all points add to one, as a polynomial of the standardized globals.

    :param Vector coefficients: of :func:`_products`.
    :param float typical: the log density at a typical draw: what lies far below is of no weight.
    :param Vector reach: how far from the center it is one, ``(d,)``. Further out it is what it is there: squares that
        grow on would outgrow a density whose tail falls slowly.
    """

    coefficients: Vector
    typical: float
    reach: Vector

    @classmethod
    def through(cls, z: Vector, exact: Vector, rough: Vector) -> _Polynomial | None:
        """Return the one through some draws; None if it does not go through them."""
        known = numpy.isfinite(exact - rough)
        z, exact, rough = z[known], exact[known], rough[known]
        features = _features(z)
        coefficients, *_ = numpy.linalg.lstsq(features, exact - rough, rcond=None)
        left = exact - rough - features @ coefficients
        freedom = len(z) - features.shape[1]
        goes_through = freedom > 0 and (left**2).sum() <= freedom * _ACCURACY**2
        if not goes_through:
            return None
        reach = numpy.maximum(_REACH * numpy.abs(z).max(0), _LEAST)
        return cls(numpy.asarray(coefficients, dtype=float), float(numpy.median(exact)), reach)

    def at(self, z: Vector) -> Vector:
        """Evaluate it at standardized globals ``(S, d)``, as ``(S,)``."""
        values: Vector = _features(z.clip(-self.reach, self.reach)) @ self.coefficients
        return values

    def holds(self, z: Vector, exact: Vector, rough: Vector) -> bool:
        """Whether it is accurate at other draws, each of which counts as its density does."""
        left = numpy.where(numpy.isfinite(exact), exact - rough - self.at(z), 0.0)
        weights = numpy.exp(numpy.minimum(0.0, numpy.nan_to_num(exact, nan=-numpy.inf) - self.typical))
        return bool((weights * left**2).mean() <= _ACCURACY**2 and numpy.isfinite(left).all())


def _features(z: Vector) -> Vector:
    return numpy.stack([z[:, list(pick)].prod(1) for pick in _products(z.shape[1])], axis=1)
