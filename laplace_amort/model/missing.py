"""What is missing in the data of a site: which values are seen, and what stands where none is.

A mask multiplies terms by zero, and zero times a derivative that is NaN is NaN. So what a mask hides is replaced, by a
value in the support, before a density is evaluated: here, for every run of a model, recorded or not.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import constraints

from laplace_amort.errors import ModelError
from laplace_amort.model.sites import IDENTITY, layers_of, transform_of, undressed

__all__ = ["as_missing_as", "completed", "inside", "is_data", "seen_elements", "seen_events"]

_NAN_MASKED = dist.NanMaskedNormal, dist.NanMaskedMultivariateNormal
_LIBRARIES = "torch.", "pyro."


def is_data(node: Any) -> bool:
    """Tell whether the value of an observed site is data, and no function of latents or factor."""
    return isinstance(node["value"], Tensor) and not isinstance(undressed(node["fn"]), dist.Delta | dist.Unit)


def completed(node: Any) -> Tensor:
    """Return the value of an observed site as its density takes it: of its dtype, and possible where it is not seen.

    :param node: of a trace; :func:`is_data`.
    :return: the value, in the shape of the site where something is filled in.
    """
    value = _as_numbers(node["fn"], node["value"])
    seen, filling = _under_masks(node, value), inside(node["fn"])
    if seen is None or filling is None:
        return value
    return torch.where(seen, value, filling.to(value))


def seen_elements(node: Any) -> Tensor | None:
    """Return which elements of the value of an observed site are seen, of a shape that broadcasts against it.

    :param node: of a trace; :func:`is_data`.
    :return: None where no mask hides any. What ``NanMaskedNormal`` takes for missing is not seen.
    """
    seen = _under_masks(node, node["value"])
    if isinstance(undressed(node["fn"]), _NAN_MASKED):
        finite = node["value"].isfinite()
        seen = finite if seen is None else seen & finite
    return seen


def seen_events(node: Any) -> Tensor | None:
    """Return which terms of an observed site have anything that is seen, in its batch shape; None where all have."""
    seen = seen_elements(node)
    if seen is None:
        return None
    seen = seen.broadcast_to(torch.broadcast_shapes(seen.shape, node["fn"].shape()))
    return seen.flatten(-node["fn"].event_dim).any(-1) if node["fn"].event_dim else seen


def as_missing_as(data: Any, node: Any) -> Tensor:
    """Return the value of a site that was drawn, missing where its data are, for a distribution that looks for NaN.

    :param data: of the site.
    :param node: where it is drawn.
    """
    value: Tensor = node["value"]
    if not (isinstance(data, Tensor) and isinstance(undressed(node["fn"]), _NAN_MASKED)):
        return value
    return torch.where(data.isfinite(), value, torch.nan)


def _under_masks(node: Any, value: Tensor) -> Tensor | None:
    """Which elements are under no mask, of the site or of its distribution."""
    masks = [(node["mask"], node["fn"].event_dim)]
    layers = [layer for layer in layers_of(node["fn"]) if isinstance(layer, MaskedDistribution)]
    masks += [(layer._mask, layer.event_dim) for layer in layers]
    seen = None
    for mask, event_dim in masks:
        if mask is None or mask is True:
            continue
        here = torch.as_tensor(mask, dtype=torch.bool, device=value.device)
        here = here.reshape(here.shape + (1,) * event_dim)
        seen = here if seen is None else seen & here
    return seen


def _as_numbers(fn: Any, value: Tensor) -> Tensor:
    """Labels and counts as floating-point numbers, which the densities of torch and Pyro are written for.

    Numbers of a lower precision than the default are widened: a density may compute in the precision of the data.
    """
    default = torch.get_default_dtype()
    if value.is_complex() or not type(undressed(fn)).__module__.startswith(_LIBRARIES):
        return value
    return value.to(torch.promote_types(value.dtype, default))


def inside(fn: Any) -> Tensor | None:
    """Return a value in the support of a distribution, the same in every run; None where none is known.

    :param fn: a distribution.
    :return: in the shape of a draw, or one that broadcasts to it.
    """
    try:
        support = fn.support
    except NotImplementedError:
        return None
    if support.is_discrete:
        return _inside_discrete(support, fn)
    try:
        transform = transform_of({"name": "", "fn": fn})
        if transform is IDENTITY:
            return torch.zeros(())
        origin: Tensor = torch.zeros(transform.inverse_shape(fn.shape()))
        found: Tensor = transform(origin)
    except (ModelError, NotImplementedError):
        return None
    return found


def _inside_discrete(support: Any, fn: Any) -> Tensor:
    while hasattr(support, "base_constraint"):  # independent, or of a mixture
        support = support.base_constraint
    if hasattr(support, "lower_bound"):
        return torch.as_tensor(support.lower_bound)
    first = torch.zeros(fn.shape())
    if support is constraints.one_hot:
        first[..., 0] = 1.0
    elif hasattr(support, "upper_bound"):  # of a multinomial: all in one place
        first[..., 0] = torch.as_tensor(support.upper_bound, dtype=first.dtype)
    return first
