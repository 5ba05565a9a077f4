"""How far the conditionals of the units are from normal, at given globals: tails, and other modes."""

from __future__ import annotations

from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from laplace_amort.posterior import pareto_smoothed
from laplace_amort.types import Vector, to_numpy
from laplace_amort.units import Conditionals, QuadraturePoints, UnitIntegrals, sobol_points

__all__ = [
    "OtherModes",
    "other_modes",
    "unit_k_hat",
]

_DRAWS = 512  # of each unit, normal, for the shape of its tails
_UNITS = 500  # that it is found for: those whose weights vary most
# Conditional standard deviations from the mode where other modes are looked for.
_AWAY = -12.0, -5.0, -2.5, 2.5, 5.0, 12.0
_APART = 0.5  # conditional standard deviations from which on a mode is another one
_STEPS = 60  # of a search for one, at most


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
    values = integrals.units_at(global_[None], there, QuadraturePoints(z, flat, flat))[0]
    ratios = values + (z**2).sum(-1, keepdim=True) / 2
    shares = ratios.softmax(0)
    units = (shares**2).sum(0).argsort(descending=True)[:_UNITS]
    return units.cpu().numpy(), pareto_smoothed(to_numpy(ratios[:, units].T)).k_hat


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
    """Return other starts of all units, ``(S, N, k)``."""
    mode = there.mode[0]
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(mode.shape, generator=generator, dtype=torch.float64).to(mode)
    direction = direction / direction.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(mode.dtype).tiny)
    around = there.at(direction * torch.tensor(_AWAY).to(mode).reshape(1, -1, 1, 1))[0]
    shuffled = mode[torch.randperm(len(mode), generator=generator).to(mode.device)]
    low, high = mode.amin(0).expand_as(mode), mode.amax(0).expand_as(mode)
    return torch.stack([*around, shuffled, low, high, -mode, torch.zeros_like(mode)])
