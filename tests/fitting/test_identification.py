"""Directions of globals that nothing is known of: found, told from weak ones, and put into words."""

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.fit_models import guide_for
from pyro.distributions import constraints

from laplace_amort import (
    FitStatus,
    FixedDrawELBO,
    FreeMode,
    Ladder,
    MarginalLaplace,
    MarginalQuadrature,
    NestedELBO,
    diagnose,
    fit,
)
from laplace_amort.fitting.evaluation import Evaluation
from laplace_amort.fitting.identification import describe_flattest, flattest, is_flat
from laplace_amort.fitting.optimizers import newton_decrement

Z = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
EPS = 2.0**-52


def improper():
    return dist.ImproperUniform(constraints.real, (), ())


def wide():
    return dist.Normal(0.0, 1e6)


def weak():
    return dist.Normal(0.0, 100.0)


def sum_of_two(prior, coefficient):
    """Only ``a + coefficient * b`` is known."""

    def model(z):
        a, b = (pyro.sample(name, prior()) for name in "ab")
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(a + coefficient * b, 1.0))
            pyro.sample("z", dist.Normal(y, 1.0), obs=z)

    return model


OBJECTIVES = [
    FixedDrawELBO(),
    FixedDrawELBO(start_with=None),
    NestedELBO(),
    MarginalLaplace(),
    MarginalQuadrature(),
    Ladder(),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("prior", [improper, wide])
@pytest.mark.parametrize(("coefficient", "direction"), [(1.0, "+1 a -1 b,"), (2.0, "+1 a -0.5 b,")])
def test_every_objective_says_so_and_which(objective, prior, coefficient, direction):
    model = sum_of_two(prior, coefficient)
    result = fit(model, guide_for(model), Z, objective=objective)
    assert result.status is FitStatus.NO_MAXIMUM
    (note,) = [note for note in result.notes if note.startswith("flattest is the direction")]
    assert direction in note
    assert "neither data nor priors" in note
    assert "pyro.sample('a', dist.Normal(0., 10.))" in note
    assert note in str(result)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_proper_priors_are_enough_however_weak(objective):
    """The sum is known, and the difference from the priors alone."""
    model = sum_of_two(weak, 1.0)
    result = fit(model, guide_for(model), Z, objective=objective)
    assert result.status is FitStatus.CONVERGED
    data, prior = 3 / 2, 1e-4
    covariance = numpy.linalg.inv(numpy.array([[data + prior, data], [data, data + prior]]))
    assert result.standard_errors()["a"].item() == pytest.approx(covariance[0, 0] ** 0.5, rel=1e-4)


@pytest.mark.parametrize("objective", [FixedDrawELBO(), MarginalLaplace(), MarginalQuadrature(), Ladder()], ids=repr)
@pytest.mark.parametrize("coefficient", [1.0, 2.0])
def test_it_is_diagnosed_and_drawn_without_an_error(objective, coefficient):
    model = sum_of_two(improper, coefficient)
    result = fit(model, guide_for(model), Z, objective=objective)
    diagnosis = diagnose(result, simulations=0, progress=False)
    assert not diagnosis.ok
    assert "convergence" in str(diagnosis)
    assert all(value.isfinite().all() for value in result.posterior.sample(5).values())


def test_an_intercept_and_all_effects_are_named_with_their_constraint():
    def model(z):
        mu = pyro.sample("mu", improper())
        effects = pyro.sample("effects", dist.ImproperUniform(constraints.real_vector, (), (3,)))
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(mu + effects[torch.arange(len(z)) % 3], 1.0))
            pyro.sample("z", dist.Normal(y, 1.0), obs=z)

    result = fit(model, guide_for(model), torch.arange(6.0, dtype=torch.float64), objective=MarginalLaplace())
    note = next(note for note in result.notes if "flattest" in note)
    assert "+1 mu -1 effects[0] -1 effects[1] -1 effects[2]" in note
    assert "torch.cat([free, -free.sum(-1, keepdim=True)], -1)" in note


def test_centers_that_are_parameters_change_nothing():
    model = sum_of_two(improper, 1.0)
    result = fit(model, guide_for(model, mode=FreeMode()), Z, starts=2)
    assert result.status is FitStatus.NO_MAXIMUM
    assert any("+1 a -1 b" in note for note in result.notes)


# -------------------------------------------------------------------------------------------------------- by themselves


def shared(share, size=1.0):
    """Two globals of very different scales, whose flattest direction has this share of their curvature."""
    scale = numpy.diag([1.0, size])
    return scale @ numpy.array([[1.0, 1.0 - share], [1.0 - share, 1.0]]) @ scale


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e8])
def test_the_share_does_not_depend_on_scales(size):
    share, direction = flattest(shared(1e-3, size))
    assert share == pytest.approx(1e-3, rel=1e-9)
    assert direction[1] / direction[0] == pytest.approx(-1 / size, rel=1e-9)


@pytest.mark.parametrize(
    ("information", "rounding", "flat"),
    [
        (shared(0.0), EPS, True),
        (shared(1e-13), EPS, True),
        (shared(1e-8), EPS, False),
        (shared(1e-6), 2.0**-23, True),
        (shared(1e-4), 2.0**-23, False),
        (shared(-1e-3), EPS, False),
        (numpy.zeros((2, 2)), EPS, True),
        (numpy.zeros((0, 0)), EPS, False),
        (numpy.eye(3), EPS, False),
    ],
)
def test_flat_is_what_rounding_errors_could_make(information, rounding, flat):
    assert is_flat(information, rounding) is flat


def test_a_factor_made_of_rounding_errors_is_no_curvature():
    """The Cholesky factor of a matrix that is singular but for its last digit exists."""
    information = numpy.array([[1.0, 1.0], [1.0, 1.0 + EPS]])
    numpy.linalg.cholesky(information)
    assert newton_decrement(Evaluation(0.0, numpy.zeros(2), information)) == numpy.inf
    assert newton_decrement(Evaluation(0.0, numpy.zeros(2), shared(1e-6))) == 0


def test_words():
    assert "the objective curves upwards there, by 0.5" in describe_flattest(["a", "b"], [0, 0], shared(-0.5))
    alone = describe_flattest(["mu", "log_tau"], [0, 1], numpy.diag([1.0, 0.0]))
    assert "direction +1 log_tau, in" in alone
    assert "say anything of log_tau" in alone
    assert "pyro.sample('log_tau', dist.HalfNormal(10.))" in alone
    many = describe_flattest([f"x[{i}]" for i in range(9)], [0] * 9, numpy.eye(9) - numpy.full((9, 9), 1 / 9))
    assert "+1 x[5] and 3 more, in" in many
