"""The terms of the units for data that are drawn from the model, of many data sets at once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from laplace_amort.autodiff import record
from laplace_amort.errors import RecordingError
from laplace_amort.model.terms import separated, unit_owners
from laplace_amort.model.unit_model import UnitModel
from laplace_amort.types import Density

__all__ = ["simulated_units"]

# Parts in which many data sets are evaluated, so that a bar moves; and numbers in all of them at most.
_PARTS, _MOST = 10, 2**25


def simulated_units(model: UnitModel, global_: Tensor, local: Tensor, number: int) -> Iterator[tuple[Density, Tensor]]:
    """Yield the terms of the units for data drawn from the model, by torch's generator.

    All data sets are one recording, to which the number of a data set comes as one more global. A model that cannot be
    recorded so has them one by one.

    :param UnitModel model: not recorded.
    :param Tensor global_: where the data are drawn, ``(d,)``.
    :param Tensor local: near which terms are looked at, ``(N, k)``.
    :param int number: of data sets.
    :return: terms of a row and units ``(N, k)``, as ``(N,)``; and a row for each data set: the globals, and where many
        are evaluated together a number more, ``(S, d)`` or ``(S, d + 1)``.
    :raises ModelError: if the model has a ``pyro.factor``, which no data can be drawn from.
    """
    owners = unit_owners(model, global_, local)
    values = model.constrain_global(global_)
    first = model.density.draw_data(values)
    if number * sum(value.numel() for value in first.values()) > _MOST:
        yield from _one_by_one(model, owners, global_, [first], number)
        return
    sets = [first, *(model.density.draw_data(values) for _ in range(number - 1))]
    try:
        together = _Simulated(model, owners, {name: torch.stack([one[name] for one in sets]) for name in first})
        units = record(together, _row(global_, 0), local)
    except (RecordingError, RuntimeError):  # or data of sizes that differ
        yield from _one_by_one(model, owners, global_, sets, number)
        return
    rows = torch.stack([_row(global_, one) for one in range(number)])
    for some in rows.split(-(-number // _PARTS)):
        yield units, some


def _one_by_one(
    model: UnitModel, owners: list[Tensor], global_: Tensor, drawn: list[dict[str, Tensor]], number: int
) -> Iterator[tuple[Density, Tensor]]:
    """The same, of data sets that are drawn or are to be."""
    values = model.constrain_global(global_)
    for one in range(number):
        data = drawn[one] if one < len(drawn) else model.density.draw_data(values)
        yield separated(_given(model, data), owners).units, global_.unsqueeze(0)


def _given(model: UnitModel, data: Mapping[str, Tensor]) -> UnitModel:
    other = copy.copy(model)
    other.density = model.density.with_data(data)
    return other


def _row(global_: Tensor, number: int) -> Tensor:
    """The globals, and the number of a data set in the middle of what stands for it."""
    return torch.cat([global_, global_.new_full((1,), number + 0.5)])


class _Simulated:
    """The terms of the units for one of several data sets.

    :param UnitModel model: the model.
    :param list owners: of the terms of each site.
    :param data: by site, with a leading dimension of data sets.
    """

    def __init__(self, model: UnitModel, owners: list[Tensor], data: Mapping[str, Tensor]) -> None:
        self.model, self.owners, self.data = model, owners, data

    def __call__(self, global_: Tensor, local: Tensor) -> Tensor:
        """Evaluate at globals and the number of a data set ``(d + 1,)``, and units ``(N, k)``; returns ``(N,)``."""
        last = max((len(value) for value in self.data.values()), default=1) - 1
        number = global_[-1:].detach().clamp(0, last).long()
        data = {name: value.index_select(0, number).squeeze(0) for name, value in self.data.items()}
        units: Tensor = separated(_given(self.model, data), self.owners).units(global_[:-1], local)
        return units
