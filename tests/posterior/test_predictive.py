"""Predictions, against closed forms where all is normal, and against sums over a grid where it is not.

Averages of S draws are compared within LIMIT standard errors, which a right answer exceeds with a probability of 4e-9
each; in some 200 comparisons another seed would raise a false alarm with a probability of 1e-6.
"""

import math

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.ecosystem import fitted
from helpers.fit_models import gaussian, guide_for, poisson, poisson_counts, subsampled
from helpers.posteriors import LIMIT
from helpers.unit_models import UNIT_MODELS
from pyro.infer import Predictive

from laplace_amort import (
    ClosedFormMode,
    ConditionedUnits,
    FixedDrawELBO,
    FreeMode,
    Ladder,
    MarginalLaplace,
    MarginalQuadrature,
    ModelError,
    NestedELBO,
    NewUnits,
    SeenUnits,
    Stochastic,
    fit,
)

Z = torch.tensor([1.0, 3.0, -0.5, 2.0], dtype=torch.float64)
NEW = torch.tensor([5.0, -4.0, 0.0], dtype=torch.float64)
DRAWS = 4000
OBJECTIVES = {
    "ELBO": FixedDrawELBO(),
    "nested ELBO": NestedELBO(),
    "Laplace": MarginalLaplace(),
    "quadrature": MarginalQuadrature(),
    "ladder": Ladder(),
}


def shifted(z, x):
    """The normal hierarchy with a covariate, for as many units as that has values."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(x)):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        pyro.sample("z", dist.Normal(y + x, 1.0), obs=z)


def trials(z, total):
    """Binomial counts, with a function of a latent."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(total)):
        y = pyro.sample("y", dist.Normal(mu, 0.7))
        pyro.deterministic("share", y.sigmoid())
        pyro.sample("z", dist.Binomial(total, logits=y), obs=z)


def exact():
    """Mean and variance of ``mu``, and those of ``y``, given Z."""
    precision = 1 + len(Z) / 2
    mean, variance = Z.sum() / 2 / precision, 1 / precision
    return mean, variance, (mean + Z) / 2, variance / 4 + 0.5


@pytest.fixture(scope="module")
def result():
    torch.set_default_dtype(torch.float64)
    return fit(shifted, guide_for(shifted), Z, torch.zeros(4), objective=MarginalLaplace())


def assert_moments(draws, mean, variance):
    off, number = draws - mean, len(draws)
    assert (off.mean(0).abs() <= LIMIT * (variance / number) ** 0.5).all()
    assert ((off**2).mean(0) / variance - 1).abs().max() <= LIMIT * (2 / number) ** 0.5


# ----------------------------------------------------------------------------------------------------------- seen units


@pytest.mark.parametrize(("parallel", "number"), [(False, 500), (True, DRAWS)])
def test_seen_units_at_their_data(result, parallel, number):
    _, _, mean, variance = exact()
    drawn = result.predictive(num_samples=number, parallel=parallel)()
    assert list(drawn) == ["z"]
    assert_moments(drawn["z"], mean, variance + 1)


def test_seen_units_at_other_covariates(result):
    _, _, mean, variance = exact()
    x = torch.tensor([10.0, -10.0, 0.0, 5.0])
    drawn = result.predictive(SeenUnits(), num_samples=DRAWS, parallel=True)(None, x)
    assert_moments(drawn["z"], mean + x, variance + 1)


@pytest.mark.parametrize("index", [[2], [3, 0], torch.tensor([1, 1, 1, 1, 1])])
def test_some_of_the_seen_units(result, index):
    _, _, mean, variance = exact()
    x = 3.0 * torch.arange(len(index))
    predictive = result.predictive(SeenUnits(index), num_samples=DRAWS, parallel=True)
    everything = result.posterior.sample(DRAWS)
    assert torch.equal(predictive.posterior_samples["y"], everything["y"][:, index])
    assert_moments(predictive(None, x)["z"], mean[index] + x, variance + 1)


def test_functions_of_latents_are_drawn_too():
    total = torch.tensor([5.0, 8.0, 3.0])
    result = fit(trials, guide_for(trials), torch.tensor([1.0, 8.0, 2.0]), total, objective=MarginalLaplace())
    for parallel in (False, True):
        predictive = result.predictive(num_samples=50, parallel=parallel)
        drawn = predictive(None, 100 * total)
        torch.testing.assert_close(drawn["share"], predictive.posterior_samples["y"].sigmoid())
        assert drawn["z"].shape == (50, 3)
        assert (drawn["z"] <= 100 * total).all()
        assert (drawn["z"] > total).any()


