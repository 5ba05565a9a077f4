"""The checks of a diagnosis, each a function of a fit: what was looked at, how bad it is, and what that means."""

from __future__ import annotations

from collections.abc import Iterator

import numpy
import torch

from laplace_amort.diagnostics.consistency import Consistency, check_consistency
from laplace_amort.diagnostics.findings import Finding, Level, UnitTails
from laplace_amort.diagnostics.thresholds import (
    CONVERGED,
    GLOBALS,
    OTHER_MODE,
    REPAIRED,
    SCORES,
    SKEWNESS,
    UNIT_TAILS,
    UNITS,
    WEIGHTED_TAILS,
    WEIGHTS,
    Accuracy,
)
from laplace_amort.errors import ModelError
from laplace_amort.evidence import Comparison, against_next, compare, next_rule, other_modes, unit_k_hat
from laplace_amort.fitting import FitResult, MarginalLaplace, MarginalQuadrature
from laplace_amort.guide import LaplaceGaussian
from laplace_amort.posterior import K_GOOD, ImportanceSample, NestedUnits, WeightedUnits, pareto_smoothed
from laplace_amort.types import in_sd, to_numpy
from laplace_amort.units import Conditionals, QuadraturePoints, unit_moments

__all__ = [
    "against_next_rung",
    "at_center",
    "convergence",
    "gaussian_of",
    "other_starts",
    "repairs",
    "simulated_scores",
    "skewness",
    "tails",
    "tails_of_units",
]


# Draws of a Gaussian by which its own weights are seen.
_OWN = 512


def convergence(result: FitResult) -> Finding:
    """Judge how far the optimum still is."""
    decrement = result.gradient_norm
    level = CONVERGED.level(decrement) if result.status.ok else Level.BAD
    return Finding("convergence", level, f"{in_sd(decrement)} from the optimum", str(result.status))


def repairs(result: FitResult) -> Iterator[Finding]:
    """Judge what was repaired in the precisions of globals and units."""
    for what, report in (("globals", result.head_report), ("units", result.tail_report)):
        if report is None:
            continue
        share = report.num_repaired / max(report.num_matrices, 1)
        size = min(share, report.relative_change) if what == "units" else report.relative_change
        level, sentence = Level.GOOD, "no precision was repaired"
        if report.num_repaired:
            level, sentence = REPAIRED.level(size), f"the precision is not that of a maximum: {report}"
        yield Finding(f"repair, {what}", level, f"{report.num_repaired} of {report.num_matrices}", sentence)


def against_next_rung(result: FitResult, seed: int) -> Iterator[Finding]:
    """Judge importance weights, and compare all means and standard deviations with those of the next rung.

    :param FitResult result: the fit, with all units in it.
    :param int seed: of the draws of the next rung.
    """
    compared, reference = against_next(result.posterior, result.rule, result.seed + seed)
    found, own = compare(compared, reference), result.posterior.globals_
    if numpy.isnan(own.log_integral):  # nothing but a Gaussian
        yield _cover(result)
        yield _weights("k-hat, correction", reference.globals_)
    else:
        yield _weights("k-hat, globals", own)
    # What sampling itself leaves open is no error of the rung.
    margin = min(reference.globals_.error, WEIGHTS.error.good)
    than = f"against {next_rule(result.rule, result.problem.start.shape[1])}"
    yield _compared("error, globals", found.globals_, GLOBALS.beyond(margin), than)
    yield _compared("error, units", found.units, UNITS, than)


def _weights(name: str, found: ImportanceSample) -> Finding:
    """Judge the weights of draws of the globals from t distributions."""
    level = WEIGHTS.level(found)
    lost = f"; {found.num_lost} draws without a mode" if found.num_lost else ""
    lost += f"; {found.note}" if found.note else ""
    if level is Level.GOOD:
        sentence = f"importance weights are reliable{lost}"
    else:
        sentence = (
            f"the tail of the importance weights is too heavy, or few draws count{lost}. The globals are far from any "
            "t distribution: a ridge, a funnel, or tails without end? Write the model in other coordinates "
            "(pyro.infer.reparam), give it more of a prior, or sample it by NUTS"
        )
    return Finding(name, level, f"{found.k_hat:.2f}, error {_number(found.error)}", sentence)


