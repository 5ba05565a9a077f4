"""Units given the globals: points and draws against closed forms, dense grids, and each other.

Draws are of fixed seeds. Statistics that are compared are within LIMIT standard errors: with some 500 comparisons at
4e-9 each, another seed would raise a false alarm with a probability of 2e-6. Distributions are compared by the largest
difference of their distribution functions, at a rate of 1e-7 each.
"""

import dataclasses
import math
from types import SimpleNamespace

import numpy
import pytest
import torch
from helpers.fit_models import guide_for
from helpers.models import normals
from helpers.unit_models import UNIT_MODELS

from laplace_amort.autodiff.batching import SeparableDensity
from laplace_amort.guide.problem import Problem
from laplace_amort.posterior import unit_draws
from laplace_amort.posterior.unit_draws import LinearUnits, NestedUnits, WeightedUnits, _evenly_spread
from laplace_amort.units.integrals import UnitIntegrals
from laplace_amort.units.quadrature import GaussHermite, StudentPoints

LIMIT = 5.9


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Where a prior has no mean the start is drawn, and what is asserted is of one place.
DRAWN_STARTS = {"student_t": [0.0, -0.4413]}


class Setting:
    """A model of the table at its start, and some globals around there."""

    def __init__(self, name, num_globals=2, spread=0.3):
        case = UNIT_MODELS[name]()
        guide = guide_for(case.model, unit_plate=case.unit_plate)
        self.problem = Problem(guide, case.args, case.kwargs)
        if name in DRAWN_STARTS:
            self.problem.place(torch.tensor(DRAWN_STARTS[name]))
        with torch.no_grad():
            gaussian = guide.gaussian_of(self.problem.unit_model, mode=self.problem.mode)
        self.gaussian = dataclasses.replace(gaussian, global_loc=gaussian.global_loc.detach().clone())
        self.globals_ = self.gaussian.global_loc + spread * normals(num_globals, case.global_dim, seed=1)
        self.density = self.problem.integrals.density

    def units(self, which, *rule):
        if which is LinearUnits:
            return LinearUnits(self.gaussian)
        return which(self.gaussian, self.problem.integrals, *rule)

    def bends(self, local):
        """Gradient ``(S, N, k)`` and minus the second derivative ``(S, N, k, k)`` of each unit at ``(S, N, k)``."""
        found = [self._bend(*pair) for pair in zip(self.globals_, local, strict=True)]
        return (torch.stack(part) for part in zip(*found, strict=True))

    def _bend(self, global_, local):
        def total(y):
            return self.density.units(global_, y).sum()

        full = torch.func.hessian(total)(local)
        return torch.func.grad(total)(local), torch.stack([-full[i, :, i] for i in range(len(local))])

    def grid(self, units, width=30.0, number=4001):
        """Points of a dense grid around the modes, and the normalized weights of the density there."""
        k = self.gaussian.local_loc.shape[1]
        there = units.conditionals(self.globals_)
        axis = torch.linspace(-width, width, number)
        points = there.at(torch.cartesian_prod(*[axis] * k).reshape(-1, k))
        return points, self.density.units_at(self.globals_, points).log_softmax(1)


def moments(points, log_weights):
    """Mean ``(S, N, k)`` and covariance ``(S, N, k, k)``."""
    weights = log_weights.exp().unsqueeze(-1)
    mean = (weights * points).sum(1)
    centered = points - mean.unsqueeze(1)
    return mean, torch.einsum("sqni,sqnj->snij", weights * centered, centered)


def errors(found, exact):
    """Of means, in standard deviations, and of covariances, as shares of the product of these."""
    scale = exact[1].diagonal(dim1=-2, dim2=-1).sqrt()
    products = scale.unsqueeze(-1) * scale.unsqueeze(-2)
    return float(((found[0] - exact[0]) / scale).abs().max()), float(((found[1] - exact[1]) / products).abs().max())


