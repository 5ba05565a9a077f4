"""Objectives that integrate over each unit: optima by brute force, bounds, what they refuse, and how they go on."""

import dataclasses
import math

import numpy
import pyro
import pyro.distributions as dist
import pytest
import scipy.optimize
import torch
from helpers.fit_models import (
    assert_near,
    evidence,
    flat,
    gaussian,
    guide_for,
    nowhere,
    poisson,
    poisson_counts,
    subsampled,
    trajectory,
)
from helpers.oracles import finite_difference
from helpers.posteriors import brute_force, log_marginal_of_counts
from helpers.unit_models import UNIT_MODELS

from laplace_amort import (
    FitStatus,
    FixedDrawELBO,
    GaussHermite,
    MarginalLaplace,
    MarginalQuadrature,
    ModelError,
    NestedELBO,
    Stochastic,
    StructureError,
    StudentPoints,
    TrustRegion,
    fit,
)
from laplace_amort.fitting.objectives.base import ObjectiveFunction
from laplace_amort.fitting.objectives.quadrature import QuadratureFunction
from laplace_amort.units.quadrature import Laplace

Z = torch.tensor([1.0, 3.0, -0.5, 2.0], dtype=torch.float64)
COUNTS = poisson_counts(12).double()


def test_the_optimum_is_that_of_the_marginal_by_brute_force():
    z = poisson_counts(4).double()
    result = fit(poisson, guide_for(poisson), z, objective=MarginalQuadrature(GaussHermite(25)))
    assert result.status is FitStatus.CONVERGED
    expected = scipy.optimize.minimize(lambda theta: -log_marginal_of_counts(theta, z), numpy.zeros(2), tol=1e-10)
    assert result.gaussian.global_loc.tolist() == pytest.approx(expected.x, abs=1e-4)
    assert result.objective == pytest.approx(-expected.fun, abs=1e-6)
    assert result.standard_error == 0
    assert result.num_draws == 0
    assert result.gradient_norm < 1e-3
    assert not result.notes


def test_curvature_of_the_fit_is_that_of_the_marginal():
    z = poisson_counts(4).double()
    result = fit(poisson, guide_for(poisson), z, objective=MarginalQuadrature(GaussHermite(25)))

    def slope(theta):
        return finite_difference(lambda t: torch.tensor(log_marginal_of_counts(t.numpy(), z)), theta, 0.2, 5)

    loc = result.gaussian.global_loc
    expected = torch.linalg.inv(-finite_difference(slope, loc, 0.2, 4)).diagonal().sqrt()
    found = result.standard_errors()
    torch.testing.assert_close(torch.stack([found["mu"], found["tau"]]), expected, rtol=1e-3, atol=0)


def test_one_point_is_the_laplace_approximation():
    """The same optimum and standard errors, by other optimizers and other derivatives."""
    one = fit(poisson, guide_for(poisson), COUNTS, objective=MarginalQuadrature(Laplace()))
    other = fit(poisson, guide_for(poisson), COUNTS, objective=MarginalLaplace())
    assert one.objective == pytest.approx(other.objective, abs=1e-8)
    torch.testing.assert_close(one.gaussian.global_loc, other.gaussian.global_loc, atol=1e-4, rtol=0)
    for name, value in one.standard_errors().items():
        torch.testing.assert_close(value, other.standard_errors()[name], rtol=1e-3, atol=0)


def test_a_start_of_its_own_ends_in_the_same_place():
    with_start = fit(poisson, guide_for(poisson), COUNTS, objective=MarginalQuadrature())
    without = fit(poisson, guide_for(poisson), COUNTS, objective=MarginalQuadrature(start_with=None))
    assert {step.stage for step in without.history} == {"quadrature"}
    assert without.status.ok
    assert without.objective == pytest.approx(with_start.objective, abs=1e-6)


@pytest.mark.parametrize("name", ["normal", "binomial_slopes", "tempered", "non_centered", "crossed_items"])
@pytest.mark.parametrize("objective", [MarginalQuadrature(GaussHermite(5)), NestedELBO(num_draws=8, accuracy=1.0)])
def test_models_converge(name, objective):
    case = UNIT_MODELS[name]()
    guide = guide_for(case.model, unit_plate=case.unit_plate)
    result = fit(case.model, guide, *case.args, objective=objective, **case.kwargs)
    assert result.status.ok, result.status
    assert not result.notes


