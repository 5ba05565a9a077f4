r"""Rules for integrals over one unit: points and weights for a normal or a Student-t variable of ``k`` dimensions.

A rule with points :math:`\epsilon_q`, probabilities :math:`p_q` and a density :math:`\pi` stands for

.. math:: \int e^{h(y)} dy \approx |T| \sum_q p_q \frac{e^{h(\hat y + T \epsilon_q)}}{\pi(\epsilon_q)},

with the mode :math:`\hat y` of :math:`h` and :math:`T T^\top` the inverse of its curvature there. One point at zero is
the Laplace approximation.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy
import torch
from torch import Tensor

from laplace_amort.types import Vector
from laplace_amort.units.points import matched_normal, sobol_points, student_log_density, student_points

__all__ = [
    "GRID_DIM",
    "GaussHermite",
    "Laplace",
    "NormalPoints",
    "QuadraturePoints",
    "QuadratureRule",
    "StudentPoints",
    "accurate_rule",
]

# Dimensions, and points, up to which a grid is taken without being asked for.
GRID_DIM, _MOST = 3, 1000
# Points of one rule along a line, beyond which their weights underflow; and of one panel of several side by side.
_ALONG, _PANEL = 257, 64
# Dimensions up to which points of a t cover a normal unit.
_STUDENT_DIM = 8
# By what factor the weights of points may be changed.
_CHANGED = 3.0


class QuadraturePoints(NamedTuple):
    r"""A rule at work.

    :param Tensor points: :math:`\epsilon`, ``(Q, k)``.
    :param Tensor log_probs: :math:`\log p`, ``(Q,)``; the probabilities sum to one.
    :param Tensor log_density: :math:`\log \pi(\epsilon)`, ``(Q,)``.
    """

    points: Tensor
    log_probs: Tensor
    log_density: Tensor

    def log_integral(self, values: Tensor) -> Tensor:
        r"""Return :math:`\log \sum_q p_q e^{h_q} / \pi_q` for values ``(*, Q, N)``, as ``(*, N)``."""
        return (values + (self.log_probs - self.log_density).unsqueeze(-1)).logsumexp(-2)

    def log_weights(self, values: Tensor) -> Tensor:
        """Return the normalized logarithms of the weights of the points, ``(*, Q, N)``, for values of that shape."""
        return (values + (self.log_probs - self.log_density).unsqueeze(-1)).log_softmax(-2)

    def mean_gain(self, values: Tensor) -> Tensor:
        r"""Return :math:`\sum_q p_q (h_q - \log\pi_q)`, the lower bound by Jensen's inequality, ``(*, N)``."""
        return ((values - self.log_density.unsqueeze(-1)) * self.log_probs.exp().unsqueeze(-1)).sum(-2)


@runtime_checkable
class QuadratureRule(Protocol):
    """How the latents of a unit are integrated over; any object with these two methods."""

    def points(self, local_dim: int, like: Tensor) -> QuadraturePoints:
        """Return the points for units of ``k`` dimensions, in the dtype and on the device of a tensor."""

    def finer(self, local_dim: int) -> QuadratureRule:
        """Return a rule with more points, to compare with."""


@dataclass(frozen=True)
class Laplace:
    """One point, at the mode.

    Do not use it where a unit says little: its error does not fall with the number of units, while what it is compared
    with, the posterior standard deviation, does.

    Example::

        >>> Laplace().points(2, torch.zeros(()))
        QuadraturePoints(points=tensor([[0., 0.]]), log_probs=tensor([0.]), log_density=tensor([-1.8379]))
    """

    def points(self, local_dim: int, like: Tensor) -> QuadraturePoints:
        """Return the point."""
        zero = like.new_zeros(1)
        return QuadraturePoints(zero.expand(local_dim).unsqueeze(0), zero, zero - local_dim / 2 * math.log(2 * math.pi))

    def finer(self, local_dim: int) -> QuadratureRule:
        """Return a rule with more points."""
        return GaussHermite(5) if local_dim <= GRID_DIM else _scattered(local_dim)


