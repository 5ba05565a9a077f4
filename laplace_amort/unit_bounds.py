"""Objectives that integrate over each unit, bound to a guide and its data."""

from __future__ import annotations

import math
from functools import cached_property

import numpy
import torch
from torch import Tensor

from laplace_amort.bound import Bound, elbo_coordinates, mean_of_pairs
from laplace_amort.conditionals import Integrals
from laplace_amort.coordinates import Coordinates, Vector
from laplace_amort.draws import antithetic_draws
from laplace_amort.errors import ModeNotFoundError
from laplace_amort.evaluation import Evaluation
from laplace_amort.family import LaplaceGaussian
from laplace_amort.modes import FreeMode
from laplace_amort.newton import ModeStatus
from laplace_amort.rules import Points, UnitRule
from laplace_amort.target import Target, to_vector

__all__ = ["BoundNested", "BoundUnits"]

# Posterior standard deviations between the gradients whose difference is a curvature: the error is a few 1e-7 of it.
_STEP = 1e-3


class BoundUnits(Bound):
    """A :class:`~laplace_amort.MarginalQuadrature` of one guide at given data.

    :param Target target: the guide and the data.
    :param UnitRule rule: how units are integrated over.
    """

    def __init__(self, target: Target, rule: UnitRule) -> None:
        super().__init__(target, target.globals_())
        self.rule = rule

    @cached_property
    def points(self) -> Points:
        """Those of the rule."""
        return self.rule.points(self.target.start.shape[1], self.target.loc)

    def _evaluate(self) -> Evaluation:
        target, globals_ = self.target, self.target.loc.unsqueeze(0)
        found = target.integrals.values_and_gradients(
            self.points, Points.log_integral, globals_, target.start.unsqueeze(0)
        )
        _refuse_lost(target, found)
        _remember(target, found)
        return Evaluation(float(found.values), to_vector([found.gradients[0]]))

    def information(self, coordinates: Coordinates) -> Vector:
        """Return minus the second derivative where the guide stands, from differences of exact gradients, ``(d, d)``.

        :param Coordinates coordinates: have the steps.
        """
        d, loc = len(self.target.loc), self.target.loc
        if d == 0:
            return numpy.zeros((0, 0))
        steps = numpy.array([coordinates.step(row) for row in numpy.eye(d)]).reshape(d, d)
        moves = _STEP * torch.from_numpy(steps).to(loc)
        globals_ = torch.cat([loc + moves, loc - moves])
        found = self.target.integrals.values_and_gradients(
            self.points, Points.log_integral, globals_, self.target.starts(globals_)
        )
        ahead, behind = found.gradients.double().cpu().numpy().reshape(2, d, d)
        along = numpy.linalg.solve(steps, (behind - ahead) / (2 * _STEP))
        symmetric: Vector = (along + along.T) / 2
        return symmetric


class BoundNested(Bound):
    """A :class:`~laplace_amort.NestedELBO` of one guide at given data, with its draws of the globals.

    :param Target target: the guide and the data.
    :param UnitRule rule: how units are averaged over.
    :param int num_draws: number of draws.
    :param int seed: of the draws.
    """

    def __init__(self, target: Target, rule: UnitRule, num_draws: int, seed: int) -> None:
        leaves = [leaf for leaf in target.parameters() if not _is_center(target, leaf)]
        super().__init__(target, leaves)
        self.num_draws, self.seed = num_draws, seed
        self.points = rule.points(target.start.shape[1], target.loc)

    @cached_property
    def noise(self) -> Tensor:
        """The draws, ``(S, d)``."""
        return antithetic_draws(self.num_draws, self.target.loc, self.target.start[:0], self.seed).global_

    def coordinates(self) -> Coordinates:
        """Return coordinates in which the posterior is standard normal, as far as the marginal curvature knows it."""
        return elbo_coordinates(self.target, sum(p.numel() for p in self.parameters), with_units=False)

    def _evaluate(self) -> Evaluation:
        with torch.enable_grad():
            gaussian = self._gaussian()
            globals_ = self._at(gaussian)
            log_det = gaussian.precision.global_scale_tril.diagonal().log().sum()
        fixed = globals_.detach()
        found = self.target.integrals.values_and_gradients(
            self.points, Points.mean_gain, fixed, self.target.starts(fixed)
        )
        _refuse_lost(self.target, found)
        with torch.enable_grad():
            surrogate = (found.gradients * globals_).sum() / self.num_draws + log_det
        pulls = torch.autograd.grad(surrogate, self.parameters, allow_unused=True)
        gradient = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, pulls, strict=True)]
        value, error = mean_of_pairs(found.values + self._entropy(log_det))
        return Evaluation(value, to_vector(gradient), standard_error=error, head_report=gaussian.head_report)

    @torch.no_grad()
    def values(self) -> Tensor:
        """Return the terms whose mean is the value, ``(S,)``, pairs of draws half the number apart."""
        gaussian = self._gaussian()
        globals_ = self._at(gaussian)
        found = self.target.integrals.values(self.points, Points.mean_gain, globals_, self.target.starts(globals_))
        return found.values + self._entropy(gaussian.precision.global_scale_tril.diagonal().log().sum())

    def _gaussian(self) -> LaplaceGaussian:
        return self.target.guide.gaussian_of(self.target.unit_model, mode=self.target.mode)

    def _at(self, gaussian: LaplaceGaussian) -> Tensor:
        return gaussian.global_loc + self.noise @ gaussian.precision.global_scale_tril.mT

    def _entropy(self, log_det: Tensor) -> Tensor:
        """Minus the log density of the globals at their draws, ``(S,)``, without a graph."""
        return (self.noise**2).sum(-1) / 2 + self.noise.shape[1] / 2 * math.log(2 * math.pi) + log_det.detach()


def _is_center(target: Target, leaf: Tensor) -> bool:
    """Whether a parameter is the centers of units, of which nothing here depends."""
    mode = target.guide.mode
    return isinstance(mode, FreeMode) and any(leaf is parameter for parameter in mode.parameters())


def _remember(target: Target, found: Integrals) -> None:
    warm_start, units = target.guide.warm_start, target.unit_model.units
    warm_start.remember(units, target.loc, found.mode[0], warm_start.slope[units])


def _refuse_lost(target: Target, found: Integrals) -> None:
    """Raise where the mode of a unit was not found.

    :raises ModeNotFoundError: naming the first.
    """
    lost = found.lost.any(0).nonzero().squeeze(-1).tolist()
    if lost:
        raise ModeNotFoundError(
            f"the conditional mode was not found for {len(lost)} of {found.lost.shape[1]} units, the first of them "
            f"{target.unit_model.describe(lost[0])}. Did the globals run away? Start elsewhere:\n"
            "    fit(model, guide, *args, starts=20)",
            units=target.unit_model.units[lost].tolist(),
            status=[ModeStatus.MAX_STEPS] * len(lost),
        )
