"""Quasi-random points of normal and Student-t distributions."""

from __future__ import annotations

import math

import numpy
import scipy.special
import torch

from laplace_amort.types import Vector

__all__ = ["matched_normal", "sobol_points", "student_log_density", "student_points"]


def sobol_points(num_points: int, dim: int, seed: int) -> Vector:
    """Return scrambled Sobol points inside of the unit cube, ``(Q, dim)``.

    :param int num_points: ``Q``; the first of a sequence whose balance is best at powers of two.
    :param int dim: of the cube.
    :param int seed: of the scrambling.
    """
    engine = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed)
    points: Vector = engine.draw(num_points, dtype=torch.float64).clamp(1e-12, 1 - 1e-12).numpy()
    return points


def matched_normal(number: int, dim: int, seed: int) -> Vector:
    """Return quasi-random standard normal points ``(S, d)`` whose mean is zero and whose covariance is the identity.

    :param int number: ``S``, above ``d``.
    :param int dim: ``d``.
    :param int seed: of the points.
    """
    points = scipy.special.ndtri(sobol_points(number, dim, seed))
    points = points - points.mean(0)
    factor = numpy.linalg.cholesky(points.T @ points / number)
    matched: Vector = numpy.linalg.solve(factor, points.T).T
    return matched


def student_points(uniform: Vector, df: float) -> Vector:
    """Return points of a standard multivariate t: one uniform coordinate each, and one for the scale if k > 1.

    :param uniform: ``(Q, 1)``, or ``(Q, k + 1)``.
    :param float df: degrees of freedom.
    :return: ``(Q, k)``.
    """
    if uniform.shape[-1] == 1:
        return scipy.special.stdtrit(df, uniform)
    normal = scipy.special.ndtri(uniform[..., :-1])
    return normal * numpy.sqrt(df / (2 * scipy.special.gammaincinv(df / 2, uniform[..., -1:])))


def student_log_density(points: Vector, df: float) -> Vector:
    """Return the log density of a standard multivariate t at points ``(*, k)``, as ``(*,)``."""
    k = points.shape[-1]
    constant = scipy.special.gammaln((df + k) / 2) - scipy.special.gammaln(df / 2) - k / 2 * math.log(df * math.pi)
    return constant - (df + k) / 2 * numpy.log1p((points**2).sum(-1) / df)
