r"""The log joint of a Pyro model, taken apart into a term for each unit and a rest that is shared.

.. math:: f(\theta, y) = g(\theta) + \sum_i h_i(\theta, y_i), \qquad h_i = \log p(y_i, z_i \mid \theta).

What lies in the plate of the units belongs to the unit of its index. What lies outside, such as an observation of
``y[county]``, belongs to the unit that its derivative is in. **Which unit that is, two derivatives tell: the number of
each unit is written into the length that a direction has there, and read back as the ratio of the derivative along it
to that along a direction which has the same length everywhere.** Three units, numbered 0, 1, 2, and three terms:

=====================  =============  =============  =======  ======================
term                   along (1,1,1)  along (1,2,3)  ratio    so it belongs to
=====================  =============  =============  =======  ======================
:math:`-y_2^2/2`       :math:`-y_2`   :math:`-3y_2`  3        the unit of number 2
:math:`y_0 + y_1`      2              3              1.5      several: no whole number
:math:`\theta`         0              0              none     no unit: shared
=====================  =============  =============  =======  ======================

A ratio has rounding errors, in which the numbers of many units would drown. So a number is written as two digits of a
base near the root of the number of units, each into a direction of its own. Terms of several units may give whole
numbers by chance; so whatever is found, and whatever lies in the plate, is checked by directions of random lengths:
the derivative of a term must be multiplied by the factor of its own unit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from laplace_amort.autodiff import SeparableDensity, nearby, record
from laplace_amort.errors import RecordingError, StructureError
from laplace_amort.model.at_once import ManyPoints
from laplace_amort.model.unit_model import Terms, UnitModel

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

    It costs four evaluations of the terms, with five reverse passes each, and two recordings. Of a model that is
    recorded, all are evaluations of the recording.

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
    if model.recording is not None:
        # Where the whole can be recorded, its parts should be.
        with contextlib.suppress(RecordingError):
            return SeparableDensity(*(record(part, global_, local) for part in (density.shared, density.units)))
    return density


def separated(model: UnitModel, owners: list[Tensor]) -> SeparableDensity:
    """Return the terms of a model whose structure is known: the same model for other data."""
    if model.recording is None and model.points is not None:
        how = model.points
        return SeparableDensity(_PartAtOnce(_shared, model, owners, how), _PartAtOnce(_units, model, owners, how))
    return SeparableDensity(_Part(_shared, model, owners), _Part(_units, model, owners))


class _Part:
    """A sum of some terms of a model, by the unit that each belongs to.

    :param add: up terms ``(*, n)`` by their owners ``(n,)``, for units ``(*, N, k)``.
    :param UnitModel model: the model.
    :param list owners: of the terms of each site.
    """

    def __init__(self, add: Callable[..., Tensor], model: UnitModel, owners: list[Tensor]) -> None:
        self.add, self.model, self.owners = add, model, owners

    def __call__(self, global_: Tensor, local: Tensor) -> Tensor:
        """Evaluate at globals ``(d,)`` and units ``(N, k)``."""
        return self.add(_in_dtype_of(local, self.model.flat_terms(global_, local)), self.owners, local)


class _PartAtOnce(_Part):
    """The same of a model that takes many points at once.

    :param ManyPoints how: how it takes them.
    """

    def __init__(self, add: Callable[..., Tensor], model: UnitModel, owners: list[Tensor], how: ManyPoints) -> None:
        super().__init__(add, model, owners)
        self.how, self.num_bytes = how, how.num_bytes

    def at(self, globals_: Tensor, locals_: Tensor) -> Tensor:
        """Evaluate at globals ``(S, d)`` and units ``(S, N, k)``."""
        found = self.model.flat_terms_at(self.how, globals_, locals_)
        return self.add(_in_dtype_of(locals_, found), self.owners, locals_)


def _in_dtype_of(local: Tensor, found: list[Terms]) -> list[Terms]:
    """The terms in the dtype of the latents: data of another make theirs another."""
    return [terms._replace(values=terms.values.to(local.dtype)) for terms in found]


def _shared(found: list[Terms], owners: list[Tensor], local: Tensor) -> Tensor:
    """The sum of the terms that are no unit's, whose owner is N."""
    total = local.new_zeros(local.shape[:-2])
    for terms, owner in zip(found, owners, strict=True):
        if not terms.inside and (shared := owner == local.shape[-2]).any():
            total = total + (terms.values if shared.all() else terms.values[..., shared]).sum(-1)
    return total


