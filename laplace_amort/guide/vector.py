"""Parameters as one vector in double precision, as optimizers see them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy
import torch
from torch import Tensor

from laplace_amort.types import Vector

__all__ = ["set_vector", "to_vector"]


def to_vector(parameters: Iterable[Tensor]) -> Vector:
    """Join the values of parameters."""
    parts = [parameter.detach().reshape(-1).double() for parameter in parameters]
    return torch.cat(parts).cpu().numpy() if parts else numpy.zeros(0)


@torch.no_grad()
def set_vector(parameters: Iterable[Tensor], vector: Vector) -> None:
    """Give parameters their parts of a vector, in place."""
    start = 0
    for parameter in parameters:
        stop = start + parameter.numel()
        parameter.copy_(torch.from_numpy(vector[start:stop]).reshape(parameter.shape))
        start = stop
