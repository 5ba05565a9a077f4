"""The stages of a fit: starts, the optima of what an objective starts with, and from these the objective itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy
import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor

from laplace_amort.fitting.evaluation import Evaluation, FitStatus, Maximum
from laplace_amort.fitting.history import History
from laplace_amort.fitting.objectives.base import KinkFound, Objective
from laplace_amort.fitting.objectives.draws import mean_of_pairs
from laplace_amort.fitting.objectives.elbo import FixedDrawELBO
from laplace_amort.fitting.objectives.laplace import MarginalLaplace
from laplace_amort.fitting.optimizers import Optimizer, TrustRegion
from laplace_amort.guide import Problem, find_collapse, is_exponential, to_vector
from laplace_amort.linalg import Whitening

__all__ = ["START_STEPS", "distinct", "find_maxima", "fresh_value", "other_starts", "positive", "random_starts"]

START_STEPS = 100
"""Evaluations that the search for a start may take before an ELBO begins all the same."""

# Optima of the start from which the ELBO is climbed.
_CLIMBED = 3
# How far beside a start, in unconstrained space, a saddle is left.
_JITTER = 0.1
# By how much logarithms of positive globals are lowered. With small scales of a hierarchy, units have one mode each.
_LOWERED = 2.0
# Standard deviations, and nats, within which two optima are one.
_SAME_PLACE, _SAME_VALUE = 0.1, 0.01
# A value is averaged until it has this error, or over as many draws, or as many numbers drawn.
_ERROR, _DRAWS, _NUMBERS = 0.05, 2**12, 2**21
# How a climb may end for which no other start is tried.
_FINAL = (FitStatus.CONVERGED, FitStatus.TOO_FEW_DRAWS, FitStatus.COLLAPSED, FitStatus.KINKED)
_FRESH_SEED = 1_000_000  # seeds from here on are not those of an optimizer's draws


def find_maxima(
    history: History, objective: Objective, optimizer: Optimizer | None = None, num_starts: int = 1
) -> list[Maximum]:
    """Maximize an objective from several starts; the guide stands at the best optimum in the end.

    :param History history: the fit; the first start is where its guide stands.
    :param objective: what to maximize.
    :param optimizer: by default the one that suits the objective.
    :param int num_starts: at least 1; those after the first are random.
    :return: the optima that are not the same, the best first.
    """
    first = history.problem.loc.clone()
    starts = [first, *random_starts(history.problem, num_starts - 1, history.seed)]
    maxima = _in_stages(history, objective, optimizer or objective.default_optimizer, starts)
    history.problem.move(maxima[0].point)
    return maxima


def _in_stages(history: History, objective: Objective, optimizer: Optimizer, starts: Sequence[Tensor]) -> list[Maximum]:
    """Climb from the optima of what the objective starts with, or from the starts themselves if that is nothing."""
    before = objective.start_with
    if before is None:
        return distinct(_from_any_of_these(history, objective, optimizer, start) for start in starts)
    climber = TrustRegion(max_steps=START_STEPS) if isinstance(before, MarginalLaplace) else before.default_optimizer
    lower = distinct(_from_any_of_these(history, before, climber, start) for start in starts)
    return distinct(_climbed_from(one, starts[0], history, objective, optimizer) for one in lower[:_CLIMBED])


def _from_any_of_these(history: History, objective: Objective, optimizer: Optimizer, start: Tensor) -> Maximum:
    """Maximize from a start, or if that comes to nothing from others; the first that converges, else the best."""
    found: list[Maximum] = []
    for candidate in _one_after_another(history.problem, start, found):
        history.problem.place(candidate)
        found.append(_climbed(history, objective, optimizer))
        if found[-1].status in _FINAL:
            return found[-1]
    return max(found, key=lambda maximum: maximum.evaluation.value)


def _one_after_another(problem: Problem, start: Tensor, found: list[Maximum]) -> Iterator[Tensor]:
    """Yield a start, a point beside it if it was led to a saddle, as where the density is symmetric, and others."""
    yield start
    if found[0].status is FitStatus.NO_MAXIMUM:
        jitter = torch.randn(start.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        yield start + _JITTER * jitter.to(start)  # always the same
    yield from other_starts(problem, start)


def _climbed_from(
    lower: Maximum, start: Tensor, history: History, objective: Objective, optimizer: Optimizer
) -> Maximum:
    """Maximize from the optimum of another objective, if there is one: from the start where that is a collapse."""
    if lower.status in (FitStatus.START_FAILED, FitStatus.KINKED):
        return lower
    history.problem.place(start if lower.status is FitStatus.COLLAPSED else torch.from_numpy(lower.point))
    history.problem.center_units(history.journal.call)
    maximum = _climbed(history, objective, optimizer)
    explained = maximum.status.ok or maximum.status is FitStatus.COLLAPSED
    notes = maximum.notes if explained else (*lower.notes, *maximum.notes)
    return maximum._replace(num_starts=lower.num_starts, notes=notes)


def _climbed(history: History, objective: Objective, optimizer: Optimizer) -> Maximum:
    """Maximize from where the guide stands; the status says so where there is a kink, or where a scale collapsed."""
    try:
        maximum = objective.climb(history, optimizer)
    except KinkFound as error:
        point = to_vector([history.problem.loc])
        nothing = Evaluation(-math.inf, numpy.full_like(point, numpy.nan), failure=str(error))
        return Maximum(point, nothing, FitStatus.KINKED, math.inf)
    if not math.isfinite(maximum.evaluation.value):
        return maximum
    information = maximum.evaluation.information
    # No part of the journal: a fit that goes on with other settings may have more rungs in this place.
    said = str(find_collapse(history.problem, maximum.point, information) or "")
    return maximum._replace(status=FitStatus.COLLAPSED, notes=(said,)) if said else maximum


# --------------------------------------------------------------------------------------------------------------- starts


def random_starts(
    problem: Problem, num_starts: int, seed: int, init_loc_fn: Callable[..., Tensor] = init_to_uniform
) -> Iterator[Tensor]:
    """Yield starts ``(d,)`` by Pyro's ``init_to_uniform``: between -2 and 2 in unconstrained space, as Stan's.

    (A simplex has other coordinates here than there, so that its starts are not uniform.)

    :param Problem problem: has the sites of the model.
    :param int num_starts: how many.
    :param int seed: of their own; the state of torch's generator stays as it is.
    :param init_loc_fn: another one of Pyro's ``init_to_*``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        starts = [problem.unit_model.start(init_loc_fn)[0] for _ in range(num_starts)]
    yield from starts


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


