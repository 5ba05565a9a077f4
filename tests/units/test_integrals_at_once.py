"""Integrals at many globals: at once and one at a time, in chunks, with modes lost, without globals."""

import pytest
import torch
from helpers.models import normals
from helpers.oracles import relative_error
from helpers.unit_integrals import REDUCTIONS, Problem
from helpers.unit_models import UNIT_MODELS

from laplace_amort.autodiff import batching
from laplace_amort.autodiff.batching import SeparableDensity
from laplace_amort.autodiff.recording import Recording, record
from laplace_amort.units.integrals import UnitIntegrals
from laplace_amort.units.quadrature import GaussHermite, Laplace, QuadraturePoints, StudentPoints

RULE = StudentPoints(8)
NAMES = ["normal", "poisson_by_visit", "binomial_slopes", "categorical_probs", "crossed_items", "without_globals"]


def assert_same(one, other):
    for name, part, expected in zip(one._fields, one, other, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-9, atol=1e-9, equal_nan=True, msg=name)


def one_at_a_time(problem, method, reduction="log_integral"):
    """Draw after draw, joined."""
    pairs = zip(problem.globals_.split(1), problem.start.split(1), strict=True)
    compute = getattr(problem.integrals, method)
    parts = [compute(problem.points(RULE), REDUCTIONS[reduction], *pair) for pair in pairs]
    return type(parts[0])(*map(torch.cat, zip(*parts, strict=True)))


# ------------------------------------------------------------------------------------------------------------- at once


