"""Observed information: values, derivatives, independence of the arguments, subsampling, and every message."""

import functools
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import Function, gradcheck, gradgradcheck

from laplace_amort import InformationError, NotPositiveDefiniteError, observed_information, subsample_information


def leaf(*shape: int, **kwargs: Any) -> Tensor:
    return torch.randn(shape, **kwargs).requires_grad_()


def spd(size: int) -> Tensor:
    root = torch.randn(size, size)
    return root @ root.mT + 0.5 * torch.eye(size)


def flat(*values: Tensor) -> Tensor:
    return torch.cat([value.reshape(-1) for value in values])


def smooth(*values: Tensor) -> Tensor:
    """A log joint whose derivatives of every order are there and mix all arguments."""
    v = flat(*values)
    return -(
        (v * torch.arange(1.0, v.numel() + 1, dtype=v.dtype)).sum().sin() + v.exp().sum() + (v.prod() * v**4).sum()
    )


def conjugate_normal(mu: Tensor, y: Tensor) -> Tensor:
    """mu ~ N(0, 2), y_i | mu ~ N(mu, 1/sqrt 3), z_i | y_i ~ N(y_i, 1/2) at z = 1."""
    return -(mu**2) / 8 - 1.5 * ((y - mu) ** 2).sum() - 2 * ((1 - y) ** 2).sum()


def test_conjugate_normal() -> None:
    expected = torch.tensor([[0.25 + 9, -3, -3, -3], [-3, 7, 0, 0], [-3, 0, 7, 0], [-3, 0, 0, 7]])
    torch.testing.assert_close(observed_information(conjugate_normal, torch.tensor(5.0), torch.randn(3)), expected)


@pytest.mark.parametrize("shapes", [[(6,)], [(), (5,)], [(2, 2), (), (1, 1)], [(1,), (0, 3), (5,)], [(2, 3)]])
def test_multivariate_normal(shapes: list[tuple[int, ...]]) -> None:
    """Any split of the coordinates over arguments, in their order."""
    precision, loc = spd(6), torch.randn(6)

    def log_joint(*values: Tensor) -> Tensor:
        return torch.distributions.MultivariateNormal(loc, precision_matrix=precision).log_prob(flat(*values))

    torch.testing.assert_close(observed_information(log_joint, *[torch.randn(shape) for shape in shapes]), precision)


def test_poisson_regression() -> None:
    design, counts, weights = torch.randn(7, 3), torch.arange(7.0), torch.randn(3)
    actual = observed_information(
        lambda w: torch.distributions.Poisson((design @ w).exp()).log_prob(counts).sum(), weights
    )
    torch.testing.assert_close(actual, design.mT @ torch.diag((design @ weights).exp()) @ design)


def test_against_torch_func() -> None:
    a, b = leaf(2), leaf(3)
    expected = -torch.func.hessian(lambda v: smooth(v[:2], v[2:]))(flat(a, b).detach())
    actual = observed_information(smooth, a, b)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual, actual.mT, rtol=0, atol=0)


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives(check: Callable[..., bool]) -> None:
    assert check(lambda a, b: observed_information(smooth, a, b), (leaf(2), leaf(1, 1)))


