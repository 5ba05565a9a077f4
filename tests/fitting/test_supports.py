"""Every support with bounds, of a global or of the units: a fit, and all that comes of it."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from laplace_amort import AutoLaplaceFamily, FixedDrawELBO, MarginalLaplace, MarginalQuadrature, fit

Z = torch.tensor([1.3, 0.2, 2.1, 0.9, 1.6, -0.4], dtype=torch.float64)


def first(t):
    return t[..., 0]


def off_diagonal(t):
    return t[..., 1, 0]


def same(t):
    return t


def stacked(low, high):
    return dist.Uniform(torch.stack([low, low + 1], -1), torch.stack([high, high + 1], -1)).to_event(1)


# A prior from data and globals, and the number that the data are about.
SUPPORTS = {
    "bounds that are numbers": (lambda z, mu, tau: dist.Uniform(-4.0, 10.0), same),
    "bounds made in the model": (lambda z, mu, tau: dist.Uniform(z.min() - 3, torch.full((), 9.0)), same),
    "bounds of an event": (lambda z, mu, tau: stacked(z.min() - 3, z.max() + 3), first),
    "an interval without a density": (
        lambda z, mu, tau: dist.ImproperUniform(constraints.interval(-3.0, 5.0), (), ()),
        same,
    ),
    "a bound that is infinite": (
        lambda z, mu, tau: dist.ImproperUniform(constraints.interval(-4.0, torch.inf), (), ()),
        same,
    ),
    "bounds that depend on globals": (lambda z, mu, tau: dist.Uniform(-4 - tau, mu**2 + 5 * tau), same),
    "a lower bound": (lambda z, mu, tau: dist.Pareto(torch.tensor(0.3), 3.0), same),
    "a lower bound that depends on a global": (lambda z, mu, tau: dist.Pareto(tau / 4, 3.0), same),
    "positive": (lambda z, mu, tau: dist.HalfCauchy(tau), same),
    "the unit interval": (lambda z, mu, tau: dist.Beta(2.0, 2.0), same),
    "a circle": (lambda z, mu, tau: dist.VonMises(0.0, 2.0), torch.sin),
    "a simplex": (lambda z, mu, tau: dist.Dirichlet(torch.ones(3)), first),
    "a Cholesky factor": (lambda z, mu, tau: dist.LKJCholesky(2, 2.0), off_diagonal),
    "ordered": (
        lambda z, mu, tau: dist.TransformedDistribution(
            dist.Normal(torch.zeros(2), 1.0).to_event(1), [dist.transforms.OrderedTransform()]
        ),
        first,
    ),
}
OF_UNITS = {
    "bounds that are data": (lambda z, mu, tau: dist.Uniform(z - 3, z + 4), same),
    "bounds of events that are data": (lambda z, mu, tau: stacked(z - 3, z + 4), first),
    "bounds of data and globals": (lambda z, mu, tau: dist.Uniform(z - 3 * tau, z + mu**2 + 4), same),
    "lower bounds that are data": (lambda z, mu, tau: dist.Pareto(z.abs() + 0.1, 3.0), same),
}


def of_global(name):
    prior, about = SUPPORTS[name]

    def model(z):
        mu, tau = pyro.sample("mu", dist.Normal(0.0, 1.0)), pyro.sample("tau", dist.LogNormal(0.0, 0.3))
        t = pyro.sample("t", prior(z, mu, tau))
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(mu, tau))
            pyro.sample("z", dist.Normal(y + about(t), 0.7), obs=z)

    return model


def of_units(name):
    prior, about = (SUPPORTS | OF_UNITS)[name]

    def model(z):
        mu, tau = pyro.sample("mu", dist.Normal(0.0, 1.0)), pyro.sample("tau", dist.LogNormal(0.0, 0.3))
        with pyro.plate("units", len(z)):
            t = pyro.sample("t", prior(z, mu, tau))
            pyro.sample("z", dist.Normal(about(t) + mu, tau), obs=z)

    return model


def use(model, objective):
    """Everything that a posterior is asked for."""
    result = fit(model, AutoLaplaceFamily(model), Z, objective=objective, progress=False)
    assert result.problem.not_recorded == ""  # bounds were not looked at on the way
    posterior = result.posterior
    draws, mean, std = posterior.sample(20), posterior.mean(), posterior.std()
    for name, value in mean.items():
        assert value.isfinite().all(), name
        assert std[name].isfinite().all(), name
        assert draws[name].shape[1:] == value.shape
    for quantile in posterior.quantiles([0.1, 0.9]).values():
        assert not quantile.isnan().any()
    assert str(posterior)
    assert len(posterior.to_frame())
    assert len(posterior.units_to_frame()) >= len(Z)
    assert result.predictive(num_samples=3)(Z)["z"].shape == (3, len(Z))
    assert result.to_arviz(num_samples=10)["posterior"]
    assert posterior.posterior_for(Z[:3]).mean()
    return draws["t"]


@pytest.mark.parametrize("name", SUPPORTS)
def test_of_a_global(name):
    use(of_global(name), MarginalLaplace())


@pytest.mark.parametrize("name", SUPPORTS | OF_UNITS)
def test_of_units(name):
    use(of_units(name), MarginalLaplace())


@pytest.mark.parametrize("objective", [MarginalQuadrature(), FixedDrawELBO(num_draws=16)])
def test_of_other_objectives(objective):
    draws = use(of_units("bounds that are data"), objective)
    assert ((draws > Z - 3) & (draws < Z + 4)).all()
    pyro.clear_param_store()
    draws = use(of_global("bounds made in the model"), objective)
    assert ((draws > Z.min() - 3) & (draws < 9)).all()
