"""The posterior of a fit: exact where it is normal, an integral by brute force where it is not, and for every model.

Draws are of fixed seeds. Averages of them are compared within LIMIT standard errors: in some 600 comparisons, another
seed would raise a false alarm with a probability of 3e-6.
"""

import math

import numpy
import pyro
import pytest
import scipy.integrate
import scipy.stats
import torch
from helpers.fit_models import evidence, gaussian, guide_for, poisson, poisson_counts
from helpers.posteriors import LIMIT, assert_moments_of_draws, brute_force, fitted, joined, posterior_of
from helpers.unit_models import UNIT_MODELS, counts_alone

from laplace_amort import (
    FixedDrawELBO,
    GaussHermite,
    MarginalLaplace,
    MarginalQuadrature,
    NestedELBO,
    StudentPoints,
    fit,
)
from laplace_amort.posterior.weighted import ImportanceSample

Z = torch.tensor([1.0, 3.0, -0.5, 2.0], dtype=torch.float64)
OBJECTIVES = {
    "ELBO": FixedDrawELBO(),
    "nested ELBO": NestedELBO(),
    "Laplace": MarginalLaplace(),
    "quadrature": MarginalQuadrature(),
    "quadrature, 3 points": MarginalQuadrature(GaussHermite(3)),
    "Student points": MarginalQuadrature(StudentPoints(256)),
}
SAMPLED = [name for name in OBJECTIVES if "ELBO" not in name]


# ----------------------------------------------------------------------------------------------------- the right answer


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_exact_where_the_model_is_gaussian(objective):
    """To the accuracy of sampling where the globals are sampled."""
    posterior = posterior_of(gaussian, Z, objective=OBJECTIVES[objective])
    log_evidence, mean, sd = evidence(Z)
    n = len(Z)
    precision = 2 * torch.eye(n + 1)
    precision[0, 0], precision[0, 1:], precision[1:, 0] = n + 1, -1, -1
    covariance = torch.linalg.inv(precision)
    exact = covariance @ torch.cat([torch.zeros(1), Z]), covariance.diagonal().sqrt()
    assert (float(exact[0][0]), float(exact[1][0])) == pytest.approx((mean, sd))
    found = [torch.cat([part["mu"].reshape(1), part["y"]]) for part in (posterior.mean(), posterior.std())]
    assert ((found[0] - exact[0]) / exact[1]).abs().max() < 0.03
    assert (found[1] / exact[1] - 1).abs().max() < 0.03
    assert posterior.k_hat < 0.7
    if objective in SAMPLED:
        assert posterior.log_evidence == pytest.approx(log_evidence, abs=0.02)
    else:
        assert math.isnan(posterior.log_evidence)
        assert posterior.globals_.error == 0
    assert_moments_of_draws(posterior, posterior.sample(4000))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_draws_of_units_and_globals_belong_together(objective):
    """The covariance of a unit with the global, and that of two units, of which none is drawn by itself."""
    posterior = posterior_of(gaussian, Z, objective=OBJECTIVES[objective])
    draws = posterior.sample(20_000)
    mu, y = draws["mu"], draws["y"]
    conditional = y - (mu.unsqueeze(-1) + Z) / 2  # given the globals, of variance 1/2
    standardized = torch.cat([(mu.unsqueeze(-1) - mu.mean()) / mu.std(), conditional * 2**0.5], dim=1)
    products = standardized.unsqueeze(-1) * standardized.unsqueeze(-2) - torch.eye(1 + len(Z))
    for terms in (conditional, products.flatten(1)):
        assert (terms.mean(0).abs() < LIMIT * terms.std(0) / 20_000**0.5).all()


def test_brute_force_on_three_units():
    """Means within 0.03 standard deviations, and these within 3 %."""
    z = poisson_counts(3).double()
    mean, std, log_evidence = brute_force(z)
    for objective in (MarginalQuadrature(), MarginalQuadrature(StudentPoints(128))):
        posterior = posterior_of(poisson, z, objective=objective)
        assert ((joined(posterior.mean()) - mean) / std).abs().max() < 0.03
        assert (joined(posterior.std()) / std - 1).abs().max() < 0.03
        assert posterior.log_evidence == pytest.approx(log_evidence, abs=0.01)
        draws = posterior.sample(4000)
        assert_moments_of_draws(posterior, draws)


def test_weights_that_do_not_count_are_found(monkeypatch):
    """Planted: draws of the globals as they come from the proposals."""
    z = poisson_counts(3).double()
    mean, std, _ = brute_force(z)
    monkeypatch.setattr(
        ImportanceSample, "weights", property(lambda self: numpy.full(len(self.draws), 1 / len(self.draws)))
    )
    posterior = posterior_of(poisson, z, objective=MarginalQuadrature())
    assert ((joined(posterior.mean()) - mean) / std).abs().max() > 0.1


def test_other_objectives_are_as_far_off_as_is_known():
    """What quadrature is for: the Laplace approximation is off by a tenth of a standard deviation, the ELBO by more."""
    z = poisson_counts(3).double()
    mean, std, _ = brute_force(z)
    off = {}
    for objective in (MarginalLaplace(), NestedELBO()):
        found = posterior_of(poisson, z, objective=objective)
        shift = ((joined(found.mean()) - mean) / std).abs().max()
        spread = (joined(found.std()) / std - 1).abs().max()
        off[type(objective)] = float(torch.maximum(shift, spread))
    assert 0.1 < off[MarginalLaplace] < 0.25
    assert 0.15 < off[NestedELBO] < 0.4


