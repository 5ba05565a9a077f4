"""What all points add to one, as a polynomial through some of the draws: where it holds, and where it does not."""

from types import SimpleNamespace

import numpy
import pytest
import torch
from helpers.fit_models import guide_for
from helpers.unit_models import UNIT_MODELS

from laplace_amort import Ladder, fit
from laplace_amort.posterior import marginal as module
from laplace_amort.posterior.marginal import MarginalDensity, log_densities
from laplace_amort.posterior.unit_draws import WeightedUnits
from laplace_amort.units import Conditionals, GaussHermite, Laplace
from laplace_amort.units.points import matched_normal

D = 2


class Planted:
    """Units of a density that is known: one point gives a normal, all points something more."""

    def __init__(self, monkeypatch, correction, dim=D):
        precision = SimpleNamespace(global_scale_tril=torch.eye(dim))
        self.gaussian = SimpleNamespace(local_loc=torch.zeros(3, 1), global_loc=torch.zeros(dim), precision=precision)
        self.how, self.correction, self.exact = GaussHermite(9), correction, 0
        monkeypatch.setattr(module, "log_densities", self.log_densities)

    def conditionals(self, globals_):
        ones = torch.ones(len(globals_), 3)
        return Conditionals(ones[..., None], ones[..., None, None], ones > 0)

    def log_densities(self, units, rule, globals_, there):
        assert units is self
        assert len(globals_) == len(there.mode)
        z = globals_.numpy()
        if isinstance(rule, Laplace):
            return -(z**2).sum(1) / 2
        self.exact += len(z)
        return self.right(z)

    def right(self, z):
        return -(z**2).sum(1) / 2 + self.correction(z)


def quadratic(z):
    return 3 - z[:, 0] + 0.5 * z[:, 0] * z[:, 1] + 0.2 * z[:, 1] ** 2


def wavy(z):
    return 0.5 * numpy.sin(4 * z[:, 0])


def test_a_polynomial_is_found(monkeypatch):
    planted = Planted(monkeypatch, quadratic)
    density = MarginalDensity(planted)
    for seed, number in enumerate((256, 128)):
        z = matched_normal(number, D, seed)
        numpy.testing.assert_allclose(density(z), planted.right(z), rtol=0, atol=1e-10)
    assert planted.exact < 60


def test_what_is_no_polynomial_has_all_points(monkeypatch):
    planted = Planted(monkeypatch, wavy)
    density = MarginalDensity(planted)
    z = matched_normal(256, D, 0)
    assert numpy.array_equal(density(z), planted.right(z))
    seen = planted.exact
    assert numpy.array_equal(density(z[:64]), planted.right(z[:64]))
    assert planted.exact == seen + 64  # and is not looked at for a polynomial again


def test_a_polynomial_that_fails_elsewhere_is_not_used_there(monkeypatch):
    def kinked(z):
        return quadratic(z) + numpy.where(z[:, 0] > 4, -2.0 * (z[:, 0] - 4), 0.0)

    planted = Planted(monkeypatch, lambda z: kinked(z) + 40 * (z[:, 0] > 4))
    density = MarginalDensity(planted)
    z = matched_normal(256, D, 0)
    z = z[numpy.abs(z[:, 0]) < 3.5]
    numpy.testing.assert_allclose(density(z), planted.right(z), rtol=0, atol=1e-10)
    far = matched_normal(64, D, 1) + numpy.array([7.0, 0.0])
    assert numpy.array_equal(density(far), planted.right(far))


def test_what_has_no_weight_does_not_count(monkeypatch):
    planted = Planted(monkeypatch, lambda z: quadratic(z) + numpy.where(z[:, 0] > 8, 1.0, 0.0))
    density = MarginalDensity(planted)
    density(matched_normal(256, D, 0))
    seen = planted.exact
    density(matched_normal(64, D, 1) + numpy.array([12.0, 0.0]))  # where the density is e^-60 of what it is here
    assert planted.exact == seen + 16


def test_a_polynomial_does_not_outgrow_a_slow_tail(monkeypatch):
    """Squares hold where the draws are; far out, where none of those tried is, they must not make mass of nothing."""
    planted = Planted(monkeypatch, lambda z: 0.3 * numpy.minimum(z[:, 0] ** 2, 16.0))
    density = MarginalDensity(planted)
    density(matched_normal(256, D, 0))
    near, far = matched_normal(64, D, 1), numpy.array([[40.0, 0.0]])
    value = density(numpy.concatenate([near, far]))[-1]
    one_point = -800.0
    assert value - one_point < 0.3 * 6.0**2
    assert density._polynomial.coefficients.max() > 0.25


def test_lost_modes_are_nan(monkeypatch):
    planted = Planted(monkeypatch, lambda z: numpy.where(z[:, 1] > 2, numpy.nan, quadratic(z)))
    original = planted.log_densities

    def lost(units, rule, globals_, there):
        return numpy.where(globals_[:, 1].numpy() > 2, numpy.nan, original(units, rule, globals_, there))

    monkeypatch.setattr(module, "log_densities", lost)
    z = matched_normal(256, D, 0)
    numpy.testing.assert_allclose(MarginalDensity(planted)(z), planted.right(z), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("number", "dim"), [(20, 2), (256, 0)])
def test_few_draws_and_no_globals_are_direct(number, dim, monkeypatch):
    planted = Planted(monkeypatch, lambda z: 0.1 * z.sum(1), dim)
    z = numpy.random.default_rng(0).normal(size=(number, dim))
    assert numpy.array_equal(MarginalDensity(planted)(z), planted.right(z))
    assert planted.exact == number


@pytest.mark.parametrize("dim", [3, 9, 27])
def test_products(dim):
    found = module._products(dim)
    assert len(set(found)) == len(found) <= 2 * dim + 1 + 45
    assert () in found
    assert all((i,) in found and (i, i) in found for i in range(dim))
    assert ((0, 1) in found) == (dim < 9)


@pytest.mark.parametrize("name", ["binomial_slopes", "bernoulli_answers"])
def test_it_is_the_density_by_all_points(name):
    """Of real models: as exact as what draws do not feel, and the evidence with it."""
    case = UNIT_MODELS[name]()
    result = fit(case.model, guide_for(case.model), *case.args, objective=Ladder(), progress=False)
    gaussian = result.gaussian
    units = WeightedUnits(gaussian, result.problem.integrals, GaussHermite(9))
    tril = gaussian.precision.global_scale_tril.numpy()
    draws = gaussian.global_loc.numpy() + matched_normal(512, len(tril), 0) @ tril.T
    there = units.conditionals(torch.from_numpy(draws))
    exact = log_densities(units, units.how, torch.from_numpy(draws), there)
    density = MarginalDensity(units)
    found = density(draws)
    assert density._polynomial is not None
    assert numpy.sqrt(((found - exact) ** 2).mean()) < 0.06
    assert abs((found - exact).mean()) < 0.02
