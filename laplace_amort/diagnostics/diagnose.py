"""Does it fit? One call, one table, one verdict."""

from __future__ import annotations

from collections.abc import Iterator

import numpy
import torch
from torch import Tensor

from laplace_amort.diagnostics.comparison import Comparison, compare
from laplace_amort.diagnostics.consistency import check_consistency
from laplace_amort.diagnostics.findings import Diagnosis, Finding, Level, UnitTails
from laplace_amort.diagnostics.unit_checks import other_modes, unit_k_hat
from laplace_amort.errors import NUMERICAL_ERRORS, ModelError, StructureError
from laplace_amort.fitting import FitResult, FixedDrawELBO, MarginalLaplace, MarginalQuadrature
from laplace_amort.posterior import (
    K_GOOD,
    ImportanceSample,
    NestedUnits,
    Posterior,
    WeightedUnits,
    marginal_sample,
    pareto_smoothed,
)
from laplace_amort.units import (
    GRID_DIM,
    Conditionals,
    GaussHermite,
    Laplace,
    QuadraturePoints,
    QuadratureRule,
    StudentPoints,
    unit_moments,
)

__all__ = ["diagnose", "unit_tails"]

# Posterior standard deviations that a mean may be off, and the share that a standard deviation may: good, and not bad.
_MEAN, _SD = (0.05, 0.2), (0.03, 0.15)
_UNIT_MEAN, _UNIT_SD = (0.1, 0.3), (0.05, 0.2)
# Newton decrement; share of units, and change of a precision, that a repair may have; share of a unit at another mode.
_DECREMENT, _REPAIRED, _OTHER = 0.05, 0.05, (0.01, 0.05)
_SKEWNESS = 1.0, 2.5
# Shape of the tails of a unit: normal draws do not reach far into them, and find it smaller than it is.
_K_UNIT = 0.5
# Error of the moments by sampling; and p value below which scores are not zero on average.
_OPEN, _P = (0.05, 0.15), 1e-3
# Draws of the globals over which units are averaged in a comparison: of units in all at most, but for the least.
_AVERAGED, _LEAST = 2**21, 128
# Draws of a Gaussian by which its own weights are seen.
_OWN = 512


def diagnose(result: FitResult, *, simulations: int = 100, seed: int = 0, progress: bool = True) -> Diagnosis:
    """Say whether a posterior can be relied on, and what to do if not.

    It compares every mean and standard deviation with those of the next rung, looks at the tails of the importance
    weights and of the units, searches for other modes of the units, and simulates. It costs some three times what the
    posterior of the next rung does, and one gradient for each simulation.

    Do not read a good verdict as proof: modes of the globals that no start led to are not seen; ``fit(..., starts=20)``
    looks for them.

    :param FitResult result: of :func:`~laplace_amort.fit`, with all units in it.
    :param int simulations: data sets to draw, with 0 for none; see
        :func:`~laplace_amort.diagnostics.consistency.check_consistency`.
    :param int seed: of what is drawn here.
    :param bool progress: whether to show a bar for the simulations.
    :return: :class:`~laplace_amort.Diagnosis`; ``print`` it.

    Example: a Gaussian model, which every rung fits::

        >>> import pyro, torch, pyro.distributions as dist
        >>> from laplace_amort import AutoLaplaceFamily, MarginalLaplace, fit
        >>> def model(z):
        ...     mu = pyro.sample("mu", dist.Normal(0., 1.))
        ...     with pyro.plate("units", len(z)):
        ...         y = pyro.sample("y", dist.Normal(mu, 1.))
        ...         pyro.sample("z", dist.Normal(y, 1.), obs=z)
        >>> pyro.clear_param_store()
        >>> result = fit(model, AutoLaplaceFamily(model), torch.tensor([1., 3.]), objective=MarginalLaplace())
        >>> diagnose(result).verdict
        'It fits: nothing that was looked at speaks against this posterior.'
    """
    findings = [_convergence(result), *_repairs(result)]
    if result.gaussian is None:
        return Diagnosis(tuple(findings), "fit(model, guide, *args, starts=20)")
    tails = None
    try:
        if result.problem.subsamples:
            raise ModelError("the fit took minibatches, and everything else needs all units at once")
        integrals = result.problem.integrals
        findings += _against_next_rung(result, seed)
        there = integrals.conditionals(result.gaussian.global_loc[None], result.gaussian.local_loc[None])
        tails = _tails(result, there)
        findings += [*_units(result, there, tails), _second_starts(result, there)]
        findings += [_consistency(result, simulations, seed, progress)] if simulations else []
    except (*NUMERICAL_ERRORS, ModelError, StructureError) as error:
        findings.append(Finding("units", Level.UNKNOWN, "", f"{type(error).__name__}: {error}"))
    return Diagnosis(tuple(findings), _advice(result, findings), tails)


