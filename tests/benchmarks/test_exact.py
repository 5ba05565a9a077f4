"""The reference posteriors of benchmarks/exact.py against adaptive quadrature, and against themselves."""

import importlib
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import nquad

COUNTS = np.array([[2.0, 5.0, 0.0], [0.0, 3.0, 1.0], [1.0, 4.0, 0.0]])


@pytest.fixture(scope="module")
def exact():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        yield importlib.import_module("exact")


def simulated(exact, units):
    return exact.simulate_poisson(units, np.random.default_rng(0))["z"]


def quadrature(integrand, windows, tolerance):
    return nquad(integrand, windows, opts={"epsabs": 0.0, "epsrel": tolerance})[0]


def test_one_unit_agrees_with_adaptive_quadrature(exact):
    # With mu in closed form, where the reference integrates over mu by quadrature.
    z = COUNTS[:, 1]
    constant = sum(math.lgamma(count + 1) for count in z) + math.log(2 * math.pi)

    def joint(y, log_tau):
        variance = 9 + math.exp(2 * log_tau)
        log_prior = -(y**2 / variance + math.log(variance) + log_tau**2) / 2
        return math.exp(log_prior + y * z.sum() - len(z) * math.exp(y) - constant)

    def expectation(fn):
        return quadrature(lambda y, log_tau: fn(y, log_tau) * joint(y, log_tau), [(-5.0, 4.0), (-6.0, 6.0)], 1e-9)

    found = exact.poisson_posterior(z[:, None])
    evidence = expectation(lambda y, log_tau: 1.0)
    assert found.log_evidence == pytest.approx(math.log(evidence), abs=1e-7)
    # The mean and the variance of mu given the rest.
    mu = expectation(lambda y, log_tau: 9 * y / (9 + math.exp(2 * log_tau))) / evidence
    np.testing.assert_allclose(found.mean["mu"], mu, atol=1e-6)
    mu_square = expectation(
        lambda y, log_tau: (9 * y / (9 + math.exp(2 * log_tau))) ** 2 + 1 / (1 / 9 + math.exp(-2 * log_tau))
    )
    np.testing.assert_allclose(found.sd["mu"], math.sqrt(mu_square / evidence - mu**2), atol=1e-6)
    for name, pick in (("y", 0), ("log_tau", 1)):
        mean, square = (expectation(lambda *x, k=k, pick=pick: x[pick] ** k) / evidence for k in (1, 2))
        np.testing.assert_allclose(found.mean[name], mean, atol=1e-6)
        np.testing.assert_allclose(found.sd[name], math.sqrt(square - mean**2), atol=1e-6)


def test_three_units_agree_with_adaptive_quadrature(exact):
    # Each y by its standardized deviation from mu, on a grid that is the same for all.
    e, step = np.linspace(-8, 8, 301, retstep=True)
    sums = COUNTS.sum(0)[:, None]
    constant = -(e**2) / 2 - np.log(2 * np.pi) / 2 + np.log(step)

    def expectation(name):
        def integrand(mu, log_tau):
            y = mu + np.exp(log_tau) * e
            weight = np.exp(sums * y - len(COUNTS) * np.exp(y) + constant)
            unit = weight.sum(1)
            fn = {"1": 1.0, "mu": mu, "log_tau": log_tau, "y": (weight[1] @ y) / max(unit[1], 1e-300)}[name]
            log_prior = -((mu / 3) ** 2 + log_tau**2) / 2 - math.log(6 * math.pi)
            return float(fn * unit.prod()) * math.exp(log_prior)

        return quadrature(integrand, [(-12.0, 9.0), (-6.0, 4.0)], 1e-5)

    found = exact.poisson_posterior(COUNTS)
    evidence = expectation("1")
    log_factorials = sum(math.lgamma(count + 1) for count in COUNTS.ravel())
    assert found.log_evidence == pytest.approx(math.log(evidence) - log_factorials, abs=1e-5)
    for name, index in (("mu", ()), ("log_tau", ()), ("y", 1)):
        np.testing.assert_allclose(found.mean[name][index], expectation(name) / evidence, atol=1e-5)


def test_doubled_resolution_changes_nothing(exact):
    z = simulated(exact, 100)
    found, finer = exact.poisson_posterior(z), exact.poisson_posterior(z, resolution=2)
    assert exact.largest_change(found, finer) < 1e-8
    assert found.log_evidence == pytest.approx(finer.log_evidence, abs=1e-8)


def test_grouping_changes_nothing(exact):
    z = simulated(exact, 40)
    found, alone = exact.poisson_posterior(z), exact.poisson_posterior(z, grouped=False)
    assert exact.largest_change(found, alone) < 1e-8
    assert found.log_evidence == pytest.approx(alone.log_evidence, abs=1e-9)


def test_results_are_in_float64_and_of_the_shapes_documented(exact):
    found = exact.poisson_posterior(COUNTS.astype(int))
    for part in (found.mean, found.sd):
        assert {name: value.shape for name, value in part.items()} == {"mu": (), "log_tau": (), "y": (3,)}
        assert all(value.dtype == np.float64 for value in part.values())
