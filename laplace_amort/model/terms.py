r"""The log joint of a Pyro model, taken apart into a term for each unit and a rest that is shared.

.. math:: f(\theta, y) = g(\theta) + \sum_i h_i(\theta, y_i), \qquad h_i = \log p(y_i, z_i \mid \theta).

What lies in the plate of the units belongs to the unit of its index. What lies outside, such as an observation of
``y[county]``, belongs to the unit that its derivative is in: where the derivative in unit i is taken i times, that of a
term tells which it was. Whatever is found so, and whatever lies in the plate, is checked by random numbers.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from laplace_amort.autodiff import SeparableDensity, nearby, record
from laplace_amort.errors import RecordingError, StructureError
from laplace_amort.model.unit_model import UnitModel
from laplace_amort.types import Density

__all__ = ["separated", "unit_owners", "unit_terms"]

# How far from the start terms are probed: one that is at its maximum has no derivative there. And how far from zero.
_PROBES, _FROM_ZERO = (0.1, 0.5, 1.0), 1.2
# How far a ratio of derivatives may be from the whole number that it stands for.
_WHOLE = 0.1
# Powers of the rounding error: what a derivative may be off, relative to its size; the same, relative to its size at
# other points; and the share of the largest of all below which one may be nothing.
_OFF, _CANCELLED, _NONE = 0.4, 0.8, 0.9
# Directions along which a term that differs by chance is looked at again, and the powers of two that they differ by.
_AGAIN, _POWERS = 12, 4


def unit_terms(model: UnitModel, global_: Tensor, local: Tensor) -> SeparableDensity:
    """Take the log joint of a model apart, whatever its observations are indexed by.

    It costs four runs of the model, with five reverse passes each, and two recordings.

    Do not use it where an observation depends on two units: these have no densities of their own. Nor for a factor that
    is the sum of all units' terms: leave the sum to Pyro.

    :param UnitModel model: terms of a minibatch keep its weight.
    :param Tensor global_: a point near which to probe, ``(d,)``.
    :param Tensor local: ``(N, k)``.
    :return: the terms, which add up to the log joint; recorded, if the model is.
    :raises StructureError: if a term depends on more than one unit; the message names the site and two units.
    """
    global_, local = global_.detach(), local.detach()
    density = separated(model, unit_owners(model, global_, local))
    functions: list[Density] = [density.shared, density.units]
    if model.recording is not None:
        # Where the whole can be recorded, its parts should be.
        with contextlib.suppress(RecordingError):
            functions = [record(function, global_, local) for function in functions]
    return SeparableDensity(*functions)


def separated(model: UnitModel, owners: list[Tensor]) -> SeparableDensity:
    """Return the terms of a model whose structure is known: the same model for other data."""
    return SeparableDensity(functools.partial(_shared, model, owners), functools.partial(_units, model, owners))


class _Terms(NamedTuple):
    """The terms of one site, flat, or summed to one of each unit.

    :param str name: of the site.
    :param bool inside: whether the site is in the plate of the units, so that there are ``N`` in order.
    :param Tensor values: ``(n,)``.
    """

    name: str
    inside: bool
    values: Tensor


def _terms(model: UnitModel, global_: Tensor, local: Tensor) -> list[_Terms]:
    frame, found = model.layout.frame, []
    for name, plates, values in model.terms(global_, local):
        inside = any(plate.name == frame.name for plate in plates)
        inside = inside and values.dim() >= -frame.dim and values.shape[frame.dim] == len(local)
        values = values.movedim(frame.dim, 0).reshape(len(local), -1).sum(-1) if inside else values.reshape(-1)
        found.append(_Terms(name, inside, values.to(local.dtype)))  # data of another dtype make theirs another
    return found


def _shared(model: UnitModel, owners: list[Tensor], global_: Tensor, local: Tensor) -> Tensor:
    """The sum of the terms that are no unit's, whose owner is N."""
    total = global_.new_zeros(())
    for terms, owner in zip(_terms(model, global_, local), owners, strict=True):
        if not terms.inside and (shared := owner == len(local)).any():
            total = total + (terms.values if shared.all() else terms.values[shared]).sum()
    return total


