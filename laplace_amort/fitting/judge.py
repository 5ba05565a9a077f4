"""The evidence that a verdict rests on, gathered for a fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy
import torch

from laplace_amort.errors import NUMERICAL_ERRORS, ModelError, StructureError
from laplace_amort.evidence import (
    HeavyTail,
    PosteriorComparison,
    against_next,
    compare,
    heavy_tails,
    next_rule,
    other_modes,
)
from laplace_amort.fitting.evaluation import FitStatus
from laplace_amort.fitting.found import Found
from laplace_amort.fitting.objectives.ladder import Ladder
from laplace_amort.fitting.other_optima import other_optimum
from laplace_amort.fitting.verdict import NEXT_LINE, Errors, Judgement, Reason, Verdict
from laplace_amort.guide import LaplaceGaussian
from laplace_amort.posterior import K_GOOD, Posterior
from laplace_amort.types import element_names, in_sd, to_numpy

__all__ = ["judge"]

# How far off means may be, in posterior standard deviations, and standard deviations, in per cent; and those of units.
_MEAN, _SD, _UNIT_MEAN, _UNIT_SD = 0.1, 10.0, 0.2, 20.0
# Errors of quasi-random draws, as a share of what eight parts of them tell: together they are better balanced.
_TOGETHER = 0.5
# Draws of the globals that must count. Where more than a share of them does, the heaviest weights are none too heavy,
# whatever the shape of their tail; and where few do, the shape is judged more strictly.
_EFFECTIVE, _MANY, _FEW, _K_IF_FEW = 64, 0.5, 0.1, 0.5
# Share of the mass of a unit, or of the globals, at another mode that may be left out.
_ELSEWHERE = 0.03
# Added to a seed, for the draws that a Gaussian is compared by.
_OTHER_SEED = 1_000_003
_LONGER = "fit(model, *args)"
_BY_CHAINS = (
    "MCMC(NUTS(model, init_strategy=init_to_value(values=result.posterior.mean())), 1000, warmup_steps=1000).run(*args)"
)


def judge(result: Found) -> Judgement:
    """Say how far to trust the posterior of a fit, from what is at hand and one step up the ladder.

    :param Found result: the fit.
    """
    if result.gaussian is None or not result.status.ok:
        verdict = Verdict.NO_POSTERIOR if result.gaussian is None else Verdict.NOT_CONVERGED
        return Judgement(None, tuple(_causes(result, verdict)))
    try:
        errors, reasons = _evidence(result)
    except (*NUMERICAL_ERRORS, ModelError, StructureError, ValueError) as error:
        problem = f"the posterior could not be looked at: {type(error).__name__}: {error}"
        errors, reasons = None, [Reason(Verdict.NOT_COMPARED, problem)]
    return Judgement(errors, tuple(sorted(reasons, key=lambda reason: -reason.verdict)))


def _evidence(result: Found) -> tuple[Errors | None, list[Reason]]:
    """Gather all that speaks against a fit that has converged."""
    gaussian, reasons = result.exact_gaussian(), [*_repairs(result), *_kinks(result), *_scales(result)]
    if result.problem.subsamples:
        sentence = "it was fitted in minibatches, and a comparison needs all units at once"
        return None, [*reasons, Reason(Verdict.NOT_COMPARED, sentence)]
    if not result.check:
        return None, [*reasons, Reason(Verdict.NOT_COMPARED, "check=False left the comparison out", _LONGER)]
    own, reference = against_next(result.posterior, result.rule, result.seed + _OTHER_SEED)
    tails = heavy_tails(result.posterior)
    sampled = result.posterior if own is not result.posterior else reference
    by_sampling = _sampling_errors(sampled, {tail.name for tail in tails})
    errors = _errors(compare(own, reference), by_sampling)
    reasons += _weights(sampled)
    reasons += _inexact(result, errors, by_sampling)
    reasons += map(_without_moments, tails)
    reasons += _modes_of_units(result, gaussian)
    reasons += _modes_of_globals(result)
    return errors, reasons


def _causes(result: Found, verdict: Verdict) -> list[Reason]:
    """Return why a fit has not converged: the notes that have a line to type, and if there is none its status."""
    causes = [Reason.of_note(verdict, note) for note in result.notes if NEXT_LINE in note]
    advice = "" if result.status is FitStatus.INTERRUPTED else _more_starts(result)
    return causes or [Reason(verdict, str(result.status), advice)]


def _more_starts(result: Found) -> str:
    return "" if result.problem.subsamples else "fit(model, *args, starts=20)"


def _repairs(result: Found) -> Iterator[Reason]:
    """Tell of repairs that the posterior rests on: draws with weights do not rest on the precision of the globals."""
    reports = {"units": result.tail_report}
    if numpy.isnan(result.posterior.log_evidence):
        reports["globals"] = result.head_report
    for what, report in reports.items():
        if report is not None and report.num_repaired:
            sentence = f"the precision of the {what} is not that of a maximum: {report}"
            advice = _LONGER if what == "globals" and not isinstance(result.asked, Ladder) else _more_starts(result)
            yield Reason(Verdict.NOT_A_MAXIMUM, sentence, advice)


def _kinks(result: Found) -> Iterator[Reason]:
    for sentence in result.problem.kinks(result.exact_gaussian()):
        yield Reason(Verdict.KINKED, sentence, _BY_CHAINS)


def _scales(result: Found) -> Iterator[Reason]:
    scaled = result.problem.unit_model.density.scaled
    if scaled:
        sentence = (
            f"'{scaled[0]}' counts with a weight (poutine.scale; {len(scaled)} sites in all). If it stands for data "
            "that are left out, let a plate know of them; if not, leave it out:"
        )
        yield Reason(Verdict.WEIGHTED, sentence, "pyro.plate('units', N, subsample_size=B)")


class _Sampling(NamedTuple):
    """Errors of moments by sampling, the largest of the globals: of means, of standard deviations, and of which."""

    mean: float
    sd: float
    where: str


def _errors(found: PosteriorComparison, by_sampling: _Sampling) -> Errors:
    """Add up how far off moments are: by the next rung, and by sampling."""
    is_rung = found.globals_.mean + found.globals_.sd >= by_sampling.mean + by_sampling.sd
    return Errors(
        mean=found.globals_.mean + by_sampling.mean,
        sd=100 * (found.globals_.sd + by_sampling.sd),
        global_=found.globals_.where if is_rung else by_sampling.where,
        unit_mean=found.units.mean,
        unit_sd=100 * found.units.sd,
        unit=found.units.where,
    )


def _sampling_errors(posterior: Posterior, without: set[str]) -> _Sampling:
    """Return those of constrained globals but for some."""
    globals_, _ = posterior.weighted_globals()
    values = posterior.gaussian.constrained_globals(globals_)
    names = [name for site, value in values.items() for name in element_names(site, value.shape[1:])]
    if not names:
        return _Sampling(0.0, 0.0, "")
    flat = to_numpy(torch.cat([value.reshape(len(value), -1) for value in values.values()], 1))
    moving = numpy.ptp(flat, axis=0) > 1e-9 * (1 + numpy.abs(flat).max(0))  # not those of a matrix that are constant
    counts = moving & ~numpy.isin(names, sorted(without))
    mean, sd = (numpy.where(counts, _TOGETHER * part, 0.0) for part in posterior.globals_.errors_of(flat))
    return _Sampling(float(mean.max()), float(sd.max()), names[int((mean + sd).argmax())])


def _weights(posterior: Posterior) -> Iterator[Reason]:
    found = posterior.globals_
    share = found.effective / len(found.draws)
    heavy = (found.k_hat > K_GOOD and share < _MANY) or (found.k_hat > _K_IF_FEW and share < _FEW)
    if heavy or not found.effective >= min(_EFFECTIVE, len(found.draws)):
        sentence = (
            f"k-hat of the importance weights of the globals is {found.k_hat:.2f}, and {len(found.draws)} draws are as "
            f"good as {found.effective:.0f} equal ones: a ridge, a funnel, or tails without end? Write the model in "
            "other coordinates (pyro.infer.reparam), give it more of a prior, or sample it by chains:"
        )
        yield Reason(Verdict.POORLY_COVERED, sentence, _BY_CHAINS)


def _inexact(result: Found, errors: Errors, by_sampling: _Sampling) -> Iterator[Reason]:
    if max(by_sampling.mean / _MEAN, 100 * by_sampling.sd / _SD) > 1:
        sentence = (
            f"the draws of the globals give means to {in_sd(by_sampling.mean)} and standard deviations to "
            f"{100 * by_sampling.sd:.2g} %, worst of all of {by_sampling.where}. Sample it by chains:"
        )
        yield Reason(Verdict.POORLY_COVERED, sentence, _BY_CHAINS)
        return
    off = errors.mean / _MEAN, errors.sd / _SD, errors.unit_mean / _UNIT_MEAN, errors.unit_sd / _UNIT_SD
    if not max(off) <= 1 or not numpy.isfinite(off).all():
        finer = next_rule(result.rule, result.problem.start.shape[1])
        advice = f"fit(model, *args, objective=MarginalQuadrature({finer!r}))"
        advice = advice if isinstance(result.asked, Ladder) else _LONGER
        yield Reason(Verdict.INEXACT, f"better integrals over the units ({finer}) give another posterior:", advice)


def _without_moments(tail: HeavyTail) -> Reason:
    what = "standard deviation" if tail.has_mean else "mean"
    sentence = (
        f"{tail.name} has no {what}: its density falls as {tail.name} to the power of -{tail.power:.2g}. Report "
        "quantiles, or give it a prior that falls faster:"
    )
    return Reason(Verdict.NO_MOMENTS, sentence, "result.posterior.quantiles([0.05, 0.5, 0.95])")


def _modes_of_units(result: Found, gaussian: LaplaceGaussian) -> Iterator[Reason]:
    problem = result.problem
    there = problem.integrals.conditionals(gaussian.global_loc[None], gaussian.local_loc[None])
    found = other_modes(problem.integrals, there, gaussian.global_loc)
    if not len(found.share) or float(found.share.max()) <= _ELSEWHERE:
        return
    unit, several = int(found.share.argmax()), int((found.share > _ELSEWHERE).sum())
    sentence = (
        f"{problem.unit_model.describe(unit)} has another mode {float(found.distance[unit]):.2g} standard deviations "
        f"away, with {100 * float(found.share[unit]):.2g} % of its mass ({several} of {len(found.share)} units have "
        "one), and no rung looks around both. Write the model so that there is one, or sample it by chains:"
    )
    yield Reason(Verdict.SEVERAL_MODES, sentence, _BY_CHAINS)


def _modes_of_globals(result: Found) -> Iterator[Reason]:
    best, *others = (optimum.objective for optimum in result.optima if optimum.status.ok)
    share = 1 / (1 + math.exp(min(best - max(others, default=-math.inf), 700.0)))
    if share > _ELSEWHERE:
        sentence = (
            f"{1 + len(others)} optima were found, and the second has about {100 * share:.2g} % of the mass. Are there "
            "signs or labels that can be exchanged? Write the model so that there is one, or sample it by chains:"
        )
        yield Reason(Verdict.SEVERAL_MODES, sentence, _BY_CHAINS)
        return
    share = other_optimum(result)
    if share > _ELSEWHERE:
        sentence = (
            f"the globals have another mode, with about {100 * share:.2g} % of the mass, that the draws do not reach. "
            "Are there signs or labels that can be exchanged? Look at all that there are:"
        )
        yield Reason(Verdict.SEVERAL_MODES, sentence, "fit(model, *args, starts=20)")
