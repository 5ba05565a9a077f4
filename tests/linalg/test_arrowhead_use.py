"""What surrounds the algebra of an arrowhead: other heads, minibatches, refusals, graphs, precision and cost."""

import itertools

import pytest
import torch
from helpers.arrowheads import OPERATIONS, ArrowheadCase, arrowhead_cases, dense, derivatives, join, relative_error
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from laplace_amort.autodiff.information import subsample_information
from laplace_amort.errors import NotPositiveDefiniteError
from laplace_amort.linalg.arrowhead import Arrowhead

SIZES = [1, 2, 3, 4]  # of a unit: the last is not unrolled


def case_of(local_dim: int, **changes: object) -> ArrowheadCase:
    return ArrowheadCase(
        **{"global_dim": 2, "num_units": 3, "log_condition": 1.0, "seed": 5, **changes}, local_dim=local_dim
    )


# --------------------------------------------------------------------------------------- other heads, and minibatches


@given(case=arrowhead_cases(), factor=st.floats(0.1, 10))
def test_with_another_schur_complement(case: ArrowheadCase, factor: float) -> None:
    arrowhead, vectors = case.arrowhead(), case.vectors()
    before = arrowhead.global_scale_tril  # made on demand, and not to be handed on
    other = arrowhead.with_schur(factor * arrowhead.schur_complement)
    again = Arrowhead(other.head, other.border, other.tail)
    assert relative_error(other.global_scale_tril, before / factor**0.5) < 1e-10
    for name, (ours, _) in OPERATIONS.items():
        assert relative_error(ours(other, vectors), ours(again, vectors)) < 1e-10, name
    assert arrowhead.global_scale_tril is before


@given(case=arrowhead_cases(), weight=st.floats(1.0, 100))
def test_unscaled_equals_the_subsampled_dense_matrix(case: ArrowheadCase, weight: float) -> None:
    if len(case.batch) or not case.num_units:  # the dense function takes one matrix, with units
        case = ArrowheadCase(case.global_dim, case.num_units + 1, case.local_dim, (), case.log_condition, case.seed)
    blocks, vectors = case.blocks(), case.vectors()
    factors = torch.ones(case.global_dim + case.num_units * case.local_dim)
    factors[case.global_dim :] = weight
    expected = subsample_information(dense(blocks), factors)
    arrowhead = Arrowhead(*blocks)
    unscaled = arrowhead.unscale(weight)
    for name, (ours, twin) in OPERATIONS.items():
        assert relative_error(ours(unscaled, vectors), twin(expected, case, vectors)) < 1e-10, name
    assert relative_error(unscaled.schur_complement, arrowhead.schur_complement) == 0
    assert relative_error(unscaled.regression, arrowhead.regression) < 1e-14


def test_order_of_replacing_and_unscaling_does_not_matter() -> None:
    arrowhead, vectors = case_of(2).arrowhead(), case_of(2).vectors()
    schur = 3 * arrowhead.schur_complement
    one, other = arrowhead.with_schur(schur).unscale(4.0), arrowhead.unscale(4.0).with_schur(schur)
    for name, (ours, _) in OPERATIONS.items():
        assert relative_error(ours(one, vectors), ours(other, vectors)) < 1e-14, name
    assert arrowhead.unscale(1.0) is arrowhead
    with pytest.raises(ValueError, match="weight is -2; it is the number of units over that of the minibatch"):
        arrowhead.unscale(-2)


@pytest.mark.parametrize("local_dim", [2, 4])
def test_derivatives_in_another_schur_complement(local_dim: int) -> None:
    """Every operation has the derivatives of the arrowhead that is made from scratch."""
    case = case_of(local_dim)
    vectors = case.vectors()

    def replaced(ours, head, border, tail, schur):
        return ours(Arrowhead(head, border, tail).with_schur(schur).unscale(2.0), vectors)

    def from_scratch(ours, head, border, tail, schur):
        explained = (border.mT @ torch.linalg.solve(tail, border)).sum(-3)
        return ours(Arrowhead(schur + explained / 2, border / 2, tail / 2), vectors)

    blocks = case.blocks()
    inputs = [*blocks, 2 * Arrowhead(*blocks).schur_complement]
    for name, (ours, _) in OPERATIONS.items():
        if name == "schur_complement":  # an input here
            continue
        pair = [derivatives(lambda *v, f=f, g=ours: f(g, *symmetric(*v)), inputs) for f in (replaced, from_scratch)]
        for actual, expected in zip(*pair, strict=True):
            assert relative_error(actual, expected) < 1e-10, name