def _units(model: UnitModel, owners: list[Tensor], global_: Tensor, local: Tensor) -> Tensor:
    """The sum of the terms of each unit, ``(N,)``."""
    total = local.new_zeros(len(local))
    for terms, owner in zip(_terms(model, global_, local), owners, strict=True):
        if terms.inside:
            total = total + terms.values
        elif (owned := owner < len(local)).all():
            total = total.index_add(0, owner, terms.values)
        elif owned.any():
            total = total.index_add(0, owner[owned], terms.values[owned])
    return total


def unit_owners(model: UnitModel, global_: Tensor, local: Tensor) -> list[Tensor]:
    """Return the unit that each term belongs to, ``(n,)`` for each site, for :func:`separated`; N where to none.

    See :func:`unit_terms`, which lists what is raised.
    """
    global_, local = global_.detach(), local.detach()
    num_units = len(local)
    # Other numbers for each share: one that is nearly zero must not leave a unit where it is at every point.
    points = [(nearby(global_, share, 2 * i), nearby(local, share, 2 * i + 1)) for i, share in enumerate(_PROBES)]
    # The start may be far away.
    points.append((nearby(global_, _PROBES[0]), nearby(torch.zeros_like(local), _FROM_ZERO)))
    probes = [_Probe(model, *point, seed) for seed, point in enumerate(points)]
    found, largest = probes[0].owner(), probes[0].size
    for probe in probes[1:]:
        better = probe.size > largest
        found, largest = torch.where(better, probe.owner(), found), torch.maximum(largest, probe.size)
    inside = torch.cat(
        [
            torch.arange(num_units, device=local.device) if terms.inside else torch.full_like(terms.values, -1).long()
            for terms in probes[0].terms
        ]
    )
    owner = torch.where(inside >= 0, inside, found)
    for probe in probes:
        probe.check(owner, largest)
    return list(owner.split([len(terms.values) for terms in probes[0].terms]))