@pytest.mark.parametrize("parallel", [False, True])
def test_pyros_predictive_takes_the_draws_as_they_are(result, parallel):
    samples = result.posterior.sample(60)
    drawn = Predictive(shifted, posterior_samples=samples, parallel=parallel)(None, torch.zeros(4))
    assert drawn["z"].shape == (60, 4)
    far = Predictive(shifted, posterior_samples=samples, parallel=parallel)(None, torch.full((4,), 1e6))
    assert (far["z"] > 9e5).all()


# ------------------------------------------------------------------------------------------------------------ new units


@pytest.mark.parametrize("number", [1, 7])
def test_new_units(result, number):
    mean, variance, _, _ = exact()
    drawn = result.predictive(NewUnits(), num_samples=DRAWS, parallel=True)(None, torch.zeros(number))
    assert set(drawn) == {"y", "z"}
    assert drawn["y"].shape == (DRAWS, number)
    assert_moments(drawn["y"], mean, variance + 1)
    assert_moments(drawn["z"], mean, variance + 2)


def test_new_units_share_their_globals(result):
    _, variance, _, _ = exact()
    drawn = result.predictive(NewUnits(), num_samples=DRAWS, parallel=True)(None, torch.zeros(2))
    covariance = torch.cov(drawn["y"].mT)[0, 1]
    spread = ((1 + variance) ** 2 + variance**2) ** 0.5  # of a product of two normal variables
    assert abs(float(covariance - variance)) <= LIMIT * spread / DRAWS**0.5


# -------------------------------------------------------------------------------------------------- new units with data


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_new_units_given_their_data(objective):
    result = fit(gaussian, guide_for(gaussian), Z, objective=OBJECTIVES[objective])
    mean, variance, _, _ = exact()
    posterior = result.posterior_for(NEW)
    sd = (variance / 4 + 0.5) ** 0.5
    assert ((posterior.mean()["y"] - (mean + NEW) / 2) / sd).abs().max() < 0.03
    assert (posterior.std()["y"] / sd - 1).abs().max() < 0.03
    assert float(abs(posterior.mean()["mu"] - mean)) < 0.03 * variance**0.5  # the globals do not move


@pytest.mark.parametrize("mode", [ClosedFormMode(lambda sites, z: {"y": (sites["mu"] + z) / 2}), FreeMode()])
def test_new_units_whatever_finds_the_modes(mode):
    result = fit(gaussian, guide_for(gaussian, mode=mode), Z)
    mean, variance, _, _ = exact()
    posterior = result.posterior_for(NEW)
    assert ((posterior.mean()["y"] - (mean + NEW) / 2).abs() < 0.03 * (variance / 4 + 0.5) ** 0.5).all()


@pytest.mark.parametrize("objective", [FixedDrawELBO(), MarginalLaplace()])
def test_more_draws_are_those_of_the_fit(objective):
    result = fit(gaussian, guide_for(gaussian), Z, objective=objective)
    posterior = result.posterior_for(NEW).refined(2000)
    assert len(posterior.globals_.draws) >= 2000
    mean, variance, _, _ = exact()
    assert float(abs(posterior.mean()["mu"] - mean)) < 0.03 * variance**0.5
    assert len(posterior.refined(10).globals_.draws) >= 2000


def test_predictions_of_new_units_given_their_data(result):
    mean, variance, _, _ = exact()
    units = ConditionedUnits.at(NEW, torch.zeros(3))
    for args, x in (((), torch.zeros(3)), ((None, 10 * torch.ones(3)), 10 * torch.ones(3))):
        drawn = result.predictive(units, num_samples=DRAWS, parallel=True)(*args)
        assert_moments(drawn["z"], (mean + NEW) / 2 + x, variance / 4 + 1.5)


