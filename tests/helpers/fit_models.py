"""Small models with units for the tests of fits, posteriors and diagnoses, and how results are compared."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints

from helpers.models import EIGHT_SCHOOLS, counts, units
from laplace_amort import AutoLaplaceFamily

COUNTS = counts(12)
ANSWERS = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64).repeat(20)  # for one_answer
SCHOOLS = tuple(torch.tensor(column, dtype=torch.float64) for column in EIGHT_SCHOOLS)


def gaussian(z):
    """Normal throughout: the family holds the posterior, and both objectives are exact."""
    units(z, lambda mu: dist.Normal(mu, 1.0), lambda y: dist.Normal(y, 1.0))


def evidence(z):
    """Log evidence, posterior mean and standard deviation of ``mu`` in :func:`gaussian`."""
    n = len(z)
    covariance = 2 * torch.eye(n) + torch.ones(n, n)
    value = dist.MultivariateNormal(torch.zeros(n), covariance).log_prob(z)
    precision = 1 + n / 2
    return float(value), float(z.sum() / 2 / precision), precision**-0.5


def poisson(z):
    """A hierarchy of counts ``z (3, N)``."""
    priors = {"mu": dist.Normal(0.0, 3.0), "tau": dist.LogNormal(0.0, 1.0)}
    units(z, dist.Normal, lambda y: dist.Poisson(y.exp()), inside="counts", **priors)


def poisson_counts(num_units=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = 0.5 + 0.7 * torch.randn(num_units, generator=generator)
    return torch.poisson(y.exp().expand(3, -1), generator=generator)


def subsampled(z, size=None, sd=0.5):
    """The same with one count each, and minibatches."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z), subsample_size=size) as indices:
        y = pyro.sample("y", dist.Normal(mu, sd))
        pyro.sample("z", dist.Poisson(y.exp()), obs=z[indices])


def two_peaks(z):
    """A posterior that is the same for both signs of its only global."""
    units(z, lambda mu: dist.Normal(mu**2, 0.5), lambda y: dist.Normal(y, 0.5), mu=dist.Normal(0.0, 3.0))


def branching(z):
    """What no recording can hold: Python looks at the value of a latent."""
    units(z, lambda mu: dist.Normal(mu, 0.5 if bool(mu > -3) else 0.6), lambda y: dist.Poisson(y.exp()))


def one_answer(z):
    """One answer of each of many units: its integral is far from that of a normal density."""
    units(z, lambda mu: dist.Normal(mu, 3.0), lambda y: dist.Bernoulli(logits=y), mu=dist.Normal(0.0, 2.0))


def either_sign(z, power=2):
    """Units with two modes, if the power is even."""
    units(z, lambda mu: dist.Normal(mu, 1.0), lambda y: dist.Normal(y**power, 0.5))


def schools(z, errors):
    priors = {"mu": dist.Normal(0.0, 10.0), "tau": dist.HalfCauchy(5.0)}
    units(z, dist.Normal, lambda y: dist.Normal(y, errors), **priors)


def weighted(z, weight=5.0):
    """Three counts of each unit, each as if it had been seen several times."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("units", z.shape[-1]):
        y = pyro.sample("y", dist.Normal(mu, tau))
        with pyro.plate("counts", 3, dim=-2), poutine.scale(scale=weight):
            pyro.sample("z", dist.Poisson(y.exp()), obs=z)


def tails(z, heavy=True):
    """Data that say nothing of the global, which may have tails without end."""
    prior = dist.Cauchy(0.0, 1.0) if heavy else dist.Normal(0.0, 1.0)
    units(z, lambda mu: dist.Normal(0.0, 1.0), lambda y: dist.Normal(y, 1.0), mu=prior)


def nowhere(z):
    """The conditional density of a unit grows for ever."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.ImproperUniform(constraints.real, (), ()))
        pyro.factor("up", torch.nn.functional.softplus(y + mu))


def flat(z):
    """Two globals of which one sum is identified."""
    priors = {name: dist.ImproperUniform(constraints.real, (), ()) for name in "ab"}
    units(z, lambda a, b: dist.Normal(a + 2 * b, 1.0), lambda y: dist.Normal(y, 1.0), **priors)


def kinked(z):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        pyro.factor("z", -(((y - mu).abs() + 0.1 * z) ** 2))


def guide_for(model, **options):
    """A guide with a parameter of its own, whatever guides there were before."""
    pyro.clear_param_store()
    return AutoLaplaceFamily(model, **options)


def trajectory(result):
    """All that a history says, but for seconds."""
    return [(step.stage, step.objective, step.gradient_norm, step.num_draws) for step in result.history]


def assert_near(actual, expected):
    """A file has no modes of the units: they are found anew, to the tolerance of the search."""
    assert actual.status == expected.status
    assert actual.objective == pytest.approx(expected.objective, rel=1e-7)
    distance = (actual.guide.loc - expected.guide.loc).detach()
    assert (distance.abs() < 1e-4 * (1 + expected.guide.loc.detach().abs())).all()


class Interrupt:
    """Ctrl-C in one of the calls of a method."""

    def __init__(self, monkeypatch, owner, name, call):
        self.left = call
        original = getattr(owner, name)

        def interrupted(this, *args):
            self.left -= 1
            if self.left == -1:
                original(this, *args)  # half done: the guide and what it remembers have moved
                raise KeyboardInterrupt
            return original(this, *args)

        monkeypatch.setattr(owner, name, interrupted)
