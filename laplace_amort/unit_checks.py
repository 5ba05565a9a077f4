"""How far the conditionals of the units are from normal, at given globals: moments, tails, and other modes."""

from __future__ import annotations

from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from laplace_amort import blocks
from laplace_amort.conditionals import Conditionals, UnitIntegrals
from laplace_amort.coordinates import Vector
from laplace_amort.psis import pareto_smoothed
from laplace_amort.rules import Points, UnitRule, sobol_points

__all__ = ["OtherModes", "UnitMoments", "other_modes", "unit_k_hat", "unit_moments"]

# Normal draws of each unit for the shape of its tails, and units that it is found for: those whose weights vary most.
_DRAWS, _UNITS = 512, 500
# Conditional standard deviations from the mode where other modes are looked for, and how far another one is away.
_AWAY, _APART = (-12.0, -5.0, -2.5, 2.5, 5.0, 12.0), 0.5
_STEPS = 60


class UnitMoments(NamedTuple):
    """Moments of the units in conditional standard deviations from the mode, coordinate by coordinate.

    :param Tensor mean: ``(N, k)``; 0 if normal.
    :param Tensor sd: ``(N, k)``; 1 if normal.
    :param Tensor skewness: ``(N, k)``; 0 if normal.
    """

    mean: Tensor
    sd: Tensor
    skewness: Tensor


@torch.no_grad()
def unit_moments(integrals: UnitIntegrals, there: Conditionals, global_: Tensor, rule: UnitRule) -> UnitMoments:
    """Return moments of all units at globals ``(d,)``, by a rule.

    :param UnitIntegrals integrals: of the model.
    :param Conditionals there: at these globals, one set.
    :param Tensor global_: ``(d,)``.
    :param UnitRule rule: how to integrate.
    """
    points = rule.points(there.mode.shape[-1], global_)
    z = points.points.unsqueeze(1)  # (Q, 1, k)
    weights = points.log_weights(_values(integrals, there, global_, points)).exp().unsqueeze(-1)  # (Q, N, 1)
    mean = (weights * z).sum(0)
    sd = (weights * (z - mean) ** 2).sum(0).clamp(min=torch.finfo(z.dtype).tiny).sqrt()
    skewness = (weights * ((z - mean) / sd) ** 3).sum(0)
    return UnitMoments(mean, sd, skewness)


@torch.no_grad()
def unit_k_hat(integrals: UnitIntegrals, there: Conditionals, global_: Tensor) -> tuple[Vector, Vector]:
    """Return the shape of the tail of importance weights of each unit, its normal approximation as the proposal.

    :param UnitIntegrals integrals: of the model.
    :param Conditionals there: at globals ``(d,)``, one set.
    :param Tensor global_: ``(d,)``.
    :return: the units looked at, at most some hundred, those first whose weights vary most; and the shape for each.
    """
    k = there.mode.shape[-1]
    noise = numpy.concatenate([sobol_points(_DRAWS // 2, k, seed) for seed in (0, 1)])
    z = torch.special.ndtri(torch.from_numpy(noise)).to(global_)
    flat = z.new_zeros(_DRAWS)
    ratios = _values(integrals, there, global_, Points(z, flat, flat)) + (z**2).sum(-1, keepdim=True) / 2
    shares = ratios.softmax(0)
    units = (shares**2).sum(0).argsort(descending=True)[:_UNITS]
    return units.cpu().numpy(), pareto_smoothed(ratios[:, units].T.double().cpu().numpy()).k_hat


class OtherModes(NamedTuple):
    """A second mode of each unit, if there is one.

    :param Tensor share: of the mass that lies at the other mode, both as normal, ``(N,)``; 0 where none was found.
    :param Tensor distance: to it in conditional standard deviations, ``(N,)``.
    """

    share: Tensor
    distance: Tensor


@torch.no_grad()
def other_modes(integrals: UnitIntegrals, there: Conditionals, global_: Tensor) -> OtherModes:
    """Search for modes from other starts: some way off along random directions, and where other units are.

    :param UnitIntegrals integrals: of the model.
    :param Conditionals there: at globals ``(d,)``, one set.
    :param Tensor global_: ``(d,)``.
    """
    starts = _other_starts(there)
    globals_ = global_.expand(len(starts), -1)
    first = integrals.density.units_at(global_[None], there.mode[None])[0, 0] + there.log_det()[0]
    share, distance = torch.zeros_like(first), torch.zeros_like(first)
    chunk = integrals.density.chunk(4)
    for some, start in zip(globals_.split(chunk), starts.split(chunk), strict=True):
        found = integrals.limited(_STEPS).conditionals(some, start)
        difference = (found.mode - there.mode).unsqueeze(-1)
        away = torch.linalg.solve_triangular(there.scale_tril, difference, upper=False).squeeze(-1).norm(dim=-1)
        second = integrals.density.units_at(some, found.mode.unsqueeze(1))[:, 0] + found.log_det()
        is_other = found.found & (away > _APART)
        shares = torch.sigmoid(second - first).masked_fill(~is_other, 0.0)
        best, index = shares.max(0)
        distance = torch.where(best > share, away.gather(0, index[None])[0], distance)
        share = torch.maximum(share, best)
    return OtherModes(share, distance)


def _other_starts(there: Conditionals) -> Tensor:
    """Starts of all units, ``(S, N, k)``."""
    mode, scale = there.mode[0], there.scale_tril[0]
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(mode.shape, generator=generator, dtype=torch.float64).to(mode)
    direction = direction / direction.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(mode.dtype).tiny)
    step = blocks.matvec(scale, direction)
    around = [mode + away * step for away in _AWAY]
    shuffled = mode[torch.randperm(len(mode), generator=generator).to(mode.device)]
    low, high = mode.amin(0).expand_as(mode), mode.amax(0).expand_as(mode)
    return torch.stack([*around, shuffled, low, high, -mode, torch.zeros_like(mode)])


def _values(integrals: UnitIntegrals, there: Conditionals, global_: Tensor, points: Points) -> Tensor:
    """Log densities of all units at standardized points, ``(Q, N)``."""
    chunk = integrals.density.chunk()
    parts = [integrals.density.units_at(global_[None], there.at(some))[0] for some in points.points.split(chunk)]
    return torch.cat(parts)
