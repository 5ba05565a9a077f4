"""What ArviZ is given: groups, dimensions, attributes, and the same again after a file."""

import builtins
import importlib.metadata

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from helpers.ecosystem import fitted
from helpers.fit_models import gaussian, guide_for, poisson, poisson_counts

from laplace_amort import (
    ConditionalLikelihood,
    FixedDrawELBO,
    Ladder,
    MarginalLaplace,
    MarginalQuadrature,
    ModelError,
    fit,
)

Z = torch.tensor([1.0, 3.0, -0.5, 2.0], dtype=torch.float64)
GROUPS = ["posterior", "posterior_predictive", "prior", "prior_predictive", "observed_data", "log_likelihood"]
FEW = {"num_samples": 40, "prior_samples": 10}


def names_of_groups(made):
    return [name.strip("/") for name in made.groups if name != "/"]


def dims(made, group, name):
    return tuple(made[group][name].dims)


@pytest.fixture(scope="module")
def result():
    torch.set_default_dtype(torch.float64)
    return fit(poisson, guide_for(poisson), poisson_counts(6), objective=MarginalLaplace())


# --------------------------------------------------------------------------------------------------------------- groups


def test_groups_and_dimensions(result):
    made = result.to_arviz(**FEW)
    assert sorted(names_of_groups(made)) == sorted(GROUPS)
    draws = ("chain", "draw")
    assert {name: dims(made, "posterior", name) for name in made["posterior"].data_vars} == {
        "mu": draws,
        "tau": draws,
        "y": (*draws, "units"),
    }
    assert dims(made, "posterior_predictive", "z") == (*draws, "counts", "units")
    assert dims(made, "observed_data", "z") == ("counts", "units")
    assert dims(made, "log_likelihood", "marginal") == (*draws, "units")
    assert made["posterior"]["y"].shape == (1, 40, 6)
    assert made["prior"]["y"].shape == (1, 10, 6)
    assert made["prior_predictive"]["z"].shape == (1, 10, 3, 6)


def test_values_are_those_of_the_posterior(result):
    made, draws = result.to_arviz(**FEW, seed=5), result.posterior.refined(40).sample(40, seed=5)
    for name, value in draws.items():
        assert numpy.array_equal(made["posterior"][name].values[0], value.numpy())
    assert numpy.array_equal(made["observed_data"]["z"].values, poisson_counts(6).numpy())
    predicted = torch.as_tensor(made["posterior_predictive"]["z"].values[0].copy())
    assert (predicted >= 0).all()
    assert (predicted != poisson_counts(6)).any()


def test_draws_are_those_of_a_seed_and_leave_the_generator_alone(result):
    made = []
    for outside, seed in enumerate((1, 1, 2)):
        torch.manual_seed(outside)
        before = torch.random.get_rng_state()
        made.append(result.to_arviz(**FEW, seed=seed))
        assert torch.equal(before, torch.random.get_rng_state())
    for group in ("posterior", "posterior_predictive", "prior_predictive"):
        name = "y" if group == "posterior" else "z"
        values = [one[group][name].values for one in made]
        assert numpy.array_equal(values[0], values[1])
        assert not numpy.array_equal(values[0], values[2])


def test_globals_do_not_repeat():
    result = fit(gaussian, guide_for(gaussian), Z, objective=MarginalLaplace())
    made = result.to_arviz(num_samples=1000, prior_samples=0)
    assert len(result.posterior.globals_.draws) < 1000
    distinct = len(numpy.unique(made["posterior"]["mu"].values))
    assert made.attrs["distinct_draws_of_globals"] == distinct > 800


@pytest.mark.parametrize("objective", [FixedDrawELBO(), MarginalLaplace(), Ladder()])
def test_refined_is_the_same_posterior(objective):
    posterior = fit(gaussian, guide_for(gaussian), Z, objective=objective).posterior
    refined = posterior.refined(3000)
    assert len(refined.globals_.draws) >= 3000
    for before, after in ((posterior.mean(), refined.mean()), (posterior.std(), refined.std())):
        for name, value in before.items():
            assert ((value - after[name]).abs() / posterior.std()[name]).max() < 0.05
    assert posterior.refined(10) is posterior


def test_refined_integrates_over_units_as_before():
    z, found = poisson_counts(), {}
    for objective in (MarginalLaplace(), MarginalQuadrature()):
        posterior = fit(poisson, guide_for(poisson), z, objective=objective).posterior
        found[type(objective)] = posterior.log_evidence, posterior.refined(2000).log_evidence
    before, after = found[MarginalQuadrature]
    assert abs(after - before) < 0.5 * abs(found[MarginalLaplace][1] - before)