def positive(problem: Problem) -> Tensor:
    """Return which elements of the globals are logarithms, ``(d,)``, 1 or 0."""
    sites = problem.unit_model.layout.global_sites.values()
    marks = [problem.loc.new_full((site.shape.numel(),), float(is_exponential(site.transform))) for site in sites]
    return torch.cat(marks) if marks else problem.loc.new_zeros(0)


# --------------------------------------------------------------------------------------------------------------- optima


def distinct(maxima: Iterable[Maximum]) -> list[Maximum]:
    """Put together what ended in the same place; the converged first, and of these the best."""
    kept: list[Maximum] = []
    for one in sorted(maxima, key=lambda one: (not one.status.ok, -one.evaluation.value)):
        same = next((i for i, other in enumerate(kept) if _is_same(one, other)), None)
        if same is None:
            kept.append(one)
        else:
            kept[same] = kept[same]._replace(num_starts=kept[same].num_starts + one.num_starts)
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


def fresh_value(history: History, objective: FixedDrawELBO) -> tuple[float, float]:
    """Return the ELBO where the guide stands and its standard error, on draws that no optimizer has seen.

    :param History history: the fit.
    :param FixedDrawELBO objective: the ELBO.
    """
    value: tuple[float, float] = history.timed("value", lambda: _average(history, objective))
    return value


def _average(history: History, objective: FixedDrawELBO) -> tuple[float, float]:
    batches: list[Tensor] = []
    numbers = history.problem.loc.numel() + history.problem.start.numel()
    while True:
        so_far = sum(len(batch) for batch in batches)
        # As many again as there were, so that what all draws share costs little.
        num_draws = max(history.num_draws, so_far, 2)
        function = objective.bind(history.problem, num_draws, _FRESH_SEED + history.seed + len(batches))
        batches.append(function.values())
        value, error = mean_of_pairs(*batches)
        enough = so_far + num_draws >= min(_DRAWS, _NUMBERS / numbers)
        if error <= _ERROR or enough or not math.isfinite(value):
            return value, error
