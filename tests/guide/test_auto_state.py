"""What AutoLaplaceFamily keeps: its parameters and those of its strategies, in modules and dtypes; and no graph."""

import copy
import gc
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.guides import EXACT, closed_form, loss_of, same, saved, step, with_state
from helpers.models import conjugate_normal, counts, normals
from helpers.unit_models import batches as poisson
from helpers.unit_models import constrained, with_parameter
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, PyroParam, PyroSample, pyro_method
from torch import Tensor

from laplace_amort import ModeNotFoundError
from laplace_amort.guide.auto import AutoLaplaceFamily
from laplace_amort.guide.heads import JointCurvature, MarginalCurvature
from laplace_amort.linalg.boost import Boost
from laplace_amort.linalg.repair import NoRepair
from laplace_amort.units.closed_form import ClosedFormMode
from laplace_amort.units.modes import FreeMode, NewtonMode

# ----------------------------------------------------------------------------------------------------------- parameters

STRATEGIES = {
    "default": {},
    "newton": {"mode": NewtonMode()},
    "closed form": {"mode": ClosedFormMode(closed_form)},
    "free": {"mode": FreeMode()},
    "joint head": {"head": JointCurvature()},
    "marginal head": {"head": MarginalCurvature()},
    "no repair": {"repair": NoRepair()},
    "boost": {"repair": Boost()},
}
LEARNED = {
    "free": {"AutoLaplaceFamily.mode.loc"},
    "boost": {f"AutoLaplaceFamily.{part}_repair.raw" for part in ("head", "tail")},
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_parameters_are_where_the_globals_stand_and_what_the_strategies_learn(name):
    guide, z = AutoLaplaceFamily(conjugate_normal, **STRATEGIES[name]), normals(4)
    before = loss_of(conjugate_normal, guide, z)
    assert before.isfinite()
    assert set(pyro.get_param_store()) == {"AutoLaplaceFamily.loc"} | LEARNED.get(name, set())
    leaves = dict(pyro.get_param_store().named_parameters())
    assert {id(leaf) for leaf in leaves.values()} == {id(leaf) for leaf in guide.parameters()}
    old = {leaf: value.detach().clone() for leaf, value in leaves.items()}
    step(conjugate_normal, guide, z)
    for leaf, value in pyro.get_param_store().named_parameters():
        assert (value != old[leaf]).all(), leaf


def test_strategies_that_agree_have_one_loss():
    """The modes are the same in all of these, and a Gaussian model has no third derivatives."""
    z = normals(4)
    losses = []
    for name in ("newton", "closed form", "joint head", "marginal head", "no repair"):
        pyro.clear_param_store()
        losses.append(loss_of(conjugate_normal, AutoLaplaceFamily(conjugate_normal, **STRATEGIES[name]), z))
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], **EXACT)


def test_a_boost_narrows_the_guide_and_learns():
    z = normals(4)
    plain, boosted = (
        AutoLaplaceFamily(conjugate_normal),
        AutoLaplaceFamily(conjugate_normal, repair=Boost(strength=0.5)),
    )
    assert boosted.gaussian(z).precision.global_variance() < plain.gaussian(z).precision.global_variance()
    pyro.set_rng_seed(0)
    elbo = Trace_ELBO(num_particles=200, vectorize_particles=True)
    svi = SVI(conjugate_normal, boosted, pyro.optim.Adam({"lr": 0.1}), elbo)
    strength = [repair.strength.detach().clone() for repair in (boosted.head_repair, boosted.tail_repair)]
    for _ in range(20):
        svi.step(z)
    # The curvature is that of the posterior, so whatever is added to it is too much.
    for repair, old in zip((boosted.head_repair, boosted.tail_repair), strength, strict=True):
        assert (repair.strength < old).all()


def test_a_strategy_is_a_template():
    """Two guides from one repair and one mode share nothing."""
    z, repair, mode = normals(4), Boost(), FreeMode()
    first, second = (AutoLaplaceFamily(conjugate_normal, mode, repair=repair) for _ in range(2))
    first(z)
    pyro.clear_param_store()
    second(z)
    assert not {id(leaf) for leaf in first.parameters()} & {id(leaf) for leaf in second.parameters()}
    assert len(list(first.parameters())) == 4
    assert not list(mode.parameters())
    assert not list(repair.parameters())


# ------------------------------------------------------------------------------------------------------ modules, dtypes


def test_train_and_eval_change_nothing():
    guide, z = with_state()
    expected = loss_of(poisson, guide, z)
    for switched in (guide.eval(), guide.train()):
        torch.testing.assert_close(loss_of(poisson, switched, z), expected, **EXACT)


def test_to_another_dtype_and_back():
    guide, z = with_state()
    expected = guide.median(z)
    torch.set_default_dtype(torch.float32)
    guide.to(torch.float32)
    found = guide.median(z.float())
    assert {value.dtype for value in (*found.values(), guide.loc)} == {torch.float32}
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-4)
    step(poisson, guide, z.float(), lr=0.0)
    torch.set_default_dtype(torch.float64)
    guide.double()
    for name, value in guide.median(z).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", [JointCurvature(), MarginalCurvature()])
