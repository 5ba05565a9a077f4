"""Vectorized particles are the looped ones: value by value for the same noise, for 1, 2 and 1000 of them."""

import pytest
import torch
from helpers.dense_twin import DenseTwin, Noise, loss_and_gradients, standard_noise
from helpers.models import normals
from helpers.oracles import Figures, relative_error
from helpers.unit_models import UNIT_MODELS
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

from laplace_amort.guide.auto import AutoLaplaceFamily
from laplace_amort.guide.gaussian import LaplaceGaussian
from laplace_amort.model.layout import UnitLayout

figures = Figures()

# Units at dim -1 and at dim -2, of one dimension and of two.
FOUR = ["poisson_by_visit", "binomial_slopes", "missing", "level_and_spread"]
# More dimensions, supports of all kinds, weights, factors; no globals.
NAMES = [
    *FOUR,
    "nested_latents",
    "dim_minus_three",
    "units_inside_a_plate_of_data",
    "categorical_probs",
    "dependent_supports",
    "crossed_items",
    "correlated",
    "tempered",
    "with_factors",
    "without_globals",
]
EVERY = [(name, Trace_ELBO) for name in NAMES]
EVERY += [(name, elbo) for name in FOUR for elbo in (TraceGraph_ELBO, TraceMeanField_ELBO)]


def make(name):
    case = UNIT_MODELS[name]()
    guide = AutoLaplaceFamily(case.model)
    guide(*case.args, **case.kwargs)
    with torch.no_grad():
        guide.loc += 0.2 * normals(case.global_dim, seed=8)
    return case, guide


def vectorized_traces(case, guide, noise):
    elbo = Trace_ELBO(num_particles=len(noise[0]), vectorize_particles=True)
    with Noise(*noise):
        return next(iter(elbo._get_traces(case.model, guide, case.args, case.kwargs)))


def losses_by_particle(model_trace, guide_trace, particles):
    """Minus the ELBO of each particle; every site has its own row of particles, or is the same for all."""
    total = torch.zeros(particles)
    for trace, sign in ((model_trace, -1), (guide_trace, 1)):
        for node in trace.nodes.values():
            if "log_prob" in node:
                log_prob = node["log_prob"]
                rows = log_prob.reshape(particles if log_prob.dim() else 1, -1)
                total = total + sign * rows.sum(-1)
    return total


@torch.no_grad()
def differences_by_particle(name, particles):
    """Relative errors of the values and losses of each particle against dense draws, one after another."""
    case, guide = make(name)
    noise = standard_noise(particles, case)
    model_trace, guide_trace = vectorized_traces(case, guide, noise)
    twin = DenseTwin(case, guide.loc, guide.tail_repair, guide.head_repair)
    draws = twin.draws(guide.loc, noise)
    for site in draws[0]:
        expected = torch.stack([draw[site] for draw in draws])
        for trace in (model_trace, guide_trace):
            yield relative_error(trace.nodes[site]["value"].reshape(expected.shape), expected)
    yield relative_error(losses_by_particle(model_trace, guide_trace, particles), twin.losses(guide.loc, noise))


def check_particles(name, particles):
    for error in differences_by_particle(name, particles):
        assert figures.add(f"values and losses of {particles} particles", error) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_each_particle_has_its_own_values_and_loss(name):
    check_particles(name, 2)


@pytest.mark.parametrize("particles", [1, 1000])
@pytest.mark.parametrize("name", FOUR)
def test_one_and_a_thousand_particles(name, particles):
    check_particles(name, particles)


@pytest.mark.parametrize(("name", "elbo"), EVERY)
def test_loss_and_gradient_equal_those_of_the_loop(name, elbo):
    case, guide = make(name)
    noise = standard_noise(2, case)
    looped, vectorized = (
        loss_and_gradients(elbo(num_particles=2, vectorize_particles=vectorize), case, guide, noise)
        for vectorize in (False, True)
    )
    assert figures.add("loss of two particles", relative_error(vectorized[0], looped[0])) < 1e-9
    assert set(vectorized[1]) == set(looped[1])
    for key, gradient in looped[1].items():
        assert figures.add("gradient of two particles", relative_error(vectorized[1][key], gradient)) < 1e-9


def one_noise_for_all(self, deviation, noise, original=LaplaceGaussian._local):
    return original(self, deviation, noise[:1].expand_as(noise))


def one_deviation_for_all(self, deviation, noise, original=LaplaceGaussian._local):
    return original(self, deviation[:1].expand_as(deviation), noise)


def particles_in_reverse(self, local, leading, original=UnitLayout._local_to_sites):
    return original(self, local.flip(0) if local.dim() == 3 else local, leading)


BUGS = {
    "one noise for all": (LaplaceGaussian, "_local", one_noise_for_all),
    "one deviation for all": (LaplaceGaussian, "_local", one_deviation_for_all),
    "units of other particles": (UnitLayout, "_local_to_sites", particles_in_reverse),
}


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("name", ["poisson_by_visit", "level_and_spread"])
def test_particles_that_are_mixed_up_are_found(name, bug, monkeypatch):
    monkeypatch.setattr(*BUGS[bug])
    assert max(differences_by_particle(name, 2)) > 1e-3