def symmetric(head, border, tail, schur):
    return (head + head.mT) / 2, border, (tail + tail.mT) / 2, (schur + schur.mT) / 2


# ----------------------------------------------------------------------------------------------------------- refusals


def test_names_the_unit_with_the_smallest_eigenvalue() -> None:
    head, border, tail = case_of(2).blocks()
    tail[1] = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    tail[2] = torch.diag(torch.tensor([1.0, -4.0]))
    with pytest.raises(NotPositiveDefiniteError, match="the tail of unit 2 is not positive definite") as raised:
        Arrowhead(head, border, tail)
    assert "its smallest eigenvalue is -4 (2 of 3 are not)" in str(raised.value)
    assert "tail, report = SoftAbs()(tail)" in str(raised.value)


@pytest.mark.parametrize("local_dim", SIZES)
@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf, -torch.inf])
def test_refuses_any_bad_pivot(local_dim: int, value: float) -> None:
    for place in range(local_dim):
        head, border, tail = case_of(local_dim, batch=(2,)).blocks()
        tail[1, 2, place] = tail[1, 2, :, place] = 0.0
        tail[1, 2, place, place] = value
        words = "positive definite: its smallest eigenvalue is" if abs(value) <= 1 else "finite"
        with pytest.raises(NotPositiveDefiniteError, match=rf"unit 2 of arrowhead \[1\] is not {words}"):
            Arrowhead(head, border, tail)


@pytest.mark.parametrize(
    ("batch", "words"), [((), "the Schur complement is not"), ((2,), r"the Schur complement of arrowhead \[1\] is not")]
)
def test_names_the_schur_complement_once_it_is_needed(batch: tuple[int, ...], words: str) -> None:
    case = case_of(2, batch=batch)
    schur = torch.eye(2).repeat(*batch, 1, 1)
    schur[..., 1, 1].reshape(-1)[-1] = -3.5
    arrowhead = case.arrowhead().with_schur(schur)
    arrowhead.matvec(*case.vectors())
    arrowhead.conditional_mean(case.vectors().global_)
    needs_it = ["log_det", "solve", "draw", "global_covariance", "local_variance", "cross_covariance"]
    for name in needs_it:
        with pytest.raises(NotPositiveDefiniteError, match=words) as raised:
            OPERATIONS[name][0](arrowhead, case.vectors())
        assert "smallest eigenvalue is -3.5" in str(raised.value)
        assert "arrowhead.with_schur(schur)" in str(raised.value)


def test_refuses_a_schur_complement_that_is_not_finite() -> None:
    arrowhead = case_of(1).arrowhead().with_schur(torch.full((2, 2), torch.nan))
    with pytest.raises(NotPositiveDefiniteError, match="the Schur complement is not finite"):
        arrowhead.log_det()


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 2), (3, 1, 2), (3, 2, 2)),
        ((2, 3), (3, 1, 2), (3, 1, 1)),
        ((2, 2), (3, 1, 2), (4, 1, 1)),
        ((5, 2, 2), (3, 1, 2), (3, 1, 1)),
        ((2, 2), (1, 2), (1, 1)),
    ],
)
def test_refuses_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="do not fit together") as raised:
        Arrowhead(*(torch.ones(shape) for shape in shapes))
    assert all(str(shape) in str(raised.value) for shape in shapes)
    with pytest.raises(ValueError, match=r"schur has shape \(3, 3\); that of the head is \(2, 2\)"):
        case_of(1).arrowhead().with_schur(torch.eye(3))


# ------------------------------------------------------------------------------------------------ graphs and precision


@pytest.mark.parametrize("local_dim", SIZES)
def test_finite_differences(local_dim: int) -> None:
    case = case_of(local_dim, num_units=2, global_dim=1)
    vectors = case.vectors()

    def everything(head, border, tail):
        arrowhead = Arrowhead((head + head.mT) / 2, border, (tail + tail.mT) / 2)
        draws = arrowhead.draw(*vectors)
        return arrowhead.log_det(), join(*draws), arrowhead.local_covariance(), arrowhead.conditional_mean(draws[0])

    blocks = [block.requires_grad_() for block in case.blocks()]
    assert gradcheck(everything, blocks, check_batched_grad=True, check_forward_ad=True)
    assert gradgradcheck(everything, blocks, check_batched_grad=True, fast_mode=True)


