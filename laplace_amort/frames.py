"""Tables as data frames. pandas is imported when one is made, and not before."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["UnitSite", "draws_frame", "element_names", "globals_frame", "percent", "records_frame", "units_frame"]


def require_pandas() -> Any:
    """Return the module.

    :raises ImportError: if it is not installed, with the line to type.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("data frames need pandas:\n    python -m pip install 'laplace_amort[pandas]'") from error
    return pandas


def element_names(name: str, shape: Sequence[int]) -> list[str]:
    """Name the elements of a site in the order in which they are stored.

    :param str name: of the site.
    :param shape: of its value.

    Example::

        >>> element_names("tau", ()), element_names("beta", (2,)), element_names("L", (1, 2))
        (['tau'], ['beta[0]', 'beta[1]'], ['L[0, 0]', 'L[0, 1]'])
    """
    if not shape:
        return [name]
    return [f"{name}[{', '.join(map(str, index))}]" for index in itertools.product(*map(range, shape))]


def percent(probability: float) -> str:
    """Name the column of a quantile.

    Example::

        >>> percent(0.05), percent(0.975)
        ('5%', '97.5%')
    """
    return f"{100 * probability:g}%"


class UnitSite(NamedTuple):
    """What is known of one local site.

    :param str name: of the site.
    :param int axis: of the units in its value.
    :param Tensor mean: of the shape of the value.
    :param Tensor std: of that shape.
    :param Tensor quantiles: ``(Q, *shape)``.
    """

    name: str
    axis: int
    mean: Tensor
    std: Tensor
    quantiles: Tensor


def globals_frame(
    mean: Mapping[str, Tensor],
    std: Mapping[str, Tensor],
    quantiles: Mapping[str, Tensor],
    probabilities: Iterable[float],
) -> Any:
    """Return one row for each element of each site, named as by :func:`element_names`.

    :param mean: by site.
    :param std: by site.
    :param quantiles: ``(Q, *shape)`` by site.
    :param probabilities: of the quantiles.
    :return: a ``pandas.DataFrame``.
    :raises ImportError: if pandas is not installed.
    """
    pandas = require_pandas()
    names = [label for name, value in mean.items() for label in element_names(name, value.shape)]
    columns = {"mean": _joined(mean.values()), "sd": _joined(std.values())}
    for index, probability in enumerate(probabilities):
        columns[percent(probability)] = _joined(value[index] for value in quantiles.values())
    return pandas.DataFrame(columns, index=pandas.Index(names, name="global", dtype=object))


def units_frame(sites: Iterable[UnitSite], units: Tensor, probabilities: Iterable[float]) -> Any:
    """Return one row for each unit and each element that it has of a local site.

    :param sites: the local sites.
    :param Tensor units: index of each unit in its plate, ``(N,)``.
    :param probabilities: of the quantiles.
    :return: a ``pandas.DataFrame`` with the columns ``site``, ``unit``, ``element`` (empty where a unit has one
        number), ``mean``, ``sd`` and the quantiles.
    :raises ImportError: if pandas is not installed.
    """
    pandas = require_pandas()
    probabilities, parts = list(probabilities), []
    for site in sites:
        mean, std = site.mean.movedim(site.axis, 0), site.std.movedim(site.axis, 0)
        quantiles = site.quantiles.movedim(site.axis + 1, 1)
        rest = mean[0].numel()
        elements = [name[1:-1] for name in element_names("", mean.shape[1:])]
        columns: dict[str, Any] = {
            "site": site.name,
            "unit": units.repeat_interleave(rest).cpu().numpy(),
            "element": elements * len(units),
            "mean": _flat(mean),
            "sd": _flat(std),
        }
        columns |= {percent(p): _flat(values) for p, values in zip(probabilities, quantiles, strict=True)}
        parts.append(pandas.DataFrame(columns))
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


def _flat(value: Tensor) -> Any:
    return value.detach().reshape(-1).double().cpu().numpy()


def _joined(values: Iterable[Tensor]) -> Any:
    parts = [value.detach().reshape(-1).double() for value in values]
    return (torch.cat(parts) if parts else torch.zeros(0)).cpu().numpy()
