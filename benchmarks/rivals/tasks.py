"""The tasks: data from a seed, and a plain Pyro model of each.

A parameter file and every comparison use the names and the order of :attr:`Task.global_names` and
:attr:`Task.local_names`, in unconstrained coordinates: that of a positive site is its logarithm.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]

RADON_COUNTIES = 85
SIZES = {
    "poisson": (100, 1000, 10_000, 100_000, 1_000_000),
    "bernoulli": (100, 1000, 10_000, 100_000, 1_000_000),
    "radon": (RADON_COUNTIES, 1000, 10_000, 100_000),
    "eight_schools": (8,),
}


def simulate_poisson(units: int, rng: np.random.Generator) -> Arrays:
    """Three counts of each unit: ``z (3, N)``."""
    y = rng.normal(0.5, 0.7, units)
    return {"z": rng.poisson(np.exp(y), (3, units)).astype(float)}


def simulate_bernoulli(units: int, rng: np.random.Generator) -> Arrays:
    """Five answers of each group: ``z (5, N)``, and three covariates of each answer: ``x (5, N, 3)``."""
    # Each covariate lies in memory of its own, as the models take one after the other.
    x = np.moveaxis(rng.normal(size=(3, 5, units)), 0, -1)
    u = rng.normal(0.0, 1.0, units)
    logits = -0.5 + x @ np.array([0.8, -0.4, 0.2]) + u
    return {"x": x, "z": (rng.random((5, units)) < 1 / (1 + np.exp(-logits))).astype(float)}


def simulate_radon(units: int, rng: np.random.Generator) -> Arrays:
    """Ten homes of each county, with truths near the fit of the real data; or the real data, for 85 counties."""
    if units == RADON_COUNTIES:
        return _radon_minnesota()
    county = np.repeat(np.arange(units), 10)
    floor = (rng.random(10 * units) < 0.17).astype(float)
    alpha, beta = rng.normal(1.5, 0.33, units), rng.normal(-0.7, 0.35, units)
    return {"county": county, "floor": floor, "log_radon": rng.normal(alpha[county] + beta[county] * floor, 0.72)}


def _radon_minnesota() -> Arrays:
    from laplace_amort.examples import datasets

    columns = {name: column.double().numpy() for name, column in datasets.load("radon_mn").items()}
    return {**columns, "county": columns["county"].astype(np.int64)}


def eight_schools_data(units: int, rng: np.random.Generator) -> Arrays:
    """Eight effects and their standard errors; there is no randomness."""
    if units != 8:
        raise ValueError(f"eight_schools has 8 units, not {units}")
    return {
        "y": np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
        "sigma": np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
    }


def pyro_models() -> dict[str, Callable[..., None]]:
    """The Pyro models by task, whose arguments are the arrays of the data in order.

    Made here and not at import, so that rivals of other languages need no Pyro.
    """
    import pyro
    import pyro.distributions as dist

    from laplace_amort.examples import radon

    def poisson(z: Any) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        log_tau = pyro.sample("log_tau", dist.Normal(0.0, 1.0))
        with pyro.plate("units", z.shape[-1], dim=-1):
            y = pyro.sample("y", dist.Normal(mu, log_tau.exp()))
            with pyro.plate("counts", z.shape[-2], dim=-2):
                pyro.sample("z", dist.Poisson(y.exp()), obs=z)

    def bernoulli(x: Any, z: Any) -> None:
        beta = pyro.sample("beta", dist.Normal(0.0, 5.0).expand([4]).to_event(1))
        log_tau = pyro.sample("log_tau", dist.Normal(0.0, 1.0))
        with pyro.plate("units", z.shape[-1], dim=-1):
            u = pyro.sample("u", dist.Normal(0.0, log_tau.exp()))
            slopes = sum(x[..., k] * beta[..., k + 1] for k in range(3))
            with pyro.plate("answers", z.shape[-2], dim=-2):
                pyro.sample("z", dist.Bernoulli(logits=beta[..., 0] + slopes + u), obs=z)

    def eight_schools(y: Any, sigma: Any) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", y.shape[-1], dim=-1):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return {"poisson": poisson, "bernoulli": bernoulli, "radon": radon.model, "eight_schools": eight_schools}


@dataclass(frozen=True)
class Site:
    """A latent site: its name, its unconstrained elements (per unit, if local), and whether its support is positive."""

    name: str
    size: int = 1
    positive: bool = False

    @property
    def elements(self) -> list[str]:
        """Names of the unconstrained elements, such as ``log tau`` and ``beta[0]``."""
        name = f"log {self.name}" if self.positive else self.name
        return [name] if self.size == 1 else [f"{name}[{k}]" for k in range(self.size)]


@dataclass(frozen=True)
class Kind:
    """What the instances of a task have in common."""

    simulate: Callable[[int, np.random.Generator], Arrays]
    global_sites: tuple[Site, ...]
    local_sites: tuple[Site, ...]
    max_plate_nesting: int


KINDS = {
    "poisson": Kind(simulate_poisson, (Site("mu"), Site("log_tau")), (Site("y"),), 2),
    "bernoulli": Kind(simulate_bernoulli, (Site("beta", 4), Site("log_tau")), (Site("u"),), 2),
    "radon": Kind(
        simulate_radon,
        (
            Site("mu_alpha"),
            Site("mu_beta"),
            Site("sigma_alpha", positive=True),
            Site("sigma_beta", positive=True),
            Site("sigma_y", positive=True),
        ),
        (Site("alpha"), Site("beta")),
        1,
    ),
    "eight_schools": Kind(eight_schools_data, (Site("mu"), Site("tau", positive=True)), (Site("theta"),), 1),
}


@dataclass(frozen=True)
class Task:
    """One task at one size, with the data of one seed."""

    name: str
    units: int
    seed: int

    @property
    def kind(self) -> Kind:
        """What it has in common with other instances."""
        return KINDS[self.name]

    @cached_property
    def arrays(self) -> Arrays:
        """The data by name, in the order of the model's arguments."""
        # The size is in the seed, so that the data of one size are not the first rows of the next.
        return self.kind.simulate(self.units, np.random.default_rng([self.seed, self.units]))

    @property
    def global_names(self) -> list[str]:
        """Names of the unconstrained elements of the globals, in the order of the model."""
        return [element for site in self.kind.global_sites for element in site.elements]

    @property
    def local_names(self) -> list[str]:
        """Names of the unconstrained elements that each unit has."""
        return [element for site in self.kind.local_sites for element in site.elements]

    @cached_property
    def pyro_model(self) -> Callable[..., None]:
        """The plain Pyro model."""
        return pyro_models()[self.name]

    @cached_property
    def pyro_args(self) -> tuple[Any, ...]:
        """The arguments of the Pyro model, as tensors that share the memory of the arrays."""
        import torch

        return tuple(torch.from_numpy(array) for array in self.arrays.values())

    def write_csv(self, folder: Path) -> None:
        """Write ``data.csv`` for R: a row for each unit (poisson, eight_schools), answer or home; indices from 1."""
        columns = _CSV_COLUMNS[self.name](self.arrays)
        with (folder / "data.csv").open("w", encoding="ascii", newline="") as file:
            csv.writer(file).writerow(columns)
            # repr of a float gives it back exactly; integers stay integers.
            csv.writer(file).writerows(zip(*(column.tolist() for column in columns.values()), strict=True))


def _poisson_columns(arrays: Arrays) -> Arrays:
    return {f"z{k + 1}": row.astype(np.int64) for k, row in enumerate(arrays["z"])}


def _bernoulli_columns(arrays: Arrays) -> Arrays:
    x, z = arrays["x"], arrays["z"]
    covariates = {f"x{k + 1}": x[..., k].ravel() for k in range(3)}
    group = np.tile(np.arange(1, z.shape[1] + 1), z.shape[0])
    return {"group": group, "z": z.ravel().astype(np.int64), **covariates}


_CSV_COLUMNS: dict[str, Callable[[Arrays], Arrays]] = {
    "poisson": _poisson_columns,
    "bernoulli": _bernoulli_columns,
    "radon": lambda arrays: {**arrays, "county": arrays["county"] + 1},
    "eight_schools": lambda arrays: arrays,
}
