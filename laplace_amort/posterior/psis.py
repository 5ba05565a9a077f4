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
# Logarithm of the smallest weight that there is.
_SMALLEST = numpy.log(numpy.finfo(float).tiny)


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
    shape = numpy.shape(log_ratios)
    rows = numpy.asarray(log_ratios, dtype=float).reshape(-1, shape[-1])
    largest = rows.max(-1, keepdims=True)
    finite = numpy.isfinite(largest)
    # Weights of nothing are small numbers, of which ArviZ takes differences.
    ratios = numpy.maximum(numpy.where(finite, rows, 0.0) - numpy.where(finite, largest, 0.0), _SMALLEST)
    log_weights = ratios - numpy.log(numpy.exp(ratios).sum(-1, keepdims=True))
    tails = numpy.sort(ratios, axis=-1)[:, -_TAIL:]
    unknown = ~finite[:, 0] | (shape[-1] // 5 < _TAIL)
    same = (numpy.ptp(ratios, axis=-1) < _SAME) | (tails[:, -1] - tails[:, 0] < _SAME**4)
    k_hat = numpy.where(unknown, numpy.inf, -numpy.inf)
    fit = numpy.flatnonzero(~unknown & ~same)
    if len(fit):
        with numpy.errstate(all="ignore"):
            smoothed, shapes = _smoother()(ratios[fit])
        good = numpy.isfinite(shapes) & numpy.isfinite(smoothed).all(-1)
        log_weights[fit[good]] = smoothed[good]
        k_hat[fit] = numpy.where(good, shapes, numpy.inf)
    return Smoothed(log_weights.reshape(shape), k_hat.reshape(shape[:-1]))


def _smoother() -> Callable[[Vector], tuple[Vector, Vector]]:
    """ArviZ's function of log ratios; imported when it is needed, as that takes most of a second."""
    from arviz_stats.base import array_stats

    return lambda ratios: array_stats.psislw(-ratios)  # it takes log likelihoods, which leave-one-out divides by
