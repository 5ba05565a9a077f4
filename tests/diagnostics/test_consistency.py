"""Scores of simulated data: by hand where the model is Gaussian, and off where a weight is planted.

Draws are of fixed seeds. Another seed would raise a false alarm in a test with a probability of at most 2e-5.
"""

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.fit_models import gaussian, guide_for, poisson, poisson_counts
from helpers.unit_models import UNIT_MODELS
from pyro import poutine

from laplace_amort import GaussHermite, Level, LogJoint, MarginalLaplace, ModelError, diagnose, fit
from laplace_amort.diagnostics import consistency as room
from laplace_amort.diagnostics.consistency import check_consistency
from laplace_amort.units.quadrature import Laplace

Z = torch.tensor([1.0, 3.0, -0.5, 2.0, 0.3, 1.1, 2.2, -0.4, 0.9, 1.7, 2.4, 0.2], dtype=torch.float64)


def scaled(z, weight):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", z.shape[-1]):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        with poutine.scale(scale=weight):
            pyro.sample("z", dist.Poisson(y.exp()), obs=z)


def checked(result, rule=Laplace(), simulations=30, **options):  # noqa: B008 (never changes)
    return check_consistency(result.problem, result.gaussian, rule, simulations, progress=False, **options)


def fitted(model, *args):
    return fit(model, guide_for(model), *args, objective=MarginalLaplace())


# ----------------------------------------------------------------------------------------------------------- the scores


def test_by_hand_where_the_model_is_gaussian(monkeypatch):
    """The score of data is the sum of z - mu over 2, its posterior precision 1 + n / 2."""
    result, data, original = fitted(gaussian, Z), [], LogJoint.draw_data

    def seen(this, values):
        drawn = original(this, values)
        data.append(drawn["z"])
        return drawn

    monkeypatch.setattr(LogJoint, "draw_data", seen)
    found = checked(result, simulations=20)
    scores = (torch.stack(data) - result.gaussian.global_loc).sum(-1) / 2
    moved = scores.numpy() * (1 + len(Z) / 2) ** -0.5
    assert found.bias[0] == pytest.approx(moved.mean(), abs=1e-8)
    assert found.error[0] == pytest.approx(moved.std(ddof=1) / 20**0.5, abs=1e-8)
    assert (found.num_simulations, found.num_failed) == (20, 0)


@pytest.mark.parametrize("rule", [Laplace(), GaussHermite(5)], ids=["Laplace", "quadrature"])
def test_unbiased_where_it_is_exact(rule):
    found = checked(fitted(gaussian, Z), rule, simulations=40)
    assert found.p_value > 2e-5
    assert abs(found.bias[0]) < 5.4 * found.error[0]  # |t| with 39 degrees of freedom: 4e-6
    assert found.error[0] < 0.5


def test_unbiased_by_quadrature():
    found = checked(fitted(poisson, poisson_counts(20).double()), GaussHermite(7), simulations=25)
    assert found.bias.shape == found.error.shape == (2,)
    assert found.p_value > 2e-5


def test_planted_weight():
    counts = poisson_counts(40)[0].double()
    wrong = checked(fitted(scaled, counts, 5.0), GaussHermite(9))
    right = checked(fitted(scaled, counts, 1.0), GaussHermite(9))
    assert wrong.p_value < 1e-6 < 2e-5 < right.p_value
    assert abs(wrong.bias[0]) > 0.5
    assert abs(right.bias[0]) < 5.9 * right.error[0]


def test_test_of_hotelling():
    """Of one global it is that of Student."""
    found = checked(fitted(gaussian, Z), simulations=25)
    t = found.bias[0] / found.error[0]
    assert found.p_value == pytest.approx(2 * float(room.scipy.stats.t.sf(abs(t), 24)), rel=1e-9)


