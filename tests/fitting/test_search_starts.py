"""Where else a fit starts, and which of its ends are one."""

import math

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.models import normals
from helpers.unit_models import UNIT_MODELS, UnitCase
from hypothesis import given
from hypothesis import strategies as st
from pyro.distributions import constraints
from pyro.util import get_rng_state

from laplace_amort.fitting.evaluation import Evaluation, FitStatus, Maximum
from laplace_amort.fitting.search import distinct, other_starts, random_starts
from laplace_amort.guide.auto import AutoLaplaceFamily
from laplace_amort.guide.problem import Problem

# ------------------------------------------------------------------------------------------------------ other starts

# Distributions of a global by what its support is, with its unconstrained elements, and whether these are logarithms.
SUPPORTS = {
    "real": (lambda: dist.Normal(0.0, 1.0), 1, False),
    "real vector": (lambda: dist.Normal(0.0, 1.0).expand([2]).to_event(1), 2, False),
    "correlations": (lambda: dist.LKJCholesky(3, 2.0), 3, False),
    "interval": (lambda: dist.Beta(2.0, 3.0), 1, False),
    "other interval": (lambda: dist.Uniform(-1.0, 2.0), 1, False),
    "simplex": (lambda: dist.Dirichlet(torch.ones(3)), 2, False),
    "positive": (lambda: dist.Gamma(3.0, 2.0), 1, True),
    "positive vector": (lambda: dist.HalfNormal(1.0).expand([2]).to_event(1), 2, True),
    "positive batch": (lambda: dist.LogNormal(torch.zeros(2), 1.0).to_event(1), 2, True),
    "improper": (lambda: dist.ImproperUniform(constraints.positive, (), ()), 1, True),
}


def make_target(names):
    """A hierarchy with a global for each of these supports, in this order."""

    def model(z):
        for name in names:
            pyro.sample(name, SUPPORTS[name][0]())
        pyro.factor("proper", torch.zeros(()))
        with pyro.plate("units", len(z)):
            pyro.sample("z", dist.Normal(pyro.sample("y", dist.Normal(0.0, 1.0)), 1.0), obs=z)

    return target_of(UnitCase(model, (normals(3),), 0, 3, 1))


def target_of(case):
    return Problem(AutoLaplaceFamily(case.model), case.args, case.kwargs)


@pytest.mark.parametrize(
    "names", [tuple(SUPPORTS), tuple(SUPPORTS)[::-1], *((name,) for name in SUPPORTS)], ids="-".join
)
def test_other_starts_lower_the_positive_globals_alone(names):
    """By two and by four, from where the fit started; then their image of zero is lowered by two."""
    problem = make_target(names)
    marks = torch.cat([torch.full((SUPPORTS[name][1],), float(SUPPORTS[name][2])) for name in names])
    start = normals(len(marks), seed=3)
    before = start.clone()
    expected = [start - 2 * marks, start - 4 * marks] if marks.any() else []
    found = list(other_starts(problem, start))
    assert len(found) == len(expected) + 1
    for actual, wanted in zip(found, [*expected, -2 * marks], strict=True):
        assert torch.equal(actual, wanted)
    assert torch.equal(start, before)


@pytest.mark.parametrize(
    ("name", "marks"),
    [
        ("normal", [0, 1]),
        ("negative_binomial", [0, 1, 1]),
        ("correlated", [0, 0, 1, 1, 0]),
        ("crossed_items", [0, 0, 0]),
        ("categorical_probs", [0, 0, 0, 1]),
        ("without_globals", []),
    ],
)
def test_other_starts_of_whole_models(name, marks):
    problem, marks = target_of(UNIT_MODELS[name]()), torch.tensor(marks, dtype=torch.get_default_dtype())
    found = list(other_starts(problem, problem.loc))
    assert torch.equal(found[-1], -2 * marks)
    assert len(found) == (3 if marks.any() else 1)


def test_a_support_that_depends_on_latents_is_left_alone():
    """It is not known before a run of the model; that of the global it depends on is."""
    problem = target_of(UNIT_MODELS["dependent_supports"]())
    assert torch.equal(next(other_starts(problem, torch.zeros(2))), torch.tensor([-2.0, 0.0]))


# ----------------------------------------------------------------------------------------------------- random starts


# Pyro's softmax, from which a simplex has its numbers, is not the transform of the guide: these may be larger.
LARGEST = {"normal": 2, "correlated": 2, "categorical_probs": 6, "dependent_supports": 2, "without_globals": 2}


@pytest.mark.parametrize("name", LARGEST)
def test_random_starts_are_reproducible_and_leave_no_trace(name):
    problem = target_of(UNIT_MODELS[name]())
    before, loc = get_rng_state(), problem.loc.clone()
    first = list(random_starts(problem, 5, seed=3))
    after = get_rng_state()
    assert all(repr(before[name]) == repr(after[name]) for name in ("random", "numpy"))
    assert torch.equal(before["torch"], after["torch"])
    assert torch.equal(problem.loc, loc)
    torch.manual_seed(99)
    again = list(random_starts(problem, 5, seed=3))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert all(start.shape == problem.loc.shape and (start.abs() <= LARGEST[name]).all() for start in first)
    if len(problem.loc):
        numbers = torch.cat([*first, *random_starts(problem, 5, seed=4)])
        assert len(numbers.unique()) == 10 * len(problem.loc)


