"""The stages of a fit: starts, the marginal Laplace density, and from its optima the objective itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from laplace_amort.coordinates import Coordinates
from laplace_amort.evaluation import Maximum
from laplace_amort.fit_status import FitStatus
from laplace_amort.objectives import FixedDrawELBO, MarginalLaplace, Objective
from laplace_amort.optimizers import Optimizer, TrustRegion
from laplace_amort.run import Run
from laplace_amort.starts import other_starts, random_starts

__all__ = ["End", "distinct", "find_ends", "fresh_value"]

# Evaluations that the search for a start may take before the ELBO begins all the same.
_START_STEPS = 100
# Optima of the start from which the ELBO is climbed.
_CLIMBED = 3
# Standard deviations, and nats, within which two optima are one.
_SAME_PLACE, _SAME_VALUE = 0.1, 0.01
# A value is averaged until it has this error, or over as many draws, or as many numbers drawn.
_ERROR, _DRAWS, _NUMBERS = 0.05, 2**12, 2**21
_FRESH_SEED = 1_000_000  # seeds from here on are not those of an optimizer's draws


@dataclass(frozen=True)
class End:
    """Where some starts ended.

    :param Maximum maximum: the best of them.
    :param int num_starts: how many.
    """

    maximum: Maximum
    num_starts: int = 1


def find_ends(run: Run, objective: Objective, optimizer: Optimizer | None, num_starts: int) -> list[End]:
    """Maximize an objective from several starts; the guide stands at the best optimum in the end.

    :param Run run: the fit; the first start is where its guide stands.
    :param objective: what to maximize.
    :param optimizer: by default the one that suits the objective.
    :param int num_starts: at least 1; those after the first are random.
    :return: the optima that are not the same, the best first.
    """
    first = run.target.loc.clone()
    starts = [first, *random_starts(run.target, num_starts - 1, run.seed)]
    ends = _in_stages(run, objective, optimizer or objective.default_optimizer, starts)
    run.target.move(ends[0].maximum.point)
    return ends


def _in_stages(run: Run, objective: Objective, optimizer: Optimizer, starts: Sequence[Tensor]) -> list[End]:
    """From the optima of what the objective starts with, or from the starts themselves if that is nothing."""
    before = objective.start_with
    if before is None:
        return distinct(End(_from_any_of_these(run, objective, optimizer, start)) for start in starts)
    climber = TrustRegion(max_steps=_START_STEPS) if isinstance(before, MarginalLaplace) else before.default_optimizer
    lower = distinct(End(_from_any_of_these(run, before, climber, start)) for start in starts)
    ends = []
    for end in lower[:_CLIMBED]:
        if end.maximum.status is FitStatus.START_FAILED:
            ends.append(end)
            continue
        run.target.place(torch.from_numpy(end.maximum.point))
        run.target.center_units(run.journal)
        ends.append(End(objective.climb(run, optimizer), end.num_starts))
    return distinct(ends)


def _from_any_of_these(run: Run, objective: Objective, optimizer: Optimizer, start: Tensor) -> Maximum:
    """Maximize from a start, or if that comes to nothing from others; the first that converges, else the best."""
    found: list[Maximum] = []
    for candidate in itertools.chain([start], other_starts(run.target, start)):
        run.target.place(candidate)
        found.append(objective.climb(run, optimizer))
        if found[-1].status in (FitStatus.CONVERGED, FitStatus.TOO_FEW_DRAWS):
            return found[-1]
    return max(found, key=lambda maximum: maximum.evaluation.value)


def distinct(ends: Iterable[End]) -> list[End]:
    """Put together what ended in the same place; the converged first, and of these the best."""
    kept: list[End] = []
    for end in sorted(ends, key=lambda end: (not end.maximum.status.ok, -end.maximum.evaluation.value)):
        same = next((i for i, other in enumerate(kept) if _is_same(end.maximum, other.maximum)), None)
        if same is None:
            kept.append(end)
        else:
            kept[same] = End(kept[same].maximum, kept[same].num_starts + end.num_starts)
    return kept


def _is_same(one: Maximum, other: Maximum) -> bool:
    a, b = one.evaluation, other.evaluation
    if not (math.isfinite(a.value) and math.isfinite(b.value)):
        return a.value == b.value
    # Values that are averages over draws differ by more than places do.
    allowed = _SAME_VALUE + 1e-8 * abs(a.value) + 3 * math.hypot(a.standard_error, b.standard_error)
    difference = one.point - other.point
    if b.information is not None:
        about = Coordinates.of_information(b.information)  # of the globals, which come first
        near = about.distance(difference[: about.size]) <= _SAME_PLACE
    else:
        largest = float(numpy.abs(one.point).max(initial=0.0))
        near = float(numpy.abs(difference).max(initial=0.0)) <= _SAME_PLACE * (1 + largest)
    return near and abs(a.value - b.value) <= allowed


def fresh_value(run: Run, objective: FixedDrawELBO) -> tuple[float, float]:
    """Return the ELBO where the guide stands and its standard error, on draws that no optimizer has seen.

    :param Run run: the fit.
    :param FixedDrawELBO objective: the ELBO.
    """

    def average() -> tuple[float, float]:
        batches: list[Tensor] = []
        numbers = run.target.loc.numel() + run.target.start.numel()
        while True:
            # As many again as there were, so that what all draws share costs little.
            num_draws = max(run.num_draws, sum(len(batch) for batch in batches) * 2, 2)
            bound = objective.bind(run.target, num_draws, _FRESH_SEED + run.seed + len(batches))
            values = bound.values().double()
            batches.append(values.unflatten(0, (2, -1)).mean(0))
            pairs = torch.cat(batches)
            value, error = float(pairs.mean()), math.inf
            if len(pairs) > 1:
                error = float(pairs.std()) / len(pairs) ** 0.5
            enough = 2 * len(pairs) >= _DRAWS or 2 * len(pairs) * numbers >= _NUMBERS
            if error <= _ERROR or enough or not math.isfinite(value):
                return value, error

    result: tuple[float, float] = run.timed("value", average)
    return result
