"""Pareto-smoothed importance weights, by ArviZ."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy

from laplace_amort.types import Vector

__all__ = ["K_GOOD", "Smoothed", "pareto_smoothed"]

# Shape of the tail above which importance weights say nothing reliable, by the reference below.
K_GOOD = 0.7
# Weights that a Pareto tail is fitted to, at least; and logarithms that differ by less, perhaps by rounding errors,
# count as the same.
_TAIL, _SAME = 5, 1e-3


class Smoothed(NamedTuple):
    """Weights after smoothing.

    :param Vector log_weights: normalized, ``(*, S)``.
    :param Vector k_hat: shape of the Pareto tail, ``(*,)``. Minus infinity where the largest weights are all the same;
        infinity where there are too few for a tail.
    """

    log_weights: Vector
    k_hat: Vector


def pareto_smoothed(log_ratios: Vector) -> Smoothed:
    """Smooth importance weights along the last axis.

    Do not use it for fewer than 25 weights: they have no tail to speak of.

    :param Vector log_ratios: unnormalized, ``(*, S)``; minus infinity is a weight of zero.

    Example: ratios that are all the same have no tail::

        >>> smoothed = pareto_smoothed(numpy.zeros(100))
        >>> numpy.exp(smoothed.log_weights).round(6)[:2], smoothed.k_hat
        (array([0.01, 0.01]), array(-inf))

    Reference: Vehtari, Simpson, Gelman, Yao & Gabry (2024), *Pareto smoothed importance sampling*, JMLR 25(72),
    https://arxiv.org/abs/1507.02646
    """
    rows = numpy.asarray(log_ratios, dtype=float).reshape(-1, numpy.shape(log_ratios)[-1])
    smooth = _smoother()
    log_weights, k_hat = numpy.empty_like(rows), numpy.empty(len(rows))
    for index, row in enumerate(rows):
        log_weights[index], k_hat[index] = _smoothed_row(row, smooth)
    shape = numpy.shape(log_ratios)
    return Smoothed(log_weights.reshape(shape), k_hat.reshape(shape[:-1]))


def _smoothed_row(row: Vector, smooth: Callable[[Vector], tuple[Vector, float]]) -> tuple[Vector, float]:
    largest = row.max()
    # Weights of nothing are small numbers, of which ArviZ takes differences.
    ratios = (
        numpy.maximum(row - largest, numpy.log(numpy.finfo(float).tiny))
        if numpy.isfinite(largest)
        else numpy.zeros_like(row)
    )
    plain = ratios - numpy.log(numpy.exp(ratios).sum())
    tail = numpy.sort(ratios)[-_TAIL:]
    if len(row) // 5 < _TAIL or not numpy.isfinite(largest):
        return plain, numpy.inf
    if numpy.ptp(ratios) < _SAME or tail[-1] - tail[0] < _SAME**4:
        return plain, -numpy.inf
    try:
        with numpy.errstate(all="ignore"):
            log_weights, k_hat = smooth(ratios)
    except ValueError:  # a tail of weights that are all the same
        return plain, -numpy.inf
    good = numpy.isfinite(k_hat) and numpy.isfinite(log_weights).all()
    return (log_weights, float(k_hat)) if good else (plain, numpy.inf)


def _smoother() -> Callable[[Vector], tuple[Vector, float]]:
    """ArviZ's function of log ratios; imported when it is needed, as that takes most of a second."""
    try:
        from arviz_stats.base import array_stats
    except ImportError:  # ArviZ before version 1, for Python 3.10
        import arviz

        return lambda ratios: arviz.psislw(ratios)
    return lambda ratios: array_stats.psislw(-ratios)  # it takes log likelihoods, which leave-one-out divides by
