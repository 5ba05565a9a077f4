"""SoftAbs: the scalar function against mpmath, the matrix function against finite differences, and its report."""

import functools
import itertools
import math
import random
import re
from collections.abc import Callable

import mpmath
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from laplace_amort import NotPositiveDefiniteError, RepairReport, SoftAbs
from laplace_amort.softabs import _first_difference, _g, _second_difference, softabs, softabs_matrix

DIGITS = 150


@functools.cache
def exact(u: float, order: int) -> mpmath.mpf:
    """u coth u and its first two derivatives."""
    u = mpmath.mpf(u)
    if abs(u) < 1e-40:
        return (mpmath.mpf(1), 2 * u / 3, mpmath.mpf(2) / 3)[order]
    coth, sinh2 = mpmath.coth(u), mpmath.sinh(u) ** 2
    return (u * coth, coth - u / sinh2, 2 * (u * coth - 1) / sinh2)[order]


def exact_difference(*points: float) -> mpmath.mpf:
    """Divided difference, by its definition."""
    points = tuple(sorted(points))
    low, high, order = points[0], points[-1], len(points) - 1
    if low == high:
        return exact(low, order) / math.factorial(order)
    return (exact_difference(*points[1:]) - exact_difference(*points[:-1])) / (mpmath.mpf(high) - mpmath.mpf(low))


def largest_error(actual: Tensor, expected: list[mpmath.mpf]) -> float:
    """Relative where the exact value is above 1, else absolute."""
    pairs = zip(actual.tolist(), expected, strict=True)
    return max(float(abs(a - e) / max(1, abs(e))) for a, e in pairs)


def scalars() -> list[float]:
    generator = random.Random(0)
    near_zero = [0.0, 1e-300, 1e-100, 1e-16, 1e-8, 1e-4, 0.01]
    switch = [math.nextafter(0.5, 0), 0.5, math.nextafter(0.5, 1), 0.49, 0.4999999, 0.5000001, 0.51]
    large = [20.0, 100.0, 354.0, 356.0, 709.0, 711.0, 1e6, 1e100, 1e300]
    scattered = [10 ** generator.uniform(-12, 3) for _ in range(400)]
    return [sign * point for sign in (1, -1) for point in near_zero + switch + large + scattered]


@pytest.mark.parametrize("order", [0, 1, 2])
def test_scalar_function(order: int) -> None:
    with mpmath.workdps(DIGITS):
        points = scalars()
        assert largest_error(_g(torch.tensor(points), order), [exact(p, order) for p in points]) < 1e-15


def pairs() -> list[tuple[float, float]]:
    """Pairs at every distance: equal, nearly so, around the switch at 0.5, far; also of opposite signs."""
    starts = [0.0, 1e-9, 0.25, 0.4999, 0.5, 0.5001, 1.0, 3.0, 30.0, 400.0, 1e4]
    gaps = [0.0, 1e-12, 1e-7, 1e-3, 0.1, 0.2499, 0.25, 0.4999, 0.5, 0.5001, 0.9, 5.0, 100.0]
    return [(sign * start, sign * start + gap) for start in starts for gap in gaps for sign in (1, -1)]


def test_first_divided_difference() -> None:
    with mpmath.workdps(DIGITS):
        points = pairs()
        actual = _first_difference(*torch.tensor(points).unbind(-1))
        assert largest_error(actual, [exact_difference(*p) for p in points]) < 1e-14


def test_second_divided_difference() -> None:
    with mpmath.workdps(DIGITS):
        points = [(a, b, c) for a, b in pairs() for c in (a, b, (a + b) / 2, a - 0.1, b + 0.3, b + 0.6, -a, 7.0)]
        expected = [exact_difference(*p) for p in points]
        for order in itertools.permutations(range(3)):
            actual = _second_difference(*torch.tensor(points)[:, list(order)].unbind(-1))
            assert largest_error(actual, expected) < 1e-14


@pytest.mark.parametrize("floor", [1e-3, 0.5, 20.0])
def test_softabs(floor: float) -> None:
    values = torch.tensor([-7.0, -0.1, 0.0, 0.03, 5.0])
    with mpmath.workdps(DIGITS):
        expected = [floor * exact(v / floor, 0) for v in values.tolist()]
        assert largest_error(softabs(values, floor), expected) < 1e-15
    assert softabs(values, floor).min() >= floor


def with_eigenvalues(*eigenvalues: float, batch: tuple[int, ...] = (), seed: int = 0) -> Tensor:
    n = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(*batch, n, n, generator=generator, dtype=torch.float64))
    matrix = (q * torch.tensor(eigenvalues, dtype=torch.float64)) @ q.mT
    return (matrix + matrix.mT) / 2