def test_says_the_same_again_and_leaves_the_generator_alone():
    result = fitted(gaussian, Z)
    state = torch.get_rng_state()
    first = checked(result, simulations=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(2)
    assert numpy.array_equal(checked(result, simulations=5).bias, first.bias)
    assert not numpy.array_equal(checked(result, simulations=5, seed=1).bias, first.bias)


@pytest.mark.parametrize("name", ["poisson_by_visit", "binomial_slopes", "dim_minus_three", "missing", "non_centered"])
def test_models_of_many_kinds(name):
    case = UNIT_MODELS[name]()
    guide = guide_for(case.model, unit_plate=case.unit_plate)
    result = fit(case.model, guide, *case.args, objective=MarginalLaplace(), **case.kwargs)
    found = checked(result, simulations=case.global_dim + 4)
    assert found.num_simulations + found.num_failed == case.global_dim + 4
    assert numpy.isfinite(found.bias).all()
    assert 2e-5 < found.p_value <= 1


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_too_few_simulations():
    result = fitted(poisson, poisson_counts(10).double())
    with pytest.raises(ValueError, match="3 simulations say nothing of 2 globals: take at least 4"):
        checked(result, simulations=3)
    assert checked(result, simulations=4).num_simulations <= 4


def fails_at(monkeypatch, what):
    """The scores of the k-th part are what a function of k and of these says."""
    calls, original = [], room._scores

    def scores(*args):
        calls.append(None)
        return what(len(calls), original(*args))

    monkeypatch.setattr(room, "_scores", scores)
    return calls


def stop(call):
    def what(k, scores):
        if k == call:
            raise KeyboardInterrupt
        return scores

    return what


def test_interrupt_keeps_what_was_simulated(monkeypatch):
    result = fitted(gaussian, Z)
    expected = checked(result, simulations=9)
    calls = fails_at(monkeypatch, stop(4))
    found = checked(result, simulations=30)
    assert len(calls) == 4
    assert found.num_simulations == 9
    assert numpy.allclose(found.bias, expected.bias, rtol=1e-9)
    assert found.p_value == pytest.approx(expected.p_value, rel=1e-6)


def test_interrupt_at_once(monkeypatch):
    result, state = fitted(gaussian, Z), torch.get_rng_state()
    fails_at(monkeypatch, stop(1))
    found = checked(result)
    assert found.num_simulations == 0
    assert numpy.isnan(found.p_value)
    assert torch.equal(torch.get_rng_state(), state)


def test_failures_are_counted(monkeypatch):
    result = fitted(gaussian, Z)
    fails_at(monkeypatch, lambda k, scores: scores * numpy.nan if k % 3 == 0 else scores)
    found = checked(result, simulations=12)
    assert (found.num_simulations, found.num_failed) == (8, 4)  # in six parts of two
    assert numpy.isfinite(found.p_value)


def test_nothing_but_failures_is_not_known(monkeypatch):
    result = fitted(gaussian, Z)
    fails_at(monkeypatch, lambda k, scores: scores * numpy.nan)
    (found,) = [one for one in diagnose(result, simulations=6).findings if one.name == "simulated scores"]
    assert found.level is Level.UNKNOWN
    assert "6 of 6" in found.sentence


# --------------------------------------------------------------------------------------------------------- data to draw


def observed(log_joint, name="z"):
    return poutine.trace(log_joint.model).get_trace(*log_joint.args).nodes[name]["value"]


def test_simulated_data_have_their_mean_and_variance():
    """4000 normal data: two comparisons within five errors, so false alarms below 2e-6."""
    z, n = torch.zeros(4000), 4000
    log_joint = LogJoint(gaussian, z)
    drawn = observed(log_joint.simulated({"mu": torch.tensor(3.0)}))
    assert abs(drawn.mean() - 3) < 5 * (2 / n) ** 0.5
    assert abs(drawn.var() / 2 - 1) < 5 * (2 / n) ** 0.5
    assert (z == 0).all()
    assert (observed(log_joint) == 0).all()


def test_simulated_log_joint_is_that_of_its_data():
    other = LogJoint(gaussian, Z).simulated({"mu": torch.tensor(3.0)})
    at = torch.linspace(-1.0, 1.0, 13)
    assert list(other.sites) == ["mu", "y"]
    torch.testing.assert_close(other(at), LogJoint(gaussian, observed(other))(at))
    assert not torch.equal(observed(other), Z)


def masked(z, seen):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        with poutine.mask(mask=seen):
            pyro.sample("z", dist.Normal(y, 1.0), obs=z)


def test_masks_stay():
    """What is masked is drawn as well, and has no density."""
    seen = torch.arange(4000) % 2 == 0
    other = LogJoint(masked, torch.full((4000,), 7.0), seen).simulated({"mu": torch.tensor(-2.0)})
    drawn = observed(other)
    for part in (drawn[seen], drawn[~seen]):
        assert abs(part.mean() + 2) < 5 * (2 / 2000) ** 0.5
    at = torch.zeros(4001)
    expected = LogJoint(masked, torch.where(seen, drawn, 1e3), seen)(at)
    torch.testing.assert_close(other(at), expected)


def test_latents_that_are_given_are_used_and_others_drawn():
    """With its unit given as well, nothing but noise is left."""
    y = torch.linspace(-5.0, 5.0, len(Z))
    given = {"mu": torch.tensor(0.0), "y": y}
    drawn = torch.stack([observed(LogJoint(gaussian, Z).simulated(given)) for _ in range(200)])
    assert ((drawn.mean(0) - y).abs() < 5.4 * 200**-0.5).all()


def test_factors_cannot_be_drawn_from():
    case = UNIT_MODELS["with_factors"]()
    with pytest.raises(ModelError, match=r"is a pyro\.factor, which no data can be drawn from"):
        LogJoint(case.model, *case.args).simulated({"mu": torch.tensor(0.0)})
