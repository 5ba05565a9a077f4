"""Importance sampling against integrals that are known.

Draws are quasi-random of given seeds: nothing here differs from run to run.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy
import pytest
import scipy.special
import scipy.stats
import torch

from laplace_amort.posterior import importance as room
from laplace_amort.posterior.importance import ImportanceSampler, _Mixture
from laplace_amort.posterior.psis import K_GOOD
from laplace_amort.posterior.weighted import ImportanceSample, normal_sample

# ------------------------------------------------------------------------------------------------------ known integrals


class Density(NamedTuple):
    """A log density of draws ``(S, d)`` up to a constant, where to start, and what is true of it."""

    log_density: Any
    loc: Any
    scale_tril: Any
    mean: Any
    covariance: Any
    log_integral: float

    def draw(self, seed=0, **options):
        return ImportanceSampler(seed=seed, **options)(self.log_density, self.loc, self.scale_tril)

    def error(self, found):
        """Of the worst moment, in the unit of the estimate of it."""
        scale = numpy.sqrt(numpy.diag(self.covariance))
        means = (found.mean() - self.mean) / scale
        scales = numpy.sqrt(numpy.diag(found.covariance())) / scale - 1
        return numpy.abs(numpy.concatenate([means, scales])).max()


def normal(d):
    eye = numpy.eye(d)
    log_integral = d / 2 * math.log(2 * math.pi)
    return Density(lambda x: -(x**2).sum(-1) / 2, numpy.zeros(d), eye, numpy.zeros(d), eye, log_integral)


def correlated():
    """Start beside the mean, with the scale of another normal."""
    root = numpy.array([[2.0, 0.0], [1.5, 0.5]])
    log_integral = math.log(2 * math.pi) + math.log(2.0 * 0.5)
    return Density(
        lambda x: -(numpy.linalg.solve(root, (x - 1).T) ** 2).sum(0) / 2,
        *(numpy.array([1.3, 1.3]), numpy.eye(2), numpy.ones(2), root @ root.T, log_integral),
    )


def log_gamma(a):
    """The logarithm of a Gamma variable."""
    moments = numpy.array([scipy.special.digamma(a)]), numpy.array([[scipy.special.polygamma(1, a)]])
    start = numpy.array([math.log(a)]), numpy.array([[a**-0.5]])
    return Density(lambda x: (a * x - numpy.exp(x)).sum(-1), *start, *moments, scipy.special.gammaln(a))


def student(df, d):
    gammas = scipy.special.gammaln(df / 2) - scipy.special.gammaln((df + d) / 2)
    return Density(
        lambda x: -(df + d) / 2 * numpy.log1p((x**2).sum(-1) / df),
        *(numpy.zeros(d), numpy.eye(d) * (df / (df + d)) ** 0.5, numpy.zeros(d), df / max(df - 2, 1) * numpy.eye(d)),
        log_integral=gammas + d / 2 * math.log(df * math.pi),
    )


def skewed(slant, mode, scale):
    """Skew normal, with its mode and the scale of the curvature there."""
    law = scipy.stats.skewnorm(slant)
    start = numpy.array([mode]), numpy.array([[scale]])
    return Density(lambda x: law.logpdf(x[:, 0]), *start, numpy.array([law.mean()]), numpy.array([[law.var()]]), 0.0)


DENSITIES = {
    "normal 1": normal(1),
    "normal 2": normal(2),
    "normal 5": normal(5),
    "correlated": correlated(),
    "log-gamma 1": log_gamma(1.0),
    "log-gamma 3": log_gamma(3.0),
    "Student 5": student(5.0, 1),
    "Student 10": student(10.0, 2),
    "skewed": skewed(2.0, 0.49, 0.63),
    "very skewed": skewed(6.0, 0.34, 0.4),
}
SEEDS = range(5)


@pytest.mark.parametrize("name", DENSITIES)
def test_moments_and_integral(name):
    density = DENSITIES[name]
    for seed in SEEDS:
        found = density.draw(seed)
        assert density.error(found) < 0.06
        assert found.log_integral == pytest.approx(density.log_integral, abs=0.03)
        assert found.k_hat < K_GOOD
        assert found.num_lost == 0


@pytest.mark.parametrize("name", DENSITIES)
def test_the_error_is_honest(name):
    """Never above four times what is told, and what is told is what was asked for."""
    density = DENSITIES[name]
    for seed in SEEDS:
        found = density.draw(seed)
        assert density.error(found) <= 4 * found.error + 1e-12
        assert found.error <= ImportanceSampler().accuracy or len(found.draws) == 8192


@pytest.mark.parametrize("name", ["normal 2", "log-gamma 3", "correlated"])
def test_off_diagonals_and_weights(name):
    density, found = DENSITIES[name], DENSITIES[name].draw(accuracy=0.01)
    numpy.testing.assert_allclose(found.covariance(), density.covariance, atol=0.05 * density.covariance.max())
    assert found.weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert found.effective == pytest.approx(1 / (found.weights**2).sum())
    assert 1 <= found.effective <= len(found.draws) * (1 + 1e-9)


def test_more_accuracy_takes_more_draws():
    density = student(10.0, 2)
    numbers = []
    for accuracy in (0.1, 0.03, 0.005):
        found = density.draw(accuracy=accuracy, max_draws=2**15)
        assert found.error <= accuracy
        numbers.append(len(found.draws))
    assert numbers[0] <= numbers[1] < numbers[2]


def test_start_that_is_far_and_wide():
    density = normal(2)._replace(loc=numpy.full(2, 10.0), scale_tril=10 * numpy.eye(2))
    found = density.draw()
    assert found.k_hat < K_GOOD
    assert density.error(found) < 0.06


def test_start_that_is_too_narrow():
    density = normal(2)._replace(scale_tril=0.1 * numpy.eye(2))
    found = density.draw()
    assert found.k_hat < K_GOOD
    assert density.error(found) < 0.06


@pytest.mark.parametrize("d", [1, 2, 3])
def test_tails_that_are_too_heavy_are_told(d):
    """A Cauchy density has no moments, whatever the proposal; the mass alone is found."""
    density = student(1.0, d)
    found = density.draw()
    assert found.k_hat > K_GOOD or found.error > 0.03
    assert len(found.draws) == 8192
    assert found.log_integral == pytest.approx(density.log_integral, abs=0.1)


def test_a_start_that_misses_the_mass_is_told():
    found = normal(2)._replace(loc=numpy.full(2, 10.0)).draw()
    assert found.k_hat > K_GOOD


# ----------------------------------------------------------------------------------------------------- no density there


def test_half_of_the_space_without_a_density():
    """The rest is a half normal, and draws that are lost have no weight."""
    d = normal(2)
    found = d._replace(log_density=lambda x: numpy.where(x[:, 0] < 0, numpy.nan, d.log_density(x))).draw()
    assert found.num_lost == (found.draws[:, 0] < 0).sum() > 0
    assert found.weights[found.draws[:, 0] < 0].max() < 1e-300
    assert found.k_hat < K_GOOD
    assert found.log_integral == pytest.approx(math.log(math.pi), abs=0.03)
    numpy.testing.assert_allclose(found.mean(), [math.sqrt(2 / math.pi), 0.0], atol=0.06)


def test_a_start_without_a_density():
    d = normal(1)
    nowhere = d._replace(log_density=lambda x: numpy.where(abs(x[:, 0]) < 0.1, numpy.nan, d.log_density(x)))
    found = nowhere.draw()
    assert found.num_lost > 0
    assert math.exp(found.log_integral - d.log_integral) == pytest.approx(1 - math.erf(0.1 / math.sqrt(2)), abs=0.03)


@pytest.mark.parametrize("value", [numpy.nan, -numpy.inf, numpy.inf])
def test_no_density_at_all(value):
    found = normal(2)._replace(log_density=lambda x: numpy.full(len(x), value)).draw(max_draws=256)
    assert found.k_hat == found.error == math.inf
    assert found.effective == 0
    assert found.log_integral == -math.inf
    assert found.num_lost == (256 if math.isnan(value) else 0)
    assert numpy.isfinite(found.mean()).all()


def test_no_dimension():
    calls = []

    def log_density(draws):
        calls.append(draws.shape)
        return numpy.array([3.0])

    found = ImportanceSampler()(log_density, numpy.zeros(0), numpy.zeros((0, 0)))
    assert calls == [(1, 0)]
    assert found.log_integral == 3.0
    assert (found.k_hat, found.effective, found.error) == (-math.inf, 1.0, 0.0)
    assert found.weights.tolist() == [1.0]
    assert found.mean().shape == (0,)
    assert found.covariance().shape == (0, 0)


# -------------------------------------------------------------------------------------------------------------- manners


def test_seeds():
    numpy.random.seed(0)  # noqa: NPY002 (the one that must stay as it is)
    before, torchs = numpy.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    one, same, other = (normal(2).draw(seed) for seed in (3, 3, 4))
    assert numpy.array_equal(numpy.random.get_state()[1], before)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torchs)
    assert numpy.array_equal(one.draws, same.draws)
    assert numpy.array_equal(one.log_weights, same.log_weights)
    assert one.error == same.error
    assert not numpy.isin(other.draws, one.draws).any()


def test_no_two_rounds_have_the_same_draws():
    found = student(10.0, 2).draw(accuracy=1e-9, max_draws=1024)
    assert len(numpy.unique(found.draws, axis=0)) == 1024


ALLOWED = [
    (128, 128),
    (128, 129),
    (128, 200),
    (16, 128),
    (8, 8),
    (128, 100),
]


@pytest.mark.parametrize(("num_draws", "max_draws"), ALLOWED)
def test_there_are_no_more_draws_than_allowed(num_draws, max_draws):
    """But for looks along the axes, at 29 points of two dimensions."""
    evaluated, density = [], student(10.0, 2)

    def log_density(draws):
        evaluated.append(len(draws))
        return density.log_density(draws)

    found = density._replace(log_density=log_density).draw(accuracy=1e-9, num_draws=num_draws, max_draws=max_draws)
    assert len(found.draws) == max_draws
    assert sum(number for number in evaluated if number != 29) == max_draws


@pytest.mark.parametrize("d", [1, 3])
def test_normal_draws(d):
    loc, root = numpy.arange(1.0, d + 1), numpy.tril(numpy.ones((d, d))) / 2
    found = normal_sample(loc, root, num_draws=1024, seed=2)
    numpy.testing.assert_allclose(found.mean(), loc, atol=0.01)
    numpy.testing.assert_allclose(found.covariance(), root @ root.T, atol=0.03)
    numpy.testing.assert_allclose(found.weights, 1 / 1024)
    assert (found.k_hat, found.effective, found.error, found.num_lost) == (-math.inf, 1024, 0.0, 0)
    assert math.isnan(found.log_integral)
    assert numpy.array_equal(normal_sample(loc, root, seed=2).draws, found.draws)
    assert not numpy.isin(normal_sample(loc, root, seed=3).draws, found.draws).any()


def test_normal_draws_of_no_dimension():
    found = normal_sample(numpy.zeros(0), numpy.zeros((0, 0)), num_draws=16)
    assert found.draws.shape == (1, 0)
    assert found.weights.tolist() == [1.0]


# --------------------------------------------------------------------------------------------------------- planted bugs


def test_rounds_weighed_by_their_last_proposal_are_found(monkeypatch):
    monkeypatch.setattr(_Mixture, "log_density", lambda self, draws: self.proposals[-1].log_density(draws))
    density = correlated()
    errors = [abs(density.draw(seed).log_integral - density.log_integral) for seed in SEEDS]
    assert max(errors) > 0.03


def test_draws_on_a_line_keep_the_scale_of_the_curvature(monkeypatch):
    """As of globals that are not identified, whose curvature is rounding errors: it is said, and nothing is raised."""
    draws = numpy.tile([[2.0, 2.0], [-2.0, -2.0]], (4, 1))
    line = replace(normal_sample(numpy.zeros(2), numpy.eye(2), 8), draws=draws)
    tril, note = room._spread(line, numpy.zeros((2, 2)))
    assert (tril == 0).all()
    assert "do not spread in every direction" in note
    # In a later round there is a factor, made of rounding errors perhaps: what was said is kept.
    first = iter([(numpy.eye(2), note)])
    spread = room._spread
    monkeypatch.setattr(room, "_spread", lambda found, tril: next(first, None) or spread(found, tril))
    found = normal(2)._replace(log_density=lambda x: -3 * numpy.abs(x[:, 0] * x[:, 1]) - x[:, 0] ** 2 / 50).draw()
    assert found.note == note
    assert numpy.isfinite(found.draws).all()


def test_draws_in_every_direction_need_no_note():
    assert normal(2).draw().note == ""


# ---------------------------------------------------------------------------------- other densities, and more draws


def test_draws_of_another_density():
    """Draws of a standard normal as those of one with its mean at 0.3; the error is about the change that there is."""
    sampler = ImportanceSampler(num_draws=1024)
    found = sampler(lambda x: -(x**2).sum(-1) / 2, numpy.zeros(2), numpy.eye(2))
    other = found.reweighted(0.3 * found.draws[:, 0] - 0.045)
    numpy.testing.assert_allclose(other.mean(), [0.3, 0.0], atol=0.02)
    numpy.testing.assert_allclose(other.covariance(), numpy.eye(2), atol=0.1)
    assert numpy.isclose(other.weights.sum(), 1)
    assert numpy.isclose(other.log_integral, found.log_integral, atol=0.01)
    assert 0.001 < other.error < 0.1
    assert other.effective < found.effective
    same = found.reweighted(numpy.full(len(found.draws), 5.0))
    assert same.error < 1e-12
    assert numpy.isclose(same.log_integral, found.log_integral + 5)


def test_draws_that_another_density_does_not_have():
    found = ImportanceSampler()(lambda x: -(x**2).sum(-1) / 2, numpy.zeros(1), numpy.eye(1))
    other = found.reweighted(numpy.where(found.draws[:, 0] > 0, numpy.nan, 0.0))
    assert other.num_lost == int((found.draws[:, 0] > 0).sum())
    assert (other.weights[found.draws[:, 0] > 0] == 0).all()


@pytest.mark.parametrize("error", [0.034, 0.04, 0.1, numpy.inf])
@pytest.mark.parametrize("so_far", [128, 576, 4096])
def test_rounds_are_powers_of_two(error, so_far):
    """And no longer than all rounds before: the next proposal may be better."""
    sampler = ImportanceSampler()
    draws = numpy.zeros((so_far, 1))
    found = ImportanceSample(draws, numpy.zeros(so_far), 0.1, so_far / 2, error, 0.0, 0)
    missing = sampler._missing(found)
    assert missing & (missing - 1) == 0
    assert so_far / 8 < missing <= so_far
    if error > 0.05:
        assert missing > so_far / 2
    assert replace(sampler, accuracy=0.0)._missing(found) > so_far / 2


def heavy(x):
    return -2 * numpy.log1p((x**2).sum(-1) / 3)


@pytest.mark.parametrize("log_density", [lambda x: -(x**2).sum(-1) / 2, heavy])
def test_for_as_many(log_density):
    sampler = ImportanceSampler()
    found = sampler(log_density, numpy.zeros(2), numpy.eye(2))
    more = sampler.for_as_many(found, 1000)(log_density, numpy.zeros(2), numpy.eye(2))
    assert 700 < more.effective < 2100
    numpy.testing.assert_allclose(more.mean(), [0.0, 0.0], atol=0.1)


def test_what_is_looked_at_along_the_axes_may_be_rough():
    """The rough density shapes a proposal; what is found is the density itself."""
    asked = []

    def rough(x):
        asked.append(len(x))
        return heavy(x) + 0.3

    sampler = ImportanceSampler(accuracy=0.02)
    found = sampler(heavy, numpy.zeros(2), numpy.eye(2), rough=rough)
    direct = sampler(heavy, numpy.zeros(2), numpy.eye(2))
    assert len(asked) == 1
    assert numpy.array_equal(found.draws, direct.draws)
    assert found.log_integral == direct.log_integral
