"""Proposals of importance sampling: a normal distribution, and a t distribution with two scales along each axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy

from laplace_amort.types import Vector
from laplace_amort.units import matched_normal, sobol_points, student_log_density, student_points

__all__ = ["DF", "STRETCH", "Normal", "SplitT", "split_along_axes"]

# Of the proposals: tails that are heavier than those of any posterior in unconstrained space with proper priors.
DF = 5.0
# Standard deviations from the mode where the density is looked at along each axis, and by what factors the scale of a
# half may differ from that of the curvature.
_LOOKED = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
STRETCH = 0.5, 4.0


@dataclass(frozen=True)
class SplitT:
    """A multivariate t distribution, stretched along each axis by one factor ahead and another behind.

    :param Vector loc: ``(d,)``.
    :param Vector tril: lower triangular, ``(d, d)``.
    :param Vector stretch: behind and ahead, ``(2, d)``.
    """

    loc: Vector
    tril: Vector
    stretch: Vector

    def draw(self, number: int, seed: int) -> Vector:
        """Quasi-random draws, ``(S, d)``."""
        d = len(self.loc)
        z = student_points(sobol_points(number, d + (d > 1), seed), DF)
        draws: Vector = self.loc + (z * numpy.where(z < 0, *self.stretch)) @ self.tril.T
        return draws

    def log_density(self, draws: Vector) -> Vector:
        """At draws ``(S, d)``, as ``(S,)``."""
        z = numpy.linalg.solve(self.tril, (draws - self.loc).T).T
        stretch = numpy.where(z < 0, *self.stretch)
        log_det = numpy.log(numpy.diag(self.tril)).sum() + numpy.log(stretch).sum(-1)
        log_density: Vector = student_log_density(z / stretch, DF) - log_det
        return log_density


@dataclass(frozen=True)
class Normal:
    """A multivariate normal distribution.

    :param Vector loc: ``(d,)``.
    :param Vector tril: lower triangular, ``(d, d)``.
    """

    loc: Vector
    tril: Vector

    def draw(self, number: int, seed: int) -> Vector:
        """Quasi-random draws, ``(S, d)``, with exactly the mean and the covariance of the distribution."""
        draws: Vector = self.loc + matched_normal(number, len(self.loc), seed) @ self.tril.T
        return draws

    def log_density(self, draws: Vector) -> Vector:
        """At draws ``(S, d)``, as ``(S,)``."""
        z = numpy.linalg.solve(self.tril, (draws - self.loc).T).T
        constant = numpy.log(numpy.diag(self.tril)).sum() + len(self.loc) / 2 * math.log(2 * math.pi)
        log_density: Vector = -(z**2).sum(-1) / 2 - constant
        return log_density


def split_along_axes(log_density: Callable[[Vector], Vector], loc: Vector, tril: Vector) -> SplitT:
    """The split t whose halves fall off as the density does, each along its axis: the widest that any point asks for.

    Reference: Geweke (1989), *Bayesian inference in econometric models using Monte Carlo integration*, Econometrica
    57(6), section 4.
    """
    d, looked = len(loc), numpy.array(_LOOKED)
    steps = numpy.concatenate([-looked, looked])
    points = loc + (steps[:, None, None] * tril.T).reshape(-1, d)
    values = log_density(numpy.concatenate([loc[None], points]))
    with numpy.errstate(divide="ignore", invalid="ignore"):
        fall = 2 * (values[0] - values[1:]).reshape(2, len(looked), d)
        scales = looked[:, None] / numpy.sqrt(fall)
    # Where the density is no lower than at the mode, or does not exist, it says nothing of a scale.
    widest = numpy.where(numpy.isfinite(scales), scales, 1.0).max(1)
    return SplitT(loc, tril, widest.clip(*STRETCH))
