"""SoftAbs and NoRepair: derivatives across the boundary of what is repaired, scales, reports, and what is refused."""

import functools
import math
import re

import mpmath
import pytest
import torch
from helpers.repairs import MATRICES, MIXED, check_derivatives, symmetrized, with_eigenvalues
from torch import Tensor, nn
from torch.autograd import gradcheck

from laplace_amort import NotPositiveDefiniteError, RepairReport, SoftAbs
from laplace_amort.linalg import repair, symmetric
from laplace_amort.linalg.repair import NoRepair, Repair

REPAIRS = [SoftAbs(), NoRepair()]
SCALE = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)


# --------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("name", ["1x1", "zero 2x2", "indefinite 2x2", "repeated", "zero", "negative", "nested batch"])
def test_derivatives_in_matrix_and_scale(name: str) -> None:
    matrix = MATRICES[name]
    check_derivatives(symmetrized(SoftAbs(0.5)), matrix, SCALE[: matrix.shape[-1]])


@pytest.mark.parametrize("scale", [SCALE, torch.stack([SCALE, SCALE, SCALE.flip(0)])], ids=["common", "own"])
def test_derivatives_of_a_batch_of_which_some_are_repaired(scale: Tensor) -> None:
    needed, _ = symmetric.screen(MIXED, scale, 20 * 0.5)
    assert needed is not None
    assert 0 < len(needed) < len(MIXED)
    check_derivatives(symmetrized(SoftAbs(0.5)), MIXED, scale)


@functools.cache
def exact(u: float, order: int) -> mpmath.mpf:
    """u coth u and its first two derivatives, for u > 0."""
    return mpmath.diff(lambda x: x * mpmath.coth(x), u, order)


@pytest.mark.parametrize("scale", [None, 4.0])
@pytest.mark.parametrize("ratio", [2.0, 10.0, 15.0, 19.99, 20.01, 25.0, 60.0])
def test_no_step_where_the_repair_stops_acting(ratio: float, scale: float | None) -> None:
    """Value and derivatives are exact to rounding error at every distance from the floor."""
    floor = 0.25
    unit = scale or 1.0
    value = torch.tensor(ratio * floor * unit, requires_grad=True)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])

    def smallest(value: Tensor, n: int) -> Tensor:
        """Of the repaired matrix, an eigenvalue that is the value in an eigenvector that is known."""
        matrix = value.reshape(1, 1) if n == 1 else turn @ torch.diag(torch.stack([value, 0 * value + 90.0])) @ turn.mT
        result = SoftAbs(floor)(matrix, None if scale is None else torch.full((n,), scale))[0]
        return result.squeeze() if n == 1 else (turn.mT @ result @ turn)[0, 0]

    with mpmath.workdps(60):
        expected = [floor * unit * exact(ratio, 0), exact(ratio, 1), exact(ratio, 2) / floor / unit]
    for n in (1, 2):
        result = smallest(value, n)
        (first,) = torch.autograd.grad(result, value, create_graph=True)
        (second,) = torch.autograd.grad(first + 0 * value, value)
        for actual, wanted in zip((result.detach(), first.detach(), second), expected, strict=True):
            assert abs(float(actual) - float(wanted)) < (1e-14 if n == 1 else 3e-12) * max(1, abs(float(wanted)))


def test_planted_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "_UNTOUCHED", 8)
    with pytest.raises(AssertionError):
        test_no_step_where_the_repair_stops_acting(10.0, None)


def test_scale_matters_only_where_something_is_repaired() -> None:
    scale = torch.ones(3, 3, requires_grad=True)
    weight = torch.linspace(-1, 1, 27).reshape(3, 3, 3)
    (gradient,) = torch.autograd.grad((weight * SoftAbs(0.5)(MIXED, scale)[0]).sum(), scale)
    assert gradient[1].abs().max() == 0
    assert gradient[[0, 2]].abs().max() > 1e-3


def test_third_derivative() -> None:
    """Of a batch in which some are repaired: the curvature of a log-determinant, and then its gradient."""

    def second(scale: Tensor) -> Tensor:
        matrix = MIXED * scale**2
        (first,) = torch.autograd.grad(torch.logdet(SoftAbs(0.5)(matrix)[0]).sum(), scale, create_graph=True)
        return torch.autograd.grad(first, scale, create_graph=True)[0]

    gradcheck(second, torch.tensor(1.1, requires_grad=True))


# ------------------------------------------------------------------------------------------- what is left alone


