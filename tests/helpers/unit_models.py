"""Pyro models with units, shared by the tests of the guide: a table from name to a factory, data from fixed seeds.

Each says which plate holds the units and what a guide should find there: the global and the local sites and how many
unconstrained elements they have. All conditional modes are unique, so that any two ways to find them agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, PyroSample

from helpers.models import (
    MODELS,
    Case,
    bits,
    correlated,
    counts,
    normal,
    normals,
    uniforms,
    units,
)


class UnitCase(NamedTuple):
    """A model, what to call it with, and what a guide should find in it."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    global_dim: int
    num_units: int
    local_dim: int
    global_sites: tuple[str, ...] = ("mu", "tau")
    local_sites: tuple[str, ...] = ("y",)
    kwargs: dict[str, Any] = {}  # noqa: RUF012 (read only)
    unit_plate: str = "units"


def poisson_by_visit(z, unit, num_units):
    """Observations apart from the units, ragged; some units have none."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.Gamma(3.0, 4.0))
    with pyro.plate("units", num_units):
        y = pyro.sample("y", dist.Normal(mu, tau))
    with pyro.plate("visits", len(z)):
        pyro.sample("z", dist.Poisson(y[..., unit].exp()), obs=z)


def binomial_slopes(z, x, unit, num_units, trials):
    """Intercept and slope in one vector-valued site, as are their means and their scales; ragged."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    tau = pyro.sample("tau", dist.LogNormal(-0.5, 0.5).expand([2]).to_event(1))
    with pyro.plate("units", num_units):
        y = pyro.sample("y", dist.Normal(mu, tau).to_event(1))
    with pyro.plate("visits", len(z)):
        logits = y[..., unit, 0] + y[..., unit, 1] * x
        pyro.sample("z", dist.Binomial(trials, logits=logits), obs=z)


def bernoulli_answers(z):
    """Answers in a plate outside of that of the units."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.Exponential(1.0))
    answers, units = pyro.plate("answers", z.shape[-2], dim=-2), pyro.plate("units", z.shape[-1], dim=-1)
    with units:
        y = pyro.sample("y", dist.Normal(mu, tau))
        with answers:
            pyro.sample("z", dist.Bernoulli(logits=y), obs=z)


def student_t(z, errors):
    priors = {"mu": dist.StudentT(3.0, 0.0, 1.0), "tau": dist.HalfCauchy(1.0)}
    units(z, lambda mu, tau: dist.StudentT(4.0, mu, tau), lambda y: dist.StudentT(5.0, y, errors), **priors)


def negative_binomial(*, z, exposure):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    shape = pyro.sample("shape", dist.Gamma(4.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, tau))
        pyro.sample("z", dist.NegativeBinomial(shape, logits=y + exposure.log() - shape.log()), obs=z)


def gamma_rates(z):
    """Positive local latents, in a unit plate with a plate of repeats inside; with a scale parameter as a prior."""
    shape = pyro.sample("shape", dist.Gamma(3.0, 1.0))
    scale = pyro.sample("scale", dist.InverseGamma(3.0, 2.0))
    with pyro.plate("units", z.shape[-2], dim=-2):
        y = pyro.sample("y", dist.Gamma(shape, 1 / scale))
        with pyro.plate("repeats", z.shape[-1], dim=-1):
            pyro.sample("z", dist.Gamma(2.0, y), obs=z)


def beta_means(z):
    """Local latents in the unit interval."""
    priors = {"a": dist.Gamma(4.0, 1.0), "b": dist.Gamma(4.0, 1.0)}
    units(z, dist.Beta, lambda y: dist.Beta(6 * y, 6 * (1 - y)), **priors)


def categorical_probs(z):
    """Simplex latents, of four elements but three dimensions, with a simplex above them."""
    priors = {"center": dist.Dirichlet(torch.full((4,), 2.0)), "strength": dist.Gamma(4.0, 0.5)}
    units(z, lambda c, s: dist.Dirichlet(1 + s.unsqueeze(-1) * c), dist.Categorical, inside="draws", **priors)


def categorical_logits(z):
    """Vector-valued latents of three dimensions, one more than are identified."""
    mu = dist.Normal(0.0, 1.0).expand([3]).to_event(1)
    units(z, lambda mu: dist.Normal(mu, 0.8).to_event(1), lambda y: dist.Categorical(logits=y), inside="draws", mu=mu)


def level_and_spread(z):
    """Two local sites, one of them positive; units at dim -2."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("units", z.shape[-2], dim=-2):
        level = pyro.sample("level", dist.Normal(mu, 1.0))
        spread = pyro.sample("spread", dist.LogNormal(-0.5, 0.5))
        with pyro.plate("repeats", z.shape[-1], dim=-1):
            pyro.sample("z", dist.Normal(level, spread), obs=z)


