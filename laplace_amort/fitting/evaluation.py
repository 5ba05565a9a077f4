"""What an objective gives back at a point, and what an optimizer gives back at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from laplace_amort.statuses import Status
from laplace_amort.types import Vector

__all__ = ["Evaluation", "FitStatus", "Function", "Maximum"]


class FitStatus(Status):
    """How a fit ended; ``str(status)`` is the sentence that a user reads, and ``result.notes`` say why.

    Example::

        >>> print(FitStatus.CONVERGED)
        converged: what is left of the gradient would move the optimum by less than the tolerance
    """

    CONVERGED = 0, "converged: what is left of the gradient would move the optimum by less than the tolerance"
    MAX_STEPS = 1, "not converged in the steps allowed"
    TOO_FEW_DRAWS = (
        2,
        "converged for its own draws only: others have their optimum elsewhere, so the guide fits badly in some of its "
        "tails; integrate over the units: fit(model, *args, objective=Ladder())",
    )
    STUCK = (
        3,
        "not converged: no step improves the objective although its gradient is not zero",
    )
    START_FAILED = 4, "not begun: the objective does not exist at the start nor near it"
    INTERRUPTED = 5, "interrupted: the guide stands at the best point found; go on with resume="
    NO_MAXIMUM = (
        6,
        "not converged: at the best point the objective is flat or curves upwards in some direction",
    )
    COLLAPSED = (
        7,
        "not converged: a scale ran to zero together with the globals that it is the scale of, and the posterior is "
        "elsewhere",
    )
    KINKED = (
        8,
        "not converged: the density has a kink, as of abs, relu, clamp, max or a Laplace density, where curvatures say "
        "nothing",
    )

    @property
    def ok(self) -> bool:
        """Whether the fit converged."""
        return self is FitStatus.CONVERGED


class Evaluation(NamedTuple):
    """An objective at one point, in numbers that can be saved.

    :param float value: of the objective, to be made large; minus infinity where it does not exist.
    :param Vector gradient: ``(P,)``.
    :param Vector information: the negative second derivative ``(P, P)``, or None if the objective has none at hand.
    :param float standard_error: of the value, where it is an average over draws; else 0.
    :param float rounding: relative rounding error of the arithmetic.
    :param str failure: why the objective does not exist here; empty if it does.
    """

    value: float
    gradient: Vector
    information: Vector | None = None
    standard_error: float = 0.0
    rounding: float = 2.0**-52
    failure: str = ""


Function = Callable[[Vector], Evaluation]


class Maximum(NamedTuple):
    """Where a maximization ended.

    :param Vector point: ``(P,)``.
    :param Evaluation evaluation: of the objective there.
    :param FitStatus status: how it ended.
    :param float gradient_norm: in posterior standard deviations: how far the optimum still is, to first order.
    :param int num_starts: how many starts ended there.
    :param objective: the one that the posterior is of, where it is another than the one that was asked for.
    :param notes: what a user should know of the way there, in sentences.
    :param posterior: of that objective there, where it was found on the way.
    """

    point: Vector
    evaluation: Evaluation
    status: FitStatus
    gradient_norm: float
    num_starts: int = 1
    objective: Any = None
    notes: tuple[str, ...] = ()
    posterior: Any = None

    def numbers(self) -> Maximum:
        """Return the same without the objects that hold a model, or may be of a user's own class."""
        return self._replace(objective=None, posterior=None)
