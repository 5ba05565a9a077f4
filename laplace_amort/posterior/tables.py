"""Tables as data frames. pandas is imported when one is made, and not before."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor

from laplace_amort.guide import LaplaceGaussian

__all__ = [
    "UnitSite",
    "draws_frame",
    "element_names",
    "globals_frame",
    "globals_table",
    "percent",
    "records_frame",
    "units_frame",
]


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


_PROBABILITIES = (0.05, 0.5, 0.95)


_DRAWS = 2000  # for moments in constrained space


def globals_table(gaussian: LaplaceGaussian) -> str:
    """Return a table of every element of the global sites in constrained space.

    :param LaplaceGaussian gaussian: the posterior.
    :return: mean, standard deviation and quantiles, from quasi-random draws of the globals: right to two digits or
        three, and for supports of any kind.
    """
    draws = _constrained_draws(gaussian)
    if not draws:
        return "there are no globals"
    rows = []
    for name, values in draws.items():
        quantiles = torch.quantile(values, values.new_tensor(_PROBABILITIES), dim=0)
        for index in range(values.shape[1]):
            label = name if values.shape[1] == 1 else f"{name}[{index}]"
            column = values[:, index]
            rows.append([label, float(column.mean()), float(column.std()), *(float(q) for q in quantiles[:, index])])
    headers = ["global", "mean", "sd", *(f"{100 * p:g} %" for p in _PROBABILITIES)]
    return tabulate(rows, headers, floatfmt=".4g")


def _constrained_draws(gaussian: LaplaceGaussian) -> dict[str, Tensor]:
    """Flattened values ``(S, n)`` of each global site."""
    d = len(gaussian.global_loc)
    if d == 0:
        return {}
    engine = torch.quasirandom.SobolEngine(d, scramble=True, seed=0)
    uniform = engine.draw(_DRAWS, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    deviation = torch.special.ndtri(uniform).to(gaussian.global_loc) @ gaussian.precision.global_scale_tril.mT
    values = gaussian.constrained_globals(gaussian.global_loc + deviation)
    return {name: value.reshape(len(value), -1) for name, value in values.items()}