def nested_latents(z):
    """Latents in a plate nested in that of the units: they belong to the block of their unit."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", z.shape[-2], dim=-2):
        level = pyro.sample("level", dist.Normal(mu, 1.0))
        with pyro.plate("items", z.shape[-1], dim=-1):
            item = pyro.sample("item", dist.Normal(level, 0.5))
            pyro.sample("z", dist.Poisson(item.exp()), obs=z)


def dim_minus_three(z):
    """Units three dimensions from the right, two plates inside; the site in the inner one has an event dimension."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    units = pyro.plate("units", z.shape[-4], dim=-3)
    items = pyro.plate("items", z.shape[-3], dim=-2)
    repeats = pyro.plate("repeats", z.shape[-2], dim=-1)
    with units:
        level = pyro.sample("level", dist.Normal(mu, 1.0))
        with items:
            item = pyro.sample("item", dist.Normal(level.unsqueeze(-1), torch.ones(2)).to_event(1))
            with repeats:
                pyro.sample("z", dist.Normal(item, 0.7).to_event(1), obs=z)


def units_inside_a_plate_of_data(z):
    """Units at dim -1, of which a site is sampled in a plate at dim -2 as well: an element for each of both."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    units, waves = pyro.plate("units", z.shape[-1], dim=-1), pyro.plate("waves", z.shape[-2], dim=-2)
    with units:
        level = pyro.sample("level", dist.Normal(mu, 1.0))
        with waves:
            wave = pyro.sample("wave", dist.LogNormal(0.3 * level, 0.5))
            pyro.sample("z", dist.Poisson(wave), obs=z)


def correlated_counts(z):
    correlated(z, lambda y: dist.Poisson(y.exp()))


def dependent_supports(z):
    """The support of a global depends on another global, that of the units on both."""
    high = pyro.sample("high", dist.Gamma(6.0, 2.0))
    low = pyro.sample("low", dist.Uniform(0.0, high))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Uniform(low, 1.0 + low + high))
        pyro.sample("z", dist.Normal(y, 0.5), obs=z)


def interval_units(z):
    """Two local sites with bounds; one of them has no sampler."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        bounded = pyro.sample("bounded", dist.Uniform(-2.0, 3.0))
        flat = pyro.sample("flat", dist.ImproperUniform(constraints.positive, (), ()))
        pyro.factor("prior", -flat - (bounded - mu) ** 2)
        pyro.sample("z", dist.Normal(bounded + flat, 0.6), obs=z)


def crossed_items(z):
    """A second, smaller plate of latents, crossed with the units: it goes to the head."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    items, units = pyro.plate("items", z.shape[-2], dim=-2), pyro.plate("units", z.shape[-1], dim=-1)
    with items:
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
    with units:
        y = pyro.sample("y", dist.Normal(mu, 1.0))
    with items, units:
        pyro.sample("z", dist.Bernoulli(logits=y - difficulty), obs=z)


def with_params(z):
    noise = pyro.param("noise", torch.tensor(0.5), constraint=constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        shift = pyro.param("shift", lambda: torch.linspace(-1.0, 1.0, len(z)), event_dim=0)
        y = pyro.sample("y", dist.Normal(mu + shift, 1.0))
        pyro.sample("z", dist.Normal(torch.tanh(y), noise), obs=z)


def missing(z, seen):
    """Values that are missing are masked out; the last unit has none."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", z.shape[-2], dim=-2):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        with pyro.plate("visits", z.shape[-1], dim=-1), poutine.mask(mask=seen):
            pyro.sample("z", dist.Poisson(y.exp()), obs=z)


