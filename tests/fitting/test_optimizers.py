"""Optimizers on plain functions: what they find, in how many evaluations, and what they say where they find nothing."""

import math
from typing import NamedTuple

import numpy
import pytest
import scipy.optimize

from laplace_amort.fitting import optimizers
from laplace_amort.fitting.evaluation import Evaluation, FitStatus
from laplace_amort.fitting.optimizers import Optimizer, QuasiNewton, TrustRegion, newton_decrement
from laplace_amort.linalg.whitening import Whitening

ARRAYS = numpy.random.default_rng(0)
OPTIMIZERS = [TrustRegion(), QuasiNewton()]
BOTH = pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: type(optimizer).__name__)


class Case(NamedTuple):
    """A function, where to start, its maximum, and evaluations that either optimizer may take."""

    function: object
    start: numpy.ndarray
    maximum: numpy.ndarray
    at_most: tuple[int, int] = (10, 20)


class Counted:
    """A function, the points at which it was evaluated, and the largest value."""

    def __init__(self, function):
        self.function, self.points, self.largest = function, [], -math.inf

    def __call__(self, point):
        self.points.append(point.copy())
        found = self.function(point)
        self.largest = max(self.largest, found.value)
        return found


def quadratic(matrix, center):
    def function(x):
        return Evaluation(float((center - x) @ matrix @ (x - center)) / 2, matrix @ (center - x), matrix)

    return function


def badly_scaled():
    basis = numpy.linalg.qr(ARRAYS.standard_normal((6, 6)))[0]
    matrix = basis * numpy.logspace(-4, 4, 6) @ basis.T
    return (matrix + matrix.T) / 2


def rosenbrock(x):
    rosen, der, hess = scipy.optimize.rosen, scipy.optimize.rosen_der, scipy.optimize.rosen_hess
    return Evaluation(-float(rosen(x)), -der(x), hess(x))


def saddle(x):
    """Maxima at (1, 0) and (-1, 0), a saddle between."""
    a, b = x
    return Evaluation(a**2 / 2 - a**4 / 4 - b**2 / 2, numpy.array([a - a**3, -b]), numpy.diag([3 * a**2 - 1, 1.0]))


def nothing(x):
    return Evaluation(-math.inf, numpy.full(len(x), numpy.nan), failure="nothing there")


def wall(x):
    """A quadratic with its maximum next to where it ends."""
    return quadratic(10 * numpy.eye(2), numpy.array([0.9, 0.0]))(x) if x[0] < 1 else nothing(x)


def between_walls(x):
    """A beta density on its interval, the logarithm of which bends ever more towards the ends."""
    a = float(x[0])
    if not 0 < a < 1:
        return nothing(x)
    bend = numpy.array([[3 / a**2 + 1 / (1 - a) ** 2]])
    return Evaluation(3 * math.log(a) + math.log1p(-a), numpy.array([3 / a - 1 / (1 - a)]), bend)


ROWS, ANSWERS = ARRAYS.standard_normal((30, 3)), numpy.arange(30) % 2


def logistic(x):
    logits = ROWS @ x
    p = 1 / (1 + numpy.exp(-logits))
    value = (ANSWERS * logits - numpy.logaddexp(0, logits)).sum() - x @ x / 2
    return Evaluation(float(value), ROWS.T @ (ANSWERS - p) - x, ROWS.T * (p * (1 - p)) @ ROWS + numpy.eye(3))


def flat(x):
    return Evaluation(1.5, numpy.zeros(len(x)), numpy.zeros((len(x), len(x))))


def kink(x):
    """Largest where the gradient, of length sqrt 2 everywhere, changes its sign."""
    difference = x - numpy.array([math.pi, -1 / 3])
    return Evaluation(-float(numpy.abs(difference).sum()), numpy.where(difference < 0, 1.0, -1.0))


def rounded(function, unit=1e-8):
    """With values that are rounded, and a gradient that is not."""

    def coarse(x):
        found = function(x)
        return found._replace(value=unit * round(found.value / unit))

    return coarse


