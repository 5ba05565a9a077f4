"""Which curvature is that of the globals: against the Laplace marginal itself, differentiated along known modes."""

import copy
import functools
import pickle
import sys
import types

import pytest
import torch
from helpers.oracles import Figures, relative_error
from helpers.separable import KnownMode, Separable, known_modes, separable
from helpers.strategies import standard_normal
from hypothesis import given, settings
from torch.autograd import gradcheck

from laplace_amort import SoftAbs
from laplace_amort.autodiff.information import arrowhead_information, local_information
from laplace_amort.guide.heads import Head, JointCurvature, MarginalCurvature
from laplace_amort.linalg import blocks
from laplace_amort.linalg.arrowhead import Arrowhead
from laplace_amort.units import marginal

figures = Figures()
FEW = settings.default.max_examples // 4  # higher derivatives of dense oracles take their time


def arrowhead_at(log_joint, global_, local, repair=None):
    head, border, tail = arrowhead_information(log_joint, global_, local)
    return Arrowhead(head, border, tail if repair is None else repair(tail)[0])


def evaluate(head, problem, global_, local, repair=None):
    arrowhead = arrowhead_at(problem.log_joint, global_, local, repair)
    return head(problem.log_joint, global_, local, arrowhead, getattr(problem, "weight", 1.0))


def correction(problem, global_, local, **options):
    """What the marginal curvature adds to the joint one."""
    joint, marginal = (
        evaluate(head(), problem, global_, local, **options) for head in (JointCurvature, MarginalCurvature)
    )
    return marginal - joint


def profile(problem, global_):
    return problem.log_joint(global_, problem.mode(global_))


def log_det(matrix):
    """Not torch.logdet, whose third derivative is wrong where torch.func goes forward and back."""
    return 2 * torch.linalg.cholesky(matrix).diagonal(dim1=-2, dim2=-1).log().sum()


def log_marginal(problem, global_):
    """The Laplace approximation of the log marginal density, up to a constant."""
    tail = -torch.func.hessian(lambda y: problem.log_joint(global_, y))(problem.mode(global_)).flatten(0, 1).flatten(1)
    return profile(problem, global_) - problem.weight * log_det(tail) / 2


ORACLES = {JointCurvature: profile, MarginalCurvature: log_marginal}


@pytest.mark.parametrize("head", ORACLES)
@settings(max_examples=2 * FEW)
@given(problem=known_modes())
def test_curvature_along_a_known_mode(head, problem):
    actual = evaluate(head(), problem, problem.global_, problem.mode(problem.global_))
    expected = -torch.func.hessian(functools.partial(ORACLES[head], problem))(problem.global_)
    assert figures.add(f"{head.__name__} along a known mode", relative_error(actual, expected)) < 1e-9
    assert torch.equal(actual, actual.mT)


@pytest.mark.parametrize("head", ORACLES)
@settings(max_examples=FEW)
@given(problem=known_modes(max_global=3, max_local=2))
def test_total_gradient_along_a_known_mode(head, problem):
    """The third derivative of the marginal, as the gradient of the ELBO needs it: all of it, where y = mode(theta)."""
    pull = standard_normal(problem.global_dim, problem.global_dim, seed=problem.seed)
    theta = problem.global_.clone().requires_grad_()
    curvature = evaluate(head(), problem, theta, problem.mode(theta))
    (actual,) = torch.autograd.grad((pull * curvature).sum(), theta)
    oracle = torch.func.hessian(functools.partial(ORACLES[head], problem))
    expected = torch.func.grad(lambda theta: -(pull * oracle(theta)).sum())(problem.global_)
    assert figures.add(f"gradient of {head.__name__} along a known mode", relative_error(actual, expected)) < 1e-9


@pytest.mark.parametrize("family", ["poisson", "normal"])
@pytest.mark.parametrize("sizes", [(1, 3, 1), (2, 2, 2), (3, 1, 3)])
def test_finite_differences_of_the_marginal(family, sizes):
    """No autograd but for the gradient in y: the mode is climbed to, and the curvature is that along a random line."""
    problem = KnownMode(family, *sizes, weight=2.0)
    direction = standard_normal(sizes[0], seed=5)

    def climbed(theta):
        y = problem.mode(theta) + 0.05
        with torch.no_grad():
            for _ in range(8):
                gradient, tail = local_information(problem.log_joint, theta, y)
                y = y + torch.linalg.solve(tail, gradient.unsqueeze(-1)).squeeze(-1)
        return y, tail

    def along(t):
        y, tail = climbed(problem.global_ + t * direction)
        return problem.log_joint(problem.global_ + t * direction, y) - problem.weight * log_det(tail) / 2

    step, values = 0.02, [along(0.02 * i) for i in (-2, -1, 0, 1, 2)]
    stencil = torch.tensor([1.0, -16.0, 30.0, -16.0, 1.0]) / (12 * step**2)
    expected = stencil @ torch.stack(values)
    y, _ = climbed(problem.global_)
    actual = direction @ evaluate(MarginalCurvature(), problem, problem.global_, y) @ direction
    assert figures.add("finite differences of the marginal", relative_error(actual, expected)) < 1e-6