MATRICES = {
    "distinct": with_eigenvalues(0.3, 1.0, 2.5),
    "repeated": with_eigenvalues(0.7, 0.7, 2.0),
    "multiple of the identity": 0.8 * torch.eye(3, dtype=torch.float64),
    "zero": torch.zeros(3, 3, dtype=torch.float64),
    "nearly repeated": with_eigenvalues(0.7, 0.7 + 1e-9, 0.7 + 1e-5),
    "zero eigenvalues": with_eigenvalues(0.0, 0.0, 1.5),
    "indefinite": with_eigenvalues(-1.2, 0.4, 0.4),
    "negative": with_eigenvalues(-1.0, -1.0, -0.2),
    "opposite": with_eigenvalues(-1.0, 1.0, 1.0),
    "spread": with_eigenvalues(-0.01, 0.3, 40.0, 40.0),
    "1x1": torch.tensor([[-0.4]], dtype=torch.float64),
    "batch": with_eigenvalues(-0.5, 0.5, 0.5, batch=(2,)),
    "nested batch": with_eigenvalues(0.1, 0.1, batch=(1, 2)),
}


def repaired(matrix: Tensor, floor: float = 0.5) -> Tensor:
    return SoftAbs(floor, max_relative_change=2.0)((matrix + matrix.mT) / 2)[0]


def by_eigh(matrix: Tensor, floor: float = 0.5) -> Tensor:
    """Planted: the same values, with the derivatives of ``torch.linalg.eigh``."""
    eigenvalues, q = torch.linalg.eigh((matrix + matrix.mT) / 2)
    u = eigenvalues / floor
    return (q * (floor * u / torch.tanh(u)).unsqueeze(-2)) @ q.mT


def check_derivatives(repair: Callable[[Tensor], Tensor], matrix: Tensor) -> None:
    matrix = matrix.clone().requires_grad_()
    gradcheck(repair, matrix, check_batched_grad=True)
    gradgradcheck(repair, matrix, check_batched_grad=True)


@pytest.mark.parametrize("name", MATRICES)
def test_derivatives(name: str) -> None:
    check_derivatives(repaired, MATRICES[name])


@pytest.mark.parametrize("name", ["repeated", "multiple of the identity", "indefinite", "negative", "batch"])
def test_planted_eigh_fails_at_repeated_eigenvalues(name: str) -> None:
    torch.testing.assert_close(by_eigh(MATRICES[name]), repaired(MATRICES[name]))
    with pytest.raises((RuntimeError, AssertionError)):  # GradcheckError, or eigh's own complaint
        check_derivatives(by_eigh, MATRICES[name])


def test_planted_eigh_gives_nan() -> None:
    matrix = MATRICES["multiple of the identity"].clone().requires_grad_()
    weights = torch.arange(9.0).reshape(3, 3)
    for repair, finite in ((repaired, True), (by_eigh, False)):
        (gradient,) = torch.autograd.grad((weights * repair(matrix)).sum(), matrix)
        assert bool(torch.isfinite(gradient).all()) is finite


def test_planted_eigh_agrees_at_distinct_eigenvalues() -> None:
    """So it fails for the coincidence and nothing else; and it is a second route to both derivatives."""
    check_derivatives(by_eigh, MATRICES["distinct"])
    matrix = MATRICES["distinct"].clone().requires_grad_()
    hessians = [torch.autograd.functional.hessian(lambda m, f=f: f(m).sin().sum(), matrix) for f in (repaired, by_eigh)]
    torch.testing.assert_close(*hessians)


@pytest.mark.parametrize("name", ["repeated", "spread"])
def test_torch_func(name: str) -> None:
    eigenvalues, eigenvectors = torch.linalg.eigh(MATRICES[name])

    def function(matrix: Tensor) -> Tensor:
        return softabs_matrix((matrix + matrix.mT) / 2, eigenvalues, eigenvectors, 0.5).sin().sum()

    actual = torch.func.jacrev(torch.func.jacrev(function))(MATRICES[name])
    expected = torch.autograd.functional.hessian(lambda m: repaired(m).sin().sum(), MATRICES[name])
    torch.testing.assert_close(actual, expected)


def test_third_derivative_is_refused() -> None:
    point = MATRICES["repeated"].clone().requires_grad_()
    (first,) = torch.autograd.grad(repaired(point).sin().sum(), point, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), point, create_graph=True)
    with pytest.raises(RuntimeError, match="SoftAbs is differentiable twice; its third derivative is not implemented"):
        torch.autograd.grad(second.sum(), point)


def test_float32() -> None:
    for matrix in MATRICES.values():
        single, double = matrix.float().requires_grad_(), matrix.clone().requires_grad_()
        results = [repaired(m) for m in (single, double)]
        assert results[0].dtype == torch.float32
        torch.testing.assert_close(results[0], results[1].float(), rtol=1e-5, atol=1e-5)
        gradients = [torch.autograd.grad(r.sin().sum(), m)[0] for r, m in zip(results, (single, double), strict=True)]
        torch.testing.assert_close(gradients[0], gradients[1].float(), rtol=1e-4, atol=1e-4)


def test_well_conditioned_matrix_is_left_alone() -> None:
    matrix = with_eigenvalues(1.0, 3.0, 50.0)
    result, report = SoftAbs()(matrix)
    torch.testing.assert_close(result, matrix, rtol=1e-14, atol=1e-13)
    assert (report.num_repaired, report.num_matrices, report.worst) == (0, 1, ())
    assert report.relative_change < 1e-15


