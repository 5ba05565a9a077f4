"""A scale that ran to zero with its effects is told from one that is small, and from other small numbers."""

import numpy
import pyro
import pyro.distributions as dist
import pytest
from helpers.causes import ANSWERS, COVARIATE, MASKED, crossed, flat_levels
from helpers.causes import MARKS as PUPILS

from laplace_amort import AutoLaplaceFamily, MarginalLaplace
from laplace_amort.guide.collapse import find_collapse
from laplace_amort.guide.problem import Problem


def collapse_at(model, y, **unconstrained):
    """What is found where some elements of the globals are, the others at the start."""
    problem = Problem(AutoLaplaceFamily(model), (y,), {})
    names, point = problem.global_elements(), problem.loc.clone()
    for i, name in enumerate(names):
        site = name.partition("[")[0]
        point[i] = unconstrained.get(name, unconstrained.get(site, point[i]))
    found = MarginalLaplace().bind(problem)(point.numpy())
    return find_collapse(problem, point.numpy(), found.information)


def test_scale_and_effects_at_zero():
    found = collapse_at(crossed, ANSWERS, tau_i=-12.0, ease=0.0)
    assert (found.scale, found.effects, found.number, found.plate) == ("tau_i", "ease", 6, "items")
    assert found.value == pytest.approx(numpy.exp(-12.0))
    assert found.children == ()


def test_nested_effects_have_children():
    found = collapse_at(flat_levels, PUPILS, **{"s[0]": -12.0, "u": 0.0})
    assert (found.scale, found.effects, found.children) == ("s[0]", "u", (3,) * 10)


@pytest.mark.parametrize("log_scale", [-1.0, 0.0, 1.0])
def test_a_scale_that_the_data_hold(log_scale):
    assert collapse_at(crossed, ANSWERS, tau_i=log_scale) is None


def regression(y):
    """Coefficients with a prior of their own, however narrow, are no effects of a scale."""
    beta = pyro.sample("beta", dist.Normal(0.0, 1e-4).expand([3]).to_event(1))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("units", len(y)):
        u = pyro.sample("u", dist.Normal(beta.sum(-1, keepdim=True) * COVARIATE, tau))
        pyro.sample("y", dist.Normal(u, 1.0), obs=y)


def known(y):
    """Effects with a scale that its prior holds to a small value."""
    tau = pyro.sample("tau", dist.LogNormal(-5.0, 0.05))
    beta = pyro.sample("beta", dist.Normal(0.0, tau[..., None]).expand([3]).to_event(1))
    with pyro.plate("units", len(y)):
        u = pyro.sample("u", dist.Normal(beta.sum(-1, keepdim=True) * COVARIATE, 1.0))
        pyro.sample("y", dist.Normal(u, 1.0), obs=y)


@pytest.mark.parametrize("model", [regression, known])
def test_other_small_numbers(model):
    assert collapse_at(model, MASKED) is None


def test_none_where_nothing_is_finite():
    assert collapse_at(crossed, ANSWERS, tau_i=-2000.0) is None


def test_a_single_effect_is_none():
    def one(y):
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        mu = pyro.sample("mu", dist.Normal(0.0, tau))
        with pyro.plate("units", len(y)):
            u = pyro.sample("u", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(u, 1.0), obs=y)

    assert collapse_at(one, MASKED, tau=-12.0, mu=0.0) is None