@pytest.mark.parametrize("objective", [FixedDrawELBO(accuracy=0.2), MarginalLaplace()])
def test_the_posterior_of_new_units(objective):
    """Their data, their draws, and their likelihoods: of these units those of a fit to them."""
    new = poisson_counts(4, seed=3)
    fitted_ = fit(poisson, guide_for(poisson), poisson_counts(6), objective=objective)
    posterior = fitted_.posterior_for(new)
    made = posterior.to_arviz(**FEW, seed=5, attrs={"about": "four more"})
    assert numpy.array_equal(made["observed_data"]["z"].values, new.numpy())
    assert made["posterior_predictive"]["z"].shape == (1, 40, 3, 4)
    assert made["log_likelihood"]["marginal"].shape == (1, 40, 4)
    assert made.attrs["about"] == "four more"
    assert "objective" not in made.attrs
    known = fitted_.posterior_for(poisson_counts(6)).to_arviz(**FEW, seed=5)
    expected = fitted_.to_arviz(**FEW, seed=5)
    for group, name in (("posterior", "mu"), ("posterior", "y"), ("log_likelihood", "marginal")):
        found = known[group][name].values
        numpy.testing.assert_allclose(found, expected[group][name].values, rtol=1e-6, atol=1e-6)


def test_no_groups_that_are_not_asked_for(result):
    made = result.to_arviz(num_samples=5, prior_samples=0, log_likelihood=None)
    assert sorted(names_of_groups(made)) == ["observed_data", "posterior", "posterior_predictive"]


def test_labels_and_names_of_dimensions(result):
    labels = [f"site {i}" for i in range(6)]
    made = result.to_arviz(**FEW, coords={"units": labels, "round": [1, 2, 3]}, dims={"z": ["round", "units"]})
    assert list(made["posterior"]["units"].values) == labels
    assert dims(made, "observed_data", "z") == ("round", "units")
    assert dims(made, "prior_predictive", "z") == ("chain", "draw", "round", "units")
    assert float(made["posterior"]["y"].sel(units="site 2")[0, 0]) == float(made["posterior"]["y"][0, 0, 2])


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        ({"schools": ["a"]}, "coords has labels of 'schools', and the dimensions are counts, units"),
        ({"units": ["a", "b"]}, "coords has 2 labels of 'units', which has 6 elements"),
    ],
)
def test_labels_of_nothing(result, coords, message):
    with pytest.raises(ModelError, match=message):
        result.to_arviz(num_samples=3, prior_samples=0, log_likelihood=None, coords=coords)


# --------------------------------------------------------------------------------------------------------------- models


MODELS = {
    "binomial_slopes": {"y": ("units", "y_dim_1"), "mu": ("mu_dim_0",), "z": ("visits",), "x": ("x_dim_0",)},
    "nested_latents": {"level": ("units", "level_dim_1"), "item": ("units", "items"), "z": ("units", "items")},
    "units_inside_a_plate_of_data": {"wave": ("waves", "units"), "marginal": ("units",)},
    "dim_minus_three": {"z": ("units", "items", "repeats", "z_dim_3"), "marginal": ("units",)},
    "non_centered": {"y": ("units",), "y_decentered": ("units",)},
    "categorical_probs": {"y": ("units", "y_dim_1"), "z": ("draws", "units")},
    "without_globals": {"y": ("units",), "z": ("units",)},
    "one_unit": {"y": ("units",), "marginal": ("units",)},
    "with_factors": {"y": ("units",), "marginal": ("units",)},
    "with_params": {"y": ("units",), "marginal": ("units",)},
}


@pytest.mark.parametrize("name", MODELS)
def test_dimensions_of_models(name, tmp_path):
    made = fitted(name).to_arviz(**FEW)
    made.to_netcdf(tmp_path / "fit.nc")
    again = xarray.open_datatree(tmp_path / "fit.nc")
    found = {}
    for group in names_of_groups(made):
        for variable in made[group].data_vars:
            rest = tuple(dim for dim in dims(made, group, variable) if dim not in ("chain", "draw"))
            assert found.setdefault(variable, rest) == rest
            assert numpy.isfinite(made[group][variable].values).all()
            assert numpy.array_equal(made[group][variable].values, again[group][variable].values)
    assert {variable: found[variable] for variable in MODELS[name]} == MODELS[name]
    again.close()


def test_dimensions_of_observations_and_of_their_likelihoods():
    """An event of several numbers has one likelihood."""
    made = fitted("dim_minus_three").to_arviz(**FEW, log_likelihood=ConditionalLikelihood())
    assert dims(made, "observed_data", "z") == ("units", "items", "repeats", "z_dim_3")
    assert dims(made, "log_likelihood", "z") == ("chain", "draw", "units", "items", "repeats")


def test_functions_of_latents_are_in_the_posterior():
    made = fitted("non_centered").to_arviz(**FEW)
    found = made["posterior"]
    assert "y" not in made["posterior_predictive"].data_vars
    loc, scale = found["mu"].values[..., None], found["tau"].values[..., None]
    expected = loc + scale**0.7 * (found["y_decentered"].values - 0.3 * loc)  # LocScaleReparam(0.3)
    assert numpy.allclose(found["y"].values, expected)


