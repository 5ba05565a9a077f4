"""AutoLaplaceFamily in Pyro's inference: SVI, other optimizers, AutoGuideList, scales, Predictive, Importance."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.guides import EXACT, fixed_noise, loss_of
from helpers.models import MODELS, counts, normals
from helpers.unit_models import FAMILY_MODELS, with_parameter
from helpers.unit_models import batches as poisson
from pyro import poutine
from pyro.infer import SVI, Importance, Predictive, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value

from laplace_amort import ModelError
from laplace_amort.guide.auto import AutoLaplaceFamily


def fitted(model, *args, steps=60):
    guide = AutoLaplaceFamily(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(num_particles=4, vectorize_particles=True))
    for _ in range(steps):
        svi.step(*args)
    return guide


# ------------------------------------------------------------------------------------------------------------------ SVI


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, RenyiELBO])
@pytest.mark.parametrize("name", ["poisson", "weighted", "with parameter", "without globals", "subsampled"])
def test_svi_steps_and_evaluates(name, elbo):
    case = FAMILY_MODELS[name]()
    guide = AutoLaplaceFamily(case.model)
    svi = SVI(case.model, guide, pyro.optim.Adam({"lr": 0.02}), elbo(num_particles=2))
    pyro.set_rng_seed(1)
    expected = elbo(num_particles=2).loss(case.model, guide, *case.args)
    pyro.set_rng_seed(1)
    assert svi.evaluate_loss(*case.args) == pytest.approx(expected, rel=1e-9)
    before = {name: leaf.detach().clone() for name, leaf in pyro.get_param_store().named_parameters()}
    pyro.set_rng_seed(1)
    assert svi.step(*case.args) == pytest.approx(expected, rel=1e-9)  # the loss before the step
    for name, leaf in pyro.get_param_store().named_parameters():
        assert leaf.isfinite().all()
        assert leaf.numel() == 0 or (leaf != before[name]).all(), name


def test_a_fit_finds_the_posterior_of_a_gaussian_model():
    case = MODELS["conjugate_normal"]()
    (z,) = case.args
    guide = AutoLaplaceFamily(case.model)
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=2)
    svi = SVI(case.model, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
    for seed in range(100):
        noise = normals(1, seed=seed), normals(4, 1, seed=seed + 1000)
        with fixed_noise([torch.stack([part, -part]) for part in noise]):  # pairs that cancel in the gradient
            svi.step(z)
    variance = 0.7**2 + 0.5**2
    expected = (z.sum() / variance) / (1 + 4 / variance)
    torch.testing.assert_close(guide.median(z)["mu"], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD, torch.optim.LBFGS])
def test_plain_torch_optimizers(optimizer):
    z = normals(4)
    guide = AutoLaplaceFamily(with_parameter)
    guide(z)
    pyro.param("noise", torch.tensor(0.5), constraint=dist.constraints.positive)
    noise = pyro.param("noise").unconstrained()
    assert [name for name, _ in guide.named_parameters()] == ["loc_unconstrained"]
    optim = optimizer([*guide.parameters(), noise], lr=0.05)

    def closure():
        optim.zero_grad()
        pyro.set_rng_seed(1)
        loss = TraceMeanField_ELBO().differentiable_loss(with_parameter, guide, z)
        loss.backward()
        return loss

    losses = [optim.step(closure).item() for _ in range(3)]
    assert losses[-1] < losses[0]
    assert noise.grad.abs() > 0


def test_the_module_form_of_an_elbo():
    z = normals(4)
    guide = AutoLaplaceFamily(with_parameter)
    guide(z)
    elbo = Trace_ELBO()(with_parameter, guide)
    optim = torch.optim.Adam(elbo.parameters(), lr=0.05)
    pyro.set_rng_seed(1)
    loss = elbo(z)
    assert float(loss.detach()) == pytest.approx(float(loss_of(with_parameter, guide, z)), rel=1e-9)
    loss.backward()
    before = guide.loc.detach().clone()
    optim.step()
    assert (guide.loc != before).all()


def test_gradients_of_the_two_forms_agree():
    """SVI's own backward and a differentiable loss leave the same in ``.grad``."""
    z = counts(5)
    guide = AutoLaplaceFamily(poisson)
    guide(z)
    found = []
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        pyro.set_rng_seed(1)
        found.append(torch.autograd.grad(elbo.differentiable_loss(poisson, guide, z), guide.loc)[0])
        pyro.set_rng_seed(1)
        guide.loc.grad = None
        elbo.loss_and_grads(poisson, guide, z)
        found.append(guide.loc.grad)
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0], **EXACT)


# --------------------------------------------------------------------------------------------------------------- scales