def tempered(z, power):
    """Scales in the model: around a global, around the units, around the likelihood; a mask around a global."""
    with poutine.scale(scale=2.0):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with poutine.mask(mask=torch.tensor(False)):
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        with poutine.scale(scale=1.5):
            y = pyro.sample("y", dist.LogNormal(mu, 1.0))
        with poutine.scale(scale=power):
            pyro.sample("z", dist.Gamma(1 + tau, y), obs=z)


def with_factors(z):
    """Factors and a deterministic site, in the plate and outside."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("away_from_zero", -((mu - 1.0) ** 2))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        cube = pyro.deterministic("cube", y + y**3, event_dim=0)
        pyro.factor("penalty", -((cube - z) ** 2) / 4)


def counts_alone(z):
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Poisson(y.exp()), obs=z)


class Effects(PyroModule):
    """Latents as attributes of a module, with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.mu = PyroSample(dist.Normal(0.0, 1.0))
        self.noise = PyroParam(torch.tensor(0.5), constraint=constraints.positive)

    def forward(self, z):
        mu, noise = self.mu, self.noise  # read outside of the plate, to be outside of it
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(mu, 1.0))
            pyro.sample("z", dist.Normal(y, noise), obs=z)


# ------------------------------------------------------- for the guide, some of them subsampled


def constrained(z):
    """Constrained sites on either side, and two local ones."""
    rate = pyro.sample("rate", dist.Gamma(4.0, 2.0))
    share = pyro.sample("share", dist.Beta(3.0, 2.0))
    with pyro.plate("units", len(z)):
        size = pyro.sample("size", dist.Gamma(3.0, rate))
        part = pyro.sample("part", dist.Beta(1.0 + 3.0 * share, 2.0))
        pyro.sample("z", dist.Poisson(4.0 * size * part), obs=z)


def tempered_twice(z, factor=0.5):
    """A tempered likelihood, and a prior that counts twice."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        with poutine.scale(scale=2.0):
            y = pyro.sample("y", dist.LogNormal(mu, 0.7))
        with poutine.scale(scale=factor):
            pyro.sample("z", dist.Poisson(y), obs=z)


def masked_units(z, mask):
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


def batches(z, size=None, subsample=None):
    """Two globals and one local; subsampled on demand."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.LogNormal(-0.5, 0.3))
    with pyro.plate("units", len(z), subsample_size=size, subsample=subsample) as indices:
        y = pyro.sample("y", dist.Normal(mu, tau))
        pyro.sample("z", dist.Poisson(y.exp()), obs=z[indices])


# ------------------------------------------------------------------------------------------------------- tables

VISITS = torch.tensor([0, 3, 0, 1, 0, 3, 4])  # of five units; unit 2 has none

