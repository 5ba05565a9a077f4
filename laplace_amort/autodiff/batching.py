r"""A density at many points: as many of them at a time as memory is allowed for, or one by one if it takes no more.

A log joint is needed as a whole, with its gradients, and taken apart as a sum over units,

.. math:: f(\theta, y) = g(\theta) + \sum_i h_i(\theta, y_i).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from laplace_amort.autodiff.recording import Recording
from laplace_amort.types import Density

__all__ = ["AtOnce", "Gradients", "SeparableDensity", "at_points", "points_of", "values_and_gradients"]

# Bytes that the results of all operations on one chunk may take. More is no faster: a chunk of this size takes far
# longer than calling its operations, and memory is what large data wait for.
_CHUNK_BYTES = 2**26


@runtime_checkable
class AtOnce(Protocol):
    """A function of globals ``(d,)`` and units ``(N, k)`` that takes many points at once by itself.

    Attribute: ``num_bytes``, memory that the results of all its operations take at one point.
    """

    num_bytes: int

    def at(self, globals_: Tensor, locals_: Tensor) -> Tensor:
        """Evaluate at globals ``(S, d)`` and units ``(S, N, k)``, as ``(S, *)``."""


class Points(Protocol):
    """How a function is evaluated at many points."""

    def at(self, globals_: Tensor, locals_: Tensor) -> Tensor:
        """Evaluate at globals ``(S, d)`` and units ``(S, N, k)``, as ``(S, *)``."""

    def units_at(self, globals_: Tensor, locals_: Tensor) -> Tensor:
        """Evaluate at globals ``(S, d)`` and units ``(S, Q, N, k)``, as ``(S, Q, *)``."""

    def shared_at(self, globals_: Tensor, local: Tensor) -> Tensor:
        """Evaluate at globals ``(S, d)`` and the same units ``(N, k)``, as ``(S, *)``."""

    def chunk(self, num_points: int) -> int:
        """Return how many globals to evaluate at, at a time, with so many points each."""


@dataclass(frozen=True)
class Mapped:
    """By ``torch.func.vmap`` of a recording, which holds no Python.

    :param Recording recording: the function.
    """

    recording: Recording

    def at(self, globals_: Tensor, locals_: Tensor) -> Tensor:
        """See :class:`Points`."""
        found: Tensor = torch.func.vmap(self.recording)(globals_, locals_)
        return found

    def units_at(self, globals_: Tensor, locals_: Tensor) -> Tensor:
        """See :class:`Points`."""
        found: Tensor = torch.func.vmap(torch.func.vmap(self.recording, (None, 0)))(globals_, locals_)
        return found

    def shared_at(self, globals_: Tensor, local: Tensor) -> Tensor:
        """See :class:`Points`."""
        found: Tensor = torch.func.vmap(self.recording, (0, None))(globals_, local)
        return found

    def chunk(self, num_points: int) -> int:
        """See :class:`Points`."""
        return _chunk(self.recording.num_bytes * num_points)


class _EachPoint(ABC):
    """Points of several globals as points of their own."""

    @abstractmethod
    def at(self, globals_: Tensor, locals_: Tensor) -> Tensor:
        """See :class:`Points`."""

    def units_at(self, globals_: Tensor, locals_: Tensor) -> Tensor:
        """See :class:`Points`."""
        flat = self.at(globals_.repeat_interleave(locals_.shape[1], 0), locals_.flatten(0, 1))
        return flat.unflatten(0, locals_.shape[:2])

    def shared_at(self, globals_: Tensor, local: Tensor) -> Tensor:
        """See :class:`Points`."""
        return self.at(globals_, local.expand(len(globals_), *local.shape))


@dataclass(frozen=True)
class Broadcast(_EachPoint):
    """By a function that takes many points at once.

    :param AtOnce function: the function.
    """

    function: AtOnce

    def at(self, globals_: Tensor, locals_: Tensor) -> Tensor:
        """See :class:`Points`."""
        size = _chunk(self.function.num_bytes)
        if len(globals_) <= size:
            return self.function.at(globals_, locals_)
        chunks = zip(globals_.split(size), locals_.split(size), strict=True)
        return torch.cat([self.function.at(*some) for some in chunks])

    def chunk(self, num_points: int) -> int:
        """See :class:`Points`."""
        return _chunk(self.function.num_bytes * num_points)


@dataclass(frozen=True)
class OneByOne(_EachPoint):
    """By a loop that any function bears.

    :param function: of globals ``(d,)`` and units ``(N, k)``.
    """

    function: Density

    def at(self, globals_: Tensor, locals_: Tensor) -> Tensor:
        """See :class:`Points`."""
        return torch.stack([self.function(*point) for point in zip(globals_, locals_, strict=True)])

    def chunk(self, num_points: int) -> int:
        """See :class:`Points`: a loop is no faster for more."""
        return 1


def points_of(function: Density) -> Points:
    """Return how a function is evaluated at many points."""
    if isinstance(function, Recording):
        return Mapped(function)
    return Broadcast(function) if isinstance(function, AtOnce) else OneByOne(function)


def _chunk(num_bytes: int) -> int:
    """How many points there may be at a time, of so many bytes each."""
    return max(1, _CHUNK_BYTES // max(num_bytes, 1))


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
    points = points_of(function)
    chunk = points.chunk(1)
    return torch.cat([points.at(*some) for some in zip(globals_.split(chunk), locals_.split(chunk), strict=True)])


@dataclass(frozen=True)
class SeparableDensity:
    """The terms of a log joint by unit, and the rest that is shared.

    :param shared: of globals ``(d,)`` and units ``(N, k)``, which it does not depend on; returns a scalar.
    :param units: of the same; returns ``(N,)``, of which each element depends on the globals and its own unit alone.

    Recordings are mapped over many points, and what takes many at once gets them; others are called point by point.

    Example::

        >>> density = SeparableDensity(lambda t, y: -(t ** 2).sum(), lambda t, y: -((y - t) ** 2).sum(-1))
        >>> density.units_at(torch.zeros(1, 1), torch.ones(1, 2, 3, 1)).shape
        torch.Size([1, 2, 3])
    """

    shared: Callable[[Tensor, Tensor], Tensor]
    units: Callable[[Tensor, Tensor], Tensor]

    def shared_at(self, globals_: Tensor, local: Tensor) -> Tensor:
        """Evaluate what is shared at globals ``(S, d)``, as ``(S,)``; of units ``(N, k)`` only the shape matters."""
        return points_of(self.shared).shared_at(globals_, local)

    def units_at(self, globals_: Tensor, locals_: Tensor) -> Tensor:
        """Evaluate the terms of the units.

        :param Tensor globals_: ``(S, d)``.
        :param Tensor locals_: ``Q`` points for each of them, ``(S, Q, N, k)``.
        :return: ``(S, Q, N)``.
        """
        return points_of(self.units).units_at(globals_, locals_)

    def sum_of_units(self, globals_: Tensor, local: Tensor) -> Tensor:
        """Sum all terms at ``S`` points: globals ``(S, d)``, and units ``(S * N, k)`` in the same order.

        Units of all points together, so that what treats the units of one point treats those of all.
        """
        return self.units_at(globals_, local.unflatten(0, (len(globals_), -1)).unsqueeze(1)).sum()

    def chunk(self, num_points: int = 1) -> int:
        """Return how many globals to evaluate the units at, at a time, with so many points each."""
        return points_of(self.units).chunk(num_points)


class Recordable(Protocol):
    """A model of units that may have been recorded."""

    recording: Recording | None

    @property
    def many(self) -> Density:
        """What is evaluated at many points: the recording, or the log joint."""

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
    """Evaluate a log joint at draws, for many at once where it takes that.

    :param model: has the log joint.
    :param Tensor global_: ``(S, d)``.
    :param Tensor local: ``(S, N, k)``.
    :param parameters: leaves of the model to differentiate in as well; None for values without any gradient.
    """
    function = model.many
    if parameters is None:
        with torch.no_grad():
            values = at_points(function, global_, local)
        return Gradients(values, global_[:0].detach(), local[:0].detach(), [])
    points = points_of(function)
    chunk = points.chunk(1)
    chunks = zip(global_.split(chunk), local.split(chunk), strict=True)
    parts = [_gradients(points, *some, parameters) for some in chunks]
    columns = zip(*(part.in_parameters for part in parts), strict=True)
    return Gradients(
        values=torch.cat([part.values for part in parts]),
        in_global=torch.cat([part.in_global for part in parts]),
        in_local=torch.cat([part.in_local for part in parts]),
        in_parameters=[torch.stack(column).sum(0) for column in columns],
    )


def _gradients(points: Points, global_: Tensor, local: Tensor, parameters: Sequence[Tensor]) -> Gradients:
    """Differentiate the sum over one chunk of draws, which in the draws themselves is each one's own gradient."""
    with torch.enable_grad():
        draws = [global_.detach().requires_grad_(), local.detach().requires_grad_()]
        values = points.at(*draws)
        in_global, in_local, *rest = torch.autograd.grad(values.sum(), [*draws, *parameters], materialize_grads=True)
    # Zeros that are filled in require a gradient in some versions of torch.
    return Gradients(values.detach(), in_global.detach(), in_local.detach(), [part.detach() for part in rest])
