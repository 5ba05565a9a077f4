"""Effect handlers for runs of a model inside a guide: they feed values and indices.

They trace nothing; :mod:`laplace_amort.model.runs` runs the model under them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _DIM_ALLOCATOR
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from laplace_amort.errors import ModelError
from laplace_amort.model.imputed import standard_normal_where_seen
from laplace_amort.model.missing import completed, is_data
from laplace_amort.model.sites import (
    IDENTITY,
    LatentSite,
    check_bounds,
    check_plate_sizes,
    log_abs_det,
    plates_of,
    transform_of,
    undressed,
)

__all__ = [
    "Completion",
    "Feed",
    "Indices",
    "SubsampledPlate",
    "Uncondition",
    "no_open_plates",
    "ran_at",
    "subsampled_plates",
]


class SubsampledPlate(NamedTuple):
    """A plate of a model that takes only some of its indices, or takes them in an order of its own.

    :param str name: name of the plate.
    :param int size: of the whole plate.
    :param int subsample_size: of the subsample.
    :param dim: its dimension; ``None`` if no site was inside, or it is sequential.
    :param given: the indices that the model gave itself by ``subsample=``; ``None`` where Pyro drew them.
    """

    name: str
    size: int
    subsample_size: int
    dim: int | None
    given: Tensor | None


def subsampled_plates(trace: Any, given: Mapping[str, Tensor]) -> tuple[SubsampledPlate, ...]:
    """The plates of a trace that are subsampled, or whose indices the model gave itself."""
    frames = {frame.name: frame for node in trace.nodes.values() for frame in node.get("cond_indep_stack", ())}
    found = []
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or not site_is_subsample(node):
            continue
        size, subsample_size = int(node["fn"].size), len(node["value"])
        if name in given or subsample_size < size:
            frame = frames.get(name)
            dim = frame.dim if frame is not None and frame.vectorized else None
            found.append(SubsampledPlate(name, size, subsample_size, dim, given.get(name)))
    return tuple(found)


class Feed(Messenger):
    """Give every latent site the constrained image of its unconstrained value.

    :param unconstrained: values by site.
    :param sites: those that were found at set-up; a plate of another size now is refused.

    :param frozenset imputed: names of those that ``obs_mask`` made: what was seen of them is standard normal.

    Attribute: ``log_jacobians`` of the sites that are constrained, by name; of those that are imputed with the density
    of what was seen.
    """

    def __init__(
        self,
        unconstrained: Mapping[str, Tensor],
        sites: Mapping[str, LatentSite],
        imputed: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.imputed = imputed
        self.unconstrained = unconstrained
        self.sites = sites
        self.log_jacobians: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        name = msg["name"]
        if name not in self.unconstrained:
            raise ModelError(f"the model sampled site '{name}', which it had not at set-up; its sites must be fixed")
        check_plate_sizes(self.sites[name], plates_of(msg))
        check_bounds(self.sites[name], msg["fn"].support)
        transform, value = transform_of(msg), self.unconstrained[name]
        constrained = transform(value)
        if constrained.shape[constrained.dim() - len(msg["fn"].shape()) :] != msg["fn"].shape():
            raise ModelError(
                f"site '{name}' has shape {tuple(msg['fn'].shape())} in this run, but the value given has shape "
                f"{tuple(constrained.shape)}: did the arguments of the model change size? Make a new LogJoint for them."
            )
        msg["value"] = constrained
        if transform is not IDENTITY:
            self.log_jacobians[name] = log_abs_det(transform, value, constrained, msg["fn"].event_dim)
        if name in self.imputed:
            log_jacobian, event_dim = self.log_jacobians.get(name), self.sites[name].event_dim
            self.log_jacobians[name] = standard_normal_where_seen(log_jacobian, msg, value, event_dim)


class Uncondition(UnconditionMessenger):
    """As ``poutine.uncondition``, but not for functions of latents: Pyro would draw these anew in every plate."""

    def _pyro_sample(self, msg: Any) -> None:
        if not isinstance(undressed(msg["fn"]), dist.Delta):
            super()._pyro_sample(msg)


class Completion(Messenger):
    """Complete the data of a model that is run by others, as :func:`~laplace_amort.model.missing.completed` does."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not site_is_subsample(msg) and is_data(msg):
            msg["value"] = completed(msg)


class Indices(Messenger):
    """Feed subsample indices; refuse a run that would draw its own. Keeps those that the model gives itself."""

    def __init__(self, indices: Mapping[str, Tensor], strict: bool) -> None:
        super().__init__()
        self.indices = indices
        self.strict = strict
        self.given: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            return
        name, size, wanted = msg["name"], msg["fn"].size, msg["fn"].subsample_size
        if msg["value"] is not None:
            self.given[name] = torch.as_tensor(msg["value"])
        elif name in self.indices:
            msg["value"] = self.indices[name]
        elif self.strict and wanted is not None and wanted < size:
            raise ModelError(
                f"plate '{name}' subsamples {wanted} of {size}, and this inner run of the model would draw other units "
                f"than the guide. Open the plate in the guide and hand its indices on:\n"
                f"    plate = pyro.plate('{name}', {size}, subsample_size={wanted}, dim=...)\n"
                f"    log_joint.with_indices({name}=plate.indices)"
            )


def ran_at(trace: Any, indices: Mapping[str, Tensor]) -> bool:
    """Tell whether the plates of a run had these indices."""
    ran = {name: node["value"] for name, node in trace.nodes.items() if site_is_subsample(node)}
    return all(name in ran and torch.equal(ran[name].to(wanted.device), wanted) for name, wanted in indices.items())


@contextmanager
def no_open_plates() -> Iterator[None]:
    """Let plates inside number their dimensions, and use their names, as if none were open outside."""
    outside, _DIM_ALLOCATOR._stack = _DIM_ALLOCATOR._stack, []
    try:
        yield
    finally:
        _DIM_ALLOCATOR._stack = outside
