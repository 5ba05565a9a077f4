"""Tables of what is known of sites, as text, as HTML and as data frames: the same names and columns in all.

pandas is imported when a frame is made, and not before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy
import torch
from tabulate import tabulate
from torch import Tensor

from laplace_amort.posterior import markup
from laplace_amort.posterior.rows import Rows
from laplace_amort.types import Vector, element_names

__all__ = [
    "PROBABILITIES",
    "GlobalsTable",
    "SiteSummary",
    "draws_frame",
    "records_frame",
    "require_pandas",
    "units_frame",
]

# Of the quantiles in a table, unless others are asked for.
PROBABILITIES = (0.05, 0.5, 0.95)


def require_pandas() -> Any:
    """Return the module.

    :raises ImportError: if it is not installed, with the line to type.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("data frames need pandas:\n    python -m pip install 'laplace_amort[pandas]'") from error
    return pandas


class SiteSummary(NamedTuple):
    """What is known of one site.

    :param str name: of the site.
    :param Vector mean: of the shape of the value.
    :param Vector std: of that shape.
    :param Vector quantiles: ``(Q, *shape)``.
    """

    name: str
    mean: Vector
    std: Vector
    quantiles: Vector

    def along(self, axis: int) -> SiteSummary:
        """Return the same with an axis of the value first."""
        mean, std = (numpy.moveaxis(part, axis, 0) for part in (self.mean, self.std))
        return SiteSummary(self.name, mean, std, numpy.moveaxis(self.quantiles, axis + 1, 1))


def _columns(site: SiteSummary, probabilities: Iterable[float]) -> dict[str, Vector]:
    """Put the elements of a site one below the other, in columns by name."""
    columns = {"mean": site.mean.ravel(), "sd": site.std.ravel()}
    return columns | {f"{100 * p:g}%": part.ravel() for p, part in zip(probabilities, site.quantiles, strict=True)}


@dataclass(frozen=True)
class GlobalsTable:
    """What is known of the globals, a row for each element; ``print(table)`` shows it.

    A mean or standard deviation that does not exist is NaN, and ``-`` where it is shown.

    :param tuple rows: of every site, or function of globals, those that vary.
    :param tuple probabilities: of their quantiles.
    :param tuple notes: what is to be said below the table, in sentences.
    :param str title: above it; empty for none.
    """

    rows: tuple[Rows, ...] = field(repr=False)
    probabilities: tuple[float, ...] = PROBABILITIES
    notes: tuple[str, ...] = ()
    title: str = ""

    @property
    def names(self) -> list[str]:
        """Name of each row, such as ``B[0, 1]``."""
        return [name for rows in self.rows for name in rows.names]

    def columns(self) -> dict[str, Vector]:
        """Return the numbers, ``(n,)`` by column: ``mean``, ``sd`` and the quantiles, such as ``5%``."""
        columns = {"mean": _joined(rows.mean for rows in self.rows), "sd": _joined(rows.sd for rows in self.rows)}
        quantiles = [rows.quantiles(self.probabilities) for rows in self.rows]
        for index, probability in enumerate(self.probabilities):
            columns[f"{100 * probability:g}%"] = _joined(part[index] for part in quantiles)
        return columns

    def without_moments(self, have_mean: Mapping[str, bool]) -> GlobalsTable:
        """Return the same without the moments that do not exist.

        :param have_mean: of elements of the globals without a standard deviation, whether they have a mean. Of
            functions of them nothing is known, and both are left out.
        """
        rows = tuple(_without_moments(rows, have_mean) for rows in self.rows)
        unknown = [
            name
            for part in self.rows
            for name, depends in zip(part.names, part.depends, strict=True)
            if name not in have_mean and (depends is None or depends & have_mean.keys())
        ]
        if not unknown:
            return replace(self, rows=rows)
        verb = "is a function" if len(unknown) == 1 else "are functions"
        note = f"{', '.join(unknown)} {verb} of {', '.join(have_mean)}, and may have no moments"
        return replace(self, rows=rows, notes=(*self.notes, note))

    def __str__(self) -> str:
        title = [self.title] if self.title else []
        return "\n".join([*title, self._text(), *self.notes])

    def _text(self) -> str:
        if not self.rows:
            return "there are no globals"
        columns: dict[str, Any] = {"global": self.names}
        for name, column in self.columns().items():
            columns[name.replace("%", " %")] = [None if numpy.isnan(number) else number for number in column.tolist()]
        return tabulate(columns, headers="keys", floatfmt=".4g", missingval="-", disable_numparse=[0])

    def _repr_html_(self) -> str:
        columns = self.columns()
        cells = [["-" if numpy.isnan(number) else f"{number:.4g}" for number in part] for part in columns.values()]
        header = ["global", *(name.replace("%", " %") for name in columns)]
        rows = list(zip(self.names, *cells, strict=True))
        return "".join([markup.table(header, rows, self.title), *map(markup.paragraph, self.notes)])

    def to_frame(self) -> Any:
        """Return one row for each element.

        :return: a ``pandas.DataFrame``.
        :raises ImportError: if pandas is not installed.
        """
        pandas = require_pandas()
        return pandas.DataFrame(self.columns(), index=pandas.Index(self.names, name="global", dtype=object))


