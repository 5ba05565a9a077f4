"""Copies and files of AutoLaplaceFamily: state dict, deepcopy, torch.save, Pyro's param store."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.guides import same, saved, step, with_state
from helpers.models import counts
from helpers.unit_models import FAMILY_MODELS, vectors
from helpers.unit_models import batches as poisson
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroParam

from laplace_amort import ModelError
from laplace_amort.guide.auto import AutoLaplaceFamily
from laplace_amort.linalg.boost import Boost
from laplace_amort.units.modes import FreeMode


@pytest.mark.parametrize("options", [{}, {"mode": FreeMode()}, {"repair": Boost()}], ids=["newton", "free", "boost"])
def test_state_dict_round_trip(options):
    guide, z = with_state(**options)
    expected = guide.median(z), guide.quantiles([0.1], z)
    state = guide.state_dict()
    assert set(state) == {name for name, _ in guide.named_parameters()}
    other = AutoLaplaceFamily(poisson, **options)
    pyro.clear_param_store()
    other(z)  # an automatic guide has its parameters once it has run
    other.load_state_dict(state)
    for found, value in zip((other.median(z), other.quantiles([0.1], z)), expected, strict=True):
        same(found, value)
    other(z)
    same(other.median(z), expected[0])  # the param store does not bring the old values back


@pytest.mark.parametrize("options", [{}, {"mode": FreeMode()}, {"repair": Boost()}], ids=["newton", "free", "boost"])
def test_deepcopy(options):
    guide, z = with_state(**options)
    expected, loc = guide.median(z), guide.loc.detach().clone()
    twin = copy.deepcopy(guide)
    assert twin.model is guide.model is poisson
    assert not {id(leaf) for leaf in twin.parameters()} & {id(leaf) for leaf in guide.parameters()}
    assert set(twin.state_dict()) == set(guide.state_dict())
    with pyro.get_param_store().scope():  # guides of one name share what the store has under it, as all of Pyro's do
        same(twin.median(z), expected)
        step(poisson, twin, z)
        assert (twin.loc != loc).all()
    same(guide.median(z), expected)
    step(poisson, guide, z)  # the original goes on
    assert (guide.loc != loc).all()


def test_deepcopy_before_the_first_call():
    guide, z = AutoLaplaceFamily(poisson), counts(5)
    twin = copy.deepcopy(guide)
    same(twin.median(z), guide.median(z))


def test_deepcopy_of_a_guide_with_gradients():
    """A graph cannot be copied; there is none."""
    guide, z = AutoLaplaceFamily(poisson), counts(5)
    loss = Trace_ELBO().differentiable_loss(poisson, guide, z)
    twin = copy.deepcopy(guide)
    loss.backward()
    assert guide.loc.grad is not None
    assert twin.loc.grad is None


def test_save_and_load_with_a_model_that_can_be_imported():
    guide, z = with_state()
    expected = guide.median(z)
    file = saved(guide)
    same(guide.median(z), expected)  # saving takes nothing away
    pyro.clear_param_store()
    loaded = torch.load(file, weights_only=False)
    assert loaded.model is poisson
    same(loaded.median(z), expected)
    step(poisson, loaded, z)


def test_save_and_load_with_a_closure_as_model():
    scale = torch.tensor(0.7)

    def model(z):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("units", len(z)):
            pyro.sample("z", dist.Poisson(pyro.sample("y", dist.LogNormal(mu, scale))), obs=z)

    guide, z = AutoLaplaceFamily(model), counts(5)
    step(model, guide, z)
    expected = guide.median(z)
    file = saved(guide)
    pyro.clear_param_store()
    loaded = torch.load(file, weights_only=False)
    with pytest.raises(ModelError, match=r"saved without its model, .* Give it back:\n    guide.attach\(mod"):
        loaded(z)
    loaded.attach(model)
    same(loaded.median(z), expected)
    step(model, loaded, z)
    pyro.clear_param_store()
    same(guide.median(z), expected)


def test_save_and_load_through_the_param_store(tmp_path):
    """A fresh guide takes its values from the store, in every method."""
    guide, z = with_state(mode=FreeMode(), repair=Boost())
    expected = guide.median(z), guide.quantiles([0.2], z)
    pyro.get_param_store().save(tmp_path / "params")
    for first in ("median", "forward"):
        pyro.clear_param_store()
        pyro.get_param_store().load(tmp_path / "params")
        other = AutoLaplaceFamily(poisson, FreeMode(), repair=Boost())
        if first == "forward":
            other(z)
        same(other.median(z), expected[0])
        same(other.quantiles([0.2], z), expected[1])


@pytest.mark.parametrize("options", [{}, {"mode": FreeMode()}, {"repair": Boost()}], ids=["newton", "free", "boost"])
def test_a_store_that_is_loaded_over_a_guide_rules(options, tmp_path):
    """As with AutoNormal: the values are those of the store, and they are what the next fit moves."""
    guide, z = with_state(**options)
    expected = guide.median(z), guide.quantiles([0.2], z)
    pyro.get_param_store().save(tmp_path / "params")
    step(poisson, guide, z)
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "params")
    same(guide.median(z), expected[0])
    same(guide.quantiles([0.2], z), expected[1])
    before = {name: leaf.detach().clone() for name, leaf in pyro.get_param_store().named_parameters()}
    step(poisson, guide, z)
    for name, leaf in pyro.get_param_store().named_parameters():
        assert (leaf != before[name]).all(), name


def test_a_cleared_param_store_is_filled_again():
    guide, z = with_state()
    loc = guide.loc.detach().clone()
    pyro.clear_param_store()
    guide(z)
    assert torch.equal(pyro.param("AutoLaplaceFamily.loc").detach(), loc)


def test_two_models_in_one_program():
    z = counts(5)
    first = AutoLaplaceFamily(poisson)
    step(poisson, first, z)
    expected = first.median(z)
    pyro.clear_param_store()
    second = AutoLaplaceFamily(vectors)
    step(vectors, second, counts(3, 2))
    pyro.clear_param_store()
    same(first.median(z), expected)
    step(poisson, first, z)
    with pyro.get_param_store().scope():
        step(vectors, second, counts(3, 2))
    assert torch.equal(pyro.param("AutoLaplaceFamily.loc").detach(), first.loc.detach())


def test_a_guide_of_another_model_in_the_same_store_is_refused():
    """Two guides of one name share the values under it, as all of Pyro's do."""
    z = counts(5)
    step(poisson, AutoLaplaceFamily(poisson), z)
    with pytest.raises(ModelError, match=r"pyro\.clear_param_store\(\)"):
        AutoLaplaceFamily(FAMILY_MODELS["masked"]().model)(z, z > 0)


class Experiment(PyroModule):
    """A module that holds a model, as a method or as a part, and guides for both."""

    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(0.7), constraint=dist.constraints.positive)
        self.part = Part()
        self.posterior, self.posterior_of_part = AutoLaplaceFamily(self.model), AutoLaplaceFamily(self.part)

    def model(self, z):
        units(z, self.scale)


class Part(PyroModule):
    """A model as a module."""

    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(0.7), constraint=dist.constraints.positive)

    def forward(self, z):
        units(z, self.scale)


def units(z, scale):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.LogNormal(mu, scale))
        pyro.sample("z", dist.Poisson(y), obs=z)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: torch.load(saved(module), weights_only=False)])
def test_a_model_that_is_copied_with_its_guide_is_the_model_of_the_copy(copied):
    z, experiment = counts(5), Experiment()
    expected = experiment.posterior.median(z), experiment.posterior_of_part.median(z)
    twin = copied(experiment)
    assert twin.posterior.model.__self__ is twin
    assert twin.posterior_of_part.model is twin.part
    assert experiment.posterior.model.__self__ is experiment
    pyro.clear_param_store()
    for guide, median in zip((twin.posterior, twin.posterior_of_part), expected, strict=True):
        same(guide.median(z), median)