@pytest.mark.parametrize("scale", [None, SCALE])
def test_well_conditioned_matrix_is_returned_as_it_is(scale: Tensor | None) -> None:
    matrix = with_eigenvalues(1.0, 3.0, 50.0)
    for strategy in REPAIRS:
        result, report = strategy(matrix, scale)
        assert result is matrix
        root = torch.ones(3) if scale is None else scale.sqrt()
        smallest = float(torch.linalg.eigvalsh(matrix / torch.outer(root, root))[0])
        assert report == RepairReport(pytest.approx(smallest), pytest.approx(smallest), 0.0, 0, 1)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_only_what_needs_it_is_decomposed(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    count = lambda matrix: counts.append(len(matrix)) or torch.linalg.eigh(matrix)  # noqa: E731
    monkeypatch.setattr(symmetric, "eigh", count)
    batch = torch.eye(k).repeat(4, 50, 1, 1)
    SoftAbs()(batch)
    assert counts == []
    batch[1, 7], batch[3, 49] = -torch.eye(k), 0 * torch.eye(k)
    result, report = SoftAbs()(batch)
    assert counts == ([2] if k > 1 else [])
    assert (report.num_repaired, report.num_matrices, report.worst) == (2, 200, (1, 7))
    same = (result == batch).all(-1).all(-1)
    assert (~same).nonzero().tolist() == [[1, 7], [3, 49]]
    torch.testing.assert_close(result[1, 7], torch.eye(k))
    torch.testing.assert_close(result[3, 49], 1e-3 * torch.eye(k))


def test_the_report_of_a_batch_in_order_has_an_eigenvalue_that_occurs() -> None:
    batch = torch.stack([with_eigenvalues(1.0 + i, 4.0, seed=i) for i in range(6)])
    for strategy in REPAIRS:
        report = strategy(batch)[1]
        occurring = torch.linalg.eigvalsh(batch)[:, 0]
        assert float((occurring - report.smallest_before).abs().min()) < 1e-14
        singles = strategy(torch.tensor([3.0, 0.5, 2.0]).reshape(3, 1, 1), torch.tensor([2.0]))[1]
        assert singles.smallest_before == singles.smallest_after == pytest.approx(0.25)


def test_small_asymmetry_is_averaged() -> None:
    matrix = torch.tensor([[1.0, 0.5 + 1e-9], [0.5, 2.0]])
    torch.testing.assert_close(SoftAbs()(matrix)[0], SoftAbs()((matrix + matrix.mT) / 2)[0], rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------- what is not


def test_negative_eigenvalues_change_sign_and_none_is_below_the_floor() -> None:
    result, report = SoftAbs(floor=0.1)(with_eigenvalues(-3.0, 0.0, 2.0))
    torch.testing.assert_close(torch.linalg.eigvalsh(result), torch.tensor([0.1, 2.0, 3.0]))
    assert report.smallest_before == pytest.approx(-3.0)
    assert report.smallest_after == pytest.approx(0.1)
    assert report.relative_change == pytest.approx(math.hypot(6.0, 0.1) / math.sqrt(0.01 + 4 + 9))


def test_the_floor_is_a_share_of_the_scale() -> None:
    result, report = SoftAbs(floor=0.1)(torch.zeros(3, 3), SCALE)
    torch.testing.assert_close(result, torch.diag(0.1 * SCALE))
    assert (report.smallest_before, report.smallest_after) == (0.0, pytest.approx(0.1))


def test_batch_report() -> None:
    batch = torch.stack(
        [torch.stack([value * torch.eye(2) for value in row]) for row in [[1.0, 2.0], [3.0, -0.4], [0.0, 5.0]]]
    )
    result, report = SoftAbs()(batch)
    assert result.shape == batch.shape
    assert (report.num_repaired, report.num_matrices, report.worst) == (2, 6, (1, 1))
    assert report.relative_change == pytest.approx(2.0)


@pytest.mark.parametrize(("ratio", "count"), [(3.7, 1), (3.9, 0)])
def test_what_counts_as_repaired(ratio: float, count: int) -> None:
    """An eigenvalue moves by a share 1 - tanh(ratio) of the floor, which is 0.1 % at 3.8."""
    assert SoftAbs(floor=0.1)(torch.diag(torch.tensor([ratio * 0.1, 9.0])))[1].num_repaired == count


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (
            RepairReport(-1.0, 1.0, 0.63246, 1, 1),
            "repaired 1 of 1 matrix; smallest eigenvalue -1 -> 1; largest relative change 0.6325",
        ),
        (
            RepairReport(1e-5, 0.01, 0.5, 0, 12, (3, 1)),
            "repaired 0 of 12 matrices; smallest eigenvalue 1e-05 -> 0.01; largest relative change 0.5 (at [3, 1])",
        ),
    ],
)
def test_report_text(report: RepairReport, text: str) -> None:
    assert str(report) == text


@pytest.mark.parametrize(("shape", "matrices"), [((0, 2, 2), 0), ((3, 0, 0), 3), ((0, 0), 1), ((2, 0, 3, 3), 0)])
def test_empty(shape: tuple[int, ...], matrices: int) -> None:
    for strategy in REPAIRS:
        for scale in (None, torch.ones(shape[-1]), torch.ones(shape[:-1])):
            result, report = strategy(torch.zeros(shape), scale)
            assert result.shape == shape
            assert report == RepairReport(math.inf, math.inf, 0.0, 0, matrices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30, None])