@dataclass(frozen=True)
class GaussHermite:
    r"""Gauss and Hermite's rule around the mode, in a grid of :math:`n^k` points.

    It is exact where the unit's density is normal times a polynomial of degree :math:`2n - 1`. Do not use it for more
    than three dimensions, where the grid is out of hand, nor for tails far heavier than a normal's:
    :class:`StudentPoints`.

    :param int num_points: :math:`n`, along each dimension.
    :raises ValueError: if there are none, or if the grid has too many.

    Example: the fourth moment of a standard normal::

        >>> points, log_probs, _ = GaussHermite(3).points(1, torch.zeros(()))
        >>> (log_probs.exp() * points.squeeze() ** 4).sum()
        tensor(3.0000)

    Reference: Liu & Pierce (1994), *A note on Gauss-Hermite quadrature*, Biometrika 81(3).
    """

    num_points: int = 9

    def __post_init__(self) -> None:
        if not 1 <= self.num_points <= _ALONG:
            raise ValueError(f"num_points must be between 1 and {_ALONG}, got {self.num_points}")

    def points(self, local_dim: int, like: Tensor) -> QuadraturePoints:
        """Return the grid."""
        if self.num_points**local_dim > _MOST:
            raise ValueError(
                f"a grid of {self.num_points} points along each of the {local_dim} dimensions of a unit has "
                f"{self.num_points**local_dim} points. Take points that do not lie in a grid:\n    StudentPoints(256)"
            )
        nodes, weights = numpy.polynomial.hermite_e.hermegauss(self.num_points)
        grid = numpy.array(list(itertools.product(nodes, repeat=local_dim)))
        probs = numpy.array([math.prod(w) for w in itertools.product(weights / weights.sum(), repeat=local_dim)])
        density = -(grid**2).sum(-1) / 2 - local_dim / 2 * math.log(2 * math.pi)
        return QuadraturePoints(*(torch.from_numpy(part).to(like) for part in (grid, numpy.log(probs), density)))

    def finer(self, local_dim: int) -> QuadratureRule:
        """Return nearly twice as many points along each dimension, or where these are too many another rule."""
        num_points = max(3, 2 * self.num_points - 1)
        if local_dim <= GRID_DIM and num_points <= _ALONG and num_points**local_dim <= _MOST:
            return GaussHermite(num_points)
        return StudentPoints(min(max(256, num_points, self.num_points**local_dim), _MOST))


@dataclass(frozen=True)
class StudentPoints:
    r"""Quasi-random points of a Student-t distribution around the mode: importance sampling of each unit.

    The tails of the t hold the weights in bounds for nearly every unit, and any number of dimensions will do. The
    points are the same for all units and always, so that the integral is a smooth function; its error falls somewhat
    faster than their number grows. Their weights are such that mass, mean and covariance of a normal unit come out
    exactly. In one dimension they are Gauss and Legendre's on the scale of probabilities, and it is quadrature.

    Do not use it where :class:`GaussHermite` serves: that takes fewer points for the same accuracy.

    :param int num_points: rounded up to a power of two in more than one dimension.
    :param float df: degrees of freedom.
    :param int seed: of the points.
    :raises ValueError: if a number is out of its range.

    Example::

        >>> StudentPoints(3, df=1.0).points(1, torch.zeros(())).points.squeeze()
        tensor([-2.7053,  0.0000,  2.7053])
    """

    num_points: int = 256
    df: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_points < 1:
            raise ValueError(f"num_points must be at least 1, got {self.num_points}")
        if not 0 < self.df < math.inf:
            raise ValueError(f"df must be positive and finite, got {self.df}")

    def points(self, local_dim: int, like: Tensor) -> QuadraturePoints:
        """Return the points."""
        if local_dim == 1:  # Gauss and Legendre's rule, on the scale of probabilities
            panels = math.ceil(self.num_points / _PANEL)
            nodes, weights = numpy.polynomial.legendre.leggauss(math.ceil(self.num_points / panels))
            uniform = ((numpy.arange(panels)[:, None] + (nodes + 1) / 2) / panels).reshape(-1, 1)
            probs = numpy.tile(weights / weights.sum() / panels, panels)
        else:
            num_points = 2 ** math.ceil(math.log2(self.num_points))
            uniform = sobol_points(num_points, local_dim + 1, self.seed)
            probs = numpy.full(num_points, 1 / num_points)
        grid = student_points(uniform, self.df)
        log_density = student_log_density(grid, self.df)
        if local_dim > 1:
            log_density = _calibrated(grid, log_density)
        parts = grid, numpy.log(probs), log_density
        return QuadraturePoints(*(torch.from_numpy(part).to(like) for part in parts))

    def finer(self, local_dim: int) -> QuadratureRule:
        """Return four times as many points, others."""
        return StudentPoints(4 * self.num_points, self.df, self.seed + 1)


