"""What an objective is: settings that say how to maximize it, and a function of the parameters of a guide at its data.

A point where an objective does not exist, because a mode was not found or a density overflowed, has the value minus
infinity and says why.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy
import torch
from torch import Tensor

from laplace_amort.errors import NUMERICAL_ERRORS, ModelError, ModeNotFoundError
from laplace_amort.fitting.evaluation import Evaluation, Maximum
from laplace_amort.fitting.history import History
from laplace_amort.fitting.optimizers import Optimizer
from laplace_amort.guide import LaplaceGaussian, MarginalCurvature, Problem, set_vector, to_vector
from laplace_amort.linalg import Whitening
from laplace_amort.posterior import Posterior
from laplace_amort.types import Vector
from laplace_amort.units import Integrals, ModeStatus

__all__ = ["KinkFound", "Objective", "ObjectiveFunction", "gaussian_at", "posterior_whitening", "refuse_lost_units"]


class KinkFound(ModelError):
    """The modes of units are lost, and their density has a kink: there is no use in looking for them elsewhere."""


@runtime_checkable
class Objective(Protocol):
    """What a fit maximizes; any object with these."""

    @property
    def start_with(self) -> Objective | None:
        """An objective whose optimum is the start; None for none."""

    @property
    def default_optimizer(self) -> Optimizer:
        """What suits it."""

    def check(self, problem: Problem) -> None:
        """Refuse a model that this is no objective for.

        :raises ModelError: naming what is in the way.
        """

    def climb(self, history: History, optimizer: Optimizer) -> Maximum:
        """Maximize from where the guide stands, and put the guide there."""

    def gaussian(self, problem: Problem, maximum: Maximum) -> LaplaceGaussian:
        """Return the posterior where the guide stands, as a Gaussian."""

    def posterior(self, problem: Problem, gaussian: LaplaceGaussian, seed: int) -> Posterior:
        """Return the posterior for use, as good as this objective knows it.

        :param Problem problem: the model at its data.
        :param LaplaceGaussian gaussian: what :meth:`gaussian` returned.
        :param int seed: of draws.
        """


class ObjectiveFunction(ABC):
    """An objective as a function of one vector of parameters of a guide, for which subclasses have the formula.

    :param Problem problem: the guide and the data.
    :param parameters: leaves, to be moved in place.
    """

    def __init__(self, problem: Problem, parameters: Sequence[Tensor]) -> None:
        self.problem = problem
        self.parameters = list(parameters)

    def point(self) -> Vector:
        """Return where the parameters stand, ``(P,)``."""
        return to_vector(self.parameters)

    def move(self, point: Vector) -> None:
        """Put the parameters there."""
        set_vector(self.parameters, point)

    def __call__(self, point: Vector) -> Evaluation:
        """Evaluate, without an error where the objective does not exist.

        :raises KinkFound: if the modes of units are lost, and their density has a kink.
        """
        self.move(point)
        try:
            found = self._evaluate_with_second_thoughts()
        except NUMERICAL_ERRORS as error:
            if isinstance(error, ModeNotFoundError) and self.problem.kink is not None:
                raise KinkFound(str(self.problem.kink)) from error  # wherever it goes, there is another
            return _nothing(point, f"{type(error).__name__}: {error}")
        derivatives = [part for part in (found.gradient, found.information) if part is not None]
        if not (math.isfinite(found.value) and all(numpy.isfinite(part).all() for part in derivatives)):
            return _nothing(point, f"the objective is {found.value}, and its gradient {found.gradient.tolist()[:5]}")
        return found._replace(rounding=torch.finfo(self.problem.loc.dtype).eps)

    def _evaluate_with_second_thoughts(self) -> Evaluation:
        """Where modes are not found from where they were last, look once more from the first start."""
        problem = self.problem
        try:
            return self._evaluate()
        except ModeNotFoundError:
            memory = problem.memory()
            try:
                problem.recall()
                return self._evaluate()
            except NUMERICAL_ERRORS:
                problem.recall(memory)
                raise

    @abstractmethod
    def _evaluate(self) -> Evaluation:
        """Evaluate where the parameters stand."""

    def _gradients_of(self, value: Tensor) -> tuple[Tensor, ...]:
        """Return the gradient of a value in each of the parameters; zeros where it does not depend on it."""
        return torch.autograd.grad(value, self.parameters, allow_unused=True, materialize_grads=True)


def _nothing(point: Vector, failure: str) -> Evaluation:
    return Evaluation(-math.inf, numpy.full_like(point, numpy.nan), failure=failure)


def gaussian_at(problem: Problem, objective: Objective, maximum: Maximum) -> LaplaceGaussian | None:
    """Return the posterior where the guide stands, by the model itself; None where there is none.

    :param Problem problem: the guide and the data.
    :param objective: what was maximized.
    :param Maximum maximum: where that ended.
    """
    try:
        with torch.no_grad():
            gaussian = objective.gaussian(problem, maximum)
            return dataclasses.replace(gaussian, unit_model=problem.unit_model.live())
    except NUMERICAL_ERRORS:
        return None


def posterior_whitening(problem: Problem, size: int, with_units: bool) -> Whitening:
    """Return coordinates in which the posterior is standard normal, as far as the marginal curvature knows it.

    :param Problem problem: the guide and the data.
    :param int size: number of parameters.
    :param bool with_units: whether the centers of the units are among them.
    """
    try:
        with torch.no_grad():
            gaussian = problem.gaussian(mode=problem.mode, head=MarginalCurvature())
    except NUMERICAL_ERRORS:  # a start far away, from which the optimizer has to come back
        return dataclasses.replace(Whitening.of_information(numpy.eye(len(problem.loc))), size=size)
    return Whitening(gaussian.precision, with_units, size)


def refuse_lost_units(problem: Problem, found: Integrals) -> None:
    """Raise where the mode of a unit was not found.

    :param Problem problem: has the names of the units.
    :param Integrals found: over its units.
    :raises ModeNotFoundError: naming the first.
    """
    lost = found.lost.any(0).nonzero().squeeze(-1).tolist()
    if lost:
        raise ModeNotFoundError(
            f"the conditional mode was not found for {len(lost)} of {found.lost.shape[1]} units, the first of them "
            f"{problem.unit_model.describe(lost[0])}. Did the globals run away? Start elsewhere:\n"
            "    fit(model, *args, starts=20)",
            units=problem.unit_model.units[lost].tolist(),
            status=[ModeStatus.MAX_STEPS] * len(lost),
        )
