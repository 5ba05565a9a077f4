"""Densities have the derivatives that they say: every distribution, at points where its formula changes."""

import math

import mpmath
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import documents
from helpers.derivatives_beside import derivatives, faults, faults_of_row
from helpers.distributions import ROWS, double
from pyro import poutine
from torch import nn

from laplace_amort import AutoLaplaceFamily, FreeMode, LogJoint, observed_information
from laplace_amort.autodiff import record
from laplace_amort.model.densities import smooth

# What is wrong at such points and is left so, by parameter and orders; docs/limits.rst says by how much.
KNOWN = {
    "Laplace": {"loc": {2}, "value": {2}},  # a kink that is there
    "AsymmetricLaplace": {"loc": {2}, "value": {2}},
    "SineBivariateVonMises": {"correlation": {2, 4}},
    "Stable": {"skew": {1, 2, 3, 4}, "scale": {4}, "loc": {4}, "value": {4}},
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, on its way to NaN
@pytest.mark.parametrize("name", ROWS)
def test_derivatives_are_those_of_the_points_beside(name):
    with pyro.validation_enabled(False):
        assert faults_of_row(ROWS[name], smooth) == KNOWN.get(name, {})


def test_known_faults_are_in_the_docs():
    page = documents.read(documents.ROOT / "docs" / "limits.rst")
    for name in KNOWN:
        assert f"``{name}``" in page


# Where a formula changes: what is made of one number, a value, and where to look. Without the cure there are faults at
# each of the second.
CHANGES = {
    "Binomial": (lambda x: dist.Binomial(6, logits=x), 2.0, [-3.0, 1.0, 25.0], [0.0]),
    "Binomial, none": (lambda x: dist.Binomial(6, logits=x), 0.0, [], [0.0]),
    "Binomial, all": (lambda x: dist.Binomial(6, logits=x), 6.0, [], [0.0]),
    "Binomial probs": (lambda x: dist.Binomial(6, probs=x), 2.0, [0.3], [0.5]),
    "Binomial of torch": (lambda x: torch.distributions.Binomial(6, logits=x), 2.0, [1.0], [0.0]),
    "Binomials": (lambda x: dist.Binomial(double([6.0, 2.0]), logits=x), [2.0, 1.0], [1.0], [0.0]),
    "ExtendedBinomial": (lambda x: dist.ExtendedBinomial(6, logits=x), 2.0, [1.0], [0.0]),
    "ContinuousBernoulli probs": (dist.ContinuousBernoulli, 0.3, [0.5, 0.501, 0.7], [0.5011, 0.502]),
    "ContinuousBernoulli": (lambda x: dist.ContinuousBernoulli(logits=x), 0.3, [0.0, 2.0, 9.0], [0.004, 0.0041]),
    "VonMises": (lambda x: dist.VonMises(0.2, x), 0.7, [0.5, 3.0, 5.0, 30.0, 300.0], [3.75, 3.7505]),
    "VonMises3D": (lambda x: dist.VonMises3D(x.expand(3)), [0.6, 0.0, 0.8], [1 / math.sqrt(3), 2.0], [0.0]),
    "GeneralizedPareto": (lambda x: dist.GeneralizedPareto(0.3, 2.0, x), 1.7, [0.1 / 0.7, -0.3, 2.0], [0.0, 0.001]),
    "to_event": (lambda x: dist.Binomial(6, logits=x).expand([2]).to_event(1), [2.0, 3.0], [1.0], [0.0]),
    "mask": (lambda x: dist.Binomial(6, logits=x.expand(2)).mask(double([1, 0]).bool()), [2.0, 3.0], [], [0.0]),
    "zero-inflated": (
        lambda x: dist.ZeroInflatedDistribution(dist.Binomial(6, logits=x), gate=double(0.3)),
        2.0,
        [],
        [0.0],
    ),
    "mixture": (
        lambda x: dist.MixtureSameFamily(
            dist.Categorical(logits=torch.zeros(2)), dist.Binomial(6, logits=torch.stack([x, -2 * x]))
        ),
        2.0,
        [],
        [0.0],
    ),
    "masked mixture": (
        lambda x: dist.MaskedMixture(double(1).bool(), dist.Normal(x, 1.0), dist.Binomial(6, logits=x)),
        2.0,
        [],
        [0.0],
    ),
}


def density(made, value, dressed):
    return lambda x: dressed(made(x)).log_prob(double(value)).sum()


@pytest.mark.parametrize("name", CHANGES)
def test_formulas_that_change(name):
    made, value, sound, changes = CHANGES[name]
    with pyro.validation_enabled(False):
        for at in [*sound, *changes]:
            assert faults(density(made, value, smooth), at) == {}
        for at in changes:
            assert faults(density(made, value, lambda fn: fn), at), f"torch is right at {at}: is this still needed?"


@pytest.mark.parametrize("name", CHANGES)
def test_the_values_are_those_of_torch(name):
    made, value, sound, changes = CHANGES[name]
    for at in [*sound, *changes]:
        x = double(at)
        if name == "VonMises3D" and at == 0:  # NaN there
            continue
        expected, found = made(x).log_prob(double(value)), smooth(made(x)).log_prob(double(value))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=5e-7 if name == "VonMises" else 1e-12)