@dataclass(frozen=True)
class NormalPoints:
    r"""Quasi-random points of a normal distribution around the mode, for units of many dimensions.

    Importance sampling of each unit whose proposal is the Laplace approximation: of a normal unit all weights are the
    same, in any number of dimensions, where those of :class:`StudentPoints` say less and less from ten on. Mean and
    covariance of the points are those of the distribution.

    Do not use it for units whose tails are heavier than a normal's.

    :param int num_points: a power of two; more are taken where a unit has as many dimensions.
    :param int seed: of the points.
    :raises ValueError: if there are none.

    Example::

        >>> points = NormalPoints(64).points(10, torch.zeros((), dtype=torch.float64)).points
        >>> bool(torch.allclose(points.mT @ points / len(points), torch.eye(10, dtype=torch.float64)))
        True
    """

    num_points: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_points < 1:
            raise ValueError(f"num_points must be at least 1, got {self.num_points}")

    def points(self, local_dim: int, like: Tensor) -> QuadraturePoints:
        """Return the points."""
        number = 2 ** math.ceil(math.log2(max(self.num_points, 4 * local_dim)))
        grid = matched_normal(number, local_dim, self.seed)
        log_density = -(grid**2).sum(-1) / 2 - local_dim / 2 * math.log(2 * math.pi)
        parts = grid, numpy.full(number, -math.log(number)), log_density
        return QuadraturePoints(*(torch.from_numpy(part).to(like) for part in parts))

    def finer(self, local_dim: int) -> QuadratureRule:
        """Return four times as many points, others."""
        return NormalPoints(4 * self.num_points, self.seed + 1)


def accurate_rule(local_dim: int) -> QuadratureRule:
    """Return a rule that nearly every unit of ``k`` dimensions is integrated well by."""
    return GaussHermite(9 if local_dim <= 2 else 5) if local_dim <= GRID_DIM else _scattered(local_dim)


def _scattered(local_dim: int) -> QuadratureRule:
    """Return the rule without a grid that suits units of ``k`` dimensions."""
    return StudentPoints(256) if local_dim <= _STUDENT_DIM else NormalPoints(256)


def _calibrated(points: Vector, log_density: Vector) -> Vector:
    r"""Change a density a little so that mass, mean and covariance of a standard normal come out exactly.

    The weights of the points are multiplied by :math:`1 + \lambda^\top \psi e^{-|\epsilon|^2 / 4}` with the moments
    :math:`\psi` of first and second order: a regression estimator, whose factor is near one everywhere.

    :param Vector points: ``(Q, k)``.
    :param Vector log_density: of what they are drawn from, ``(Q,)``.
    :return: ``(Q,)``; the same as before where there are too few points.
    """
    q, k = points.shape
    rows, columns = numpy.triu_indices(k)
    moments = numpy.hstack([numpy.ones((q, 1)), points, points[:, rows] * points[:, columns]])
    wanted = numpy.concatenate([[1.0], numpy.zeros(k), 1.0 * (rows == columns)])
    normal = numpy.exp(-(points**2).sum(-1) / 2 - k / 2 * math.log(2 * math.pi) - log_density) / q
    damped = moments * numpy.exp(-(points**2).sum(-1, keepdims=True) / 4)
    missing = wanted - normal @ moments
    factor = 1 + damped @ numpy.linalg.lstsq((normal[:, None] * moments).T @ damped, missing, rcond=None)[0]
    near_one = factor.min() > 1 / _CHANGED and factor.max() < _CHANGED
    calibrated: Vector = log_density - numpy.log(factor) if near_one else log_density
    return calibrated
