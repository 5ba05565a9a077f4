r"""A log joint as a sum over units, at many points at once.

.. math:: f(\theta, y) = g(\theta) + \sum_i h_i(\theta, y_i).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_amort.recording import Recording

__all__ = ["SeparableDensity"]

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
