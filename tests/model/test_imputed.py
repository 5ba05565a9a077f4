"""What obs_mask hides is a latent where something depends on it, by evidence, and nowhere else."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.missing import SEEN, covariate, covariate_data, drawn, holed, nested
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import constraints

from laplace_amort import AutoLaplaceFamily, LogJoint, ModelError

Z = torch.tensor([0.5, -1.0, 2.0, 0.3], dtype=torch.float64)
NORMAL = dist.Normal(0.0, 1.0)
PART = torch.tensor([True, False, True, False])


def latents(model, *args):
    return list(LogJoint(model, *args).sites)


def used(effect, hidden=NORMAL, seen=PART):
    """A site of which a part is hidden, with an effect on another: a function of coefficient and value."""

    def model(z=Z):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("units", 4):
            y = pyro.sample("y", dist.Normal(b, 1.0))
            x = pyro.sample("x", hidden.expand([4]), obs=torch.ones(4), obs_mask=seen)
            pyro.sample("z", dist.Normal(y + effect(b, x), 1.0), obs=z)

    return model


DEPENDENT = {
    "linear, where a coefficient of zero would hide it": (lambda b, x: b * x, dist.Normal(0.0, 1.0)),
    "a threshold beyond the prior mean": (lambda b, x: (x > 0.2).to(b), dist.Normal(0.0, 1.0)),
    "a positive one": (lambda b, x: x.log(), dist.LogNormal(0.0, 1.0)),
    "in the second place": (lambda b, x: x[..., [3, 1, 2, 0]] * b, dist.Gamma(2.0, 1.0)),
}


@pytest.mark.parametrize("name", DEPENDENT)
def test_what_another_site_depends_on_is_a_latent(name):
    assert latents(used(*DEPENDENT[name])) == ["b", "y", "x_unobserved"]


INDEPENDENT = {
    "not used": lambda b, x: 0.0 * b,
    "used where it is seen": lambda b, x: torch.where(PART, b * x, 0.0),
    "computed, and thrown away": lambda b, x: 0.0 * b * x,
}


@pytest.mark.parametrize("name", INDEPENDENT)
@pytest.mark.parametrize("hidden", [dist.Normal(0.0, 1.0), dist.Poisson(1.0), dist.Bernoulli(0.5)])
def test_what_none_depends_on_is_none(name, hidden):
    assert latents(used(INDEPENDENT[name], hidden)) == ["b", "y"]


@pytest.mark.parametrize("hidden", [dist.Poisson(0.01), dist.Bernoulli(1e-6), dist.Categorical(torch.ones(3))])
def test_a_discrete_one_that_matters_is_refused(hidden):
    kind = type(hidden).__name__
    with pytest.raises(ModelError) as caught:
        LogJoint(used(lambda b, x: b * x, hidden))
    said = str(caught.value)
    assert f"site 'x' ({kind}) has 2 elements that obs_mask hides, and site 'z' depends on their values" in said
    assert f"pyro.sample('x', dist.{kind}(...).mask(seen), obs=data)" in said


def test_the_line_of_the_refusal_works():
    def model(seen, z=Z):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("units", 4):
            y = pyro.sample("y", dist.Normal(b, 1.0))
            x = torch.tensor([1.0, torch.nan, 0.0, torch.nan]).nan_to_num()
            pyro.sample("x", dist.Bernoulli(0.5).expand([4]).mask(seen), obs=x)
            pyro.sample("z", dist.Normal(y + b * x, 1.0).mask(seen), obs=z)

    AutoLaplaceFamily(model)(PART)


def test_one_that_another_that_is_hidden_depends_on_is_none():
    """Where the second is not seen, the first has nothing to say either."""

    def model(seen_z):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("units", 4):
            y = pyro.sample("y", dist.Normal(b, 1.0))
            x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([4]), obs=Z, obs_mask=PART)
            pyro.sample("z", dist.Normal(y + b * x, 1.0), obs=Z, obs_mask=seen_z)

    assert latents(model, PART) == ["b", "y"]
    assert latents(model, torch.ones(4, dtype=torch.bool)) == ["b", "y", "x_unobserved"]


def test_a_chain_of_those_that_matter():
    def model():
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("units", 4):
            w = pyro.sample("w", dist.Normal(b, 1.0).expand([4]), obs=Z, obs_mask=PART)
            x = pyro.sample("x", dist.Normal(b * w, 1.0), obs=Z, obs_mask=PART)
            pyro.sample("z", dist.Normal(x, 1.0), obs=Z)

    assert latents(model) == ["b", "w_unobserved", "x_unobserved"]


def test_names_alone_make_no_hidden_part():
    def model():
        with pyro.plate("units", 4):
            x = pyro.sample("x_observed", dist.Normal(0.0, 1.0), obs=Z)
            y = pyro.sample("x_unobserved", dist.Normal(0.0, 1.0))
            pyro.sample("z", dist.Normal(y + x, 1.0), obs=Z)

    assert latents(model) == ["x_unobserved"]


def test_a_value_that_is_given_is_data():
    model = pyro.poutine.condition(used(lambda b, x: b * x), data={"x_unobserved": Z})
    assert latents(model) == ["b", "y"]


@pytest.mark.parametrize("positive", [False, True])
def test_what_was_seen_is_standard_normal_in_a_latent(positive):
    """So the density is that of the model, of which the seen elements are integrated out."""
    hidden = dist.LogNormal(0.3, 0.8) if positive else dist.Normal(0.3, 0.8)
    log_joint = LogJoint(used(lambda b, x: b * x, hidden))
    packed = torch.linspace(-1.0, 1.0, log_joint.size)
    values = log_joint.unpack(packed)
    b, y, u = values["b"], values["y"], values["x_unobserved"]
    x = u.exp() if positive else u
    density = dist.Normal(0.3, 0.8).log_prob(u)  # of a logarithm with its Jacobian
    expected = dist.Normal(0.0, 1.0).log_prob(b) + dist.Normal(b, 1.0).log_prob(y).sum()
    expected = expected + torch.where(PART, dist.Normal(0.0, 1.0).log_prob(u), density).sum()
    expected = expected + hidden.expand([4]).log_prob(torch.ones(4))[PART].sum()
    expected = expected + dist.Normal(y + b * torch.where(PART, 1.0, x), 1.0).log_prob(Z).sum()
    torch.testing.assert_close(log_joint(packed), expected)


def test_of_a_latent_that_was_seen_in_part_the_data_are_given_back():
    x, z = covariate_data()
    log_joint = LogJoint(covariate, "obs_mask", holed(x), z)
    found = log_joint.constrain(torch.linspace(-1.0, 1.0, log_joint.size))["x_unobserved"]
    assert torch.equal(found[SEEN], x[SEEN])
    assert not torch.isclose(found, x)[~SEEN].any()


ELBOS = {
    "trace": lambda: Trace_ELBO(),
    "mean field": lambda: TraceMeanField_ELBO(),
    "particles": lambda: Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=2),
}


@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("kind", ["normal", "gamma", "poisson", "bernoulli"])
def test_the_elbo_of_pyro_is_that_without_what_is_hidden(kind, elbo):
    def loss_and_gradient(how):
        pyro.clear_param_store()
        guide, values = AutoLaplaceFamily(nested), drawn(kind)
        guide(kind, how, values)
        pyro.set_rng_seed(3)
        loss = ELBOS[elbo]().differentiable_loss(nested, guide, kind, how, values)
        return [loss.detach(), *torch.autograd.grad(loss, list(guide.parameters()))]

    for found, expected in zip(loss_and_gradient("obs_mask"), loss_and_gradient("mask"), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_guide_draws_what_is_hidden_and_hides_what_is_seen():
    pyro.clear_param_store()
    guide = AutoLaplaceFamily(nested)
    trace = pyro.poutine.trace(guide).get_trace("poisson", "obs_mask", drawn("poisson"))
    node = trace.nodes["z_unobserved"]
    assert torch.equal(node["mask"], ~SEEN)
    assert constraints.nonnegative_integer.check(node["value"]).all()


def test_another_mask_of_the_same_shape_is_looked_at_anew():
    pyro.clear_param_store()
    x, z = covariate_data()
    guide = AutoLaplaceFamily(covariate)
    guide("obs_mask", x, z, SEEN, SEEN)  # what is missing of x has an answer nowhere
    assert list(guide.layout.local_sites) == ["y"]
    with pytest.raises(ModelError, match="the guide was set up for"):
        guide("obs_mask", x, z, SEEN, ~SEEN)