class _Probe:
    """Derivatives of all terms in the latents of the units at one point.

    :param UnitModel model: the model.
    :param Tensor global_: ``(d,)``.
    :param Tensor local: ``(N, k)``.
    :param int seed: of the directions.
    """

    def __init__(self, model: UnitModel, global_: Tensor, local: Tensor, seed: int = 0) -> None:
        self.model, self.num_units = model, len(local)
        with torch.enable_grad():
            self.local = local.clone().requires_grad_()
            self.terms = _terms(model, global_, self.local)
            values = torch.cat([terms.values for terms in self.terms])
            self.pull = torch.zeros_like(values, requires_grad=True)
            gradient = None
            if values.requires_grad:
                (gradient,) = torch.autograd.grad(values, self.local, self.pull, create_graph=True, allow_unused=True)
            self.gradient = gradient
        self.generator = torch.Generator().manual_seed(seed)
        self.coordinates, self.units = self._random(local.shape[1]), self._random(len(local))
        self.along = self._along(self.units)
        self.size = self.along.abs()

    def owner(self) -> Tensor:
        """The unit of each term, N where there is no derivative, and -1 where there seem to be several."""
        side = math.isqrt(max(self.num_units - 1, 0)) + 1  # so that a unit is two small numbers
        index = torch.arange(self.num_units, device=self.local.device)
        seen = self.size > 0  # where there is no way back to a unit, the derivative is exactly zero
        digits = []
        for digit in (index // side, index % side):
            ratio = self._along(self.units * (1 + digit)) / self.along.where(seen, torch.ones_like(self.along)) - 1
            whole = (ratio - ratio.round()).abs() < _WHOLE
            digits.append(torch.where(whole & (ratio > -0.5) & (ratio < side), ratio.round().nan_to_num(), -1).long())
        clear = (digits[0] >= 0) & (digits[1] >= 0)
        found = torch.where(clear, digits[0] * side + digits[1], -1).clamp(max=self.num_units - 1)
        return torch.where(seen & (clear | ~self.is_rounding()), found, self.num_units)

    def is_rounding(self) -> Tensor:
        """Whether a derivative is so small that it may be what is left of terms that cancel, ``(n,)``."""
        return self.size <= self.size.max() * torch.finfo(self.size.dtype).eps ** _NONE

    def check(self, owner: Tensor, size: Tensor | None = None) -> None:
        """Compare derivatives along other directions with what they are if every term depends on its owner alone.

        :param Tensor owner: of each term, ``(n,)``.
        :param Tensor size: of the derivative of each term where that is not small by chance; by default, as it is here.
        :raises StructureError: naming a term that depends on another unit.
        """
        wrong = (owner < 0) | self._differs(owner, size, self._random(self.num_units) / self.units)
        if not wrong.any():
            return
        # What a derivative is the difference of may be large beside it, and has rounding errors that nothing here knows
        # the size of. But where all that a term depends on is multiplied by a power of two, so are these.
        differs = owner < 0
        for _ in range(_AGAIN):
            powers = torch.randint(-_POWERS, _POWERS + 1, (self.num_units,), generator=self.generator)
            differs = differs | self._differs(owner, size, (2.0**powers).to(self.local))
        if (wrong & differs).any():
            self._raise(int((wrong & differs).nonzero()[0]))

    def _differs(self, owner: Tensor, size: Tensor | None, ratio: Tensor) -> Tensor:
        """Which derivatives are not multiplied by that of their owner where each unit's direction is by a ratio."""
        found = self._along(self.units * ratio)
        expected = torch.cat([ratio, ratio.new_zeros(1)])[owner.clamp(min=0)] * self.along
        eps = torch.finfo(found.dtype).eps
        # What a derivative is the difference of, near its zero, has rounding errors of its own.
        allowed = eps**_OFF * (found.abs() + expected.abs()) + eps**_CANCELLED * (self.size if size is None else size)
        same = (found - expected).abs() <= allowed
        return ~(same | (self.is_rounding() & (owner == self.num_units)))

    def _along(self, units: Tensor) -> Tensor:
        """The derivative of each term along a direction that is the same in every unit but for its length."""
        if self.gradient is None or not self.gradient.requires_grad:
            return torch.zeros_like(self.pull)
        direction = units.unsqueeze(-1) * self.coordinates
        (found,) = torch.autograd.grad(self.gradient, self.pull, direction, retain_graph=True)
        return found.detach().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # an overflow says nothing

    def _random(self, size: int) -> Tensor:
        return (1 + torch.rand(size, generator=self.generator, dtype=torch.float64)).to(self.local)

    def _raise(self, index: int) -> None:
        for terms in self.terms:
            if index < len(terms.values):
                break
            index -= len(terms.values)
        (gradient,) = torch.autograd.grad(terms.values[index], self.local, retain_graph=True)
        units = (gradient != 0).any(-1).nonzero().squeeze(-1).tolist()
        names = " and ".join(self.model.describe(unit) for unit in units[:2])
        where = f"element {index}" if len(terms.values) > 1 else "the only element"
        if len(units) == 1:
            raise StructureError(
                f"{where} of site '{terms.name}' depends on {names} alone, but its derivative along two directions "
                f"differs by more than {self.local.dtype} should lose by rounding. Take more digits:\n"
                "    torch.set_default_dtype(torch.float64)"
            )
        raise StructureError(
            f"{where} of site '{terms.name}' depends on {len(units)} units, {names}, so that these have no densities "
            "of their own. Is it a sum over units? Leave the sum to Pyro:\n"
            f"    with pyro.plate('{self.model.layout.frame.name}', {self.num_units}):\n"
            f"        pyro.factor('{terms.name}', terms_of_units)   # one for each"
        )
