"""Small models for the tests of fit, and how results are compared."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch

from helpers.models import counts
from laplace_amort import AutoLaplaceFamily


def gaussian(z):
    """Normal throughout: the family holds the posterior, and both objectives are exact."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)


def evidence(z):
    """Log evidence, posterior mean and standard deviation of ``mu`` in :func:`gaussian`."""
    n = len(z)
    covariance = 2 * torch.eye(n) + torch.ones(n, n)
    value = dist.MultivariateNormal(torch.zeros(n), covariance).log_prob(z)
    precision = 1 + n / 2
    return float(value), float(z.sum() / 2 / precision), precision**-0.5


def poisson(z):
    """A hierarchy of counts ``z (3, N)``."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("units", z.shape[-1], dim=-1):
        y = pyro.sample("y", dist.Normal(mu, tau))
        with pyro.plate("counts", 3, dim=-2):
            pyro.sample("z", dist.Poisson(y.exp()), obs=z)


def poisson_counts(num_units=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = 0.5 + 0.7 * torch.randn(num_units, generator=generator)
    return torch.poisson(y.exp().expand(3, -1), generator=generator)


def subsampled(z, size):
    """The same with one count each, and minibatches."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z), subsample_size=size) as indices:
        y = pyro.sample("y", dist.Normal(mu, 0.5))
        pyro.sample("z", dist.Poisson(y.exp()), obs=z[indices])


def two_peaks(z):
    """A posterior that is the same for both signs of its only global."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu**2, 0.5))
        pyro.sample("z", dist.Normal(y, 0.5), obs=z)


def branching(z):
    """What no recording can hold: Python looks at the value of a latent."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    scale = 0.5 if bool(mu > -3) else 0.6
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, scale))
        pyro.sample("z", dist.Poisson(y.exp()), obs=z)


def guide_for(model, **options):
    """A guide with a parameter of its own, whatever guides there were before."""
    pyro.clear_param_store()
    return AutoLaplaceFamily(model, **options)


def trajectory(result):
    """All that a history says, but for seconds."""
    return [(step.stage, step.objective, step.gradient_norm, step.num_draws) for step in result.history]


COUNTS = counts(12)


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