@pytest.mark.parametrize("ratio", [2.0, 10.0, 15.0, 19.99, 20.01, 25.0, 60.0])
def test_no_step_where_the_repair_stops_acting(ratio: float) -> None:
    """Value and derivatives are exact to rounding error at every distance from the floor."""
    floor = 0.25
    matrix = torch.full((1, 1), ratio * floor, requires_grad=True)
    result = SoftAbs(floor)(matrix)[0]
    (first,) = torch.autograd.grad(result, matrix, create_graph=True)
    (second,) = torch.autograd.grad(first, matrix, materialize_grads=True) if first.requires_grad else (0 * first,)
    with mpmath.workdps(DIGITS):
        expected = [floor * exact(ratio, 0), exact(ratio, 1), exact(ratio, 2) / floor]
    assert largest_error(torch.cat([result, first, second]).squeeze(-1), expected) < 1e-14


def test_negative_eigenvalues_change_sign_and_none_is_below_the_floor() -> None:
    result, report = SoftAbs(floor=0.1)(with_eigenvalues(-3.0, 0.0, 2.0))
    torch.testing.assert_close(torch.linalg.eigvalsh(result), torch.tensor([0.1, 2.0, 3.0]))
    assert report.smallest_before == pytest.approx(-3.0)
    assert report.smallest_after == pytest.approx(0.1)
    assert report.relative_change == pytest.approx(math.hypot(6.0, 0.1) / math.sqrt(0.01 + 4 + 9))


def test_batch_report() -> None:
    batch = torch.stack(
        [torch.stack([value * torch.eye(2) for value in row]) for row in [[1.0, 2.0], [3.0, -0.4], [0.0, 5.0]]]
    )
    result, report = SoftAbs(max_relative_change=2.0)(batch)
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
    result, report = SoftAbs()(torch.zeros(shape))
    assert result.shape == shape
    assert report == RepairReport(math.inf, math.inf, 0.0, 0, matrices)


def test_small_asymmetry_is_averaged() -> None:
    matrix = torch.tensor([[1.0, 0.5 + 1e-9], [0.5, 2.0]])
    torch.testing.assert_close(SoftAbs()(matrix)[0], SoftAbs()((matrix + matrix.mT) / 2)[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (torch.ones(2, 3), ValueError, "expected square matrices of shape (*, n, n), got (2, 3)"),
        (torch.ones(3), ValueError, "expected square matrices of shape (*, n, n), got (3,)"),
        (torch.tensor([[1.0, math.nan], [0.0, 1.0]]), NotPositiveDefiniteError, "the matrix is nan at index [0, 1]"),
        (torch.full((2, 1, 1), -math.inf), NotPositiveDefiniteError, "the matrix is -inf at index [0, 0, 0]"),
        (
            torch.tensor([[1.0, 0.5], [0.0, 1.0]]),
            ValueError,
            "the matrix is not symmetric: it differs from its transpose by 0.5; a precision matrix is symmetric",
        ),
        (
            -torch.eye(2),
            NotPositiveDefiniteError,
            "matrix is too far from positive definite: repaired 1 of 1 matrix; smallest eigenvalue -1 -> 1; largest "
            "relative change 2, bound 1.9. Has the information the wrong sign",
        ),
        (
            torch.stack([torch.eye(2), -torch.eye(2)]).reshape(2, 1, 2, 2),
            NotPositiveDefiniteError,
            "matrix [1, 0] is too far from positive definite: repaired 1 of 2 matrices",
        ),
    ],
)
def test_what_is_refused(matrix: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        SoftAbs()(matrix)


def test_the_cure_in_the_message_works() -> None:
    with pytest.raises(
        NotPositiveDefiniteError, match=r"To allow it all the same:\n    SoftAbs\(max_relative_change=2\)$"
    ):
        SoftAbs()(-torch.eye(2))
    torch.testing.assert_close(SoftAbs(max_relative_change=2)(-torch.eye(2))[0], torch.eye(2))


def test_bound() -> None:
    matrix = with_eigenvalues(-1.0, 1.0)  # relative change 2 / sqrt 2
    assert SoftAbs(max_relative_change=1.415)(matrix)[1].relative_change == pytest.approx(math.sqrt(2))
    with pytest.raises(NotPositiveDefiniteError, match=r"bound 1\.414"):
        SoftAbs(max_relative_change=1.414)(matrix)


@pytest.mark.parametrize("floor", [0.0, -1.0, math.nan, math.inf])
def test_floor_must_be_positive(floor: float) -> None:
    with pytest.raises(ValueError, match=rf"floor must be a positive precision, got {floor}; the default is 1e-2"):
        SoftAbs(floor)


@pytest.mark.parametrize("bound", [-0.1, math.nan])
def test_bound_must_not_be_negative(bound: float) -> None:
    with pytest.raises(ValueError, match=rf"max_relative_change must not be negative, got {bound}"):
        SoftAbs(max_relative_change=bound)
