"""Models with units for the tests of AutoLaplaceFamily, and noise that is the same for every ELBO.

Data come from fixed seeds. Every model can be vectorized: a value may carry dimensions of enclosing plates on its left.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from helpers.models import MODELS, Case, counts, normals
from laplace_amort.guide.auto import AutoLaplaceFamily


def constrained(z):
    """Constrained sites on either side, and two local ones."""
    rate = pyro.sample("rate", dist.Gamma(4.0, 2.0))
    share = pyro.sample("share", dist.Beta(3.0, 2.0))
    with pyro.plate("units", len(z)):
        size = pyro.sample("size", dist.Gamma(3.0, rate))
        part = pyro.sample("part", dist.Beta(1.0 + 3.0 * share, 2.0))
        pyro.sample("z", dist.Poisson(4.0 * size * part), obs=z)


def weighted(z, factor=0.5):
    """A tempered likelihood, and a prior that counts twice."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        with poutine.scale(scale=2.0):
            y = pyro.sample("y", dist.LogNormal(mu, 0.7))
        with poutine.scale(scale=factor):
            pyro.sample("z", dist.Poisson(y), obs=z)


def masked(z, mask):
    """Units without data."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.LogNormal(mu, 0.7))
        with poutine.mask(mask=mask):
            pyro.sample("z", dist.Poisson(y), obs=z)


def vectors(z, size=None):
    """Vector-valued sites on both sides, the unit plate at dim -2 with another one inside, subsampled."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("units", len(z), subsample_size=size, dim=-2) as indices:
        y = pyro.sample("y", dist.Normal(mu, 0.7).to_event(1))
        with pyro.plate("items", z.shape[-1], dim=-1):
            x = pyro.sample("x", dist.Normal(y.sum(-1), 0.5))
            pyro.sample("z", dist.Poisson(x.exp()), obs=z[indices])


def without_globals(z):
    """Locals and a parameter of the model only."""
    loc = pyro.param("loc", torch.tensor(0.3))
    scale = pyro.param("scale", torch.tensor(0.8), constraint=constraints.positive)
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(loc, scale))
        pyro.sample("z", dist.Poisson(y.exp()), obs=z)


def with_parameter(z):
    """Globals, locals, and a parameter of the model."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    noise = pyro.param("noise", torch.tensor(0.5), constraint=constraints.positive)
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, 0.7))
        pyro.sample("z", dist.StudentT(5.0, y, noise), obs=z)


def lonely_global(z):
    """A global that no unit hangs on."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    bias = pyro.sample("bias", dist.Gamma(2.0, 1.0))
    pyro.sample("reading", dist.Poisson(bias), obs=torch.tensor(3.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, 0.7))
        pyro.sample("z", dist.Poisson(y.exp()), obs=z)


def poisson(z, size=None, subsample=None):
    """Two globals and one local; subsampled on demand."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.LogNormal(-0.5, 0.3))
    with pyro.plate("units", len(z), subsample_size=size, subsample=subsample) as indices:
        y = pyro.sample("y", dist.Normal(mu, tau))
        pyro.sample("z", dist.Poisson(y.exp()), obs=z[indices])


FAMILY_MODELS: dict[str, Callable[[], Case]] = {
    "poisson": lambda: Case(poisson, (counts(5),)),
    "constrained": lambda: Case(constrained, (counts(4),)),
    "weighted": lambda: Case(weighted, (counts(4),)),
    "masked": lambda: Case(masked, (counts(4), torch.arange(4) < 3)),
    "vectors": lambda: Case(vectors, (counts(3, 2),)),
    "vectors, subsampled": lambda: Case(vectors, (counts(5, 2), 3)),
    "without globals": lambda: Case(without_globals, (counts(4),)),
    "with parameter": lambda: Case(with_parameter, (normals(4),)),
    "lonely global": lambda: Case(lonely_global, (counts(4),)),
    "one unit": lambda: Case(poisson, (counts(1),)),
    "subsampled": lambda: Case(poisson, (counts(5), 2)),
    "given indices": lambda: Case(poisson, (counts(5),), {"subsample": torch.tensor([4, 0, 3])}),
    **{name: MODELS[name] for name in ("indexed_observations", "dependent_support", "correlated", "nested_plates")},
}


EXACT = {"rtol": 1e-9, "atol": 1e-9}


def closed_form(values, z):
    """The modes of models.conjugate_normal, in the form that ClosedFormMode takes."""
    share = 0.7**-2 / (0.7**-2 + 0.5**-2)
    return {"y": share * values["mu"] + (1 - share) * z}


def loss_of(model, guide, *args, seed=1, elbo=None):
    pyro.set_rng_seed(seed)
    return torch.as_tensor((elbo or Trace_ELBO()).loss(model, guide, *args))


def step(model, guide, *args, lr=0.05):
    return SVI(model, guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO()).step(*args)


def same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], **EXACT)


def with_state(**options):
    """A guide that has made a step, and its data."""
    guide, z = AutoLaplaceFamily(poisson, **options), counts(5)
    step(poisson, guide, z)
    return guide, z


def saved(guide):
    """What torch.save makes of it."""
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    return file


@contextlib.contextmanager
def fixed_noise(noise: list[Tensor]) -> Iterator[None]:
    """Let reparameterized normals take their noise from a list, in turn; each is reshaped to what is asked for.

    So two estimators that draw in another order or another shape can be given the same particles.
    """
    rest = list(noise)

    def take(shape, dtype, device):
        values = rest.pop(0)
        assert values.numel() == torch.Size(shape).numel(), (values.shape, shape)
        return values.reshape(shape).to(dtype)

    modules = (torch.distributions.normal, torch.distributions.multivariate_normal)
    saved = [module._standard_normal for module in modules]
    for module in modules:
        module._standard_normal = take
    try:
        yield
    finally:
        for module, original in zip(modules, saved, strict=True):
            module._standard_normal = original
    assert not rest, f"{len(rest)} draws were not made"