def _units(found: list[Terms], owners: list[Tensor], local: Tensor) -> Tensor:
    """The sum of the terms of each unit, ``(*, N)``."""
    total = local.new_zeros(local.shape[:-1])
    for terms, owner in zip(found, owners, strict=True):
        if terms.inside:
            total = total + terms.values
        elif (owned := owner < local.shape[-2]).all():
            total = total.index_add(-1, owner, terms.values)
        elif owned.any():
            total = total.index_add(-1, owner[owned], terms.values[..., owned])
    return total


def unit_owners(model: UnitModel, global_: Tensor, local: Tensor) -> list[Tensor]:
    """Return the unit that each term belongs to, ``(n,)`` for each site, for :func:`separated`; N where to none.

    See :func:`unit_terms`, which lists what is raised.
    """
    probes = [_Probe(model, *point, seed) for seed, point in enumerate(_points(global_, local))]
    # Each term is read where its derivative is largest.
    found, largest = probes[0].owner(), probes[0].size
    for probe in probes[1:]:
        found = torch.where(probe.size > largest, probe.owner(), found)
        largest = torch.maximum(largest, probe.size)
    owner = torch.cat(
        [
            torch.arange(len(local), device=local.device) if terms.inside else read
            for terms, read in zip(probes[0].terms, found.split(probes[0].lengths), strict=True)
        ]
    )
    for probe in probes:
        probe.check(owner, largest)
    return list(owner.split(probes[0].lengths))


