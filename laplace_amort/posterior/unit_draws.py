"""What is known of the units given the globals: three approximations, one above the other.

Each gives weighted points, for moments, and draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy
import torch
from torch import Tensor

from laplace_amort.guide import LaplaceGaussian
from laplace_amort.posterior.known import KnownConditionals
from laplace_amort.types import Vector
from laplace_amort.units import (
    GRID_DIM,
    Conditionals,
    GaussHermite,
    Laplace,
    QuadratureRule,
    UnitIntegrals,
    matched_normal,
    sobol_points,
)

__all__ = ["LinearUnits", "NestedUnits", "UnitPosterior", "WeightedPoints", "WeightedUnits"]

# Points from which one draw of a unit is chosen: of one dimension, two, three, and more.
_CANDIDATES = 16, 32, 32, 64
# Points for averages over a normal unit: along each of up to three dimensions, or in all.
_GRID, _MATCHED = (9, 7, 5), 256


class WeightedPoints(NamedTuple):
    """Points of every unit at ``S`` globals.

    :param Tensor points: ``(S, Q, N, k)``.
    :param Tensor log_weights: normalized over the points, ``(S, Q, N)``.
    """

    points: Tensor
    log_weights: Tensor


class UnitPosterior(Protocol):
    """The posterior of the units given the globals."""

    def points(self, globals_: Tensor) -> WeightedPoints:
        """Return points whose weighted averages are those of the posterior, at globals ``(S, d)``."""

    def draw(self, globals_: Tensor, which: Tensor, generator: torch.Generator) -> Tensor:
        """Return draws of all units, ``(M, N, k)``.

        :param Tensor globals_: ``(S, d)``.
        :param Tensor which: for each draw, at which of these globals, ``(M,)``.
        :param torch.Generator generator: of random numbers.
        """

    def chunk(self) -> int:
        """How many globals to ask for at a time."""


@dataclass(frozen=True)
class LinearUnits:
    """Normal, with a mean that is linear in the globals: the units of the Gaussian itself.

    :param LaplaceGaussian gaussian: the guide.
    """

    gaussian: LaplaceGaussian

    def points(self, globals_: Tensor) -> WeightedPoints:
        """See :class:`UnitPosterior`."""
        return _normal_points(self._conditionals(globals_))

    def draw(self, globals_: Tensor, which: Tensor, generator: torch.Generator) -> Tensor:
        """See :class:`UnitPosterior`."""
        return _normal_draw(self._conditionals(globals_), which, generator)

    def chunk(self) -> int:
        """See :class:`UnitPosterior`."""
        return max(1, 2**20 // max(self.gaussian.local_loc.numel(), 1))

    def _conditionals(self, globals_: Tensor) -> Conditionals:
        gaussian = self.gaussian
        mode = gaussian.local_loc + gaussian.precision.conditional_mean(globals_ - gaussian.global_loc)
        scale = gaussian.precision.local_scale_tril.expand(len(globals_), *gaussian.precision.tail.shape)
        return Conditionals(mode, scale, torch.ones_like(mode[..., 0], dtype=torch.bool))


@dataclass(frozen=True)
class NestedUnits:
    """Normal around the mode at each value of the globals, with the curvature there.

    :param LaplaceGaussian gaussian: where the modes are about.
    :param UnitIntegrals integrals: of the model.

    Attribute ``known``: what was found of the conditionals before; :func:`dataclasses.replace` makes it anew.
    """

    gaussian: LaplaceGaussian
    integrals: UnitIntegrals
    known: KnownConditionals = field(default_factory=KnownConditionals, init=False, repr=False, compare=False)

    @property
    def how(self) -> QuadratureRule:
        """How the units are integrated over."""
        return Laplace()

    def points(self, globals_: Tensor) -> WeightedPoints:
        """See :class:`UnitPosterior`."""
        return _normal_points(self.conditionals(globals_))

    def draw(self, globals_: Tensor, which: Tensor, generator: torch.Generator) -> Tensor:
        """See :class:`UnitPosterior`."""
        return _normal_draw(self.conditionals(globals_), which, generator)

    def chunk(self) -> int:
        """See :class:`UnitPosterior`."""
        return self.integrals.density.chunk(4)

    def conditionals(self, globals_: Tensor) -> Conditionals:
        """Return modes and curvatures at globals ``(S, d)``."""
        return self.known.at(globals_, lambda new: self.search.conditionals(new, self.start(new)))

    def by(self, rule: QuadratureRule) -> WeightedUnits:
        """Return the same with points of a rule, around the modes that are known."""
        other = WeightedUnits(self.gaussian, self.integrals, rule)
        object.__setattr__(other, "known", self.known.copy())
        return other

    @property
    def search(self) -> UnitIntegrals:
        """What finds modes and curvatures."""
        return self.integrals

    def start(self, globals_: Tensor) -> Tensor:
        """Guess the modes at globals ``(S, d)``, as ``(S, N, k)``."""
        gaussian = self.gaussian
        linear = gaussian.local_loc + gaussian.precision.conditional_mean(globals_ - gaussian.global_loc)
        return self.known.predicted(globals_, linear)


@dataclass(frozen=True)
class WeightedUnits(NestedUnits):
    """The density that the model has: points around the mode with the weights that the density gives them.

    A draw is one of some candidates, chosen by their weights.

    :param QuadratureRule rule: of the points.
    """

    rule: QuadratureRule = GaussHermite(9)

    def points(self, globals_: Tensor) -> WeightedPoints:
        """See :class:`UnitPosterior`."""
        rule = self.rule.points(self.gaussian.local_loc.shape[1], globals_)
        points = self.conditionals(globals_).at(rule.points)
        return WeightedPoints(points, rule.log_weights(self.integrals.density.units_at(globals_, points)))

    def draw(self, globals_: Tensor, which: Tensor, generator: torch.Generator) -> Tensor:
        """See :class:`UnitPosterior`. Draws at the same globals are chosen from the same candidates."""
        there = self.conditionals(globals_)
        points, log_density = self._candidates(there, generator)
        candidates = there.at(points)
        density, chunk = self.integrals.density, self.integrals.density.chunk(candidates.shape[1])
        pairs = zip(globals_.split(chunk), candidates.split(chunk), strict=True)
        log_ratios = torch.cat([density.units_at(*pair) for pair in pairs]) - log_density
        log_ratios = log_ratios.nan_to_num(nan=-torch.inf)
        log_ratios = log_ratios.masked_fill((log_ratios == -torch.inf).all(1, keepdim=True), 0.0)
        cumulated = log_ratios.softmax(1).cumsum(1)
        uniform = torch.rand(len(which), 1, log_ratios.shape[-1], generator=generator, dtype=torch.float64)
        parts = [
            (cumulated[some] < u).sum(1)
            for some, u in zip(which.split(len(globals_)), uniform.to(cumulated).split(len(globals_)), strict=True)
        ]
        chosen = torch.cat(parts).clamp(max=candidates.shape[1] - 1)
        units = torch.arange(candidates.shape[2], device=chosen.device)
        return candidates[which.unsqueeze(-1), chosen, units]

    @property
    def how(self) -> QuadratureRule:
        """How the units are integrated over."""
        return self.rule

    @property
    def search(self) -> UnitIntegrals:
        """What finds modes and curvatures, as exact as points around them need be."""
        return self.integrals.loose()

    def chunk(self) -> int:
        """See :class:`UnitPosterior`."""
        num_points = len(self.rule.points(self.gaussian.local_loc.shape[1], self.gaussian.global_loc).points)
        return self.integrals.density.chunk(num_points)

    def _candidates(self, there: Conditionals, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Points ``(S, M, N, k)`` of a t distribution, evenly spread but shifted at random; and their log density."""
        s, n, k = there.mode.shape
        grid = torch.from_numpy(_evenly_spread(_CANDIDATES[min(k, len(_CANDIDATES)) - 1], k + (k > 1)))
        shift = torch.rand(s, 1, n, grid.shape[-1], generator=generator, dtype=torch.float64)
        uniform = (grid[:, None] + shift).remainder(1.0).clamp(1e-9, 1 - 1e-9).to(there.mode)
        points = _t2_points(uniform)
        return points, _t2_log_density(points)