def test_seeds_of_a_fit_agree():
    z = poisson_counts(3).double()
    one, other = (posterior_of(poisson, z, objective=MarginalQuadrature(), seed=seed) for seed in (0, 1))
    assert not numpy.isin(one.globals_.draws, other.globals_.draws).any()
    assert ((joined(one.mean()) - joined(other.mean())) / joined(one.std())).abs().max() < 0.06
    assert (joined(one.std()) / joined(other.std()) - 1).abs().max() < 0.06
    assert one.log_evidence == pytest.approx(other.log_evidence, abs=0.02)


# ---------------------------------------------------------------------------------------------------------- every model


@pytest.mark.parametrize("name", UNIT_MODELS)
def test_every_model(name):
    """Names, shapes and supports are those of the Gaussian; moments those of draws."""
    result = fitted(name)
    posterior, expected = result.posterior, result.gaussian.sample(3)
    for found in (posterior.sample(3), posterior.quantiles([0.1, 0.5, 0.9])):
        assert list(found) == list(expected)
        assert {key: value.shape for key, value in found.items()} == {k: v.shape for k, v in expected.items()}
    for found in (posterior.mean(), posterior.std()):
        assert list(found) == list(expected)
        assert {key: value.shape for key, value in found.items()} == {k: v.shape[1:] for k, v in expected.items()}
        assert all(value.isfinite().all() for value in found.values())
    assert all((value >= 0).all() for value in posterior.std().values())
    draws = posterior.sample(4000)
    assert_moments_of_draws(posterior, draws)


def test_values_lie_in_their_supports():
    simplex = fitted("categorical_probs").posterior
    for value in (*simplex.sample(100).values(), *simplex.mean().values()):
        if value.shape[-1:] == (4,):
            torch.testing.assert_close(value.sum(-1), torch.ones(value.shape[:-1]))
            assert (value > 0).all()
    interval = fitted("interval_units").posterior.sample(100)
    assert (interval["bounded"].abs() < 3).all()
    assert (interval["bounded"] > -2).all()
    assert (interval["flat"] > 0).all()


def test_supports_that_depend_on_other_latents():
    """Values lie above the support of the model at each draw, not at one for all."""
    case = UNIT_MODELS["dependent_supports"]()
    draws = fitted("dependent_supports").posterior.sample(50)
    for index in range(50):
        values = {name: value[index] for name, value in draws.items()}
        trace = pyro.poutine.trace(pyro.poutine.condition(case.model, values)).get_trace(*case.args)
        for name, value in values.items():
            assert trace.nodes[name]["fn"].support.check(value).all()


def test_no_globals():
    """The evidence is the product of one integral for each unit."""
    z = torch.tensor([0.0, 3.0, 1.0])
    result = fit(counts_alone, guide_for(counts_alone), z, objective=MarginalLaplace())
    posterior = MarginalQuadrature(GaussHermite(25)).posterior(result.problem, result.gaussian, seed=0)
    integrals = []
    for count in z.tolist():

        def density(y, power, count=count):
            return y**power * scipy.stats.norm.pdf(y) * scipy.stats.poisson.pmf(count, numpy.exp(y))

        integrals.append([scipy.integrate.quad(density, -12, 6, args=(power,), epsabs=1e-12)[0] for power in range(3)])
    mass, first, second = torch.tensor(integrals).mT
    assert posterior.log_evidence == pytest.approx(float(mass.log().sum()), abs=1e-6)
    torch.testing.assert_close(posterior.mean()["y"], first / mass, atol=1e-6, rtol=0)
    torch.testing.assert_close(posterior.std()["y"], (second / mass - (first / mass) ** 2).sqrt(), atol=1e-6, rtol=0)
    assert "there are no globals" in str(posterior)
    assert_moments_of_draws(posterior, posterior.sample(4000))


@pytest.mark.parametrize(
    "objective",
    [MarginalLaplace(), FixedDrawELBO(), NestedELBO(), MarginalQuadrature()],
    ids=lambda objective: type(objective).__name__,
)
def test_every_objective_without_globals(objective):
    posterior = posterior_of(counts_alone, torch.tensor([0.0, 3.0, 1.0]), objective=objective)
    assert posterior.sample(5)["y"].shape == (5, 3)
    assert posterior.globals_.draws.shape == (1, 0)


def test_float32():
    double = posterior_of(poisson, poisson_counts(8).double(), objective=MarginalQuadrature())
    torch.set_default_dtype(torch.float32)
    single = posterior_of(poisson, poisson_counts(8).float(), objective=MarginalQuadrature())
    for found in (single.sample(3), single.mean(), single.std(), single.quantiles([0.5])):
        assert {value.dtype for value in found.values()} == {torch.float32}
    std = joined(double.std())
    assert ((joined(single.mean()) - joined(double.mean())) / std).abs().max() < 0.03
    assert (joined(single.std()) / std - 1).abs().max() < 0.03
    assert single.log_evidence == pytest.approx(double.log_evidence, abs=0.01)