@pytest.mark.parametrize("how", ["live", "recorded"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_all_at_once_is_one_at_a_time(name, reduction, how):
    problem = Problem(name, num_globals=3, how=how)
    found = problem.gradients(RULE, reduction)
    assert_same(found, one_at_a_time(problem, "values_and_gradients", reduction))
    assert_same(problem.values(RULE, reduction), one_at_a_time(problem, "values", reduction))


@pytest.mark.parametrize("name", UNIT_MODELS)
def test_values_are_those_that_come_with_gradients(name):
    problem = Problem(name, num_globals=2)
    alone, found = problem.values(RULE), problem.gradients(RULE)
    _, num_units, local_dim = problem.start.shape
    assert alone.gradients.shape == (0, problem.globals_.shape[1])
    assert found.gradients.shape == problem.globals_.shape
    assert alone.mode.shape == found.mode.shape == (2, num_units, local_dim)
    assert found.lost.tolist() == alone.lost.tolist() == [[False] * num_units] * 2
    torch.testing.assert_close(alone.values, found.values, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(alone.mode, found.mode, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["poisson_by_visit", "binomial_slopes", "dependent_supports"])
def test_recorded_and_live_agree(name):
    live, recorded = (Problem(name, num_globals=2, how=how).gradients(RULE) for how in ("live", "recorded"))
    assert_same(live, recorded)


@pytest.mark.parametrize("enabled", [True, False])
def test_no_graph_is_left_and_none_is_needed(enabled):
    problem = Problem("poisson_by_visit", num_globals=2)
    expected = problem.gradients(RULE)
    for part in (problem.globals_, problem.start):
        part.requires_grad_()
    with torch.set_grad_enabled(enabled):
        found, alone = problem.gradients(RULE), problem.values(RULE)
    assert not any(part.requires_grad for part in (*found, alone.values, alone.mode))
    assert problem.globals_.grad is None
    assert_same(found, expected)


def test_modes_do_not_depend_on_the_start():
    problem = Problem("binomial_slopes", num_globals=2)
    expected = problem.gradients(RULE)
    problem.start = problem.start + 0.7 * normals(*problem.start.shape)
    assert_same(problem.gradients(RULE), expected)


# --------------------------------------------------------------------------------------------------------------- chunks


class Counting(Recording):
    """The terms of the units, and how many globals and points they were asked for at a time."""

    def __init__(self, recording):
        super().__init__(recording.operations, recording.num_bytes)
        self.sizes = set()

    def __call__(self, global_, local):
        points = torch._C._functorch.get_unwrapped(local)
        self.sizes.add(tuple(torch._C._functorch.get_unwrapped(points).shape[:2]))
        return super().__call__(global_, local)


def counted(problem):
    counting = Counting(problem.density.units)
    density = SeparableDensity(problem.density.shared, counting)
    problem.integrals = UnitIntegrals(density)
    return counting


# Runs for which there is memory, and the numbers of globals and of points that are then taken at a time.
CHUNKS = {0.5: (1, 1), 1: (1, 1), 3: (1, 3), 7.9: (1, 7), 8: (1, 8), 16: (2, 8), 23: (2, 8), 24: (3, 8), 1000: (5, 8)}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["poisson_by_visit", "categorical_probs"])
def test_chunks_make_no_difference(name, reduction, monkeypatch):
    problem = Problem(name, num_globals=5)
    expected, alone = problem.gradients(RULE, reduction), problem.values(RULE, reduction)
    for runs, sizes in CHUNKS.items():
        counting = counted(problem)
        monkeypatch.setattr(batching, "_CHUNK_BYTES", int(runs * counting.num_bytes))
        for method, whole in (("gradients", expected), ("values", alone)):
            counting.sizes.clear()
            assert_same(getattr(problem, method)(RULE, reduction), whole)
            assert sizes in counting.sizes
            at_points = max(s * q for s, q in counting.sizes)
            assert at_points == sizes[0] * sizes[1]


def test_a_chunk_that_is_lost_is_found(monkeypatch):
    """Planted: of the points of a rule, those of the first chunk alone."""
    problem = Problem("poisson_by_visit")
    expected = problem.gradients(RULE)
    monkeypatch.setattr(batching, "_CHUNK_BYTES", 3 * problem.density.units.num_bytes)
    original = UnitIntegrals._graph

    def once(self, globals_, nodes):
        theta, nodes, values = original(self, globals_, nodes)
        return theta, nodes, values if nodes.shape[1] == 3 else values.detach() + 0 * (values + theta.sum())

    monkeypatch.setattr(UnitIntegrals, "_graph", once)
    found = problem.gradients(RULE)
    torch.testing.assert_close(found.values, expected.values)
    assert (found.gradients - expected.gradients).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------------- modes not found


def shared(theta, y):
    return -(theta**2).sum() / 2


def slope(theta, y):
    """Unit 1 has no mode where the first global is negative."""
    normal = -((y[:, 0] - theta[1]) ** 2) / 2 - y[:, 0] ** 4 / 8
    bent = (torch.arange(len(y)) != 1) | (theta[0] > 0)
    return torch.where(bent, normal * theta[0].cosh(), y[:, 0])


def overflowing(theta, y):
    """All units do where the first global is huge."""
    return -(theta[0] * y[:, 0]).exp() + y[:, 0] - (y[:, 0] - theta[1]) ** 2 / 2


LOST = {
    slope: (torch.tensor([[1.0, 0.5], [-1.0, 0.2], [2.0, 0.1], [-0.1, 0.3]]), [[1], [3]], [1]),
    overflowing: (torch.tensor([[1.0, 0.5], [1e200, 0.2], [torch.nan, 0.1], [0.5, 0.3]]), [[1], [2]], [0, 1, 2]),
}


@pytest.mark.parametrize("how", ["live", "recorded"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("units", LOST)
def test_a_mode_that_is_not_found_is_nan_for_that_draw_alone(units, reduction, how):
    globals_, draws, lost = LOST[units]
    globals_, start = globals_.double(), torch.zeros(4, 3, 1)
    density = SeparableDensity(shared, units)
    if how == "recorded":
        density = SeparableDensity(*(record(f, globals_[0], start[0]) for f in (shared, units)))
    integrals, points = UnitIntegrals(density), RULE.points(1, start)
    expected = torch.zeros(4, 3, dtype=torch.bool)
    expected[torch.tensor(draws), lost] = True
    kept = [i for i in range(4) if not expected[i].any()]
    alone = integrals.values_and_gradients(points, REDUCTIONS[reduction], globals_[kept], start[kept])
    assert not alone.lost.any()
    assert alone.gradients.isfinite().all()
    for method in ("values", "values_and_gradients"):
        found = getattr(integrals, method)(points, REDUCTIONS[reduction], globals_, start)
        assert torch.equal(found.lost, expected)
        assert torch.equal(found.values.isnan(), expected.any(1))
        torch.testing.assert_close(found.values[kept], alone.values, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.gradients[kept], alone.gradients, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------ without globals


@pytest.mark.parametrize("how", ["live", "recorded"])
@pytest.mark.parametrize("rule", [Laplace(), GaussHermite(5), StudentPoints(8)])
def test_no_globals(rule, how):
    problem = Problem("without_globals", num_globals=2, how=how)
    found = problem.gradients(rule)
    assert found.gradients.shape == (2, 0)
    # Twice the same, in two places of one vector, where the last bit may differ.
    assert float(found.values[0]) == pytest.approx(float(found.values[1]), rel=1e-13)
    torch.testing.assert_close(problem.values(rule).values, found.values, rtol=1e-12, atol=1e-12)


UNUSED = {
    "in units": (shared, lambda theta, y: -(y[:, 0] ** 2) / 2),
    "in what is shared": (lambda theta, y: y.new_zeros(()), lambda theta, y: -((y[:, 0] - theta.sum()) ** 2) / 2),
    "but beside the units' latents": (lambda theta, y: y.new_zeros(()), lambda theta, y: theta.sum() - y[:, 0] ** 2),
    "anywhere": (lambda theta, y: y.new_zeros(()), lambda theta, y: -(y[:, 0] ** 2) / 2),
}


@pytest.mark.parametrize("where", UNUSED)
def test_globals_that_are_not_used(where):
    """The evidence is that of normal densities, whatever the globals."""
    globals_ = normals(2, 2)
    points = GaussHermite(3).points(1, globals_)
    integrals = UnitIntegrals(SeparableDensity(*UNUSED[where]))
    found = integrals.values_and_gradients(points, QuadraturePoints.log_integral, globals_, torch.zeros(2, 3, 1))
    slope_ = {"in units": -globals_, "but beside the units' latents": torch.full((2, 2), 3.0)}
    torch.testing.assert_close(found.gradients, slope_.get(where, torch.zeros(2, 2)), rtol=1e-12, atol=1e-12)


# -------------------------------------------------------------------------------------------------------------- float32


@pytest.mark.parametrize("rule", [Laplace(), GaussHermite(3), StudentPoints(16)])
@pytest.mark.parametrize("name", ["normal", "poisson_by_visit", "binomial_slopes", "categorical_probs"])
def test_float32(name, rule):
    expected = Problem(name, num_globals=2).gradients(rule)
    found = Problem(name, num_globals=2, dtype=torch.float32).gradients(rule)
    assert {found.values.dtype, found.gradients.dtype, found.mode.dtype} == {torch.float32}
    assert not found.lost.any()
    assert relative_error(found.values.double(), expected.values) < 1e-5
    assert relative_error(found.gradients.double(), expected.gradients) < 1e-3