# -------------------------------------------------------------------------------------------------------------- points


def one_each(units, globals_, random):
    """One draw of the units at each of the globals."""
    return units.draw(globals_, torch.arange(len(globals_)), random)


@pytest.mark.parametrize("which", [LinearUnits, NestedUnits, WeightedUnits])
@pytest.mark.parametrize(
    "name", ["normal", "poisson_by_visit", "binomial_slopes", "categorical_probs", "crossed_items"]
)
def test_shapes(name, which):
    setting = Setting(name, num_globals=3)
    points, log_weights = setting.units(which).points(setting.globals_)
    n, k = setting.gaussian.local_loc.shape
    assert points.shape == (3, log_weights.shape[1], n, k)
    assert log_weights.shape[::2] == (3, n)
    torch.testing.assert_close(log_weights.exp().sum(1), torch.ones(3, n))
    assert one_each(setting.units(which), setting.globals_, generator()).shape == (3, n, k)
    assert setting.units(which).chunk() >= 1


@pytest.mark.parametrize("name", ["poisson_by_visit", "binomial_slopes", "nested_latents", "dim_minus_three"])
def test_linear_units_are_those_of_the_dense_gaussian(name):
    """The conditional of a normal distribution, from its whole precision; of k = 5 the points are not exact."""
    setting = Setting(name)
    d, (n, k) = len(setting.gaussian.global_loc), setting.gaussian.local_loc.shape
    precision = setting.gaussian.precision.to_dense()
    covariance = torch.linalg.inv(precision[d:, d:])
    shift = -(setting.globals_ - setting.gaussian.global_loc) @ (covariance @ precision[d:, :d]).mT
    each = torch.stack([covariance[i * k : (i + 1) * k, i * k : (i + 1) * k] for i in range(n)])
    exact = setting.gaussian.local_loc + shift.unflatten(-1, (n, k)), each.expand(2, -1, -1, -1)
    found = moments(*setting.units(LinearUnits).points(setting.globals_))
    assert max(errors(found, exact)) < (1e-9 if k <= 3 else 0.1)


def test_normal_units_in_closed_form():
    setting = Setting("normal")
    sites, z = setting.gaussian.constrained_globals(setting.globals_), setting.problem.unit_model.args[0]
    mu, tau = (sites[name].unsqueeze(-1) for name in ("mu", "tau"))
    precision = (1 / tau**2 + 4).expand(2, len(z))
    exact = ((mu / tau**2 + 4 * z) / precision).unsqueeze(-1), (1 / precision)[..., None, None]
    for which, rule in ((NestedUnits, ()), (WeightedUnits, ()), (WeightedUnits, (StudentPoints(512),))):
        found = moments(*setting.units(which, *rule).points(setting.globals_))
        assert max(errors(found, exact)) < (1e-6 if rule else 1e-10)


@pytest.mark.parametrize("name", ["poisson_by_visit", "student_t", "binomial_slopes", "categorical_probs"])
def test_nested_units_stand_at_the_mode_with_the_curvature_there(name):
    setting = Setting(name)
    mean, covariance = moments(*setting.units(NestedUnits).points(setting.globals_))
    gradient, information = setting.bends(mean)
    assert (gradient.unsqueeze(-2) @ torch.linalg.cholesky(covariance)).abs().max() < 1e-6
    torch.testing.assert_close(torch.linalg.inv(covariance), information, rtol=1e-6, atol=1e-8)


