"""Coordinates in which a posterior is about standard normal, so that an optimizer meets one scale only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from laplace_amort.linalg.arrowhead import Arrowhead
from laplace_amort.types import Vector

__all__ = [
    "Whitening",
]


# Smallest share of the largest precision that a direction counts with: one that says nothing has no standard deviation.
_LEAST = 1e-10


@dataclass(frozen=True)
class Whitening:
    r"""A linear map from standard deviations to parameters: globals first, then units, then what has no known scale.

    :param Arrowhead precision: of globals and units.
    :param bool with_units: whether the units are among the parameters, after the globals.
    :param int size: number ``P`` of parameters; those after globals and units keep their own scale.

    Example: a precision of 4 is a standard deviation of a half::

        >>> whitening = Whitening.of_information(numpy.array([[4.0]]))
        >>> whitening.step(numpy.ones(1)), whitening.vjp(numpy.ones(1))
        (array([0.5]), array([0.5]))
    """

    precision: Arrowhead
    with_units: bool
    size: int

    @classmethod
    def of_information(cls, information: Vector) -> Whitening:
        """Return those of a dense information of globals ``(d, d)``; of negative curvature the size counts."""
        matrix = torch.from_numpy(numpy.ascontiguousarray(information))
        eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
        size = eigenvalues.abs()
        size = size.clamp(min=max(_LEAST * float(size.max()), torch.finfo(size.dtype).tiny) if len(size) else 0.0)
        head = (eigenvectors * size) @ eigenvectors.mT
        d = len(head)
        return cls(Arrowhead((head + head.mT) / 2, head.new_zeros(0, 1, d), head.new_zeros(0, 1, 1)), False, d)

    def numbers(self) -> dict[str, Any]:
        """Return what :meth:`of_numbers` takes; without units among the parameters, nothing of the units is in it."""
        precision = self.precision
        units = (precision.head, precision.border, precision.tail) if self.with_units else None
        return {"schur": precision.schur_complement, "units": units, "size": self.size}

    @classmethod
    def of_numbers(cls, numbers: Mapping[str, Any]) -> Whitening:
        """Return the map that :meth:`numbers` are of."""
        schur, units, size = numbers["schur"], numbers["units"], numbers["size"]
        d = len(schur)
        if units is None:
            return cls(Arrowhead(schur, schur.new_zeros(0, 1, d), schur.new_zeros(0, 1, 1)), False, size)
        return cls(Arrowhead(*units).with_schur(schur), True, size)

    def step(self, u: Vector) -> Vector:
        """Return the step in parameters ``(P,)`` for one in standard deviations, ``(P,)``."""
        return self._step(self._tensor(u)).double().cpu().numpy()

    def vjp(self, gradient: Vector) -> Vector:
        """Return the gradient in standard deviations ``(P,)`` for one in parameters, ``(P,)``: the transposed map."""
        u = self._tensor(numpy.zeros(self.size)).requires_grad_()
        with torch.enable_grad():
            (found,) = torch.autograd.grad(self._step(u), u, self._tensor(gradient))
        return found.double().cpu().numpy()

    def norm(self, gradient: Vector) -> float:
        """Return the length of a gradient in parameters, in standard deviations."""
        return float(numpy.linalg.norm(self.vjp(gradient)))

    def distance(self, difference: Vector) -> float:
        """Return the length of a difference of globals, in standard deviations; other parameters do not count."""
        d = self.precision.global_dim
        whitened = torch.linalg.solve_triangular(
            self.precision.global_scale_tril.detach(), self._tensor(difference)[:d, None], upper=False
        )
        return float(whitened.norm())

    def _tensor(self, vector: Vector) -> Tensor:
        return torch.from_numpy(numpy.ascontiguousarray(vector)).to(self.precision.head)

    def _step(self, u: Tensor) -> Tensor:
        d = self.precision.global_dim
        if not self.with_units:
            return torch.cat([self.precision.global_scale_tril @ u[:d], u[d:]])
        shape = self.precision.num_units, self.precision.local_dim
        stop = d + shape[0] * shape[1]
        global_, local = self.precision.draw(u[:d], u[d:stop].reshape(shape))
        return torch.cat([global_, local.reshape(-1), u[stop:]])
