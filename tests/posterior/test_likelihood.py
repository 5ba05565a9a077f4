"""Log likelihoods of units and of observations, against closed forms, and leave-one-out that is made of them.

Leave-one-out by importance sampling is compared with the closed form for fixed seeds and quasi-random draws of the
globals, to ten times what other seeds have been seen to differ by.
"""

import math

import arviz_stats
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.ecosystem import fitted
from helpers.fit_models import gaussian, guide_for, poisson, poisson_counts

from laplace_amort import (
    ConditionalLikelihood,
    FixedDrawELBO,
    GaussHermite,
    Ladder,
    MarginalLaplace,
    MarginalLikelihood,
    MarginalQuadrature,
    ModelError,
    ModeNotFoundError,
    NestedELBO,
    RecordingError,
    StructureError,
    StudentPoints,
    fit,
)
from laplace_amort.model.observed import observed_sites
from laplace_amort.posterior import likelihood as pointwise
from laplace_amort.posterior.likelihood import rule_of
from laplace_amort.units.integrals import UnitIntegrals
from laplace_amort.units.quadrature import Laplace

Z = torch.tensor([1.0, 3.0, -0.5, 2.0, 0.2, 0.9], dtype=torch.float64)


def evaluated(likelihood, result, globals_, locals_):
    names = list(observed(result))
    return likelihood.evaluate(result.posterior, names, globals_, locals_)


def observed(result):
    return observed_sites(result.posterior.gaussian.unit_model)


def loo(result, likelihood, num_samples=2000):
    """Pointwise estimates and k-hats, by ArviZ."""
    found = result.to_arviz(num_samples=num_samples, prior_samples=0, log_likelihood=likelihood)
    estimate = arviz_stats.loo(found, pointwise=True)
    return torch.as_tensor(estimate.elpd_i.values.copy()), torch.as_tensor(estimate.pareto_k.values.copy())


# ------------------------------------------------------------------------------------------------- against closed forms


@pytest.mark.parametrize(
    "objective", [FixedDrawELBO(), NestedELBO(), MarginalLaplace(), MarginalQuadrature(), Ladder()]
)
def test_of_units(objective):
    """Normal in closed form, by every rung: z given mu has the variance 2."""
    result = fit(gaussian, guide_for(gaussian), Z, objective=objective)
    globals_, locals_ = result.posterior.sample_unconstrained(30)
    found = evaluated(MarginalLikelihood(), result, globals_, locals_)
    assert list(found) == ["marginal"]
    torch.testing.assert_close(found["marginal"].values, dist.Normal(globals_, 2**0.5).log_prob(Z))
    assert [frame.name for frame in found["marginal"].plates] == ["units"]


def test_of_observations():
    z = poisson_counts(10)
    result = fit(poisson, guide_for(poisson), z, objective=MarginalLaplace())
    globals_, locals_ = result.posterior.sample_unconstrained(30)
    found = evaluated(ConditionalLikelihood(), result, globals_, locals_)
    assert list(found) == ["z"]
    expected = dist.Poisson(locals_.mT.exp()).log_prob(z)
    torch.testing.assert_close(found["z"].values, expected)


def test_draws_are_the_same_in_both_coordinates():
    result = fit(poisson, guide_for(poisson), poisson_counts(10), objective=MarginalQuadrature())
    globals_, locals_ = result.posterior.sample_unconstrained(50, seed=3)
    draws = result.posterior.sample(50, seed=3)
    torch.testing.assert_close(draws["mu"], globals_[:, 0])
    torch.testing.assert_close(draws["tau"], globals_[:, 1].exp())
    torch.testing.assert_close(draws["y"], locals_.squeeze(-1))


def test_counts_by_quadrature_of_any_kind():
    """The rules agree on integrals without a closed form, and one point does not."""
    result = fit(poisson, guide_for(poisson), poisson_counts(10), objective=MarginalQuadrature())
    draws = result.posterior.sample_unconstrained(20)
    values = [
        evaluated(MarginalLikelihood(rule), result, *draws)["marginal"].values
        for rule in (GaussHermite(33), StudentPoints(512), None, Laplace())
    ]
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(values[2], values[0], rtol=0, atol=1e-3)
    assert (values[3] - values[0]).abs().max() > 2e-3


