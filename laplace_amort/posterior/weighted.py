"""Weighted draws of a few variables, and how well they know moments."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy
import scipy.special

from laplace_amort.posterior.psis import pareto_smoothed
from laplace_amort.types import Vector
from laplace_amort.units import matched_normal

__all__ = ["SETS", "ImportanceSample", "error_of_moments", "normal_sample"]

SETS = 8
"""Sets that the draws are split into to see the error."""


@dataclass(frozen=True)
class ImportanceSample:
    """Weighted draws.

    :param Vector draws: ``(S, d)``.
    :param Vector log_weights: normalized and smoothed, ``(S,)``.
    :param float k_hat: shape of the tail of the weights: above 0.7 do not rely on them.
    :param float effective: effective number of draws.
    :param float error: standard error of the worst mean, in standard deviations, or of the worst standard deviation, as
        a share of it; whichever is larger. From sets of the draws, which together are better than that.
    :param float log_integral: of the density.
    :param int num_lost: draws where the density was NaN; they have no weight.
    :param str note: what was wrong with the proposals; empty if nothing was.
    :param sets: which of eight balanced parts of the sequence each draw belongs to, ``(S,)``; by default eighths.
    :param float known: share of a draw that pulls no moment of the globals themselves.
    """

    draws: Vector
    log_weights: Vector
    k_hat: float
    effective: float
    error: float
    log_integral: float
    num_lost: int
    note: str = ""
    sets: Any = field(default=None, repr=False, compare=False)
    known: float = field(default=0.0, repr=False, compare=False)

    def __repr__(self) -> str:
        number, d = self.draws.shape
        weighted = f", k-hat {self.k_hat:.2g}" if self.k_hat > -math.inf else ""
        return f"ImportanceSample({number} draws in {d} dimensions, effective {self.effective:.0f}{weighted})"

    @property
    def weights(self) -> Vector:
        """The weights, ``(S,)``."""
        weights: Vector = numpy.exp(self.log_weights)
        return weights

    def mean(self) -> Vector:
        """Return the weighted mean, ``(d,)``."""
        mean: Vector = self.weights @ self.draws
        return mean

    def covariance(self) -> Vector:
        """Return the weighted covariance, ``(d, d)``."""
        centered = self.draws - self.mean()
        covariance: Vector = (self.weights[:, None] * centered).T @ centered
        return covariance

    def errors_of(self, values: Vector) -> tuple[Vector, Vector]:
        """Return the standard errors of moments of functions of the draws, by sampling.

        :param Vector values: of the functions at the draws, ``(S, D)``.
        :return: of the means, in standard deviations, and of the standard deviations, as shares, ``(D,)`` each.
        """
        mean, shares = self.weights @ values, self.weights - self.known
        z = (values - mean) / numpy.sqrt(self.weights @ (values - mean) ** 2).clip(min=numpy.finfo(float).tiny)
        sets = numpy.arange(len(shares)) * SETS // len(shares) if self.sets is None else self.sets
        return _pulled(shares, z, sets), _pulled(shares, (z**2 - 1) / 2, sets)

    def reweighted(self, log_factors: Vector) -> ImportanceSample:
        """Return the same draws as draws of another density, by what that is as a multiple of this one.

        :param Vector log_factors: logarithms of the multiples, ``(S,)``. The error is that of the changes of moments.
        """
        log_weights = self.log_weights + numpy.nan_to_num(log_factors, nan=-numpy.inf)
        total = float(scipy.special.logsumexp(log_weights))
        weights = numpy.exp(log_weights - total)
        sets = numpy.arange(len(weights)) * SETS // len(weights)
        return ImportanceSample(
            draws=self.draws,
            log_weights=log_weights - total,
            k_hat=float(pareto_smoothed(log_weights).k_hat),
            effective=float(1 / (weights**2).sum()),
            error=error_of_moments(self, weights - self.weights, sets),
            log_integral=self.log_integral + total,
            num_lost=int(numpy.isnan(log_factors).sum()),
        )


def error_of_moments(found: ImportanceSample, shares: Vector, sets: Any) -> float:
    """The standard error of the worst moment: what sets of draws pull it by, each on its own.

    :param ImportanceSample found: has the draws.
    :param Vector shares: what each draw pulls by, ``(S,)``.
    :param sets: which each belongs to, ``(S,)``.
    """
    scale = numpy.sqrt(numpy.diag(found.covariance()).clip(min=numpy.finfo(float).tiny))
    z = (found.draws - found.mean()) / scale
    return float(_pulled(shares, numpy.concatenate([z, (z**2 - 1) / 2], axis=1), sets).max(initial=0.0))


def _pulled(shares: Vector, features: Vector, sets: Any) -> Vector:
    """The standard errors of averages of features ``(S, D)``, by what each set of draws adds to them, ``(D,)``."""
    pulls = shares[:, None] * features
    sums = numpy.array([pulls[sets == one].sum(0) for one in range(SETS)])
    errors: Vector = sums.std(0, ddof=1) * SETS**0.5
    return errors


def normal_sample(loc: Vector, scale_tril: Vector, num_draws: int = 1024, seed: int = 0) -> ImportanceSample:
    """Return quasi-random draws of a normal distribution, all of the same weight.

    :param Vector loc: ``(d,)``.
    :param Vector scale_tril: lower triangular, ``(d, d)``.
    :param int num_draws: a power of two.
    :param int seed: of the draws.
    """
    num_draws = num_draws if len(loc) else 1
    noise = matched_normal(num_draws, len(loc), seed) if len(loc) else numpy.zeros((1, 0))
    log_weights = numpy.full(num_draws, -math.log(num_draws))
    return ImportanceSample(loc + noise @ scale_tril.T, log_weights, -math.inf, float(num_draws), 0.0, math.nan, 0)
