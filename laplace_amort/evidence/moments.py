r"""Whether the moments of a posterior exist: how fast the density of a global falls where it is large.

A density that falls as :math:`x^{-a}` has a mean if :math:`a > 2`, and a standard deviation if :math:`a > 3`. Averages
over draws are numbers all the same, others with every seed. Of the logarithm :math:`u` of a positive global the density
falls as :math:`e^{-(a - 1) u}`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy

from laplace_amort.evidence.slices import log_densities_at
from laplace_amort.guide import is_exponential, is_identity
from laplace_amort.posterior import Posterior
from laplace_amort.types import Vector, to_numpy

__all__ = ["HeavyTail", "heavy_tails"]

# How far out the density is looked at: of a logarithm, and of a real number in standard deviations.
_FAR_LOGARITHM, _FAR = 8.0, 1e4
# Logarithm of the share of the density at the center below which no tail is seen by anybody.
_NOTHING = -30.0
# By how much a power may be off for being taken short of infinity.
_SLACK = 0.1


class HeavyTail(NamedTuple):
    """A global whose standard deviation does not exist.

    :param str name: of the element.
    :param float power: by which its density falls.
    """

    name: str
    power: float

    @property
    def has_mean(self) -> bool:
        """Whether the mean exists."""
        return self.power > 2 + _SLACK


def heavy_tails(posterior: Posterior) -> list[HeavyTail]:
    """Find globals without a standard deviation, by the density along each of them, the others at the center.

    Do not take an empty list for a proof: along a ridge of several globals a density may fall more slowly.

    :param Posterior posterior: of some fit.
    """
    rays = list(_rays(posterior))
    if not rays:
        return []
    center = to_numpy(posterior.gaussian.global_loc)
    first = log_densities_at(posterior, numpy.array([center, *(ray.at(center, 0.0) for ray in rays)]))
    seen = [(ray, value) for ray, value in zip(rays, first[1:], strict=True) if value - first[0] > _NOTHING]
    if not seen:
        return []
    further = log_densities_at(posterior, numpy.array([ray.at(center, 1.0) for ray, _ in seen]))
    found: dict[str, HeavyTail] = {}
    for (ray, near), far in zip(seen, further, strict=True):
        power = near - far + (1.0 if ray.is_logarithm else 0.0)
        if power <= 3 + _SLACK and (ray.name not in found or power < found[ray.name].power):
            found[ray.name] = HeavyTail(ray.name, float(power))
    return list(found.values())


class _Ray(NamedTuple):
    """A direction in which one global grows: by a factor of e with each unit of length."""

    name: str
    place: int
    step: float
    is_logarithm: bool

    def at(self, center: Vector, length: float) -> Vector:
        """Return the globals out there, ``(d,)``, and as much further."""
        moved = center.copy()
        moved[self.place] += self.step + length if self.is_logarithm else self.step * numpy.exp(length)
        return moved


def _rays(posterior: Posterior) -> Iterator[_Ray]:
    layout = posterior.gaussian.unit_model.layout
    sds = to_numpy(posterior.gaussian.precision.global_variance().sqrt())
    names, index = layout.global_elements(), 0
    for site in layout.global_sites.values():
        for _ in range(site.shape.numel()):
            if is_exponential(site.transform):
                yield _Ray(names[index], index, max(_FAR_LOGARITHM, 6 * sds[index]), is_logarithm=True)
            elif is_identity(site.transform):
                for sign in (-1.0, 1.0):
                    yield _Ray(names[index], index, sign * _FAR * sds[index], is_logarithm=False)
            index += 1
