"""Moments of units against quadrature by scipy, planted second modes, and tails."""

import numpy
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch
from helpers.fit_models import gaussian, guide_for, poisson, poisson_counts
from helpers.fit_models import one_answer as answers
from helpers.unit_models import UNIT_MODELS
from torch.nn.functional import logsigmoid

from laplace_amort import GaussHermite, StudentPoints
from laplace_amort.evidence.unit_checks import other_modes, unit_k_hat
from laplace_amort.guide.problem import Problem
from laplace_amort.units.integrals import unit_moments
from laplace_amort.units.quadrature import Laplace

Z = torch.tensor([1.0, 3.0, -0.5, 2.0], dtype=torch.float64)
MU = 0.3


def two_modes(z, share):
    """Units with two normal modes eight apart; the data say next to nothing."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        which = dist.Categorical(torch.stack([1 - share, share], -1))
        means = (mu + torch.tensor([-4.0, 4.0])).expand(len(z), 2)
        parts = dist.Normal(means, torch.tensor([1.0, 0.5]))
        y = pyro.sample("y", dist.MixtureSameFamily(which, parts))
        pyro.sample("z", dist.Normal(y, 1e4), obs=z)


def tails(z, df):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.StudentT(df, mu, 1.0))
        pyro.sample("z", dist.Normal(y, 1e4), obs=z)


def at(model, *args, global_=(MU,), start=None, **kwargs):
    """Integrals, conditionals and globals at given globals, modes searched for from a start of all elements."""
    problem = Problem(guide_for(model), args, kwargs)
    globals_ = torch.tensor(global_)
    first = problem.start if start is None else torch.full_like(problem.start, start)
    there = problem.integrals.conditionals(globals_[None], first[None])
    assert there.found.all()
    return problem.integrals, there, globals_


# -------------------------------------------------------------------------------------------------------------- moments


@pytest.mark.parametrize("rule", [GaussHermite(65), StudentPoints(256)], ids=["grid", "Student"])
def test_moments_by_scipy(rule):
    z = torch.tensor([0.0, 1.0])
    integrals, there, global_ = at(answers, z)
    found = unit_moments(integrals, there, global_, rule)
    for unit, sign in enumerate((-1.0, 1.0)):
        mode, scale = float(there.mode[0, unit, 0]), float(there.scale_tril[0, unit, 0, 0])

        def density(y, power=0, center=0.0, sign=sign):
            answer = float(logsigmoid(torch.tensor(sign * y)).exp())
            return scipy.stats.norm.pdf(y, MU, 3.0) * answer * (y - center) ** power

        def integral(power, center=0.0, density=density):
            return scipy.integrate.quad(density, -30, 30, args=(power, center), epsabs=1e-12, limit=200)[0]

        mass = integral(0)
        mean = integral(1) / mass
        sd = (integral(2, mean) / mass) ** 0.5
        assert found.mean[unit, 0].item() == pytest.approx((mean - mode) / scale, abs=1e-5)
        assert found.sd[unit, 0].item() == pytest.approx(sd / scale, abs=1e-5)
        assert found.skewness[unit, 0].item() == pytest.approx(integral(3, mean) / mass / sd**3, abs=1e-4)
    assert found.skewness[0, 0] < -0.1 < 0.1 < found.skewness[1, 0]


@pytest.mark.parametrize("name", ["level_and_spread", "nested_latents"])
def test_moments_of_several_dimensions(name):
    """By a plain sum over a fine grid in the coordinates of each unit."""
    case = UNIT_MODELS[name]()
    integrals, there, global_ = at(case.model, *case.args)
    found = unit_moments(integrals, there, global_, GaussHermite(31 if case.local_dim == 2 else 9))
    line = torch.linspace(-14.0, 14.0, 141) if case.local_dim == 2 else torch.linspace(-7.0, 7.0, 29)
    grid = torch.cartesian_prod(*[line] * case.local_dim)
    with torch.no_grad():
        values = integrals.density.units_at(global_[None], there.at(grid))[0]
    weights = values.softmax(0).unsqueeze(-1)
    mean = (weights * grid[:, None]).sum(0)
    sd = (weights * (grid[:, None] - mean) ** 2).sum(0).sqrt()
    skewness = (weights * ((grid[:, None] - mean) / sd) ** 3).sum(0)
    for actual, expected in zip(found, (mean, sd, skewness), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0.01)
    assert skewness.abs().max() > 0.03


def test_normal_units_are_normal():
    found = unit_moments(*at(gaussian, Z), GaussHermite(5))
    torch.testing.assert_close(found.mean, torch.zeros(4, 1))
    torch.testing.assert_close(found.sd, torch.ones(4, 1))
    torch.testing.assert_close(found.skewness, torch.zeros(4, 1))


def test_one_point_has_moments_without_nan():
    found = unit_moments(*at(gaussian, Z), Laplace())
    assert all(part.isfinite().all() for part in found)
    assert (found.mean == 0).all()


# ---------------------------------------------------------------------------------------------------------- other modes

SHARES = torch.tensor([0.5, 0.2, 0.9, 0.03, 0.7], dtype=torch.float64)


@pytest.mark.parametrize("start", [-4.0, 4.0])
def test_second_mode_has_its_share_and_its_distance(start):
    found = other_modes(*at(two_modes, torch.zeros(5), SHARES, start=start))
    expected, sd = (SHARES, 1.0) if start < 0 else (1 - SHARES, 0.5)
    torch.testing.assert_close(found.share, expected, rtol=0, atol=1e-2)
    torch.testing.assert_close(found.distance, torch.full((5,), 8 / sd), rtol=1e-2, atol=0)


def test_one_unit_has_a_second_mode():
    """No other unit shows where it is."""
    found = other_modes(*at(two_modes, torch.zeros(1), SHARES[1:2], start=-4.0))
    torch.testing.assert_close(found.share, SHARES[1:2], rtol=0, atol=1e-2)


LOG_CONCAVE = ["normal", "poisson_by_visit", "binomial_slopes", "bernoulli_answers", "dim_minus_three"]


@pytest.mark.parametrize("name", LOG_CONCAVE)
def test_log_concave_units_have_no_other_mode(name):
    case = UNIT_MODELS[name]()
    found = other_modes(*at(case.model, *case.args, global_=(0.1,) * case.global_dim))
    assert (found.share == 0).all()
    assert (found.distance == 0).all()


def test_search_leaves_the_generator_alone():
    state = torch.get_rng_state()
    first, again = (other_modes(*at(two_modes, torch.zeros(5), SHARES, start=-4.0)) for _ in range(2))
    assert torch.equal(first.share, again.share)
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------------------------- tails


def test_tails_of_units():
    """A normal proposal covers a normal unit and not a Cauchy one, which comes first."""
    df = torch.tensor([1e6, 1.0, 1e6, 1.0, 1e6])
    units, k_hat = unit_k_hat(*at(tails, torch.zeros(5), df))
    assert sorted(units[:2]) == [1, 3]
    assert (k_hat[:2] > 0.5).all()
    assert (k_hat[2:] < 0.1).all()


@pytest.mark.parametrize("name", ["normal", "dim_minus_three"])
def test_normal_units_need_no_weights(name):
    case = UNIT_MODELS[name]()
    units, k_hat = unit_k_hat(*at(case.model, *case.args, global_=(0.1,) * case.global_dim))
    assert sorted(units) == list(range(case.num_units))
    assert (k_hat < 0).all()


def test_of_many_units_those_that_vary_most():
    integrals, there, global_ = at(poisson, poisson_counts(600).double(), global_=(0.5, -0.3))
    units, k_hat = unit_k_hat(integrals, there, global_)
    assert len(units) == len(k_hat) == len(set(units.tolist())) == 500
    left = numpy.setdiff1d(numpy.arange(600), units)
    third = unit_moments(integrals, there, global_, GaussHermite(9)).skewness[:, 0].abs()
    assert third[left].mean() < third[units].mean()
