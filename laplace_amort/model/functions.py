"""What a model names by ``pyro.deterministic`` and computes from the globals alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from laplace_amort.autodiff import ancestors_of, nearby, watched
from laplace_amort.model.sites import plates_of, undressed
from laplace_amort.model.unit_model import UnitModel

__all__ = ["GlobalFunctions", "find_functions"]

# Elements of a site at most: more of them are a curve, and no rows of a table.
_MOST = 64
# Shares of a normal deviate that units and globals are moved by, to see whether a site depends on them.
_AWAY = (0.05, 0.5)


@dataclass(frozen=True)
class GlobalFunctions:
    """Functions of the globals that a model has as sites, called by runs of the model.

    :param UnitModel model: not recorded.
    :param dict shapes: of their values, by site, in the order of the model; those that are not too large.
    :param dict too_large: shapes of the others.
    """

    model: UnitModel
    shapes: Mapping[str, torch.Size]
    too_large: Mapping[str, torch.Size]

    def __call__(self, global_: Tensor, local: Tensor) -> Tensor:
        """Evaluate all of them, one behind the other.

        :param Tensor global_: ``(d,)``.
        :param Tensor local: what units there are does not matter, ``(N, k)``.
        :return: ``(n,)``.
        """
        values = _run(self.model, global_, local)
        return torch.cat([values[name].reshape(-1).to(global_) for name in self.shapes])


def find_functions(model: UnitModel, global_: Tensor, local: Tensor) -> GlobalFunctions:
    """Find the deterministic sites of a model that no unit has a part in.

    Those in the plate of the units, or in one of observations, do not count. It takes three runs or four; one, where
    there are none.

    :param UnitModel model: not recorded.
    :param Tensor global_: near which the model is looked at, ``(d,)``.
    :param Tensor local: ``(N, k)``.
    """
    units, traces = local.detach().clone().requires_grad_(), []

    def run(units: Tensor) -> list[Tensor]:
        traces.append(_trace(model, global_.detach().clone().requires_grad_(), units))
        return [torch.as_tensor(node["value"]) for _, node in _deterministic(traces[-1])]

    with torch.enable_grad():
        seen = watched(run, units)
    outside, nodes = _outside(model, traces[-1]), list(_deterministic(traces[-1]))
    values = {
        name: value
        for (name, node), value, follows in zip(nodes, seen.result, seen.follows, strict=True)
        if value.numel() and outside(node) and not follows and not _has_above(value, units)
    }
    for seed, share in enumerate(_AWAY if values else ()):  # also where Python or NumPy stood in between
        elsewhere = _run(model, global_, nearby(local, share, seed))
        values = {n: v for n, v in values.items() if n in elsewhere and _equal(v.detach(), elsewhere[n])}
    few = {name: value.shape for name, value in values.items() if value.numel() <= _MOST}
    many = {name: value for name, value in values.items() if name not in few}
    if many:
        moved = _run(model, nearby(global_, _AWAY[1]), local)
        many = {n: v for n, v in many.items() if n in moved and not _equal(v.detach(), moved[n])}  # no constants
    return GlobalFunctions(model, few, {name: value.shape for name, value in many.items()})


def _run(model: UnitModel, global_: Tensor, local: Tensor) -> dict[str, Tensor]:
    """Values of all deterministic sites."""
    return {name: torch.as_tensor(node["value"]) for name, node in _deterministic(_trace(model, global_, local))}


def _trace(model: UnitModel, global_: Tensor, local: Tensor) -> Any:
    with pyro.validation_enabled(False):
        return model.density.trace_at(model.layout.to_sites(global_, local))


def _deterministic(trace: Any) -> Iterator[tuple[str, Any]]:
    """The sites whose value is computed: by ``pyro.deterministic``, or by what another handler makes of a latent."""
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and node["is_observed"] and isinstance(undressed(node["fn"]), dist.Delta):
            yield name, node


def _outside(model: UnitModel, trace: Any) -> Any:
    """Return what tells of a site whether it lies outside the plates of units and of observations."""
    of_globals = {frame.name for site in model.layout.global_sites.values() for frame in site.plates}
    inside = {model.layout.frame.name}
    for node in trace.nodes.values():
        if node["type"] == "sample" and node["is_observed"] and not site_is_subsample(node):
            kind = undressed(node["fn"])
            inside |= set() if isinstance(kind, dist.Delta | dist.Unit) else {f.name for f in plates_of(node)}
    inside -= of_globals
    return lambda node: not any(frame.name in inside for frame in node["cond_indep_stack"])


def _has_above(value: Tensor, units: Tensor) -> bool:
    """Whether the graph of a value begins at the units, also where it was written to in place."""
    return any(getattr(node, "variable", None) is units for node, _ in ancestors_of(value))


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(
        torch.isclose(one, other.detach(), rtol=1e-9, atol=0, equal_nan=True).all()
    )