# ------------------------------------------------------------------------------------- as a function of two arguments


def adjoint_form(problem, global_, local, repair=None):
    """The formula itself, by torch.func from a dense Hessian, the amount of a repair held fixed."""
    arrowhead = arrowhead_at(problem.log_joint, global_, local, repair)
    weight, regression = getattr(problem, "weight", 1.0), arrowhead.regression
    moved = arrowhead.tail - tails(problem, global_, local)

    def log_dets(theta, y):
        return weight / 2 * log_det(tails(problem, theta, y) + moved)

    pull = torch.func.grad(log_dets, argnums=1)(global_, local)
    adjoint = torch.linalg.solve(arrowhead.tail, pull.unsqueeze(-1)).squeeze(-1)

    def phi(t):
        theta, y = global_ + t, local - regression @ t
        return log_dets(theta, y) + (adjoint * torch.func.grad(problem.log_joint, argnums=1)(theta, y)).sum()

    return torch.func.hessian(phi)(torch.zeros_like(global_))


def tails(problem, theta, y):
    """By the full Hessian in y, of which the blocks of the units are taken."""
    hessian = torch.func.hessian(lambda y: problem.log_joint(theta, y))(y)
    return torch.stack([-hessian[i, :, i] for i in range(len(y))])


@settings(max_examples=FEW)
@given(problem=separable(max_global=2, max_local=2))
def test_formula_where_tails_are_repaired(problem):
    """Anywhere, also where tails are indefinite: finite, and what the formula says."""
    repair = SoftAbs(floor=0.1)
    actual = correction(problem, *problem.point, repair=repair)
    expected = adjoint_form(problem, *problem.point, repair)
    assert figures.add("formula with repaired tails", relative_error(actual, expected)) < 1e-8


INDEFINITE = Separable(2, 3, 2, terms=("heavy_tail", "mixture"), seed=22)


def test_some_of_those_tails_are_indefinite():
    tail = arrowhead_information(INDEFINITE.log_joint, *INDEFINITE.point).tail
    assert torch.linalg.eigvalsh(tail).min() < 0
    assert correction(INDEFINITE, *INDEFINITE.point, repair=SoftAbs(0.1)).isfinite().all()


@pytest.mark.parametrize(
    ("problem", "repair"),
    [
        (KnownMode("poisson", 2, 2, 1, weight=3.0), None),
        (KnownMode("poisson", 1, 2, 2), None),
        (KnownMode("normal", 2, 1, 3), None),
        (INDEFINITE, SoftAbs(0.1)),
    ],
    ids=["k=1", "k=2", "k=3", "repaired"],
)
@pytest.mark.parametrize("head", ORACLES)
def test_gradients_in_both_arguments(head, problem, repair):
    local = problem.local if repair else problem.mode(problem.global_) + 0.1
    point = [value.clone().requires_grad_() for value in (problem.global_, local)]
    assert gradcheck(functools.partial(evaluate, head(), problem, repair=repair), point)


# ---------------------------------------------------------------------------------------------- what it must keep to


@given(problem=known_modes(max_global=3))
def test_weight_of_a_minibatch(problem):
    """The weight multiplies the sum over units of what each adds alone; the prior of the globals adds nothing."""
    theta, local = problem.global_, problem.mode(problem.global_)
    actual = correction(problem, theta, local)
    units = [correction(problem.unit(i), theta, local[i : i + 1]) for i in range(problem.num_units)]
    assert figures.add("weight of a minibatch", relative_error(actual, problem.weight * sum(units))) < 1e-10


@pytest.mark.parametrize("head", ORACLES)
def test_without_graph(head):
    problem = KnownMode()
    point = [problem.global_.clone().requires_grad_(), problem.mode(problem.global_).requires_grad_()]
    with torch.no_grad():
        actual = evaluate(head(), problem, *point)
    assert not actual.requires_grad
    torch.testing.assert_close(actual, evaluate(head(), problem, *point).detach(), rtol=1e-12, atol=0)