def test_no_random_starts():
    assert list(random_starts(make_target(["real"]), 0, seed=0)) == []


def test_random_starts_are_uniform():
    """The largest distance to the distribution function: above 0.114 in 1e-5 of all seeds, of which this is one."""
    starts = torch.cat(list(random_starts(make_target(["real vector", "interval"]), 160, seed=0)))
    steps = torch.arange(len(starts) + 1) / len(starts)
    expected = (starts.sort().values + 2) / 4
    assert torch.maximum((steps[1:] - expected).abs().max(), (expected - steps[:-1]).abs().max()) < 0.114


# ------------------------------------------------------------------------------------------------------ distinct ends


OK, STUCK, LOST = FitStatus.CONVERGED, FitStatus.STUCK, FitStatus.START_FAILED


def make_end(point, value, status=OK, information=None, error=0.0, num_starts=1):
    point = numpy.atleast_1d(numpy.array(point, dtype=float))
    matrix = None if information is None else information * numpy.eye(len(point))
    return Maximum(point, Evaluation(value, 0 * point, matrix, error), status, 0.0, num_starts)


def summary(ends):
    return [(float(end.point[0]), end.evaluation.value, end.num_starts) for end in distinct(ends)]


def test_the_converged_come_first_and_of_these_the_best():
    ends = [make_end(1, -5.0), make_end(2, -9.0, STUCK), make_end(3, -3.0), make_end(4, -1.0, STUCK)]
    assert summary(ends) == [(3, -3.0, 1), (1, -5.0, 1), (4, -1.0, 1), (2, -9.0, 1)]


# One end and another at 0 with value -5; whether the two are one.
PAIRS = {
    "the same": (make_end(0.0, -5.0001), make_end(0.0, -5.0), True),
    "next to it": (make_end(0.09, -5.005), make_end(0.0, -5.0), True),
    "another value": (make_end(0.0, -5.02), make_end(0.0, -5.0), False),
    "another place": (make_end(0.2, -5.0001), make_end(0.0, -5.0), False),
    "far out, places are coarser": (make_end(101.0, -5.0001), make_end(100.0, -5.0), True),
    "in a wide posterior": (make_end(0.9, -5.0001, information=0.01), make_end(0.0, -5.0, information=0.01), True),
    "in a narrow posterior": (make_end(0.02, -5.0001, information=100), make_end(0.0, -5.0, information=100), False),
    "a noisy value": (make_end(0.05, -5.4, error=0.1), make_end(0.0, -5.0, error=0.1), True),
    "further than the noise": (make_end(0.05, -5.5, error=0.1), make_end(0.0, -5.0, error=0.1), False),
    "a large value": (make_end(0.0, -5e6 - 0.05), make_end(0.0, -5e6), True),
    "no values": (make_end(0.0, -math.inf, LOST), make_end(3.0, -math.inf, LOST), True),
    "one value": (make_end(0.0, -math.inf, LOST), make_end(0.0, -5.0), False),
    "one converged": (make_end(0.05, -4.995, STUCK), make_end(0.0, -5.0), True),
    "no whitening": (make_end([], -5.001), make_end([], -5.0), True),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("order", [1, -1])
def test_which_two_ends_are_one(pair, order):
    """Whichever was found first: the converged or better one stays, with the starts of both."""
    *ends, same = PAIRS[pair]
    found = distinct(ends[::order])
    assert len(found) == (1 if same else 2)
    assert sum(end.num_starts for end in found) == 2
    if pair != "no values":
        assert found[0].point is ends[1].point


def test_starts_are_counted():
    ends = [make_end(0.0, -5.0, num_starts=3), make_end(0.01, -5.0, num_starts=2), make_end(4.0, -5.0)]
    assert summary(ends) == [(0, -5.0, 5), (4, -5.0, 1)]


@given(
    order=st.permutations(range(8)),
    statuses=st.lists(st.sampled_from([OK, STUCK, FitStatus.MAX_STEPS]), min_size=8, max_size=8),
)
def test_whatever_the_order(order, statuses):
    """Two of each of four places: the ends, and their order, do not depend on which start came first."""
    ends = [make_end(i % 4, -float(i % 4) - 1e-3 * (i // 4), status) for i, status in enumerate(statuses)]
    found = distinct(ends[i] for i in order)
    assert [end.num_starts for end in found] == [2] * 4
    places = [float(end.point[0]) for end in found]
    converged = {i % 4 for i, status in enumerate(statuses) if status is OK}
    assert places == sorted(range(4), key=lambda place: (place not in converged, place))
    assert [end.status.ok for end in found] == [place in converged for place in places]
