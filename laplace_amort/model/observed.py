"""What a model observes, and the model with that drawn instead."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from laplace_amort.autodiff import AsWritten
from laplace_amort.model.handlers import Completion, Uncondition
from laplace_amort.model.imputed import is_imputed
from laplace_amort.model.missing import seen_elements
from laplace_amort.model.sites import init_to_zero, plates_of, undressed
from laplace_amort.model.unit_model import UnitModel

__all__ = ["ObservedSite", "observed_sites", "with_data_completed", "with_data_drawn"]


class ObservedSite(NamedTuple):
    """An observed site, or one that is a function of latents.

    :param str name: of the site.
    :param Tensor value: what was observed, in the shape of the site; of a function of latents, its value at the start.
    :param tuple plates: the frames of its vectorized plates.
    :param int event_dim: rightmost dimensions that belong to one observation.
    :param bool deterministic: whether it is a ``pyro.deterministic``.
    :param Tensor seen: which elements of the value no mask hides; None where none does.
    """

    name: str
    value: Tensor
    plates: tuple[Any, ...]
    event_dim: int
    deterministic: bool
    seen: Tensor | None = None

    @property
    def seen_events(self) -> Tensor | None:
        """Which observations have anything that is seen; None where all have."""
        return self.seen.flatten(-self.event_dim).any(-1) if self.seen is not None and self.event_dim else self.seen


def observed_sites(model: UnitModel) -> dict[str, ObservedSite]:
    """Return the observed and the deterministic sites of a model, by name; a ``pyro.factor`` is none.

    :param UnitModel model: at its data.
    """
    found, density = {}, copy.copy(model.density)
    density.arithmetic = AsWritten()  # what was observed, and not what it is computed with
    with torch.random.fork_rng(devices=[]):  # it must not change the draws of a prediction
        trace = density.prototype(init_to_zero)
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or not node["is_observed"] or site_is_subsample(node) or is_imputed(node):
            continue
        fn, value = node["fn"], torch.as_tensor(node["value"])
        kind = undressed(fn)
        if isinstance(kind, dist.Unit):
            continue
        deterministic = isinstance(kind, dist.Delta)  # also where a reparameterization made it
        value = value if deterministic else value.expand(fn.shape())
        # Unless told otherwise, Pyro takes all of a function of latents for one event, and repeats it in every plate.
        event_dim = fn.event_dim if value.shape == fn.shape() else 0
        seen = None if deterministic else seen_elements(node)
        seen = None if seen is None else seen.broadcast_to(value.shape)
        found[name] = ObservedSite(name, value.detach(), plates_of(node), event_dim, deterministic, seen)
    return found


def with_data_completed(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return a model that others can run: its data as densities take them, possible where a mask hides them."""
    completed: Callable[..., Any] = Completion()(model)
    return completed


def with_data_drawn(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return a model whose observations are drawn."""
    drawn: Callable[..., Any] = Uncondition()(model)
    return drawn
