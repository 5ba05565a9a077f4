"""What a posterior is like in use: seeds, quantiles, chunks, what it prints, and when it is made.

Draws are of fixed seeds. Averages of them are compared within LIMIT standard errors.
"""

import dataclasses
import math

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.fit_models import gaussian, guide_for, poisson, poisson_counts
from helpers.posteriors import LIMIT, fitted, joined, posterior_of

from laplace_amort import FitStatus, FixedDrawELBO, MarginalLaplace, MarginalQuadrature, NestedELBO, fit
from laplace_amort.posterior.quantiles import quantiles_of_draws, weighted_quantiles

Z = torch.tensor([1.0, 3.0, -0.5, 2.0], dtype=torch.float64)


def hierarchy(objective=MarginalQuadrature()):  # noqa: B008
    return posterior_of(poisson, poisson_counts(8).double(), objective=objective)


@pytest.mark.parametrize("objective", [FixedDrawELBO(accuracy=0.2), NestedELBO(accuracy=0.2), MarginalQuadrature()])
def test_seeds_of_draws(objective):
    """Nothing touches the state of torch's generator, and neither does that state change anything."""
    result = fit(poisson, guide_for(poisson), poisson_counts(8).double(), objective=objective, seed=5)
    state = torch.get_rng_state()
    posterior = result.posterior
    first, mean = posterior.sample(20), posterior.mean()
    assert str(posterior)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again, same, other = posterior.sample(20), posterior.sample(20, seed=5), posterior.sample(20, seed=6)
    for name in first:
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], same[name])
        assert not torch.equal(first[name], other[name])
        assert torch.equal(posterior.mean()[name], mean[name])


def test_draws_come_in_no_order():
    """Any part of them is a sample; the first half agrees with the second, and neighbors are not alike."""
    draws = hierarchy().sample(4000)
    for values in draws.values():
        halves = values.reshape(2, 2000, -1)
        error = LIMIT * (2 / 2000) ** 0.5 * values.reshape(4000, -1).std(0)
        assert ((halves[0].mean(0) - halves[1].mean(0)).abs() < error).all()
        z = (values - values.mean(0)) / values.std(0)
        assert ((z[1:] * z[:-1]).mean(0).abs() < LIMIT / 4000**0.5).all()


def test_quantiles():
    posterior = hierarchy()
    probabilities = [0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0]
    found, draws = posterior.quantiles(probabilities, num_samples=1000), posterior.sample(1000)
    for name, values in found.items():
        assert (values.diff(dim=0) >= 0).all()
        torch.testing.assert_close(values, torch.quantile(draws[name], torch.tensor(probabilities), dim=0))


def test_quantiles_of_a_normal():
    posterior = posterior_of(gaussian, Z, objective=MarginalQuadrature())
    probabilities = torch.tensor([0.05, 0.5, 0.95])
    for name, values in posterior.quantiles(probabilities.tolist(), num_samples=20_000).items():
        z = (values - posterior.mean()[name]) / posterior.std()[name]
        expected = torch.special.ndtri(probabilities).reshape(-1, *(1,) * (z.dim() - 1))
        # The standard error of an extreme quantile of so many draws is 0.015.
        torch.testing.assert_close(z, expected.expand_as(z), atol=0.015 * LIMIT, rtol=0)


@pytest.mark.parametrize("wrong", [-0.1, 1.5])
def test_quantiles_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="between 0 and 1"):
        posterior_of(gaussian, Z).quantiles([wrong])


def test_quantiles_of_many_elements():
    """Of more than torch.quantile takes, which is 2 ** 24."""
    values = torch.arange(2.0**24 + 1).flip(0)
    assert quantiles_of_draws(values, [0.25, 1.0]).tolist() == [2.0**22, 2.0**24]


def test_weighted_quantiles():
    values, weights = numpy.array([3.0, 1.0, 2.0]), numpy.array([0.25, 0.5, 0.25])
    assert weighted_quantiles(values, weights, (0.25, 0.625, 0.875)) == pytest.approx([1.0, 2.0, 3.0])
    equal = numpy.full(1000, 1e-3)
    assert weighted_quantiles(numpy.arange(1000.0), equal, (0.1, 0.5)) == pytest.approx([99.5, 499.5])


