"""A kink is found where there is one, and nowhere else."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.causes import ANSWERS, COUNTS, TIMES, UNITS, counts, crossed_by_multiples, errors, hinge, peaked_prior

from laplace_amort import AutoLaplaceFamily
from laplace_amort.guide.problem import Problem

PLANTED = {"units": (errors, TIMES, 12), "means of units": (hinge, TIMES, 11), "globals": (peaked_prior, UNITS, 0)}


def steep(y):
    """Smooth, but by no grid: the slope doubles in a hundredth of a standard deviation."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(y)):
        u = pyro.sample("u", dist.Normal(mu, 1.0))
        pyro.factor("y", -torch.nn.functional.softplus(300 * (u - y)) / 100)


SMOOTH = {
    "soft errors": (functools.partial(errors, kind=dist.SoftLaplace), TIMES),
    "counts": (counts, COUNTS),
    "steep": (steep, UNITS),
    "crossed": (crossed_by_multiples, ANSWERS),
}


def kink_of(model, y):
    return Problem(AutoLaplaceFamily(model), (y,), {}).kink


@pytest.mark.parametrize("name", PLANTED)
def test_a_kink_is_found(name):
    model, y, number = PLANTED[name]
    kink = kink_of(model, y)
    assert kink is not None
    assert 0.02 < kink.share <= 1
    assert (kink.number > 0) == (number > 0)
    assert kink.number <= y.shape[-1]


@pytest.mark.parametrize("name", SMOOTH)
def test_what_is_smooth_has_none(name):
    assert kink_of(*SMOOTH[name]) is None


def test_looking_for_it_moves_nothing():
    problem = Problem(AutoLaplaceFamily(errors), (TIMES,), {})
    before = problem.loc.clone(), problem.start.clone()
    assert problem.kink is not None
    assert torch.equal(problem.loc, before[0])
    assert torch.equal(problem.start, before[1])
