r"""A log joint as a sum over units, at many points at once.

.. math:: f(\theta, y) = g(\theta) + \sum_i h_i(\theta, y_i).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from laplace_amort.autodiff.recording import Recording
from laplace_amort.types import Density

__all__ = ["Gradients", "SeparableDensity", "values_and_gradients"]

# Bytes that the results of all operations on one chunk may take: no more than caches and allocators like.
_CHUNK_BYTES = 2**26


@dataclass(frozen=True)
class SeparableDensity:
    """The terms of a log joint by unit, and the rest that is shared.

    :param shared: of globals ``(d,)`` and units ``(N, k)``, which it does not depend on; returns a scalar.
    :param units: of the same; returns ``(N,)``, of which each element depends on the globals and its own unit alone.

    Recordings are mapped over many points at once, other functions called point by point.

    Example::

        >>> density = SeparableDensity(lambda t, y: -(t ** 2).sum(), lambda t, y: -((y - t) ** 2).sum(-1))
        >>> density.units_at(torch.zeros(1, 1), torch.ones(1, 2, 3, 1)).shape
        torch.Size([1, 2, 3])
    """

    shared: Callable[[Tensor, Tensor], Tensor]
    units: Callable[[Tensor, Tensor], Tensor]

    def shared_at(self, globals_: Tensor, local: Tensor) -> Tensor:
        """Evaluate what is shared at globals ``(S, d)``, as ``(S,)``; of units ``(N, k)`` only the shape matters."""
        if isinstance(self.shared, Recording):
            return torch.func.vmap(self.shared, in_dims=(0, None))(globals_, local)
        return torch.stack([self.shared(global_, local) for global_ in globals_])

    def units_at(self, globals_: Tensor, locals_: Tensor) -> Tensor:
        """Evaluate the terms of the units.

        :param Tensor globals_: ``(S, d)``.
        :param Tensor locals_: ``Q`` points for each of them, ``(S, Q, N, k)``.
        :return: ``(S, Q, N)``.
        """
        if isinstance(self.units, Recording):
            at_points = torch.func.vmap(self.units, in_dims=(None, 0))
            return torch.func.vmap(at_points)(globals_, locals_)
        rows = [[self.units(g, y) for y in points] for g, points in zip(globals_, locals_, strict=True)]
        return torch.stack([torch.stack(row) for row in rows])

    def sum_of_units(self, globals_: Tensor, local: Tensor) -> Tensor:
        """The sum of all terms at ``S`` points: globals ``(S, d)``, and units ``(S * N, k)`` in the same order.

        Units of all points together, so that what treats the units of one point treats those of all.
        """
        return self.units_at(globals_, local.unflatten(0, (len(globals_), -1)).unsqueeze(1)).sum()

    def chunk(self, num_points: int = 1) -> int:
        """How many globals to evaluate at a time, with so many points each."""
        if not isinstance(self.units, Recording):
            return 1
        return max(1, _CHUNK_BYTES // max(self.units.num_bytes * num_points, 1))


# Bytes that intermediate results of one chunk may take. More is no faster: memory is what large data wait for.
_CHUNK_BYTES = 2**28


class Recordable(Protocol):
    """A model of units that may have been recorded."""

    recording: Recording | None

    def log_joint(self, global_: Tensor, local: Tensor) -> Tensor:
        """Evaluate the log joint, a scalar."""


class Gradients(NamedTuple):
    """A log joint at ``S`` draws, without a graph.

    :param Tensor values: ``(S,)``.
    :param Tensor in_global: gradients in the globals, ``(S, d)``; empty if none were wanted, like the others.
    :param Tensor in_local: gradients in the units, ``(S, N, k)``.
    :param list in_parameters: gradients of the sum in parameters of the model.
    """

    values: Tensor
    in_global: Tensor
    in_local: Tensor
    in_parameters: list[Tensor]


def values_and_gradients(
    model: Recordable, global_: Tensor, local: Tensor, parameters: Sequence[Tensor] | None
) -> Gradients:
    """Evaluate a log joint at draws; a recorded one for many at once, any other draw by draw.

    :param model: has the log joint.
    :param Tensor global_: ``(S, d)``.
    :param Tensor local: ``(S, N, k)``.
    :param parameters: leaves of the model to differentiate in as well; None for values without any gradient.
    """
    recording = model.recording
    chunk = 1 if recording is None else max(1, _CHUNK_BYTES // max(recording.num_bytes, 1))
    function = _one_by_one(model.log_joint) if recording is None else torch.func.vmap(recording)
    parts = [_pulls(function, *some, parameters) for some in zip(global_.split(chunk), local.split(chunk), strict=True)]
    values, in_global, in_local = (torch.cat(list(part)) for part in list(zip(*parts, strict=True))[:3])
    columns = zip(*(part.in_parameters for part in parts), strict=True)
    return Gradients(values, in_global, in_local, [torch.stack(column).sum(0) for column in columns])


def _one_by_one(log_joint: Density) -> Density:
    def function(global_: Tensor, local: Tensor) -> Tensor:
        return torch.stack([log_joint(g, y) for g, y in zip(global_, local, strict=True)])

    return function


def _pulls(function: Density, global_: Tensor, local: Tensor, parameters: Sequence[Tensor] | None) -> Gradients:
    if parameters is None:
        with torch.no_grad():
            return Gradients(function(global_, local), global_[:0].detach(), local[:0].detach(), [])
    with torch.enable_grad():
        values_of = [global_.detach().requires_grad_(), local.detach().requires_grad_(), *parameters]
        values = function(*values_of[:2])
        found = torch.autograd.grad(values.sum(), values_of, allow_unused=True)
    filled = [torch.zeros_like(v) if g is None else g for v, g in zip(values_of, found, strict=True)]
    return Gradients(values.detach(), filled[0], filled[1], filled[2:])
