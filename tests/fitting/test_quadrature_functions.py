"""Objectives that integrate over each unit, function to data: derivatives against differences and a closed form."""

import math

import numpy
import pytest
import torch
from helpers.fit_models import guide_for
from helpers.models import normals
from helpers.oracles import Figures, finite_difference, relative_error
from helpers.unit_models import UNIT_MODELS

from laplace_amort import (
    Boost,
    FreeMode,
    GaussHermite,
    MarginalCurvature,
    MarginalQuadrature,
    NestedELBO,
    StudentPoints,
)
from laplace_amort.fitting.objectives.base import posterior_whitening
from laplace_amort.fitting.objectives.nested import NestedFunction
from laplace_amort.guide.problem import Problem
from laplace_amort.units.integrals import Conditionals
from laplace_amort.units.quadrature import Laplace

figures = Figures()


def function(name, objective, seed=0, **options):
    """An objective of a model of the table, and a point near its start."""
    case = UNIT_MODELS[name]()
    problem = Problem(guide_for(case.model, unit_plate=case.unit_plate, **options), case.args, case.kwargs)
    found = objective.bind(problem) if isinstance(objective, MarginalQuadrature) else objective.bind(problem, 4, seed)
    point = torch.from_numpy(found.point())
    return found, point + 0.2 * normals(len(point), seed=3)


def gradient_error(found, point):
    """Of the gradient, by differences of the objective's own values."""
    gradient = torch.from_numpy(found(point.numpy()).gradient)
    slope = finite_difference(lambda p: torch.tensor(found(p.numpy()).value), point, step=0.05, levels=6)
    return relative_error(gradient, slope)


GRADIENTS = {
    "quadrature": MarginalQuadrature(GaussHermite(4)),
    "one point": MarginalQuadrature(Laplace()),
    "Student points": MarginalQuadrature(StudentPoints(16)),
    "nested": NestedELBO(rule=GaussHermite(3)),
    "nested, Student points": NestedELBO(rule=StudentPoints(16)),
}


@pytest.mark.parametrize("objective", GRADIENTS)
@pytest.mark.parametrize("name", ["poisson_by_visit", "student_t", "binomial_slopes", "crossed_items"])
def test_gradients_are_those_of_the_values(name, objective):
    error = gradient_error(*function(name, GRADIENTS[objective]))
    assert figures.add(f"gradient, {objective}", error) < 1e-7


@pytest.mark.parametrize("objective", ["quadrature", "nested"])
def test_gradients_where_supports_depend_on_other_latents(objective):
    assert gradient_error(*function("dependent_supports", GRADIENTS[objective])) < 1e-7


OPTIONS = {
    "centers": {"mode": FreeMode()},
    "boost": {"repair": Boost()},
    "marginal head": {"head": MarginalCurvature()},
    "both": {"repair": Boost(), "head": MarginalCurvature()},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_of_the_nested_elbo_in_all_parameters(options):
    """Those of the repair too, and not the centers of units, of which nothing depends."""
    found, point = function("poisson_by_visit", NestedELBO(rule=GaussHermite(3)), **OPTIONS[options])
    assert len(point) == (5 if "repair" in OPTIONS[options] else 2)
    assert gradient_error(found, point) < 1e-7


@pytest.mark.parametrize("name", ["normal", "poisson_by_visit", "student_t", "binomial_slopes", "dependent_supports"])
def test_information_is_that_of_differences(name):
    found, point = function(name, MarginalQuadrature(GaussHermite(4)))

    def slope(p):
        return torch.from_numpy(found(p.numpy()).gradient)

    expected = -finite_difference(slope, point, step=0.05, levels=6)
    found(point.numpy())
    about = posterior_whitening(found.problem, len(point), with_units=False)
    information = torch.from_numpy(found.information(about))
    assert figures.add("information, differences", relative_error(information, expected)) < 1e-4
    assert torch.equal(information, information.mT)
    assert found.point() == pytest.approx(point.numpy(), abs=0)  # nothing has moved


def test_all_of_it_where_units_are_normal():
    """The marginal density in closed form, and its derivatives by torch.func."""
    found, point = function("normal", MarginalQuadrature(GaussHermite(2)))
    (z,) = found.problem.unit_model.args

    def log_marginal(theta):
        mu, log_tau = theta
        tau = log_tau.exp()
        variance = tau**2 + 0.25
        half = math.log(2) - tau**2 / 2 - math.log(2 * math.pi) / 2 + log_tau
        prior = -(mu**2) / 8 - math.log(2) - math.log(2 * math.pi) / 2 + half
        return prior - ((z - mu) ** 2 / variance + (2 * math.pi * variance).log()).sum() / 2

    evaluation = found(point.numpy())
    assert evaluation.value == pytest.approx(float(log_marginal(point)), abs=1e-10)
    assert relative_error(torch.from_numpy(evaluation.gradient), torch.func.grad(log_marginal)(point)) < 1e-9
    information = torch.from_numpy(found.information(posterior_whitening(found.problem, 2, with_units=False)))
    assert relative_error(information, -torch.func.hessian(log_marginal)(point)) < 1e-6


@pytest.mark.parametrize("name", ["poisson_by_visit", "binomial_slopes"])
def test_values_are_those_that_come_with_gradients(name):
    found, point = function(name, NestedELBO(rule=GaussHermite(3)))
    evaluation = found(point.numpy())
    terms = found.values()
    assert terms.shape == (4,)
    assert float(terms.mean()) == pytest.approx(evaluation.value, abs=1e-3)  # modes need not be found exactly there
    pairs = terms.unflatten(0, (2, 2)).mean(0)
    assert evaluation.standard_error == pytest.approx(float(pairs.std() / 2**0.5), abs=1e-3)


# --------------------------------------------------------------------------------------------------------- planted bugs


def fixed_scale(self, gaussian):
    return gaussian.global_loc + self.noise @ gaussian.precision.global_scale_tril.mT.detach()


PLANTED = {
    "the log-determinant of the units is a constant": (
        *(Conditionals, "log_det", lambda self: Conditionals(*(part.detach() for part in self)).log_volume()),
        ["quadrature", "nested"],
    ),
    "the scale of the globals is a constant": (NestedFunction, "_at", fixed_scale, ["nested"]),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_wrong_gradient_is_found(bug, monkeypatch):
    owner, method, wrong, where = PLANTED[bug]
    monkeypatch.setattr(Conditionals, "log_volume", Conditionals.log_det, raising=False)
    monkeypatch.setattr(owner, method, wrong)
    for objective in where:
        assert gradient_error(*function("poisson_by_visit", GRADIENTS[objective])) > 1e-3


def test_differences_of_steps_in_the_wrong_unit_are_found(monkeypatch):
    """Planted: gradients along the steps taken for those in parameters."""
    found, point = function("poisson_by_visit", MarginalQuadrature(GaussHermite(4)))
    found(point.numpy())
    about = posterior_whitening(found.problem, 2, with_units=False)
    right = found.information(about)
    monkeypatch.setattr(numpy.linalg, "solve", lambda left, right: right)
    assert abs(found.information(about) - right).max() > 0.1 * abs(right).max()
