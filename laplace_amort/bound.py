"""Objectives bound to a guide and its data: functions of one vector of parameters.

A point where an objective does not exist, because a mode was not found or a density overflowed, has the value minus
infinity and says why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import numpy
import torch
from torch import Tensor

from laplace_amort.coordinates import Coordinates, Vector
from laplace_amort.draws import Draws, antithetic_draws
from laplace_amort.errors import NUMERICAL_ERRORS, ModeNotFoundError
from laplace_amort.evaluation import Evaluation
from laplace_amort.family import LaplaceGaussian
from laplace_amort.heads import MarginalCurvature
from laplace_amort.marginal import laplace_marginal
from laplace_amort.modes import FreeMode, NewtonMode
from laplace_amort.newton import default_tolerance
from laplace_amort.pulls import draw_pulls
from laplace_amort.target import Target, set_vector, to_vector

__all__ = ["Bound", "BoundELBO", "BoundMarginal", "elbo_coordinates", "mean_of_pairs"]


class Bound(ABC):
    """What both have in common: parameters as a vector, and points where nothing can be computed.

    :param Target target: the guide and the data.
    :param parameters: leaves, to be moved in place.
    """

    num_draws = 0

    def __init__(self, target: Target, parameters: Sequence[Tensor]) -> None:
        self.target = target
        self.parameters = list(parameters)

    def point(self) -> Vector:
        """Return where the parameters stand, ``(P,)``."""
        return to_vector(self.parameters)

    def move(self, point: Vector) -> None:
        """Put the parameters there."""
        set_vector(self.parameters, point)

    def __call__(self, point: Vector) -> Evaluation:
        """Evaluate, without an error where the objective does not exist."""
        self.move(point)
        try:
            found = self._evaluate_with_second_thoughts()
        except NUMERICAL_ERRORS as error:
            return _nothing(point, f"{type(error).__name__}: {error}")
        derivatives = [part for part in (found.gradient, found.information) if part is not None]
        if not (math.isfinite(found.value) and all(numpy.isfinite(part).all() for part in derivatives)):
            return _nothing(point, f"the objective is {found.value}, and its gradient {found.gradient.tolist()[:5]}")
        return found._replace(rounding=torch.finfo(self.target.loc.dtype).eps)

    def _evaluate_with_second_thoughts(self) -> Evaluation:
        """Where modes are not found from where they were last, look once more from the first start."""
        warm_start = self.target.guide.warm_start
        try:
            return self._evaluate()
        except ModeNotFoundError:
            state = warm_start.state()
            try:
                warm_start.restore(self.target.first)
                return self._evaluate()
            except NUMERICAL_ERRORS:
                warm_start.restore(state)
                raise

    @abstractmethod
    def _evaluate(self) -> Evaluation:
        """Evaluate where the parameters stand."""


class BoundMarginal(Bound):
    """A :class:`~laplace_amort.MarginalLaplace` of one guide at given data.

    :param Target target: the guide and the data.
    """

    def __init__(self, target: Target) -> None:
        super().__init__(target, target.globals_())
        self.mode = target.mode
        if isinstance(self.mode, NewtonMode) and self.mode.tolerance is None:
            # A mode is taken one Newton step past where the search ends, and nothing here is differentiated through it.
            # So half as many digits do, which is an evaluation of all units less in every search.
            self.mode = dataclasses.replace(self.mode, tolerance=default_tolerance(target.loc.dtype) ** 0.5)

    @torch.no_grad()
    def _evaluate(self) -> Evaluation:
        target, model, global_ = self.target, self.target.unit_model, self.target.loc
        local = self.mode.find(model, global_, target.start)
        found = laplace_marginal(model.log_joint, global_, local, target.weight)
        target.guide.warm_start.remember(model.units, global_, local, found.regression)
        return Evaluation(float(found.value), _numpy(found.gradient), _numpy(found.information))


class BoundELBO(Bound):
    """A :class:`~laplace_amort.FixedDrawELBO` of one guide at given data, with its draws.

    :param Target target: the guide and the data.
    :param int num_draws: number of draws.
    :param int seed: of the draws.
    """

    def __init__(self, target: Target, num_draws: int, seed: int) -> None:
        # All parameters are in Pyro's store from here on, also if there is no Gaussian where the guide stands now.
        with contextlib.suppress(*NUMERICAL_ERRORS):
            target.guide.gaussian_of(target.unit_model)
        super().__init__(target, target.parameters())
        self.num_draws, self.seed = num_draws, seed

    @cached_property
    def draws(self) -> Draws:
        """The draws, made when they are needed first."""
        return antithetic_draws(self.num_draws, self.target.loc, self.target.start, self.seed)

    def coordinates(self) -> Coordinates:
        """Return coordinates in which the posterior is standard normal, as far as the marginal curvature knows it."""
        size = sum(p.numel() for p in self.parameters)
        return elbo_coordinates(self.target, size, isinstance(self.target.guide.mode, FreeMode))

    def _evaluate(self) -> Evaluation:
        target = self.target
        with torch.enable_grad():
            gaussian = target.guide.gaussian_of(target.unit_model)
            global_, local = self._at(gaussian)
            half_log_det = gaussian.precision.log_det() / 2
        model_parameters = list(target.unit_model.density.parameters().values())
        pulls = draw_pulls(target.unit_model, global_.detach(), local.detach(), model_parameters)
        terms = pulls.values + self._entropy(gaussian)
        with torch.enable_grad():
            # What has the gradient of the mean over draws, without the graph of the model's run at any of them.
            surrogate = (
                (pulls.in_global * global_).sum() + (pulls.in_local * local).sum()
            ) / self.num_draws - half_log_det
        found = torch.autograd.grad(surrogate, self.parameters, allow_unused=True)
        gradient = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]
        for parameter, pull in zip(model_parameters, pulls.in_parameters, strict=True):
            index = next(i for i, p in enumerate(self.parameters) if p is parameter)
            gradient[index] = gradient[index] + pull / self.num_draws
        value, error = mean_of_pairs(terms)
        return Evaluation(value, to_vector(gradient), standard_error=error, head_report=gaussian.head_report)

    @torch.no_grad()
    def values(self) -> Tensor:
        """Return the terms whose mean is the value, ``(S,)``, pairs of draws half the number apart."""
        gaussian = self.target.guide.gaussian_of(self.target.unit_model)
        global_, local = self._at(gaussian)
        return draw_pulls(self.target.unit_model, global_, local, None).values + self._entropy(gaussian)

    def _at(self, gaussian: LaplaceGaussian) -> tuple[Tensor, Tensor]:
        """Globals ``(S, d)`` and units ``(S, N, k)`` of all draws."""
        deviation, local_deviation = gaussian.precision.draw(*self.draws)
        return gaussian.global_loc + deviation, gaussian.local_loc + local_deviation

    def _entropy(self, gaussian: LaplaceGaussian) -> Tensor:
        """Minus the log density of the guide at its draws, ``(S,)``, without a graph."""
        dimension = gaussian.global_loc.numel() + gaussian.local_loc.numel()
        log_det = gaussian.precision.log_det().detach()
        return self.draws.half_squares() + (dimension * math.log(2 * math.pi) - log_det) / 2


def elbo_coordinates(target: Target, size: int, with_units: bool) -> Coordinates:
    """Return coordinates in which the posterior is standard normal, as far as the marginal curvature knows it.

    :param Target target: the guide and the data.
    :param int size: number of parameters.
    :param bool with_units: whether the centers of the units are among them.
    """
    try:
        with torch.no_grad():
            gaussian = target.guide.gaussian_of(target.unit_model, mode=target.mode, head=MarginalCurvature())
    except NUMERICAL_ERRORS:  # a start far away, from which the optimizer has to come back
        return dataclasses.replace(Coordinates.of_information(numpy.eye(len(target.loc))), size=size)
    return Coordinates(gaussian.precision, with_units, size)


def mean_of_pairs(terms: Tensor) -> tuple[float, float]:
    """Return mean and standard error of terms ``(S,)`` of antithetic draws, pairs half their number apart."""
    pairs = terms.double().unflatten(0, (2, -1)).mean(0)
    error = float(pairs.std()) / len(pairs) ** 0.5 if len(pairs) > 1 else math.inf
    return float(pairs.mean()), error


def _nothing(point: Vector, problem: str) -> Evaluation:
    return Evaluation(-math.inf, numpy.full_like(point, numpy.nan), problem=problem)


def _numpy(tensor: Tensor) -> Vector:
    return tensor.double().cpu().numpy()
