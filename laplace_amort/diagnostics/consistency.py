r"""Whether a marginal density belongs to its model: its score at the optimum, averaged over data drawn from the model.

The derivative of the log probability of data, :math:`\nabla_\theta \log p(z \mid \theta)`, is zero on average over data
drawn at the same :math:`\theta`. Where an approximation is biased, or terms have wrong weights, it is not; and the
average, times the covariance of the globals, is by how much the globals are off.

Reference: ``checkConsistency`` of Kristensen et al. (2016), *TMB: Automatic Differentiation and Laplace Approximation*,
Journal of Statistical Software 70(5).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy
import scipy.stats
import torch
from torch import Tensor
from tqdm import tqdm

from laplace_amort.errors import NUMERICAL_ERRORS
from laplace_amort.guide import LaplaceGaussian, Problem
from laplace_amort.types import Vector, to_numpy
from laplace_amort.units import QuadraturePoints, QuadratureRule, UnitIntegrals

__all__ = ["Consistency", "check_consistency"]


@dataclass(frozen=True)
class Consistency:
    """What the scores of simulated data say.

    :param Vector bias: of the globals in unconstrained space, in posterior standard deviations, ``(d,)``.
    :param Vector error: standard error of that, ``(d,)``.
    :param float p_value: that scores with an average of zero have one as large as this (Hotelling's test).
    :param int num_simulations: that came through.
    :param int num_failed: in which a mode was not found.
    """

    bias: Vector
    error: Vector
    p_value: float
    num_simulations: int
    num_failed: int


def check_consistency(
    problem: Problem,
    gaussian: LaplaceGaussian,
    rule: QuadratureRule,
    num_simulations: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> Consistency:
    """Draw data from the model at the center of a posterior, and average their scores.

    Each simulation costs one run of the model to draw and one gradient of the marginal density, of some data sets
    together where the model can be recorded. A user may interrupt it (Ctrl-C): what was simulated counts.

    Do not use it for one global in a handful of units: a score of few terms is not normal, and the test is a rough one.

    :param Problem problem: the model at its data.
    :param LaplaceGaussian gaussian: the posterior of the globals.
    :param QuadratureRule rule: how units are integrated over.
    :param int num_simulations: data sets, more than there are globals.
    :param int seed: of the simulations; the state of torch's generator stays as it is.
    :param bool progress: whether to show a bar, where standard error is a terminal.
    :raises ModelError: if the model has a ``pyro.factor``, which no data can be drawn from.
    :raises ValueError: if there are fewer simulations than globals and two.
    """
    d = len(gaussian.global_loc)
    if num_simulations < d + 2:
        raise ValueError(f"{num_simulations} simulations say nothing of {d} globals: take at least {d + 2}")
    points = rule.points(gaussian.local_loc.shape[1], gaussian.global_loc)
    scores: list[Vector] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bar = tqdm(total=num_simulations, desc="simulations", disable=None if progress else True, leave=False)
        with bar, contextlib.suppress(KeyboardInterrupt):
            for likelihood, rows in problem.simulations(gaussian, num_simulations):
                scores.append(_scores(likelihood, gaussian, points, rows)[:, :d])
                bar.update(len(rows))
    found = numpy.concatenate(scores) if scores else numpy.zeros((0, d))
    known = numpy.isfinite(found).all(1)
    return _tested(found[known], gaussian, int((~known).sum()))


def _scores(likelihood: UnitIntegrals, gaussian: LaplaceGaussian, points: QuadraturePoints, rows: Tensor) -> Vector:
    """Differentiate the log probabilities of data sets, a row for each; NaN where that is not possible."""
    # The modes of the data at hand tell nothing of those of others but where they are on the whole.
    start = gaussian.local_loc.mean(0).expand(len(rows), *gaussian.local_loc.shape)
    try:
        near = likelihood.conditionals(rows, start).mode
        found = likelihood.values_and_gradients(points, QuadraturePoints.log_integral, rows, near)
    except NUMERICAL_ERRORS:
        return numpy.full(tuple(rows.shape), numpy.nan)
    return to_numpy(found.gradients.masked_fill(found.lost.any(-1, keepdim=True), torch.nan))


def _tested(scores: Vector, gaussian: LaplaceGaussian, failed: int) -> Consistency:
    """Test whether scores ``(S, d)`` are zero on average."""
    n, d = scores.shape
    covariance = to_numpy(gaussian.precision.global_covariance())
    sd = numpy.sqrt(numpy.diag(covariance))
    if n < d + 2 or d == 0:
        nothing = numpy.full(d, numpy.nan)
        return Consistency(nothing, nothing, float("nan"), n, failed)
    moved = scores @ covariance / sd
    bias, error = moved.mean(0), moved.std(0, ddof=1) / n**0.5
    spread = numpy.cov(scores, rowvar=False).reshape(d, d)
    statistic = n * scores.mean(0) @ numpy.linalg.pinv(spread) @ scores.mean(0)
    p_value = float(scipy.stats.f.sf(statistic * (n - d) / (d * (n - 1)), d, n - d))
    return Consistency(bias, error, p_value, n, failed)
