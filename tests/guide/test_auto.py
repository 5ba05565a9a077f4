"""AutoLaplaceFamily under every ELBO of Pyro: for the same noise the loss and gradient of a dense Gaussian."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.guides import fixed_noise
from helpers.models import normals
from helpers.oracles import Figures, relative_error
from helpers.unit_models import FAMILY_MODELS
from pyro.infer import (
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.poutine.messenger import Messenger

from laplace_amort.guide.auto import AutoLaplaceFamily

figures = Figures()

PARTICLES = 2


def enumerating(**options):
    return TraceEnum_ELBO(strict_enumeration_warning=False, **options)


ELBOS = {"trace": Trace_ELBO, "mean field": TraceMeanField_ELBO, "graph": TraceGraph_ELBO, "enum": enumerating}


class Twin:
    """A guide, noise for two particles, and their losses written down with the dense precision."""

    def __init__(self, name):
        self.case = FAMILY_MODELS[name]()
        self.model, self.args, self.kwargs = self.case.model, self.case.args, self.case.kwargs
        self.guide = AutoLaplaceFamily(self.model)
        self.guide(*self.args, **self.kwargs)
        self.elbo_guide = self.guide
        layout = self.guide.layout
        self.noise = [
            (normals(layout.global_dim, seed=p), normals(layout.num_units, layout.local_dim, seed=10 + p))
            for p in range(PARTICLES)
        ]

    def draws(self, vectorized):
        """The noise in the order in which it is asked for."""
        if vectorized:
            pairs = [torch.stack(parts) for parts in zip(*self.noise, strict=True)]
        else:
            pairs = [part for pair in self.noise for part in pair]
        return [part for part in pairs if part.numel()]

    def losses(self, vectorized):
        """log q - log p of each particle; attached to the parameters. Only a loop has a minibatch for each particle."""
        pyro.set_rng_seed(1)
        batches = [self.guide.gaussian(*self.args, **self.kwargs) for _ in range(1 if vectorized else PARTICLES)]
        pairs = zip(batches * PARTICLES if vectorized else batches, self.noise, strict=True)
        return torch.stack([dense_loss(gaussian, *noise) for gaussian, noise in pairs])

    def run(self, elbo):
        """Loss and gradients by one of Pyro's estimators, for the same minibatch and noise."""
        elbo.max_plate_nesting = 3  # that of particles included, so that it need not run the guide to find out
        pyro.set_rng_seed(1)
        for leaf in leaves().values():
            leaf.grad = None
        with fixed_noise(self.draws(elbo.vectorize_particles)):
            loss = elbo.loss_and_grads(self.model, self.elbo_guide, *self.args, **self.kwargs)
        return torch.as_tensor(loss), {name: leaf.grad for name, leaf in leaves().items()}


def dense_loss(gaussian, global_noise, local_noise):
    """log q - log p of one draw, by dense matrices; a unit of a minibatch counts as often as in the model."""
    d, (n, k), weight = len(gaussian.global_loc), gaussian.local_loc.shape, gaussian.unit_model.layout.weight
    precision = gaussian.precision.to_dense()
    tail, border = precision[d:, d:], precision[d:, :d]
    regression = torch.linalg.solve(tail, border)
    theta, log_q = gaussian.global_loc, 0.0
    if d:
        marginal = dist.MultivariateNormal(theta, precision_matrix=precision[:d, :d] - border.mT @ regression)
        theta = theta + marginal.scale_tril @ global_noise
        log_q = marginal.log_prob(theta)
    loc = gaussian.local_loc.reshape(-1) - regression @ (theta - gaussian.global_loc)
    conditional = dist.MultivariateNormal(loc, precision_matrix=tail)
    y = loc + conditional.scale_tril @ local_noise.reshape(-1)
    log_q = log_q + weight * conditional.log_prob(y)
    return log_q - gaussian.unit_model.log_joint(theta, y.reshape(n, k))


def leaves():
    return dict(pyro.get_param_store().named_parameters())


def differentiate(loss):
    gradients = torch.autograd.grad(loss, list(leaves().values()), allow_unused=True, retain_graph=True)
    return dict(zip(leaves(), gradients, strict=True))


def check(twin, elbo, expected, name):
    loss, gradients = twin.run(elbo)
    assert figures.add(f"{name} loss", relative_error(loss.reshape(()), expected.detach())) < 1e-9
    for leaf, gradient in differentiate(expected).items():
        assert figures.add(f"{name} gradient", relative_error(gradients[leaf], gradient)) < 1e-8, leaf


@pytest.mark.parametrize("model", FAMILY_MODELS)
def test_every_elbo_has_the_loss_and_gradient_of_the_dense_gaussian(model):
    twin = Twin(model)
    for name, elbo in ELBOS.items():
        for vectorized in (False, True):
            estimator = elbo(num_particles=PARTICLES, vectorize_particles=vectorized)
            check(twin, estimator, twin.losses(vectorized).mean(), name)


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize(
    "model", ["poisson", "weighted", "vectors", "subsampled", "lonely global", "dependent_support"]
)
def test_renyi_elbo_weighs_the_particles(model, vectorized):
    twin = Twin(model)
    for alpha in (0.0, 0.5, 3.0):
        bounds = (alpha - 1.0) * twin.losses(vectorized)
        expected = -(bounds.logsumexp(0) - math.log(PARTICLES)) / (1.0 - alpha)
        estimator = RenyiELBO(alpha=alpha, num_particles=PARTICLES, vectorize_particles=vectorized)
        check(twin, estimator, expected, "renyi")


def test_renyi_elbo_without_globals_is_one_of_each_unit():
    """Every site is then in the plate of the units, and Pyro weighs the particles of each of them on its own."""
    twin = Twin("without globals")
    (z,) = twin.args
    units = [twin.guide.gaussian(z[i : i + 1]) for i in range(len(z))]
    losses = [[dense_loss(unit, g, y[i : i + 1]).item() for g, y in twin.noise] for i, unit in enumerate(units)]
    expected = -((-torch.tensor(losses)).logsumexp(-1) - math.log(PARTICLES)).sum()
    loss, _ = twin.run(RenyiELBO(alpha=0.0, num_particles=PARTICLES, vectorize_particles=True))
    assert relative_error(loss, expected) < 1e-9


MISTAKES = {
    "no log scale of the units": lambda name: name.endswith("_local_log_scale"),
    "no Jacobian": lambda name: name.endswith("_log_jacobian"),
    "no density of the units": lambda name: name.endswith("_local_noise"),
}


class Lacking(Messenger):
    """Mask the sites of a guide that a mistake names."""

    def __init__(self, mistake):
        super().__init__()
        self.mistake = mistake

    def _pyro_sample(self, msg):
        if self.mistake(msg["name"]):
            msg["mask"] = False


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_check_finds_a_guide_that_lacks_a_term(mistake):
    twin = Twin("constrained")
    expected = twin.losses(vectorized=True).mean()
    twin.elbo_guide = Lacking(MISTAKES[mistake])(twin.guide)
    for elbo in ELBOS.values():
        with pytest.raises(AssertionError):
            check(twin, elbo(num_particles=PARTICLES, vectorize_particles=True), expected, "planted")
