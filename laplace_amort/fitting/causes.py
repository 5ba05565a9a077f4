"""Why a fit has not converged: causes that are looked for, each by evidence of its own, and the lines to type.

A status is the headline of a cause. The causes that leave traces of their own come first; a search that just takes
longer, and a start that just is a bad one, are what is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy

from laplace_amort.fitting.evaluation import FitStatus, Maximum
from laplace_amort.fitting.history import History
from laplace_amort.fitting.identification import describe_flattest
from laplace_amort.fitting.search import positive
from laplace_amort.guide import LaplaceGaussian, find_coarseness, find_flat_latent

__all__ = ["causes"]

# Evaluations at the end of a search, over which it is seen whether it was still getting anywhere.
_LAST = 10
# Logarithm of a positive global, up or down, from which on it is no number of anything.
_FAR = 25.0
# What needs no cause, or has one among the notes of the search.
_SAID = FitStatus.CONVERGED, FitStatus.INTERRUPTED, FitStatus.TOO_FEW_DRAWS, FitStatus.COLLAPSED


def causes(history: History, maximum: Maximum, gaussian: LaplaceGaussian | None) -> list[str]:
    """Say why a fit has not converged, with what to type instead; where it has, whether units have kinks.

    :param History history: the fit.
    :param Maximum maximum: where it ended.
    :param LaplaceGaussian gaussian: the posterior there; None if there is none.
    :return: sentences; none where the status, or a note of the search, says all there is.
    """
    if maximum.status in _SAID:
        return [] if gaussian is None else history.problem.kinks(gaussian)
    for look in _CAUSES:
        if found := list(look(history, maximum)):
            return found
    return []


def _flat_latent(history: History, maximum: Maximum) -> Iterator[str]:
    """A latent of a unit that has no density."""
    if maximum.status is not FitStatus.MAX_STEPS:
        found = find_flat_latent(history.problem)
        yield from [str(found)] if found else []


def _kink(history: History, maximum: Maximum) -> Iterator[str]:
    """A kink of the density."""
    yield from [str(history.problem.kink)] if history.problem.kink else []


def _without_end(history: History, maximum: Maximum) -> Iterator[str]:
    """A positive global that ran to zero, or to where there is no number, the objective rising all the way."""
    point = maximum.point[: len(history.problem.loc)]
    logarithms = point * positive(history.problem).numpy()
    if not len(point) or numpy.abs(logarithms).max() < _FAR:
        return
    index = int(numpy.abs(logarithms).argmax())
    name = history.problem.global_elements()[index]
    scaled = history.problem.unit_model.density.scaled
    value, weight = math.exp(min(float(logarithms[index]), 700.0)), ""
    if scaled:
        weight = f"Is the weight of '{scaled[0]}' right (poutine.scale)? "
    yield (
        f"{name} ran to {value:.0e}, and the objective was rising all the way: it has no maximum. {weight}Give {name} "
        f"a prior that vanishes at both ends:\n    pyro.sample('{name.split('[')[0]}', dist.LogNormal(0., 1.))"
    )


def _rounding(history: History, maximum: Maximum) -> Iterator[str]:
    """Rounding errors that are larger than what a search can improve."""
    found = find_coarseness(history.problem)
    yield from [str(found)] if found else []


def _not_identified(history: History, maximum: Maximum) -> Iterator[str]:
    """A direction of which neither data nor priors say anything."""
    information = maximum.evaluation.information
    if maximum.status is FitStatus.NO_MAXIMUM and information is not None:
        signs = positive(history.problem).tolist()
        yield describe_flattest(history.problem.global_elements(), signs, information)


def _few_steps(history: History, maximum: Maximum) -> Iterator[str]:
    """A search that was getting somewhere."""
    values = [step.objective for step in history.steps if step.stage == history.steps[-1].stage]
    if maximum.status is not FitStatus.MAX_STEPS or not values:
        return
    if history.walk is not None:  # noisy values say nothing
        yield (
            "the steps allowed were spent. Go on from here with more of them:\n"
            "    fit(model, *args, objective=Stochastic(max_steps=100_000), resume=result)"
        )
        return
    last = min(_LAST, len(values) - 1)
    gain = max(values) - max(values[: len(values) - last])
    name = "TrustRegion" if history.steps[-1].stage == "marginal Laplace" else "QuasiNewton"
    yield (
        f"after {len(values)} evaluations the objective was still rising, by {gain:.2g} in the last {last} of them. "
        f"Allow more:\n    fit(model, *args, optimizer={name}(max_steps=2000))"
    )


def _start(history: History, maximum: Maximum) -> Iterator[str]:
    """Nothing that leaves a trace: what the last point without an objective said, and other starts."""
    failures = [maximum.evaluation.failure, *(step.problem for step in history.steps[::-1])]
    failure = next((failure for failure in failures if failure), "")
    if failure:
        yield f"the last point without an objective: {_in_short(failure)}"
    yield (
        "nothing else was found to be wrong. Start elsewhere, at random or where you know it to be near the data:\n"
        "    fit(model, *args, starts=20)\n"
        "    start = init_to_value(values={'name of a site': torch.tensor(1.)})\n"
        "    fit(model, *args, guide=AutoLaplaceFamily(model, init_loc_fn=start))"
    )


_CAUSES: list[Callable[[History, Maximum], Iterator[str]]] = [
    _flat_latent,
    _kink,
    _without_end,
    _rounding,
    _not_identified,
    _few_steps,
    _start,
]


def _in_short(failure: str) -> str:
    """Return the sentence and the first unit, without lines to type for those who compute matrices themselves."""
    return "\n".join(failure.splitlines()[:2]).partition(" To repair")[0]
