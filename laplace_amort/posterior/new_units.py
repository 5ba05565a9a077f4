"""The posterior of units that were not fitted, given their data and the globals of a fit."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, TypeVar

import torch
from pyro import poutine

from laplace_amort.errors import ModelError, RecordingError
from laplace_amort.guide import LaplaceGaussian
from laplace_amort.model import UnitModel, UnitModels
from laplace_amort.posterior.draws import PosteriorDraws
from laplace_amort.posterior.unit_draws import LinearUnits, NestedUnits, UnitPosterior

__all__ = ["posterior_for"]

_Draws = TypeVar("_Draws", bound=PosteriorDraws)


def posterior_for(posterior: _Draws, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Draws:
    """Return the posterior of new units given data and the globals of a fit; see :meth:`Posterior.posterior_for`."""
    problem, fitted = posterior.problem, posterior.gaussian
    try:
        with poutine.block():
            given, _ = UnitModels(problem.guide.model, problem.guide.unit_plate)(args, kwargs, {})
            model = problem.numbers.of(given)
    except ModelError as error:
        raise ModelError(
            f"{error}\nHere the model needs the data of the new units; of units without any:\n"
            "    result.predictive(NewUnits())(*args)"
        ) from error
    _check_layout(fitted.unit_model, model)
    start = fitted.local_loc.mean(0).expand(model.layout.num_units, -1).contiguous()
    with torch.no_grad():
        local = problem.mode.find(model, fitted.global_loc, start)
    gaussian = problem.gaussian_given(model, local, fitted)
    return dataclasses.replace(posterior, gaussian=gaussian, units=_units_at(posterior, gaussian), fitted=posterior)


def _units_at(posterior: PosteriorDraws, gaussian: LaplaceGaussian) -> UnitPosterior:
    """Say of new units what the posterior says of those of the fit."""
    if not isinstance(posterior.units, NestedUnits):
        return LinearUnits(gaussian)
    model = _for_many(gaussian)
    integrals = posterior.problem.integrals_of(model, gaussian.global_loc, gaussian.local_loc)
    return dataclasses.replace(posterior.units, gaussian=gaussian, integrals=integrals)


def _for_many(gaussian: LaplaceGaussian) -> UnitModel:
    """The model as it is evaluated fastest at many points."""
    for faster in (gaussian.unit_model.recorded, gaussian.unit_model.at_once):
        with contextlib.suppress(RecordingError):
            return faster(gaussian.global_loc, gaussian.local_loc)
    return gaussian.unit_model


def _check_layout(fitted: UnitModel, model: UnitModel) -> None:
    old, new = fitted.layout, model.layout
    if model.layout.weight != 1:
        raise ModelError(
            f"plate '{new.frame.name}' takes {new.frame.size} of {new.frame.full_size} units at these arguments; new "
            f"units are taken together. Leave the minibatch out:\n    pyro.plate('{new.frame.name}', "
            f"{new.frame.full_size})"
        )
    same = list(old.global_sites) == list(new.global_sites) and list(old.local_sites) == list(new.local_sites)
    if not same or (old.global_dim, old.local_dim) != (new.global_dim, new.local_dim):
        raise ModelError(
            f"the model has other latents at these arguments than in the fit. There:\n{old}\nHere:\n{new}\nOnly the "
            "number of units may change; data must be given for them (of units without: NewUnits())"
        )
