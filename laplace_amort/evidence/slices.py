"""Slices of a marginal density: how it goes along each global, the others at the center."""

from __future__ import annotations

import numpy
import torch

from laplace_amort.posterior import NestedUnits, Posterior, log_densities
from laplace_amort.types import Vector, to_numpy
from laplace_amort.units import Laplace

__all__ = ["log_densities_at", "other_peaks"]

# Newton steps for modes out there: what is not found is not known.
_STEPS = 30


@torch.no_grad()
def log_densities_at(posterior: Posterior, globals_: Vector) -> Vector:
    """Return the marginal log density, one point for each unit; NaN where it is not known.

    :param Posterior posterior: of some fit.
    :param Vector globals_: ``(S, d)``.
    """
    units = NestedUnits(posterior.gaussian, posterior.problem.integrals.limited(_STEPS))
    points = torch.from_numpy(globals_).to(posterior.gaussian.global_loc)
    return log_densities(units, Laplace(), points, units.conditionals(points))


def other_peaks(posterior: Posterior, places: Vector) -> list[Vector]:
    """Return where slices of the density have peaks beside the center, the highest first.

    :param Posterior posterior: of some fit.
    :param Vector places: where to look along each global, such as draws of the prior, ``(M, d)``.
    :return: globals ``(d,)`` each, with all but one at the center.
    """
    center = to_numpy(posterior.gaussian.global_loc)
    d = len(center)
    along = numpy.sort(numpy.vstack([center, places]), axis=0)  # (M + 1, d)
    points = numpy.tile(center, (d, len(along), 1))
    for index in range(d):
        points[index, :, index] = along[:, index]
    values = log_densities_at(posterior, points.reshape(-1, d)).reshape(d, len(along))
    values = numpy.nan_to_num(values, nan=-numpy.inf)
    padded = numpy.pad(values, ((0, 0), (1, 1)), constant_values=-numpy.inf)
    is_peak = (values > padded[:, :-2]) & (values > padded[:, 2:]) & (along != center).T
    order = numpy.argsort(-values[is_peak], kind="stable")
    return list(points[is_peak][order])
