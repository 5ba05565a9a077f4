"""Fits of which data are missing: the posterior is that of what is there, however it is said."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.missing import NUM_UNITS, SEEN, beside, covariate, covariate_data, drawn, holed, nested

from laplace_amort import (
    AutoLaplaceFamily,
    FixedDrawELBO,
    Ladder,
    LogJoint,
    MarginalLaplace,
    MarginalQuadrature,
    Stochastic,
    diagnose,
    fit,
)


def fitted(model, *args, objective=None, **options):
    pyro.clear_param_store()
    guide, objective = AutoLaplaceFamily(model, **options), objective or MarginalLaplace()
    return fit(model, guide, *args, objective=objective, progress=False)


def assert_same(found, expected, names=None):
    assert found.status.ok
    assert float(found.objective) == pytest.approx(float(expected.objective), abs=1e-6)
    for moments in ("mean", "std"):
        mine, theirs = getattr(found.posterior, moments)(), getattr(expected.posterior, moments)()
        for name in names or theirs:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [nested, beside])
@pytest.mark.parametrize("kind", ["normal", "bernoulli", "gamma"])
def test_what_is_hidden_is_left_out(kind, model):
    values = drawn(kind)
    expected = fitted(model, kind, "mask", values)
    for how in ("obs_mask", "poutine"):
        assert_same(fitted(model, kind, how, holed(values)), expected)


@pytest.mark.parametrize("objective", [FixedDrawELBO(), Ladder(), MarginalQuadrature()])
def test_with_every_objective(objective):
    values = drawn("poisson")
    expected = fitted(nested, "poisson", "mask", values, objective=objective)
    assert_same(fitted(nested, "poisson", "obs_mask", holed(values), objective=objective), expected)


def test_in_single_precision():
    torch.set_default_dtype(torch.float32)
    values = drawn("gamma").float()
    expected = fitted(nested, "gamma", "mask", values)
    found = fitted(nested, "gamma", "obs_mask", holed(values))
    assert_same(found, expected)
    assert found.posterior.mean()["mu"].dtype is torch.float32


@pytest.mark.parametrize("objective", [MarginalLaplace(), Ladder()])
def test_a_covariate_that_is_imputed_is_integrated_over(objective):
    """All of it is Gaussian given the globals, so that the integral is known."""
    x, z = covariate_data()
    expected = fitted(covariate, "integrated", x, z, objective=objective)
    found = fitted(covariate, "obs_mask", holed(x), z, objective=objective)
    assert_same(found, expected)
    assert found.posterior.log_evidence == pytest.approx(float(expected.posterior.log_evidence), abs=1e-5)
    mean, std = found.posterior.mean()["x_unobserved"], found.posterior.std()["x_unobserved"]
    torch.testing.assert_close(mean[SEEN], x[SEEN])
    assert (std[SEEN] < 1e-6).all()
    assert (std[~SEEN] > 0.1).all()


def test_nothing_that_is_said_of_what_is_hidden_moves_a_posterior():
    values = drawn("normal")
    first = fitted(nested, "normal", "obs_mask", torch.where(SEEN, values, 0.0))
    second = fitted(nested, "normal", "obs_mask", torch.where(SEEN, values, 1e6))
    assert float(first.objective) == float(second.objective)


def test_units_of_which_nothing_is_seen():
    values, seen = drawn("poisson"), SEEN.clone()
    seen[2] = False
    found = fitted(nested, "poisson", "obs_mask", holed(values, seen), seen)
    assert_same(found, fitted(nested, "poisson", "mask", values, seen))
    mean, std = found.posterior.mean(), found.posterior.std()
    assert float(mean["y"][2]) == pytest.approx(float(mean["mu"]), abs=0.01)
    assert float(std["y"][2]) > float(std["y"][3])


def test_globals_of_which_a_part_is_observed():
    """No unit has a part in it, and what is hidden may be discrete."""

    def model(how):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        rate = dist.Poisson((mu + torch.zeros(3)).exp())
        counts, seen = torch.tensor([2.0, torch.nan, 1.0]), torch.tensor([True, False, True])
        with pyro.plate("counts", 3):
            if how == "obs_mask":
                pyro.sample("w", rate, obs=counts, obs_mask=seen)
            else:
                pyro.sample("w", rate.mask(seen), obs=counts.nan_to_num())
        with pyro.plate("units", 6):
            y = pyro.sample("y", dist.Normal(mu, 1.0))
            pyro.sample("z", dist.Normal(y, 1.0), obs=torch.linspace(-1.0, 2.0, 6))

    assert_same(fitted(model, "obs_mask", unit_plate="units"), fitted(model, "mask", unit_plate="units"))


@pytest.mark.parametrize("how", ["obs_mask", "poutine", "mask"])
def test_many_points_at_once_of_a_model_that_is_not_recorded(how):
    guide = AutoLaplaceFamily(nested)
    model = guide.unit_model("poisson", how, holed(drawn("poisson")))
    global_, local = torch.tensor([0.3, -0.2]), torch.linspace(-1.0, 1.0, NUM_UNITS).unsqueeze(-1)
    together = model.at_once(global_, local)
    found = together.many.at(torch.stack([global_, 0 * global_]), torch.stack([local, 0 * local]))
    expected = [model.log_joint(global_, local), model.log_joint(0 * global_, 0 * local)]
    torch.testing.assert_close(found, torch.stack(expected))


def minibatches(how, values, size):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 2.0)), pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("units", NUM_UNITS, subsample_size=size, dim=-2) as index:
        y = pyro.sample("y", dist.Normal(mu, tau))
        with pyro.plate("visits", 4, dim=-1):
            rate = dist.Poisson((y + torch.zeros(4)).exp())
            if how == "obs_mask":
                pyro.sample("z", rate, obs=values[index], obs_mask=SEEN[index])
            else:
                pyro.sample("z", rate.mask(SEEN[index]), obs=values[index])


def test_minibatches():
    values = drawn("poisson")
    indices = {"units": torch.tensor([1, 6, 3])}
    found = LogJoint.at_indices(indices, minibatches, "obs_mask", holed(values), 3)
    expected = LogJoint.at_indices(indices, minibatches, "mask", values, 3)
    point = torch.linspace(-1.0, 1.0, 5)
    torch.testing.assert_close(found(point), expected(point))
    result = fitted(minibatches, "obs_mask", holed(values), 4, objective=Stochastic(window=20, max_steps=20))
    assert torch.isfinite(torch.as_tensor(result.objective))


def test_a_diagnosis_knows_what_is_missing():
    """Data that are drawn are missing where those of the fit are."""
    values = drawn("normal")
    reports = [
        str(diagnose(fitted(nested, "normal", how, data)))
        for how, data in (("mask", values), ("obs_mask", holed(values)))
    ]
    assert "simulated scores  good" in reports[1]
    assert reports[0] == reports[1]


def test_one_of_missing_numbers_alone():
    def model(how, z):
        mu, tau = pyro.sample("mu", dist.Normal(0.0, 1.0)), pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(mu, tau))
            loc, covariance = y.unsqueeze(-1) + torch.zeros(3), torch.eye(3) + 0.5
            if how == "nan":
                pyro.sample("z", dist.NanMaskedMultivariateNormal(loc, covariance), obs=z)
            elif how == "normal":
                pyro.sample("z", dist.NanMaskedNormal(loc, 1.0).to_event(1), obs=z)
            else:
                pyro.sample("z", dist.Normal(loc, 1.0).mask(~z.isnan()).to_event(1), obs=z.nan_to_num())

    z = (
        torch.randn(10, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        + torch.arange(10.0)[:, None] / 5
    )
    missing = torch.where(torch.rand(10, 3, generator=torch.Generator().manual_seed(1)) > 0.3, z, torch.nan)
    assert_same(fitted(model, "normal", missing), fitted(model, "mask", missing))
    result = fitted(model, "nan", missing)
    assert result.status.ok
    live = LogJoint(model, "nan", missing)
    drawn_data = live.draw_data({"mu": torch.tensor(0.0), "tau": torch.tensor(1.0)})["z"]
    assert torch.equal(drawn_data.isnan(), missing.isnan())
