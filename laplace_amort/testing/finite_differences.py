r"""Central differences with Richardson extrapolation and an estimate of their own error.

Three steps :math:`h, h/2, h/4` give an error of order :math:`h^6`; the difference of the last two extrapolations
bounds it. Several :math:`h` are tried and for each component the one with the smallest estimate is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["derivative", "second_derivative"]

# Displacements worth trying, in order of preference, by the precision that the function is computed in.
_STEPS = {torch.float64: (1e-2, 1e-3, 1e-1, 1e-4, 1e-5), torch.float32: (1e-1, 3e-2, 3e-1)}
# Of second derivatives: rounding errors grow with the square of the inverse step.
_SECOND_STEPS = {torch.float64: (0.1, 0.2, 0.05, 0.02, 0.5), torch.float32: (0.3, 0.6, 0.15)}


def derivative(
    fn: Callable[[float], Tensor], dtype: torch.dtype, tolerance: float, floor: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Differentiate a vector-valued function of one real number at zero.

    :param fn: takes a displacement, returns a tensor ``(Q,)`` without a graph.
    :param torch.dtype dtype: that the function is computed in; decides the steps.
    :param float tolerance: stop as soon as the estimated errors are this small, relative to the derivatives.
    :param floor: absolute size ``(Q,)`` below which a derivative counts as this large.
    :return: derivatives ``(Q,)`` and estimates of their absolute errors ``(Q,)``.

    Example::

        >>> import torch
        >>> value, error = derivative(lambda h: torch.tensor([1 + h], dtype=torch.float64).sin(), torch.float64, 1e-9)
        >>> bool((value - torch.tensor(1.).double().cos()).abs() < 1e-11)
        True
    """

    def quotient(h: float) -> Tensor:
        return (fn(h) - fn(-h)) / (2 * h)

    return _best(quotient, _STEPS[dtype], tolerance, floor)


def second_derivative(fn: Callable[[float], Tensor], dtype: torch.dtype, tolerance: float) -> tuple[Tensor, Tensor]:
    """Differentiate a vector-valued function of one real number twice at zero.

    :param fn: takes a displacement, of which 1 is a step of the size of its features, returns a tensor ``(Q,)``.
    :param torch.dtype dtype: that the function is computed in; decides the steps.
    :param float tolerance: stop as soon as the estimated errors are this small; relative where derivatives exceed 1.
    :return: second derivatives ``(Q,)`` and estimates of their absolute errors ``(Q,)``.

    Example::

        >>> import torch
        >>> exp = lambda h: torch.tensor([h], dtype=torch.float64).exp()
        >>> value, error = second_derivative(exp, torch.float64, 1e-8)
        >>> bool((value - 1).abs() < 1e-9)
        True
    """
    twice = 2 * fn(0.0)

    def quotient(h: float) -> Tensor:
        return (fn(h) - twice + fn(-h)) / h**2

    return _best(quotient, _SECOND_STEPS[dtype], tolerance, 1.0)


def _best(
    quotient: Callable[[float], Tensor], steps: Sequence[float], tolerance: float, floor: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Try one step after the other; of each component keep the value with the smallest estimated error."""
    first, *others = steps
    best, best_error = _extrapolate(quotient, first)
    for step in others:
        if (best_error <= tolerance * best.abs().clamp(min=floor)).all():
            break
        value, error = _extrapolate(quotient, step)
        better = error < best_error
        best, best_error = torch.where(better, value, best), torch.where(better, error, best_error)
    return best, best_error


def _extrapolate(quotient: Callable[[float], Tensor], step: float) -> tuple[Tensor, Tensor]:
    central = [quotient(h) for h in (step, step / 2, step / 4)]
    first = [(4 * fine - coarse) / 3 for coarse, fine in itertools.pairwise(central)]
    second = (16 * first[1] - first[0]) / 15
    error = (second - first[1]).abs()
    return second, torch.where(torch.isfinite(error), error, torch.full_like(error, float("inf")))
