"""The Gaussian that a guide is: quantiles, means and draws against the dense Gaussian, shapes against AutoNormal's."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.models import MODELS, counts, normals
from helpers.unit_models import FAMILY_MODELS, constrained
from helpers.unit_models import batches as poisson
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from laplace_amort import ModelError
from laplace_amort.guide.auto import AutoLaplaceFamily

SUBSAMPLED = ("subsampled", "vectors, subsampled", "given indices")  # in order, as several workers must agree
WHOLE = [name for name in FAMILY_MODELS if name not in SUBSAMPLED]
# Thresholds for statistics of one test, so that it fails by chance with probability 2e-5 at most.
RATE = 2e-5


def make(name):
    case = FAMILY_MODELS[name]()
    return AutoLaplaceFamily(case.model), case


def dense(gaussian):
    """Mean and covariance in the packed order of the log joint, by the inverse of the dense precision."""
    layout, density = gaussian.unit_model.layout, gaussian.unit_model.density
    mean = torch.cat([gaussian.global_loc, gaussian.local_loc.reshape(-1)])
    covariance = torch.linalg.inv(gaussian.precision.to_dense())
    # Where each element of (theta, y_1 .. y_N) lies in the packed vector: send its position through the layout.
    positions = torch.arange(len(mean)).to(mean)
    d = layout.global_dim
    sites = layout.to_sites(positions[:d], positions[d:].reshape(gaussian.local_loc.shape))
    order = density.pack(sites).long()
    return mean[order].detach(), covariance[order][:, order].detach()


def unconstrained(gaussian, samples):
    """Packed unconstrained draws ``(S, D)`` from constrained ones ``(S, *shape)`` by site."""
    sites = gaussian.unit_model.density.sites
    values = {name: sites[name].transform.inv(samples[name]).reshape(len(samples[name]), -1) for name in sites}
    return torch.cat([values[name] for name in sites], dim=-1)


@pytest.mark.parametrize("name", WHOLE)
def test_shapes_are_those_of_auto_normal(name):
    guide, case = make(name)
    gaussian = guide.gaussian(*case.args, **case.kwargs)
    if all(site.transform is not None for site in gaussian.unit_model.density.sites.values()):
        normal = AutoNormal(case.model)
        normal(*case.args, **case.kwargs)
        expected, expected_quantiles = normal.median(), normal.quantiles([0.1, 0.5, 0.9])
    else:  # AutoNormal has the support of the first run
        expected = guide(*case.args, **case.kwargs)
        expected_quantiles = {name: value.expand(3, *value.shape) for name, value in expected.items()}
    found = guide.median(*case.args, **case.kwargs)
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in expected.items()}
    for quantiles in ([0.1, 0.5, 0.9], torch.tensor([0.1, 0.5, 0.9])):
        found = guide.quantiles(quantiles, *case.args, **case.kwargs)
        assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in expected_quantiles.items()}
    found = guide.sample_posterior(7, *case.args, **case.kwargs)
    assert {n: v.shape for n, v in found.items()} == {n: (7, *v.shape) for n, v in expected.items()}
    assert not any(value.requires_grad for value in found.values())


@pytest.mark.parametrize("name", [*SUBSAMPLED])
def test_a_minibatch_has_the_units_of_the_minibatch(name):
    guide, case = make(name)
    gaussian = guide.gaussian(*case.args, **case.kwargs)
    size = gaussian.unit_model.layout.num_units
    assert len(gaussian.unit_model.units) == size < len(case.args[0])
    draws = guide.sample_posterior(7, *case.args, **case.kwargs)
    assert draws["y"].shape[:2] == (7, size)


@pytest.mark.parametrize("name", WHOLE)
def test_quantiles_are_the_images_of_dense_ones(name):
    guide, case = make(name)
    gaussian = guide.gaussian(*case.args, **case.kwargs)
    mean, covariance = dense(gaussian)
    density = gaussian.unit_model.density
    probabilities = torch.tensor([0.02, 0.3, 0.5, 0.9])
    found = guide.quantiles(probabilities, *case.args, **case.kwargs)
    for q, probability in enumerate(probabilities):
        packed = dist.Normal(mean, covariance.diagonal().sqrt()).icdf(probability)
        for site, value in density.constrain(packed).items():
            torch.testing.assert_close(found[site][q], value, rtol=1e-9, atol=1e-9)
    for site, value in guide.median(*case.args, **case.kwargs).items():
        torch.testing.assert_close(value, found[site][2], rtol=1e-12, atol=1e-12)


def test_quantiles_of_constrained_sites_are_monotone_and_within_the_support():
    guide, z = AutoLaplaceFamily(constrained), counts(4)
    found = guide.quantiles(torch.linspace(0.001, 0.999, 41), z)
    for name, site in guide.prototype_trace.iter_stochastic_nodes():
        assert (found[name].diff(dim=0) > 0).all()
        assert site["fn"].support.check(found[name]).all()


def test_means_of_constrained_sites_against_integrals():
    guide, z = AutoLaplaceFamily(constrained), counts(4)
    gaussian = guide.gaussian(z)
    mean, covariance = dense(gaussian)
    deviation = covariance.diagonal().sqrt()
    nodes = torch.linspace(-12.0, 12.0, 4001)
    weights = dist.Normal(0.0, 1.0).log_prob(nodes).exp() * (nodes[1] - nodes[0])  # the trapezoid rule is exact here
    found = guide.mean(z)
    for name, site in gaussian.unit_model.density.sites.items():
        values = site.transform(mean[site.slice] + nodes[:, None] * deviation[site.slice])
        expected = (weights[:, None] * values).sum(0).reshape(site.shape)
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=0)
    normal = guide.gaussian(z)  # of a log-normal, by the textbook
    rate = normal.unit_model.density.sites["rate"].slice
    expected = (mean[rate] + covariance.diagonal()[rate] / 2).exp()
    torch.testing.assert_close(found["rate"].reshape(1), expected, rtol=1e-9, atol=0)


def test_means_of_positive_vectors_are_log_normal():
    case = MODELS["support_positive_vector"]()
    guide = AutoLaplaceFamily(case.model)
    mean, covariance = dense(guide.gaussian(*case.args))
    expected = (mean + covariance.diagonal() / 2).exp().reshape(2, 2)
    torch.testing.assert_close(guide.mean(*case.args)["x"], expected, rtol=1e-9, atol=0)


def test_means_of_real_sites_are_their_medians():
    guide, z = AutoLaplaceFamily(MODELS["conjugate_normal"]().model), normals(4)
    for name, value in guide.median(z).items():
        torch.testing.assert_close(guide.mean(z)[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["support_simplex", "support_ordered", "support_corr_cholesky", "dependent_support"])
def test_means_that_are_no_integral_over_one_variable_are_refused_with_the_cure(name):
    case = MODELS[name]()
    guide = AutoLaplaceFamily(case.model)
    site = "y" if name == "dependent_support" else "x"
    with pytest.raises(ModelError, match=f"the mean of site '{site}' is no integral") as caught:
        guide.mean(*case.args)
    assert f"guide.sample_posterior(1000, *args)['{site}'].mean(0)" in str(caught.value)
    assert guide.sample_posterior(3, *case.args)[site].mean(0).isfinite().all()
    assert all(value.isfinite().all() for value in guide.quantiles([0.1, 0.9], *case.args).values())


def check_draws(draws, gaussian, rate=RATE):
    """Whitened draws are standard normal: mean, variances and covariances, each by its own normal approximation."""
    mean, covariance = dense(gaussian)
    size, count = len(mean), len(draws)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (draws - mean).mT, upper=False)
    moments = white @ white.mT / count - torch.eye(size)
    spread = (torch.ones(size, size) + torch.eye(size)).sqrt()
    statistics = torch.cat([white.mean(-1), (moments / spread).reshape(-1)]) * count**0.5
    # Bonferroni: two-sided, over all statistics. With this many draws they are normal far into their tails.
    limit = float(-torch.special.ndtri(torch.tensor(rate / 2 / len(statistics))))
    assert statistics.abs().max() < limit, (statistics.abs().max(), limit)


@pytest.mark.parametrize("name", ["poisson", "constrained", "vectors", "without globals", "nested_plates"])
def test_draws_have_the_moments_of_the_dense_gaussian(name):
    """False alarms: 2e-5 for each of both."""
    guide, case = make(name)
    gaussian = guide.gaussian(*case.args, **case.kwargs)
    draws = guide.sample_posterior(20000, *case.args, **case.kwargs)
    check_draws(unconstrained(gaussian, draws), gaussian)
    with pyro.plate("particles", 20000, dim=-4), torch.no_grad():
        draws = guide(*case.args, **case.kwargs)
    packed = {}
    for site, value in draws.items():
        rank = len(gaussian.unit_model.density.sites[site].shape)
        packed[site] = value.reshape(20000, *value.shape[value.dim() - rank :])
    check_draws(unconstrained(gaussian, packed), gaussian)


class WrongSign:
    """A precision whose regression on the globals has the wrong sign."""

    def __init__(self, precision):
        self.precision = precision

    def __getattr__(self, name):
        return getattr(self.precision, name)

    def draw_local(self, deviation, noise):
        return self.precision.draw_local(-deviation, noise)


def test_the_check_of_draws_finds_a_wrong_regression():
    guide, z = AutoLaplaceFamily(poisson), counts(5)
    gaussian = guide.gaussian(z)
    wrong = type(gaussian)(**{**vars(gaussian), "precision": WrongSign(gaussian.precision)})
    check_draws(unconstrained(gaussian, gaussian.sample(20000)), gaussian)
    with pytest.raises(AssertionError):
        check_draws(unconstrained(gaussian, wrong.sample(20000)), gaussian)


def test_the_gaussian_is_differentiable_in_the_parameter():
    guide, z = AutoLaplaceFamily(poisson), counts(5)
    gaussian = guide.gaussian(z)
    for value in (gaussian.global_loc, gaussian.local_loc, gaussian.precision.to_dense()):
        (gradient,) = torch.autograd.grad(value.sum(), guide.loc, retain_graph=True)
        assert gradient.abs().max() > 0
    with torch.no_grad():
        assert not guide.gaussian(z).precision.to_dense().requires_grad


def test_the_gaussian_says_what_was_repaired():
    guide, z = AutoLaplaceFamily(poisson), counts(5)
    gaussian = guide.gaussian(z)
    assert gaussian.tail_report.num_matrices == 5
    assert gaussian.head_report.num_matrices == 1
    assert str(gaussian.head_report).startswith("repaired ")


def test_reading_the_gaussian_leaves_no_trace():
    """None of the readers shows a site or a parameter to a handler outside, nor takes part in its plates."""
    guide, z = AutoLaplaceFamily(poisson), counts(5)
    expected = guide.median(z)
    with pyro.poutine.trace() as capture, pyro.plate("outside", 3, dim=-1):
        found = guide.median(z)
        guide.quantiles([0.5], z), guide.mean(z), guide.sample_posterior(2, z), guide.gaussian(z)
    assert [name for name in capture.trace.nodes if name != "outside"] == []
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


def test_a_gaussian_model_has_its_posterior():
    """Closed form: the family holds the posterior of a model that is Gaussian throughout."""
    case = MODELS["conjugate_normal"]()
    (z,) = case.args
    guide = AutoLaplaceFamily(case.model)
    gaussian = guide.gaussian(z)
    covariance = torch.ones(5, 5) + torch.diag_embed(torch.tensor([0.0, *[0.7**2] * 4]))
    gain = covariance[:, 1:] @ torch.linalg.inv(covariance[1:, 1:] + 0.5**2 * torch.eye(4))
    posterior = covariance - gain @ covariance[1:, :]
    mean = gain @ z
    torch.testing.assert_close(dense(gaussian)[1], posterior, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        guide.loc.copy_(mean[:1])
    torch.testing.assert_close(guide.median(z)["y"], mean[1:], rtol=1e-10, atol=1e-12)
    evidence = dist.MultivariateNormal(torch.zeros(4), covariance[1:, 1:] + 0.25 * torch.eye(4)).log_prob(z)
    loss = Trace_ELBO().loss(case.model, guide, z)
    assert loss == pytest.approx(-float(evidence), rel=1e-10)