def _evenly_spread(number: int, dim: int) -> Vector:
    """Points of the unit cube, ``(M, dim)``: equal steps along one dimension, of more a balanced set."""
    return numpy.arange(number)[:, None] / number if dim == 1 else sobol_points(number, dim, seed=0)


def _t2_points(uniform: Tensor) -> Tensor:
    """Points of a t distribution of two degrees of freedom, whose quantiles are elementary, as ``(*, k)``.

    :param Tensor uniform: a coordinate for each dimension, and one for the common scale if there are several.
    """
    if uniform.shape[-1] == 1:
        return (2 * uniform - 1) * (2 * uniform * (1 - uniform)).rsqrt()
    return torch.special.ndtri(uniform[..., :-1]) * (-torch.log(uniform[..., -1:])).rsqrt()


def _t2_log_density(points: Tensor) -> Tensor:
    k = points.shape[-1]
    constant = math.lgamma(1 + k / 2) - k / 2 * math.log(2 * math.pi)
    return constant - (1 + k / 2) * torch.log1p((points**2).sum(-1) / 2)


def _normal_points(there: Conditionals) -> WeightedPoints:
    k = there.mode.shape[-1]
    if k <= GRID_DIM:
        points, log_probs, _ = GaussHermite(_GRID[k - 1]).points(k, there.mode)
    else:
        points = torch.from_numpy(matched_normal(_MATCHED, k, seed=0)).to(there.mode)
        log_probs = points.new_full((_MATCHED,), -math.log(_MATCHED))
    found = there.at(points)
    return WeightedPoints(found, log_probs[:, None].expand(found.shape[:-1]))


def _normal_draw(there: Conditionals, which: Tensor, generator: torch.Generator) -> Tensor:
    there = Conditionals(*(part[which] for part in there))
    noise = torch.randn(there.mode.shape, generator=generator, dtype=torch.float64).to(there.mode)
    return there.at(noise.unsqueeze(1)).squeeze(1)