def test_chunks_make_no_difference_to_moments(monkeypatch):
    posterior, small = hierarchy(), hierarchy()
    monkeypatch.setattr(type(small.units), "chunk", lambda self: 97)
    torch.testing.assert_close(joined(small.mean()), joined(posterior.mean()), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(joined(small.std()), joined(posterior.std()), rtol=1e-9, atol=1e-9)
    draws = small.sample(200)
    assert draws["y"].shape == (200, 8)
    assert len(draws["y"].unique(dim=0)) == 200


def test_thinned():
    """The units are averaged over fewer globals; the globals themselves are as they were."""
    posterior = hierarchy()
    thinned = posterior.thinned(256)
    assert torch.equal(thinned.mean()["mu"], posterior.mean()["mu"])
    for name in ("mean", "std"):
        few, all_ = getattr(thinned, name)()["y"], getattr(posterior, name)()["y"]
        assert not torch.equal(few, all_)
        assert ((few - all_) / posterior.std()["y"]).abs().max() < 0.1


def test_averages_over_fewer_globals_are_calibrated():
    """Of linear functions of the globals, and of squares of standardized ones, they are those over all draws."""
    posterior = dataclasses.replace(hierarchy(), averaged=64)
    (some, shares), (globals_, weights) = posterior._averaged(), posterior.weighted_globals()
    assert len(some) == 64 < len(globals_)
    torch.testing.assert_close(shares.sum(), torch.ones(()).double())
    torch.testing.assert_close(shares @ some, weights @ globals_)
    to_standard = posterior.gaussian.precision.global_scale_tril.inverse().mT
    z, every = ((at - posterior.gaussian.global_loc) @ to_standard for at in (some, globals_))
    torch.testing.assert_close(shares @ z**2, weights @ every**2)
    equal = torch.full_like(shares, 1 / 64)
    assert ((equal - shares) @ some).abs().max() > 1e-4  # which the draws themselves would miss


def test_calibrated_averages_are_nearer(monkeypatch):
    everything = dataclasses.replace(hierarchy(), averaged=100_000)

    def error():
        some = dataclasses.replace(everything, averaged=64)
        return float(((some.mean()["y"] - everything.mean()["y"]) / everything.std()["y"]).abs().max())

    calibrated = error()
    monkeypatch.setattr(type(everything), "_calibrated", lambda self, some, *_: some.new_full((len(some),), 1 / 64))
    assert calibrated < 0.02
    assert calibrated < error() / 2


def test_draws_at_the_same_globals_share_candidates_within_bounds():
    """A model without globals has one place to draw at: its draws are many, all the same."""
    from laplace_amort.posterior.draws import _SHARED

    def alone(z):
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(0.0, 2.0))
            pyro.sample("z", dist.Poisson(y.exp()), obs=z)

    posterior = posterior_of(alone, poisson_counts(8).double()[0], objective=MarginalQuadrature())
    draws = posterior.sample(64 * _SHARED)["y"]
    assert len(draws[:, 0].unique()) > 32 * _SHARED


def test_it_prints_the_globals():
    posterior = fitted("binomial_slopes").posterior
    shown = str(posterior)
    for label in (
        "mu[0]",
        "mu[1]",
        "tau[0]",
        "tau[1]",
        "mean",
        "sd",
        "5 %",
        "95 %",
        f"k-hat of the globals {posterior.k_hat:.2f}",
    ):
        assert label in shown
    assert f"{float(posterior.mean()['mu'][1]):.4g}" in shown
    assert "do not rely" not in shown


@pytest.mark.parametrize("k_hat", [0.71, 5.0, math.inf])
def test_it_prints_what_is_not_to_be_relied_on(k_hat):
    posterior = posterior_of(gaussian, Z)
    globals_ = dataclasses.replace(posterior.globals_, k_hat=k_hat)
    assert "do not rely on it" in str(dataclasses.replace(posterior, globals_=globals_))


def test_it_is_made_once_and_stays_when_the_guide_moves_on():
    z = poisson_counts(8).double()
    result, moved = (fit(poisson, guide_for(poisson), z, objective=MarginalLaplace()) for _ in range(2))
    with torch.no_grad():
        moved.guide.loc.add_(1.0)
    assert result.posterior is result.posterior
    # Two fits, which may differ by rounding errors: far less than the guide moved.
    torch.testing.assert_close(joined(moved.posterior.mean()), joined(result.posterior.mean()), rtol=1e-6, atol=1e-6)
    fit(poisson, result.guide, poisson_counts(8, seed=3).double(), objective=MarginalLaplace())
    again = joined(result.posterior.thinned(None).mean())
    torch.testing.assert_close(again, joined(moved.posterior.mean()), rtol=1e-6, atol=1e-6)


def test_a_fit_without_a_posterior_has_none(monkeypatch):
    result = fit(gaussian, guide_for(gaussian), Z, objective=MarginalLaplace())
    with pytest.raises(ValueError, match="there is no posterior"):
        _ = dataclasses.replace(result, gaussian=None, status=FitStatus.START_FAILED).posterior
