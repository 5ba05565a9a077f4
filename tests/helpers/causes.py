"""Models with one thing wrong each, and the same models with what a message says in its place."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints

_RANDOM = torch.Generator().manual_seed(21)


def _normal(*shape):
    return torch.randn(*shape, generator=_RANDOM, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------ two plates

SUBJECT, ITEM = (part.reshape(-1) for part in torch.meshgrid(torch.arange(12), torch.arange(6), indexing="ij"))
ANSWERS = 0.5 + _normal(12)[SUBJECT] + 0.3 * _normal(6)[ITEM] + 1.2 * _normal(72)


def crossed(y):
    """Subjects by items; the items are fewer, so that their effects are globals."""
    mu, tau_s = pyro.sample("mu", dist.Normal(0.0, 2.0)), pyro.sample("tau_s", dist.LogNormal(0.0, 1.0))
    tau_i, sigma = pyro.sample("tau_i", dist.LogNormal(-0.5, 1.0)), pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("subjects", 12):
        ability = pyro.sample("ability", dist.Normal(0.0, tau_s))
    with pyro.plate("items", 6):
        ease = pyro.sample("ease", dist.Normal(0.0, tau_i))
    with pyro.plate("answers", len(y)):
        pyro.sample("y", dist.Normal(mu + ability[..., SUBJECT] + ease[..., ITEM], sigma), obs=y)


def crossed_by_multiples(y):
    """The same, the effects of the items as multiples of their scale."""
    mu, tau_s = pyro.sample("mu", dist.Normal(0.0, 2.0)), pyro.sample("tau_s", dist.LogNormal(0.0, 1.0))
    tau_i, sigma = pyro.sample("tau_i", dist.LogNormal(-0.5, 1.0)), pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("subjects", 12):
        ability = pyro.sample("ability", dist.Normal(0.0, tau_s))
    with pyro.plate("items", 6):
        ease = tau_i * pyro.sample('ease', dist.Normal(0., 1.))  # fmt: skip
    with pyro.plate("answers", len(y)):
        pyro.sample("y", dist.Normal(mu + ability[..., SUBJECT] + ease[..., ITEM], sigma), obs=y)


def crossed_by_grid():
    """Mean and standard deviation of ``tau_i`` given :data:`ANSWERS`, everything normal integrated over exactly."""
    logs = [torch.linspace(low, high, 24, dtype=torch.float64) for low, high in ((-2.5, 1.5), (-4.0, 1.5), (-0.5, 0.8))]
    taus, taui, sigma = (part.reshape(-1) for part in torch.meshgrid(*logs, indexing="ij"))
    same = [(index[:, None] == index).double() for index in (SUBJECT, ITEM, torch.arange(72))]
    parts = zip((taus, taui, sigma), same, strict=True)
    covariance = 4.0 + sum((2 * log).exp()[:, None, None] * one for log, one in parts)
    log_density = dist.MultivariateNormal(torch.zeros(72, dtype=torch.float64), covariance).log_prob(ANSWERS)
    for log, center in ((taus, 0.0), (taui, -0.5), (sigma, 0.0)):
        log_density = log_density - (log - center) ** 2 / 2
    weights = log_density.softmax(0)
    mean = (weights * taui.exp()).sum()
    return float(mean), float((weights * (taui.exp() - mean) ** 2).sum().sqrt())


SCHOOL, CLASS = torch.arange(10).repeat_interleave(3), torch.arange(30).repeat_interleave(4)
MARKS = _normal(10)[SCHOOL[CLASS]] + 0.5 * _normal(30)[CLASS] + 0.7 * _normal(120)


def flat_levels(y):
    """Classes in schools, the number of its school given for each class."""
    mu, s = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("s", dist.HalfNormal(1.0).expand([3]).to_event(1))
    with pyro.plate("schools", 10):
        u = pyro.sample("u", dist.Normal(mu, s[..., 0]))
    with pyro.plate("classes", 30):
        v = pyro.sample("v", dist.Normal(u[..., SCHOOL], s[..., 1]))
    with pyro.plate("pupils", 120):
        pyro.sample("y", dist.Normal(v[..., CLASS], s[..., 2]), obs=y)


def nested_levels(y):
    """The same, the plate of the classes inside of that of the schools."""
    mu, s = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("s", dist.HalfNormal(1.0).expand([3]).to_event(1))
    with pyro.plate('schools', 10, dim=-2):  # fmt: skip
        u = pyro.sample('u', dist.Normal(mu, s[..., 0]))  # fmt: skip
        with pyro.plate('classes', 3, dim=-1):  # fmt: skip
            v = pyro.sample('v', dist.Normal(u, s[..., 1]))  # fmt: skip
    with pyro.plate("pupils", 120):
        pyro.sample("y", dist.Normal(v.flatten(-2)[..., CLASS], s[..., 2]), obs=y)


# ------------------------------------------------------------------------------------------------------------ kinks

TIMES = 1.0 + 0.8 * _normal(12) + 0.7 * _normal(3, 12)


def errors(y, kind=dist.Laplace):
    """Each observation has a kink in its unit."""
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 3.0)), pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("units", 12, dim=-1):
        a = pyro.sample("a", dist.Normal(mu, tau))
        with pyro.plate("times", 3, dim=-2):
            pyro.sample("y", kind(a, 0.7), obs=y)


UNITS = 0.1 * _normal(12)


def peaked_prior(y, kind=dist.Laplace):
    """The posterior of a global has its mode at a kink."""
    mu, tau = pyro.sample("mu", kind(0.0, 0.1)), pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("units", 12):
        u = pyro.sample("u", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(u, 1.0), obs=y)


def hinge(y, bend=torch.relu):
    """A mean with a kink in each unit."""
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 1.0)), pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("units", 12, dim=-1):
        a = pyro.sample("a", dist.Normal(mu, tau))
        with pyro.plate("times", 3, dim=-2):
            pyro.sample("y", dist.Normal(bend(a - 0.2), 0.3), obs=y)


# -------------------------------------------------------------------------------------------- masks, NaN and rounding

SEEN = torch.arange(20) != 3
MASKED = _normal(20)


def hidden_prior(y):
    """A mask over prior and data: of unit 3 nothing is known."""
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("units", 20), poutine.mask(mask=SEEN):
        u = pyro.sample("u", dist.Normal(0.0, tau))
        pyro.sample("y", dist.Normal(u, 1.0), obs=y)


def hidden_data(y):
    """A mask over the data alone."""
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("units", 20):
        u = pyro.sample('u', dist.Normal(0., tau))  # fmt: skip
        with poutine.mask(mask=SEEN):
            pyro.sample("y", dist.Normal(u, 1.0), obs=y)


GROUP = torch.arange(20).repeat_interleave(5)
YEAR = 2000.0 + 10 * torch.rand(100, generator=_RANDOM, dtype=torch.float64)
HEIGHT = 140 + 4.8 * (YEAR - 2005) + _normal(20)[GROUP] + _normal(100)


def in_single(y, x, number=torch.Tensor.float):
    """Part of it is computed in float32, whatever its arguments are."""
    a, b = pyro.sample("a", dist.Normal(0.0, 10000.0)), pyro.sample("b", dist.Normal(0.0, 100.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("groups", 20):
        u = pyro.sample("u", dist.Normal(0.0, tau))
    with pyro.plate("rows", len(y)):
        mean = number(a) + number(u)[..., GROUP] + number(b) * number(x)
        pyro.sample("y", dist.Normal(mean.double(), 1.0), obs=y)


def covariate(x, y):
    """One number for each observation, that may be missing; not validated."""
    b, tau = pyro.sample("b", dist.Normal(0.0, 3.0)), pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("units", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, tau))
        pyro.sample("y", dist.Normal(u + b * x, 1.0, validate_args=False), obs=y)


COVARIATE = torch.linspace(-1, 1, 20, dtype=torch.float64)
MISSING = torch.where(torch.arange(20) == 5, math.nan, COVARIATE)


def undivided(y, prior=None):
    """Only the sum of two globals is known, unless one has a prior."""
    flat = dist.ImproperUniform(constraints.real, (), ())
    a, b = pyro.sample("a", prior or flat), pyro.sample("b", flat)
    with pyro.plate("units", len(y)):
        u = pyro.sample("u", dist.Normal(a + b, 1.0))
        pyro.sample("y", dist.Normal(u, 1.0), obs=y)


def counts(y):
    """Nothing is wrong with it."""
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 3.0)), pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("units", len(y)):
        u = pyro.sample("u", dist.Normal(mu, tau))
        pyro.sample("y", dist.Poisson(u.exp()), obs=y)


COUNTS = torch.tensor([0.0, 3.0, 1.0, 7.0, 2.0, 0.0, 4.0, 1.0], dtype=torch.float64)
