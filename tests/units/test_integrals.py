"""Integrals over units: exact evidence, Laplace, quadrature by others, gradients by two other routes, planted bugs."""

import math

import numpy
import pytest
import scipy.integrate
import torch
from helpers.oracles import Figures, finite_difference, relative_error
from helpers.separable import KnownMode, known_modes
from helpers.strategies import standard_normal
from helpers.unit_integrals import REDUCTIONS, Problem, straight, terms_of
from helpers.unit_models import UNIT_MODELS
from hypothesis import given, settings
from hypothesis import strategies as st

from laplace_amort.units.integrals import Conditionals, UnitIntegrals
from laplace_amort.units.marginal import laplace_marginal
from laplace_amort.units.modes import NewtonMode
from laplace_amort.units.quadrature import GaussHermite, Laplace, QuadraturePoints, StudentPoints

figures = Figures()
MORE = settings.default.max_examples
# -------------------------------------------------------------------------------------------------------------- Laplace


@pytest.mark.parametrize("rule", [Laplace(), GaussHermite(1)])
@pytest.mark.parametrize("name", UNIT_MODELS)
def test_one_point_is_the_laplace_marginal(name, rule):
    problem = Problem(name)
    found = problem.gradients(rule)
    expected = laplace_marginal(problem.model.log_joint, problem.globals_[0], found.mode[0])
    assert figures.add("value, one point", relative_error(found.values[0], expected.value)) < 1e-11
    assert figures.add("gradient, one point", relative_error(found.gradients[0], expected.gradient)) < 1e-8
    by_gain = problem.gradients(rule, "mean_gain")
    torch.testing.assert_close(by_gain.values, found.values, rtol=1e-12, atol=0)
    torch.testing.assert_close(by_gain.gradients, found.gradients, rtol=1e-9, atol=1e-10)


# -------------------------------------------------------------------------------------------------------- known values


@pytest.mark.parametrize("rule", [Laplace(), GaussHermite(2), GaussHermite(5)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_units_that_are_normal_are_integrated_exactly(rule, reduction):
    """The evidence of the model ``normal``: its lower bound is no lower."""
    problem = Problem("normal", num_globals=3)
    found = problem.gradients(rule, reduction)

    def evidence(theta):
        mu, tau = theta[0], theta[1].exp()
        prior = torch.distributions.Normal(0.0, 2.0).log_prob(mu) + theta[1]
        prior = prior + torch.distributions.HalfNormal(1.0).log_prob(tau)
        return prior + torch.distributions.Normal(mu, (tau**2 + 0.25).sqrt()).log_prob(problem.model.args[0]).sum()

    torch.testing.assert_close(found.values, torch.func.vmap(evidence)(problem.globals_), rtol=1e-12, atol=1e-12)
    expected = torch.func.vmap(torch.func.grad(evidence))(problem.globals_)
    torch.testing.assert_close(found.gradients, expected, rtol=1e-9, atol=1e-9)


def by_scipy(problem):
    """The log integrals of all units, of one dimension, at the first globals."""
    shift = problem.density.units(problem.globals_[0], problem.gradients(Laplace()).mode[0])

    def scaled(y):
        values = problem.density.units(problem.globals_[0], torch.full_like(problem.start[0], y)) - shift
        return values.exp().numpy()

    ratios, error = scipy.integrate.quad_vec(scaled, -numpy.inf, numpy.inf, epsabs=1e-11, epsrel=1e-11)
    assert error < 1e-9
    return torch.as_tensor(ratios).log() + shift


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("poisson_by_visit", GaussHermite(40)),
        ("poisson_by_visit", StudentPoints(256)),
        ("bernoulli_answers", GaussHermite(60)),
        ("bernoulli_answers", StudentPoints(256)),
        ("negative_binomial", GaussHermite(60)),
        ("gamma_rates", GaussHermite(60)),
        ("beta_means", StudentPoints(256, df=3.0)),
        ("student_t", StudentPoints(512, df=4.0)),
        ("student_t", StudentPoints(128, df=2.0)),
        ("without_globals", GaussHermite(40)),
    ],
)
def test_many_points_give_what_scipy_finds(name, rule):
    problem = Problem(name)
    found = problem.values(rule).values[0]
    expected = by_scipy(problem).sum() + problem.shared()
    assert abs(float(found - expected)) < 2e-8
    assert abs(float(problem.values(Laplace()).values[0] - expected)) > 1e-4  # so there is something to find