def test_units_and_observations_add_up():
    """On average over the posterior of a unit, the one is the other but for the prior: Bayes at a point."""
    result = fit(gaussian, guide_for(gaussian), Z, objective=MarginalLaplace())
    globals_, locals_ = result.posterior.sample_unconstrained(5)
    y = locals_.squeeze(-1)
    conditional = evaluated(ConditionalLikelihood(), result, globals_, locals_)["z"].values
    marginal = evaluated(MarginalLikelihood(), result, globals_, locals_)["marginal"].values
    prior = dist.Normal(globals_, 1.0).log_prob(y)
    posterior = dist.Normal((globals_ + Z) / 2, 0.5**0.5).log_prob(y)
    torch.testing.assert_close(conditional + prior - posterior, marginal)


SOME = "poisson_by_visit", "level_and_spread", "dim_minus_three", "crossed_items", "missing", "without_globals"


@pytest.mark.parametrize("name", SOME)
def test_models(name):
    """The marginal likelihoods of all units and the prior are what the posterior was drawn from."""
    result = fitted(name)
    globals_, locals_ = result.posterior.sample_unconstrained(3)
    found = evaluated(MarginalLikelihood(Laplace()), result, globals_, locals_)["marginal"].values
    target = result.problem
    start = locals_[:1].expand_as(locals_)
    points = Laplace().points(locals_.shape[-1], globals_)
    whole = target.integrals.values(points, points.__class__.log_integral, globals_, start).values
    shared = target.integrals.density.shared_at(globals_, locals_[0])
    torch.testing.assert_close(found.sum(-1) + shared, whole, rtol=1e-6, atol=1e-6)


def test_what_cannot_be_recorded_is_run_for_each_draw(monkeypatch):
    result = fit(poisson, guide_for(poisson), poisson_counts(6), objective=MarginalLaplace())
    draws = result.posterior.sample_unconstrained(5)
    recorded = evaluated(ConditionalLikelihood(), result, *draws)["z"].values

    def refuse(*args):
        raise RecordingError("there is Python in it")

    monkeypatch.setattr(pointwise, "record", refuse)
    torch.testing.assert_close(evaluated(ConditionalLikelihood(), result, *draws)["z"].values, recorded)


# -------------------------------------------------------------------------------------------------------- leave one out


def exact_loo(z, noise=1.0):
    """Log densities of each of ``z`` given the others: all of them are normal."""
    n = len(z)
    covariance = (1 + noise**2) * torch.eye(n) + torch.ones(n, n)
    precision = torch.linalg.inv(covariance)
    variance = 1 / precision.diagonal()
    return dist.Normal(z - variance * (precision @ z), variance.sqrt()).log_prob(z)


def precise(z):
    """Observations that say more of a unit than the hierarchy does."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        pyro.sample("z", dist.Normal(y, 0.5), obs=z)


@pytest.mark.parametrize("objective", [FixedDrawELBO(), MarginalLaplace(), Ladder()])
def test_a_unit_left_out(objective):
    result = fit(precise, guide_for(precise), Z, objective=objective)
    found, k_hat = loo(result, MarginalLikelihood())
    torch.testing.assert_close(found, exact_loo(Z, 0.5), rtol=0, atol=0.02)
    assert k_hat.max() < 0.7


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_an_observation_left_out_has_heavy_tails():
    """Why the likelihood of units is the default: this one says that it fails, and it does."""
    result = fit(precise, guide_for(precise), Z, objective=MarginalLaplace())
    found, k_hat = loo(result, ConditionalLikelihood())
    assert k_hat.max() > 0.7
    assert (found - exact_loo(Z, 0.5)).abs().max() > 0.1


def offset(z, x):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    tau = pyro.sample("tau", dist.LogNormal(-1.0, 1.0))
    with pyro.plate("units", z.shape[-1], dim=-1):
        y = pyro.sample("y", dist.Normal(mu + x, tau))
        with pyro.plate("counts", z.shape[-2], dim=-2):
            pyro.sample("z", dist.Poisson(y.exp()), obs=z)


@pytest.mark.parametrize("true", ["with", "without"])
def test_compare_picks_the_model_that_the_data_are_from(true):
    """By 60 units of which the mean varies with a covariate or does not: the wrong model loses more than 10."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, generator=generator)
    effects = {"with": 0.7 * x, "without": torch.zeros(60)}
    y = 1.0 + effects[true] + 0.4 * torch.randn(60, generator=generator)
    z = torch.poisson(y.exp().expand(3, -1), generator=generator)
    found = {
        name: fit(offset, guide_for(offset), z, effect, objective=MarginalLaplace()).to_arviz(prior_samples=0)
        for name, effect in effects.items()
    }
    table = arviz_stats.compare(found)
    assert table.index[0] == true
    assert table["elpd"].iloc[0] > table["elpd"].iloc[1] + 10


