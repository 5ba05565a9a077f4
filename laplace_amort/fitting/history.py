"""A fit under way: every evaluation goes through here, into the journal, the history and the progress bar."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
from tqdm import tqdm

from laplace_amort.fitting.evaluation import Evaluation, FitStatus, Function, Maximum
from laplace_amort.fitting.journal import Journal
from laplace_amort.fitting.optimizers import Optimizer
from laplace_amort.guide import Problem, to_vector
from laplace_amort.linalg import Whitening
from laplace_amort.types import Vector

__all__ = ["CHECK", "History", "Step", "progress_bar"]

CHECK = "fresh draws"  # the stage in which an optimum is tried on other draws


@dataclass(frozen=True)
class Step:
    """One evaluation in the history of a fit.

    :param str stage: the part of the fit.
    :param float objective: its value; minus infinity where it does not exist.
    :param float gradient_norm: in posterior standard deviations; infinite where there is no such measure.
    :param int num_draws: that the value is an average over; 0 if it is not.
    :param float seconds: that the evaluation took.
    :param str problem: why the objective does not exist there; empty if it does.
    """

    stage: str
    objective: float
    gradient_norm: float
    num_draws: int
    seconds: float
    problem: str = ""


class History:
    """What the stages of a fit share.

    :param Problem problem: the guide and the data.
    :param Journal journal: of what is found.
    :param int seed: of all draws.
    :param tqdm bar: to show progress on.
    :param walk: the state of an objective that goes on from a state of its own and not by the journal; None for none.

    Attributes: ``steps``, a list of :class:`Step`; and ``timings``, seconds by stage.
    """

    def __init__(self, problem: Problem, journal: Journal, seed: int, bar: Any, walk: Any = None) -> None:
        self.problem, self.journal, self.seed, self.bar, self.walk = problem, journal, seed, bar, walk
        self.steps: list[Step] = []
        self.timings: dict[str, float] = {}
        self._best: Maximum | None = None
        self._best_of: tuple[str, int] = "", 0  # the stage and draws that it is the best of

    def watched(
        self, stage: str, function: Function, norm: Callable[[Evaluation], float], num_draws: int = 0
    ) -> Function:
        """Return a function whose evaluations are kept and shown.

        :param str stage: the part of the fit, for the history.
        :param function: the objective.
        :param norm: of the gradient, in posterior standard deviations.
        :param int num_draws: that the function averages over; 0 if it does not.
        """
        self.bar.set_description(stage)

        def evaluate(point: Vector) -> Evaluation:
            label = f"{stage} {num_draws} {hashlib.sha256(point.tobytes()).hexdigest()[:16]}"
            found, seconds = self._call(stage, label, lambda: function(point))
            size = norm(found) if found.value > -math.inf else math.inf
            self.steps.append(Step(stage, found.value, size, num_draws, seconds, found.failure))
            self.bar.set_postfix_str(f"loss {-found.value:.6g}, gradient {size:.2g} sd", refresh=False)
            self.bar.update()
            self._keep_best(stage, num_draws, Maximum(point.copy(), found, FitStatus.INTERRUPTED, size))
            return found

        return evaluate

    def maximize(
        self, optimizer: Optimizer, function: Function, start: Vector, whitening: Callable[[], Whitening]
    ) -> Maximum:
        """Maximize a function that is watched, so that a fit with more steps can go on from where these end."""
        maximum = optimizer.maximize(function, start, whitening)
        if maximum.status is FitStatus.MAX_STEPS:
            self.journal.end_of_steps(type(optimizer).__name__)
        return maximum

    def _keep_best(self, stage: str, num_draws: int, found: Maximum) -> None:
        """Values are compared within a stage, over all its starts; those on fresh draws are only a check."""
        if stage == CHECK:
            return
        another = self._best_of != (stage, num_draws)
        if self._best is None or another or found.evaluation.value > self._best.evaluation.value:
            self._best, self._best_of = found, (stage, num_draws)

    def interrupted(self) -> Maximum:
        """Put the guide where it stood best in the last stage that came to anything, and say where that is."""
        if self._best is None:
            point = to_vector([self.problem.loc])
            nothing = Evaluation(-math.inf, numpy.zeros_like(point), failure="nothing was evaluated yet")
            return Maximum(point, nothing, FitStatus.INTERRUPTED, math.inf)
        self.problem.move(self._best.point)
        return self._best

    @property
    def num_draws(self) -> int:
        """How many draws the last evaluation of an optimizer averaged over; 0 if over none."""
        return next((step.num_draws for step in self.steps[::-1] if step.stage != CHECK), 0)

    def timed(self, stage: str, compute: Callable[[], Any]) -> Any:
        """Return what is computed, and keep it and how long it took."""
        return self._call(stage, stage, compute)[0]

    def _call(self, stage: str, label: str, compute: Callable[[], Any]) -> tuple[Any, float]:
        def timed() -> tuple[Any, float]:
            begun = time.perf_counter()
            return compute(), time.perf_counter() - begun

        result, seconds = self.journal.call(label, timed)
        self.add_time(stage, seconds)
        return result, seconds

    def add_time(self, stage: str, seconds: float) -> None:
        """Count seconds of a stage."""
        self.timings[stage] = self.timings.get(stage, 0.0) + seconds


def progress_bar(show: bool) -> Any:
    """Return a bar that counts evaluations; on standard error, and only if that is a terminal."""
    return tqdm(unit=" evaluations", disable=None if show else True, leave=False)