def _points(global_: Tensor, local: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Where to probe: other numbers for each share, so that one which is nearly zero hides no unit at every point."""
    points = [(nearby(global_, share, 2 * i), nearby(local, share, 2 * i + 1)) for i, share in enumerate(_PROBES)]
    beside_zero = nearby(global_, _PROBES[0]), nearby(torch.zeros_like(local), _FROM_ZERO)  # the start may be far away
    return [*points, beside_zero]


class _Probe:
    """Derivatives of all terms at one point, along directions that differ by their lengths in the units.

    :param UnitModel model: the model.
    :param Tensor global_: ``(d,)``.
    :param Tensor local: ``(N, k)``.
    :param int seed: of the directions.
    """

    def __init__(self, model: UnitModel, global_: Tensor, local: Tensor, seed: int = 0) -> None:
        self.model, self.num_units = model, len(local)
        with torch.enable_grad():
            self.local = local.detach().clone().requires_grad_()
            self.terms = _in_dtype_of(self.local, model.flat_terms(global_.detach(), self.local))
            values = torch.cat([terms.values for terms in self.terms])
            # The gradient of a weighted sum of the terms is linear in the weights. A second pass back, from the
            # gradient to the weights, gives the derivative of every term along one direction.
            self.weights = torch.zeros_like(values, requires_grad=True)
            self.gradient: Tensor | None = None
            if values.requires_grad:
                (self.gradient,) = torch.autograd.grad(
                    values, self.local, self.weights, create_graph=True, allow_unused=True
                )
        self.lengths = [len(terms.values) for terms in self.terms]
        self.generator = torch.Generator().manual_seed(seed)
        # Random numbers in place of the ones of the example above, so that derivatives do not cancel.
        self.coordinates, self.plain = self._random(local.shape[1]), self._random(len(local))
        self.along_plain = self._along(self.plain)
        self.size = self.along_plain.abs()

    def owner(self) -> Tensor:
        """Read the unit of each term; N where there is no derivative, and -1 where there seem to be several."""
        base = math.isqrt(max(self.num_units - 1, 0)) + 1
        number = torch.arange(self.num_units, device=self.local.device)
        first, second = self._read(number // base, base), self._read(number % base, base)
        clear = (first >= 0) & (second >= 0)
        found = torch.where(clear, first * base + second, -1).clamp(max=self.num_units - 1)
        seen = self.size > 0  # where there is no way back to a unit, the derivative is exactly zero
        return torch.where(seen & (clear | ~self._is_rounding()), found, self.num_units)

    def _read(self, digits: Tensor, base: int) -> Tensor:
        """Write a digit into each unit, and read that of each term, ``(n,)``; -1 where it is no digit."""
        written = self._along(self.plain * (1 + digits))
        ratio = written / self.along_plain.where(self.size > 0, torch.ones_like(written)) - 1
        is_digit = ((ratio - ratio.round()).abs() < _WHOLE) & (ratio > -0.5) & (ratio < base)
        return torch.where(is_digit, ratio.round().nan_to_num(), -1).long()

    def check(self, owner: Tensor, size: Tensor | None = None) -> None:
        """Compare derivatives along other directions with what they are if every term depends on its owner alone.

        :param Tensor owner: of each term, ``(n,)``.
        :param Tensor size: of the derivative of each term where that is not small by chance; by default, as it is here.
        :raises StructureError: naming a term that depends on another unit.
        """
        several = owner < 0
        wrong = several | self._differs(owner, size, self._random(self.num_units) / self.plain)
        if not wrong.any():
            return
        # What a derivative is the difference of may be large beside it, and has rounding errors that nothing here knows
        # the size of. But where all that a term depends on is multiplied by a power of two, so are these.
        differs = several
        for _ in range(_AGAIN):
            powers = torch.randint(-_POWERS, _POWERS + 1, (self.num_units,), generator=self.generator)
            differs = differs | self._differs(owner, size, (2.0**powers).to(self.local))
        if (wrong & differs).any():
            raise self._refusal(int((wrong & differs).nonzero()[0]))

    def _differs(self, owner: Tensor, size: Tensor | None, factors: Tensor) -> Tensor:
        """Whether each derivative is not multiplied by the factor of its owner where lengths are by those of all."""
        found = self._along(self.plain * factors)
        of_none = factors.new_zeros(1)
        expected = torch.cat([factors, of_none])[owner.clamp(min=0)] * self.along_plain
        eps = torch.finfo(found.dtype).eps
        # What a derivative is the difference of, near its zero, has rounding errors of its own.
        allowed = eps**_OFF * (found.abs() + expected.abs()) + eps**_CANCELLED * (self.size if size is None else size)
        same = (found - expected).abs() <= allowed
        return ~(same | (self._is_rounding() & (owner == self.num_units)))

    def _is_rounding(self) -> Tensor:
        """Whether a derivative is so small that it may be what is left of terms that cancel, ``(n,)``."""
        return self.size <= self.size.max() * torch.finfo(self.size.dtype).eps ** _NONE

    def _along(self, lengths: Tensor) -> Tensor:
        """The derivative of each term ``(n,)`` along a direction that has these lengths ``(N,)`` in the units."""
        if self.gradient is None or not self.gradient.requires_grad:
            return torch.zeros_like(self.weights)
        direction = lengths.unsqueeze(-1) * self.coordinates
        (found,) = torch.autograd.grad(self.gradient, self.weights, direction, retain_graph=True)
        return found.detach().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # an overflow says nothing

    def _random(self, size: int) -> Tensor:
        return (1 + torch.rand(size, generator=self.generator, dtype=torch.float64)).to(self.local)

    def _refusal(self, index: int) -> StructureError:
        """What to raise for a term, by its number among those of all sites."""
        for terms in self.terms:
            if index < len(terms.values):
                break
            index -= len(terms.values)
        (gradient,) = torch.autograd.grad(terms.values[index], self.local, retain_graph=True)
        units = (gradient != 0).any(-1).nonzero().squeeze(-1).tolist()
        names = " and ".join(self.model.describe(unit) for unit in units[:2])
        where = f"element {index}" if len(terms.values) > 1 else "the only element"
        if len(units) == 1:
            return StructureError(
                f"{where} of site '{terms.name}' depends on {names} alone, but its derivative along two directions "
                f"differs by more than {self.local.dtype} should lose by rounding. Take more digits:\n"
                "    torch.set_default_dtype(torch.float64)"
            )
        return StructureError(
            f"{where} of site '{terms.name}' depends on {len(units)} units, {names}, so that these have no densities "
            "of their own. Is it a sum over units? Leave the sum to Pyro:\n"
            f"    with pyro.plate('{self.model.layout.frame.name}', {self.num_units}):\n"
            f"        pyro.factor('{terms.name}', terms_of_units)   # one for each"
        )
