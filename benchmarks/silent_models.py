"""Random hierarchical models, each a function of a seed, written as people write them.

A model has one of the likelihoods of ``silent_likelihoods.py`` (in turn), a prior of scales out of seven, one to three
latents a unit (independent, or correlated with an LKJ prior), 6 to 300 units, 1 to 20 observations of each, and one of
three forms: long with an index of units (``u[..., group]``), long and not centered, or two nested plates with masks.
Observations are missing in some, and some units may have none. Data are made with the model, at truths from the middle
of the priors. They are rounded to single precision, so that a model in either precision has the same posterior.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from silent_density import Hierarchy, UnitSite
from silent_likelihoods import LIKELIHOODS
from silent_priors import SCALE_PRIORS, Array, Correlation, Positive, Prior, Real, as_torch, scale_prior

VERSION = 1  # of what a seed draws: gold of another version is no gold
ROWS = {1: 400, 2: 240, 3: 150}  # at most, by the latents of a unit
ROUNDED = 0.15  # share of the models that are in single precision
NAMES = ("u", "v", "w")
MEANS = ("mu", "nu", "xi")


@dataclass(frozen=True)
class Case:
    """A model with its data.

    :param int seed: that it was drawn with.
    :param model: of Pyro.
    :param arrays: arguments of the model: floats, integers and booleans.
    :param Hierarchy density: the same in NumPy.
    :param dict truth: of the globals that the data were made with, ``(1, *shape)`` by name.
    :param dict label: what kind of model it is.
    """

    seed: int
    model: Callable[..., None]
    arrays: tuple[Array, ...]
    density: Hierarchy
    truth: dict[str, Array]
    label: dict[str, Any]

    def args(self) -> tuple[torch.Tensor, ...]:
        """Return the arguments as tensors, in torch's default dtype where they are not integers."""
        return tuple(as_torch(a) if a.dtype.kind == "f" else torch.from_numpy(a) for a in self.arrays)


@dataclass(frozen=True)
class _Plan:
    """What a seed has chosen."""

    family: str
    k: int
    form: str
    correlated: bool
    ragged: bool
    empty: bool
    num_units: int
    each: int
    scales: str
    unit: float
    loc: float
    slopes: int


def draw_case(seed: int) -> Case:
    """Return the model of a seed."""
    rng = np.random.default_rng([VERSION, seed])
    plan = _plan(seed, rng)
    density, truth = _without_data(plan, rng)
    density = _with_data(density, truth, plan, rng)
    build = _nested if plan.form == "nested" else _long
    model, arrays = build(density, plan, rng)
    strength = "weak" if plan.each <= 2 else "strong" if plan.each >= 12 else "medium"
    label = {
        "likelihood": plan.family,
        "k": plan.k,
        "scales": plan.scales,
        "form": plan.form + (", LKJ" if plan.correlated else ""),
        "units": plan.num_units,
        "each": plan.each,
        "strength": strength,
        "ragged": plan.ragged,
        "dtype": "float32" if rng.uniform() < ROUNDED else "float64",
        "d": density.dim,
    }
    return Case(seed, model, arrays, density, truth, label)