# --------------------------------------------------------------------------------------------------------------- errors


def test_rules_of_rungs():
    z = poisson_counts(10)
    for objective, expected in (
        (FixedDrawELBO(max_draws=16), GaussHermite(9)),
        (NestedELBO(max_draws=16), GaussHermite(9)),
        (MarginalLaplace(), Laplace()),
        (MarginalQuadrature(GaussHermite(5)), GaussHermite(5)),
    ):
        assert rule_of(fit(poisson, guide_for(poisson), z, objective=objective).posterior) == expected


def test_units_that_have_no_likelihoods_of_their_own(monkeypatch):
    result = fit(gaussian, guide_for(gaussian), Z, objective=FixedDrawELBO())

    def refuse(self, *args):
        raise StructureError("element 3 of site 'z' depends on 2 units")

    monkeypatch.setattr(type(result.problem), "integrals_of", refuse)
    with pytest.raises(StructureError, match=r"depends on 2 units\n.*\n    to_arviz\(log_likelihood=Conditional"):
        result.to_arviz()
    assert result.to_arviz(log_likelihood=ConditionalLikelihood())["log_likelihood"]["z"].shape == (1, 1000, 6)


def test_a_lost_mode_is_no_silent_nan(monkeypatch):
    result = fit(gaussian, guide_for(gaussian), Z, objective=MarginalLaplace())
    _, original = result.posterior, UnitIntegrals.conditionals

    def lost(self, globals_, start):
        there = original(self, globals_, start)
        found = there.found.clone()
        found[-1, 2] = False
        return there._replace(found=found)

    monkeypatch.setattr(UnitIntegrals, "conditionals", lost)
    globals_, locals_ = result.posterior.sample_unconstrained(2)
    draws = globals_ + 0.1, locals_  # where no modes are known yet
    with pytest.raises(ModeNotFoundError, match="the mode of unit 2 of plate 'units'") as raised:
        evaluated(MarginalLikelihood(), result, *draws)
    assert raised.value.units == [2]


def test_factors_are_no_observations():
    result = fitted("with_factors")
    with pytest.raises(ModelError, match="no observed site, only factors"):
        result.to_arviz(log_likelihood=ConditionalLikelihood())
    values = evaluated(MarginalLikelihood(), result, *result.posterior.sample_unconstrained(2))["marginal"].values
    assert math.isfinite(float(values.sum()))


def test_observations_of_a_model_that_takes_many_draws_at_once(monkeypatch):
    def refused(*args):
        raise RecordingError("switched off")

    found = []
    for off in (False, True):
        if off:
            monkeypatch.setattr("laplace_amort.model.UnitModel.recorded", refused)
            monkeypatch.setattr("laplace_amort.posterior.likelihood.record", refused)
        pyro.clear_param_store()
        z = torch.tensor([1.0, 3.0, -0.5, 2.0])
        result = fit(gaussian, guide_for(gaussian), z, objective=MarginalLaplace(), progress=False)
        assert bool(result.problem.unit_model.points) == off
        draws = result.posterior.sample_unconstrained(5)
        found.append(ConditionalLikelihood().evaluate(result.posterior, ["z"], *draws)["z"].values)
    torch.testing.assert_close(*found)
    assert found[0].shape == (5, 4)