def _cover(result: FitResult) -> Finding:
    """Judge the weights of draws of the globals from the Gaussian that a guide is."""
    gaussian, integrals = gaussian_of(result), result.problem.integrals
    if not len(gaussian.global_loc):
        return Finding("k-hat, globals", Level.GOOD, "none", "there are no globals")
    globals_ = torch.from_numpy(result.posterior.globals_.draws[:_OWN]).to(gaussian.global_loc)
    points = next_rule(result.rule, result.problem.start.shape[1]).points(gaussian.local_loc.shape[1], globals_)
    start = NestedUnits(gaussian, integrals).start(globals_)
    values = integrals.values(points, QuadraturePoints.log_integral, globals_, start).values
    scale = gaussian.precision.global_scale_tril
    z = torch.linalg.solve_triangular(scale, (globals_ - gaussian.global_loc).mT, upper=False)
    log_ratios = (values + (z**2).sum(0) / 2).nan_to_num(nan=-torch.inf)
    k_hat = float(pareto_smoothed(to_numpy(log_ratios)).k_hat)
    level = WEIGHTS.k_hat.level(k_hat)
    sentence = "the Gaussian covers" if level is Level.GOOD else "the Gaussian does not cover"
    return Finding("k-hat, globals", level, f"{k_hat:.2f}", f"{sentence} the marginal density of the globals")


def _compared(name: str, found: Comparison, bounds: Accuracy, than: str) -> Finding:
    """Judge how far moments are from those of the next rung."""
    if not found.where:
        return Finding(name, Level.GOOD, "none", "there are none")
    value = f"mean {in_sd(found.mean)}, sd {_percent(found.sd)}"
    return Finding(name, bounds.level(found), value, f"{than}, worst of all at {found.where}")


def gaussian_of(result: FitResult) -> LaplaceGaussian:
    """Return the Gaussian of a fit, as it was computed.

    :param FitResult result: the fit.
    :raises ValueError: if it ended where there is no posterior.
    """
    return result.exact_gaussian()


def at_center(result: FitResult) -> Conditionals:
    """Return the conditionals of the units at the center of a posterior.

    :param FitResult result: the fit, with all units in it.
    """
    gaussian = gaussian_of(result)
    return result.problem.integrals.conditionals(gaussian.global_loc[None], gaussian.local_loc[None])


def skewness(result: FitResult, there: Conditionals) -> Finding:
    """Judge how far the conditionals of units are from symmetry.

    :param FitResult result: the fit.
    :param Conditionals there: at its center.
    """
    problem = result.problem
    moments = unit_moments(
        problem.integrals, there, gaussian_of(result).global_loc, next_rule(result.rule, result.problem.start.shape[1])
    )
    sizes = moments.skewness.abs().amax(-1)
    worst = int(sizes.argmax())
    size = float(sizes[worst])
    level = Level.GOOD if _is_weighted(result) else SKEWNESS.level(size)
    return Finding("skewness, units", level, _number(size), f"worst of all {problem.unit_model.describe(worst)}")


def tails_of_units(result: FitResult, there: Conditionals) -> UnitTails:
    """Return the shape of the tails of the units, those first whose weights vary most.

    :param FitResult result: the fit.
    :param Conditionals there: at its center.
    """
    problem = result.problem
    units, k_hat = unit_k_hat(problem.integrals, there, gaussian_of(result).global_loc)
    return UnitTails(problem.unit_model.layout.frame.name, units.astype(int), k_hat, len(there.mode[0]))


