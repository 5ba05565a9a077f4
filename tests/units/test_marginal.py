"""The Laplace marginal against dense oracles along known modes, finite differences, and exact evidence."""

import functools
import math
import types

import pytest
import torch
from helpers.oracles import Figures, finite_difference, relative_error
from helpers.separable import KnownMode, Separable, dense_information, known_modes
from helpers.strategies import standard_normal
from hypothesis import given, settings
from torch.autograd import gradcheck
from torch.distributions import MultivariateNormal

from laplace_amort import InformationError, NotPositiveDefiniteError
from laplace_amort.autodiff import derivatives
from laplace_amort.autodiff.information import arrowhead_information, first_derivatives, local_information
from laplace_amort.linalg import blocks
from laplace_amort.linalg.arrowhead import Arrowhead
from laplace_amort.units import marginal
from laplace_amort.units.marginal import LogDetAlongMode, laplace_marginal

figures = Figures()
MORE, FEW = settings.default.max_examples, settings.default.max_examples // 3
FIELDS = ("value", "gradient", "information", "regression")


def at_mode(problem, **options):
    mode = problem.mode(problem.global_)
    return laplace_marginal(problem.log_joint, problem.global_, mode, **{"weight": problem.weight, **options})


def half_log_dets(problem, theta, y):
    """By the full Hessian in y. Not torch.logdet, whose third derivative is wrong where torch.func goes back twice."""
    tail = -torch.func.hessian(lambda y: problem.log_joint(theta, y))(y).flatten(0, 1).flatten(1)
    return problem.weight * torch.linalg.cholesky(tail).diagonal().log().sum()


def constant(problem):
    """What the tails, w times those of a unit, leave over: w N k / 2 log(2 pi w)."""
    w = problem.weight
    return w * problem.num_units * problem.local_dim / 2 * math.log(2 * math.pi * w)


def log_marginal(problem, theta):
    y = problem.mode(theta)
    return problem.log_joint(theta, y) - half_log_dets(problem, theta, y) + constant(problem)


def dense(problem):
    oracle, theta = functools.partial(log_marginal, problem), problem.global_
    jacobian = torch.func.jacrev(problem.mode)(theta)
    return oracle(theta), torch.func.grad(oracle)(theta), -torch.func.hessian(oracle)(theta), -jacobian


def errors(problem, **options):
    pairs = zip(at_mode(problem, **options), dense(problem), strict=True)
    return {name: relative_error(*pair) for name, pair in zip(FIELDS, pairs, strict=True)}


def check(problem, label, tolerance=1e-9):
    for name, error in errors(problem).items():
        assert figures.add(f"{name}, {label}", error) < tolerance, name


@settings(max_examples=MORE)
@given(problem=known_modes())
def test_all_of_it_along_a_known_mode(problem):
    check(problem, "known mode")
    information = at_mode(problem).information
    assert torch.equal(information, information.mT)


@pytest.mark.parametrize("family", ["poisson", "normal"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 1, 2), (2, 1, 4), (0, 1, 1), (0, 3, 2)])
def test_one_unit_and_no_globals(family, sizes):
    problem = KnownMode(family, *sizes, weight=2.0)
    found = at_mode(problem)
    d, n, k = sizes
    assert [tuple(part.shape) for part in found] == [(), (d,), (d, d), (n, k, d)]
    if d:
        check(problem, "one unit")
    assert relative_error(found.value, log_marginal(problem, problem.global_)) < 1e-12


# ---------------------------------------------------------------------------------------------- where modes are found


def climbed(problem, theta):
    """The marginal at a mode that is climbed to from elsewhere, with no other derivative than those in y."""
    y = problem.mode(theta) + 0.05
    with torch.no_grad():
        for _ in range(8):
            gradient, tail = local_information(problem.log_joint, theta, y)
            y = y + torch.linalg.solve(tail, gradient.unsqueeze(-1)).squeeze(-1)
    return y, laplace_marginal(problem.log_joint, theta, y, problem.weight)


