"""Derivatives of modes: against closed forms, finite differences, torch.func, and the blocks of the information."""

import functools
from collections.abc import Callable

import pytest
import torch
from helpers.mode_problems import CLOSED_FORMS, PROBLEMS, UnitProblem, cauchy, gamma, poisson, student, uniform
from helpers.oracles import finite_difference, relative_error
from helpers.strategies import seeds, standard_normal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import jacobian

from laplace_amort.autodiff.information import arrowhead_information
from laplace_amort.units.modes import NewtonMode


def mode_function(problem: UnitProblem, **settings: object) -> Callable[[Tensor], Tensor]:
    """Modes as a function of the globals, by a search that begins at those for the problem's own."""
    start = NewtonMode().find(problem, problem.theta, problem.start).detach()
    return lambda theta: NewtonMode(**settings).find(problem, theta, start)


@given(st.sampled_from(sorted(CLOSED_FORMS)), seeds)
def test_values_and_gradients_agree_with_closed_forms(name: str, seed: int) -> None:
    problem = CLOSED_FORMS[name](7, seed=seed)
    theta = problem.theta + 0.5 * standard_normal(2, seed=seed)
    found = NewtonMode().find(problem, theta.requires_grad_(), problem.start)
    expected = problem.mode(theta)
    assert (found - expected).abs().max() < 1e-8
    weight = standard_normal(*found.shape, seed=seed + 1)
    gradients = [torch.autograd.grad((value * weight).sum(), theta)[0] for value in (found, expected)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-8


@pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS)
def test_jacobian_by_three_routes(make: Callable[..., UnitProblem]) -> None:
    """The re-attached step, finite differences of whole searches, and the solution of the implicit equation."""
    problem = make(5)
    mode = mode_function(problem)
    actual = jacobian(mode, problem.theta)
    assert relative_error(actual, finite_difference(mode, problem.theta, step=0.01)) < 1e-7
    blocks = arrowhead_information(problem.log_joint, problem.theta, mode(problem.theta).detach())
    assert relative_error(actual, -torch.linalg.solve(blocks.tail, blocks.border)) < 1e-8
    forward = torch.func.jacfwd(torch.func.grad(lambda y, theta: problem.log_joint(theta, y)), argnums=1)
    border = -forward(mode(problem.theta).detach(), problem.theta)
    precision = problem.precision(problem.theta, mode(problem.theta))
    assert relative_error(actual, -torch.linalg.solve(precision, border)) < 1e-8


@pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS)
def test_gradcheck(make: Callable[..., UnitProblem]) -> None:
    problem = make(3)
    theta = problem.theta.clone().requires_grad_()
    for steps in (1, 2):
        assert gradcheck(mode_function(problem, differentiable_steps=steps), theta)


@pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS)
def test_gradgradcheck_with_two_steps(make: Callable[..., UnitProblem]) -> None:
    problem = make(3)
    theta = problem.theta.clone().requires_grad_()
    assert gradgradcheck(mode_function(problem, differentiable_steps=2), theta)


@pytest.mark.parametrize("make", [gamma, poisson, student], ids=lambda make: make.__name__)
def test_gradgradcheck_fails_with_one_step(make: Callable[..., UnitProblem]) -> None:
    """Planted: second derivatives of a mode that is exact to first order."""
    problem = make(3)
    theta = problem.theta.clone().requires_grad_()
    mode = mode_function(problem, differentiable_steps=1)
    assert not gradgradcheck(mode, theta, raise_exception=False)


def derivatives(fn: Callable[[Tensor], Tensor], point: Tensor, orders: int) -> list[Tensor]:
    """The value of a function of one number and its derivatives, by repeated reverse passes."""
    point = point.clone().requires_grad_()
    values = [fn(point)]
    for _ in range(orders):
        values.append(torch.autograd.grad(values[-1], point, create_graph=True)[0])
    return [value.detach() for value in values]


