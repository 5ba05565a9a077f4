"""Small blocks against torch.linalg, against exact arithmetic, and on blocks that cannot be factored."""

import itertools
import warnings

import mpmath
import pytest
import torch
from helpers.arrowheads import derivatives, relative_error
from helpers.oracles import Figures
from helpers.strategies import seeds, standard_normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from laplace_amort.linalg import blocks

figures = Figures()

SIZES = [1, 2, 3, 4]  # the last is not unrolled


def positive_definite(size: int, batch: tuple[int, ...], log_condition: float, seed: int) -> Tensor:
    """Of any scale, with eigenvalues over so many powers of ten."""
    vectors, _ = torch.linalg.qr(standard_normal(*batch, size, size, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    values = 10 ** (log_condition * torch.rand(*batch, 1, size, generator=generator))
    scale = 10 ** (4 * torch.rand(*batch, 1, 1, generator=generator) - 2)
    matrix = scale * (vectors * values) @ vectors.mT
    return (matrix + matrix.mT) / 2


def factor_of(matrix: Tensor) -> Tensor:
    return torch.linalg.cholesky((matrix + matrix.mT) / 2)


def symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


# Each function of a symmetric matrix, (*, k, m) and (*, k): ours, and the twin.
FUNCTIONS = {
    "cholesky": (lambda u, b, v: blocks.cholesky(u)[0], lambda u, b, v: factor_of(u)),
    "scale_tril": (
        lambda u, b, v: blocks.scale_tril(u)[0],
        lambda u, b, v: torch.linalg.cholesky(symmetric(torch.linalg.inv(u))),
    ),
    "covariance_tril": (
        lambda u, b, v: blocks.covariance_tril(blocks.cholesky(u)[0]),
        lambda u, b, v: torch.linalg.cholesky(symmetric(torch.linalg.inv(u))),
    ),
    "cholesky_solve": (
        lambda u, b, v: blocks.cholesky_solve(b, blocks.cholesky(u)[0]),
        lambda u, b, v: torch.linalg.solve(u, b),
    ),
    "log_det": (lambda u, b, v: blocks.log_det(blocks.cholesky(u)[0]), lambda u, b, v: torch.logdet(u)),
    "matvec": (lambda u, b, v: blocks.matvec(u, v), lambda u, b, v: (u @ v.unsqueeze(-1)).squeeze(-1)),
    "multiply": (lambda u, b, v: blocks.multiply(u, b), lambda u, b, v: u @ b),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=settings.default.max_examples * 3 // 5)
@given(
    size=st.integers(1, 6),
    batch=st.sampled_from([(4,), (), (1,), (0,), (2, 3)]),
    columns=st.integers(0, 3),
    log_condition=st.floats(0, 4),
    seed=seeds,
)
def test_equals_linalg(
    name: str, size: int, batch: tuple[int, ...], columns: int, log_condition: float, seed: int
) -> None:
    matrix = positive_definite(size, batch, log_condition, seed)
    rest = standard_normal(*batch, size, columns, seed=seed + 1), standard_normal(*batch, size, seed=seed + 2)
    pair = [derivatives(lambda u, b, v, f=f: f(symmetric(u), b, v), [matrix, *rest]) for f in FUNCTIONS[name]]
    for order, actual, expected in zip(["value", "gradient", "second derivative"], *pair, strict=True):
        assert figures.add(f"{name}, {order}", relative_error(actual, expected)) < 1e-10


@given(
    size=st.integers(1, 5), samples=st.sampled_from([(), (3,), (2, 1), (0,)]), batch=st.sampled_from([(), (2,), (3, 2)])
)
def test_matvec_of_samples(size: int, samples: tuple[int, ...], batch: tuple[int, ...]) -> None:
    for rows in (size, size + 1):
        matrix, vector = standard_normal(*batch, rows, size, seed=1), standard_normal(*samples, *batch, size, seed=2)
        assert relative_error(blocks.matvec(matrix, vector), (matrix @ vector.unsqueeze(-1)).squeeze(-1)) < 1e-14


@given(size=st.integers(1, 4), order=st.permutations(range(3)), seed=seeds)
def test_layout_in_memory_does_not_matter(size: int, order: list[int], seed: int) -> None:
    matrix, right = positive_definite(size, (5,), 1.0, seed), standard_normal(5, size, 2, seed=seed)
    back = torch.tensor(order).argsort().tolist()
    inputs = matrix, right, right[..., 0]
    moved = *(value.permute(order).contiguous().permute(back) for value in inputs[:2]), right[..., 0]
    for name, (ours, _) in FUNCTIONS.items():
        assert relative_error(ours(*moved), ours(*inputs)) < 1e-14, name


# ----------------------------------------------------------------------------------------------------------- precision


def exact_scale(matrix: Tensor) -> list[list[mpmath.mpf]]:
    """Lower triangular, in exact arithmetic on the elements as they are."""
    size = len(matrix)
    u = mpmath.matrix([[mpmath.mpf(float(matrix[i, j])) for j in range(size)] for i in range(size)])
    scale = mpmath.cholesky(u**-1)
    return [[scale[i, j] for j in range(size)] for i in range(size)]


def largest_error(actual: Tensor, expected: list[list[mpmath.mpf]]) -> float:
    """Over the largest element."""
    pairs = [
        (a, e) for row, exact in zip(actual.tolist(), expected, strict=True) for a, e in zip(row, exact, strict=True)
    ]
    return float(max(abs(a - e) for a, e in pairs) / max(abs(e) for _, e in pairs))


@given(size=st.integers(1, 4), log_condition=st.floats(0, 14), seed=seeds)
def test_error_is_that_of_the_condition_number(size: int, log_condition: float, seed: int) -> None:
    matrix = positive_definite(size, (), log_condition, seed)
    eps = torch.finfo(matrix.dtype).eps
    with mpmath.workdps(60):
        expected = exact_scale(matrix)
        scale, failed = blocks.scale_tril(matrix)
        assert not failed
        assert largest_error(scale, expected) < 10 * eps * float(torch.linalg.cond(matrix))
        from_factor = blocks.covariance_tril(blocks.cholesky(matrix)[0])
        assert largest_error(from_factor, expected) < 40 * eps * float(torch.linalg.cond(matrix))
    factor = blocks.cholesky(matrix)[0]
    assert relative_error(factor @ factor.mT, matrix) < 10 * eps


@given(size=st.integers(1, 3), powers=st.lists(st.integers(-100, 100), min_size=3, max_size=3), seed=seeds)
def test_units_of_the_coordinates_do_not_matter(size: int, powers: list[int], seed: int) -> None:
    """Scaled by powers of two, however far apart, the results are the same to the last bit."""
    unit = 2.0 ** torch.tensor(powers[:size])
    matrix = positive_definite(size, (7,), 1.0, seed)
    scaled = matrix * unit * unit[:, None]
    assert torch.equal(blocks.scale_tril(scaled)[0] * unit[:, None], blocks.scale_tril(matrix)[0])
    assert torch.equal(blocks.cholesky(scaled)[0] / unit[:, None], blocks.cholesky(matrix)[0])


@pytest.mark.parametrize("size", SIZES)
def test_single_precision(size: int) -> None:
    matrix = positive_definite(size, (6,), 1.0, 3)
    inputs = matrix, standard_normal(6, size, 2, seed=4), standard_normal(6, size, seed=5)
    for name, (ours, twin) in FUNCTIONS.items():
        actual = ours(*(value.float() for value in inputs))
        assert actual.dtype == torch.float32
        assert relative_error(actual.double(), twin(*inputs)) < 2e-5, name


# -------------------------------------------------------------------------------------------------------------- failing


def indefinite(size: int) -> Tensor:
    """Symmetric matrices whose failure shows at each pivot, by each kind of bad value, as many as there are."""
    bad = []
    for place, value in itertools.product(range(size), [0.0, -1.0, torch.nan, torch.inf, -torch.inf]):
        for coupling in (0.0, 0.25):
            matrix = torch.eye(size) + coupling * (1 - torch.eye(size))
            matrix[place, place] = value
            bad.append(matrix)
    for i, j in itertools.combinations(range(size), 2):  # a couple that cannot be, or is not there
        for value in (2.0, -2.0, torch.nan, torch.inf, -torch.inf):
            matrix = torch.eye(size)
            matrix[i, j] = matrix[j, i] = value
            bad.append(matrix)
    return torch.stack(bad)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("factorize", [blocks.cholesky, blocks.scale_tril])
def test_failures_are_seen_one_by_one_and_nothing_raises(factorize, size: int) -> None:
    bad, good = indefinite(size), positive_definite(size, (len(indefinite(size)),), 2.0, 0)
    mixed = torch.stack([bad, good], dim=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        factor, failed = factorize(mixed)
    assert failed[:, 0].all()
    assert not failed[:, 1].any()
    assert relative_error(factor[:, 1], factorize(good)[0]) < 1e-14  # elsewhere in a batch, the last bits may differ
    assert failed.dtype == torch.bool
    assert not failed.requires_grad


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("factorize", [blocks.cholesky, blocks.scale_tril])
def test_failures_leave_the_gradients_of_others_alone(factorize, size: int) -> None:
    good = positive_definite(size, (), 1.0, 0)
    mixed = torch.stack([good, -good]).requires_grad_()
    (gradient,) = torch.autograd.grad(factorize(mixed)[0][0].sum(), mixed)
    (alone,) = torch.autograd.grad(factorize(mixed[:1])[0].sum(), mixed)
    assert relative_error(gradient[0], alone[0]) < 1e-14  # likewise


# --------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_finite_differences(name: str, size: int) -> None:
    """Also batched, and forward."""
    ours, _ = FUNCTIONS[name]
    inputs = [
        positive_definite(size, (2,), 0.5, 1) / 10,
        standard_normal(2, size, 2, seed=2),
        standard_normal(2, size, seed=3),
    ]
    inputs = [value.requires_grad_() for value in inputs]
    checks = {"check_batched_grad": True, "fast_mode": True}
    assert gradcheck(lambda u, b, v: ours(symmetric(u), b, v), inputs, check_forward_ad=True, **checks)
    assert gradgradcheck(lambda u, b, v: ours(symmetric(u), b, v), inputs, **checks)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_batched_reverse_passes_equal_single_ones(name: str, size: int) -> None:
    ours, _ = FUNCTIONS[name]
    matrix = positive_definite(size, (3,), 0.5, 1).requires_grad_()
    output = ours(matrix, standard_normal(3, size, 2, seed=2), standard_normal(3, size, seed=3))
    seeds_ = standard_normal(4, *output.shape, seed=4)

    def pull(gradient: Tensor, batched: bool = False) -> Tensor:
        return torch.autograd.grad(output, matrix, gradient, create_graph=True, is_grads_batched=batched)[0]

    assert relative_error(pull(seeds_, batched=True), torch.stack([pull(seed) for seed in seeds_])) < 1e-14


def test_comparison_finds_planted_bugs() -> None:
    """A wrong triangle, a factor without its gradient, and a determinant without its square."""
    planted = {
        "scale_tril": lambda u, b, v: blocks.cholesky(u)[0].inverse().mT,
        "cholesky": lambda u, b, v: blocks.cholesky(u.detach())[0] + 0 * u,
        "log_det": lambda u, b, v: blocks.log_det(blocks.cholesky(u)[0]) / 2,
    }
    inputs = [positive_definite(2, (3,), 0.5, 1), standard_normal(3, 2, 1, seed=2), standard_normal(3, 2, seed=3)]
    for name, wrong in planted.items():
        actual, expected = derivatives(wrong, inputs), derivatives(FUNCTIONS[name][1], inputs)
        assert max(relative_error(a, e) for a, e in zip(actual, expected, strict=True)) > 1e-2, name
