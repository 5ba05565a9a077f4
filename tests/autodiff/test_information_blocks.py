"""The blocks of the information of many units: against the dense Hessian, its derivatives, and finite differences."""

import math
import re
import warnings

import pytest
import torch
from helpers.oracles import Figures, finite_difference, relative_error
from helpers.separable import KnownMode, Separable, assemble, dense_information, separable
from helpers.strategies import standard_normal
from hypothesis import given, settings
from torch.autograd import gradcheck, gradgradcheck

from laplace_amort import InformationError, observed_information
from laplace_amort.autodiff import derivatives
from laplace_amort.autodiff.derivatives import reverse_passes
from laplace_amort.autodiff.information import ArrowheadBlocks, arrowhead_information, first_derivatives

figures = Figures()
ROOM = derivatives
FEW = settings.default.max_examples // 2


@pytest.fixture(params=["together", "one by one"])
def passes(request, monkeypatch):
    """Both ways to make several passes, whatever the size."""
    monkeypatch.setattr(ROOM, "_TOGETHER", {"together": math.inf, "one by one": 0}[request.param])


def attached(problem):
    return [value.clone().requires_grad_() for value in problem.point]


def check_blocks(information, problem):
    blocks = information(problem.log_joint, *problem.point)
    d, n, k = problem.global_dim, problem.num_units, problem.local_dim
    assert [tuple(block.shape) for block in blocks] == [(d, d), (n, k, d), (n, k, k)]
    expected = dense_information(problem.log_joint, *problem.point)
    error = relative_error(assemble(*blocks), expected)
    assert error < 1e-11
    for symmetric in (blocks[0], blocks[2]):
        assert torch.equal(symmetric, symmetric.mT)
    figures.add("blocks against the dense Hessian", error)


@given(problem=separable())
def test_blocks_equal_the_dense_hessian(problem):
    check_blocks(arrowhead_information, problem)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 4, 2), (2, 5, 1), (1, 2, 4)])
def test_passes_together_and_one_by_one(sizes):
    check_blocks(arrowhead_information, Separable(*sizes, terms=("poisson", "scaled")))


@settings(max_examples=FEW)
@given(problem=separable(max_global=2, max_local=2))
def test_blocks_are_the_slope_of_the_gradient(problem):
    """By finite differences of the gradient, which autograd computes once only."""
    theta, y = problem.point

    def gradient(flat):
        slopes = first_derivatives(problem.log_joint, flat[: len(theta)], flat[len(theta) :].reshape(y.shape))
        return -torch.cat([slopes.in_global, slopes.in_local.reshape(-1)])

    expected = finite_difference(gradient, torch.cat([theta, y.reshape(-1)]))
    actual = assemble(*arrowhead_information(problem.log_joint, theta, y))
    assert figures.add("blocks against finite differences", relative_error(actual, expected)) < 1e-7


@settings(max_examples=FEW)
@given(problem=separable(max_global=2, max_local=2))
def test_derivatives_equal_those_of_the_dense_hessian(problem):
    """First and second derivatives in both arguments, along a random direction, by torch.func."""
    theta, y = problem.point
    pull = standard_normal(*[problem.global_dim + y.numel()] * 2, seed=problem.seed)
    direction = [standard_normal(*value.shape, seed=problem.seed + 1) for value in problem.point]

    def expected(theta, y):
        return (pull * dense_information(problem.log_joint, theta, y)).sum()

    point = attached(problem)
    value = (pull * assemble(*arrowhead_information(problem.log_joint, *point))).sum()
    first = torch.autograd.grad(value, point, create_graph=True)
    second = torch.autograd.grad(sum((g * v).sum() for g, v in zip(first, direction, strict=True)), point)
    oracle = torch.func.grad(expected, argnums=(0, 1))
    _, along = torch.func.jvp(oracle, problem.point, tuple(direction))
    for name, actual, wanted in (("first", first, oracle(theta, y)), ("second", second, along)):
        for one, other in zip(actual, wanted, strict=True):
            assert figures.add(f"{name} derivative of the blocks", relative_error(one, other)) < 1e-9


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("part", ArrowheadBlocks._fields)
def test_gradcheck(check, part):
    problem = KnownMode("poisson", 2, 2, 2)
    point = [problem.global_.clone().requires_grad_(), problem.mode(problem.global_).requires_grad_()]
    assert check(lambda *point: getattr(arrowhead_information(problem.log_joint, *point), part), point)


# --------------------------------------------------------------------------------------------------- what it keeps to


