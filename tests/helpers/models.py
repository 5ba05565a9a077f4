"""Pyro models shared by the tests: a table from name to a factory, with data drawn from fixed seeds.

Every model can be vectorized: a value may carry dimensions of enclosing plates on its left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor


class Case(NamedTuple):
    """A model, what to call it with, and indices for its subsampled plates."""

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012 (read only)
    indices: dict[str, Tensor] = {}  # noqa: RUF012


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def counts(*shape: int, seed: int = 0) -> Tensor:
    return torch.poisson(torch.full(shape, 2.0), generator=torch.Generator().manual_seed(seed))


EIGHT_SCHOOLS = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]


def uniforms(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def bits(*shape: int, seed: int = 0) -> Tensor:
    return (normals(*shape, seed=seed) > 0).to(torch.get_default_dtype())


def units(z, local, likelihood, inside=None, **priors):
    """Globals from their priors, units from ``local`` of the globals, data from ``likelihood`` of the units.

    The prior of ``mu`` is standard normal if there is none; ``inside`` names a plate within that of the units, for data
    with several rows.
    """
    globals_ = [pyro.sample(name, prior) for name, prior in (priors or {"mu": dist.Normal(0.0, 1.0)}).items()]
    with pyro.plate("units", z.shape[-1] if inside else len(z)):
        y = pyro.sample("y", local(*globals_))
        with pyro.plate(inside, len(z), dim=-2) if inside else contextlib.nullcontext():
            pyro.sample("z", likelihood(y), obs=z)


def hierarchy(z, local, likelihood):
    units(z, local, likelihood, mu=dist.Normal(0.0, 2.0), tau=dist.HalfNormal(1.0))


def conjugate_normal(z, prior=1.0):
    units(z, lambda mu: dist.Normal(mu, 0.7), lambda y: dist.Normal(y, 0.5), mu=dist.Normal(0.0, prior))


def normal(z, errors=0.5):
    hierarchy(z, dist.Normal, lambda y: dist.Normal(y, errors))


def poisson_lognormal(z):
    hierarchy(z, dist.Normal, lambda y: dist.Poisson(y.exp()))


def bernoulli_logit(z):
    priors = {"mu": dist.Normal(0.0, 2.0), "tau": dist.Exponential(1.0)}
    units(z, dist.Normal, lambda y: dist.Bernoulli(logits=y), inside="answers", **priors)


def student_t(z, errors):
    hierarchy(z, lambda mu, tau: dist.StudentT(4.0, mu, tau), lambda y: dist.Normal(y, errors))


def eight_schools(z, errors):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        y = pyro.sample("y", dist.Normal(mu, tau))
        pyro.sample("z", dist.Normal(y, errors), obs=z)


SUPPORTS: dict[str, Callable[[], Any]] = {
    "real": lambda: dist.StudentT(4.0, 0.5, 2.0),
    "positive": lambda: dist.LogNormal(0.5, 1.0),
    "nonnegative": lambda: dist.Gamma(2.0, 1.5),
    "positive_vector": lambda: dist.Gamma(torch.tensor([2.0, 3.0]), 1.5).to_event(1),
    "unit_interval": lambda: dist.Beta(2.0, 3.0),
    "interval": lambda: dist.Uniform(-1.0, 3.0),
    "greater_than": lambda: dist.Pareto(2.0, 3.0),
    "simplex": lambda: dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])),
    "ordered": lambda: dist.TransformedDistribution(
        dist.Normal(0.0, 1.0).expand([3]).to_event(1), dist.transforms.OrderedTransform()
    ),
    "corr_cholesky": lambda: dist.LKJCholesky(3, 2.0),
    # Flat priors, which nothing can be sampled from.
    "improper_real": lambda: dist.ImproperUniform(constraints.real, (), ()),
    "improper_half_open": lambda: dist.ImproperUniform(constraints.half_open_interval(-1.0, 2.0), (), ()),
    "improper_less_than": lambda: dist.ImproperUniform(constraints.less_than(2.0), (), ()),
    "improper_vector": lambda: dist.ImproperUniform(constraints.positive, (), (2,)),
    # A mixture wraps the support of its components.
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])), dist.Gamma(torch.tensor([2.0, 4.0]), 1.5)
    ),
}


def latents_of(make: Callable[[], Any]) -> Callable[..., Any]:
    """A model whose units each have a latent of the given distribution."""

    def model(z):
        with pyro.plate("units", len(z)):
            fn = make()
            x = pyro.sample("x", fn)
            cube = x**3  # squares of a simplex or of a correlation factor sum to a constant
            for _ in range(fn.event_dim):
                cube = cube.sum(-1)
            pyro.sample("z", dist.Normal(cube, 2.0), obs=z)

    return model


def correlated(z, likelihood=lambda y: dist.Normal(y, 0.5)):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(1.0).expand([2]).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(2, 2.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.MultivariateNormal(mu, scale_tril=tau.unsqueeze(-1) * factor))
        pyro.sample("z", likelihood(y).to_event(1), obs=z)


def dependent_support(z):
    units(z, lambda theta: dist.Uniform(0.0, theta), lambda y: dist.Normal(y, 0.5), theta=dist.Gamma(3.0, 1.0))


def dependent_part(z):
    theta = pyro.sample("theta", dist.Gamma(3.0, 1.0))
    with pyro.plate("units", len(z)):
        support = constraints.stack([constraints.interval(0.0, theta), constraints.real], dim=-1)
        y = pyro.sample("y", dist.ImproperUniform(support, (), (2,)))
        pyro.sample("z", dist.Normal(y.sum(-1), 0.5), obs=z)
        pyro.factor("prior", -(y**2).sum(-1))


def nested_plates(z):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", z.shape[-2], dim=-2):
        tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
        with pyro.plate("units", z.shape[-1], dim=-1):
            y = pyro.sample("y", dist.Normal(mu, tau))
            pyro.sample("z", dist.Normal(y, 0.5), obs=z)


def negative_dims(z):
    units, groups = pyro.plate("units", z.shape[-3], dim=-3), pyro.plate("groups", z.shape[-2], dim=-2)
    with groups:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with units:
        b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
    with units, groups:
        pyro.sample("z", dist.Normal(a, b), obs=z)


def indexed_observations(z, county):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("counties", 3):
        y = pyro.sample("y", dist.Normal(mu, 0.7))
    with pyro.plate("houses", len(z)):
        pyro.sample("z", dist.Normal(y[..., county], 0.5), obs=z)


def scaled(z, factor=3.0):
    with poutine.scale(scale=factor):
        mu = pyro.sample("mu", dist.LogNormal(0.0, 1.0))
        with pyro.plate("units", len(z)):
            pyro.sample("z", dist.Normal(mu, 0.5), obs=z)


def masked(z, mask):
    mu = pyro.sample("mu", dist.LogNormal(0.0, 1.0))
    flat = pyro.sample("flat", dist.Gamma(2.0, 1.0).mask(False))
    with pyro.plate("units", len(z)), poutine.mask(mask=mask):
        y = pyro.sample("y", dist.LogNormal(mu, 1.0))
        pyro.sample("z", dist.Normal(y, flat), obs=z)


def partly_observed(z, mask):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        pyro.sample("z", dist.Normal(mu, 0.5), obs=z, obs_mask=mask)


def with_factor(z, weight=1.0):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.LogNormal(mu, 0.7))
        square = pyro.deterministic("square", y**2, event_dim=0)
        pyro.factor("penalty", -weight * (square - z) ** 2)


def with_param(z):
    noise = pyro.param("noise", torch.tensor(0.5), constraint=constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        shift = pyro.param("shift", torch.linspace(-1.0, 1.0, len(z)), event_dim=0)
        pyro.sample("z", dist.Normal(mu + shift, noise), obs=z)


def subsampled(z, size=None, subsample=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z), subsample_size=size, subsample=subsample) as indices:
        y = pyro.sample("y", dist.LogNormal(mu, 0.7))
        pyro.sample("z", dist.Normal(y, 0.5), obs=z[indices])


def subsampled_twice(z):
    mu = pyro.sample("mu", dist.LogNormal(0.0, 1.0))
    with pyro.plate("groups", z.shape[-2], subsample_size=2, dim=-2) as i:
        tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
        with pyro.plate("units", z.shape[-1], subsample_size=3, dim=-1) as j:
            y = pyro.sample("y", dist.LogNormal(mu, tau))
            pyro.sample("z", dist.Normal(y, 0.5), obs=z[i[:, None], j])


def sequential(z):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    for i in pyro.plate("units", len(z)):
        y = pyro.sample(f"y_{i}", dist.LogNormal(mu, 0.7))
        pyro.sample(f"z_{i}", dist.Normal(y, 0.5), obs=z[i])


def random_walk(z):
    x = torch.zeros(())
    for i in pyro.markov(range(len(z))):
        x = pyro.sample(f"x_{i}", dist.Normal(x, 0.7))
        pyro.sample(f"z_{i}", dist.Normal(x, 0.5), obs=z[i])


class Regression(PyroModule):
    """Weights sampled as attributes, one prior depending on another latent, and a parameter."""

    def __init__(self):
        super().__init__()
        self.weight = PyroSample(lambda self: dist.Normal(torch.zeros(2), self.spread.unsqueeze(-1)).to_event(1))
        self.spread = PyroSample(dist.LogNormal(0.0, 1.0))
        self.noise = PyroParam(torch.tensor(0.5), constraint=constraints.positive)

    def forward(self, x, z):
        mean = (x * self.weight).sum(-1)
        with pyro.plate("units", len(z)):
            pyro.sample("z", dist.Normal(mean, self.noise), obs=z)


MODELS: dict[str, Callable[[], Case]] = {
    "conjugate_normal": lambda: Case(conjugate_normal, (normals(4),)),
    "poisson_lognormal": lambda: Case(poisson_lognormal, (counts(4),)),
    "bernoulli_logit": lambda: Case(bernoulli_logit, (bits(5, 3),)),
    "student_t": lambda: Case(student_t, (normals(4), normals(4, seed=1).exp())),
    "eight_schools": lambda: Case(eight_schools, tuple(torch.tensor(column) for column in EIGHT_SCHOOLS)),
    **{f"support_{n}": lambda make=make: Case(latents_of(make), (normals(2),)) for n, make in SUPPORTS.items()},
    "correlated": lambda: Case(correlated, (normals(3, 2),)),
    "dependent_support": lambda: Case(dependent_support, (normals(3),)),
    "dependent_part": lambda: Case(dependent_part, (normals(3),)),
    "nested_plates": lambda: Case(nested_plates, (normals(2, 3),)),
    "negative_dims": lambda: Case(negative_dims, (normals(3, 2, 1),)),
    "indexed_observations": lambda: Case(indexed_observations, (normals(5), torch.tensor([0, 2, 1, 0, 2]))),
    "scaled": lambda: Case(scaled, (normals(4),)),
    "masked": lambda: Case(masked, (normals(4), torch.arange(4) < 3)),
    "partly_observed": lambda: Case(partly_observed, (normals(4), torch.arange(4) < 3)),
    "with_factor": lambda: Case(with_factor, (normals(4),)),
    "with_param": lambda: Case(with_param, (normals(4),)),
    "keyword_arguments": lambda: Case(conjugate_normal, kwargs={"z": normals(4), "prior": 2.0}),
    "subsample_size": lambda: Case(subsampled, (normals(6), 2), indices={"units": torch.tensor([4, 1])}),
    "subsample": lambda: Case(subsampled, (normals(6),), {"subsample": torch.tensor([5, 0, 3])}),
    "subsampled_twice": lambda: Case(
        subsampled_twice,
        (normals(5, 4),),
        indices={"groups": torch.tensor([4, 1]), "units": torch.tensor([0, 3, 1])},
    ),
    "sequential": lambda: Case(sequential, (normals(3),)),
    "random_walk": lambda: Case(random_walk, (normals(3),)),
    "pyro_module": lambda: Case(Regression(), (normals(4, 2), normals(4))),
    "conditioned": lambda: Case(poutine.condition(poisson_lognormal, {"tau": torch.tensor(0.5)}), (counts(4),)),
    "unconditioned": lambda: Case(poutine.uncondition(conjugate_normal), (normals(4),)),
    "reparameterized": lambda: Case(
        poutine.reparam(poisson_lognormal, {"y": LocScaleReparam(0.3, shape_params=())}), (counts(4),)
    ),
}
SUBSAMPLED = {"subsample_size", "subsample", "subsampled_twice"}