def _plan(seed: int, rng: np.random.Generator) -> _Plan:
    family = tuple(LIKELIHOODS)[seed % len(LIKELIHOODS)]
    k = int(rng.choice([1, 2, 3], p=[0.55, 0.3, 0.15]))
    form = str(rng.choice(["long", "nested", "standard"], p=[0.5, 0.35, 0.15]))
    if family == "OrderedLogistic" and form == "nested":  # its cuts are the intercept
        form = "long"
    if form == "standard":
        k = 1
    each = int(rng.choice([1, 2, 5, 12, 20], p=[0.15, 0.2, 0.35, 0.2, 0.1])) if k == 1 else int(rng.choice([3, 6, 15]))
    num_units = int(np.exp(rng.uniform(np.log(6), np.log(300))))
    num_units = max(6, min(num_units, ROWS[k] // each))
    ragged = bool(each > 1 and rng.uniform() < 0.5)
    moved = family in ("Normal", "StudentT", "Laplace") and rng.uniform() < 0.4
    return _Plan(
        family,
        k,
        form,
        correlated=bool(k > 1 and form == "long" and rng.uniform() < 0.6),
        ragged=ragged,
        empty=bool(ragged and rng.uniform() < 0.25),
        num_units=num_units,
        each=each,
        scales=str(rng.choice(SCALE_PRIORS)),
        unit=8.0 if moved else 1.0,
        loc=40.0 if moved else LIKELIHOODS[family].loc,
        slopes=int(rng.integers(0, 3)),
    )


# ------------------------------------------------------------------------------------------------- priors and truths


def _without_data(plan: _Plan, rng: np.random.Generator) -> tuple[Hierarchy, dict[str, Array]]:
    """Globals and truths, with arrays without rows."""
    k, priors, wide = plan.k, {}, float(rng.choice([2.5, 5.0, 10.0])) * plan.unit
    truths = [(0.3, 1.2), (0.05, 0.2), (1.2, 2.5)][rng.choice(3, p=[0.7, 0.15, 0.15])]
    intercept = plan.family != "OrderedLogistic"
    if plan.form == "nested":
        heavy = bool(rng.uniform() < 0.25)
        priors |= {name: Real(wide, heavy=heavy) for name in MEANS[:k]}
        priors |= {f"beta_{j}": Real(plan.unit * 2.5) for j in range(plan.slopes)}
        fixed = tuple((name, None) for name in priors)
        priors |= {f"tau_{name}": scale_prior(plan.scales, plan.unit, rng, truths) for name in NAMES[:k]}
        scales = tuple((f"tau_{name}", None) for name in NAMES[:k])
        sites = {name: UnitSite((j,), (MEANS[j], None)) for j, name in enumerate(NAMES[:k])}
    else:
        size = max(k - 1 + plan.slopes + intercept, 1)
        priors["beta"] = Real(wide, size=size)
        fixed = tuple(("beta", j) for j in range(size))
        priors["tau"] = scale_prior(plan.scales, plan.unit, rng, truths, None if k == 1 else k)
        scales = (("tau", None),) if k == 1 else tuple(("tau", j) for j in range(k))
        sites = {"u": UnitSite(tuple(range(k)), standard=plan.form == "standard")}
    if plan.correlated:
        priors["corr"] = Correlation(k, float(rng.choice([1.0, 2.0])))
    priors |= LIKELIHOODS[plan.family].aux(rng, plan.unit, plan.scales)
    truth = {name: _rounded(prior.draw(rng))[None] for name, prior in priors.items()}
    _place(truth, fixed, plan, rng)
    none = np.zeros((0, 0))
    correlation = "corr" if plan.correlated else None
    empty = np.zeros(0, dtype=np.intp)
    return Hierarchy(priors, fixed, scales, correlation, plan.family, none, none, none, empty, 0, sites), truth


def _place(
    truth: dict[str, Array], fixed: tuple[tuple[str, int | None], ...], plan: _Plan, rng: np.random.Generator
) -> None:
    """Put the intercept where the likelihood has something to say, and slopes at some half a unit."""
    for place, (name, index) in enumerate(fixed):
        value = 0.5 * plan.unit * rng.normal()
        if place == 0 and plan.family != "OrderedLogistic":
            value += plan.loc
        truth[name][(0,) if index is None else (0, index)] = _rounded(np.asarray(value))


def _rounded(x: Array) -> Array:
    """The nearest values in single precision."""
    return np.asarray(x, dtype=np.float32).astype(np.float64)


# --------------------------------------------------------------------------------------------------------------- data


def _with_data(density: Hierarchy, truth: dict[str, Array], plan: _Plan, rng: np.random.Generator) -> Hierarchy:
    counts = np.full(plan.num_units, plan.each)
    if plan.ragged:
        counts = rng.integers(0 if plan.empty else 1, plan.each + 1, size=plan.num_units)
        counts[0] = plan.each
    group = np.repeat(np.arange(plan.num_units), counts)
    place = np.concatenate([np.arange(count) for count in counts])
    n = len(group)
    time = _rounded((place - (plan.each - 1) / 2) / max(plan.each - 1, 1) * 2)
    w = np.stack([np.ones(n), time, _rounded(rng.normal(size=n))], axis=-1)[:, : plan.k]
    slopes = _rounded(rng.normal(size=(n, len(density.fixed) + 1)))
    with_intercept = np.concatenate([w, slopes], axis=1)
    x = with_intercept[:, int(plan.family == "OrderedLogistic") :][:, : len(density.fixed)]
    root = density.root(truth)[0]
    u = rng.normal(size=(plan.num_units, plan.k)) @ root.T
    eta = x @ density.beta(truth)[0] + (w * u[group]).sum(1)
    aux = {name: value[0] for name, value in truth.items()}
    z = _rounded(density.likelihood.draw(rng, eta, aux))
    return Hierarchy(
        density.priors,
        density.fixed,
        density.scales,
        density.correlation,
        density.family,
        x,
        w,
        z,
        group,
        plan.num_units,
        density.sites,
    )


# ------------------------------------------------------------------------------------------------------------- models


def _long(density: Hierarchy, plan: _Plan, rng: np.random.Generator) -> tuple[Callable[..., None], tuple[Array, ...]]:
    """Rows with the index of their unit, in random order."""
    priors, likelihood, k, num_units = density.priors, density.likelihood, plan.k, plan.num_units
    aux = [name for name in priors if name not in ("beta", "tau", "corr")]
    order = rng.permutation(len(density.z))
    arrays = (density.x[order], density.group[order].astype(np.int64), density.z[order])

    def standard(x: Any, group: Any, z: Any) -> None:
        beta, tau = pyro.sample("beta", priors["beta"].torch()), pyro.sample("tau", priors["tau"].torch())
        others = {name: pyro.sample(name, priors[name].torch()) for name in aux}
        with pyro.plate("units", num_units):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(z)):
            eta = beta @ x.T + tau * u[..., group]
            pyro.sample("z", likelihood.pyro(eta, others), obs=z)

    def intercepts(x: Any, group: Any, z: Any) -> None:
        beta, tau = pyro.sample("beta", priors["beta"].torch()), pyro.sample("tau", priors["tau"].torch())
        others = {name: pyro.sample(name, priors[name].torch()) for name in aux}
        with pyro.plate("units", num_units):
            u = pyro.sample("u", dist.Normal(0.0, tau))
        with pyro.plate("rows", len(z)):
            eta = beta @ x.T + u[..., group]
            pyro.sample("z", likelihood.pyro(eta, others), obs=z)

    def slopes(x: Any, w: Any, group: Any, z: Any) -> None:
        beta, tau = pyro.sample("beta", priors["beta"].torch()), pyro.sample("tau", priors["tau"].torch())
        others = {name: pyro.sample(name, priors[name].torch()) for name in aux}
        with pyro.plate("units", num_units):
            u = pyro.sample("u", dist.Normal(torch.zeros(k), tau).to_event(1))
        with pyro.plate("rows", len(z)):
            eta = beta @ x.T + (u[..., group, :] * w).sum(-1)
            pyro.sample("z", likelihood.pyro(eta, others), obs=z)

    def correlated(x: Any, w: Any, group: Any, z: Any) -> None:
        beta, tau = pyro.sample("beta", priors["beta"].torch()), pyro.sample("tau", priors["tau"].torch())
        corr = pyro.sample("corr", priors["corr"].torch())
        others = {name: pyro.sample(name, priors[name].torch()) for name in aux}
        with pyro.plate("units", num_units):
            u = pyro.sample("u", dist.MultivariateNormal(torch.zeros(k), scale_tril=tau[..., None] * corr))
        with pyro.plate("rows", len(z)):
            eta = beta @ x.T + (u[..., group, :] * w).sum(-1)
            pyro.sample("z", likelihood.pyro(eta, others), obs=z)

    if k == 1:
        return standard if plan.form == "standard" else intercepts, arrays
    return correlated if plan.correlated else slopes, (arrays[0], density.w[order], *arrays[1:])


def _nested(density: Hierarchy, plan: _Plan, rng: np.random.Generator) -> tuple[Callable[..., None], tuple[Array, ...]]:
    """A row for each occasion and a column for each unit, with a mask where observations are missing."""
    priors, likelihood, k, names = density.priors, density.likelihood, plan.k, NAMES[: plan.k]
    means, betas = MEANS[:k], [name for name in priors if name.startswith("beta_")]
    aux = [name for name in priors if name not in (*means, *betas) and not name.startswith("tau_")]
    starts = np.searchsorted(density.group, density.group)
    place = np.arange(len(density.z)) - starts
    shape = (plan.each, plan.num_units)
    mask, z = np.zeros(shape, dtype=bool), np.full(shape, density.z[0])
    mask[place, density.group], z[place, density.group] = True, density.z
    x, w = np.zeros((len(betas), *shape)), np.zeros((k, *shape))
    x[:, place, density.group], w[:, place, density.group] = density.x[:, k:].T, density.w.T

    def model(x: Any, w: Any, z: Any, mask: Any = None) -> None:
        centers = [pyro.sample(name, priors[name].torch()) for name in means]
        slopes = [pyro.sample(name, priors[name].torch()) for name in betas]
        taus = [pyro.sample(f"tau_{name}", priors[f"tau_{name}"].torch()) for name in names]
        others = {name: pyro.sample(name, priors[name].torch()) for name in aux}
        with pyro.plate("units", z.shape[-1], dim=-1):
            units = [pyro.sample(name, dist.Normal(*at)) for name, *at in zip(names, centers, taus, strict=True)]
            with pyro.plate("occasions", z.shape[-2], dim=-2):
                eta = units[0]
                for unit, one in zip(units[1:], w[1:], strict=True):
                    eta = eta + unit * one
                for slope, one in zip(slopes, x, strict=True):
                    eta = eta + slope * one
                with pyro.poutine.mask(mask=True if mask is None else mask):
                    pyro.sample("z", likelihood.pyro(eta, others), obs=z)

    return model, (x, w, z, mask) if plan.ragged else (x, w, z)


__all__ = ["VERSION", "Case", "Positive", "Prior", "draw_case"]