def _joined(parts: Iterable[Vector]) -> Vector:
    return numpy.concatenate([numpy.zeros(0), *(part.ravel() for part in parts)])


def _without_moments(rows: Rows, have_mean: Mapping[str, bool]) -> Rows:
    mean, sd = rows.mean.copy(), rows.sd.copy()
    for index, (name, depends) in enumerate(zip(rows.names, rows.depends, strict=True)):
        if name in have_mean or depends is None or depends & have_mean.keys():
            sd[index] = numpy.nan
            mean[index] = mean[index] if have_mean.get(name) else numpy.nan
    return rows._replace(mean=mean, sd=sd)


def units_frame(sites: Iterable[SiteSummary], units: Tensor, probabilities: Sequence[float]) -> Any:
    """Return one row for each unit and each element that it has of a local site.

    :param sites: the local sites, with the axis of the units first.
    :param Tensor units: index of each unit in its plate, ``(N,)``.
    :param probabilities: of the quantiles.
    :return: a ``pandas.DataFrame`` with the columns ``site``, ``unit``, ``element`` (empty where a unit has one
        number), ``mean``, ``sd`` and the quantiles.
    :raises ImportError: if pandas is not installed.
    """
    pandas, parts = require_pandas(), []
    for site in sites:
        elements = [name[1:-1] for name in element_names("", site.mean.shape[1:])]
        columns: dict[str, Any] = {
            "site": site.name,
            "unit": units.repeat_interleave(len(elements)).cpu().numpy(),
            "element": elements * len(units),
        }
        parts.append(pandas.DataFrame(columns | _columns(site, probabilities)))
    return pandas.concat(parts, ignore_index=True)


def draws_frame(draws: Mapping[str, Tensor]) -> Any:
    """Return one row for each draw and one column for each element of each site.

    :param draws: ``(S, *shape)`` by site.
    :return: a ``pandas.DataFrame``.
    :raises ImportError: if pandas is not installed.
    """
    pandas = require_pandas()
    names = [label for name, value in draws.items() for label in element_names(name, value.shape[1:])]
    values = torch.cat([value.reshape(len(value), -1) for value in draws.values()], dim=1)
    index = pandas.RangeIndex(len(values), name="draw")
    return pandas.DataFrame(values.detach().cpu().numpy(), index=index, columns=names)


def records_frame(records: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Any:
    """Return one row for each record.

    :param records: values by column.
    :param columns: their order; also those of a frame without rows.
    :return: a ``pandas.DataFrame``.
    :raises ImportError: if pandas is not installed.
    """
    return require_pandas().DataFrame.from_records(list(records), columns=list(columns))
