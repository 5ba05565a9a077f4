"""Quantiles of draws, of all the same weight or not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from laplace_amort.types import Vector

__all__ = ["check_probabilities", "quantiles_of_draws", "weighted_quantiles"]


def check_probabilities(probabilities: Sequence[float]) -> None:
    """Refuse what is no probability.

    :raises ValueError: if one is not between 0 and 1.
    """
    if not all(0 <= float(probability) <= 1 for probability in probabilities):
        raise ValueError(f"quantiles must be between 0 and 1, got {list(map(float, probabilities))}")


def quantiles_of_draws(values: Tensor, probabilities: Sequence[float]) -> Tensor:
    """Return what ``torch.quantile`` does along the first dimension, for any number of elements.

    :param Tensor values: ``(S, *shape)``.
    :param probabilities: ``Q`` of them.
    :return: ``(Q, *shape)``.
    """
    ordered = values.sort(0).values
    position = torch.as_tensor(probabilities).to(values) * (len(values) - 1)
    low = position.floor().long()
    share = (position - low).reshape(-1, *(1,) * (values.dim() - 1))
    return torch.lerp(ordered[low], ordered[(low + 1).clamp(max=len(values) - 1)], share.expand_as(ordered[low]))


def weighted_quantiles(values: Vector, weights: Vector, probabilities: Sequence[float]) -> Vector:
    """Return quantiles of weighted draws: half of the weight of a draw lies below its value.

    :param Vector values: ``(S, *shape)``.
    :param Vector weights: that sum to one, ``(S,)``.
    :param probabilities: ``Q`` of them.
    :return: ``(Q, *shape)``.

    Example: the median of three values, of which one has half of the weight::

        >>> weighted_quantiles(numpy.array([3.0, 1.0, 2.0]), numpy.array([0.25, 0.5, 0.25]), [0.25, 0.625])
        array([1., 2.])
    """
    flat = values.reshape(len(values), -1)
    found = numpy.empty((len(probabilities), flat.shape[1]))
    for column, order in enumerate(flat.argsort(0).T):
        below = weights[order].cumsum() - weights[order] / 2
        found[:, column] = numpy.interp(probabilities, below, flat[order, column])
    return found.reshape(len(probabilities), *values.shape[1:])
