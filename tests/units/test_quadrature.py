"""Rules of integration: exact where they should be, densities, convergence, and what makes numbers of their values."""

import itertools
import math

import numpy
import pytest
import scipy.stats
import torch
from helpers.strategies import seeds, standard_normal
from hypothesis import given
from hypothesis import strategies as st

from laplace_amort.units.quadrature import (
    GaussHermite,
    Laplace,
    QuadraturePoints,
    QuadratureRule,
    StudentPoints,
    sobol_points,
    student_log_density,
    student_points,
)

LIKE = torch.zeros((), dtype=torch.float64)
RULES = {
    "laplace": Laplace(),
    "gauss_hermite": GaussHermite(3),
    "gauss_hermite, one": GaussHermite(1),
    "student": StudentPoints(10),
    "student, heavy": StudentPoints(8, df=1.5, seed=3),
    "student, one": StudentPoints(1),
}


def moment(exponents):
    """Of a standard normal variable."""
    return math.prod(0 if a % 2 else math.prod(range(1, a, 2)) for a in exponents)


def mean_of_monomial(points, exponents):
    powers = points.points ** torch.tensor(exponents)
    return float((points.log_probs.exp() * powers.prod(-1)).sum())


# ------------------------------------------------------------------------------------------------------------ all rules


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("local_dim", [1, 2, 3, 5])
def test_shapes_and_probabilities(name, local_dim):
    found = RULES[name].points(local_dim, LIKE)
    assert isinstance(RULES[name], QuadratureRule)
    assert found.points.shape[1:] == (local_dim,)
    assert found.log_probs.shape == found.log_density.shape == found.points.shape[:1]
    assert all(part.isfinite().all() for part in found)
    assert abs(float(found.log_probs.exp().sum()) - 1) < 1e-14


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_that_of_the_other_tensor(name, dtype):
    found, exact = (RULES[name].points(2, LIKE.to(kind)) for kind in (dtype, torch.float64))
    assert {part.dtype for part in found} == {dtype}
    for part, other in zip(found, exact, strict=True):
        torch.testing.assert_close(part.double(), other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("local_dim", [1, 2])
def test_points_are_always_the_same(name, local_dim):
    """Whatever was drawn before; and nothing that is drawn afterwards changes."""
    torch.manual_seed(1)
    first, drawn = RULES[name].points(local_dim, LIKE), torch.rand(3)
    torch.manual_seed(1)
    expected = torch.rand(3)
    second = RULES[name].points(local_dim, LIKE)
    assert torch.equal(drawn, expected)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


# -------------------------------------------------------------------------------------------------- Gauss and Hermite


@pytest.mark.parametrize("num_points", [1, 2, 3, 5])
@pytest.mark.parametrize("local_dim", [1, 2, 3])
def test_moments_of_a_normal_are_exact(num_points, local_dim):
    """Up to degree 2 n - 1 in each coordinate, and not beyond."""
    points = GaussHermite(num_points).points(local_dim, LIKE)
    assert len(points.points) == num_points**local_dim
    for exponents in itertools.product(range(2 * num_points), repeat=local_dim):
        size = moment([a + a % 2 for a in exponents])
        assert abs(mean_of_monomial(points, exponents) - moment(exponents)) < 1e-12 * size
    beyond = [2 * num_points] + [0] * (local_dim - 1)
    # What is missing is n!, the square of the norm of Hermite's polynomial.
    missing = moment(beyond) - mean_of_monomial(points, beyond)
    assert missing == pytest.approx(math.factorial(num_points), rel=1e-10)


@pytest.mark.parametrize("local_dim", [1, 2, 3])
def test_a_normal_density_times_a_polynomial_is_integrated_exactly(local_dim):
    """Of degree 4 in each coordinate."""
    points = GaussHermite(3).points(local_dim, LIKE)
    y = points.points
    values = (1 + y**2 + y**4).log().sum(-1) - (y**2).sum(-1) / 2
    expected = local_dim * math.log((1 + 1 + 3) * math.sqrt(2 * math.pi))
    assert points.log_integral(values.unsqueeze(-1)) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("local_dim", [1, 2, 3, 6])
def test_one_point_is_laplace(local_dim):
    for one, other in zip(GaussHermite(1).points(local_dim, LIKE), Laplace().points(local_dim, LIKE), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-15, atol=0)


@pytest.mark.parametrize("local_dim", [1, 2, 3])
@pytest.mark.parametrize("rule", [GaussHermite(4), Laplace()])
def test_density_of_a_normal(rule, local_dim):
    points = rule.points(local_dim, LIKE)
    expected = scipy.stats.multivariate_normal(numpy.zeros(local_dim)).logpdf(points.points.numpy())
    torch.testing.assert_close(points.log_density, torch.as_tensor(expected).reshape(-1), rtol=1e-13, atol=1e-13)


# ------------------------------------------------------------------------------------------------------------ Student's


@pytest.mark.parametrize("df", [0.7, 3.0, 30.0])
@pytest.mark.parametrize("local_dim", [1, 2, 4])
def test_density_of_a_t(df, local_dim):
    """In several dimensions that of the points differs a little, so that a normal comes out exactly."""
    points = StudentPoints(64, df=df).points(local_dim, LIKE)
    density = torch.as_tensor(student_log_density(points.points.numpy(), df))
    expected = scipy.stats.multivariate_t(numpy.zeros(local_dim), df=df).logpdf(points.points.numpy())
    torch.testing.assert_close(density, torch.as_tensor(expected), rtol=1e-12, atol=1e-12)
    assert (points.log_density - density).abs().max() <= (math.log(3) if local_dim > 1 else 0)
    if local_dim == 1:
        by_torch = torch.distributions.StudentT(LIKE + df).log_prob(points.points.squeeze(-1))
        torch.testing.assert_close(points.log_density, by_torch, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("df", [0.7, 3.0, 30.0])
def test_points_are_distributed_as_the_t(df):
    """Every coordinate, and the distance from the center, by their distribution functions."""
    k, num_points = 3, 2**12
    points = student_points(sobol_points(num_points, k + 1, seed=1), df)
    even = (numpy.arange(num_points) + 0.5) / num_points
    for coordinate in points.T:
        uniform = numpy.sort(scipy.stats.t(df).cdf(coordinate))
        assert numpy.abs(uniform - even).max() < 0.005
    distance = numpy.sort(scipy.stats.f(k, df).cdf((points**2).sum(-1) / k))
    assert numpy.abs(distance - even).max() < 0.01
    (one,) = student_points(numpy.array([[0.975]]), df)
    assert one == pytest.approx(scipy.stats.t(df).ppf(0.975))


def scale(local_dim):
    """A lower triangular matrix that is not far from one."""
    return torch.eye(local_dim).double() + 0.3 * standard_normal(local_dim, local_dim, seed=2).tril() / local_dim


def whitened(y, loc=0.3):
    root = scale(y.shape[-1])
    return torch.linalg.solve_triangular(root, (y - loc).mT, upper=False).mT, root.diagonal().log().sum()


def log_normal_density(y):
    x, log_det = whitened(y)
    return -(x**2).sum(-1) / 2 - y.shape[-1] / 2 * math.log(2 * math.pi) - log_det


def log_skew_density(y):
    """A skew normal, which has about half of its mass on one side."""
    x, _ = whitened(y)
    return log_normal_density(y) + math.log(2) + torch.special.log_ndtr(1.5 * x.sum(-1))


def log_t_density(y):
    x, log_det = whitened(y)
    return torch.as_tensor(student_log_density(x.numpy(), 12.0)) - log_det


DENSITIES = {"normal": log_normal_density, "skew": log_skew_density, "t": log_t_density}
# Numbers of points, and the largest error allowed with each.
NUM_POINTS = {
    1: {16: 5e-3, 64: 2e-4, 256: 2e-5},
    2: {64: 0.05, 512: 0.01, 4096: 0.002},
    4: {64: 0.2, 512: 0.05, 4096: 0.006},
}


def error(rule, density, local_dim):
    points = rule.points(local_dim, LIKE)
    return abs(float(points.log_integral(density(points.points).unsqueeze(-1))))


def typical_error(num_points, density, local_dim):
    """Over several sets of points, where there are several."""
    seeds_ = range(1 if local_dim == 1 else 8)
    return math.sqrt(
        numpy.mean([error(StudentPoints(num_points, df=8.0, seed=s), density, local_dim) ** 2 for s in seeds_])
    )


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize("local_dim", NUM_POINTS)
def test_the_error_falls_as_points_grow(name, local_dim):
    """With 64 times as many, or 16 times in one dimension, to a tenth: random ones take a hundred times for that."""
    found = [typical_error(num_points, DENSITIES[name], local_dim) for num_points in NUM_POINTS[local_dim]]
    assert all(e < bound for e, bound in zip(found, NUM_POINTS[local_dim].values(), strict=True))
    assert found[-1] < found[0] / 10


@pytest.mark.parametrize("local_dim", [1, 2, 4])
def test_the_density_of_the_points_is_integrated_exactly(local_dim):
    for rule in (StudentPoints(5, df=4.0), GaussHermite(2)):
        points = rule.points(local_dim, LIKE)
        assert abs(float(points.log_integral(points.log_density.unsqueeze(-1)))) < 1e-14
        assert abs(float(points.mean_gain(points.log_density.unsqueeze(-1)))) < 1e-14


def test_another_seed_gives_other_points():
    first, second = (StudentPoints(16, seed=seed).points(2, LIKE).points for seed in (0, 1))
    assert (first - second).abs().min() > 0
    first, second = (StudentPoints(16, seed=seed).points(1, LIKE).points for seed in (0, 1))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("asked", "made"), [(1, 1), (5, 8), (8, 8), (9, 16)])
def test_points_in_several_dimensions_are_a_power_of_two(asked, made):
    assert len(StudentPoints(asked).points(2, LIKE).points) == made
    assert len(StudentPoints(asked).points(1, LIKE).points) == asked


# ----------------------------------------------------------------------------------------------------------- finer ones


@pytest.mark.parametrize("local_dim", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("rule", [Laplace(), GaussHermite(2), GaussHermite(3), StudentPoints(6)])
def test_a_finer_rule_has_more_points(rule, local_dim):
    finer = rule.finer(local_dim)
    assert isinstance(finer, QuadratureRule)
    assert len(finer.points(local_dim, LIKE).points) > len(rule.points(local_dim, LIKE).points)


@pytest.mark.parametrize(
    ("rule", "local_dim", "expected"),
    [
        (Laplace(), 3, GaussHermite(5)),
        (Laplace(), 4, StudentPoints(256)),
        (GaussHermite(5), 3, GaussHermite(9)),
        (GaussHermite(6), 3, StudentPoints(256)),  # a grid of 11 to the third is too large
        (GaussHermite(31), 2, StudentPoints(961)),
        (GaussHermite(3), 4, StudentPoints(256)),
        (GaussHermite(129), 1, GaussHermite(257)),
        (GaussHermite(257), 1, StudentPoints(513)),  # the weights of a longer grid underflow
        (GaussHermite(200), 1, StudentPoints(399)),
        (StudentPoints(5, 3.0, 7), 2, StudentPoints(20, 3.0, 8)),
    ],
)
def test_which_rule_is_finer(rule, local_dim, expected):
    assert rule.finer(local_dim) == expected


@pytest.mark.parametrize("local_dim", [1, 3])
def test_a_grid_of_one_point_has_a_finer_one(local_dim):
    assert GaussHermite(1).finer(local_dim) != GaussHermite(1)


@pytest.mark.parametrize("local_dim", [1, 2])
@pytest.mark.parametrize("rule", [Laplace(), GaussHermite(3), StudentPoints(16)])
def test_a_finer_rule_is_nearer(rule, local_dim):
    before, after = (error(r, log_skew_density, local_dim) for r in (rule, rule.finer(local_dim)))
    assert after < 0.6 * before


# ------------------------------------------------------------------------------------------- one number of many values

any_rule = st.sampled_from([*RULES.values(), GaussHermite(5), StudentPoints(40)])


@given(rule=any_rule, local_dim=st.integers(1, 3), seed=seeds, size=st.sampled_from([0.1, 3.0, 300.0]))
def test_what_holds_for_any_values(rule, local_dim, seed, size):
    """Jensen's inequality, weights that sum to one, and what a constant adds."""
    points = rule.points(local_dim, LIKE)
    values = size * standard_normal(2, len(points.points), 3, seed=seed)
    integral, gain, weights = (f(values) for f in (points.log_integral, points.mean_gain, points.log_weights))
    assert integral.shape == gain.shape == (2, 3)
    assert weights.shape == values.shape
    assert (gain <= integral + 1e-12 * size).all()
    torch.testing.assert_close(weights.exp().sum(1), torch.ones(2, 3), rtol=1e-12, atol=0)
    expected = (points.log_probs.exp()[:, None] * (values - points.log_density[:, None] - integral[:, None]).exp()).sum(
        1
    )
    torch.testing.assert_close(expected, torch.ones(2, 3), rtol=1e-10, atol=0)
    for reduce, before in ((points.log_integral, integral), (points.mean_gain, gain)):
        torch.testing.assert_close(reduce(values + 7.0), before + 7.0, rtol=1e-12, atol=1e-12 * size)
    torch.testing.assert_close(points.log_weights(values + 7.0), weights, rtol=1e-10, atol=1e-10)


@given(rule=any_rule, seed=seeds)
def test_weights_are_the_derivative_of_the_integral(rule, seed):
    points = rule.points(2, LIKE)
    values = standard_normal(len(points.points), 1, seed=seed)
    found = torch.func.grad(lambda v: points.log_integral(v).sum())(values)
    torch.testing.assert_close(found, points.log_weights(values).exp(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("rule", "tolerance"), [(GaussHermite(11), 1e-4), (StudentPoints(4096), 0.01)])
def test_weights_give_expectations(rule, tolerance):
    """The mean and the covariance of a normal that is not where the points are."""
    points = rule.points(2, LIKE)
    weights = points.log_weights(log_normal_density(points.points).unsqueeze(-1)).exp()
    mean = (weights * points.points).sum(0)
    centered = points.points - mean
    torch.testing.assert_close(mean, torch.full((2,), 0.3), rtol=0, atol=tolerance)
    expected = scale(2) @ scale(2).mT
    torch.testing.assert_close((weights * centered).mT @ centered, expected, rtol=0, atol=3 * tolerance)


def test_values_that_overflow_alone_do_not_matter():
    points = QuadraturePoints(LIKE.new_zeros(3, 1), LIKE.new_full((3,), 1 / 3).log(), LIKE.new_zeros(3))
    values = torch.tensor([[800.0, -torch.inf, 0.0], [801.0, 0.0, -torch.inf], [-1e5, 0.0, 0.0]])
    expected = torch.tensor([800 + math.log(1 + math.e), math.log(2), math.log(2)]) - math.log(3)
    torch.testing.assert_close(points.log_integral(values), expected)
    assert points.log_weights(values)[0, 1] == -torch.inf


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("make", [GaussHermite, StudentPoints])
@pytest.mark.parametrize("num_points", [0, -3])
def test_rules_without_points_are_refused(make, num_points):
    with pytest.raises(ValueError, match=f"num_points must be .*, got {num_points}"):
        make(num_points)


@pytest.mark.parametrize("df", [0.0, -1.0, math.nan])
def test_degrees_of_freedom_that_are_not_positive_are_refused(df):
    with pytest.raises(ValueError, match=f"df must be positive and finite, got {df}"):
        StudentPoints(8, df=df)


def test_grids_that_are_too_large_are_refused():
    GaussHermite(10).points(3, LIKE)
    message = r"grid of 9 points along each of the 4 dimensions of a unit has 6561 points(.|\n)*StudentPoints\(256\)"
    with pytest.raises(ValueError, match=message):
        GaussHermite(9).points(4, LIKE)