def unit_tails(result: FitResult) -> UnitTails:
    """Return the shape of the tails of the units at the center of a fit, unit by unit.

    ``diagnose(result).unit_tails`` has the same; this alone is a small part of its cost.

    :param FitResult result: of :func:`~laplace_amort.fit`, with all units in it.
    :raises ModelError: if the fit took minibatches.
    :raises ValueError: if the fit ended where there is no posterior.
    """
    if result.gaussian is None:
        raise ValueError(f"there is no posterior: {result.status}")
    if result.problem.subsamples:
        raise ModelError("the fit took minibatches, and the tails of the units need all of them at once")
    integrals = result.problem.integrals
    there = integrals.conditionals(result.gaussian.global_loc[None], result.gaussian.local_loc[None])
    return _tails(result, there)


def _tails(result: FitResult, there: Conditionals) -> UnitTails:
    target = result.problem
    units, k_hat = unit_k_hat(target.integrals, there, _global(result))
    return UnitTails(target.unit_model.layout.frame.name, units.astype(int), k_hat, len(there.mode[0]))


def _level(value: float, bounds: tuple[float, float]) -> Level:
    if not value <= bounds[1]:  # NaN is not good
        return Level.BAD
    return Level.GOOD if value <= bounds[0] else Level.DOUBTFUL


def _convergence(result: FitResult) -> Finding:
    decrement, good = result.gradient_norm, result.status.ok and result.gradient_norm <= _DECREMENT
    level = Level.GOOD if good else Level.BAD
    return Finding("convergence", level, f"{decrement:.2g} sd from the optimum", str(result.status))


def _repairs(result: FitResult) -> Iterator[Finding]:
    for what, report in (("globals", result.head_report), ("units", result.tail_report)):
        if report is None:
            continue
        share = report.num_repaired / max(report.num_matrices, 1)
        size = min(share, report.relative_change) if what == "units" else report.relative_change
        level = Level.GOOD if not report.num_repaired else _level(size, (0.0, _REPAIRED))
        sentence = "no precision was repaired"
        if report.num_repaired:
            sentence = f"the precision is not that of a maximum: {report}"
        yield Finding(f"repair, {what}", level, f"{report.num_repaired} of {report.num_matrices}", sentence)


def _rule(result: FitResult) -> QuadratureRule:
    """How the rung integrates over units."""
    objective = result.maximized
    return objective.rule if isinstance(objective, MarginalQuadrature) else Laplace()


def _next_rule(result: FitResult) -> QuadratureRule:
    """The rule to compare with: more points, and from one point to enough of them."""
    rule, k = _rule(result), result.problem.start.shape[1]
    if isinstance(rule, Laplace):
        return GaussHermite(9 if k <= 2 else 5) if k <= GRID_DIM else StudentPoints(256)
    return rule.finer(k)