def test_dimensions_of_functions_of_latents():
    """Inside the plate and outside, and with a dimension of their own that is as long as the plate."""

    def model(z):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.deterministic("pair", torch.stack([mu, -mu]))
        with pyro.plate("units", len(z), dim=-1):
            y = pyro.sample("y", dist.Normal(mu, 1.0))
            pyro.deterministic("double", 2 * y)
            pyro.deterministic("signs", torch.stack([y, -y], -1))  # without event_dim: whose dimensions are not known
            pyro.deterministic("powers", torch.stack([y**p for p in range(len(z))], -1), event_dim=1)
            pyro.sample("z", dist.Normal(y, 1.0), obs=z)

    made = fit(model, guide_for(model), Z, objective=MarginalLaplace()).to_arviz(**FEW)
    for group, number in (("posterior", 40), ("prior", 10)):
        found = made[group]
        assert dims(made, group, "pair") == ("chain", "draw", "pair_dim_0")
        assert dims(made, group, "double") == ("chain", "draw", "units")
        assert dims(made, group, "signs") == ("chain", "draw", "signs_dim_0", "signs_dim_1")
        assert dims(made, group, "powers") == ("chain", "draw", "units", "powers_dim_1")
        assert found["powers"].shape == (1, number, 4, 4)
        assert numpy.array_equal(found["double"].values, 2 * found["y"].values)
        assert numpy.array_equal(found["pair"].values[..., 1], -found["mu"].values)
        assert numpy.allclose(found["powers"].values[..., 2], found["y"].values ** 2)


def test_no_draws_of_a_prior_that_has_none():
    made = fitted("interval_units").to_arviz(**FEW)
    assert "prior" not in names_of_groups(made)
    assert made.attrs["prior"].startswith("there are no draws of the prior: ")


def test_names_that_would_be_taken_for_others():
    """A plate called as the dimension of draws, and an argument called as a plate."""

    def model(z, units):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("units", len(z), dim=-1):
            y = pyro.sample("y", dist.Normal(mu, 1.0))
            with pyro.plate("draw", 2, dim=-2):
                pyro.sample("z", dist.Normal(y, 1.0), obs=torch.stack([z, units]))

    made = fit(model, guide_for(model), Z, torch.arange(4.0), objective=MarginalLaplace()).to_arviz(**FEW)
    assert dims(made, "observed_data", "z") == ("draw_dim", "units")
    assert dims(made, "posterior", "y") == ("chain", "draw", "units")
    assert list(made["constant_data"]["units_data"].values) == [0, 1, 2, 3]


def test_float32():
    torch.set_default_dtype(torch.float32)
    made = fit(gaussian, guide_for(gaussian), Z.float(), objective=MarginalLaplace()).to_arviz(**FEW)
    assert made["posterior"]["y"].dtype == numpy.float32


# ---------------------------------------------------------------------------------------------------- files, attributes


def test_a_file_and_back(result, tmp_path):
    made = result.to_arviz(**FEW, coords={"units": list("abcdef")})
    made.to_netcdf(tmp_path / "fit.nc")
    again = xarray.open_datatree(tmp_path / "fit.nc")
    assert sorted(names_of_groups(again)) == sorted(GROUPS)
    for group in GROUPS:
        for name in made[group].data_vars:
            assert made[group][name].equals(again[group][name])
    assert again.attrs["status"] == "CONVERGED"
    again.close()


def test_attributes(result):
    attrs = result.to_arviz(**FEW).attrs
    assert attrs["inference_library"] == "laplace_amort"
    assert attrs["inference_library_version"] == importlib.metadata.version("laplace_amort")
    assert (attrs["objective"], attrs["status"], attrs["converged"]) == ("MarginalLaplace()", "CONVERGED", 1)
    assert attrs["log_evidence"] == result.posterior.log_evidence
    assert attrs["sampling_time"] == pytest.approx(result.seconds)
    assert attrs["k_hat"] == result.posterior.refined(40).k_hat
    assert attrs["log_likelihood"] == "MarginalLikelihood(rule=None)"


def test_what_has_not_converged_says_so():
    result = fit(poisson, guide_for(poisson), poisson_counts(6), objective=FixedDrawELBO(num_draws=4, max_draws=4))
    assert not result.status.ok
    attrs = result.to_arviz(num_samples=5, prior_samples=0, log_likelihood=None).attrs
    assert (attrs["converged"], attrs["status"]) == (0, result.status.name)
    assert attrs["message"] == str(result.status)
    assert "log_evidence" not in attrs  # an ELBO has none


# ------------------------------------------------------------------------------------------------- what is not there


def test_arviz_is_optional(result, monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "arviz_base":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"laplace_amort\[arviz\]"):
        result.to_arviz(num_samples=3, prior_samples=0, log_likelihood=None)