# Formulas from the books.
def of_binomial(x):
    p = 1 / (1 + mpmath.exp(-x))
    return mpmath.log(mpmath.binomial(6, 2)) + 2 * mpmath.log(p) + 4 * mpmath.log(1 - p)


def of_continuous_bernoulli(x):
    p = 1 / (1 + mpmath.exp(-x))
    log_norm = mpmath.log(2 * mpmath.atanh(1 - 2 * p) / (1 - 2 * p))
    return mpmath.mpf("0.3") * mpmath.log(p) + mpmath.mpf("0.7") * mpmath.log(1 - p) + log_norm


def of_von_mises(x):
    return x * mpmath.cos(mpmath.mpf("0.5")) - mpmath.log(2 * mpmath.pi * mpmath.besseli(0, x))


def of_von_mises_3d(x):
    r = mpmath.sqrt(3) * abs(x)
    return mpmath.mpf("1.4") * x + mpmath.log(r / mpmath.sinh(r)) - mpmath.log(4 * mpmath.pi)


def of_generalized_pareto(x):
    z = mpmath.mpf("1.4") / 2
    return -mpmath.log(2) - (1 + 1 / x) * mpmath.log(1 + x * z)


@pytest.mark.parametrize(
    ("name", "formula", "places"),
    [
        ("Binomial", of_binomial, [0.0, 1.0, 30.0]),
        ("ContinuousBernoulli", of_continuous_bernoulli, [0.001, 0.05, 1.99, 2.01, 8.0]),
        ("VonMises", of_von_mises, [0.1, 3.75, 20.0]),
        ("VonMises3D", of_von_mises_3d, [0.01, 0.57, 0.58, 3.0]),
        ("GeneralizedPareto", of_generalized_pareto, [0.001, 0.14, 0.15, 1.0]),
    ],
)
def test_derivatives_are_those_of_the_formula(name, formula, places):
    made, value, _, _ = CHANGES[name]
    for at in places:
        with mpmath.workdps(60), pyro.validation_enabled(False):
            expected = [float(mpmath.diff(formula, mpmath.mpf(at), order)) for order in range(5)]
            found = derivatives(density(made, value, smooth), at)
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-8, atol=1e-9)


# ------------------------------------------------------------------------------------------------- planted densities


class Kinked(dist.Normal):
    """Smooth in truth: the kinks cancel."""

    def log_prob(self, value):
        return super().log_prob(value) + nn.functional.relu(self.loc) - self.loc.abs() / 2 - self.loc / 2


class Stepped(dist.Normal):
    """Off by a millionth on one side."""

    def log_prob(self, value):
        return super().log_prob(value) * torch.where(self.loc > 0, 1 + 1e-6, 1.0)


class Limit(dist.Normal):
    """With a value for one point, as it is without its neighbors."""

    def log_prob(self, value):
        return torch.where(self.loc == 0, super().log_prob(value).detach(), super().log_prob(value))


class Cut(dist.Normal):
    """Right in its value alone."""

    def log_prob(self, value):
        return super().log_prob(value).detach() + 0 * self.loc


