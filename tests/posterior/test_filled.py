"""Sites of which a part is hidden, filled in: what was seen as it is, what was not drawn from its predictive."""

import arviz_stats
import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.missing import NUM_UNITS, NUM_VISITS, SEEN, covariate, covariate_data, drawn, holed, nested

from laplace_amort import AutoLaplaceFamily, ConditionalLikelihood, MarginalLaplace, NewUnits, fit

FEW = {"num_samples": 30, "prior_samples": 10}


def fitted(model, *args):
    pyro.clear_param_store()
    return fit(model, AutoLaplaceFamily(model), *args, objective=MarginalLaplace(), progress=False)


@pytest.fixture(scope="module")
def counts():
    torch.set_default_dtype(torch.float64)
    return fitted(nested, "poisson", "obs_mask", holed(drawn("poisson")))


@pytest.fixture(scope="module")
def imputed():
    torch.set_default_dtype(torch.float64)
    x, z = covariate_data()
    return fitted(covariate, "obs_mask", holed(x), z)


def test_what_was_seen_is_there_and_what_was_not_is_drawn(counts):
    z = counts.posterior.sample(200)["z"]
    assert z.shape == (200, NUM_UNITS, NUM_VISITS)
    assert torch.equal(z[:, SEEN], drawn("poisson")[SEEN].expand(200, -1))
    assert dist.constraints.nonnegative_integer.check(z).all()
    assert (z[:, ~SEEN].std(0) > 0).all()


def test_it_is_drawn_from_its_predictive(counts):
    """Counts given the rates of the same draws: standardized, their mean and variance are those of a Poisson."""
    found = counts.posterior.sample(2000)
    rate = found["y"].exp().expand_as(found["z"])
    scaled = ((found["z"] - rate) / rate.sqrt())[:, ~SEEN]
    # Independent over draws: a mean of 0 with a standard error of 1 / sqrt(number), within five of which it stays.
    assert abs(float(scaled.mean())) < 5 / scaled.numel() ** 0.5
    assert float(scaled.var()) == pytest.approx(1.0, abs=0.15)


def test_draws_are_those_of_a_seed_and_leave_the_generator_alone(counts):
    before = torch.random.get_rng_state()
    first, same, other = (counts.posterior.sample(5, seed)["z"] for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_model_without_has_its_latents_alone(counts):
    plain = fitted(nested, "poisson", "mask", drawn("poisson"))
    assert list(plain.posterior.sample(3)) == ["mu", "tau", "y"]
    latents = counts.posterior.sample_latents(3)
    assert list(latents) == ["mu", "tau", "y"]
    assert set(counts.posterior.quantiles([0.5], 20)) == set(latents)


def test_an_imputed_covariate_is_the_one_that_the_answers_know(imputed):
    found = imputed.posterior.sample(300)
    x, _ = covariate_data()
    assert torch.equal(found["x"], found["x_unobserved"])
    assert torch.equal(found["x"][:, SEEN], x[SEEN].expand(300, -1))
    answered = ~SEEN.roll(1, 0) & ~SEEN  # its answer is there, and says something of it
    assert answered.any()
    assert (imputed.posterior.std()["x_unobserved"][answered] < imputed.posterior.mean()["spread"]).all()


def test_a_prediction_has_the_whole_of_it_drawn_anew(counts):
    found = counts.predictive(num_samples=50)()
    assert set(found) == {"z_observed", "z"}
    assert (found["z"][:, SEEN] != drawn("poisson")[SEEN]).any(0).all()
    new = counts.predictive(NewUnits(), num_samples=5)("poisson", "obs_mask", holed(drawn("poisson")))
    assert new["z"].isfinite().all()


def test_new_units_with_missing_data(counts):
    seen = SEEN.roll(2, 0)
    values = holed(drawn("poisson"), seen)
    found = counts.posterior.posterior_for("poisson", "obs_mask", values, seen)
    expected = counts.posterior.posterior_for("poisson", "mask", drawn("poisson"), seen)
    torch.testing.assert_close(found.mean()["y"], expected.mean()["y"])
    z = found.sample(10)["z"]
    assert torch.equal(z[:, seen], values[seen].expand(10, -1))


def test_what_arviz_is_given(counts):
    made = counts.to_arviz(**FEW, log_likelihood=ConditionalLikelihood())
    z, predicted = made["posterior"]["z"], made["posterior_predictive"]["z_observed"]
    assert z.dims == predicted.dims == ("chain", "draw", "units", "visits")
    seen = SEEN.numpy()
    assert (z.values[0][:, seen] == drawn("poisson").numpy()[seen]).all()
    assert numpy.array_equal(z.values[0], counts.posterior.refined(30).sample(30)["z"].numpy())
    assert (predicted.values[0][:, seen] != drawn("poisson").numpy()[seen]).any()
    assert numpy.isfinite(predicted.values).all()
    observed = made["observed_data"]["z_observed"].values
    assert numpy.array_equal(numpy.isnan(observed), ~seen)
    assert (observed[seen] == drawn("poisson").numpy()[seen]).all()
    assert made["prior"]["z"].shape == (1, 10, NUM_UNITS, NUM_VISITS)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")  # of so few draws
@pytest.mark.parametrize("how", ["obs_mask", "poutine", "mask"])
def test_the_likelihood_is_that_of_what_is_seen(how):
    values = drawn("poisson")
    result = fitted(nested, "poisson", how, holed(values))
    made = result.to_arviz(**FEW, log_likelihood=ConditionalLikelihood())
    name = "z_observed" if how == "obs_mask" else "z"
    found = made["log_likelihood"][name]
    assert found.dims == ("chain", "draw", f"{name}_seen")
    assert numpy.array_equal(found[f"{name}_seen"].values, SEEN.flatten().nonzero().squeeze(-1).numpy())
    rate = torch.as_tensor(made["posterior"]["y"].values[0].copy()).exp()
    expected = dist.Poisson(rate).log_prob(values)[:, SEEN]
    torch.testing.assert_close(torch.as_tensor(found.values[0].copy()), expected)
    assert arviz_stats.loo(made).n_data_points == int(SEEN.sum())


def test_of_numbers_that_say_themselves_that_they_are_missing():
    def model(z):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(mu, 1.0))
            pyro.sample("z", dist.NanMaskedNormal(y.unsqueeze(-1) + torch.zeros(2), 1.0).to_event(1), obs=z)

    z = torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan], [0.0, 2.0]], dtype=torch.float64)
    made = fitted(model, z).to_arviz(**FEW, log_likelihood=ConditionalLikelihood())
    assert made["log_likelihood"]["z"].shape == (1, 30, 2)  # of the second nothing is there
    assert numpy.array_equal(made["observed_data"]["z"].values, z.numpy(), equal_nan=True)
    assert "constant_data" not in made.children


def test_frames_of_units_have_what_was_seen(imputed):
    frame = imputed.posterior.units_to_frame(num_samples=50).query("site == 'x_unobserved'")
    x, _ = covariate_data()
    seen = SEEN.flatten().numpy()
    assert frame["mean"].to_numpy()[seen] == pytest.approx(x.flatten().numpy()[seen])
    assert (frame["sd"].to_numpy()[seen] < 1e-6).all()
    assert (frame["sd"].to_numpy()[~seen] > 0.1).all()
