"""Smoothed importance weights: shapes of tails that are known, the sign of what is a tail, and rows without one."""

import numpy
import pytest
import scipy.special
import scipy.stats

from laplace_amort.posterior import psis
from laplace_amort.posterior.psis import K_GOOD, pareto_smoothed

SHAPES = [0.2, 0.5, 0.9]
NUMBER = 4000


def pareto(shape, number=NUMBER):
    """Log ratios at evenly spread probabilities of a generalized Pareto distribution, not in order."""
    uniform = (numpy.arange(number) + 0.5) / number
    return numpy.random.default_rng(0).permutation(numpy.log(scipy.stats.genpareto(shape).ppf(uniform)))


def normal(*shape, seed=0):
    return numpy.random.default_rng(seed).normal(size=shape)


# --------------------------------------------------------------------------------------------------- shape of the tail


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_of_a_known_tail(shape):
    assert pareto_smoothed(pareto(shape)).k_hat == pytest.approx(shape, abs=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_of_random_ratios(shape):
    """The mean over 20 seeds: the standard deviation of one is 0.07, so that 0.1 is six standard errors."""
    logs = [numpy.log(scipy.stats.genpareto(shape).rvs(20_000, random_state=seed)) for seed in range(20)]
    assert pareto_smoothed(numpy.array(logs)).k_hat.mean() == pytest.approx(shape, abs=0.1)


def test_ratios_without_a_tail_have_a_negative_shape():
    assert pareto_smoothed(pareto(-0.5)).k_hat < -0.3


def the_sign():
    """Shapes of a heavy tail of large ratios, and of the same turned around, which is bounded."""
    ratios = -0.9 * numpy.log((numpy.arange(NUMBER) + 0.5) / NUMBER)
    return pareto_smoothed(ratios).k_hat, pareto_smoothed(-ratios).k_hat


def test_the_tail_is_that_of_large_ratios():
    large, small = the_sign()
    assert large > K_GOOD
    assert small < 0


def test_a_wrong_sign_is_found(monkeypatch):
    """Planted: ArviZ's functions of log likelihoods and of log ratios taken for each other."""
    right = psis._smoother()
    monkeypatch.setattr(psis, "_smoother", lambda: lambda ratios: right(-ratios))
    large, small = the_sign()
    assert large < 0
    assert small > K_GOOD


def test_a_constant_factor_changes_nothing():
    plain, scaled = pareto_smoothed(pareto(0.5)), pareto_smoothed(pareto(0.5) + 1e4)
    assert scaled.k_hat == pytest.approx(plain.k_hat, abs=1e-6)
    numpy.testing.assert_allclose(scaled.log_weights, plain.log_weights, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("number", [25, 26, 100, 226, 1000])
@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_weights_sum_to_one_and_keep_their_order(number, spread):
    ratios = spread * normal(number)
    log_weights = pareto_smoothed(ratios).log_weights
    assert numpy.exp(log_weights).sum() == pytest.approx(1.0, abs=1e-12)
    assert (numpy.diff(log_weights[ratios.argsort()]) >= 0).all()


def test_weights_below_the_tail_are_as_they_were():
    ratios = normal(1000)
    log_weights = pareto_smoothed(ratios).log_weights
    below = ratios.argsort()[: 1000 - 95]  # 3 sqrt(1000) are the tail
    shift = (log_weights - ratios)[below]
    assert shift.max() - shift.min() < 1e-12
    assert log_weights.max() - log_weights[below].max() > 0.1


def test_no_weight_grows_past_the_largest_ratio():
    ratios = pareto(0.9)
    log_weights = pareto_smoothed(ratios).log_weights
    shift = (log_weights - ratios)[ratios.argmin()]
    assert log_weights.max() <= ratios.max() + shift + 1e-12


def test_arguments_stay_as_they_are():
    ratios = normal(2, 100)
    ratios[0, :3] = -numpy.inf
    copy = ratios.copy()
    pareto_smoothed(ratios)
    assert numpy.array_equal(ratios, copy)


# --------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("number", [25, 100, 1000])
@pytest.mark.parametrize("value", [0.0, -3.0, 1e5])
def test_ratios_that_are_all_the_same(number, value):
    log_weights, k_hat = pareto_smoothed(numpy.full(number, value))
    assert k_hat == -numpy.inf
    numpy.testing.assert_allclose(log_weights, -numpy.log(number), atol=1e-12)


@pytest.mark.parametrize("number", [30, 100, 1000])
def test_largest_ratios_that_are_all_the_same(number):
    """A quarter of them, and the rest below in no order."""
    ratios = -1 - numpy.abs(normal(number))
    ratios[::4] = 0.0
    log_weights, k_hat = pareto_smoothed(ratios)
    assert k_hat == -numpy.inf
    numpy.testing.assert_allclose(log_weights, scipy.special.log_softmax(ratios), atol=1e-12)


def test_as_many_of_the_same_as_the_tail_has():
    """The tail that a shape is fitted to is of 3 sqrt(S) ratios, where that is less than a fifth."""
    ratios = -1 - numpy.abs(normal(1000))
    ratios[:100] = 0.0
    log_weights, k_hat = pareto_smoothed(ratios)
    assert k_hat == -numpy.inf
    numpy.testing.assert_allclose(log_weights, scipy.special.log_softmax(ratios), atol=1e-12)


def test_ratios_with_few_values():
    """Whole numbers, of which many are the same; the largest, by some seeds, as many as a tail has."""
    log_weights, k_hat = pareto_smoothed(numpy.round(normal(8, 1000) / 2))
    assert not numpy.isnan(k_hat).any()
    numpy.testing.assert_allclose(numpy.exp(log_weights).sum(1), 1.0, atol=1e-12)


@pytest.mark.parametrize("gap", [20.0, 50.0, 800.0])
def test_one_that_dominates_is_not_to_be_relied_on(gap):
    ratios = normal(1000) / 10
    ratios[17] = gap
    log_weights, k_hat = pareto_smoothed(ratios)
    assert k_hat > K_GOOD
    assert log_weights.argmax() == 17


@pytest.mark.parametrize("number", [1, 2, 24])
def test_too_few_for_a_tail_stay_as_they_are(number):
    ratios = normal(number)
    log_weights, k_hat = pareto_smoothed(ratios)
    assert k_hat == numpy.inf
    numpy.testing.assert_allclose(log_weights, scipy.special.log_softmax(ratios), atol=1e-12)


def test_ratios_of_nothing_have_no_weight():
    ratios = normal(1000)
    ratios[::2] = -numpy.inf
    log_weights, k_hat = pareto_smoothed(ratios)
    assert numpy.isfinite(k_hat)
    assert numpy.exp(log_weights[::2]).max() < 1e-300
    assert numpy.exp(log_weights).sum() == pytest.approx(1.0, abs=1e-12)


def test_one_ratio_that_is_something():
    ratios = numpy.full(1000, -numpy.inf)
    ratios[3] = 5.0
    log_weights, k_hat = pareto_smoothed(ratios)
    assert k_hat == numpy.inf
    assert log_weights.argmax() == 3
    assert numpy.exp(log_weights[3]) == pytest.approx(1.0)


@pytest.mark.parametrize("value", [numpy.nan, numpy.inf])
def test_one_that_is_no_number_makes_all_of_them_unreliable(value):
    ratios = normal(100)
    ratios[5] = value
    log_weights, k_hat = pareto_smoothed(ratios)
    assert k_hat == numpy.inf
    numpy.testing.assert_allclose(log_weights, -numpy.log(100))


def test_nothing_at_all_is_unreliable():
    log_weights, k_hat = pareto_smoothed(numpy.full(100, -numpy.inf))
    assert k_hat == numpy.inf
    numpy.testing.assert_allclose(log_weights, -numpy.log(100))


# --------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3), (0,)])
def test_rows_are_apart(batch):
    ratios = normal(*batch, 60)
    log_weights, k_hat = pareto_smoothed(ratios)
    assert log_weights.shape == ratios.shape
    assert k_hat.shape == batch
    for index in numpy.ndindex(batch):
        alone = pareto_smoothed(ratios[index])
        # Sums over one row and over many may be taken in another order.
        numpy.testing.assert_allclose(log_weights[index], alone.log_weights, rtol=1e-12, atol=1e-12)
        assert k_hat[index] == pytest.approx(float(alone.k_hat), rel=1e-12, abs=1e-12)


def test_lists_and_single_precision():
    ratios = normal(100).astype(numpy.float32)
    expected = pareto_smoothed(ratios.astype(float))
    for given in (ratios, ratios.tolist()):
        found = pareto_smoothed(given)
        assert found.log_weights.dtype == float
        assert found.k_hat == expected.k_hat


def test_a_shape_that_is_no_number_is_unreliable(monkeypatch):
    monkeypatch.setattr(psis, "_smoother", lambda: lambda ratios: (ratios, numpy.nan))
    ratios = normal(100)
    log_weights, k_hat = pareto_smoothed(ratios)
    assert k_hat == numpy.inf
    numpy.testing.assert_allclose(log_weights, scipy.special.log_softmax(ratios), atol=1e-12)
