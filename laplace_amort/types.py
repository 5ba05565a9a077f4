"""Types that every room speaks of: vectors of optimizers, densities, and statuses that are sentences."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import numpy
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Density", "Status", "Vector", "to_numpy"]

# What optimizers move: parameters in one row, in double precision.
Vector = NDArray[numpy.float64]
# A log density: of globals ``(d,)`` and units ``(N, k)``, or of any tensors, to a scalar.
Density = Callable[..., Tensor]


class Status(IntEnum):
    """Base of enumerations whose members are pairs of a code and a sentence; ``str(status)`` is the sentence.

    Example::

        >>> class Answer(Status):
        ...     YES = 0, "it is so"
        >>> print(Answer(0))
        it is so
    """

    sentence: str

    def __new__(cls, code: int, sentence: str) -> Status:
        """Attach the sentence to its code."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.sentence = sentence
        return member

    def __str__(self) -> str:
        return self.sentence


def to_numpy(tensor: Tensor) -> Vector:
    """Return the values of a tensor in double precision, without its graph.

    :param Tensor tensor: of any shape, real type and device.
    :return: an array of that shape.
    """
    values: Vector = tensor.detach().cpu().double().numpy()
    return values
