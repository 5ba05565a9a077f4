"""Densities behind the figures: of weighted draws, and of the Gaussian."""

from __future__ import annotations

import math

import numpy
from scipy.stats import gaussian_kde

from laplace_amort.guide import LaplaceGaussian
from laplace_amort.plots.numbers import Column
from laplace_amort.posterior import weighted_quantiles
from laplace_amort.types import Vector, to_numpy

__all__ = ["density", "gaussian_contour", "gaussian_density", "gaussian_points"]

_POINTS = 301  # of a curve
_LEFT_OUT = 1e-3  # share of the draws at each end that a curve need not reach
_REACH = 3.5  # widths of a kernel that it goes past the rest
_NEAR = 1e-6  # share of the range within which two values are the same edge
_CLOSE = 0.01  # share of the draws at an edge from which it counts
_FAR = 3.5  # standard deviations that the Gaussian's curve reaches


def density(column: Column) -> tuple[Vector, Vector]:
    r"""Return points and the density of the draws there, ``(G,)`` each.

    Kernels of width :math:`h` around draws give them a variance that is too large by :math:`h^2`; so the draws are
    first moved together, to what leaves mean and variance as they are (West, 1993). Both happen in the unconstrained
    coordinate. Where draws come near the edge of their support, as of a scale that may be zero, that would make peaks
    of single draws; then kernels are set in the model's own space, and what they put beyond the edge is reflected.

    :raises ValueError: if all draws are the same.
    """
    if not numpy.ptp(column.values) > 0:
        raise ValueError(f"all draws of '{column.label}' are {column.values[0]:.4g}: there is no density to draw")
    edges = _edges(column)
    values = column.free if edges is None else column.values
    mean = column.weights @ values
    sd = (column.weights @ (values - mean) ** 2) ** 0.5
    width = _width(values, column.weights)
    if edges is not None:
        return _reflected(values, column.weights, width, edges)
    drawn_together = mean + (1 - (width / sd) ** 2) ** 0.5 * (values - mean)
    grid = _grid(drawn_together, column.weights, width)
    found = _kernels(drawn_together, column.weights, width, grid)
    if column.coordinate is None:
        return grid, found
    return _changed(column.image({column.coordinate: grid}), found, grid)


def _edges(column: Column) -> tuple[float, float] | None:
    """Find the ends of the support, if a noticeable share of the draws is no further away than a kernel is wide."""
    if column.coordinate is None:
        return None
    with numpy.errstate(over="ignore", invalid="ignore"):
        low, lower, higher, high = column.image({column.coordinate: numpy.array([-400.0, -300.0, 300.0, 400.0])})
        near = _NEAR * numpy.ptp(column.values)
        low = low if abs(lower - low) <= near else -numpy.inf
        high = high if abs(high - higher) <= near else numpy.inf
    width = _width(column.values, column.weights)
    close = (column.values < low + width) | (column.values > high - width)
    return (float(low), float(high)) if column.weights @ close > _CLOSE else None


def _reflected(values: Vector, weights: Vector, width: float, edges: tuple[float, float]) -> tuple[Vector, Vector]:
    """Set kernels within edges, and add what they put beyond them, mirrored."""
    low, high = edges
    start, stop = _grid(values, weights, width)[[0, -1]]
    grid = numpy.linspace(max(float(start), low), min(float(stop), high), _POINTS)
    found = _kernels(values, weights, width, grid)
    for edge in edges:
        if math.isfinite(edge):
            found = found + _kernels(values, weights, width, 2 * edge - grid)
    return grid, found


def gaussian_density(gaussian: LaplaceGaussian, column: Column) -> tuple[Vector, Vector]:
    """Return points and the density of the Gaussian there, of a column with a coordinate of its own."""
    z = numpy.linspace(-_FAR, _FAR, _POINTS)
    points = gaussian_points(gaussian, column, z)
    return _changed(points, numpy.exp(-(z**2) / 2) / numpy.sqrt(2 * numpy.pi), z)


def gaussian_points(gaussian: LaplaceGaussian, column: Column, z: Vector) -> Vector:
    """Return the values that lie ``z`` standard deviations from the mean in the coordinate of a column.

    :raises ValueError: if it has none.
    """
    if column.coordinate is None:
        raise ValueError(f"'{column.label}' is no function of one normal variable")
    mean = float(gaussian.global_loc[column.coordinate])
    sd = float(gaussian.precision.global_variance()[column.coordinate]) ** 0.5
    return column.image({column.coordinate: mean + sd * z})


def gaussian_contour(gaussian: LaplaceGaussian, first: Column, second: Column, mass: float) -> tuple[Vector, Vector]:
    """Return points of the contour of the Gaussian of two columns that holds a share of its mass.

    :raises ValueError: if one of them has no coordinate of its own.
    """
    if first.coordinate is None or second.coordinate is None:
        raise ValueError(f"'{first.label}' or '{second.label}' is no function of one normal variable")
    pair = numpy.array([first.coordinate, second.coordinate])
    covariance = to_numpy(gaussian.precision.global_covariance())[numpy.ix_(pair, pair)]
    angle = numpy.linspace(0, 2 * numpy.pi, _POINTS)
    circle = numpy.stack([numpy.cos(angle), numpy.sin(angle)]) * (-2 * numpy.log(1 - mass)) ** 0.5
    ellipse = to_numpy(gaussian.global_loc)[pair, None] + numpy.linalg.cholesky(covariance) @ circle
    moved = {first.coordinate: ellipse[0], second.coordinate: ellipse[1]}
    return first.image(moved), second.image(moved)


def _changed(points: Vector, values: Vector, grid: Vector) -> tuple[Vector, Vector]:
    """Turn a density over a grid into one over the points that it is mapped to, where these are apart."""
    slope = numpy.abs(numpy.gradient(points, grid))
    apart = slope > 0
    changed: Vector = values[apart] / slope[apart]
    return points[apart], changed


def _width(values: Vector, weights: Vector) -> float:
    """Choose the width of a normal kernel by Silverman's rule, for the effective number of draws."""
    mean = weights @ values
    sd = float((weights @ (values - mean) ** 2) ** 0.5)
    low, high = weighted_quantiles(values, weights, [0.25, 0.75])
    spread = min(sd, (high - low) / 1.349) or sd
    return min(1.06 * spread * float((weights**2).sum()) ** 0.2, 0.9 * sd)


def _grid(values: Vector, weights: Vector, width: float) -> Vector:
    """Choose where a density is drawn: a few far draws of hardly any weight are not to make it coarse."""
    low, high = weighted_quantiles(values, weights, [_LEFT_OUT, 1 - _LEFT_OUT])
    return numpy.linspace(low - _REACH * width, high + _REACH * width, _POINTS)


def _kernels(values: Vector, weights: Vector, width: float, grid: Vector) -> Vector:
    """Sum normal kernels of a width around weighted draws, at points of a grid."""
    factor = width / float(numpy.cov(values, aweights=weights)) ** 0.5  # SciPy's width is a share of this
    found: Vector = gaussian_kde(values, bw_method=factor, weights=weights)(grid)
    return found
