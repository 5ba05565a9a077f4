"""The verdict: each planted failure is caught, its clean twin passes, and the line to type is typed."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_value

import laplace_amort
from laplace_amort import (
    Errors,
    FitStatus,
    FixedDrawELBO,
    Judgement,
    Ladder,
    MarginalLaplace,
    MarginalQuadrature,
    NestedELBO,
    Reason,
    Verdict,
    fit,
)

Z = torch.tensor([1.0, 3.0, -0.5, 2.0, 0.3, 1.1, 0.2, -1.0], dtype=torch.float64)
NAMES = {name: getattr(laplace_amort, name) for name in laplace_amort.__all__}
COUNTS = torch.tensor([0.0, 3.0, 1.0, 3.0, 3.0, 0.0, 2.0, 3.0], dtype=torch.float64)


def hierarchy(z, prior=dist.HalfNormal(1.0), noise=1.0):  # noqa: B008 (never changes)
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 3.0)), pyro.sample("tau", prior)
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, tau))
        pyro.sample("z", dist.Normal(y, noise), obs=z)


def binary(z):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 3.0)), pyro.sample("tau", dist.HalfNormal(3.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, tau))
        pyro.sample("z", dist.Binomial(3, logits=y), obs=z)


def with_two_modes_in_a_unit(z, link=torch.square):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        pyro.sample("z", dist.Normal(link(y), 0.3), obs=z)


def with_a_sign_to_choose(z, link=torch.square):
    w = pyro.sample("w", dist.Normal(0.0, 2.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(link(w), 1.0))
        pyro.sample("z", dist.Normal(y, 0.5), obs=z)


def ridge(z, spread=0.3, bend=1.0):
    """A bend of nine globals, of which no proposal has the ends: the sd of a is 2."""
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal((bend * a**2).unsqueeze(-1).expand(*a.shape, 8), spread).to_event(1))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(0.0 * b[..., :1], 1.0))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)


def funnel(z, spread=3.0):
    s = pyro.sample("s", dist.Normal(0.0, spread))
    scale = (s / 2).exp().unsqueeze(-1).expand(*s.shape, 6)
    x = pyro.sample("x", dist.Normal(0.0, scale).to_event(1))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(x[..., 0:1], 1.0))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)


def without_data(z, prior):
    pyro.sample("nu", prior)
    hierarchy(z)


def weighted(z, weight):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 3.0)), pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, tau))
        with poutine.scale(scale=weight):
            pyro.sample("z", dist.Normal(y, 1.0), obs=z)


def kinked(z, errors=dist.Laplace):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        pyro.sample("z", errors(y, 1.0), obs=z)


def quiet(model, *args, **options):
    return fit(model, *args, progress=False, **options)


def says(result, verdict):
    return any(reason.verdict is verdict for reason in result.judgement.reasons)


PLANTED = {
    "two modes in a unit": (Verdict.SEVERAL_MODES, with_two_modes_in_a_unit, (Z.abs(),), (Z.abs(), torch.exp)),
    "a sign to choose": (Verdict.SEVERAL_MODES, with_a_sign_to_choose, (Z + 3,), (Z + 3, torch.exp)),
    "a funnel": (Verdict.NOT_CONVERGED, funnel, (Z,), (Z, 0.1)),
    "a ridge that bends": (Verdict.POORLY_COVERED, ridge, (Z,), (Z, 2.0, 0.1)),
    "a narrow one": (Verdict.POORLY_COVERED, ridge, (Z, 0.05), (Z, 2.0, 0.0)),
    "a tail without end": (Verdict.NO_MOMENTS, without_data, (Z, dist.HalfCauchy(1.0)), (Z, dist.HalfNormal(1.0))),
    "and of a real number": (Verdict.NO_MOMENTS, without_data, (Z, dist.Cauchy(0.0, 1.0)), (Z, dist.Normal(0.0, 1.0))),
    "a t of few degrees": (
        Verdict.NO_MOMENTS,
        without_data,
        (Z, dist.StudentT(1.8, 0.0, 1.0)),
        (Z, dist.StudentT(8.0, 0.0, 1.0)),
    ),
    "a weight": (Verdict.WEIGHTED, weighted, (Z, 5.0), (Z, 1.0)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_failure_is_caught(name):
    verdict, model, args, _ = PLANTED[name]
    result = quiet(model, *args)
    assert says(result, verdict)
    assert not result.verdict.ok
    assert str(result.judgement).startswith(f"{result.verdict.name}: {result.verdict}")


@pytest.mark.parametrize("name", PLANTED)
def test_its_clean_twin_passes(name):
    _, model, _, args = PLANTED[name]
    result = quiet(model, *args)
    assert result.verdict is Verdict.RIGHT, str(result.judgement)
    assert result.verdict.ok
    assert result.judgement.advice == ""


def test_weak_data_bound_a_tail_where_they_do():
    # With N units the density of tau falls as its prior times tau to the power of -N at least, mu given.
    assert quiet(hierarchy, Z, dist.HalfCauchy(1.0)).verdict.ok


@pytest.mark.parametrize("objective", [FixedDrawELBO(), NestedELBO(), MarginalLaplace()], ids=repr)
def test_an_objective_that_was_chosen_is_compared_and_its_line_gives_the_right_posterior(objective):
    result = quiet(binary, COUNTS, objective=objective)
    assert result.status.ok
    assert result.verdict is Verdict.INEXACT
    assert result.errors.mean > 0.1 or result.errors.sd > 10
    model, args = binary, (COUNTS,)
    again = eval(result.judgement.advice, NAMES | {"model": model, "args": args})
    assert again.verdict is Verdict.RIGHT
    # The error was estimated about as large as it was.
    worst = max(
        abs(float(result.posterior.mean()[name] - again.posterior.mean()[name]) / float(again.posterior.std()[name]))
        for name in ("mu", "tau")
    )
    assert worst == pytest.approx(result.errors.mean, abs=0.1)


def test_the_line_for_a_finer_rule_can_be_typed():
    result = quiet(binary, COUNTS, objective=Ladder(max_points=1))
    assert result.verdict is Verdict.INEXACT
    again = eval(result.judgement.advice, NAMES | {"model": binary, "args": (COUNTS,)})
    assert isinstance(again.maximized, MarginalQuadrature)
    assert again.verdict is Verdict.RIGHT


def test_without_the_comparison_nothing_is_known():
    result = quiet(binary, COUNTS, check=False)
    assert result.verdict is Verdict.NOT_COMPARED
    assert not result.verdict.ok
    assert result.errors is None
    again = eval(result.judgement.advice, NAMES | {"model": binary, "args": (COUNTS,)})
    assert again.verdict.ok


def test_a_fit_that_has_not_converged_is_never_right():
    result = quiet(hierarchy, Z, objective=FixedDrawELBO(num_draws=2, max_draws=2))
    assert result.status is FitStatus.TOO_FEW_DRAWS
    assert result.verdict is Verdict.NOT_CONVERGED
    assert not result.verdict.ok


def test_a_fit_of_minibatches_is_not_compared():
    def model(z):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("units", len(z), subsample_size=4) as some:
            y = pyro.sample("y", dist.Normal(mu, 1.0))
            pyro.sample("z", dist.Normal(y, 1.0), obs=z[some])

    result = quiet(model, Z)
    assert result.verdict in (Verdict.NOT_COMPARED, Verdict.NOT_CONVERGED)
    assert not result.verdict.ok


def test_modes_that_starts_found_are_told_with_the_line_for_chains():
    result = quiet(with_a_sign_to_choose, Z + 3)
    assert result.judgement.advice == "fit(model, *args, starts=20)"
    again = eval(result.judgement.advice, {"fit": quiet, "model": with_a_sign_to_choose, "args": (Z + 3,)})
    assert len(again.optima) == 2
    assert again.verdict is Verdict.SEVERAL_MODES
    assert again.judgement.advice.startswith("MCMC(NUTS(model")
    assert "2 optima were found" in str(again.judgement)


def test_chains_can_be_started_by_the_line_that_is_given():
    result = quiet(with_two_modes_in_a_unit, Z.abs())
    line = result.judgement.advice
    assert line.startswith("MCMC(NUTS(model")
    names = {"MCMC": MCMC, "NUTS": NUTS, "init_to_value": init_to_value, "model": with_two_modes_in_a_unit}
    few = line.replace("1000", "3")
    eval(few, names | {"result": result, "args": (Z.abs(),)})


def test_float32_has_the_same_verdict():
    for model, data in ((hierarchy, Z), (binary, COUNTS)):
        single, double = quiet(model, data.float()), quiet(model, data)
        assert single.verdict is double.verdict
        assert single.errors.mean == pytest.approx(double.errors.mean, abs=0.02)


def test_errors_of_a_model_without_globals_are_those_of_its_units():
    def model(z):
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(0.0, 1.0))
            pyro.sample("z", dist.Bernoulli(logits=y), obs=z)

    result = quiet(model, (Z > 0).double())
    assert result.verdict.ok
    assert result.errors.global_ == ""
    assert result.errors.unit.startswith("y[")
    assert "globals" not in str(result.errors)


def test_the_fit_stands_where_it_stood_when_it_was_looked_at():
    result = quiet(with_a_sign_to_choose, Z + 3)
    before = result.guide.loc.detach().clone()
    assert result.verdict is Verdict.SEVERAL_MODES
    assert torch.equal(result.guide.loc.detach(), before)
    assert torch.equal(result.problem.loc, before.to(result.problem.loc))


def test_a_judgement_is_the_worst_of_its_reasons():
    reasons = Reason(Verdict.KINKED, "a kink", "a line"), Reason(Verdict.NO_MOMENTS, "a tail", "another")
    judgement = Judgement(Errors(0.2, 3.0, "mu", math.inf, 0.05, "y[1]"), reasons)
    assert judgement.verdict is Verdict.KINKED
    assert judgement.advice == "a line"
    assert "(worst: y[1])" in str(judgement)
    assert "a tail\n    another" in str(judgement)


@pytest.mark.parametrize("verdict", Verdict)
def test_a_verdict_reads_as_a_sentence(verdict):
    assert str(verdict)[0].islower()
    assert not str(verdict).endswith(".")
    assert verdict.ok is (verdict is Verdict.RIGHT)
