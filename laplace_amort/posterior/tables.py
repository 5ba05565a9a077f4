"""Tables of what is known of sites, as text and as data frames: the same names and columns in both.

pandas is imported when a frame is made, and not before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy
import scipy.special
import torch
from tabulate import tabulate
from torch import Tensor

from laplace_amort.guide import LaplaceGaussian
from laplace_amort.types import Vector, element_names, to_numpy
from laplace_amort.units import sobol_points

__all__ = [
    "PROBABILITIES",
    "SiteSummary",
    "draws_frame",
    "globals_frame",
    "globals_table",
    "globals_text",
    "records_frame",
    "require_pandas",
    "units_frame",
]

# Of the quantiles in a table, unless others are asked for.
PROBABILITIES = (0.05, 0.5, 0.95)
# Draws of a Gaussian for moments in constrained space.
_DRAWS = 2000


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


def _columns(sites: Sequence[SiteSummary], probabilities: Iterable[float]) -> dict[str, Vector]:
    """Put the elements of all sites one below the other, in columns by name."""

    def joined(parts: Iterable[Vector]) -> Vector:
        return numpy.concatenate([numpy.zeros(0), *(part.ravel() for part in parts)])

    columns = {"mean": joined(site.mean for site in sites), "sd": joined(site.std for site in sites)}
    for index, probability in enumerate(probabilities):
        columns[f"{100 * probability:g}%"] = joined(site.quantiles[index] for site in sites)
    return columns


def _rows(sites: Iterable[SiteSummary]) -> list[str]:
    return [label for site in sites for label in element_names(site.name, site.mean.shape)]


def globals_text(sites: Sequence[SiteSummary], probabilities: Sequence[float] = PROBABILITIES) -> str:
    """Return one line for each element of each site, named as by :func:`element_names`.

    :param sites: the global sites.
    :param probabilities: of their quantiles.
    """
    if not sites:
        return "there are no globals"
    columns = {"global": _rows(sites)}
    columns |= {name.replace("%", " %"): column.tolist() for name, column in _columns(sites, probabilities).items()}
    return tabulate(columns, headers="keys", floatfmt=".4g")


def globals_frame(sites: Sequence[SiteSummary], probabilities: Sequence[float]) -> Any:
    """Return one row for each element of each site, named as by :func:`element_names`.

    :param sites: the global sites.
    :param probabilities: of their quantiles.
    :return: a ``pandas.DataFrame``.
    :raises ImportError: if pandas is not installed.
    """
    pandas = require_pandas()
    index = pandas.Index(_rows(sites), name="global", dtype=object)
    return pandas.DataFrame(_columns(sites, probabilities), index=index)


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
        parts.append(pandas.DataFrame(columns | _columns([site], probabilities)))
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


def globals_table(gaussian: LaplaceGaussian) -> str:
    """Return a table of every element of the global sites in constrained space.

    :param LaplaceGaussian gaussian: the posterior.
    :return: mean, standard deviation and quantiles, from quasi-random draws of the globals: right to two digits or
        three, and for supports of any kind.
    """
    d = len(gaussian.global_loc)
    if d == 0:
        return globals_text([])
    normal = torch.from_numpy(scipy.special.ndtri(sobol_points(_DRAWS, d, seed=0))).to(gaussian.global_loc)
    values = gaussian.constrained_globals(gaussian.global_loc + normal @ gaussian.precision.global_scale_tril.mT)
    return globals_text([_summary_of_draws(name, to_numpy(value)) for name, value in values.items()])


def _summary_of_draws(name: str, draws: Vector) -> SiteSummary:
    """Summarize draws ``(S, *shape)`` of the same weight."""
    return SiteSummary(name, draws.mean(0), draws.std(0, ddof=1), numpy.quantile(draws, PROBABILITIES, axis=0))