def test_float32_is_near_float64(head):
    z = counts(5)
    expected = AutoLaplaceFamily(poisson, head=head).quantiles([0.1], z)
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()
    guide = AutoLaplaceFamily(poisson, head=head)
    assert guide(z.float())["y"].dtype == torch.float32
    for name, value in guide.quantiles([0.1], z.float()).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-3, atol=1e-3)


class Hierarchy(PyroModule):
    """A model with latents and parameters as attributes."""

    def __init__(self):
        super().__init__()
        self.mu = PyroSample(dist.Normal(0.0, 1.0))
        self.scale = PyroParam(torch.tensor(0.7), constraint=dist.constraints.positive)

    def forward(self, z):
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.LogNormal(self.mu, self.scale))
            pyro.sample("z", dist.Poisson(y), obs=z)


class Experiment(PyroModule):
    """A module that holds a model, as a method, and a guide for it."""

    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(0.7), constraint=dist.constraints.positive)
        self.posterior = AutoLaplaceFamily(self.model)

    @pyro_method
    def model(self, z):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.LogNormal(mu, self.scale))
            pyro.sample("z", dist.Poisson(y), obs=z)

    @pyro_method
    def guide(self, z):
        return self.posterior(z)


def test_a_module_as_model():
    z, model = counts(5), Hierarchy()
    guide = AutoLaplaceFamily(model)
    step(model, guide, z)
    assert set(pyro.get_param_store()) == {"AutoLaplaceFamily.loc", "scale"}
    assert [name for name, _ in guide.named_parameters()] == ["loc_unconstrained"]  # the model is not part of the guide
    assert model.scale != 0.7
    twin = copy.deepcopy(guide)
    assert twin.model is model
    file = saved(guide)
    pyro.clear_param_store()
    same(torch.load(file, weights_only=False).median(z), guide.median(z))


def test_inside_a_module():
    z, experiment = counts(5), Experiment()
    step(experiment.model, experiment.guide, z)
    assert set(pyro.get_param_store()) == {"posterior.loc", "scale"}
    assert {name for name, _ in experiment.named_parameters()} == {
        "posterior.loc_unconstrained",
        "scale_unconstrained",
    }
    mu = experiment.posterior.median(z)["mu"]
    torch.testing.assert_close(mu, pyro.param("posterior.loc")[0].detach(), **EXACT)


# ------------------------------------------------------------------------------------------------------------- no graph


def tensors_in(value, seen):
    """Every tensor that can be reached from a value by attributes and items; modules of the package included."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, seen)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors_in(item, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and type(value).__module__ != "builtins":
        yield from tensors_in(vars(value), seen)


@pytest.mark.parametrize("model", [poisson, constrained, with_parameter])
@pytest.mark.parametrize("options", [{}, {"head": MarginalCurvature()}, {"repair": Boost()}, {"mode": FreeMode()}])
def test_nothing_of_a_step_stays(model, options, monkeypatch):
    guide, z = AutoLaplaceFamily(model, **options), counts(5)
    made = []
    original = AutoLaplaceFamily.gaussian_of

    def recorded(self, unit_model, **others):
        gaussian = original(self, unit_model, **others)
        made.extend(weakref.ref(part) for part in (gaussian, gaussian.precision, gaussian.local_loc))
        return gaussian

    monkeypatch.setattr(AutoLaplaceFamily, "gaussian_of", recorded)
    step(model, guide, z)
    keys = set(vars(guide))
    for _ in range(4):  # calls that repeat each other are recorded by then
        step(model, guide, z)
    guide.median(z)
    gc.collect()
    assert made
    assert not any(ref() is not None for ref in made)
    assert set(vars(guide)) == keys
    found = list(tensors_in(guide, set()))
    assert any(tensor is guide.loc for tensor in found)
    assert not any(tensor.grad_fn is not None for tensor in found)
    parameters = [*guide.parameters(), *pyro.get_param_store()._params.values()]
    assert all(any(tensor is one for one in parameters) for tensor in found if tensor.requires_grad)
    # And no cache that grows or is made anew.
    sizes = sorted(tensor.numel() for tensor in found)
    step(model, guide, z)
    assert sorted(tensor.numel() for tensor in tensors_in(guide, set())) == sizes


def test_the_walk_over_the_guide_finds_a_graph():
    guide, z = with_state()
    guide.kept = guide.gaussian(z)
    assert any(tensor.grad_fn is not None for tensor in tensors_in(guide, set()))


def test_a_nonfinite_step_does_not_stay_either():
    """A call that fails leaves the guide as it was."""
    guide, z = with_state()
    expected = guide.median(z)
    with pytest.raises(ModeNotFoundError, match="NaN"):
        guide.median(torch.full((5,), float("nan")))
    same(guide.median(z), expected)