UNIT_MODELS: dict[str, Callable[[], UnitCase]] = {
    "normal": lambda: UnitCase(normal, (1 + 2 * normals(5),), 2, 5, 1),
    "poisson_by_visit": lambda: UnitCase(poisson_by_visit, (counts(7), VISITS, 5), 2, 5, 1),
    "binomial_slopes": lambda: UnitCase(binomial_slopes, (counts(7).clamp(max=6), normals(7), VISITS, 5, 6), 4, 5, 2),
    "bernoulli_answers": lambda: UnitCase(bernoulli_answers, (bits(4, 3),), 2, 3, 1),
    "negative_binomial": lambda: UnitCase(
        negative_binomial, (), 3, 4, 1, ("mu", "tau", "shape"), kwargs={"z": counts(4), "exposure": 0.5 + uniforms(4)}
    ),
    "student_t": lambda: UnitCase(student_t, (normals(4), 0.5 + uniforms(4)), 2, 4, 1),
    "gamma_rates": lambda: UnitCase(gamma_rates, (0.1 + uniforms(4, 3),), 2, 4, 1, ("shape", "scale")),
    "beta_means": lambda: UnitCase(beta_means, (0.1 + 0.8 * uniforms(4),), 2, 4, 1, ("a", "b")),
    "categorical_probs": lambda: UnitCase(
        categorical_probs, (torch.arange(15).reshape(5, 3) * 7 % 4,), 4, 3, 3, ("center", "strength")
    ),
    "categorical_logits": lambda: UnitCase(
        categorical_logits, (torch.arange(12).reshape(4, 3) * 5 % 3,), 3, 3, 3, ("mu",)
    ),
    "level_and_spread": lambda: UnitCase(level_and_spread, (normals(4, 3),), 1, 4, 2, ("mu",), ("level", "spread")),
    "nested_latents": lambda: UnitCase(nested_latents, (counts(3, 2),), 1, 3, 3, ("mu",), ("level", "item")),
    "dim_minus_three": lambda: UnitCase(dim_minus_three, (normals(3, 2, 2, 2),), 1, 3, 5, ("mu",), ("level", "item")),
    "units_inside_a_plate_of_data": lambda: UnitCase(
        units_inside_a_plate_of_data, (counts(2, 3),), 1, 3, 3, ("mu",), ("level", "wave")
    ),
    "correlated": lambda: UnitCase(correlated_counts, (counts(4, 2),), 5, 4, 2, ("mu", "tau", "factor")),
    "dependent_supports": lambda: UnitCase(dependent_supports, (2 + normals(3) / 2,), 2, 3, 1, ("high", "low")),
    "interval_units": lambda: UnitCase(interval_units, (1 + normals(3),), 1, 3, 2, ("mu",), ("bounded", "flat")),
    "crossed_items": lambda: UnitCase(crossed_items, (bits(2, 4),), 3, 4, 1, ("mu", "difficulty")),
    "with_params": lambda: UnitCase(with_params, (normals(4) / 2,), 1, 4, 1, ("mu",)),
    "missing": lambda: UnitCase(missing, (counts(4, 3), torch.arange(12).reshape(4, 3) < 8), 1, 4, 1, ("mu",)),
    "tempered": lambda: UnitCase(tempered, (0.1 + uniforms(4), 0.5), 2, 4, 1),
    "with_factors": lambda: UnitCase(with_factors, (1 + normals(4),), 1, 4, 1, ("mu",)),
    "without_globals": lambda: UnitCase(counts_alone, (counts(3),), 0, 3, 1, ()),
    "module": lambda: UnitCase(Effects(), (normals(4),), 1, 4, 1, ("mu",)),
    "non_centered": lambda: UnitCase(
        poutine.reparam(normal, {"y": LocScaleReparam(0.3, shape_params=())}),
        *((normals(4),), 2, 4, 1),
        local_sites=("y_decentered",),
    ),
    "one_unit": lambda: UnitCase(
        poutine.condition(normal, {"mu": torch.tensor(0.3)}), (normals(1),), 1, 1, 1, ("tau",)
    ),
}

FAMILY_MODELS: dict[str, Callable[[], Case]] = {
    "poisson": lambda: Case(batches, (counts(5),)),
    "constrained": lambda: Case(constrained, (counts(4),)),
    "weighted": lambda: Case(tempered_twice, (counts(4),)),
    "masked": lambda: Case(masked_units, (counts(4), torch.arange(4) < 3)),
    "vectors": lambda: Case(vectors, (counts(3, 2),)),
    "vectors, subsampled": lambda: Case(vectors, (counts(5, 2), 3)),
    "without globals": lambda: Case(without_globals, (counts(4),)),
    "with parameter": lambda: Case(with_parameter, (normals(4),)),
    "lonely global": lambda: Case(lonely_global, (counts(4),)),
    "one unit": lambda: Case(batches, (counts(1),)),
    "subsampled": lambda: Case(batches, (counts(5), 2)),
    "given indices": lambda: Case(batches, (counts(5),), {"subsample": torch.tensor([4, 0, 3])}),
    **{name: MODELS[name] for name in ("indexed_observations", "dependent_support", "correlated", "nested_plates")},
}