FINE = StudentPoints(256)
# The rule, and what the moments may be off.
WEIGHTED = {
    "poisson_by_visit": [(GaussHermite(9), 1e-3), (FINE, 1e-6)],
    "bernoulli_answers": [(GaussHermite(9), 1e-4), (FINE, 1e-6)],
    "student_t": [(GaussHermite(9), 0.05), (FINE, 1e-4)],
    "gamma_rates": [(GaussHermite(9), 2e-3), (FINE, 1e-6)],
    "binomial_slopes": [(GaussHermite(9), 1e-3), (StudentPoints(4096), 0.01)],
    "level_and_spread": [(GaussHermite(9), 0.06), (GaussHermite(25), 0.01)],
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_weighted_units_have_the_moments_of_the_density(name):
    setting = Setting(name)
    dense = (30.0, 4001) if setting.gaussian.local_loc.shape[1] == 1 else (10.0, 201)
    exact = moments(*setting.grid(setting.units(WeightedUnits), *dense))
    for rule, tolerance in WEIGHTED[name]:
        found = moments(*setting.units(WeightedUnits, rule).points(setting.globals_))
        assert max(errors(found, exact)) < tolerance
    nested = moments(*setting.units(NestedUnits).points(setting.globals_))
    assert max(errors(nested, exact)) > 0.05  # so that there is something to correct


# --------------------------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize(
    ("name", "which", "number"),
    [
        ("poisson_by_visit", LinearUnits, 20_000),
        ("binomial_slopes", LinearUnits, 20_000),
        ("dim_minus_three", LinearUnits, 20_000),
        ("poisson_by_visit", NestedUnits, 5000),
        ("binomial_slopes", NestedUnits, 5000),
        ("poisson_by_visit", WeightedUnits, 5000),
        ("bernoulli_answers", WeightedUnits, 5000),
        ("binomial_slopes", WeightedUnits, 2000),
    ],
)
def test_draws_have_the_moments_of_the_points(name, which, number):
    """At as many globals as draws, each standardized by the moments there; and units are independent of each other."""
    setting = Setting(name, number)
    units = setting.units(which)
    chunks = setting.globals_.split(min(units.chunk(), 1000))
    whitened, random = [], generator()
    for some in chunks:
        mean, covariance = moments(*units.points(some))
        off = one_each(units, some, random) - mean
        if setting.gaussian.local_loc.shape[1] > 3:  # whose points are not exact
            covariance = torch.linalg.inv(setting.gaussian.precision.tail)
            off = one_each(units, some, random) - units._conditionals(some).mode
        root = torch.linalg.cholesky(covariance).expand(len(some), -1, -1, -1)
        whitened.append(torch.linalg.solve_triangular(root, off.unsqueeze(-1), upper=False).flatten(1))
    z = torch.cat(whitened)
    products = z.unsqueeze(-1) * z.unsqueeze(-2) - torch.eye(z.shape[1])
    for statistic in (z, products.flatten(1)):
        assert (statistic.mean(0).abs() < LIMIT * statistic.std(0) / number**0.5).all()