def in_units(function, units):
    """The same function of whitening in other units."""

    def scaled(x):
        found = function(x / units)
        information = found.information
        bend = None if information is None else information / numpy.outer(units, units)
        return found._replace(gradient=found.gradient / units, information=bend)

    return scaled


CENTER = numpy.array([1.0, -2.0, 0.5, 3.0, 0.0, -1.0])
LOGISTIC = numpy.array(scipy.optimize.root(lambda x: logistic(x).gradient, numpy.zeros(3), tol=1e-14).x)
CASES = {
    "badly scaled": Case(quadratic(badly_scaled(), CENTER), numpy.zeros(6), CENTER, (4, 10)),
    "Rosenbrock": Case(rosenbrock, numpy.array([-1.2, 1.0, 1.0]), numpy.ones(3), (45, 80)),
    "next to a saddle": Case(saddle, numpy.array([1e-3, 0.5]), numpy.array([1.0, 0.0]), (10, 30)),
    "wall": Case(wall, numpy.array([-50.0, 3.0]), numpy.array([0.9, 0.0]), (5, 12)),
    "between walls": Case(between_walls, numpy.array([0.01]), numpy.array([0.75]), (20, 20)),
    "logistic": Case(logistic, 2 * numpy.ones(3), LOGISTIC, (12, 20)),
    "at the maximum": Case(logistic, LOGISTIC, LOGISTIC, (1, 1)),
}


def maximize(optimizer, function, start, at=None):
    """In the coordinates of the information at a point: what the fit takes for those of the posterior."""
    counted = Counted(function)
    information = numpy.eye(len(start)) if at is None else function(at).information
    maximum = optimizer.maximize(counted, start, lambda: Whitening.of_information(information))
    return maximum, counted


@BOTH
@pytest.mark.parametrize("name", CASES)
def test_finds_the_maximum(name, optimizer):
    function, start, expected, at_most = CASES[name]
    before = start.copy()
    maximum, counted = maximize(optimizer, function, start, expected)
    assert maximum.status is FitStatus.CONVERGED
    assert numpy.array_equal(start, before)
    assert len(counted.points) <= at_most[OPTIMIZERS.index(optimizer)]
    # What is returned is the best of what was evaluated, but for values that differ by rounding errors.
    assert maximum.evaluation.value >= counted.largest - 1e-11
    assert maximum.evaluation.value == function(maximum.point).value
    # And as far from the maximum as it says, in standard deviations.
    information = function(expected).information
    distance = min(
        math.sqrt(difference @ information @ difference)
        for sign in ((1, -1) if name == "next to a saddle" else (1,))
        for difference in [sign * maximum.point - expected]
    )
    assert maximum.gradient_norm <= optimizer.tolerance
    assert distance <= 1.1 * maximum.gradient_norm + 1e-9


@BOTH
def test_the_same_points_every_time(optimizer):
    """A fit that is taken up again relies on it."""
    _, start, maximum, _ = CASES["Rosenbrock"]
    one, other = (maximize(optimizer, rosenbrock, start, maximum)[1].points for _ in range(2))
    assert numpy.array_equal(numpy.stack(one), numpy.stack(other))


def test_leaves_a_saddle():
    """Right at it, where the gradient is zero."""
    maximum, counted = maximize(TrustRegion(), saddle, numpy.zeros(2))
    assert maximum.status is FitStatus.CONVERGED
    assert numpy.abs(maximum.point) == pytest.approx([1.0, 0.0], abs=1e-6)
    assert len(counted.points) <= 20


# ------------------------------------------------------------------------------------------------- whatever the units


def evaluations(optimizer, name, units):
    function, start, maximum, _ = CASES[name]
    found, counted = maximize(optimizer, in_units(function, units), start * units, maximum * units)
    assert found.status is FitStatus.CONVERGED
    return len(counted.points)


