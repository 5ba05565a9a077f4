"""Which rows a table of the globals has: elements of sites, correlations, and what the model computes from globals.

Elements that are the same in every draw have none, such as the zeros of a Cholesky factor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from laplace_amort.autodiff import at_points, record
from laplace_amort.guide import of_one_event
from laplace_amort.model import GlobalFunctions, find_functions
from laplace_amort.posterior.draws import PosteriorDraws
from laplace_amort.posterior.quantiles import weighted_quantiles
from laplace_amort.types import Vector, element_names, to_numpy

__all__ = ["Rows", "rows_of"]

# Draws at which functions of the globals are computed where a run of the model is needed for each.
_RUNS = 256
# Draws at which derivatives of these functions are looked at.
_LOOKED_AT = 4
# Range of an element that is a rounding error, in units of that of its size.
_ROUNDING = 64


class Rows(NamedTuple):
    """Elements of a site, or functions of it, at weighted draws of the globals.

    :param list names: of the elements, such as ``B[0, 1]``.
    :param Vector values: of them, ``(S, n)``.
    :param Vector weights: of the draws, ``(S,)``.
    :param Vector mean: ``(n,)``.
    :param Vector sd: ``(n,)``.
    :param list depends: for each of them, which elements of the globals it is a function of; None of any.
    """

    names: list[str]
    values: Vector
    weights: Vector
    mean: Vector
    sd: Vector
    depends: list[frozenset[str] | None]

    def quantiles(self, probabilities: Sequence[float]) -> Vector:
        """Return quantiles ``(Q, n)``; NaN where some draw has no value."""
        found = weighted_quantiles(self.values, self.weights, probabilities)
        found[:, numpy.isnan(self.values).any(0)] = numpy.nan
        return found

    def kept(self, which: Vector) -> Rows:
        """Return those of some places only, of which each is said by a boolean ``(n,)``."""
        index = numpy.flatnonzero(which)
        return Rows(
            [self.names[i] for i in index],
            self.values[:, index],
            self.weights,
            self.mean[index],
            self.sd[index],
            [self.depends[i] for i in index],
        )


def rows_of(posterior: PosteriorDraws) -> tuple[list[Rows], list[str]]:
    """Return the rows of a table of the globals, and what is to be said of those that are not there.

    Global sites come first, in the order of the model, and then deterministic sites that depend on globals alone. A
    Cholesky factor of a correlation matrix, ``L``, has the correlations ``corr(L)[1, 0]`` in the place of its elements.

    :param PosteriorDraws posterior: of a fit.
    """
    if not posterior.gaussian.unit_model.layout.global_sites:
        return [], []
    with torch.no_grad():
        latent = list(_latent(posterior))
    functions, notes = _functions(posterior)
    found = [rows.kept(_varying(rows.values)) for rows in (*latent, *functions)]
    return [rows for rows in found if rows.names], notes


def _varying(values: Vector) -> Vector:
    """Which elements are no constants, ``(n,)``."""
    spread, size = numpy.ptp(values, axis=0), numpy.abs(values).max(0)
    varying: Vector = ~(spread <= _ROUNDING * numpy.finfo(values.dtype).eps * size)  # and what is NaN
    return varying


# ------------------------------------------------------------------------------------------------------- global sites


def _latent(posterior: PosteriorDraws) -> Iterator[Rows]:
    globals_, _ = posterior.weighted_globals()
    weights = posterior.globals_.weights
    mean, sd = map(posterior.problem.rounded, posterior.global_moments)
    for name, value in posterior.gaussian.constrained_globals(globals_).items():
        support = _support(posterior, name)
        if support == "corr_cholesky":
            correlations = to_numpy(value @ value.mT)
            names = element_names(f"corr({name})", correlations.shape[1:])
            rows = _computed(names, correlations.reshape(len(globals_), -1), weights, [frozenset({name})] * len(names))
            yield rows.kept(_lower(correlations.shape[1:], -1))
            continue
        names, flat = element_names(name, value.shape[1:]), to_numpy(value).reshape(len(globals_), -1)
        first, second = (to_numpy(part[name]).reshape(-1) for part in (mean, sd))
        rows = Rows(names, flat, weights, first, second, [frozenset({one}) for one in names])
        below = {"corr_matrix": -1, "positive_definite": 0}.get(support)
        yield rows if below is None else rows.kept(_lower(value.shape[1:], below))


def _support(posterior: PosteriorDraws, name: str) -> str:
    """The name of the support of a site that is a matrix, such as ``corr_cholesky``; empty of any other."""
    transform: Any = of_one_event(posterior.gaussian.unit_model.layout.global_sites[name].transform)
    kind = type(getattr(transform, "codomain", None)).__name__.lstrip("_")
    kinds = {"CorrCholesky": "corr_cholesky", "CorrMatrix": "corr_matrix", "PositiveDefinite": "positive_definite"}
    return kinds.get(kind, "")


def _lower(shape: Sequence[int], offset: int) -> Vector:
    """Which elements of matrices ``shape`` are in the lower triangle, flat."""
    lower: Vector = numpy.tril(numpy.ones(tuple(shape), dtype=bool), offset).reshape(-1)
    return lower


def _computed(names: list[str], values: Vector, weights: Vector, depends: list[frozenset[str] | None]) -> Rows:
    """Rows of values ``(S, n)``, with their moments."""
    with numpy.errstate(invalid="ignore", over="ignore"):
        center = values[0]  # so that squares of small spreads have digits left
        first, second = weights @ (values - center), weights @ (values - center) ** 2
        return Rows(names, values, weights, center + first, numpy.sqrt((second - first**2).clip(min=0)), depends)


# ------------------------------------------------------------------------------------------------ deterministic sites


def _functions(posterior: PosteriorDraws) -> tuple[list[Rows], list[str]]:
    gaussian = posterior.gaussian
    model = gaussian.unit_model.live()
    try:
        found = find_functions(model, gaussian.global_loc, gaussian.local_loc)
        notes = [
            f"'{name}' has {shape.numel()} elements, too many for this table: result.predictive()()['{name}']"
            for name, shape in found.too_large.items()
        ]
        if not found.shapes:
            return [], notes
        values, weights, depends = _values(posterior, found)
    except Exception as error:  # whatever the model makes of globals that it was not seen at
        reason = str(error).partition("\n")[0] or type(error).__name__
        return [], [f"deterministic sites are not in this table, as the model does not run at every draw: {reason}"]
    if len(values) < len(posterior.globals_.draws):
        notes.append(
            f"{', '.join(found.shapes)}: from {len(values)} draws, as each of them takes a run of the model in Python"
        )
    return list(_by_site(found.shapes, values, weights, depends)), notes


def _by_site(
    shapes: Mapping[str, torch.Size], values: Vector, weights: Vector, depends: list[frozenset[str] | None]
) -> Iterator[Rows]:
    start = 0
    for name, shape in shapes.items():
        part = slice(start, start + shape.numel())
        yield _computed(element_names(name, shape), values[:, part], weights, depends[part])
        start = part.stop


def _values(posterior: PosteriorDraws, functions: GlobalFunctions) -> tuple[Vector, Vector, list[Any]]:
    """Values ``(S, n)``, weights ``(S,)``, and what each depends on: at all draws of a recording, or at some."""
    center, local = posterior.gaussian.global_loc, posterior.gaussian.local_loc
    try:
        recording = record(functions, center, local)
    except Exception:  # of torch, or of a model that no recording can be made of
        globals_, weights = posterior.some_globals(_RUNS)
        with torch.no_grad():
            values = torch.stack([functions(row, local) for row in globals_])
        return to_numpy(values), weights, [None] * values.shape[1]
    globals_, _ = posterior.weighted_globals()
    with torch.no_grad():
        values = at_points(recording, globals_, local.expand(len(globals_), *local.shape))
    return to_numpy(values), posterior.globals_.weights, _depends(posterior, recording, globals_)


def _depends(posterior: PosteriorDraws, recording: Any, globals_: Tensor) -> list[frozenset[str] | None]:
    """Which elements of the globals each function has a derivative in, at some draw; None for one without any."""
    names = posterior.gaussian.unit_model.layout.global_elements()
    local, step = posterior.gaussian.local_loc, max(1, len(globals_) // _LOOKED_AT)
    slopes = [to_numpy(torch.func.jacrev(recording)(row, local)) for row in globals_[::step]]
    moving = (numpy.array(slopes) != 0).any(0)
    return [frozenset(numpy.array(names)[row].tolist()) or None for row in moving]
