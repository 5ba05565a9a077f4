"""Fixed random points: where a check looks beside a point of symmetry, and the directions it looks along."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fixed_normal", "nearby"]


def fixed_normal(like: Tensor, seed: int = 0) -> Tensor:
    """Return standard normal numbers in the shape, dtype and device of a tensor, the same in every run.

    Drawn in double precision, so that single precision sees the same numbers, rounded.

    :param Tensor like: of any shape.
    :param int seed: another one for other numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def nearby(value: Tensor, share: float, seed: int = 0) -> Tensor:
    """Return a fixed random point beside another: at a point of symmetry derivatives vanish that do not elsewhere.

    :param Tensor value: of any shape.
    :param float share: standard deviation of the step.
    :param int seed: another one for another point.

    Example::

        >>> import torch
        >>> bool((nearby(torch.zeros(2), 0.1) == nearby(torch.zeros(2), 0.1)).all())
        True
    """
    return value.detach() + share * fixed_normal(value, seed)