@pytest.mark.parametrize(("steps", "exact"), [(1, 1), (2, 3), (3, 4)])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_order_of_exactness(name: str, steps: int, exact: int) -> None:
    """m steps are exact to order 2 ** m - 1, and no further; three of them to 7, of which the first four are looked at.

    Where the log joint is quadratic in y, one Newton step is exact for good, once its curvature is no constant.
    """
    problem = CLOSED_FORMS[name](1)
    direction = torch.tensor([1.0, 0.7])
    search = mode_function(problem, differentiable_steps=steps)
    actual, expected = (
        derivatives(lambda t, mode=mode: mode(problem.theta + t * direction).sum(), torch.tensor(0.0), 4)
        for mode in (search, problem.mode)
    )
    errors = [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    assert max(errors[: exact + 1]) < 1e-7
    if steps == 1 or (exact < 4 and name in ("gamma", "beta")):
        assert errors[exact + 1] > 1e-3


@given(seeds)
def test_derivatives_do_not_see_the_way_of_the_search(seed: int) -> None:
    """From wherever it began, through repaired curvature or refused trials: one and the same derivative."""
    problem = cauchy(20, seed=seed)
    theta = problem.theta.clone().requires_grad_()
    far = NewtonMode().find(problem, theta, 10 * standard_normal(20, 1, seed=seed))
    near = NewtonMode().find(problem, theta, far.detach())
    torch.testing.assert_close(far, near, atol=1e-9, rtol=0)
    gradients = [torch.autograd.grad(mode.sum(), theta)[0] for mode in (far, near)]
    assert relative_error(gradients[0], gradients[1]) < 1e-6


def test_derivative_in_parameters_of_the_model() -> None:
    """What the log joint has in a closure, such as a parameter on the model's side, gets its gradient too."""
    base = gamma(4)
    exposure = torch.tensor(1.5, requires_grad=True)

    def density(theta: Tensor, y: Tensor) -> Tensor:
        return base.density(theta, y) - (exposure - 1) * y[:, 0].exp()

    problem = base.replace(density=density)
    for steps in (1, 2):
        mode = NewtonMode(differentiable_steps=steps).find(problem, problem.theta, problem.start)
        (gradient,) = torch.autograd.grad(mode.sum(), exposure)
        # y = log(shape + count) - log(rate + exposure)
        torch.testing.assert_close(gradient, -4 / (problem.theta[1].exp() + exposure.detach()))


def test_value_is_one_newton_step_beyond_the_tolerance() -> None:
    """So with a loose one the value is good to its square; the derivative is off by a share of the order of it."""
    problem = poisson(counts=torch.tensor([2.0, 30.0, 400.0]))
    exact = mode_function(problem)(problem.theta)
    tolerance = 1e-3
    start = exact + 0.9 * tolerance * problem.precision(problem.theta, exact)[:, 0] ** -0.5
    loose = functools.partial(NewtonMode(tolerance=tolerance).find, problem, start=start)
    assert (loose(problem.theta) - exact).abs().max() < tolerance**2
    error = relative_error(jacobian(loose, problem.theta), jacobian(mode_function(problem), problem.theta))
    assert 1e-6 < error < 3 * tolerance


def test_minibatch_weights_cancel() -> None:
    problem = student(10)
    theta = problem.theta.clone().requires_grad_()
    weighted = problem.replace(weight=250.0)
    gradients = [torch.autograd.grad(NewtonMode().find(p, theta, p.start).sum(), theta)[0] for p in (problem, weighted)]
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("size", [10.0, 5e3, 1e6])
def test_gradients_in_float32(size: float) -> None:
    counts = (size * (0.5 + uniform(2000, seed=0))).floor()
    double = poisson(counts=counts)
    single = poisson(counts=counts.float()).replace(theta=double.theta.float(), start=double.start.float())
    gradients = []
    for problem in (double, single):
        theta = problem.theta.clone().requires_grad_()
        mode = NewtonMode().find(problem, theta, problem.start)
        assert mode.dtype == theta.dtype
        gradients.append(torch.autograd.grad(mode.sum(), theta)[0].double())
    assert relative_error(gradients[1], gradients[0]) < 1e-3


def test_graph_of_the_globals_is_left_alone() -> None:
    """The globals may come from anywhere; a second backward through what they came from still works."""
    problem = gamma(4)
    root = torch.zeros(2, requires_grad=True)
    theta = problem.theta + root.sin()
    mode = NewtonMode().find(problem, theta, problem.start)
    (through_mode,) = torch.autograd.grad(mode.sum(), root, retain_graph=True)
    (direct,) = torch.autograd.grad(problem.mode(theta).sum(), root)
    torch.testing.assert_close(through_mode, direct)