def test_nested_elbo_is_exact_where_the_model_is_gaussian():
    value, mean, sd = evidence(Z)
    result = fit(gaussian, guide_for(gaussian), Z, objective=NestedELBO())
    assert result.status is FitStatus.CONVERGED
    assert result.objective == pytest.approx(value, abs=1e-9)
    assert result.gaussian.global_loc.item() == pytest.approx(mean, abs=1e-5)
    assert result.standard_errors()["mu"].item() == pytest.approx(sd, abs=1e-9)


def test_nested_elbo_lies_between_the_elbo_and_the_evidence():
    """By more than five standard errors of either."""
    z = poisson_counts(3).double()
    log_evidence = brute_force(z)[2]
    plain, nested = (
        fit(poisson, guide_for(poisson), z, objective=objective(num_draws=512, accuracy=1.0))
        for objective in (FixedDrawELBO, NestedELBO)
    )
    assert nested.objective + 5 * nested.standard_error < log_evidence
    assert nested.objective - plain.objective > 5 * math.hypot(nested.standard_error, plain.standard_error)


def test_float32():
    torch.set_default_dtype(torch.float32)
    single = fit(poisson, guide_for(poisson), COUNTS.float(), objective=MarginalQuadrature())
    torch.set_default_dtype(torch.float64)
    double = fit(poisson, guide_for(poisson), COUNTS, objective=MarginalQuadrature())
    assert single.gaussian.global_loc.dtype == torch.float32
    assert single.status.ok
    shift = (single.gaussian.global_loc.double() - double.gaussian.global_loc) / double.standard_errors()["mu"]
    assert shift.abs().max() < 0.02


# ------------------------------------------------------------------------------------------------------------ refusals


def differences(z):
    """Each observation is of two units that are neighbors."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z) + 1):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
    with pyro.plate("games", len(z)):
        pyro.sample("z", dist.Normal(y[..., 1:] - y[..., :-1], 1.0), obs=z)


BOTH = pytest.mark.parametrize("objective", [MarginalQuadrature(), NestedELBO()], ids=["quadrature", "nested"])


@BOTH
@pytest.mark.parametrize("name", ["with_params", "module"])
def test_parameters_of_the_model_are_refused(name, objective):
    case = UNIT_MODELS[name]()
    with pytest.raises(ModelError, match="is a parameter"):
        fit(case.model, guide_for(case.model), *case.args, objective=objective)


def total(z):
    """The sum of all units is observed, so that the second derivative of no two is other than zero."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)
    pyro.factor("sum", y.sum(-1))


@BOTH
@pytest.mark.parametrize(
    ("model", "message"),
    [(differences, "'y' of unit 0 and 'y' of unit 1"), (total, "site 'sum' depends on 4 units")],
)
def test_observations_of_several_units_are_refused(model, message, objective):
    with pytest.raises(StructureError, match=message):
        fit(model, guide_for(model), Z, objective=objective)


@BOTH
def test_units_of_many_dimensions_take_points_outside_of_a_grid(objective):
    case = UNIT_MODELS["dim_minus_three"]()
    with pytest.raises(ValueError, match=r"StudentPoints\(256\)"):
        fit(case.model, guide_for(case.model), *case.args, objective=objective)
    objective = dataclasses.replace(objective, rule=StudentPoints(64))
    assert fit(case.model, guide_for(case.model), *case.args, objective=objective).status.ok


class Walked(Exception):
    """Stochastic optimization, of the plain ELBO, was begun."""


@pytest.fixture
def _no_walk(monkeypatch):
    def climb(self, *args):
        raise Walked

    monkeypatch.setattr(Stochastic, "climb", climb)


@pytest.mark.usefixtures("_no_walk")
@pytest.mark.parametrize("objective", [MarginalQuadrature(), NestedELBO()])
def test_minibatches_are_refused(objective):
    with pytest.raises(ModelError, match="needs all of them in every evaluation"):
        fit(subsampled, guide_for(subsampled), COUNTS[0], 5, objective=objective)


@pytest.mark.usefixtures("_no_walk")
@BOTH
def test_stochastic_optimization_is_refused(objective):
    with pytest.raises(TypeError):
        fit(poisson, guide_for(poisson), COUNTS, objective=objective, optimizer=Stochastic())


@BOTH
def test_optimizers_with_second_derivatives_are_refused(objective):
    with pytest.raises(TypeError, match="second derivatives"):
        fit(poisson, guide_for(poisson), COUNTS, objective=objective, optimizer=TrustRegion())