def of_originals(log_joint, theta, y):
    """Planted: differentiates by the values themselves, so that y may hang on theta."""
    dense = [torch.autograd.grad(log_joint(theta, y), v, create_graph=True)[0].reshape(-1) for v in (theta, y)]
    rows = [torch.autograd.grad(e, theta, retain_graph=True)[0] for e in dense[0]]
    return -torch.stack(rows)


def check_independence(head_of):
    problem = Separable(2, 2, 1, terms=("scaled",))
    theta, y = attached(problem)
    y = y + theta.sum().sin()
    expected = head_of(problem.log_joint, *(value.detach().requires_grad_() for value in (theta, y)))
    torch.testing.assert_close(head_of(problem.log_joint, theta, y), expected)


def test_arguments_are_independent():
    check_independence(lambda *args: arrowhead_information(*args).head)
    with pytest.raises(AssertionError, match="not close"):
        check_independence(of_originals)


def test_gradient_flows_through_both_arguments():
    problem = KnownMode("poisson", 2, 2, 1)

    def total(theta):
        return assemble(*arrowhead_information(problem.log_joint, theta, problem.mode(theta))).logdet()

    assert gradcheck(total, problem.global_.clone().requires_grad_())


def test_observations_outside_of_the_units():
    """Indexed by unit, ragged, and a unit without any."""
    unit, z = torch.tensor([2, 0, 0, 2, 2]), torch.tensor([1.0, 0.0, 2.0, 3.0, 1.0])

    def log_joint(theta, y):
        rate = y[unit, 0] + y[unit, 1] * torch.arange(5.0)
        return -((y - theta) ** 2).sum() - (theta**4).sum() + (z * rate - rate.exp()).sum()

    theta, y = standard_normal(2, seed=1), standard_normal(3, 2, seed=2)
    actual = assemble(*arrowhead_information(log_joint, theta, y))
    torch.testing.assert_close(actual, dense_information(log_joint, theta, y))
    torch.testing.assert_close(actual, observed_information(log_joint, theta, y))


def test_passes_do_not_grow_with_the_units(monkeypatch):
    """One for the gradient, and d + k seeds."""
    counted, grad = [], torch.autograd.grad

    def counting(outputs, values, grad_outputs=None, is_grads_batched=False, **kwargs):
        counted.append(len(grad_outputs[0]) if is_grads_batched else 1)
        return grad(outputs, values, grad_outputs, is_grads_batched=is_grads_batched, **kwargs)

    problem = Separable(3, 20, 2)
    monkeypatch.setattr(torch.autograd, "grad", counting)
    for together in (math.inf, 0):
        counted.clear()
        monkeypatch.setattr(ROOM, "_TOGETHER", together)
        arrowhead_information(problem.log_joint, *problem.point)
        assert sum(counted) == 1 + 3 + 2


def test_the_graph_of_the_caller_is_left_alone():
    problem = Separable()
    theta, y = attached(problem)
    shifted = y.exp()
    arrowhead_information(problem.log_joint, theta, shifted)
    assert theta.grad is None
    shifted.sum().backward()  # its graph was not freed


