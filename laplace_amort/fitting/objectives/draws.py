"""Standard normal draws in pairs of opposite sign, and averages over them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Draws", "antithetic_draws", "mean_of_pairs"]


class Draws(NamedTuple):
    """Standard normal numbers for globals and units.

    :param Tensor global_: ``(S, d)``.
    :param Tensor local: ``(S, N, k)``.
    """

    global_: Tensor
    local: Tensor

    def half_squares(self) -> Tensor:
        """Return half the sum of squares of each draw, ``(S,)``; on average this is half the dimension."""
        return ((self.global_**2).sum(-1) + (self.local**2).flatten(1).sum(-1)) / 2


def antithetic_draws(num_draws: int, global_: Tensor, local: Tensor, seed: int) -> Draws:
    """Return draws in pairs of opposite sign, so that all odd moments are exactly zero.

    Do not take an odd number of them. Pairs are independent of each other: a standard error is that of their averages.

    :param int num_draws: ``S``, even.
    :param Tensor global_: has the shape ``(d,)``, dtype and device of the globals.
    :param Tensor local: ``(N, k)``, the same for the units.
    :param int seed: of a generator of its own; that of torch stays as it is.
    :raises ValueError: if the number is odd or not positive.

    Example::

        >>> import torch
        >>> draws = antithetic_draws(4, torch.zeros(2), torch.zeros(3, 1), seed=0)
        >>> draws.local.shape, draws.global_.sum().item()
        (torch.Size([4, 3, 1]), 0.0)
    """
    if num_draws < 2 or num_draws % 2:
        raise ValueError(f"draws come in pairs of opposite sign, so their number must be even, got {num_draws}")
    generator = torch.Generator().manual_seed(seed)

    def pairs(like: Tensor) -> Tensor:
        half = torch.randn(num_draws // 2, *like.shape, generator=generator, dtype=torch.float64).to(like)
        return torch.cat([half, -half])

    return Draws(pairs(global_), pairs(local))


def mean_of_pairs(*terms: Tensor) -> tuple[float, float]:
    """Return mean and standard error of the terms of antithetic draws.

    :param terms: ``(S,)``, one for each batch of draws, with pairs half their number apart.
    """
    pairs = torch.cat([batch.double().unflatten(0, (2, -1)).mean(0) for batch in terms])
    error = float(pairs.std()) / len(pairs) ** 0.5 if len(pairs) > 1 else math.inf
    return float(pairs.mean()), error
