"""Proposals of importance sampling, against numerical integrals of their densities."""

import numpy
import pytest
import scipy.stats

from laplace_amort.posterior import importance, proposals
from laplace_amort.posterior.clusters import SeveralT, clustered
from laplace_amort.posterior.importance import ImportanceSampler, _Mixture
from laplace_amort.posterior.proposals import SplitT, split_along_axes

PROPOSALS = {
    "one dimension": SplitT(numpy.array([0.5]), numpy.array([[2.0]]), numpy.array([[0.5], [3.0]])),
    "two dimensions": SplitT(
        numpy.array([0.5, -1.0]), numpy.array([[2.0, 0.0], [1.0, 0.5]]), numpy.array([[0.5, 2.0], [3.0, 1.0]])
    ),
    "no split": SplitT(numpy.zeros(2), numpy.array([[1.0, 0.0], [-0.8, 0.6]]), numpy.ones((2, 2))),
}


def expectation(proposal, function, log_density=None):
    """By Gauss and Legendre's rule on each quadrant around the location."""
    nodes, weights = numpy.polynomial.legendre.leggauss(120)
    half, jacobian = (1 + nodes) / (1 - nodes), 2 * weights / (1 - nodes) ** 2  # to infinity
    line, mass = numpy.concatenate([-half[::-1], half]), numpy.concatenate([jacobian[::-1], jacobian])
    d = len(proposal.loc)
    z = numpy.stack([axis.reshape(-1) for axis in numpy.meshgrid(*[line] * d, indexing="ij")], axis=-1)
    mass = numpy.stack([axis.reshape(-1) for axis in numpy.meshgrid(*[mass] * d, indexing="ij")], axis=-1).prod(-1)
    draws = proposal.loc + z @ proposal.tril.T
    density = numpy.exp((log_density or proposal.log_density)(draws)) * abs(numpy.linalg.det(proposal.tril))
    return (mass * density) @ function(draws)


def one(draws):
    return numpy.ones(len(draws))


def squashed(draws):
    return numpy.stack([numpy.tanh(draws[:, 0]), numpy.cos(draws[:, -1]), numpy.tanh(draws).prod(-1)], axis=-1)


@pytest.mark.parametrize("name", PROPOSALS)
def test_proposals_integrate_to_one(name):
    assert expectation(PROPOSALS[name], one) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", PROPOSALS)
def test_draws_follow_the_density(name):
    proposal = PROPOSALS[name]
    for seed in range(5):
        averages = squashed(proposal.draw(4096, seed)).mean(0)
        numpy.testing.assert_allclose(averages, expectation(proposal, squashed), atol=5e-3)


def test_draws_on_a_line_follow_the_distribution():
    """Half the mass is on either side, each with its scale."""
    proposal = PROPOSALS["one dimension"]
    draws = numpy.sort(proposal.draw(1024, 0)[:, 0])
    z = (draws - 0.5) / 2
    below = scipy.stats.t(5.0).cdf(z / numpy.where(z < 0, 0.5, 3.0))
    assert abs(below - (numpy.arange(1024) + 0.5) / 1024).max() < 0.002


def test_a_mixture_integrates_to_one():
    first, second = PROPOSALS["two dimensions"], PROPOSALS["no split"]
    mixture = _Mixture([first, second], [numpy.zeros((128, 2)), numpy.zeros((384, 2))], [])
    found = expectation(first, one, mixture.log_density)
    assert found == pytest.approx(1.0, abs=5e-3)  # the second has its jumps elsewhere
    shares = expectation(first, squashed) / 4 + expectation(second, squashed) * 3 / 4
    numpy.testing.assert_allclose(expectation(first, squashed, mixture.log_density), shares, atol=5e-3)


def test_halves_have_the_scales_of_the_density():
    """Of two halves of normals, however these scales lie; within a half and four times of those that are given."""
    loc, tril = numpy.array([1.0, -2.0]), numpy.array([[0.5, 0.0], [0.3, 2.0]])
    halves = numpy.array([[0.7, 0.1], [1.6, 9.0]])

    def log_density(x):
        z = numpy.linalg.solve(tril, (x - loc).T).T
        return -((z / numpy.where(z < 0, *halves)) ** 2).sum(-1) / 2

    proposal = split_along_axes(log_density, loc, tril)
    numpy.testing.assert_allclose(proposal.stretch, [[0.7, 0.5], [1.6, 4.0]], rtol=1e-9)
    assert proposal.loc is loc
    assert proposal.tril is tril


@pytest.mark.parametrize("value", [numpy.nan, 0.0, numpy.inf])
def test_a_density_that_does_not_fall_off_says_nothing(value):
    proposal = split_along_axes(lambda x: numpy.full(len(x), value), numpy.zeros(2), numpy.eye(2))
    assert (proposal.stretch == 1.0).all()


# --------------------------------------------------------------------------------------------------------- planted bugs


def without_jacobian(self, draws):
    z = numpy.linalg.solve(self.tril, (draws - self.loc).T).T
    log_det = numpy.log(numpy.diag(self.tril)).sum()
    return proposals.student_log_density(z / numpy.where(z < 0, *self.stretch), 5.0) - log_det


