"""Does a model take a dimension of particles on the left? Pyro's vectorized ELBOs give it one."""

from __future__ import annotations

from typing import Any

import pyro
import torch

from laplace_amort.autodiff import fixed_normal
from laplace_amort.model.log_joint import LogJoint

__all__ = ["takes_particles"]

_STEP = 0.1  # from the image of zero, in unconstrained space


def takes_particles(density: LogJoint, num_particles: int) -> bool:
    """Whether a model in a plate of particles has the densities that it has of each of them by itself.

    ``a[county]`` has not: there the particles are looked up in, and where there are as many of them as the numbers ask
    for nothing complains.

    :param LogJoint density: of the model.
    :param int num_particles: the size of that plate.
    """

    def vectorized(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate("_num_particles_vectorized", num_particles, dim=-1 - density.max_plate_nesting):
            return density.model(*args, **kwargs)

    with torch.no_grad(), pyro.validation_enabled(False):
        like = density.initial()  # for its dtype and device
        points = _STEP * fixed_normal(like.new_zeros(num_particles, len(like)))
        apart = sum((density(point) for point in points), like.new_zeros(()))
        try:
            joint = LogJoint.at_indices(density.indices, vectorized, *density.args, **density.kwargs)
            values = density.unpack(points.reshape(num_particles, *(1,) * density.max_plate_nesting, len(like)))
            shaped = {name: values[name].expand(site.shape) for name, site in joint.sites.items()}
            together = joint.evaluate(shaped)
        except Exception:  # of whatever the model makes of a shape that it does not expect
            return False
    tolerance = torch.finfo(like.dtype).eps ** 0.5
    return bool(torch.isclose(together, apart, rtol=tolerance, atol=tolerance, equal_nan=True))