@settings(max_examples=FEW)
@given(problem=known_modes(max_global=2, max_local=2))
def test_finite_differences(problem):
    """The gradient is that of values, the information that of gradients, W that of modes: each climbed to anew."""
    found = climbed(problem, problem.global_)[1]
    routes = {
        "gradient": lambda theta: climbed(problem, theta)[1].value,
        "information": lambda theta: -climbed(problem, theta)[1].gradient,
        "regression": lambda theta: -climbed(problem, theta)[0],
    }
    for name, route in routes.items():
        expected = finite_difference(route, problem.global_, step=0.05, levels=6)
        error = relative_error(getattr(found, name), expected)
        assert figures.add(f"{name}, finite differences", error) < 1e-7, name


@pytest.mark.parametrize("family", ["poisson", "normal"])
@pytest.mark.parametrize("offset", [1e-6, 0.1])
def test_off_the_mode_the_gradient_counts_the_slope_in_the_units(family, offset):
    """A search leaves its tolerance: f and h are followed along y - W t, to first order, wherever y is."""
    problem = KnownMode(family, 2, 3, 2, weight=2.0)
    y = problem.mode(problem.global_) + offset * standard_normal(3, 2, seed=4)
    found = laplace_marginal(problem.log_joint, problem.global_, y, problem.weight)

    def along(t):
        theta, local = problem.global_ + t, y - found.regression @ t
        return problem.log_joint(theta, local) - half_log_dets(problem, theta, local)

    expected = torch.func.grad(along)(torch.zeros(2))
    missing = (found.regression * torch.func.grad(problem.log_joint, argnums=1)(problem.global_, y).unsqueeze(-1)).sum(
        (0, 1)
    )
    assert figures.add("gradient off the mode", relative_error(found.gradient, expected)) < 1e-11
    assert relative_error(found.gradient + missing, expected) > 0.03 * offset  # so the term is seen


def test_the_error_of_a_mode_has_no_first_order_effect():
    """Where tails do not depend on y: an error of 1e-6 in the mode is one of 1e-12 in value and gradient."""
    problem = KnownMode("normal", 2, 3, 2)
    y = problem.mode(problem.global_) + 1e-6 * standard_normal(3, 2, seed=4)
    off = laplace_marginal(problem.log_joint, problem.global_, y)
    for actual, expected in zip(off[:2], at_mode(problem)[:2], strict=True):
        assert relative_error(actual, expected) < 1e-10


# ------------------------------------------------------------------------------------------------------ exact evidence


@pytest.mark.parametrize("weight", [1.0, 2.5])
@pytest.mark.parametrize("local_dim", [1, 2, 4])
def test_exact_where_units_are_normal_given_the_globals(weight, local_dim):
    """The value is the log evidence itself, constants included, and its derivatives are those of the evidence."""
    k, n, theta = local_dim, 3, torch.tensor([0.4, -0.3])
    root, z, loading = (
        standard_normal(k, k, seed=1),
        1 + standard_normal(n, k, seed=2),
        standard_normal(n, k, 2, seed=3),
    )
    noise = root @ root.mT / k + torch.eye(k) / 2

    def prior(theta):
        return -(theta**2).sum() / 2

    def spread(theta):
        return (1 + theta[1].exp()) * torch.eye(k) + 0.3 * theta[0].tanh() * torch.ones(k, k) / k

    def log_joint(theta, y):
        units = MultivariateNormal(loading @ theta, spread(theta), validate_args=False).log_prob(y)
        return prior(theta) + weight * (units + MultivariateNormal(y, noise, validate_args=False).log_prob(z)).sum()

    def evidence(theta):
        normal = MultivariateNormal(loading @ theta, spread(theta) + noise, validate_args=False)
        return prior(theta) + weight * normal.log_prob(z).sum()

    mean = loading @ theta
    y = mean + (z - mean) @ torch.linalg.solve(spread(theta) + noise, spread(theta))
    found = laplace_marginal(log_joint, theta, y, weight)
    expected = evidence(theta), torch.func.grad(evidence)(theta), -torch.func.hessian(evidence)(theta)
    for name, actual, exact in zip(FIELDS[:3], found[:3], expected, strict=True):
        assert figures.add(f"{name}, evidence", relative_error(actual, exact)) < 1e-10, name


