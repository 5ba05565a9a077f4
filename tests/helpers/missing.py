"""Hierarchies of which some observations are missing, each way to say so beside the one that Pyro always took."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

NUM_UNITS, NUM_VISITS = 8, 4
_GENERATOR = torch.Generator().manual_seed(0)
SEEN = torch.rand(NUM_UNITS, NUM_VISITS, generator=_GENERATOR) > 0.3
CENTERS = torch.randn(NUM_UNITS, 1, generator=_GENERATOR, dtype=torch.float64)
SEEN_Z = ~SEEN.roll(1, 0)
UNIT = torch.arange(NUM_UNITS).repeat_interleave(NUM_VISITS)

KINDS = {
    "normal": lambda eta: dist.Normal(eta, 0.5),
    "poisson": lambda eta: dist.Poisson(eta.exp()),
    "bernoulli": lambda eta: dist.Bernoulli(logits=eta),
    "gamma": lambda eta: dist.Gamma(2.0, eta.exp()),
    "beta": lambda eta: dist.Beta(4 * eta.sigmoid(), 4 * (-eta).sigmoid()),
    "lognormal": lambda eta: dist.LogNormal(eta, 0.5),
    "binomial": lambda eta: dist.Binomial(7, logits=eta),
    "categorical": lambda eta: dist.Categorical(logits=torch.stack([eta, -eta, 0 * eta], -1)),
}


def drawn(kind):
    """Data ``(NUM_UNITS, NUM_VISITS)`` with nothing missing, the same in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return KINDS[kind](CENTERS.expand(NUM_UNITS, NUM_VISITS)).sample()


def holed(values, seen=SEEN):
    """Data with NaN where nothing is seen, of integers something impossible."""
    return torch.where(seen, values, torch.nan if values.is_floating_point() else -7)


def observe(how, fn, values, seen):
    """Observe part of a site: by ``obs_mask``, ``poutine.mask`` or ``mask`` of the distribution."""
    if how == "obs_mask":
        pyro.sample("z", fn, obs=values, obs_mask=seen)
    elif how == "poutine":
        with poutine.mask(mask=seen):
            pyro.sample("z", fn, obs=values)
    else:
        pyro.sample("z", fn.mask(seen), obs=values)


def nested(kind, how, values, seen=SEEN):
    """Visits within units."""
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 2.0)), pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("units", NUM_UNITS, dim=-2):
        y = pyro.sample("y", dist.Normal(mu, tau))
        with pyro.plate("visits", NUM_VISITS, dim=-1):
            observe(how, KINDS[kind](y + torch.zeros(NUM_VISITS)), values, seen)


def beside(kind, how, values, seen=SEEN):
    """Visits in a plate of their own, which look their unit up."""
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 2.0)), pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("units", NUM_UNITS):
        y = pyro.sample("y", dist.Normal(mu, tau))
    with pyro.plate("visits", len(UNIT)):
        observe(how, KINDS[kind](y[..., UNIT]), values.flatten(), seen.flatten())


def covariate(how, x, z, seen_x=SEEN, seen_z=SEEN_Z):
    """A covariate that is imputed, and an answer of which others are missing; or the same with both integrated out."""
    mean, spread = pyro.sample("mean", dist.Normal(0.0, 2.0)), pyro.sample("spread", dist.HalfNormal(1.0))
    slope, tau = pyro.sample("slope", dist.Normal(0.0, 2.0)), pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("units", NUM_UNITS, dim=-2):
        y = pyro.sample("y", dist.Normal(0.0, tau))
        with pyro.plate("visits", NUM_VISITS, dim=-1):
            if how == "obs_mask":
                x = pyro.sample("x", dist.Normal(mean, spread), obs=x, obs_mask=seen_x)
                pyro.sample("z", dist.Normal(y + slope * x, 0.5), obs=z, obs_mask=seen_z)
                return
            pyro.sample("x", dist.Normal(mean, spread).mask(seen_x), obs=x)
            pyro.sample("z", dist.Normal(y + slope * x, 0.5).mask(seen_x & seen_z), obs=z)
            integrated = dist.Normal(y + slope * mean, (0.25 + (slope * spread) ** 2).sqrt())
            pyro.sample("z_of_unseen", integrated.mask(~seen_x & seen_z), obs=z)


def covariate_data():
    """Covariates and answers with nothing missing."""
    generator = torch.Generator().manual_seed(2)
    x = 0.5 + torch.randn(NUM_UNITS, NUM_VISITS, generator=generator, dtype=torch.float64)
    noise = torch.randn(NUM_UNITS, NUM_VISITS, generator=generator, dtype=torch.float64)
    return x, CENTERS + 0.7 * x + 0.5 * noise