def of_originals(log_joint: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """Planted: differentiates with respect to the values themselves, so that one may hang on another."""
    first = flat(*torch.autograd.grad(log_joint(*values), values, create_graph=True))
    rows = [flat(*torch.autograd.grad(element, values, create_graph=True, materialize_grads=True)) for element in first]
    return -torch.stack(rows)


def check_independence(information: Callable[..., Tensor]) -> None:
    theta = leaf(2)
    y = theta.exp().sum()
    detached = information(smooth, theta.detach().requires_grad_(), y.detach().requires_grad_())
    torch.testing.assert_close(information(smooth, theta, y), detached)


def test_arguments_are_independent() -> None:
    check_independence(observed_information)
    with pytest.raises(AssertionError, match="not close"):
        check_independence(of_originals)


def test_gradient_flows_through_every_value() -> None:
    def total(theta: Tensor) -> Tensor:
        return observed_information(smooth, theta, theta.exp().sum()).logdet()

    theta = torch.tensor([0.3, 0.1], requires_grad=True)
    assert gradcheck(total, theta)


def test_same_tensor_twice() -> None:
    """The same tensor in two places still makes two arguments."""
    x = leaf(2)
    torch.testing.assert_close(observed_information(smooth, x, x), observed_information(smooth, x, x.clone()))


def test_the_graph_of_the_caller_is_left_alone() -> None:
    theta = leaf(2)
    y = theta.exp()
    observed_information(smooth, theta, y)
    assert theta.grad is None
    y.sum().backward()  # the graph of y was not freed


def test_without_graph() -> None:
    theta = leaf(2)
    with torch.no_grad():
        actual = observed_information(smooth, theta)
    assert not actual.requires_grad
    torch.testing.assert_close(actual, observed_information(smooth, theta).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype(dtype: torch.dtype) -> None:
    a, b = torch.tensor([0.5, -0.25], dtype=dtype), torch.tensor(1.5, dtype=dtype)
    actual = observed_information(smooth, a, b)
    assert actual.dtype == dtype
    expected = observed_information(smooth, a.double(), b.double())
    torch.testing.assert_close(actual.double(), expected, rtol=1e3 * torch.finfo(dtype).eps, atol=0)


def test_linear_function_has_no_information() -> None:
    actual = observed_information(lambda a, b: a.sum() + 2 * b, leaf(2), leaf())
    torch.testing.assert_close(actual, torch.zeros(3, 3), rtol=0, atol=0)


def test_argument_that_enters_linearly() -> None:
    actual = observed_information(lambda a, b: a**2 + 3 * b, leaf(), leaf())
    torch.testing.assert_close(actual, torch.tensor([[-2.0, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize(
    "log_joint", [lambda a, b: -(b**2).sum() + a.sum(), lambda a, b: -(b**2).sum()], ids=["used", "unused"]
)
def test_empty_argument(log_joint: Callable[..., Tensor]) -> None:
    torch.testing.assert_close(observed_information(log_joint, torch.zeros(0, 3), leaf(2)), 2 * torch.eye(2))


def test_only_an_empty_argument() -> None:
    assert observed_information(lambda a: (a**2).sum(), torch.zeros(0)).shape == (0, 0)


class Exhausted(Function):
    """Fails once, as for want of memory that one argument at a time would not need."""

    failed = False

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        Exhausted.failed = False
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if not Exhausted.failed:
            Exhausted.failed = True
            raise RuntimeError("out of memory")
        return grad


class Model:
    """A callable object; its argument names come from ``__call__``."""

    def __call__(self, theta: Tensor, y: Tensor) -> Tensor:
        return -(theta**2) + 0 * y.detach()


class Opaque:
    """A callable object without a readable signature."""

    __signature__ = "none"

    def __call__(self, *values: Tensor) -> Tensor:
        return -(values[0] ** 2)


def with_default(theta: Tensor, y: Tensor, power: int = 2) -> Tensor:
    return -(theta**power)


def with_rest(theta: Tensor, *rest: Tensor) -> Tensor:
    return -(theta**2) - rest[0] ** 2


@pytest.mark.parametrize(
    ("log_joint", "count", "unused"),
    [
        (lambda theta, y: -(theta**2), 2, "argument 'y'"),
        (with_default, 2, "argument 'y'"),
        (lambda *values: -(values[0] ** 2), 2, "argument 1"),
        (with_rest, 3, "argument 2"),
        (functools.partial(with_default, power=3), 2, "argument 'y'"),
        (functools.partial(with_default, torch.tensor(2.0, requires_grad=True)), 1, "argument 'y'"),
        (Model(), 2, "argument 'y'"),
        (Opaque(), 2, "argument 1"),
        (torch.nn.Identity().forward, 1, None),
        (torch.neg, 1, None),
    ],
    ids=["lambda", "default", "starred", "rest", "keyword partial", "partial", "object", "opaque", "method", "builtin"],
)
def test_argument_names(log_joint: Callable[..., Tensor], count: int, unused: str | None) -> None:
    values = [torch.tensor(float(i + 1), requires_grad=True) for i in range(count)]
    if unused is None:  # all are used: name one by giving it NaN
        values, unused = [torch.tensor(math.nan)], "argument 0" if log_joint is torch.neg else "argument 'input'"
        with pytest.raises(InformationError, match=f"^{unused} is nan"):
            observed_information(log_joint, *values)
        return
    message = (
        rf"log_joint does not depend on {unused} \(shape \(\)\), so its information is zero. Drop the argument, or use "
        r"it inside log_joint \(a closure over the outer variable is not seen\)"
    )
    with pytest.raises(InformationError, match=message):
        observed_information(log_joint, *values)


def test_wrong_number_of_values_is_the_error_of_the_call() -> None:
    with pytest.raises(TypeError, match=r"positional argument"):
        observed_information(lambda theta: theta.sum(), leaf(1), leaf(1))


ZERO, ONE = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
PAIR = torch.tensor([1.0, 0.0], dtype=torch.float64)
NAN_AT_1 = torch.tensor([[0.0, math.nan]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("log_joint", "values", "message"),
    [
        (lambda theta: 1.0, (ONE,), "log_joint returned float, not a tensor"),
        (lambda theta: theta, (PAIR,), "log_joint returned a tensor of shape (2,), not a scalar. Sum it:\n    lambda"),
        (lambda theta: theta[:1], (PAIR,), "log_joint returned a tensor of shape (1,), not a scalar"),
        (lambda theta: theta.detach(), (ONE,), "the result of log_joint is not connected to any argument"),
        (lambda theta: torch.ones(()), (ONE,), "the result of log_joint is not connected to any argument"),
        (lambda theta: theta.sum(), (NAN_AT_1,), "argument 'theta' is nan at index (0, 1) (shape (1, 2)). Is a value"),
        (lambda theta, y: theta + y, (ONE, ONE / 0), "argument 'y' is inf (shape ())"),
        (lambda theta: theta + math.inf, (ONE,), "log_joint is inf (shape ())"),
        (lambda theta, y: theta.log() + y, (-ONE, ONE), "log_joint is nan (shape ())"),
        (
            lambda theta, y: theta + y.sqrt().sum(),
            (ONE, PAIR),
            "respect to argument 'y' is inf at index (1,) (shape (2,))",
        ),
        (lambda y: y.norm(), (0 * PAIR,), "the second derivative of log_joint with respect to argument 'y' is nan"),
        (lambda y: (y.abs() ** 1.5).sum(), (PAIR,), "second derivative of log_joint with respect to argument 'y' is"),
        (lambda y: y ** (1 / 3), (ZERO,), "to argument 'y' is inf (shape ())"),
        (
            lambda theta, y: torch.cdist(y.reshape(2, 1), torch.zeros(2, 1, dtype=y.dtype)).sum() + theta**2,
            (ONE, PAIR + 1),
            "the second derivative of log_joint with respect to argument 'y' does not exist in torch:",
        ),
        (
            lambda shape, x: torch.igamma(shape, x),
            (ONE, ONE),
            "the first derivative of log_joint with respect to argument 'shape' does not exist in torch:",
        ),
        (lambda a, b: Exhausted.apply(a * b), (ONE, ONE), "the first derivative of log_joint failed: out of memory"),
    ],
)
def test_what_cannot_be_differentiated(log_joint: Any, values: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(InformationError, match=re.escape(message)):
        observed_information(log_joint, *values)


def test_cure_for_a_missing_derivative() -> None:
    with pytest.raises(
        InformationError, match="Replace that operation by one that torch can differentiate three times"
    ):
        observed_information(lambda a: torch.igamma(a, torch.ones_like(a)), ONE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((), "needs at least one value: observed_information(log_joint, theta, y)"),
        ((torch.tensor(1),), "argument 'theta' must be a real floating-point tensor, got torch.int64"),
        ((torch.tensor(1j),), "argument 'theta' must be a real floating-point tensor, got torch.complex"),
        ((1.0,), "argument 'theta' must be a real floating-point tensor, got float"),
        ((ONE, None), "argument 'y' must be a real floating-point tensor, got NoneType"),
        (
            (ONE, ONE.float()),
            "argument 'y' is torch.float32 on cpu, but argument 'theta' is torch.float64 on cpu; convert one of them",
        ),
        ((ONE, ONE.to("meta")), "argument 'y' is torch.float64 on meta, but argument 'theta' is torch.float64 on cpu"),
    ],
)
def test_bad_values(values: tuple[Any, ...], message: str) -> None:
    def log_joint(theta: Tensor, y: Tensor = ONE) -> Tensor:
        return -(theta**2) * y**2

    with pytest.raises(TypeError, match=re.escape(message)):
        observed_information(log_joint, *values)


def test_inference_mode() -> None:
    with torch.inference_mode():
        made_there = torch.ones(2)
        with pytest.raises(
            InformationError, match=r"inference_mode switches off for good. Use no_grad instead:\n    with"
        ):
            observed_information(smooth, torch.ones(2))
    with pytest.raises(InformationError, match="argument 1 was made under inference_mode and cannot be differentiated"):
        observed_information(smooth, torch.ones(2), made_there)


def test_jit() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated, and warns of what it cannot trace
        with pytest.raises(InformationError, match=r"JitTrace_ELBO cannot run this guide\. Use Trace_ELBO"):
            torch.jit.trace(lambda theta: observed_information(smooth, theta), torch.ones(2))


class Arrowhead:
    """Unscaled blocks of a random model with ``drawn`` of ``total`` units, coordinates shuffled."""

    def __init__(self, seed: int, drawn: int, total: int, global_dim: int, local_dim: int) -> None:
        torch.manual_seed(seed)
        self.weight = total / drawn
        self.prior = spd(global_dim)
        blocks = [spd(global_dim + local_dim) for _ in range(drawn)]
        self.heads = [block[:global_dim, :global_dim] for block in blocks]
        self.borders = [block[global_dim:, :global_dim] for block in blocks]
        self.tails = [block[global_dim:, global_dim:] for block in blocks]
        self.order = torch.randperm(global_dim + drawn * local_dim)
        self.globals = torch.arange(self.order.numel()) < global_dim

    def assemble(self, head: Tensor, tail_weight: float, border_weight: float) -> Tensor:
        border = border_weight * torch.cat(self.borders)
        tail = tail_weight * torch.block_diag(*self.tails)
        dense = torch.cat([torch.cat([head, border.mT], 1), torch.cat([border, tail], 1)])
        return dense[self.order][:, self.order]

    @property
    def explained(self) -> Tensor:
        return sum(c.mT @ torch.linalg.solve(u, c) for c, u in zip(self.borders, self.tails, strict=True))

    @property
    def schur_complement(self) -> Tensor:
        return self.prior + self.weight * (sum(self.heads) - self.explained)

    @property
    def scaled(self) -> Tensor:
        """What the Hessian of the scaled log joint gives."""
        return self.assemble(self.prior + self.weight * sum(self.heads), self.weight, self.weight)

    @property
    def precision(self) -> Tensor:
        """What it should be: that Schur complement, with unscaled borders and tails."""
        return self.assemble(self.schur_complement + self.explained, 1.0, 1.0)

    @property
    def scale(self) -> Tensor:
        return torch.where(self.globals, 1.0, self.weight)[self.order]


def one_sided(part: str, information: Tensor, scale: Tensor) -> Tensor:
    """Planted: divides only the tail, or only the border, by the weight."""
    local = scale != 1
    tail, border = local[:, None] & local, local[:, None] ^ local
    return torch.where(tail if part == "tail" else border, information / scale.max(), information)


def check_subsampling(rescale: Callable[[Tensor, Tensor], Tensor], sizes: tuple[int, int, int, int], seed: int) -> None:
    problem = Arrowhead(seed, *sizes)
    actual = rescale(problem.scaled, problem.scale)
    torch.testing.assert_close(actual, problem.precision, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(actual, actual.mT, rtol=1e-12, atol=1e-12)
    # The covariance of the globals is the inverse of the Schur complement, whatever the order of the coordinates.
    globals_first = torch.argsort(problem.order)[: sizes[2]]
    covariance = torch.linalg.inv(actual)[globals_first][:, globals_first]
    torch.testing.assert_close(torch.linalg.inv(covariance), problem.schur_complement, rtol=1e-7, atol=1e-7)


SIZES = [(1, 2, 1, 1), (3, 10, 2, 1), (4, 6, 1, 3), (5, 500, 4, 2), (3, 7, 0, 2)]  # drawn, total, globals, locals


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("seed", range(10))
def test_subsampling_against_unscaled_blocks(sizes: tuple[int, int, int, int], seed: int) -> None:
    check_subsampling(subsample_information, sizes, seed)


@pytest.mark.parametrize("sizes", SIZES[:4])
@pytest.mark.parametrize("part", ["tail", "border"])
def test_planted_one_sided_weight_fails(part: str, sizes: tuple[int, int, int, int]) -> None:
    with pytest.raises(AssertionError, match="not close"):
        check_subsampling(functools.partial(one_sided, part), sizes, seed=0)


def test_subsampling_derivatives() -> None:
    problem = Arrowhead(0, 2, 6, 2, 1)
    symmetric = problem.scaled.requires_grad_()
    assert gradcheck(lambda m: subsample_information((m + m.mT) / 2, problem.scale), symmetric)
    assert gradgradcheck(lambda m: subsample_information((m + m.mT) / 2, problem.scale), symmetric)


def test_subsampling_keeps_the_dtype() -> None:
    problem = Arrowhead(0, 2, 6, 2, 1)
    actual = subsample_information(problem.scaled.float(), problem.scale)
    torch.testing.assert_close(actual, problem.precision.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [0, 3])
def test_nothing_subsampled(size: int) -> None:
    information = torch.eye(size)
    assert subsample_information(information, torch.ones(size)) is information


@pytest.mark.parametrize(
    ("information", "scale", "error", "message"),
    [
        (
            torch.eye(2),
            torch.ones(3),
            ValueError,
            "information has shape (2, 2) and scale (3,); expected (D, D) and (D,)",
        ),
        (torch.ones(2, 3), torch.ones(2), ValueError, "information has shape (2, 3) and scale (2,)"),
        (torch.ones(2), torch.ones(1), ValueError, "information has shape (2,) and scale (1,)"),
        (torch.ones(1, 1), torch.tensor(2.0), ValueError, "information has shape (1, 1) and scale ()"),
        (
            torch.eye(3),
            torch.tensor([1.0, 2.0, 6.0]),
            ValueError,
            "coordinates are subsampled by different factors [2.0, 6.0]: nested or several subsampled plates",
        ),
        (
            torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, 2.0, 1.0]]),
            torch.tensor([1.0, 3.0, 3.0]),
            NotPositiveDefiniteError,
            "the information of the 2 subsampled coordinates is not positive definite (leading minor 2)",
        ),
        (
            torch.tensor([[1.0, 0.0], [0.0, math.nan]]),
            torch.tensor([1.0, 3.0]),
            NotPositiveDefiniteError,
            "the information of the 1 subsampled coordinates is not positive definite",
        ),
    ],
)
def test_subsampling_refuses(information: Tensor, scale: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        subsample_information(information, scale)
