"""Guides with parameters of their own: several in one session, and nothing in Pyro's store."""

import copy
import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.guides import EXACT, same
from helpers.models import counts
from helpers.unit_models import batches as poisson
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from laplace_amort import AutoLaplaceFamily, FixedDrawELBO, MarginalLaplace, ModelError, Stochastic, fit
from laplace_amort.guide import own_guide
from laplace_amort.linalg.boost import Boost
from laplace_amort.units.modes import FreeMode

KINDS = {"newton": {}, "free": {"mode": FreeMode()}, "boost": {"repair": Boost()}}


def normal(z):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)


def slopes(x, z):
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("units", len(z), dim=-1):
        a = pyro.sample("a", dist.Normal(mu, 1.0).to_event(1))
        pyro.sample("z", dist.Normal((a @ torch.ones(3)) + (x @ beta), 1.0), obs=z)


def with_parameter(z):
    scale = pyro.param("scale", torch.tensor(1.3), constraint=constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, scale))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)


Z, W = torch.tensor([1.0, 3.0, 0.5]).double(), torch.tensor([0.4, 1.0, -1.0, 2.0, 0.1]).double()
X = torch.linspace(-1.0, 1.0, 10).double().reshape(5, 2) ** 2


def svi(model, guide, optimizer=None):
    return SVI(model, guide, optimizer or pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())


def numbers(guide, *args):
    return torch.cat([value.flatten() for value in guide.median(*args).values()]).detach()


@pytest.mark.parametrize(
    "objective",
    [FixedDrawELBO(), MarginalLaplace(), Stochastic(window=20, max_steps=40)],
    ids=["elbo", "laplace", "noisy"],
)
def test_two_fits_in_one_session(objective):
    fresh_first = fit(normal, own_guide(normal), Z, objective=objective)
    fresh_second = fit(slopes, own_guide(slopes), X, W, objective=objective)
    assert len(pyro.get_param_store()) == 0
    for result, alone in ((fresh_first, normal), (fresh_second, slopes)):  # as with the store, cleared in between
        pyro.clear_param_store()
        args = (Z,) if alone is normal else (X, W)
        expected = fit(alone, AutoLaplaceFamily(alone), *args, objective=objective)
        torch.testing.assert_close(numbers(result.guide, *args), numbers(expected.guide, *args))
        assert result.objective == pytest.approx(expected.objective)


def test_alternately_and_in_any_order():
    first, second = own_guide(normal), own_guide(slopes)
    one, other = fit(normal, first, Z), fit(slopes, second, X, W)
    again = fit(normal, own_guide(normal), Z + 1.0)
    before = numbers(first, Z), numbers(second, X, W)
    assert not torch.allclose(before[0], numbers(again.guide, Z))  # guides of one model are two, too
    other.posterior.sample(5)
    assert other.predictive(num_samples=4)(X, W)["z"].shape == (4, 5)
    assert one.posterior.sample(5)["y"].shape == (5, 3)
    assert one.predictive(num_samples=4)(Z)["z"].shape == (4, 3)
    assert one.posterior_for(torch.tensor([2.0])).sample(3)["y"].shape == (3, 1)
    assert set(first(Z)) == {"mu", "y"}
    assert set(second(X, W)) == {"beta", "mu", "a"}
    steps = svi(normal, first), svi(slopes, second)
    for _ in range(10):
        steps[0].step(Z)
        steps[1].step(X, W)
    assert not torch.allclose(numbers(first, Z), before[0])
    assert not torch.allclose(numbers(second, X, W), before[1])
    pyro.clear_param_store()
    torch.testing.assert_close(first.median(Z)["mu"], first.loc.detach()[0], **EXACT)
    assert fit(slopes, second, X, W).objective == pytest.approx(other.objective, abs=1e-6)
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_svi_moves_what_it_moves_in_the_store(options):
    z = counts(5)
    guides = own_guide(poisson, **options), AutoLaplaceFamily(poisson, **options)
    for guide in guides:
        pyro.set_rng_seed(3)
        steps = svi(poisson, guide)
        for _ in range(8):
            steps.step(z)
    own, stored = ({name: leaf.detach() for name, leaf in guide.named_parameters()} for guide in guides)
    assert list(own) == list(stored)
    for name in own:
        torch.testing.assert_close(own[name], stored[name], **EXACT)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_options_and_states_of_optimizers_by_name(options):
    guide, z, asked = own_guide(poisson, **options), counts(5), []
    stored = AutoLaplaceFamily(poisson, **options)
    stored(z)
    optimizer = pyro.optim.Adam(lambda name: asked.append(name) or {"lr": 0.05})
    steps = svi(poisson, guide, optimizer)
    steps.step(z)
    expected = set(pyro.get_param_store().keys())
    assert set(asked) == expected == set(optimizer.get_state())