@given(problem=known_modes(max_global=3))
def test_weight_of_a_minibatch(problem):
    """Units add what each adds alone, times the weight; the prior of the globals is counted once."""
    theta, w = problem.global_, problem.weight
    alone = [at_mode(problem.unit(i)) for i in range(problem.num_units)]
    prior = -(theta**2).sum() / 2, -theta, torch.eye(len(theta))
    for name, once in zip(FIELDS, prior, strict=False):
        expected = once + w * sum(getattr(unit, name) - once for unit in alone)
        error = relative_error(getattr(at_mode(problem), name), expected)
        assert figures.add(f"{name}, weight of a minibatch", error) < 1e-10, name


# --------------------------------------------------------------------------------------- what it refuses and returns


def test_a_tail_that_is_not_positive_definite_is_refused():
    problem = Separable(2, 3, 2, terms=("heavy_tail", "mixture"), seed=22)
    tail = arrowhead_information(problem.log_joint, *problem.point).tail
    worst = int(torch.linalg.eigvalsh(tail)[:, 0].argmin())
    with pytest.raises(NotPositiveDefiniteError, match=f"tail of unit {worst} is not positive definite"):
        laplace_marginal(problem.log_joint, *problem.point)


@pytest.mark.parametrize("factor", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(factor):
    problem = KnownMode()
    mode = problem.mode(problem.global_)
    with pytest.raises(InformationError, match="is nan at index"):
        laplace_marginal(lambda t, y: factor * problem.log_joint(t, y), problem.global_, mode)


@pytest.mark.parametrize("recording", [True, False])
def test_no_graph(recording):
    """With gradients enabled or not, and for arguments that ask for one: numbers, the same, and no trace in these."""
    problem = KnownMode("poisson", 2, 3, 2)
    point = [problem.global_.clone().requires_grad_(), problem.mode(problem.global_).clone().requires_grad_()]
    with torch.set_grad_enabled(recording):
        found = laplace_marginal(problem.log_joint, *point)
    assert not any(part.requires_grad for part in found)
    assert all(value.grad is None for value in point)
    for actual, expected in zip(found, at_mode(problem), strict=True):
        assert torch.equal(actual, expected)


def test_float32():
    problem = KnownMode("poisson", 2, 3, 2, weight=2.0)
    expected, local = at_mode(problem), problem.mode(problem.global_)
    for name in ("loading", "mean", "log_precision", "shift", "data", "global_"):
        setattr(problem, name, getattr(problem, name).float())
    found = laplace_marginal(problem.log_joint, problem.global_, local.float(), problem.weight)
    for name, actual, exact in zip(FIELDS, found, expected, strict=True):
        assert actual.dtype == torch.float32
        assert figures.add(f"{name}, float32", relative_error(actual.double(), exact)) < 1e-4, name


def test_one_pass_at_a_time_gives_the_same(monkeypatch):
    problem = KnownMode("poisson", 3, 4, 2)
    together = at_mode(problem)
    monkeypatch.setattr(derivatives, "_TOGETHER", 0)
    for actual, expected in zip(at_mode(problem), together, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


# --------------------------------------------------------------------------------- half the log-determinants, alone


@settings(max_examples=FEW)
@given(problem=known_modes(max_global=3, max_local=2))
def test_log_determinants_along_the_mode(problem):
    """The slope is that of h along the mode; what autograd makes of it, through y = mode(theta), is the curvature."""

    def along(theta, slopes=None):
        y = problem.mode(theta)
        arrowhead = Arrowhead(*dense_blocks(problem, theta, y))
        return LogDetAlongMode(problem.log_joint, theta, y, arrowhead, problem.weight, slopes)

    def oracle(theta):
        return half_log_dets(problem, theta, problem.mode(theta))

    theta, d = problem.global_.clone().requires_grad_(), problem.global_dim
    slope = along(theta).slope()
    jacobian = torch.stack([torch.autograd.grad(slope[i], theta, retain_graph=True)[0] for i in range(d)])
    curvature = torch.func.hessian(oracle)(problem.global_)
    at_hand = first_derivatives(problem.log_joint, problem.global_, problem.mode(problem.global_))
    with torch.no_grad():
        plain = along(problem.global_, at_hand)
    for name, actual, expected in (
        ("slope", slope.detach(), torch.func.grad(oracle)(problem.global_)),
        ("slope, no graph", plain.slope(), slope.detach()),
        ("derivative of the slope", jacobian, curvature),
        ("curvature", along(theta).curvature().detach(), curvature),
        ("curvature, no graph", plain.curvature(), curvature),
    ):
        assert figures.add(f"{name} of h", relative_error(actual, expected)) < 1e-9, name


def dense_blocks(problem, theta, y):
    """The blocks of the dense information, differentiable in theta."""
    d, n, k = len(theta), *y.shape
    information = dense_information(problem.log_joint, theta, y)
    tails = information[d:, d:].reshape(n, k, n, k)
    tail = torch.stack([tails[i, :, i] for i in range(n)])
    return information[:d, :d], information[d:, :d].reshape(n, k, d), tail


def test_slope_as_a_function_of_two_arguments():
    problem = KnownMode("poisson", 2, 2, 2, weight=3.0)
    point = problem.global_, problem.mode(problem.global_) + 0.1

    def slope(theta, y):
        arrowhead = Arrowhead(*arrowhead_information(problem.log_joint, theta, y))
        return LogDetAlongMode(problem.log_joint, theta, y, arrowhead, problem.weight).slope()

    assert gradcheck(slope, [value.clone().requires_grad_() for value in point])


# ------------------------------------------------------------------------------------------------------ planted bugs


class Frozen(Arrowhead):
    """The units do not follow the globals."""

    @property
    def regression(self):
        return torch.zeros_like(self.border)


def replaced(**functions):
    wrong = {name: getattr(blocks, name) for name in ("matvec", "multiply", "log_det")}
    return "blocks", types.SimpleNamespace(**{**wrong, **functions})


# What is replaced in the room, by what, and which of the results are wrong then.
BUGS = {
    "no constant": ("math", types.SimpleNamespace(pi=math.pi, log=lambda x: 0.0), {"value"}),
    "the constant ignores the weight": (
        "math",
        types.SimpleNamespace(pi=math.pi, log=lambda x: math.log(2 * math.pi)),
        {"value"},
    ),
    "the log-determinant of the other factor": (*replaced(log_det=lambda factor: -blocks.log_det(factor)), {"value"}),
    "no adjoint": (*replaced(matvec=lambda matrix, vector: 0 * vector), {"gradient", "information"}),
    "no covariance in the adjoint": (*replaced(matvec=lambda matrix, vector: vector), {"gradient", "information"}),
    "the covariance does not change": (*replaced(multiply=lambda left, right: 0 * left), {"information"}),
    "the regression is frozen": ("Arrowhead", Frozen, {"information", "regression"}),
}
PLANTED_IN = KnownMode("poisson", 2, 3, 2, weight=2.0)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug, monkeypatch):
    attribute, replacement, wrong = BUGS[bug]
    assert max(errors(PLANTED_IN).values()) < 1e-9
    monkeypatch.setattr(marginal, attribute, replacement)
    found = errors(PLANTED_IN)
    assert {name for name, error in found.items() if error > 1e-3} == wrong
    assert max(error for name, error in found.items() if name not in wrong) < 1e-9


def test_a_wrong_weight_is_found():
    wrong = errors(PLANTED_IN, weight=1.0)
    assert wrong.pop("regression") < 1e-9  # which is that of the log joint
    assert min(wrong.values()) > 1e-3
