"""The stages of a fit: starts, the marginal Laplace density, and from its optima the objective itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy
import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor
from torch.distributions.transforms import ComposeTransform, ExpTransform, IndependentTransform, Transform

from laplace_amort.fitting.evaluation import FitStatus, Maximum
from laplace_amort.fitting.history import History
from laplace_amort.fitting.objectives.base import Objective
from laplace_amort.fitting.objectives.elbo import FixedDrawELBO
from laplace_amort.fitting.objectives.laplace import MarginalLaplace
from laplace_amort.fitting.optimizers import Optimizer, TrustRegion
from laplace_amort.guide import Problem
from laplace_amort.linalg import Whitening

__all__ = ["End", "distinct", "find_ends", "fresh_value", "other_starts", "positive", "random_starts"]

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


def find_ends(run: History, objective: Objective, optimizer: Optimizer | None, num_starts: int) -> list[End]:
    """Maximize an objective from several starts; the guide stands at the best optimum in the end.

    :param History run: the fit; the first start is where its guide stands.
    :param objective: what to maximize.
    :param optimizer: by default the one that suits the objective.
    :param int num_starts: at least 1; those after the first are random.
    :return: the optima that are not the same, the best first.
    """
    first = run.problem.loc.clone()
    starts = [first, *random_starts(run.problem, num_starts - 1, run.seed)]
    ends = _in_stages(run, objective, optimizer or objective.default_optimizer, starts)
    run.problem.move(ends[0].maximum.point)
    return ends


def _in_stages(run: History, objective: Objective, optimizer: Optimizer, starts: Sequence[Tensor]) -> list[End]:
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
        run.problem.place(torch.from_numpy(end.maximum.point))
        run.problem.center_units(run.journal.call)
        ends.append(End(objective.climb(run, optimizer), end.num_starts))
    return distinct(ends)


def _from_any_of_these(run: History, objective: Objective, optimizer: Optimizer, start: Tensor) -> Maximum:
    """Maximize from a start, or if that comes to nothing from others; the first that converges, else the best."""
    found: list[Maximum] = []
    for candidate in itertools.chain([start], other_starts(run.problem, start)):
        run.problem.place(candidate)
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
        about = Whitening.of_information(b.information)  # of the globals, which come first
        near = about.distance(difference[: about.size]) <= _SAME_PLACE
    else:
        largest = float(numpy.abs(one.point).max(initial=0.0))
        near = float(numpy.abs(difference).max(initial=0.0)) <= _SAME_PLACE * (1 + largest)
    return near and abs(a.value - b.value) <= allowed


def fresh_value(run: History, objective: FixedDrawELBO) -> tuple[float, float]:
    """Return the ELBO where the guide stands and its standard error, on draws that no optimizer has seen.

    :param History run: the fit.
    :param FixedDrawELBO objective: the ELBO.
    """

    def average() -> tuple[float, float]:
        batches: list[Tensor] = []
        numbers = run.problem.loc.numel() + run.problem.start.numel()
        while True:
            # As many again as there were, so that what all draws share costs little.
            num_draws = max(run.num_draws, sum(len(batch) for batch in batches) * 2, 2)
            function = objective.bind(run.problem, num_draws, _FRESH_SEED + run.seed + len(batches))
            values = function.values().double()
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


# By how much logarithms of positive globals are lowered. With small scales of a hierarchy, units have one mode each.
_LOWERED = 2.0


def other_starts(problem: Problem, start: Tensor) -> Iterator[Tensor]:
    """Yield starts for when a fit from one comes to nothing, nearest first.

    First the same with small scales: where the scale of a hierarchy is large, the conditional of a unit may have
    several modes, and the path of the fit leads past points where one ends. Then the images of zero.

    :param Problem problem: has the sites of the model.
    :param Tensor start: ``(d,)``.
    """
    marks = positive(problem)
    if marks.any():
        for times in (1, 2):
            yield start - times * _LOWERED * marks
    yield -_LOWERED * marks.to(start)


def random_starts(problem: Problem, num_starts: int, seed: int) -> Iterator[Tensor]:
    """Yield starts ``(d,)`` by Pyro's ``init_to_uniform``: between -2 and 2 in unconstrained space, as Stan's.

    (A simplex has other whitening here than there, so that its starts are not uniform.)

    :param Problem problem: has the sites of the model.
    :param int num_starts: how many.
    :param int seed: of their own; the state of torch's generator stays as it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        starts = [problem.unit_model.start(init_to_uniform)[0] for _ in range(num_starts)]
    yield from starts


def positive(problem: Problem) -> Tensor:
    """Return which elements of the globals are logarithms, ``(d,)``, 1 or 0."""
    sites = problem.unit_model.layout.global_sites.values()
    marks = [problem.loc.new_full((site.shape.numel(),), float(_is_exp(site.transform))) for site in sites]
    return torch.cat(marks) if marks else problem.loc.new_zeros(0)


def _is_exp(transform: Transform | None) -> bool:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    if isinstance(transform, ComposeTransform):
        return any(_is_exp(part) for part in transform.parts)
    return isinstance(transform, ExpTransform)
