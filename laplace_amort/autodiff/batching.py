r"""A density at many points: as many of them at a time as memory is allowed for, or one by one if it is not recorded.

A log joint is needed as a whole, with its gradients, and taken apart as a sum over units,

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

__all__ = ["Gradients", "SeparableDensity", "at_points", "values_and_gradients"]

# Bytes that the results of all operations on one chunk may take. More is no faster: a chunk of this size takes far
# longer than calling its operations, and memory is what large data wait for.
_CHUNK_BYTES = 2**26

_Dims = tuple[int | None, int | None]


def _mapping(function: Density) -> Callable[[Density, _Dims], Density]:
    """How to map a function over points: ``torch.func.vmap`` of a recording, which holds no Python, else a loop."""
    return torch.func.vmap if isinstance(function, Recording) else _one_by_one


def _one_by_one(function: Density, in_dims: _Dims) -> Density:
    """Map like ``torch.func.vmap``, by a loop that any function bears."""

    def mapped(*arguments: Tensor) -> Tensor:
        size = max(len(a) for a, dim in zip(arguments, in_dims, strict=True) if dim is not None)
        columns = [[a] * size if dim is None else a.unbind() for a, dim in zip(arguments, in_dims, strict=True)]
        return torch.stack([function(*point) for point in zip(*columns, strict=True)])

    return mapped


def _chunk(function: Density, num_points: int = 1) -> int:
    """How many globals to evaluate a function at, at a time, with so many points each."""
    if not isinstance(function, Recording):
        return 1
    return max(1, _CHUNK_BYTES // max(function.num_bytes * num_points, 1))


def at_points(function: Density, globals_: Tensor, locals_: Tensor) -> Tensor:
    """Evaluate a function at ``S`` points.

    :param function: of globals ``(d,)`` and units ``(N, k)``; returns a tensor ``(*)``.
    :param Tensor globals_: ``(S, d)``.
    :param Tensor locals_: ``(S, N, k)``.
    :return: ``(S, *)``.

    Example::

        >>> at_points(lambda t, y: (t + y).sum(), torch.ones(2, 1), torch.zeros(2, 3, 1))
        tensor([3., 3.])
    """
    mapped, chunk = _mapping(function)(function, (0, 0)), _chunk(function)
    return torch.cat([mapped(*some) for some in zip(globals_.split(chunk), locals_.split(chunk), strict=True)])


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
        return _mapping(self.shared)(self.shared, (0, None))(globals_, local)

    def units_at(self, globals_: Tensor, locals_: Tensor) -> Tensor:
        """Evaluate the terms of the units.

        :param Tensor globals_: ``(S, d)``.
        :param Tensor locals_: ``Q`` points for each of them, ``(S, Q, N, k)``.
        :return: ``(S, Q, N)``.
        """
        over = _mapping(self.units)
        return over(over(self.units, (None, 0)), (0, 0))(globals_, locals_)

    def sum_of_units(self, globals_: Tensor, local: Tensor) -> Tensor:
        """Sum all terms at ``S`` points: globals ``(S, d)``, and units ``(S * N, k)`` in the same order.

        Units of all points together, so that what treats the units of one point treats those of all.
        """
        return self.units_at(globals_, local.unflatten(0, (len(globals_), -1)).unsqueeze(1)).sum()

    def chunk(self, num_points: int = 1) -> int:
        """Return how many globals to evaluate the units at, at a time, with so many points each."""
        return _chunk(self.units, num_points)


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
    function = model.log_joint if model.recording is None else model.recording
    if parameters is None:
        with torch.no_grad():
            values = at_points(function, global_, local)
        return Gradients(values, global_[:0].detach(), local[:0].detach(), [])
    mapped, chunk = _mapping(function)(function, (0, 0)), _chunk(function)
    chunks = zip(global_.split(chunk), local.split(chunk), strict=True)
    parts = [_gradients(mapped, *some, parameters) for some in chunks]
    columns = zip(*(part.in_parameters for part in parts), strict=True)
    return Gradients(
        values=torch.cat([part.values for part in parts]),
        in_global=torch.cat([part.in_global for part in parts]),
        in_local=torch.cat([part.in_local for part in parts]),
        in_parameters=[torch.stack(column).sum(0) for column in columns],
    )


def _gradients(mapped: Density, global_: Tensor, local: Tensor, parameters: Sequence[Tensor]) -> Gradients:
    """Differentiate the sum over one chunk of draws, which in the draws themselves is each one's own gradient."""
    with torch.enable_grad():
        draws = [global_.detach().requires_grad_(), local.detach().requires_grad_()]
        values = mapped(*draws)
        in_global, in_local, *rest = torch.autograd.grad(values.sum(), [*draws, *parameters], materialize_grads=True)
    # Zeros that are filled in require a gradient in some versions of torch.
    return Gradients(values.detach(), in_global.detach(), in_local.detach(), [part.detach() for part in rest])
