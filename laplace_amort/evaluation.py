"""What a deterministic objective gives back at a point, and what an optimizer gives back at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from laplace_amort.coordinates import Vector
from laplace_amort.fit_status import FitStatus
from laplace_amort.repair import RepairReport

__all__ = ["BoundObjective", "Evaluation", "Function", "Maximum"]


class Evaluation(NamedTuple):
    """An objective at one point, in numbers that can be saved.

    :param float value: of the objective, to be made large; minus infinity where it does not exist.
    :param Vector gradient: ``(P,)``.
    :param Vector information: the negative second derivative ``(P, P)``, or None if the objective has none at hand.
    :param float standard_error: of the value, where it is an average over draws; else 0.
    :param RepairReport head_report: what was repaired in the precision of the globals; None if nothing could be.
    :param float rounding: relative rounding error of the arithmetic.
    :param str problem: why the objective does not exist here; empty if it does.
    """

    value: float
    gradient: Vector
    information: Vector | None = None
    standard_error: float = 0.0
    head_report: RepairReport | None = None
    rounding: float = 2.0**-52
    problem: str = ""


class BoundObjective(Protocol):
    """An objective of the parameters of one guide at given data."""

    num_draws: int

    def point(self) -> Vector:
        """Return where the parameters stand, ``(P,)``."""

    def move(self, point: Vector) -> None:
        """Put the parameters there."""

    def __call__(self, point: Vector) -> Evaluation:
        """Evaluate, without an error where the objective does not exist."""


Function = Callable[[Vector], Evaluation]


class Maximum(NamedTuple):
    """Where an optimizer ended.

    :param Vector point: ``(P,)``.
    :param Evaluation evaluation: of the objective there.
    :param FitStatus status: how it ended.
    :param float gradient_norm: in posterior standard deviations: how far the optimum still is, to first order.
    """

    point: Vector
    evaluation: Evaluation
    status: FitStatus
    gradient_norm: float