@pytest.mark.parametrize("local_dim", SIZES)
def test_hessian_by_torch_func(local_dim: int) -> None:
    case = case_of(local_dim, num_units=2, global_dim=1)
    head, border, tail = case.blocks()
    vectors = case.vectors()

    def scalar(tail):
        arrowhead = Arrowhead(head, border, (tail + tail.mT) / 2)
        return arrowhead.log_det() + sum((part**2).sum() for part in arrowhead.draw(*vectors))

    expected = torch.autograd.functional.hessian(scalar, tail)
    for outer, inner in itertools.product([torch.func.jacrev, torch.func.jacfwd], repeat=2):
        assert relative_error(outer(inner(scalar))(tail), expected) < 1e-12


def test_what_is_made_on_demand_under_no_grad_has_its_graph() -> None:
    head, border, tail = (block.requires_grad_() for block in case_of(2).blocks())
    arrowhead = Arrowhead(head, border, tail)
    with torch.no_grad():
        first = arrowhead.log_det()
        assert not first.requires_grad
        assert arrowhead.regression.requires_grad
    (gradient,) = torch.autograd.grad(arrowhead.log_det(), head)
    assert relative_error((gradient + gradient.mT) / 2, arrowhead.global_covariance()) < 1e-12
    with torch.no_grad():
        plain = Arrowhead(head, border, tail)
        assert not plain.global_scale_tril.requires_grad


@pytest.mark.parametrize("local_dim", SIZES)
def test_single_precision(local_dim: int) -> None:
    case = case_of(local_dim, batch=(2,))
    single, double = case.arrowhead(torch.float32), case.arrowhead()
    vectors = case.vectors(2)
    rounded = type(vectors)(*(value.float() for value in vectors))
    for name, (ours, _) in OPERATIONS.items():
        actual = ours(single, rounded)
        assert actual.dtype == torch.float32, name
        assert relative_error(actual.double(), ours(double, vectors)) < 1e-4, name


def test_draws_of_many_samples_have_the_covariance_of_the_dense_matrix() -> None:
    """By a rule that is exact for quadratic functions: every noise is a column of sqrt(D) times the identity."""
    case = case_of(3)
    arrowhead, size = case.arrowhead(), 2 + 3 * 3
    noise = size**0.5 * torch.eye(size)
    draws = join(*arrowhead.draw(noise[:, :2], noise[:, 2:].reshape(size, 3, 3)))
    assert relative_error(draws.mT @ draws / size, torch.linalg.inv(dense(case.blocks()))) < 1e-12


def test_prints_its_sizes() -> None:
    assert repr(case_of(2).arrowhead()) == "Arrowhead of 3 units of dimension 2 and 2 global dimensions"


# ---------------------------------------------------------------------------------------------------------------- cost


class Recorder(TorchDispatchMode):
    """The largest tensor that comes out of any operation, and the batches that LAPACK is given."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.lapack = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        parts = result if isinstance(result, tuple | list) else [result]
        self.largest = max([self.largest, *(p.untyped_storage().size() for p in parts if isinstance(p, torch.Tensor))])
        if "linalg" in str(func) or "cholesky" in str(func) or "triangular" in str(func):
            self.lapack[str(func)] = max(self.lapack.get(str(func), 0), args[0].shape[:-2].numel())
        return result


def recorded(local_dim: int, num_units: int) -> Recorder:
    """Every operation but one, in one function with its first and second derivatives."""
    case = case_of(local_dim, num_units=num_units, global_dim=4)
    blocks, vectors = case.blocks(), case.vectors()

    def everything(head, border, tail):
        arrowhead = Arrowhead(head, border, tail).with_schur(20 * head).unscale(2)
        return sum(
            (ours(arrowhead, vectors) ** 2).sum() for name, (ours, _) in OPERATIONS.items() if name != "to_dense"
        )

    with Recorder() as recorder:
        derivatives(everything, blocks)
    return recorder


@pytest.mark.parametrize("local_dim", SIZES)
def test_memory_is_linear_in_the_number_of_units(local_dim: int) -> None:
    small, large = recorded(local_dim, 50), recorded(local_dim, 100)
    assert large.largest <= 2 * small.largest
    assert small.largest <= 8 * (4 * 4 + 50 * local_dim * (4 + local_dim))  # as much as the blocks themselves


@pytest.mark.parametrize("local_dim", SIZES)
def test_lapack_sees_no_batch_of_small_blocks(local_dim: int) -> None:
    batches = recorded(local_dim, 50).lapack
    assert batches  # that of the Schur complement, at least
    assert max(batches.values()) == (50 if local_dim > 3 else 1)