def _reference(result: FitResult, seed: int) -> Posterior:
    """The posterior of the next rung, with the same draws as far as possible."""
    gaussian, integrals = result.posterior.gaussian, result.problem.integrals
    rule = _next_rule(result)
    globals_ = marginal_sample(integrals, rule, gaussian, result.seed + seed)
    averaged = max(_LEAST, _AVERAGED // max(gaussian.local_loc.numel(), 1))
    return Posterior(
        result.problem, gaussian, globals_, WeightedUnits(gaussian, integrals, rule), result.posterior.seed, averaged
    )


def _against_next_rung(result: FitResult, seed: int) -> Iterator[Finding]:
    reference = _reference(result, seed)
    found = compare(result.posterior.thinned(reference.averaged), reference)
    own = result.posterior.globals_
    if numpy.isnan(own.log_integral):  # nothing but a Gaussian
        yield _k_hat_of_gaussian(result)
        yield _k_hat("k-hat, correction", reference.globals_)
    else:
        yield _k_hat("k-hat, globals", own)
    rule = _next_rule(result)
    # What sampling itself leaves open is no error of the rung.
    open_ = min(reference.globals_.error, _OPEN[0])
    yield _compared("globals", found.globals_, (_MEAN, _SD), f"against {rule}", open_)
    yield _compared("units", found.units, (_UNIT_MEAN, _UNIT_SD), f"against {rule}", 0.0)


def _k_hat(name: str, found: ImportanceSample) -> Finding:
    """The weights of draws of the globals from t distributions."""
    level = max(_level(found.k_hat, (K_GOOD, K_GOOD)), _level(found.error, _OPEN))
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
    return Finding(name, level, f"{found.k_hat:.2f}, error {found.error:.2g}", sentence)


def _k_hat_of_gaussian(result: FitResult) -> Finding:
    """The weights of draws of the globals from the Gaussian that a guide is."""
    gaussian, integrals = result.posterior.gaussian, result.problem.integrals
    if not len(gaussian.global_loc):
        return Finding("k-hat, globals", Level.GOOD, "none", "there are no globals")
    globals_ = torch.from_numpy(result.posterior.globals_.draws[:_OWN]).to(gaussian.global_loc)
    points = _next_rule(result).points(gaussian.local_loc.shape[1], globals_)
    start = NestedUnits(gaussian, integrals).start(globals_)
    values = integrals.values(points, QuadraturePoints.log_integral, globals_, start).values
    scale = gaussian.precision.global_scale_tril
    z = torch.linalg.solve_triangular(scale, (globals_ - gaussian.global_loc).mT, upper=False)
    log_ratios = (values + (z**2).sum(0) / 2).nan_to_num(nan=-torch.inf).double().cpu().numpy()
    k_hat = float(pareto_smoothed(log_ratios).k_hat)
    level = _level(k_hat, (K_GOOD, K_GOOD))
    sentence = "the Gaussian covers" if level is Level.GOOD else "the Gaussian does not cover"
    return Finding("k-hat, globals", level, f"{k_hat:.2f}", f"{sentence} the marginal density of the globals")


def _compared(
    name: str, found: Comparison, bounds: tuple[tuple[float, float], tuple[float, float]], than: str, open_: float
) -> Finding:
    means, sds = (tuple(bound + open_ for bound in part) for part in bounds)
    level = max(_level(found.mean, (means[0], means[1])), _level(found.sd, (sds[0], sds[1])))
    value = f"mean {found.mean:.2g} sd, sd {100 * found.sd:.2g} %" if found.where else "none"
    sentence = f"{than}, worst of all at {found.where}" if found.where else "there are none"
    return Finding(f"error, {name}", level if found.where else Level.GOOD, value, sentence)


def _units(result: FitResult, there: Conditionals, tails: UnitTails) -> Iterator[Finding]:
    target, global_ = result.problem, _global(result)
    moments = unit_moments(target.integrals, there, global_, _next_rule(result))
    skewness = moments.skewness.abs().amax(-1)
    worst = int(skewness.argmax())
    follows = isinstance(result.posterior.units, WeightedUnits)  # a rung that knows of the shape of its units
    level = Level.GOOD if follows else _level(float(skewness.max()), _SKEWNESS)
    yield Finding(
        "skewness, units", level, f"{float(skewness.max()):.2g}", f"worst of all {target.unit_model.describe(worst)}"
    )
    units, k_hat = tails.units, tails.k_hat
    worst = int(k_hat.argmax())
    heavy = int((k_hat > K_GOOD).sum())
    level = _level(float(k_hat.max()), (K_GOOD, K_GOOD) if follows else (_K_UNIT, K_GOOD))
    level = min(level, Level.DOUBTFUL) if follows else level
    sentence = f"worst of all {target.unit_model.describe(int(units[worst]))}"
    if heavy:
        sentence += f"; {heavy} of {len(units)} looked at have tails far heavier than normal ones: StudentPoints"
    yield Finding("k-hat, units", level, f"{float(k_hat.max()):.2f}", sentence)


def _second_starts(result: FitResult, there: Conditionals) -> Finding:
    target = result.problem
    found = other_modes(target.integrals, there, _global(result))
    unit = int(found.share.argmax())
    share, several = float(found.share[unit]), int((found.share > _OTHER[0]).sum())
    if not share:
        return Finding("second start", Level.GOOD, "no other mode", "other starts lead to the same modes")
    sentence = (
        f"{target.unit_model.describe(unit)} has another mode {float(found.distance[unit]):.2g} standard deviations "
        f"away, with {100 * share:.2g} % of its mass ({several} of {len(found.share)} units have more than 1 % there)"
    )
    if share > _OTHER[0]:
        sentence += ". No rung looks around both: write the model so that there is one, or sample it by NUTS"
    return Finding("second start", _level(share, _OTHER), f"{100 * share:.2g} %", sentence)


def _consistency(result: FitResult, simulations: int, seed: int, progress: bool) -> Finding:
    name, gaussian = "simulated scores", result.posterior.gaussian
    if not len(gaussian.global_loc):
        return Finding(name, Level.GOOD, "none", "there are no globals")
    objective = result.maximized
    rule = _rule(result) if isinstance(objective, MarginalLaplace | MarginalQuadrature) else _next_rule(result)
    try:
        found = check_consistency(result.problem, gaussian, rule, simulations, seed, progress)
    except (ModelError, ValueError) as error:
        return Finding(name, Level.UNKNOWN, "", str(error))
    if not numpy.isfinite(found.p_value):
        sentence = f"a mode was not found in {found.num_failed} of {found.num_failed + found.num_simulations} data sets"
        return Finding(name, Level.UNKNOWN, "", sentence)
    worst = int(numpy.abs(found.bias).argmax())
    clear = found.p_value < _P
    level = _level(abs(float(found.bias[worst])), (0.1, 0.4)) if clear else Level.GOOD
    value = f"p {found.p_value:.2g}, bias {found.bias[worst]:.2g} ± {found.error[worst]:.2g} sd"
    if level is Level.GOOD:
        sentence = f"{found.num_simulations} data sets drawn from the model agree with its marginal density"
    else:
        sentence = (
            f"{found.num_simulations} data sets drawn from the model do not agree with its marginal density: the "
            "integrals over units are biased, or terms of the model have a weight (poutine.scale, a mask) that data "
            "drawn from it do not know of"
        )
    return Finding(name, level, value, sentence)


def _advice(result: FitResult, findings: list[Finding]) -> str:
    levels = {finding.name: finding.level for finding in findings}
    objective = result.maximized
    if max(levels.values()) < Level.DOUBTFUL or result.problem.subsamples:
        return ""
    if levels["convergence"] is Level.BAD and not isinstance(objective, FixedDrawELBO):
        is_one_point = isinstance(objective, MarginalLaplace)
        same = "MarginalLaplace()" if is_one_point else f"MarginalQuadrature({_rule(result)!r})"
        return f"fit(model, guide, *args, objective={same}, starts=20)"
    if levels.get("second start", Level.GOOD) > Level.UNKNOWN:
        return ""
    higher = ("error, globals", "error, units", "skewness, units", "k-hat, units", "convergence")
    if any(levels.get(name, Level.GOOD) > Level.UNKNOWN for name in higher):
        rule = _next_rule(result)
        if levels.get("k-hat, units", Level.GOOD) > Level.UNKNOWN and isinstance(rule, GaussHermite):
            rule = StudentPoints(256)  # tails that a normal has not
        return f"fit(model, guide, *args, objective=MarginalQuadrature({rule!r}))"
    return ""


def _global(result: FitResult) -> Tensor:
    with torch.no_grad():
        return result.posterior.gaussian.global_loc.detach()
