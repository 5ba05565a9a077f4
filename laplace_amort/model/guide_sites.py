"""The latent sites of a model in a guide: each a function of a draw, inside the plates and weights of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor
from torch.distributions.transforms import Transform

from laplace_amort.errors import ModelError
from laplace_amort.model.imputed import is_imputed, unseen_of
from laplace_amort.model.sites import IDENTITY, LatentSite, log_abs_det, plates_of, subsample_scale_of

__all__ = ["refuse_subsampled", "sample_images", "site_plates"]


def sample_images(
    sites: Mapping[str, LatentSite],
    transforms: Mapping[str, Transform],
    unconstrained: Mapping[str, Tensor],
    plates: Iterable[pyro.plate],
    nodes: Mapping[str, Any],
) -> dict[str, Tensor]:
    """In a guide: make latent sites the constrained images of their unconstrained values, and return these.

    :param sites: of the model, by name.
    :param transforms: onto their supports.
    :param unconstrained: of the shapes of the sites, with dimensions of enclosing plates on the left.
    :param plates: that are open already, or made; the others are made here.
    :param nodes: of a run of the model at these values, whose scales and masks are taken, and what ``obs_mask`` hides
        is drawn from; empty where it has none.
    """
    opened = {plate.name: plate for plate in plates}
    values = {}
    for name, site in sites.items():
        value = values[name] = transforms[name](unconstrained[name])
        with site_plates(site.plates, opened):
            with _weight(nodes.get(name)):
                pyro.sample(name, dist.Delta(value, event_dim=site.constrained_event_dim))
            if transforms[name] is not IDENTITY and am_i_wrapped():  # bare calls have no density to keep
                log_jacobian = log_abs_det(transforms[name], unconstrained[name], value, site.constrained_event_dim)
                pyro.factor(f"{name}_log_jacobian", -log_jacobian, has_rsample=True)
    for name, node in nodes.items():
        if is_imputed(node):
            with site_plates(plates_of(node), opened):
                values[name] = _sample_unseen(name, node)
    return values


def _sample_unseen(name: str, node: Any) -> Tensor:
    """Draw what ``obs_mask`` hides from its distribution, so that its density cancels that in the model."""
    fn: Any = node["fn"]
    unseen: Any = unseen_of(node)
    with torch.no_grad():
        value: Tensor = fn.sample()
    with poutine.mask(mask=unseen):
        pyro.sample(name, dist.Delta(value, event_dim=fn.event_dim))
        if am_i_wrapped():
            pyro.factor(f"{name}_log_prob", fn.log_prob(value), has_rsample=True)
    return value


@contextmanager
def site_plates(frames: Iterable[Any], opened: dict[str, Any]) -> Iterator[None]:
    """Open vectorized plates around a site, by their frames; each is made once, added to ``opened``, and reused."""
    with ExitStack() as stack:  # closes those already open if a later one fails
        for frame in frames:
            if frame.name not in opened:
                opened[frame.name] = pyro.plate(frame.name, frame.full_size, dim=frame.dim)
            stack.enter_context(opened[frame.name])
        yield


@contextmanager
def _weight(node: Any) -> Iterator[None]:
    """The ``poutine.scale`` and ``poutine.mask`` that the model has around a site."""
    if node is None:
        yield
        return
    # They are nothing to a Delta, but TraceMeanField_ELBO scales and masks the model's density by them. The plates that
    # the guide opens bring their own share of the scale.
    scale, mask = node["scale"] / subsample_scale_of(plates_of(node)), node["mask"]
    with poutine.scale(scale=scale), poutine.mask(mask=True if mask is None else mask):
        yield


def refuse_subsampled(site: LatentSite) -> None:
    """Refuse a site in a subsampled plate, whose density is that of a joint draw."""
    for frame in site.plates:
        if frame.size != frame.full_size:
            raise ModelError(
                f"site '{site.name}' lies in plate '{frame.name}', which subsamples {frame.size} of "
                f"{frame.full_size}; the density of a joint draw cannot be scaled by unit. Sample the globals "
                f"first, then the units inside the plate:\n"
                f"    with pyro.plate('{frame.name}', {frame.full_size}, subsample_size={frame.size}):\n"
                f"        pyro.sample('{site.name}', dist.Normal(loc_given_globals, scale))"
            )
