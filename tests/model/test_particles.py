"""Which models take a dimension of particles: what they index and multiply decides, and numbers are compared."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.models import normals, poisson_lognormal

from laplace_amort import LogJoint
from laplace_amort.model.particles import takes_particles

COUNTY = torch.arange(12) % 4
X = torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(12, 3)


def counties(z, look_up):
    with pyro.plate("counties", 4):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 12):
        pyro.sample("z", dist.Normal(look_up(a), 1.0), obs=z)


def lines(z, product):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", 12):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(product(beta) + a, 1.0), obs=z)


def pairs(z, stacked):
    a, b = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "ab")
    with pyro.plate("rows", 12):
        y = pyro.sample("y", dist.Normal(stacked(a, b), 1.0))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)


def reversed_units(z, look_up):
    """Of as many units as there are particles: shapes fit, and are wrong."""
    with pyro.plate("units", 8):
        a = pyro.sample("a", dist.Normal(torch.arange(8.0), 1.0))
    with pyro.plate("rows", 8):
        pyro.sample("z", dist.Normal(look_up(a), 1.0), obs=z[:8])


def subsampled(z, subsample_size):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", 12, subsample_size=subsample_size) as units:
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z[units])


@pytest.mark.parametrize(
    ("model", "how", "taken"),
    [
        (counties, lambda a: a[COUNTY], False),
        (counties, lambda a: a[..., COUNTY], True),
        (counties, lambda a: a.repeat(3), False),
        (lines, lambda beta: X @ beta, False),
        (lines, lambda beta: (X * beta).sum(-1), True),
        (pairs, lambda a, b: torch.stack([a, b]).sum(0), True),
        (pairs, lambda a, b: torch.stack([a, b]) @ torch.ones(2), False),
        (reversed_units, lambda a: a[torch.arange(8).flip(0)], False),
        (reversed_units, lambda a: a.flip(-1), True),
        (subsampled, 5, True),
        (subsampled, 12, True),
    ],
)
def test_models_that_take_particles(model, how, taken):
    density = LogJoint(model, normals(12), how)
    indices = {plate.name: torch.arange(plate.subsample_size) for plate in density.subsampled_plates}
    assert takes_particles(density.with_indices(**indices), 8) is taken


def test_random_numbers_and_parameters_are_left_alone():
    density, before = LogJoint(poisson_lognormal, torch.tensor([1.0, 3.0])), torch.get_rng_state()
    assert takes_particles(density, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(pyro.get_param_store()) == 0