def test_two_dimensions_on_a_fine_grid():
    """The trapezoidal rule over all of the plane, of the Poisson units of ``correlated``."""
    problem = Problem("correlated")
    step, line = 0.1, torch.arange(-9.0, 7.0, 0.1)
    grid = torch.cartesian_prod(line, line)
    values = problem.density.units_at(problem.globals_, grid[None, :, None, :].expand(1, -1, 4, 2))
    expected = values.logsumexp(1).sum() + 8 * math.log(step)
    expected = expected + problem.shared()
    errors = [abs(float(problem.values(GaussHermite(n)).values[0] - expected)) for n in (1, 9, 31)]
    assert errors[0] > 1e-3
    assert errors[1] < errors[0] / 100
    assert errors[2] < 1e-8


@pytest.mark.parametrize("name", ["poisson_by_visit", "student_t", "categorical_probs", "level_and_spread"])
@pytest.mark.parametrize("rule", [GaussHermite(4), StudentPoints(32)])
def test_the_mean_is_a_lower_bound(name, rule):
    problem = Problem(name, num_globals=3)
    gap = problem.values(rule).values - problem.values(rule, "mean_gain").values
    assert (gap > 1e-5).all()


# ----------------------------------------------------------------------------------------------------------- gradients

RULES = {"grid": GaussHermite(3), "student": StudentPoints(8)}
NAMES = [
    "poisson_by_visit",
    "binomial_slopes",
    "student_t",
    "categorical_probs",
    "dependent_supports",
    "nested_latents",
]