def test_the_posterior_of_new_units_predicts_them(result):
    """Without arguments, at the data that it was given; and others than these as the posterior of the fit does."""
    mean, variance, _, _ = exact()
    posterior = result.posterior_for(NEW, torch.ones(3))
    drawn = posterior.predictive(num_samples=DRAWS, parallel=True)()
    assert_moments(drawn["z"], (mean + NEW - 1) / 2 + 1, variance / 4 + 1.5)
    units = ConditionedUnits.at(NEW, torch.ones(3))
    for given in (units, NewUnits()):
        one, other = (
            holder.predictive(given, num_samples=20, seed=3).posterior_samples for holder in (posterior, result)
        )
        for name in other:  # the modes are found from other starts, as exactly as modes are
            torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-6)


def test_new_units_against_sums_over_a_grid():
    z, new = poisson_counts(30), poisson_counts(5, seed=3)
    result = fit(poisson, guide_for(poisson), z, objective=MarginalQuadrature())
    posterior = result.posterior_for(new)
    globals_, weights = posterior.globals_.draws, posterior.globals_.weights
    grid = numpy.linspace(-8, 8, 4001)
    y = globals_[:, :1] + numpy.exp(globals_[:, 1:]) * grid
    first, second = [], []
    for counts in new.T.numpy():
        log_density = -(grid**2) / 2 + counts.sum() * y - 3 * numpy.exp(y)
        share = numpy.exp(log_density - log_density.max(1, keepdims=True))
        share *= weights[:, None] / share.sum(1, keepdims=True)
        first.append((share * y).sum())
        second.append((share * y**2).sum())
    mean, sd = numpy.array(first), numpy.sqrt(numpy.array(second) - numpy.array(first) ** 2)
    assert numpy.abs((posterior.mean()["y"].numpy() - mean) / sd).max() < 2e-3
    assert numpy.abs(posterior.std()["y"].numpy() / sd - 1).max() < 2e-3


@pytest.mark.parametrize("name", UNIT_MODELS)
def test_every_model(name):
    """Its units are predicted; as new ones with the same data they are what they were, and the guide is left alone."""
    result, case = fitted(name), UNIT_MODELS[name]()
    drawn = result.predictive(num_samples=3)()
    assert not set(result.problem.unit_model.density.sites) & set(drawn)
    assert all(len(value) == 3 and value.isfinite().all() for value in drawn.values())
    assert drawn or name == "with_factors"
    before = [part.clone() for part in result.guide._warm_start.state()]
    again, known = (one.thinned(32) for one in (result.posterior_for(*case.args, **case.kwargs), result.posterior))
    assert all(torch.equal(one, other) for one, other in zip(before, result.guide._warm_start.state(), strict=True))
    for site, sd in known.std().items():
        assert ((again.mean()[site] - known.mean()[site]).abs() <= 1e-3 * sd + 1e-9).all(), site
        assert ((again.std()[site] - sd).abs() <= 1e-3 * sd + 1e-9).all(), site


def test_no_loop_over_draws(monkeypatch):
    """The modes of new units at all draws are found together, once for each of the globals that are drawn."""
    from laplace_amort.units.integrals import UnitIntegrals

    calls, original = [], UnitIntegrals.conditionals

    def counted(self, globals_, start):
        calls.append(len(globals_))
        return original(self, globals_, start)

    result = fit(gaussian, guide_for(gaussian), Z, objective=MarginalLaplace())
    _ = result.posterior
    monkeypatch.setattr(UnitIntegrals, "conditionals", counted)
    result.posterior_for(NEW).sample(1000)
    assert len(calls) == 1
    assert calls[0] == len(result.posterior.globals_.draws)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("parallel", [False, True])
def test_another_number_of_units(result, parallel):
    with pytest.raises(ModelError) as raised:
        result.predictive(num_samples=5, parallel=parallel)(None, torch.zeros(6))
    message = str(raised.value)
    assert "plate 'units' around site 'y' has size 6 at these arguments, and there are draws of 4 units" in message
    assert "result.predictive(NewUnits())(*args)" in message
    assert "index has 6 numbers" in message


def test_another_number_than_the_index_has(result):
    with pytest.raises(ModelError, match="has size 4 at these arguments, and there are draws of 2 units"):
        result.predictive(SeenUnits([0, 1]), num_samples=5)()


@pytest.mark.parametrize("index", [[4], [-1, 0], []])
def test_units_that_there_are_not(result, index):
    with pytest.raises(IndexError, match="units of plate 'units' are numbered 0 to 3, got"):
        result.predictive(SeenUnits(index), num_samples=5)