@pytest.mark.parametrize("planted", [Kinked, Limit, Cut, Stepped])
def test_planted_densities_are_caught(planted):
    assert faults(density(lambda x: planted(x, 1.0), 0.7, smooth))
    assert faults(density(lambda x: dist.Normal(x, 1.0), 0.7, smooth)) == {}


def test_a_planted_density_is_caught_in_the_table():
    row = ROWS["Normal"]

    def planted(fn):
        found = fn.expand(fn.batch_shape)
        found.__class__ = Limit
        return found

    assert "loc" in faults_of_row(row, planted)
    assert faults_of_row(row, smooth) == {}


# ---------------------------------------------------------------------------------------------------- where it counts


def successes(z):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Binomial(8, logits=y + mu), obs=z)


def scaled(z):
    with poutine.scale(scale=2.0), pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("z", dist.Binomial(8, logits=y), obs=z)


Z = torch.tensor([4.0, 4.0])


def test_the_information_of_a_log_joint_at_zero():
    expected = torch.tensor([[1 + 4.0, 2, 2], [2, 3, 0], [2, 0, 3]])
    torch.testing.assert_close(observed_information(LogJoint(successes, Z), torch.zeros(3)), expected)
    expected = torch.tensor([[2 * 3.0, 0], [0, 2.0]])
    torch.testing.assert_close(observed_information(LogJoint(scaled, Z), torch.zeros(2)), expected)


def test_a_guide_in_svi_has_the_right_precision_where_it_starts():
    """It runs the model; a fit has a recording."""
    guide = AutoLaplaceFamily(successes, FreeMode())
    guide(Z)
    precision = guide.gaussian(Z).precision.to_dense()
    torch.testing.assert_close(precision, torch.tensor([[5.0, 2, 2], [2, 3, 0], [2, 0, 3]]))
    unit_model = guide.unit_model(Z)
    at = torch.zeros(1), torch.zeros(2, 1)
    recorded = unit_model.recorded(*at)
    for model in unit_model, recorded:
        information = observed_information(model.log_joint, *at)
        torch.testing.assert_close(information, precision)


@pytest.mark.parametrize("name", CHANGES)
def test_they_are_recorded(name):
    made, value, sound, changes = CHANGES[name]
    function, unused = density(made, value, smooth), torch.zeros(1)
    with pyro.validation_enabled(False):
        written = record(lambda x, local: function(x) + local.sum(), double(sound[0] if sound else 0.4), unused)
        for at in changes:
            found, expected = derivatives(lambda x: written(x, unused), at), derivatives(function, at)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_what_is_right_is_left_as_it_is():
    for fn in (dist.Normal(0.0, 1.0), dist.Poisson(2.0).expand([3]).to_event(1), dist.Bernoulli(logits=0.0).mask(True)):
        assert smooth(fn) is fn


def test_a_density_of_the_users_own_is_kept():
    class Own(dist.Binomial):
        def log_prob(self, value):
            return value * 0 - 7.0

    assert smooth(Own(6, logits=torch.tensor(0.0))).log_prob(torch.tensor(2.0)) == -7


def test_impossible_values_are_refused_as_before():
    for fn, value in [
        (dist.Binomial(6, logits=torch.tensor(0.0)), 7.0),
        (dist.ContinuousBernoulli(torch.tensor(0.3)), 1.5),
        (dist.VonMises3D(torch.zeros(3)), [1.0, 1.0, 0.0]),
    ]:
        with pytest.raises(ValueError, match=r"Expected value|not normalized"):
            smooth(fn).log_prob(torch.tensor(value))
    beyond = torch.tensor([-1.0, 2.0, 7.0])
    extended = dist.ExtendedBinomial(6, logits=torch.tensor(0.3))
    torch.testing.assert_close(smooth(extended).log_prob(beyond), extended.log_prob(beyond))


def test_the_approximation_of_pyro_is_kept():
    class Approximate(dist.Binomial):
        approx_log_prob_tol = 0.1

    fn, value = Approximate(600, logits=torch.tensor(0.4)), torch.tensor(300.0)
    assert smooth(fn).log_prob(value) == pytest.approx(float(fn.log_prob(value)), rel=1e-12)
    assert smooth(fn).log_prob(value) != dist.Binomial(600, logits=torch.tensor(0.4)).log_prob(value)
