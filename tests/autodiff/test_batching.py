"""Terms by unit at many points at once: recordings against functions called point by point."""

import pytest
import torch
from helpers.strategies import standard_normal

from laplace_amort.autodiff import batching
from laplace_amort.autodiff.batching import SeparableDensity
from laplace_amort.autodiff.recording import record

UNITS, LOCAL_DIM = 4, 2
DATA = standard_normal(UNITS, seed=9)
SIZES = [(1, 1), (1, 3), (3, 1), (3, 5)]  # of globals, and of points for each


def shared(theta, y):
    return -(theta**2).sum() / 2 + theta.prod().sin()


def units(theta, y):
    data = DATA.to(y)
    return theta[0].exp() * (y[:, 0] - data) ** 2 - (y.prod(-1) + theta[1] * data).cos()


LIVE = SeparableDensity(shared, units)


def recorded():
    at = standard_normal(2, seed=0), standard_normal(UNITS, LOCAL_DIM, seed=1)
    return SeparableDensity(record(shared, *at), record(units, *at))


def density(how):
    return LIVE if how == "live" else recorded()


def points(num_globals, num_points):
    return standard_normal(num_globals, 2, seed=3), standard_normal(num_globals, num_points, UNITS, LOCAL_DIM, seed=4)


def point_by_point(globals_, locals_):
    """With nothing of the room under test."""
    found = torch.zeros(locals_.shape[:3], dtype=torch.float64)
    for s, q, i in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
        found[s, q, i] = units(globals_[s], locals_[s, q])[i]
    return found


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ["live", "recorded"])
@pytest.mark.parametrize("sizes", SIZES)
def test_units_are_those_of_each_point(how, sizes):
    globals_, locals_ = points(*sizes)
    found = density(how).units_at(globals_, locals_)
    assert found.shape == (*sizes, UNITS)
    assert_same(found, point_by_point(globals_, locals_))


@pytest.mark.parametrize("how", ["live", "recorded"])
@pytest.mark.parametrize("num_globals", [1, 4])
def test_shared_is_that_of_each_point(how, num_globals):
    globals_, locals_ = points(num_globals, 1)
    found = density(how).shared_at(globals_, locals_[0, 0])
    assert_same(found, torch.stack([shared(theta, None) for theta in globals_]))
    assert torch.equal(found, density(how).shared_at(globals_, torch.zeros(UNITS, LOCAL_DIM)))


@pytest.mark.parametrize("how", ["live", "recorded"])
def test_gradients_are_those_of_each_point(how):
    point = [part.requires_grad_() for part in points(3, 5)]
    weights = standard_normal(3, 5, UNITS, seed=6)
    looped = torch.stack([torch.stack([units(t, y) for y in ys]) for t, ys in zip(*point, strict=True)])
    expected = torch.autograd.grad((weights * looped).sum(), point)
    found = torch.autograd.grad((weights * density(how).units_at(*point)).sum(), point)
    for one, other in zip(found, expected, strict=True):
        assert one.abs().min() > 0
        assert_same(one, other)


@pytest.mark.parametrize("how", ["live", "recorded"])
@pytest.mark.parametrize("num_globals", [1, 3])
def test_the_sum_is_that_of_all_points_in_order(how, num_globals):
    globals_, locals_ = points(num_globals, 1)
    flat = locals_.reshape(num_globals * UNITS, LOCAL_DIM)
    found = density(how).sum_of_units(globals_, flat)
    assert found.shape == ()
    assert_same(found, point_by_point(globals_, locals_).sum())
    # Each row of the gradient is that of a unit at its own globals.
    by_unit = torch.func.grad(density(how).sum_of_units, argnums=1)(globals_, flat).reshape(num_globals, UNITS, -1)
    for theta, y, gradient in zip(globals_, locals_.squeeze(1), by_unit, strict=True):
        assert_same(gradient, torch.func.grad(lambda y, theta=theta: units(theta, y).sum())(y))


def test_points_in_another_order_are_found():
    """Planted: units of one point beside each other, and not points of one unit."""
    globals_, locals_ = points(3, 1)
    wrong = locals_.transpose(0, 2).reshape(-1, LOCAL_DIM)
    off = recorded().sum_of_units(globals_, wrong) - point_by_point(globals_, locals_).sum()
    assert off.abs() > 0.1


def test_no_globals():
    """Of a model without any: arguments of no elements are mapped over all the same."""
    at = torch.zeros(0), torch.zeros(UNITS, 1)

    def alone(theta, y):
        return -((y[:, 0] - DATA) ** 2)

    def nothing(theta, y):
        return y.new_zeros(())

    locals_ = standard_normal(3, 2, UNITS, 1, seed=1)
    for made in (SeparableDensity(nothing, alone), SeparableDensity(record(nothing, *at), record(alone, *at))):
        assert_same(made.units_at(torch.zeros(3, 0), locals_), -((locals_.squeeze(-1) - DATA) ** 2))
        assert torch.equal(made.shared_at(torch.zeros(3, 0), locals_[0, 0]), torch.zeros(3))


def test_float32():
    at = [standard_normal(2, seed=0).float(), standard_normal(UNITS, LOCAL_DIM, seed=1).float()]
    made = SeparableDensity(record(shared, *at), record(units, *at))
    globals_, locals_ = points(3, 5)
    found = made.units_at(globals_.float(), locals_.float())
    assert found.dtype == made.shared_at(globals_.float(), at[1]).dtype == torch.float32
    torch.testing.assert_close(found.double(), point_by_point(globals_, locals_), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize(("runs", "num_points", "chunk"), [(0.5, 1, 1), (1, 1, 1), (7.5, 1, 7), (7.5, 3, 2), (7, 8, 1)])
def test_chunks_fit_into_memory(runs, num_points, chunk, monkeypatch):
    """As many globals as there is memory for, with all of their points; never fewer than one."""
    made = recorded()
    assert made.units.num_bytes > 0
    monkeypatch.setattr(batching, "_CHUNK_BYTES", int(runs * made.units.num_bytes))
    assert made.chunk(num_points) == chunk
    assert LIVE.chunk(num_points) == 1


def test_a_recording_that_takes_no_memory_is_one_chunk():
    made = SeparableDensity(shared, record(lambda theta, y: y[:, 0], torch.zeros(1), torch.zeros(2, 1)))
    assert made.units.num_bytes == 0
    assert made.chunk(1000) > 1000