def test_halves_without_their_jacobian_are_found(monkeypatch):
    law = scipy.stats.skewnorm(6.0)
    monkeypatch.setattr(SplitT, "log_density", without_jacobian)
    assert abs(expectation(PROPOSALS["two dimensions"], one) - 1) > 0.5
    assert expectation(PROPOSALS["no split"], one) == pytest.approx(1.0, abs=1e-6)  # which has none
    found = ImportanceSampler()(lambda x: law.logpdf(x[:, 0]), numpy.array([0.34]), numpy.array([[0.4]]))
    assert abs(found.log_integral) > 0.1
    assert abs(found.mean()[0] - law.mean()) > 0.05 * law.std()


# -------------------------------------------------------------------------------------------------------- several parts


def two_parts(share, center):
    """Two normal parts, the second on the diagonal, where nothing along an axis leads to it."""

    def log_density(x):
        parts = [-(x**2).sum(-1) / 2 + numpy.log(1 - share), -((x - center) ** 2).sum(-1) / 2 + numpy.log(share)]
        return numpy.logaddexp(*parts)

    return log_density, share * center, numpy.sqrt(1 + share * (1 - share) * center**2)


def found_of(log_density, seed):
    return ImportanceSampler(seed=seed)(log_density, numpy.zeros(2), numpy.eye(2))


@pytest.mark.parametrize("seed", range(5))
def test_mass_beside_the_axes_is_found(seed):
    log_density, mean, sd = two_parts(0.08, -4.0)
    found = found_of(log_density, seed)
    numpy.testing.assert_allclose(found.mean(), mean, atol=0.05 * sd)
    numpy.testing.assert_allclose(numpy.sqrt(numpy.diag(found.covariance())), sd, rtol=0.05)


def test_mass_beside_the_axes_is_lost_without_a_look_around(monkeypatch):
    log_density, mean, sd = two_parts(0.08, -4.0)
    monkeypatch.setattr(ImportanceSampler, "_hides", lambda *_: False)
    monkeypatch.setattr(importance, "_WIDE", 1.0)
    lost = [found for found in (found_of(log_density, seed) for seed in range(5)) if found.error < 0.05]
    assert any(found.k_hat < 0.7 and abs(found.mean() - mean).max() > 0.1 * sd for found in lost)


def test_a_normal_density_takes_no_more_draws_than_one_round():
    found = found_of(lambda x: -(x**2).sum(-1) / 2, 0)
    assert len(found.draws) == 128
    numpy.testing.assert_allclose(found.mean(), 0.0, atol=1e-12)


def bend(x):
    """Normal around a parabola, with a mean of (1, 0) and variances of 2.25 and 1."""
    return -(x[:, 1] ** 2) / 2 - (x[:, 0] - x[:, 1] ** 2) ** 2 / (2 * 0.25)


def test_a_bend_is_followed_by_parts():
    found = ImportanceSampler()(bend, numpy.zeros(2), numpy.diag([0.5, 1.0]))
    draws, weights = found.draws, found.weights
    tril = numpy.linalg.cholesky(found.covariance())
    several = clustered(draws, weights, found.mean(), tril)
    one = SplitT(found.mean(), tril, numpy.ones((2, 2)))
    effective = []
    for proposal in (several, one):
        drawn = proposal.draw(4096, 5)
        ratio = numpy.exp(bend(drawn) - proposal.log_density(drawn))
        effective.append(ratio.sum() ** 2 / (ratio**2).sum())
    assert effective[0] > 2 * effective[1]


def test_several_parts_integrate_to_one_and_are_drawn_from():
    shares, locs = numpy.array([0.3, 0.7]), numpy.array([[0.0, 1.0], [-2.0, 0.5]])
    trils = numpy.array([[[1.0, 0.0], [0.4, 0.8]], [[0.5, 0.0], [-0.2, 1.5]]])
    several = SeveralT(shares, locs, trils)
    parts = [SplitT(loc, tril, numpy.ones((2, 2))) for loc, tril in zip(locs, trils, strict=True)]
    known = sum(share * expectation(part, squashed) for share, part in zip(shares, parts, strict=True))
    assert sum(s * expectation(p, one) for s, p in zip(shares, parts, strict=True)) == pytest.approx(1.0, abs=1e-6)
    numpy.testing.assert_allclose(squashed(several.draw(8192, 1)).mean(0), known, atol=8e-3)
    mixed = [numpy.log(s) + p.log_density(locs) for s, p in zip(shares, parts, strict=True)]
    numpy.testing.assert_allclose(several.log_density(locs), numpy.logaddexp(*mixed), rtol=1e-12)


@pytest.mark.parametrize("d", [1, 3, 12])
def test_few_draws_make_few_parts(d):
    draws = numpy.random.default_rng(0).normal(size=(30, d))
    several = clustered(draws, numpy.full(30, 1 / 30), numpy.zeros(d), numpy.eye(d))
    assert len(several.shares) == max(30 // (10 * d), 1) + 2  # and two around them
    assert several.shares.sum() == pytest.approx(1.0)
    assert numpy.isfinite(several.log_density(several.draw(64, 0))).all()