@pytest.mark.parametrize("units", [SeenUnits, "seen", None])
def test_units_must_be_an_object(result, units):
    with pytest.raises(TypeError, match=r"units must be SeenUnits\(\), NewUnits\(\)"):
        result.predictive(units)


def test_a_site_that_is_missing(result):
    def model(z, x, forget=False):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("units", len(x)):
            y = mu.expand(len(x)) if forget else pyro.sample("y", dist.Normal(mu, 1.0))
            pyro.sample("z", dist.Normal(y, 1.0), obs=z)

    found = fit(model, guide_for(model), Z, torch.zeros(4), objective=MarginalLaplace())
    with pytest.raises(ModelError, match="the model has no site 'y' at these arguments"):
        found.predictive(num_samples=3)(None, torch.zeros(4), forget=True)
    assert set(found.predictive(NewUnits(), num_samples=3)(None, torch.zeros(2), forget=True)) == {"z"}
    with pytest.raises(ModelError, match="no latent site lies in a plate"):
        found.posterior_for(NEW, torch.zeros(3), forget=True)


def test_another_plate_of_globals():
    def model(z, items):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("items", items, dim=-2):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("units", z.shape[-1], dim=-1):
            y = pyro.sample("y", dist.Normal(mu, 1.0))
            with pyro.plate("answers", items, dim=-2):
                pyro.sample("z", dist.Normal(y + level, 1.0), obs=z)

    z = torch.randn(2, 5)
    result = fit(model, guide_for(model, unit_plate="units"), z, 2, objective=MarginalLaplace())
    with pytest.raises(
        ModelError, match=r"plate 'items' around site 'level' has size 3 .* only the plate of the units"
    ):
        result.predictive(NewUnits(), num_samples=3)(torch.randn(3, 4), 3)
    with pytest.raises(ModelError, match="the model has other latents at these arguments than in the fit"):
        result.posterior_for(torch.randn(3, 4), 3)


def test_new_units_without_globals_or_data():
    with pytest.raises(ModelError, match="the model has no globals"):
        fitted("without_globals").predictive(NewUnits())
    result = fit(trials, guide_for(trials), torch.tensor([1.0, 2.0]), torch.tensor([3.0, 3.0]))
    with pytest.raises(ModelError, match=r"needs the data of the new units; .*\n    result.predictive\(NewUnits"):
        result.posterior_for(None, torch.ones(2))


def test_minibatches():
    """Nothing is known of all units at once; but new ones may have data."""
    z = torch.poisson(torch.ones(20))
    objective = Stochastic(window=20, max_steps=20)
    result = fit(subsampled, guide_for(subsampled), z, size=5, objective=objective, progress=False)
    for refused in (result.predictive, result.to_arviz):
        with pytest.raises(ModelError, match="the model takes 5 of 20 units of plate 'units' at a time"):
            refused()
    with pytest.raises(ModelError, match="plate 'units' takes 2 of 4 units at these arguments"):
        result.posterior_for(z[:4], size=2)
    posterior = result.posterior_for(z, size=None)
    assert posterior.mean()["y"].shape == (20,)
    assert posterior.predictive(num_samples=3)()["z"].shape == (3, 20)
    assert posterior.to_arviz(num_samples=3, prior_samples=0)["posterior"]["y"].shape == (1, 3, 20)
    drawn = result.predictive(NewUnits(), num_samples=4)(z[:3], size=None)
    assert drawn["z"].shape == (4, 3)
    with pytest.raises(ModelError, match="takes 2 of 20 at these arguments; a prediction is for all"):
        result.predictive(ConditionedUnits.at(z, size=None), num_samples=2)(z, size=2)


# ------------------------------------------------------------------------------------------------------------- the rest


def test_float32():
    torch.set_default_dtype(torch.float32)
    z = Z.float()
    result = fit(gaussian, guide_for(gaussian), z, objective=MarginalLaplace())
    assert result.predictive(num_samples=5)()["z"].dtype == torch.float32
    posterior = result.posterior_for(NEW.float())
    assert posterior.mean()["y"].dtype == torch.float32
    mean, variance, _, _ = exact()
    assert ((posterior.mean()["y"].double() - (mean + NEW) / 2).abs() < 0.03 * math.sqrt(variance / 4 + 0.5)).all()


def test_draws_are_those_of_a_seed(result):
    first, same, other = (result.predictive(num_samples=20, seed=seed).posterior_samples["y"] for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