def tails(result: FitResult, found: UnitTails) -> Finding:
    """Judge the tails of the units; those of a rung that knows of them are doubtful at worst.

    :param FitResult result: the fit.
    :param UnitTails found: its tails.
    """
    worst = int(found.k_hat.argmax())
    size, heavy = float(found.k_hat[worst]), int((found.k_hat > K_GOOD).sum())
    level = UNIT_TAILS.level(size)
    if _is_weighted(result):
        level = min(WEIGHTED_TAILS.level(size), Level.DOUBTFUL)
    sentence = f"worst of all {result.problem.unit_model.describe(int(found.units[worst]))}"
    if heavy:
        sentence += f"; {heavy} of {len(found.units)} looked at have tails far heavier than normal ones: StudentPoints"
    return Finding("k-hat, units", level, f"{size:.2f}", sentence)


def _is_weighted(result: FitResult) -> bool:
    """Whether a rung knows of the shape of its units."""
    return isinstance(result.posterior.units, WeightedUnits)


def other_starts(result: FitResult, there: Conditionals) -> Finding:
    """Judge the mass of units at other modes than those that were found first.

    :param FitResult result: the fit.
    :param Conditionals there: at its center.
    """
    problem = result.problem
    found = other_modes(problem.integrals, there, gaussian_of(result).global_loc)
    unit = int(found.share.argmax())
    share, several = float(found.share[unit]), int((found.share > OTHER_MODE.good).sum())
    if not share:
        return Finding("second start", Level.GOOD, "no other mode", "other starts lead to the same modes")
    sentence = (
        f"{problem.unit_model.describe(unit)} has another mode {float(found.distance[unit]):.2g} standard deviations "
        f"away, with {_percent(share)} of its mass ({several} of {len(found.share)} units have more than 1 % there)"
    )
    if share > OTHER_MODE.good:
        sentence += ". No rung looks around both: write the model so that there is one, or sample it by NUTS"
    return Finding("second start", OTHER_MODE.level(share), _percent(share), sentence)


def simulated_scores(result: FitResult, simulations: int, seed: int, progress: bool) -> Finding:
    """Judge the scores of data that are drawn from the model.

    :param FitResult result: the fit.
    :param int simulations: data sets to draw.
    :param int seed: of the data.
    :param bool progress: whether to show a bar.
    """
    name, gaussian = "simulated scores", gaussian_of(result)
    if not len(gaussian.global_loc):
        return Finding(name, Level.GOOD, "none", "there are no globals")
    is_marginal = isinstance(result.maximized, MarginalLaplace | MarginalQuadrature)
    rule = result.rule if is_marginal else next_rule(result.rule, result.problem.start.shape[1])
    try:
        found = check_consistency(result.problem, gaussian, rule, simulations, seed, progress)
    except (ModelError, ValueError) as error:
        return Finding(name, Level.UNKNOWN, "", str(error))
    if not numpy.isfinite(found.p_value):
        sentence = f"a mode was not found in {found.num_failed} of {found.num_failed + found.num_simulations} data sets"
        return Finding(name, Level.UNKNOWN, "", sentence)
    level = SCORES.level(found)
    if level is Level.GOOD:
        sentence = f"{found.num_simulations} data sets drawn from the model agree with its marginal density"
    else:
        sentence = (
            f"{found.num_simulations} data sets drawn from the model do not agree with its marginal density: the "
            "integrals over units are biased, or terms of the model have a weight (poutine.scale, a mask) that data "
            "drawn from it do not know of"
        )
    return Finding(name, level, f"p {found.p_value:.2g}, bias {_bias(found)}", sentence)


def _bias(found: Consistency) -> str:
    """Word the largest bias with its error."""
    worst = int(numpy.abs(found.bias).argmax())
    bias, error = float(found.bias[worst]), float(found.error[worst])
    # A global that data say nothing of has scores of rounding errors alone.
    return f"{bias:.2g} ± {in_sd(error)}" if max(abs(bias), error) >= 1e-3 else in_sd(bias)


def _number(value: float) -> str:
    """Word a size, rounding errors as what they are."""
    return "under 0.001" if value < 1e-3 else f"{value:.2g}"


def _percent(share: float) -> str:
    """Word a share, rounding errors as what they are."""
    return "under 0.1 %" if share < 1e-3 else f"{100 * share:.2g} %"
