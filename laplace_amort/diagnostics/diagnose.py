"""Does it fit? One call, one table, one verdict."""

from __future__ import annotations

from laplace_amort.diagnostics import checks
from laplace_amort.diagnostics.findings import Diagnosis, Finding, Level, UnitTails
from laplace_amort.errors import NUMERICAL_ERRORS, ModelError, StructureError
from laplace_amort.evidence import next_rule
from laplace_amort.fitting import FitResult, FixedDrawELBO, MarginalLaplace
from laplace_amort.units import GaussHermite, StudentPoints

__all__ = ["diagnose", "unit_tails"]

# What points around the modes of the units may cure; an ELBO that did not converge is no better with more starts.
_CURED_BY_POINTS = {"error, globals", "error, units", "skewness, units", "k-hat, units", "convergence"}

_OF_MINIBATCHES = "so that the fit is one of minibatches"


def diagnose(result: FitResult, *, simulations: int = 100, seed: int = 0, progress: bool = True) -> Diagnosis:
    """Say whether a posterior can be relied on, and what to do if not.

    It compares every mean and standard deviation with those of the next rung, looks at the tails of the importance
    weights and of the units, searches for other modes of the units, and simulates. It takes about as long as the fit,
    and the simulations about as long again; a user may interrupt these (Ctrl-C), and what was simulated counts.

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
        >>> from laplace_amort import fit
        >>> def model(z):
        ...     mu = pyro.sample("mu", dist.Normal(0., 1.))
        ...     with pyro.plate("units", len(z)):
        ...         y = pyro.sample("y", dist.Normal(mu, 1.))
        ...         pyro.sample("z", dist.Normal(y, 1.), obs=z)
        >>> diagnose(fit(model, torch.tensor([1., 3.]))).verdict
        'It fits: nothing that was looked at speaks against this posterior.'
    """
    findings = [checks.convergence(result), *checks.repairs(result)]
    if result.gaussian is None:
        return Diagnosis(tuple(findings), "fit(model, *args, starts=20)")
    tails = None
    try:
        result.problem.refuse_minibatch(f"{_OF_MINIBATCHES}, and everything else needs all units at once")
        findings += checks.against_next_rung(result, seed)
        there = checks.at_center(result)
        tails = checks.tails_of_units(result, there)
        findings += [checks.skewness(result, there), checks.tails(result, tails), checks.other_starts(result, there)]
        findings += [checks.simulated_scores(result, simulations, seed, progress)] if simulations else []
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
    checks.gaussian_of(result)
    result.problem.refuse_minibatch(f"{_OF_MINIBATCHES}, and the tails of the units need all of them at once")
    return checks.tails_of_units(result, checks.at_center(result))


def _advice(result: FitResult, findings: list[Finding]) -> str:
    """Word the line to type next: more starts where a fit did not converge, more points where it is not exact."""
    poor = {finding.name for finding in findings if finding.level > Level.UNKNOWN}
    if not poor or result.problem.subsamples:
        return ""
    if "convergence" in poor and not isinstance(result.maximized, FixedDrawELBO):
        is_one_point = isinstance(result.maximized, MarginalLaplace)
        same = "MarginalLaplace()" if is_one_point else f"MarginalQuadrature({result.rule!r})"
        return f"fit(model, *args, objective={same}, starts=20)"
    if "second start" in poor or not poor & _CURED_BY_POINTS:
        return ""
    rule = next_rule(result.rule, result.problem.start.shape[1])
    if "k-hat, units" in poor and isinstance(rule, GaussHermite):
        rule = StudentPoints(256)  # tails that a normal has not
    return f"fit(model, *args, objective=MarginalQuadrature({rule!r}))"