def test_a_number_of_draws_is_for_the_nested_elbo():
    with pytest.raises(ValueError, match="MarginalQuadrature takes no draws"):
        fit(poisson, guide_for(poisson), COUNTS, objective=MarginalQuadrature(), num_draws=4)
    with pytest.raises(ValueError, match="num_draws"):
        NestedELBO(num_draws=3)


@BOTH
def test_units_without_a_mode(objective):
    """The conditional density of a unit grows for ever."""
    objective = dataclasses.replace(objective, start_with=None)
    result = fit(nowhere, guide_for(nowhere), Z, objective=objective)
    assert result.status is FitStatus.START_FAILED
    assert "the conditional mode was not found for 4 of 4 units" in result.notes[0]
    assert "unit 0 of plate 'units'" in result.notes[0]
    with pytest.raises(ValueError, match="there is no posterior"):
        _ = result.posterior


def test_globals_that_are_not_identified_have_no_maximum():
    assert fit(flat, guide_for(flat), Z, objective=MarginalQuadrature()).status is FitStatus.NO_MAXIMUM


# -------------------------------------------------------------------------------------------------------------- resume

RESUMED = {
    "quadrature": MarginalQuadrature(),
    "quadrature at once": MarginalQuadrature(StudentPoints(32), start_with=None),
    "nested": NestedELBO(num_draws=8, accuracy=1.0),
}


def interrupt(monkeypatch, owner, name, call):
    """Ctrl-C at the end of one of the calls of a method."""
    original, left = getattr(owner, name), [call]

    def interrupted(this, *args):
        found = original(this, *args)
        left[0] -= 1
        if left[0] == -1:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(owner, name, interrupted)


def assert_same(actual, expected):
    assert trajectory(actual) == trajectory(expected)
    assert torch.equal(actual.guide.loc, expected.guide.loc)
    assert (actual.objective, actual.status) == (expected.objective, expected.status)
    assert torch.equal(actual.gaussian.precision.head, expected.gaussian.precision.head)
    assert torch.equal(actual.posterior.mean()["y"], expected.posterior.mean()["y"])


def resumed(stopped, objective, path):
    """By the result itself, with the guide as it stands, and by a file of it."""
    assert stopped.status is FitStatus.INTERRUPTED
    stopped.save(path)
    return (
        fit(poisson, stopped.guide, COUNTS, objective=objective, resume=stopped),
        fit(poisson, COUNTS, objective=objective, resume=path),
    )


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_fit_is_the_fit(name, monkeypatch, tmp_path):
    """Wherever it was interrupted: bit by bit by the result itself, and by a file of it to the same optimum."""
    objective = RESUMED[name]
    expected = fit(poisson, guide_for(poisson), COUNTS, objective=objective)
    calls = len(expected.history)
    for call in (calls // 2, calls - 1):
        with monkeypatch.context() as patch:
            interrupt(patch, ObjectiveFunction, "__call__", call)
            stopped = fit(poisson, guide_for(poisson), COUNTS, objective=objective)
        assert len(stopped.history) == call
        itself, by_file = resumed(stopped, objective, tmp_path / f"{call}.pt")
        assert_same(itself, expected)
        assert_near(by_file, expected)


def test_interrupted_when_all_but_the_curvature_is_known(monkeypatch, tmp_path):
    objective = MarginalQuadrature()
    expected = fit(poisson, guide_for(poisson), COUNTS, objective=objective)
    with monkeypatch.context() as patch:
        interrupt(patch, QuadratureFunction, "information", 0)
        stopped = fit(poisson, guide_for(poisson), COUNTS, objective=objective)
    assert trajectory(stopped) == trajectory(expected)
    itself, by_file = resumed(stopped, objective, tmp_path / "fit.pt")
    assert_same(itself, expected)
    assert_near(by_file, expected)


@pytest.mark.parametrize("name", RESUMED)
def test_seeds(name):
    """The state of torch's generator stays as it is, and changes nothing."""
    state = torch.get_rng_state()
    one = fit(poisson, guide_for(poisson), COUNTS, objective=RESUMED[name], seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert_same(fit(poisson, guide_for(poisson), COUNTS, objective=RESUMED[name], seed=3), one)


def test_one_pair_of_draws_has_no_standard_error():
    """And no warning of torch's: the fresh draws that the value is taken on go on to more."""
    result = fit(gaussian, guide_for(gaussian), Z, objective=FixedDrawELBO(num_draws=2, max_draws=2))
    assert 0 <= result.standard_error < 0.1