@pytest.mark.usefixtures("passes")
def test_without_graph():
    problem = Separable(2, 3, 2)
    with torch.no_grad():
        actual = arrowhead_information(problem.log_joint, *attached(problem))
    for one, other in zip(actual, arrowhead_information(problem.log_joint, *attached(problem)), strict=True):
        assert not one.requires_grad
        torch.testing.assert_close(one, other.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype(dtype):
    problem = Separable(2, 3, 2, terms=("poisson", "scaled"))
    actual = arrowhead_information(problem.log_joint, *(value.to(dtype) for value in problem.point))
    assert all(block.dtype == dtype for block in actual)
    expected = dense_information(problem.log_joint, *problem.point)
    assert relative_error(assemble(*actual).double(), expected) < 1e3 * torch.finfo(dtype).eps


@pytest.mark.usefixtures("passes")
def test_linear_function_has_no_information():
    blocks = arrowhead_information(lambda theta, y: theta.sum() + y.sum(), torch.ones(2), torch.ones(3, 2))
    assert all(torch.equal(block, torch.zeros_like(block)) for block in blocks)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize(("d", "n"), [(0, 3), (2, 0), (0, 0)])
def test_nothing_of_a_kind(d, n):
    theta, y = torch.ones(d, requires_grad=True), torch.ones(n, 2, requires_grad=True)
    head, border, tail = arrowhead_information(lambda theta, y: -(theta**2).sum() - (y**2).sum(), theta, y)
    torch.testing.assert_close(head, 2 * torch.eye(d))
    assert border.shape == (n, 2, d)
    torch.testing.assert_close(tail, 2 * torch.eye(2).expand(n, 2, 2))


# ------------------------------------------------------------------------------------------------------ planted bugs


def planted(**changes):
    def information(log_joint, theta, y):
        blocks = arrowhead_information(log_joint, theta, y)
        return blocks._replace(**{name: change(getattr(blocks, name)) for name, change in changes.items()})

    return information


@pytest.mark.parametrize(
    "information",
    [
        planted(head=torch.neg),
        planted(border=lambda c: c.flip(0)),
        planted(border=lambda c: c.mT),
        planted(tail=lambda u: u.flip(0)),
        planted(tail=lambda u: u.flip(1)),
        planted(tail=lambda u: u.tril()),
    ],
)
def test_a_planted_bug_is_found(information):
    with pytest.raises(AssertionError):
        check_blocks(information, Separable(2, 2, 2, terms=("scaled",)))


# ------------------------------------------------------------------------------------------------------------ errors

THETA, Y = torch.ones(2, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)


def nan_in(what, *index):
    value = what.clone()
    value[index] = math.nan
    return value


def smooth(theta, y):
    return -(theta**4).sum() - ((y - theta) ** 4).sum()


@pytest.mark.parametrize(
    ("log_joint", "point", "error", "message"),
    [
        (smooth, (1.0, Y), TypeError, "argument 'global_' must be a real floating-point tensor, got float"),
        (smooth, (THETA, Y.long()), TypeError, "argument 'local' (a row for each unit) must be a real floating-point"),
        (smooth, (THETA, Y.float()), TypeError, "convert one of them"),
        (smooth, (THETA, Y[0]), ValueError, "local (2,); expected (d,) and (N, k), a row for each unit"),
        (smooth, (THETA[0], Y), ValueError, "global_ has shape () and local (3, 2); expected (d,)"),
        (smooth, (THETA, Y[:, :0]), ValueError, "and k at least 1"),
        (smooth, (nan_in(THETA, 1), Y), InformationError, "argument 'global_' is nan at index (1,)"),
        (smooth, (THETA, nan_in(Y, 2, 0)), InformationError, "(a row for each unit) is nan at index (2, 0)"),
        (lambda theta, y: y, (THETA, Y), InformationError, "log_joint returned a tensor of shape (3, 2), not a scalar"),
        (
            lambda theta, y: -(y**2).sum(),
            (THETA, Y),
            InformationError,
            "log_joint does not depend on argument 'global_'",
        ),
        (lambda theta, y: -(theta**2).sum(), (THETA, Y), InformationError, "does not depend on argument 'local'"),
        (
            lambda theta, y: smooth(theta, y) + (y[1] - 1).sqrt().sum(),
            (THETA, Y),
            InformationError,
            "the gradient of log_joint with respect to argument 'local' (a row for each unit) is inf at index (1, 0)",
        ),
        (
            lambda theta, y: smooth(theta, y) + ((y[2, 1] - 1).abs() ** 1.5).sum(),
            (THETA, Y),
            InformationError,
            "the second derivative of log_joint with respect to argument 'local' (a row for each unit) is",
        ),
        (
            lambda theta, y: smooth(theta, y) + ((theta[0] - 1).abs() ** 1.5).sum(),
            (THETA, Y),
            InformationError,
            "the second derivative of log_joint with respect to argument 'global_' is",
        ),
        (
            lambda theta, y: -(theta**2).sum() - (torch.cdist(y, 0 * y) ** 2).sum(),
            (THETA, Y),
            InformationError,
            "the second derivative of log_joint with respect to argument 'local' (a row for each unit) does not exist",
        ),
    ],
)
@pytest.mark.usefixtures("passes")
def test_refusals(log_joint, point, error, message):
    with pytest.raises(error, match=re.escape(message)):
        arrowhead_information(log_joint, *point)


def test_a_failure_that_is_no_ones_is_handed_on(monkeypatch):
    """Out of memory, say: passes one by one fail, those that look for the one to blame do not."""

    def exhausted(attached, values):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ROOM, "_one_by_one", exhausted)
    y = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        reverse_passes([(y**2).sum()], [torch.ones(1)], [y])


def test_where_there_is_no_autograd():
    with torch.inference_mode(), pytest.raises(InformationError, match="inference_mode switches off for good"):
        arrowhead_information(smooth, THETA, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated, and warns of what it cannot trace
        with pytest.raises(InformationError, match=r"JitTrace_ELBO cannot run this guide\. Use Trace_ELBO"):
            torch.jit.trace(lambda theta: arrowhead_information(smooth, theta, Y), THETA)