def test_one_pass_at_a_time_gives_the_same(monkeypatch):
    """Passes are made together for few units, and one by one for many."""
    problem = KnownMode("poisson", 3, 4, 2)
    point = [problem.global_.clone().requires_grad_(), problem.mode(problem.global_).requires_grad_()]

    def value_and_gradients():
        curvature = evaluate(MarginalCurvature(), problem, *point)
        return [curvature, *torch.autograd.grad(curvature.logdet(), point)]

    together = value_and_gradients()
    monkeypatch.setattr(sys.modules["laplace_amort.autodiff.derivatives"], "_TOGETHER", 0)
    for actual, expected in zip(value_and_gradients(), together, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_float32():
    problem = KnownMode("poisson", 2, 3, 2)
    local = problem.mode(problem.global_)
    expected = evaluate(MarginalCurvature(), problem, problem.global_, local)
    for name in ("loading", "mean", "log_precision", "shift", "data", "global_"):
        setattr(problem, name, getattr(problem, name).float())
    actual = evaluate(MarginalCurvature(), problem, problem.global_, local.float())
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def test_gaussian_tails_add_nothing():
    """Where the precision of the units is one and the same everywhere, the two curvatures are one."""
    problem = Separable()
    problem.log_joint = lambda theta, y: -(theta**2).sum() - ((y - theta.sin()) ** 2).sum()
    torch.testing.assert_close(correction(problem, *problem.point), torch.zeros(1, 1), rtol=0, atol=0)


def test_no_globals():
    problem = KnownMode(global_dim=0)
    assert evaluate(MarginalCurvature(), problem, problem.global_, problem.mode(problem.global_)).shape == (0, 0)


@pytest.mark.parametrize("head", ORACLES)
def test_strategies_are_values(head):
    assert isinstance(head(), Head)
    assert head() == pickle.loads(pickle.dumps(head()))
    assert repr(head()) == f"{head.__name__}()"


# ------------------------------------------------------------------------------------------------------ planted bugs


PLANTED_IN = KnownMode("poisson", 2, 3, 2, weight=2.0)


@functools.cache
def expected_there():
    """The curvature of the marginal, and the gradient of the sum of its elements."""
    oracle = torch.func.hessian(functools.partial(log_marginal, PLANTED_IN))
    return -oracle(PLANTED_IN.global_), torch.func.grad(lambda theta: -oracle(theta).sum())(PLANTED_IN.global_)


def errors_there(problem=PLANTED_IN):
    """Relative errors of the curvature along a known mode, and of its total gradient."""
    theta = PLANTED_IN.global_.clone().requires_grad_()
    actual = evaluate(MarginalCurvature(), problem, theta, problem.mode(theta))
    (gradient,) = torch.autograd.grad(actual.sum(), theta)
    return [relative_error(a, b) for a, b in zip((actual, gradient), expected_there(), strict=True)]


# What is wrong: the function of blocks that is replaced, by what, and whether the value is right all the same.
BUGS = {
    "the mode does not bend": ("matvec", lambda matrix, vector: 0 * vector, False),
    "the covariance does not change along the mode": ("multiply", lambda left, right: 0 * left, False),
    "the adjoint is frozen": ("matvec", lambda matrix, vector: blocks.matvec(matrix, vector).detach(), True),
    "no covariance in the adjoint": ("matvec", lambda matrix, vector: vector, False),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug, monkeypatch):
    name, wrong, value_is_right = BUGS[bug]
    assert max(errors_there()) < 1e-9
    replaced = {"matvec": blocks.matvec, "multiply": blocks.multiply, name: wrong}
    monkeypatch.setattr(marginal, "blocks", types.SimpleNamespace(**replaced))
    value, gradient = errors_there()
    assert (value < 1e-9) is value_is_right
    assert gradient > 1e-3


@pytest.mark.parametrize("wrong", ["weight", "mode"])
def test_a_wrong_weight_or_point_is_found(wrong):
    planted = copy.copy(PLANTED_IN)
    setattr(planted, wrong, {"weight": 1.0, "mode": lambda theta: PLANTED_IN.mode(theta) + 0.1}[wrong])
    planted.log_joint = PLANTED_IN.log_joint
    assert min(errors_there(planted)) > 1e-3
