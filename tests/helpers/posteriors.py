"""What tests of posteriors share: fits of models of the table, and moments against those of draws."""

from __future__ import annotations

import functools
import math

import numpy
import scipy.special
import scipy.stats
import torch

from helpers.fit_models import guide_for
from helpers.unit_models import UNIT_MODELS
from laplace_amort import FixedDrawELBO, MarginalLaplace, fit

# Standard errors within which averages of draws are compared.
LIMIT = 5.9


def posterior_of(model, *args, objective=MarginalLaplace(), **kwargs):  # noqa: B008 (never changes)
    return fit(model, guide_for(model), *args, objective=objective, **kwargs).posterior


@functools.cache
def fitted(name, seed=0):
    """By the marginal density, and models that it refuses by the ELBO; tests share a fit, and none changes it."""
    case = UNIT_MODELS[name]()
    guide = guide_for(case.model, unit_plate=case.unit_plate)
    parameters = guide.unit_model(*case.args, **case.kwargs).density.parameters()
    objective = FixedDrawELBO(accuracy=1.0) if parameters else MarginalLaplace()
    return fit(case.model, guide, *case.args, objective=objective, seed=seed, **case.kwargs)


def assert_moments_of_draws(posterior, draws):
    """Means and variances agree with those of draws, but for a hundredth where points stand for an integral."""
    mean, std = posterior.mean(), posterior.std()
    for name, values in draws.items():
        off = values - mean[name]
        for terms, unit in ((off, std[name]), (off**2 - std[name] ** 2, std[name] ** 2)):
            error = LIMIT * terms.std(0) / len(terms) ** 0.5 + 0.01 * unit + 1e-12
            assert (terms.mean(0).abs() <= error).all(), name


def joined(values):
    """All values of the hierarchies of counts in one vector."""
    return torch.cat([values["mu"].reshape(1), values["tau"].reshape(1), values["y"]])


def _over_units(mu, log_tau, z, points):
    """Log density of globals ``(*,)`` of the hierarchy of counts, by sums over each unit; and what these are given."""
    tau, t = numpy.exp(log_tau), numpy.linspace(-7, 7, points)
    y = mu[..., None] + tau[..., None] * t
    log_density = scipy.stats.norm.logpdf(mu, 0, 3) + scipy.stats.norm.logpdf(log_tau, 0, 1)
    firsts, seconds = [], []
    for counts in z.T.numpy():
        terms = scipy.stats.norm.logpdf(t) + counts.sum() * y - 3 * numpy.exp(y)
        terms -= scipy.special.gammaln(counts + 1).sum()
        largest = terms.max(-1, keepdims=True)
        weights = numpy.exp(terms - largest)
        total = weights.sum(-1)
        log_density = log_density + largest[..., 0] + numpy.log(total * (t[1] - t[0]))
        firsts.append((weights * y).sum(-1) / total)
        seconds.append((weights * y**2).sum(-1) / total)
    return log_density, firsts, seconds


def log_marginal_of_counts(theta, z):
    """Log marginal density of ``(mu, log tau)`` in the hierarchy of counts."""
    return float(_over_units(numpy.asarray(theta[0]), numpy.asarray(theta[1]), z, 4001)[0])


def brute_force(z, size=101, points=501):
    """Means and standard deviations of ``(mu, tau, y)`` and log evidence in the hierarchy of counts, by sums."""
    mu, log_tau = numpy.meshgrid(numpy.linspace(-9, 9, size), numpy.linspace(-6, 4.2, size), indexing="ij")
    log_density, firsts, seconds = _over_units(mu, log_tau, z, points)
    log_total = scipy.special.logsumexp(log_density)
    weights, tau = numpy.exp(log_density - log_total), numpy.exp(log_tau)
    mean = torch.tensor([float((weights * part).sum()) for part in (mu, tau, *firsts)])
    square = torch.tensor([float((weights * part).sum()) for part in (mu**2, tau**2, *seconds)])
    cell = (mu[1, 0] - mu[0, 0]) * (log_tau[0, 1] - log_tau[0, 0])
    return mean, (square - mean**2).sqrt(), log_total + math.log(cell)