def test_the_default_refuses_no_finite_matrix(dtype: torch.dtype, size: float | None) -> None:
    size = torch.finfo(dtype).max * 1e-4 if size is None else size
    for matrix in (-torch.eye(1), -torch.eye(3), MATRICES["negative"], MATRICES["indefinite 2x2"], -torch.ones(4, 4)):
        result, report = SoftAbs()((matrix / matrix.abs().max()).to(dtype) * size)
        assert torch.isfinite(result).all()
        assert 0 <= report.relative_change <= 2 + 1e-4
    assert SoftAbs()(torch.tensor([[-0.3]], dtype=dtype))[1].relative_change == pytest.approx(2)


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (torch.ones(2, 3), ValueError, "expected square matrices of shape (*, n, n), got (2, 3)"),
        (torch.tensor([[1.0, math.nan], [0.0, 1.0]]), NotPositiveDefiniteError, "the matrix is nan at index [0, 1]"),
        (torch.full((2, 1, 1), -math.inf), NotPositiveDefiniteError, "the matrix is -inf at index [0, 0, 0]"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), ValueError, "the matrix is not symmetric: it differs"),
    ],
)
def test_what_is_no_symmetric_matrix(matrix: Tensor, error: type[Exception], message: str) -> None:
    for strategy in REPAIRS:
        with pytest.raises(error, match=re.escape(message)):
            strategy(matrix)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (
            -torch.eye(2),
            "matrix is too far from positive definite: repaired 1 of 1 matrix; smallest eigenvalue -1 -> 1; largest "
            "relative change 2, bound 1.9. Has the information the wrong sign",
        ),
        (
            torch.stack([torch.eye(2), -torch.eye(2)]).reshape(2, 1, 2, 2),
            "matrix [1, 0] is too far from positive definite: repaired 1 of 2 matrices",
        ),
    ],
)
def test_what_is_past_a_bound(matrix: Tensor, message: str) -> None:
    with pytest.raises(NotPositiveDefiniteError, match=re.escape(message)) as caught:
        SoftAbs(max_relative_change=1.9)(matrix)
    assert str(caught.value).endswith("To allow it all the same:\n    SoftAbs(max_relative_change=2)")
    SoftAbs(max_relative_change=2)(matrix)


def test_bound() -> None:
    matrix = with_eigenvalues(-1.0, 1.0)  # relative change 2 / sqrt 2
    assert SoftAbs(max_relative_change=1.415)(matrix)[1].relative_change == pytest.approx(math.sqrt(2))
    with pytest.raises(NotPositiveDefiniteError, match=r"bound 1\.414"):
        SoftAbs(max_relative_change=1.414)(matrix)


@pytest.mark.parametrize("floor", [0.0, -1.0, math.nan, math.inf])
def test_floor_must_be_positive(floor: float) -> None:
    with pytest.raises(
        ValueError, match=rf"floor must be a positive share of the scale, got {floor}; the default is 1e-3"
    ):
        SoftAbs(floor)


@pytest.mark.parametrize("bound", [-0.1, math.nan])
def test_bound_must_not_be_negative(bound: float) -> None:
    with pytest.raises(ValueError, match=rf"max_relative_change must not be negative, got {bound}"):
        SoftAbs(max_relative_change=bound)


@pytest.mark.parametrize(
    ("matrix", "scale", "message"),
    [
        (torch.diag(torch.tensor([1.0, -3.0])), None, "matrix is not positive definite: its smallest eigenvalue is -3"),
        (torch.zeros(1, 1), None, "its smallest eigenvalue is 0 (1 of 1 are not)"),
        (MIXED, None, "matrix [0] is not positive definite: its smallest eigenvalue is -0.4 ("),
        (
            torch.tensor([2.0, -1.0, 1.0, -2.0]).reshape(2, 2, 1, 1),
            torch.tensor([1.0, 0.1, 1.0, 1.0]).reshape(2, 2, 1),
            "matrix [0, 1] is not positive definite: its smallest eigenvalue is -10 (2 of 4 are not)",
        ),
    ],
)
def test_no_repair(matrix: Tensor, scale: Tensor | None, message: str) -> None:
    with pytest.raises(NotPositiveDefiniteError, match=re.escape(message)) as caught:
        NoRepair()(matrix, scale)
    assert str(caught.value).endswith("To repair such matrices, smoothly:\n    SoftAbs()")
    SoftAbs()(matrix, scale)


def test_they_are_repairs_without_parameters() -> None:
    for strategy in REPAIRS:
        assert isinstance(strategy, Repair)
        assert strategy.prepare(3, torch.zeros(())) is strategy
    assert not isinstance(nn.Identity(), Repair)
    assert SoftAbs() == SoftAbs(1e-3, 2.0)