def largest_difference(units, setting, number=8000):
    """Of distribution functions of every coordinate of every unit, at the first globals; and the limit for it."""
    setting.globals_ = setting.globals_[:1]
    k = setting.gaussian.local_loc.shape[1]
    points, log_weights = setting.grid(units, *((15.0, 4001) if k == 1 else (8.0, 241)))
    random, size = generator(), min(units.chunk(), 1000)
    draws = torch.cat([one_each(units, setting.globals_.expand(size, -1), random) for _ in range(number // size)])
    worst = 0.0
    for unit, axis in numpy.ndindex(*draws.shape[1:]):
        values, index = numpy.unique(points[0, :, unit, axis].numpy().round(9), return_inverse=True)
        mass = numpy.bincount(index, log_weights[0, :, unit].exp().numpy())
        found = numpy.sort(draws[:, unit, axis].numpy())
        exact = numpy.interp(found, values, mass.cumsum() - mass / 2)  # half of what lies at a value is below it
        steps = numpy.arange(len(draws) + 1) / len(draws)
        worst = max(worst, (exact - steps[:-1]).max(), (steps[1:] - exact).max())
    return worst, math.sqrt(math.log(2 / 1e-7) / 2 / len(draws))


@pytest.mark.parametrize("name", ["poisson_by_visit", "bernoulli_answers", "student_t", "level_and_spread"])
def test_weighted_draws_follow_the_density(name):
    setting = Setting(name)
    worst, limit = largest_difference(setting.units(WeightedUnits), setting)
    assert worst < limit


def test_normal_draws_around_the_mode_would_not():
    setting = Setting("poisson_by_visit")
    worst, limit = largest_difference(setting.units(NestedUnits), setting)
    assert worst > limit


def test_draws_by_wrong_weights_are_found(monkeypatch):
    """Planted: candidates are chosen by the density alone, however many of them lie there."""
    setting = Setting("poisson_by_visit")
    monkeypatch.setattr(unit_draws, "_t2_log_density", lambda points: 0 * points[..., 0])
    worst, limit = largest_difference(setting.units(WeightedUnits), setting)
    assert worst > limit


@pytest.mark.parametrize("which", [LinearUnits, NestedUnits, WeightedUnits])
def test_seeds(which):
    setting = Setting("binomial_slopes")
    units, state = setting.units(which), torch.get_rng_state()
    one, same, other = (one_each(units, setting.globals_, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, same)
    assert (one != other).all()


# ------------------------------------------------------------------------------------------------------ without a model


def at_will(units, local_dim=1, num_units=2):
    """Weighted units of any terms, with one global at zero."""

    def shared(theta, y):
        return y.new_zeros(())

    loc = torch.zeros(num_units, local_dim)
    precision = SimpleNamespace(conditional_mean=lambda deviation: deviation.unsqueeze(-1) * 0 + loc)
    gaussian = SimpleNamespace(local_loc=loc, global_loc=torch.zeros(1), precision=precision)
    return WeightedUnits(gaussian, UnitIntegrals(SeparableDensity(shared, units)))


def truncated(value):
    def units(theta, y):
        return torch.where(y[:, 0] < 1.0, -((y[:, 0] - theta[0]) ** 2) / 2, torch.full_like(y[:, 0], value))

    return at_will(units)


@pytest.mark.parametrize(
    "value",
    [
        -math.inf,
        math.nan,
    ],
)
def test_nothing_is_drawn_where_there_is_no_density(value):
    """A normal that ends at 1: its mean is -phi(1) / Phi(1)."""
    units = truncated(value)
    draws = one_each(units, torch.zeros(500, 1), generator())
    assert draws.max() < 1.0
    assert float(draws.mean()) == pytest.approx(-0.2876, abs=LIMIT * 0.8 / 1000**0.5)


def test_single_precision():
    units = at_will(lambda theta, y: -((y - theta) ** 2).sum(-1) / 2, local_dim=2)
    expected = one_each(units, torch.zeros(3, 1), generator())
    units = at_will(lambda theta, y: -((y - theta) ** 2).sum(-1) / 2, local_dim=2)
    for name in ("local_loc", "global_loc"):
        setattr(units.gaussian, name, getattr(units.gaussian, name).float())
    units.gaussian.precision.conditional_mean = lambda deviation: torch.zeros(len(deviation), 2, 2).float()
    draws = one_each(units, torch.zeros(3, 1).float(), generator())
    assert draws.dtype == torch.float32
    torch.testing.assert_close(draws.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("number", "dim"), [(16, 1), (64, 3), (64, 4), (64, 6)])
def test_candidates_are_evenly_spread(number, dim):
    """In every coordinate, no gap is more than eight times that of an equal spacing."""
    points = _evenly_spread(number, dim)
    assert points.shape == (number, dim)
    assert (points >= 0).all()
    assert (points < 1).all()
    ordered = numpy.sort(points, axis=0)
    gaps = numpy.diff(numpy.concatenate([ordered, ordered[:1] + 1]), axis=0)
    assert gaps.max() < (1.001 if dim == 1 else 8) / number
    assert len(numpy.unique(points.round(9), axis=0)) == number
