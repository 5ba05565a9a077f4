"""What every room speaks of: vectors of optimizers, densities, and numbers in words."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Density", "Vector", "default_dtype", "element_name", "element_names", "in_sd", "to_numpy"]

# What optimizers move: parameters in one row, in double precision.
Vector = NDArray[numpy.float64]
# A log density: of globals ``(d,)`` and units ``(N, k)``, or of any tensors, to a scalar.
Density = Callable[..., Tensor]


def to_numpy(tensor: Tensor) -> Vector:
    """Return the values of a tensor in double precision, without its graph.

    :param Tensor tensor: of any shape, real type and device.
    :return: an array of that shape.
    """
    values: Vector = tensor.detach().cpu().double().numpy()
    return values


def element_name(name: str, index: Iterable[int]) -> str:
    """Name one element of a site.

    :param str name: of the site.
    :param index: of the element, empty where the site is one number.

    Example::

        >>> element_name("B", (0, 1)), element_name("tau", ())
        ('B[0, 1]', 'tau')
    """
    numbers = ", ".join(map(str, index))
    return f"{name}[{numbers}]" if numbers else name


def element_names(name: str, shape: Sequence[int]) -> list[str]:
    """Name the elements of a site in the order in which they are stored.

    :param str name: of the site.
    :param shape: of its value.

    Example::

        >>> element_names("tau", ()), element_names("beta", (2,)), element_names("L", (1, 2))
        (['tau'], ['beta[0]', 'beta[1]'], ['L[0, 0]', 'L[0, 1]'])
    """
    return [element_name(name, index) for index in itertools.product(*map(range, shape))]


@contextmanager
def default_dtype(dtype: torch.dtype = torch.float64) -> Iterator[None]:
    """Run with another default dtype of torch, and bring back the one that was."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def in_sd(value: float) -> str:
    """Say how many standard deviations something is, rounding errors as what they are.

    Example::

        >>> in_sd(0.1234), in_sd(2.8e-17)
        ('0.12 sd', 'under 0.001 sd')
    """
    return "under 0.001 sd" if abs(value) < 1e-3 else f"{value:.2g} sd"