@BOTH
@pytest.mark.parametrize("unit", [1e-6, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("name", CASES)
def test_convergence_does_not_depend_on_the_unit(name, unit, optimizer):
    ones = numpy.ones(len(CASES[name].start))
    assert abs(evaluations(optimizer, name, unit * ones) - evaluations(optimizer, name, ones)) <= 2


@BOTH
def test_nor_on_a_unit_for_each_coordinate(optimizer):
    units = numpy.array([1e-2, 1.0, 1e2])
    assert abs(evaluations(optimizer, "logistic", units) - evaluations(optimizer, "logistic", numpy.ones(3))) <= 2


def test_a_measure_in_the_units_of_the_parameters_is_found(monkeypatch):
    monkeypatch.setattr(optimizers, "newton_decrement", lambda found: float(numpy.linalg.norm(found.gradient)))
    counts = [evaluations(TrustRegion(), "Rosenbrock", unit * numpy.ones(3)) for unit in (1.0, 1e6)]
    assert abs(counts[1] - counts[0]) > 2


INDEFINITE = numpy.diag([1.0, -1.0])


@pytest.mark.parametrize(
    ("gradient", "information", "expected"),
    [
        ([3.0, 4.0], numpy.eye(2), 5.0),
        ([3.0, 4.0], numpy.diag([9.0, 4.0]), math.hypot(1, 2)),
        ([1.0, 1.0], numpy.array([[2.0, 1.0], [1.0, 2.0]]), math.sqrt(2 / 3)),
        ([0.0, 0.0], INDEFINITE, math.inf),
        ([0.0, 0.0], numpy.zeros((2, 2)), math.inf),
        ([0.0, 0.0], None, math.inf),
        ([], numpy.zeros((0, 0)), 0.0),
    ],
)
def test_newton_decrement(gradient, information, expected):
    assert newton_decrement(Evaluation(0.0, numpy.array(gradient), information)) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------- where it ends otherwise


@BOTH
def test_a_start_without_a_value(optimizer):
    start = numpy.ones(2)
    maximum, counted = maximize(optimizer, nothing, start)
    assert maximum.status is FitStatus.START_FAILED
    assert len(counted.points) == 1
    assert numpy.array_equal(maximum.point, start)
    assert maximum.evaluation.failure == "nothing there"


@pytest.mark.parametrize("max_steps", [1, 5, 20])
@pytest.mark.parametrize(("kind", "num_parameters"), [(TrustRegion, 3), (QuasiNewton, 3), (QuasiNewton, 400)])
def test_out_of_steps(kind, num_parameters, max_steps):
    """A line search that is under way may take a few more; the best point so far is what there is."""
    start = numpy.resize([-1.2, 1.0], num_parameters)
    maximum, counted = maximize(kind(max_steps=max_steps), rosenbrock, start)
    assert maximum.status is FitStatus.MAX_STEPS
    assert max_steps <= len(counted.points) <= max_steps + 20 * (max_steps > 1)
    assert maximum.evaluation.value == counted.largest


@BOTH
def test_no_parameters(optimizer):
    maximum, counted = maximize(optimizer, flat, numpy.zeros(0))
    assert (maximum.status, maximum.gradient_norm, maximum.evaluation.value) == (FitStatus.CONVERGED, 0.0, 1.5)
    assert len(counted.points) == 1


def test_a_kink_is_no_maximum_of_a_smooth_function():
    maximum, counted = maximize(QuasiNewton(), kink, numpy.array([1.3, -0.4]))
    assert maximum.status in (FitStatus.STUCK, FitStatus.MAX_STEPS)
    assert maximum.gradient_norm == pytest.approx(2**0.5)
    assert maximum.evaluation.value == counted.largest
    assert len(counted.points) <= QuasiNewton().max_steps + 20


@pytest.mark.parametrize("num_parameters", [1, 3])
def test_a_flat_function_has_no_maximum(num_parameters):
    """For the second derivative; one who sees the gradient alone has nothing left to do."""
    start = numpy.ones(num_parameters)
    maximum, counted = maximize(TrustRegion(max_steps=30), flat, start)
    assert maximum.status is FitStatus.NO_MAXIMUM
    assert maximum.gradient_norm == math.inf
    assert len(counted.points) <= 31
    maximum, counted = maximize(QuasiNewton(), flat, start)
    assert (maximum.status, len(counted.points)) == (FitStatus.CONVERGED, 1)


@BOTH
def test_a_gradient_of_the_wrong_sign(optimizer):
    def wrong(x):
        found = logistic(x)
        return found._replace(gradient=-found.gradient)

    maximum, counted = maximize(optimizer, wrong, 2 * numpy.ones(3))
    assert maximum.status is FitStatus.STUCK or (maximum.status, optimizer) == (FitStatus.MAX_STEPS, TrustRegion())
    assert maximum.evaluation.value == counted.largest
    assert len(counted.points) <= optimizer.max_steps + 20


def test_second_derivatives_are_asked_for():
    with pytest.raises(TypeError, match="needs an objective with second derivatives"):
        maximize(TrustRegion(), lambda x: logistic(x)._replace(information=None), numpy.zeros(3))
    assert all(isinstance(optimizer, Optimizer) for optimizer in OPTIMIZERS)


# ------------------------------------------------------------------------------------- rounding errors, and many


@pytest.mark.parametrize("name", ["logistic", "Rosenbrock"])
def test_only_the_gradient_tells_where_values_are_rounded(name, monkeypatch):
    """An error of 1e-8 in values hides a step of 1e-4 standard deviations: the last ones go by the gradient alone."""
    function, start, expected, _ = CASES[name]
    starts = [(1 + 0.05 * i) * start for i in range(12)]
    for one in starts:
        maximum, counted = maximize(TrustRegion(), rounded(function), one)
        assert maximum.status is FitStatus.CONVERGED
        assert maximum.point == pytest.approx(expected, abs=1e-5)
        assert len(counted.points) <= 100
    monkeypatch.setattr(optimizers, "_NEAR", 0.0)
    without = [maximize(TrustRegion(), rounded(function), one)[0] for one in starts]
    assert sum(not maximum.status.ok for maximum in without) > 4
    assert max(maximum.gradient_norm for maximum in without) > 1e-5


@pytest.mark.parametrize(("num_parameters", "method"), [(300, "BFGS"), (400, "L-BFGS-B")])
def test_many_parameters(num_parameters, method, monkeypatch):
    root = ARRAYS.standard_normal((num_parameters, num_parameters))
    matrix, center = root @ root.T / num_parameters + numpy.eye(num_parameters), ARRAYS.standard_normal(num_parameters)
    methods, minimize = set(), scipy.optimize.minimize

    def spy(*args, **settings):
        methods.add(settings["method"])
        return minimize(*args, **settings)

    monkeypatch.setattr(scipy.optimize, "minimize", spy)
    maximum, counted = maximize(QuasiNewton(), quadratic(matrix, center), numpy.zeros(num_parameters))
    assert methods == {method}
    assert maximum.status is FitStatus.CONVERGED
    assert numpy.linalg.norm(maximum.point - center) <= QuasiNewton().tolerance
    assert len(counted.points) <= 60


@pytest.mark.parametrize("seed", range(200))
def test_a_step_where_every_direction_curves_upwards_alike_is_as_long_as_the_region(seed):
    generator = numpy.random.default_rng(seed)
    size = 1 + seed % 3
    at = Evaluation(0.0, generator.standard_normal(size) * 10.0 ** generator.integers(-3, 4), -numpy.eye(size))
    radius = 10.0 ** generator.uniform(-3, 3)
    step = optimizers._Quadratic.of(at).step_within(radius)  # the ends of the search may be one number apart
    assert numpy.linalg.norm(step) == pytest.approx(radius, rel=1e-5)