def test_parameters_of_the_model_stay_in_the_store():
    result = fit(with_parameter, own_guide(with_parameter), Z)
    assert list(pyro.get_param_store()) == ["scale"]
    scale, loc = pyro.param("scale").detach().clone(), result.guide.loc.detach().clone()
    assert scale != 1.3
    svi(with_parameter, result.guide).step(Z)
    assert pyro.param("scale") != scale
    assert (result.guide.loc != loc).all()
    assert list(pyro.get_param_store()) == ["scale"]


class Module(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](1, 1)
        self.scale = PyroParam(torch.tensor(1.3), constraint=constraints.positive)

    def forward(self, z):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(mu, self.scale))
            pyro.sample("z", dist.Normal(self.linear(y[..., None])[..., 0], 1.0), obs=z)


def test_modules_of_the_model_stay_in_the_store():
    model = Module()
    guide = own_guide(model)
    before = model.linear.weight.detach().clone()
    for _ in range(3):
        svi(model, guide).step(Z)
    assert set(pyro.get_param_store()) == {"scale", "linear.weight", "linear.bias"}
    assert (model.linear.weight != before).all()


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_copies_and_files_are_guides_of_their_own(options):
    guide, z = own_guide(poisson, **options), counts(5)
    svi(poisson, guide).step(z)
    expected = guide.median(z)
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    for other in (copy.deepcopy(guide), torch.load(file, weights_only=False)):
        other.attach(poisson)
        same(other.median(z), expected)
        svi(poisson, other).step(z)
        assert not torch.equal(other.loc, guide.loc)
    same(guide.median(z), expected)
    state, third = guide.state_dict(), own_guide(poisson, **options)
    third(z)
    third.load_state_dict(state)
    same(third.median(z), expected)
    assert len(pyro.get_param_store()) == 0


def test_in_single_precision():
    torch.set_default_dtype(torch.float32)
    z = Z.float()
    result = fit(normal, own_guide(normal), z)
    assert result.status.ok
    assert result.guide.loc.dtype == torch.float32
    assert result.predictive(num_samples=4)(z)["z"].dtype == torch.float32
    assert len(pyro.get_param_store()) == 0


def test_is_traced_and_printed_as_any_other():
    own, stored = own_guide(normal), AutoLaplaceFamily(normal)
    sites = [set(pyro.poutine.trace(guide).get_trace(Z).nodes) for guide in (own, stored)]
    assert sites[0] == sites[1]
    assert "AutoLaplaceFamily.loc" in sites[0]
    assert repr(own) == repr(stored)
    drawn = Predictive(normal, guide=own, num_samples=6)(Z)
    assert drawn["y"].shape == (6, 3)


def test_another_model_is_told_without_the_store():
    guide = own_guide(slopes)
    guide(X, W)
    other = copy.deepcopy(guide)
    other.attach(normal)
    with pytest.raises(ModelError, match="set up for 5 global elements") as caught:
        other(Z)
    assert "store" not in str(caught.value)
    assert str(caught.value).endswith("fit(model, *args)")