def gradient_error(problem, rule, reduction):
    """Against central differences of values, with the modes found anew."""
    points, reduce = problem.points(rule), REDUCTIONS[reduction]

    def value(theta):
        return problem.integrals.values(points, reduce, theta.unsqueeze(0), problem.start).values[0]

    expected = finite_difference(value, problem.globals_[0], step=0.05, levels=5)
    return relative_error(problem.gradients(rule, reduction).gradients[0], expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_values(name, rule, reduction):
    error = gradient_error(Problem(name), RULES[rule], reduction)
    assert figures.add(f"gradient, {rule}, {reduction}", error) < 1e-7


def straight_errors(problem, rule, reduction):
    """Of value and gradient, against torch.func straight through a closed form."""
    start = problem.mode(problem.global_) + 0.1
    points = rule.points(problem.local_dim, start)
    found = UnitIntegrals(terms_of(problem)).values_and_gradients(
        points, REDUCTIONS[reduction], problem.global_.unsqueeze(0), start.unsqueeze(0)
    )
    gradient, value = torch.func.grad_and_value(straight(problem, points, reduction))(problem.global_)
    return relative_error(found.values[0], value), relative_error(found.gradients[0], gradient)


rules = st.sampled_from([GaussHermite(1), GaussHermite(2), StudentPoints(4)])


@settings(max_examples=MORE)
@given(problem=known_modes(max_global=3), rule=rules, reduction=st.sampled_from(sorted(REDUCTIONS)))
def test_gradients_straight_through_a_known_mode(problem, rule, reduction):
    in_value, in_gradient = straight_errors(problem, rule, reduction)
    assert figures.add("value, known mode", in_value) < 1e-10
    assert figures.add("gradient, known mode", in_gradient) < 1e-8


@settings(max_examples=MORE)
@given(problem=known_modes(max_global=3))
def test_modes_and_scales_at_a_known_mode(problem):
    """Their values and derivatives; and what is made of them."""
    problem.weight = 1.0
    n, k, d = problem.num_units, problem.local_dim, problem.global_dim
    globals_ = problem.global_ + torch.stack([torch.zeros(d), 0.1 * standard_normal(d, seed=5)])
    start = torch.stack([problem.mode(theta) for theta in globals_]) + 0.05
    integrals = UnitIntegrals(terms_of(problem))
    jacobian = torch.func.vmap(torch.func.jacrev(problem.mode))(globals_)
    there = integrals.conditionals(globals_.requires_grad_(), start)
    assert (there.mode.shape, there.scale_tril.shape, there.found.shape) == ((2, n, k), (2, n, k, k), (2, n))
    assert there.found.all()
    known = torch.stack([problem.mode(theta) for theta in globals_]).detach()
    torch.testing.assert_close(there.mode.detach(), known, rtol=1e-10, atol=1e-10)
    weights = standard_normal(2, n, k, seed=6)
    (pulled,) = torch.autograd.grad((weights * there.mode).sum(), globals_, retain_graph=True)
    torch.testing.assert_close(pulled, torch.einsum("snk,snkd->sd", weights, jacobian), rtol=1e-8, atol=1e-8)
    for theta, mode, scale in zip(globals_.detach(), there.mode.detach(), there.scale_tril.detach(), strict=True):
        full = -torch.func.hessian(lambda y, theta=theta: problem.log_joint(theta, y))(mode)
        tail = torch.stack([full[i, :, i] for i in range(n)])
        torch.testing.assert_close(scale @ scale.mT, torch.linalg.inv(tail), rtol=1e-9, atol=1e-10)
        assert torch.equal(scale, scale.tril())
    torch.testing.assert_close(2 * there.log_det(), (there.scale_tril @ there.scale_tril.mT).logdet())
    eps = standard_normal(5, k, seed=7)
    at = there.at(eps)
    for q in range(5):
        expected = there.mode + (there.scale_tril @ eps[q].unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(at[:, q], expected)
    each = eps[None, :, None, :].expand(2, 5, n, k)
    torch.testing.assert_close(there.at(each), at)


def test_without_gradients_conditionals_are_numbers():
    problem = Problem("poisson_by_visit", num_globals=2)
    globals_ = problem.globals_.clone().requires_grad_()
    with torch.no_grad():
        found = problem.integrals.conditionals(globals_, problem.start)
    attached = problem.integrals.conditionals(globals_, problem.start)
    assert not any(part.requires_grad for part in found)
    assert attached.mode.requires_grad
    assert attached.scale_tril.requires_grad
    for one, other in zip(found, attached, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-9, atol=1e-9)


# --------------------------------------------------------------------------------------------------------- planted bugs


def planted(monkeypatch, **replaced):
    """Conditionals of which something is taken for a constant, or wrong."""
    original = UnitIntegrals.conditionals

    def conditionals(self, globals_, start):
        there = original(self, globals_, start)
        return there._replace(**{name: change(getattr(there, name)) for name, change in replaced.items()})

    monkeypatch.setattr(UnitIntegrals, "conditionals", conditionals)


BUGS = {
    "modes do not move": {"mode": torch.Tensor.detach},
    "scales do not change": {"scale_tril": torch.Tensor.detach},
    "nothing moves": {"mode": torch.Tensor.detach, "scale_tril": torch.Tensor.detach},
    "modes move the other way": {"mode": lambda mode: 2 * mode.detach() - mode},
}


def by_differences(reduction):
    return gradient_error(Problem("poisson_by_visit"), RULES["student"], reduction)


def by_autograd(reduction):
    return straight_errors(KnownMode("poisson", 2, 3, 2), RULES["student"], reduction)[1]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("route", [by_differences, by_autograd])
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug, route, reduction, monkeypatch):
    assert route(reduction) < 1e-7
    planted(monkeypatch, **BUGS[bug])
    assert route(reduction) > 1e-3


def test_a_wrong_scale_moves_the_value_towards_the_integral_only():
    """What the points are around is a matter of accuracy, and with many points of none."""
    problem = Problem("poisson_by_visit")
    there = problem.integrals.conditionals(problem.globals_, problem.start)
    wide = Conditionals(there.mode + 0.1, 1.1 * there.scale_tril, there.found)
    points = problem.points(GaussHermite(40))
    values = [
        points.log_integral(problem.density.units_at(problem.globals_, c.at(points.points))) + c.log_det()
        for c in (there, wide)
    ]
    torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=1e-9)


def test_settings_of_the_search_are_used():
    """Without a step allowed no mode is found; with a lax tolerance it is not so near."""
    problem = Problem("poisson_by_visit")
    points = problem.points(Laplace())
    lost = UnitIntegrals(problem.density, NewtonMode(max_steps=1)).values(
        points, QuadraturePoints.log_integral, problem.globals_, problem.start
    )
    assert lost.values.isnan().all()
    assert lost.lost.any()
    lax = UnitIntegrals(problem.density, NewtonMode(tolerance=0.5)).values(
        points, QuadraturePoints.log_integral, problem.globals_, problem.start
    )
    assert 1e-9 < (lax.mode - problem.values(Laplace()).mode).abs().max() < 0.1
