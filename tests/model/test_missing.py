"""What is missing has no part in a density or its derivatives, whatever stands there and however it is said."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.missing import KINDS, SEEN, beside, drawn, holed, nested
from pyro import poutine

from laplace_amort import LogJoint, ModelError
from laplace_amort.autodiff import fixed_normal
from laplace_amort.model.missing import inside


def value_and_gradients(model, *args):
    """The log joint at a fixed random point, its gradient, and a product with its Hessian."""
    log_joint = LogJoint(model, *args)
    packed = 0.5 * fixed_normal(torch.zeros(log_joint.size))
    packed.requires_grad_()
    value = log_joint(packed)
    (gradient,) = torch.autograd.grad(value, packed, create_graph=True)
    (product,) = torch.autograd.grad(gradient.sin().sum(), packed)
    return torch.cat([value.reshape(1), gradient, product]).detach()


@pytest.mark.parametrize("model", [nested, beside])
@pytest.mark.parametrize("how", ["obs_mask", "poutine", "mask"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_density_of_what_is_seen(kind, how, model):
    values = drawn(kind)
    expected = value_and_gradients(model, kind, "mask", values)
    found = value_and_gradients(model, kind, how, holed(values))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.isfinite().all()


def test_what_is_seen_matters():
    values = drawn("normal")
    assert not torch.allclose(
        value_and_gradients(nested, "normal", "mask", values), value_and_gradients(nested, "normal", "mask", values + 1)
    )


def test_nan_under_a_mask_would_be_a_nan_of_the_gradient():
    """Pyro's own: that there is something to do."""
    mu = torch.zeros((), requires_grad=True)
    with poutine.trace() as tracer, poutine.mask(mask=torch.tensor([True, False])):
        pyro.sample("z", dist.Normal(mu, torch.ones(2), validate_args=False), obs=torch.tensor([1.0, torch.nan]))
    assert torch.autograd.grad(tracer.trace.log_prob_sum(), mu)[0].isnan()


def events(how, z, seen):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        base = dist.LogNormal(y.unsqueeze(-1) + torch.zeros(3), 1.0)
        if how == "inner":
            pyro.sample("z", base.mask(seen).to_event(1), obs=z)
        elif how == "whole":
            pyro.sample("z", base.to_event(1).mask(seen.all(-1)), obs=z)
        else:
            pyro.sample("z", base.to_event(1), obs=z, obs_mask=seen.all(-1))


@pytest.mark.parametrize("how", ["inner", "whole", "obs_mask"])
def test_events_of_which_a_part_is_missing(how):
    seen = torch.tensor([[True, True, True], [True, False, True], [False, False, False], [True, True, True]])
    z = torch.arange(1.0, 13.0).reshape(4, 3)
    expected = value_and_gradients(events, "whole" if how == "obs_mask" else how, z, seen)
    found = value_and_gradients(events, how, torch.where(seen, z, torch.nan), seen)
    torch.testing.assert_close(found, expected)


LABELS = {
    "bernoulli": [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32],
    "poisson": [torch.int64, torch.int32, torch.uint8, torch.float32],
    "binomial": [torch.int64, torch.uint8, torch.float32],
    "categorical": [torch.int32, torch.float32, torch.float64],
}


@pytest.mark.parametrize(("kind", "dtype"), [(kind, dtype) for kind in LABELS for dtype in LABELS[kind]])
def test_labels_and_counts_are_taken_in_any_dtype(kind, dtype):
    values = drawn(kind)
    all_of_them = torch.ones_like(SEEN)
    expected = value_and_gradients(nested, kind, "mask", values, all_of_them)
    found = value_and_gradients(nested, kind, "mask", values.to(dtype), all_of_them)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_density_of_the_users_own_has_its_data_as_they_are():
    class Counting(dist.Bernoulli):
        def log_prob(self, value):
            assert value.dtype is torch.int64
            return torch.where(value == 1, self.probs, 1 - self.probs).log()

    def model(z):
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
        pyro.sample("z", Counting(logits=y), obs=z)

    assert LogJoint(model, torch.tensor(1))(torch.zeros(1)).isfinite()


EVERYWHERE = {
    **{kind: lambda kind=kind: KINDS[kind](torch.zeros(3)) for kind in KINDS},
    "geometric": lambda: dist.Geometric(0.3),
    "negative_binomial": lambda: dist.NegativeBinomial(3.0, 0.2),
    "multinomial": lambda: dist.Multinomial(3, torch.ones(3)),
    "one_hot": lambda: dist.OneHotCategorical(torch.ones(3)),
    "zero_inflated": lambda: dist.ZeroInflatedPoisson(torch.tensor(1.0), gate=torch.tensor(0.2)),
    "mixture": lambda: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Poisson(torch.ones(2))),
    "extended_binomial": lambda: dist.ExtendedBinomial(3, 0.5),
    "dirichlet": lambda: dist.Dirichlet(torch.ones(3)),
    "multivariate_normal": lambda: dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
    "pareto": lambda: dist.Pareto(torch.tensor([1.0, 2.0]), 1.0),
    "uniform": lambda: dist.Uniform(torch.tensor([1.0, 2.0]), 5.0),
    "von_mises": lambda: dist.VonMises(0.0, 1.0),
    "weibull": lambda: dist.Weibull(1.0, 2.0),
    "cholesky": lambda: dist.LKJCholesky(3),
    "event": lambda: dist.Beta(2.0, 2.0).expand([3]).to_event(1),
    "masked": lambda: dist.LogNormal(0.0, 1.0).expand([3]).mask(torch.tensor([True, False, True])),
}


@pytest.mark.parametrize("name", EVERYWHERE)
def test_there_is_a_possible_value_of_every_distribution(name):
    fn = EVERYWHERE[name]()
    value = inside(fn).to(torch.get_default_dtype())
    value = value.broadcast_to(torch.broadcast_shapes(value.shape, fn.shape())).clone().requires_grad_()
    assert fn.support.check(value).all()
    density = fn.log_prob(value)
    assert density.isfinite().all()
    if density.requires_grad:
        assert torch.autograd.grad(density.sum(), value)[0].isfinite().all()


def test_of_a_support_without_coordinates_nothing_is_known():
    assert inside(dist.ProjectedNormal(torch.ones(3))) is None


def test_data_that_are_missing_where_no_mask_says_so_are_refused():
    with pytest.raises(ModelError, match=r"'z' \(Normal\) has .* the first nan"):
        LogJoint(nested, "normal", "mask", holed(drawn("normal")), torch.ones_like(SEEN)).check_data()
