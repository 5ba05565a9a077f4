"""The numbers behind the figures: weighted draws, densities, and references in whatever form a user has them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from torch import Tensor

from laplace_amort.fitting import FitResult
from laplace_amort.guide import LaplaceGaussian, is_elementwise
from laplace_amort.posterior import Posterior
from laplace_amort.types import Vector, element_name, to_numpy

__all__ = [
    "Column",
    "columns",
    "free_columns",
    "posterior_of",
    "reference_values",
    "require_fit",
    "with_reference",
]


@dataclass(frozen=True)
class Column:
    """Weighted draws of one element of a global site.

    :param str site: its name.
    :param str label: how a figure calls the element.
    :param int position: in the flattened value of the site.
    :param coordinate: in the unconstrained globals ``(d,)``; ``None`` where the support is not element by element.
    :param Vector values: ``(S,)``.
    :param Vector free: the coordinate of the draws, or ``values`` where there is none, ``(S,)``.
    :param Vector weights: that sum to 1, ``(S,)``.
    :param image: from the coordinates that are moved, ``(G,)`` each, the others at the center, to values ``(G,)``.
    """

    site: str
    label: str
    position: int
    coordinate: int | None
    values: Vector
    free: Vector
    weights: Vector
    image: Callable[[Mapping[int, Vector]], Vector]


def require_fit(result: Any) -> FitResult:
    """Return what it was given.

    :raises TypeError: if it is no :class:`~laplace_amort.FitResult`.
    """
    if not isinstance(result, FitResult):
        raise TypeError(
            f"this figure is one of a fit, and got {type(result).__name__}. Give it what fit returned:\n"
            "    result = fit(model, *args)"
        )
    return result


def posterior_of(result: Any) -> Posterior:
    """Return the posterior of a fit.

    :raises TypeError: if it is no :class:`~laplace_amort.FitResult`.
    :raises ValueError: if the fit ended where there is none.
    """
    return require_fit(result).posterior


def columns(posterior: Posterior, names: Sequence[str] | None = None) -> list[Column]:
    """Return every element of the global sites that varies, with its draws, as the model has them.

    :param Posterior posterior: of a fit.
    :param names: sites to keep; ``None`` for all.
    :raises ValueError: if there are no globals, or no site of that name.
    """
    gaussian, globals_, weights = posterior.gaussian, posterior.globals_.draws, posterior.globals_.weights
    values = gaussian.constrained_globals(torch.from_numpy(globals_).to(gaussian.global_loc))
    found = []
    for name, start in _sites(gaussian, names).items():
        shape, transform = values[name].shape[1:], gaussian.unit_model.layout.global_sites[name].transform
        alone = transform is not None and is_elementwise(transform)
        flat = to_numpy(values[name]).reshape(len(globals_), -1)
        for position, index in enumerate(numpy.ndindex(*shape)):
            coordinate = start + position if alone else None
            if not alone and not numpy.ptp(flat[:, position]) > 0:
                continue  # fixed by the support, as the upper triangle of a Cholesky factor
            free = flat[:, position] if coordinate is None else globals_[:, coordinate]
            image = functools.partial(_image, gaussian, name, position)
            label = element_name(name, index)
            found.append(Column(name, label, position, coordinate, flat[:, position], free, weights, image))
    return found


def free_columns(posterior: Posterior, names: Sequence[str] | None = None) -> list[Column]:
    """Return every unconstrained coordinate of the global sites, as :func:`columns` does."""
    gaussian, globals_, weights = posterior.gaussian, posterior.globals_.draws, posterior.globals_.weights
    found = []
    for name, start in _sites(gaussian, names).items():
        site = gaussian.unit_model.layout.global_sites[name]
        for position, index in enumerate(numpy.ndindex(*site.shape)):
            coordinate = start + position
            free, image = globals_[:, coordinate], functools.partial(_same, coordinate)
            label = f"{element_name(name, index)}, unconstrained"
            found.append(Column(name, label, position, coordinate, free, free, weights, image))
    return found


def _sites(gaussian: LaplaceGaussian, names: Sequence[str] | None) -> dict[str, int]:
    """Find where each of the global sites begins in the globals."""
    sites = gaussian.unit_model.layout.global_sites
    if not sites:
        raise ValueError("the model has no globals to draw; its units are drawn by\n    units_figure(result)")
    for name in names if names is not None else ():
        if name not in sites:
            raise ValueError(f"there is no global site '{name}'; there are {', '.join(map(repr, sites))}")
    starts = itertools.accumulate([site.shape.numel() for site in sites.values()], initial=0)
    return {name: start for name, start in zip(sites, starts, strict=False) if names is None or name in names}


def _image(gaussian: LaplaceGaussian, name: str, position: int, moved: Mapping[int, Vector]) -> Vector:
    """Map coordinates to an element of a site as the model has it, all others at the center."""
    globals_ = gaussian.global_loc.expand(len(next(iter(moved.values()))), -1).clone()
    for coordinate, values in moved.items():
        globals_[:, coordinate] = torch.from_numpy(numpy.ascontiguousarray(values)).to(globals_)
    return to_numpy(gaussian.constrained_globals(globals_)[name]).reshape(len(globals_), -1)[:, position]


def _same(coordinate: int, moved: Mapping[int, Vector]) -> Vector:
    return moved[coordinate]


def with_reference(column: Column, gaussian: LaplaceGaussian, values: Vector) -> Column:
    """Return a column with the draws of a reference, ``(S, *shape)``, of its site as the model has it."""
    drawn = values.reshape(len(values), -1)[:, column.position]
    free, transform = drawn, gaussian.unit_model.layout.global_sites[column.site].transform
    coordinate, image = column.coordinate, column.image
    if coordinate is not None and transform is not None:
        there = to_numpy(transform.inv(torch.as_tensor(values).to(gaussian.global_loc)))
        free = there.reshape(len(values), -1)[:, column.position]
        if not numpy.isfinite(free).all():  # a draw on the edge of the support
            coordinate, free = None, drawn
    weights = numpy.full(len(drawn), 1 / len(drawn))
    return replace(column, values=drawn, free=free, weights=weights, coordinate=coordinate, image=image)


def reference_values(reference: Any, name: str, shape: tuple[int, ...]) -> Any:
    """Return what a reference says of a site: draws ``(S, *shape)``, its summary, or ``None`` if it has no such site.

    :param reference: a fit, draws by name, an object of ArviZ, or a reference of
        :mod:`laplace_amort.examples.datasets`.
    :param str name: of the site.
    :param tuple shape: of its constrained value.
    :raises TypeError: if it is nothing of these.
    :raises ValueError: if the shapes do not fit.
    """
    if isinstance(reference, FitResult | Posterior):
        posterior = reference if isinstance(reference, Posterior) else reference.posterior
        draws: Mapping[Any, Any] = posterior.sample(1000)
    elif hasattr(reference, "posterior"):
        draws = reference.posterior
    elif isinstance(reference, Mapping) or hasattr(reference, "data_vars"):
        draws = reference
    elif hasattr(reference, "variables"):  # of the datasets, which are an upper layer
        summary = reference.variables.get(name)
        if summary is not None and tuple(summary.mean.shape) != shape:
            raise ValueError(_misfit(name, tuple(summary.mean.shape), shape))
        return summary
    else:
        raise TypeError(
            "a reference is a result of fit, draws by name, an object of ArviZ or one of "
            f"laplace_amort.examples.datasets; got {type(reference).__name__}. For instance, from NUTS:\n"
            "    reference=mcmc.get_samples()"
        )
    return _flat_draws(name, draws[name], shape) if name in draws else None


def _flat_draws(name: str, values: Any, shape: tuple[int, ...]) -> Vector:
    """Join the draws of all chains, ``(S, *shape)``."""
    array: Vector = to_numpy(values) if isinstance(values, Tensor) else numpy.asarray(values, dtype=float)
    if array.shape[2:] == shape and array.ndim == len(shape) + 2:
        array = array.reshape(-1, *shape)
    if array.shape[1:] != shape or array.ndim != len(shape) + 1:
        raise ValueError(_misfit(name, array.shape, ("draws", *shape)))
    if len(array) < 2 or not numpy.isfinite(array).all():
        raise ValueError(f"the reference has {len(array)} draws of '{name}', or some that are not finite")
    return array


def _misfit(name: str, found: tuple[Any, ...], expected: tuple[Any, ...]) -> str:
    return (
        f"the reference has shape ({', '.join(map(str, found))}) for '{name}', and the model "
        f"({', '.join(map(str, expected))}). Is it of the same model and data, and in the order of its plates?"
    )
