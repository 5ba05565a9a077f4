"""The reference posteriors of benchmarks/exact.py against adaptive quadrature, and against themselves."""

import importlib
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import nquad

COUNTS = np.array([[2.0, 5.0], [0.0, 3.0], [1.0, 4.0]])


@pytest.fixture(scope="module")
def exact():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        yield importlib.import_module("exact")


def simulated(exact, units):
    return exact.simulate_poisson(units, np.random.default_rng(0))["z"]


def expectation(z, fn):
    """Integral of the joint density times a function of (mean of mu given the rest, log tau, y...), mu in closed form.

    That differs from the reference, which integrates over mu by quadrature and over each y by itself.
    """
    num_counts, units = z.shape
    sums = z.sum(0).tolist()
    constant = sum(math.lgamma(count + 1) for count in z.ravel()) + (units + 1) / 2 * math.log(2 * math.pi)

    def integrand(*args):
        y, log_tau = args[:-1], args[-1]
        precision, total = math.exp(-2 * log_tau), sum(args[:-1])
        posterior_precision = units * precision + 1 / 9
        mu = precision * total / posterior_precision
        quadratic = precision * sum(v * v for v in y) - posterior_precision * mu**2 + log_tau**2
        log_det = 2 * units * log_tau + math.log(9 * posterior_precision)
        likelihood = sum(s * v - num_counts * math.exp(v) for s, v in zip(sums, y, strict=True))
        return fn(mu, log_tau, *y) * math.exp(likelihood - (quadratic + log_det) / 2 - constant)

    windows = [(-5.0, 4.0)] * units + [(-6.0, 6.0)]
    return nquad(integrand, windows, opts={"epsabs": 0.0, "epsrel": 1e-5 if units > 1 else 1e-9})[0]


def test_moments_of_one_unit_agree_with_adaptive_quadrature(exact):
    z = COUNTS[:, 1:]
    found = exact.poisson_posterior(z)
    evidence = expectation(z, lambda mu, log_tau, y: 1.0)
    assert found.log_evidence == pytest.approx(math.log(evidence), abs=1e-7)
    for name, pick in (("mu", 0), ("log_tau", 1), ("y", 2)):
        mean = expectation(z, lambda *x, pick=pick: x[pick]) / evidence
        np.testing.assert_allclose(found.mean[name], mean, atol=1e-6)
        if name != "mu":  # of which the function gets the conditional mean alone
            square = expectation(z, lambda *x, pick=pick, mean=mean: (x[pick] - mean) ** 2) / evidence
            np.testing.assert_allclose(found.sd[name], math.sqrt(square), atol=1e-6)


@pytest.mark.parametrize("name", [None, "mu", "log_tau", "y"])
def test_means_of_two_units_agree_with_adaptive_quadrature(exact, name):
    pass


def test_doubled_resolution_changes_nothing(exact):
    z = simulated(exact, 100)
    found, finer = exact.poisson_posterior(z), exact.poisson_posterior(z, resolution=2)
    assert exact.largest_change(found, finer) < 1e-8
    assert found.log_evidence == pytest.approx(finer.log_evidence, abs=1e-8)


def test_grouping_changes_nothing(exact):
    z = simulated(exact, 100)
    found, alone = exact.poisson_posterior(z), exact.poisson_posterior(z, grouped=False)
    assert exact.largest_change(found, alone) < 1e-8
    assert found.log_evidence == pytest.approx(alone.log_evidence, abs=1e-9)


def test_results_are_in_float64_and_of_the_shapes_documented(exact):
    found = exact.poisson_posterior(COUNTS.astype(int))
    for part in (found.mean, found.sd):
        assert {name: value.shape for name, value in part.items()} == {"mu": (), "log_tau": (), "y": (2,)}
        assert all(value.dtype == np.float64 for value in part.values())