def test_a_common_scale_scales_the_loss_and_nothing_else():
    z = counts(5)
    guide = AutoLaplaceFamily(poisson)
    plain = loss_of(poisson, guide, z)
    median = guide.median(z)
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO(), TraceGraph_ELBO()):
        loss = loss_of(poutine.scale(poisson, scale=0.1), poutine.scale(guide, scale=0.1), z, elbo=elbo)
        torch.testing.assert_close(loss, 0.1 * plain, **EXACT)
    for name, value in guide.median(z).items():
        torch.testing.assert_close(value, median[name], **EXACT)


def test_a_scaled_model_has_a_scaled_precision():
    """A tempered posterior: its curvature is that much larger, and its modes are the same."""
    z = counts(5)
    plain, tempered = (AutoLaplaceFamily(m).gaussian(z) for m in (poisson, poutine.scale(poisson, scale=4.0)))
    # The log-Jacobian of tau is not scaled; it is linear in log(tau), and so without curvature.
    torch.testing.assert_close(tempered.precision.to_dense(), 4.0 * plain.precision.to_dense(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(tempered.local_loc, plain.local_loc, **EXACT)


# -------------------------------------------------------------------------------------------------------- AutoGuideList


def listed(model, *parts):
    guide = AutoGuideList(model)
    for part in parts:
        guide.append(part)
    return guide


@pytest.mark.parametrize("name", ["poisson", "vectors", "subsampled", "with parameter", "correlated"])
def test_alone_in_a_list_it_is_what_it_is(name):
    case = FAMILY_MODELS[name]()
    alone = AutoLaplaceFamily(case.model)
    guide = listed(case.model, AutoLaplaceFamily(case.model))
    alone(*case.args)
    guide(*case.args)
    with torch.no_grad():
        guide[0].loc.copy_(alone.loc)  # where a site has no mean, the start is random
    expected = loss_of(case.model, alone, *case.args)
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        torch.testing.assert_close(loss_of(case.model, guide, *case.args, elbo=elbo), expected, **EXACT)
    svi = SVI(case.model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(2, vectorize_particles=True))
    svi.step(*case.args)
    assert "AutoGuideList.0.loc" in pyro.get_param_store()
    assert {n: v.shape for n, v in guide.median(*case.args).items()} == {
        n: v.shape for n, v in guide(*case.args).items()
    }
    assert guide.quantiles([0.1, 0.9], *case.args)["mu"].shape[0] == 2


def test_beside_a_part_that_takes_a_site_conditioned_away():
    """The other part guides mu; this one sees a model in which mu has a value."""
    z, mu = counts(5), torch.tensor(0.4)
    given = poutine.condition(poisson, data={"mu": mu})
    other = AutoDelta(poutine.block(poisson, expose=["mu"]), init_loc_fn=init_to_value(values={"mu": mu}))
    guide = listed(poisson, other, AutoLaplaceFamily(given))
    assert set(guide(z)) == {"mu", "tau", "y"}
    loss = loss_of(poisson, guide, z)
    torch.testing.assert_close(loss, loss_of(given, AutoLaplaceFamily(given), z), **EXACT)
    SVI(poisson, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(z)
    assert {"AutoGuideList.0.mu", "AutoGuideList.1.loc"} <= set(pyro.get_param_store())


def test_a_latent_that_is_hidden_and_not_given_is_refused_with_the_cure():
    hidden = poutine.block(poisson, hide=["mu"])
    guide = listed(poisson, AutoNormal(poutine.block(poisson, expose=["mu"])), AutoLaplaceFamily(hidden))
    with pytest.raises(ModelError, match=r"Does poutine\.block hide a latent") as caught:
        guide(counts(5))
    assert "AutoLaplaceFamily(poutine.condition(model, data={'site': value}))" in str(caught.value)


def test_plates_of_the_list_are_those_of_its_parts():
    z = counts(5)
    guide = AutoGuideList(poisson, create_plates=lambda z: pyro.plate("units", 5, subsample=torch.tensor([3, 1])))
    guide.append(AutoLaplaceFamily(poisson))
    assert guide(z)["y"].shape == (2,)
    gaussian = guide[0].gaussian(z)
    assert gaussian.unit_model.units.tolist() == [3, 1]
    part = AutoLaplaceFamily(poisson, create_plates=lambda z: pyro.plate("units", 5, subsample_size=2))
    with pytest.raises(ModelError, match=r"Give create_plates to the list:\n    AutoGuideList\(model, create_plates="):
        listed(poisson, part)(z)


# ----------------------------------------------------------------------------------------------------------- Predictive


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("name", ["poisson", "vectors", "constrained", "without globals", "nested_plates"])
def test_predictive(name, parallel):
    case = FAMILY_MODELS[name]()
    guide = AutoLaplaceFamily(case.model)
    shapes = {site: value.shape for site, value in guide(*case.args).items()}
    new_data = poutine.uncondition(case.model)  # the guide looks at the data, and the model makes new ones
    draws = Predictive(new_data, guide=guide, num_samples=6, parallel=parallel)(*case.args)
    for site, shape in shapes.items():
        # In parallel there is a 1 for every plate that a site is not in.
        assert draws[site].shape[0] == 6
        assert draws[site].numel() == 6 * shape.numel()
        assert draws[site].reshape(6, -1).std(0).min() > 0
    assert draws["z"].shape == (6, *case.args[0].shape)


def test_serial_and_parallel_predictive_agree():
    """Against the exact posterior predictive of a Gaussian model; false alarms: 4 * 2 * 2e-6."""
    case = MODELS["conjugate_normal"]()
    (z,) = case.args
    guide = AutoLaplaceFamily(case.model)
    mean, variance = guide.median(z)["y"], guide.gaussian(z).precision.local_variance()[:, 0].detach() + 0.25
    for parallel, count in ((False, 100), (True, 5000)):
        draws = Predictive(poutine.uncondition(case.model), guide=guide, num_samples=count, parallel=parallel)(z)["z"]
        assert ((draws.mean(0) - mean) / (variance / count).sqrt()).abs().max() < 4.8


def test_draws_of_the_posterior_for_a_model_without_data():
    """Where the model takes no data, the guide cannot look at them: hand it draws."""

    def model(z=None, size=5):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("units", size):
            y = pyro.sample("y", dist.Normal(mu, 0.5))
            return pyro.sample("z", dist.Normal(y, 0.5), obs=z)

    guide, z = AutoLaplaceFamily(model), normals(5)
    draws = Predictive(model, posterior_samples=guide.sample_posterior(6, z), parallel=False)()
    assert draws["z"].shape == (6, 5)
    with pytest.raises(ModelError, match=r"set up for 1 global elements? and 1 in each unit; this call"):
        Predictive(model, guide=guide, num_samples=6)()


def test_data_of_another_size_have_other_units_and_the_same_globals():
    z, others = counts(5), counts(8, seed=3)
    guide = fitted(poisson, z, steps=5)
    expected = AutoLaplaceFamily(poisson)
    expected.gaussian(others)
    expected.loc = guide.loc
    for data in (others, z, others[:1], z):
        found = guide.median(data)
        assert found["y"].shape == data.shape
        torch.testing.assert_close(found["y"], expected.median(data)["y"], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found["mu"], guide.loc[0].detach(), **EXACT)
        draws = Predictive(poisson, guide=guide, num_samples=4, parallel=True)(data)
        assert draws["y"].shape == (4, len(data))


def test_data_of_another_size_in_arrays_and_containers():
    def model(data):
        poisson(torch.as_tensor(data["z"][0]))

    guide = AutoLaplaceFamily(model)
    for size in (5, 8, 3):
        z = counts(size)
        assert guide.median({"z": [z.numpy()]})["y"].shape == (size,)


def test_reading_a_guide_first_does_not_keep_it_from_learning():
    """Set-up under no_grad makes a parameter all the same."""
    guide, z = AutoLaplaceFamily(poisson), counts(5)
    before = guide.median(z)["mu"]
    SVI(poisson, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(z)
    assert guide.median(z)["mu"] != before


# ----------------------------------------------------------------------------------------------------------- Importance


def test_importance_weights_of_a_gaussian_model_are_the_evidence():
    case = MODELS["conjugate_normal"]()
    (z,) = case.args
    guide = AutoLaplaceFamily(case.model)
    guide.gaussian(z)
    with torch.no_grad():
        guide.loc.fill_(float((z.sum() / 0.74) / (1 + 4 / 0.74)))
    posterior = Importance(case.model, guide=guide, num_samples=20).run(z)
    evidence = dist.MultivariateNormal(torch.zeros(4), torch.eye(4) * 0.74 + 1.0).log_prob(z)
    weights = torch.stack([torch.as_tensor(weight) for weight in posterior.log_weights])
    torch.testing.assert_close(weights, evidence.expand(20), **EXACT)
    assert float(posterior.get_ESS()) == pytest.approx(20)


def test_importance_samples_of_constrained_sites():
    case = FAMILY_MODELS["constrained"]()
    guide = AutoLaplaceFamily(case.model)
    posterior = Importance(case.model, guide=guide, num_samples=20).run(*case.args)
    assert posterior.get_log_normalizer().isfinite()
    marginal = pyro.infer.EmpiricalMarginal(posterior, sites="share")
    assert 0 < marginal.mean < 1
