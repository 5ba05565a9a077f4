"""Calls of a guide that repeat each other are recorded; whatever changes between two calls is seen, or found soon."""

import copy
import functools
import pickle

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.guides import step
from pyro.infer.autoguide import AutoGuideList
from torch import nn

from laplace_amort import AutoLaplaceFamily, MarginalCurvature
from laplace_amort.guide.repeats import _EVERY
from laplace_amort.model import UnitModel
from laplace_amort.model.runs import ModelRuns

NUM_CALLS = 8  # by then a call that repeats others has long been recorded
AROUND = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
SETTINGS = {"error": 1.0}


def units(z, error=1.0, prior=1.0):
    mu = pyro.sample("mu", dist.Normal(0.0, prior))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, tau))
        pyro.sample("z", dist.StudentT(5.0, y, error), obs=z)


def with_parameter(z):
    units(z, pyro.param("error", torch.tensor(1.0), constraint=dist.constraints.positive))


def of_a_file(z):
    units(z, SETTINGS["error"])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.error, self.beta = 1.0, torch.tensor(1.0, dtype=torch.float64)
        self.register_buffer("shift", torch.zeros(4, dtype=torch.float64))
        self.hidden = [1.0]

    def forward(self, z):
        units(z + self.shift, self.error * self.beta * self.hidden[-1])


class Numbers:
    """Holds a number that its owner reads through C, where nothing is seen of it."""

    def __init__(self):
        self.array = numpy.full(20_000, 1.0)


@pytest.fixture
def z():
    return AROUND.clone()


@pytest.fixture
def runs(monkeypatch):
    """The number of runs of the model in guides, in a list."""
    count, original = [0], ModelRuns._run

    def counted(self, *args, **kwargs):
        count[0] += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ModelRuns, "_run", counted)
    return count


def repeated(model, *args, **kwargs):
    """A guide that was called often with the same arguments."""
    guide = AutoLaplaceFamily(model)
    for _ in range(NUM_CALLS):
        guide.gaussian(*args, **kwargs)
    return guide


def is_recorded(guide):
    return guide._repeats._recorded is not None


def check_same(guide, model, *args, **kwargs):
    """Compare the guide with one that runs the model anew, at the same parameter."""
    other = AutoLaplaceFamily(model)
    with pyro.get_param_store().scope():
        other.gaussian(*args, **kwargs)
        with torch.no_grad():
            other.loc.copy_(guide.loc.detach())
        found, live = guide.gaussian(*args, **kwargs), other.gaussian_of(other.unit_model(*args, **kwargs))
    torch.testing.assert_close(found.local_loc, live.local_loc, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.precision.to_dense(), live.precision.to_dense(), rtol=1e-8, atol=1e-8)


# --------------------------------------------------------------------------------------------------------- what repeats


@pytest.mark.parametrize("model", [units, with_parameter, of_a_file, Model()])
def test_the_model_runs_no_more_once_calls_repeat_each_other(model, runs, z):
    guide = repeated(model, z)
    assert is_recorded(guide), guide._repeats.not_recorded
    runs[0], compared = 0, 0
    for _ in range(NUM_CALLS, _EVERY + 5):
        before = runs[0]
        step(model, guide, z)
        compared += runs[0] > before
    assert runs[0] == compared <= 6
    check_same(guide, model, z)


def test_steps_lead_where_they_led_without(z):
    ends = []
    for _ in range(2):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoLaplaceFamily(units, head=MarginalCurvature())
        if not ends:
            guide._repeats._gave_up = True
        for _ in range(20):
            step(units, guide, z)
        assert is_recorded(guide) == bool(ends)
        ends.append(guide.loc.detach().clone())
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


def test_the_gradient_is_that_of_the_model(z):
    """With a parameter of the model, which modes hang on as well; and to the second order."""
    guide = repeated(with_parameter, z)
    leaves = [guide.loc, pyro.get_param_store()._params["error"]]
    found = []
    for model in (guide._repeats._recorded, guide.unit_model(z)):
        gaussian = guide.gaussian_of(model)
        total = gaussian.precision.log_det() + gaussian.local_loc.sin().sum() + gaussian.precision.border.cos().sum()
        found.append(torch.autograd.grad(total, leaves))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "change",
    [
        lambda z: (z.clone(), {}),
        lambda z: (z, {"error": 0.5}),
        lambda z: (z, {"error": torch.tensor(0.5, dtype=torch.float64)}),
        lambda z: (z[:3], {}),
    ],
)
def test_other_arguments_are_another_call(change, z):
    guide = repeated(units, z, error=1.0)
    z, kwargs = change(z)
    check_same(guide, units, z, **{"error": 1.0, **kwargs})
    assert not is_recorded(guide)


def nested(data):
    units(data["z"][0], data["error"])


@pytest.mark.parametrize(
    "change", [lambda data: data["z"][0].add_(1.0), lambda data: data.update(error=0.5), lambda data: data["z"].pop()]
)
def test_what_changes_in_place_is_seen(change, z):
    data = {"z": [z, torch.ones(2)], "error": 1.0}
    guide = repeated(nested, data)
    assert is_recorded(guide)
    change(data)
    check_same(guide, nested, data)
    assert not is_recorded(guide)


def of_an_array(z, error):
    units(z, float(error.mean()))


def test_small_arrays_are_compared_and_large_ones_not_recorded(z):
    small, large = numpy.ones(5), numpy.ones(20_000)
    guide = repeated(of_an_array, z, small)
    assert is_recorded(guide)
    small[:] = 0.5
    check_same(guide, of_an_array, z, small)
    pyro.clear_param_store()
    guide = repeated(of_an_array, z, large)
    assert not is_recorded(guide)
    large[:] = 0.5
    check_same(guide, of_an_array, z, large)


# --------------------------------------------------------------------------------------------- what is around the model


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "error", 0.5),
        lambda model: setattr(model, "beta", torch.tensor(0.5)),
        lambda model: model.beta.fill_(0.5),
        lambda model: model.shift.add_(1.0),
        lambda model: model.hidden.append(0.5),
    ],
)
def test_attributes_that_change_are_seen(change, z):
    model = Model().double()
    guide = repeated(model, z)
    assert is_recorded(guide)
    change(model)
    check_same(guide, model, z)
    assert not is_recorded(guide)


def test_numbers_of_a_file_and_of_a_closure_are_seen(z, monkeypatch):
    guide = repeated(of_a_file, z)
    monkeypatch.setitem(SETTINGS, "error", 0.5)
    check_same(guide, of_a_file, z)
    pyro.clear_param_store()
    scale = 1.0

    def closure(z):
        units(z, scale)

    guide = repeated(closure, z)
    assert is_recorded(guide)
    scale = 0.5
    check_same(guide, closure, z)


def test_a_tensor_behind_an_object_is_seen(z):
    """Planted: nothing of the arguments or the code shows it, but it went into the recording."""
    data = functools.partial(lambda box: box[0], [z])
    hidden = {"get": data}.get

    def model():
        units(hidden("get")())

    guide = repeated(model)
    assert is_recorded(guide)
    z.add_(1.0)
    check_same(guide, model)
    assert not is_recorded(guide)


def test_a_number_that_nothing_shows_is_found_within_the_bound(z, runs):
    """Planted: annealing through an array that is too large to compare."""
    numbers = Numbers()

    def model(z):
        units(z, float(numbers.array[0]))

    guide = repeated(model, z)
    assert is_recorded(guide)
    numbers.array[0] = 0.5
    for _ in range(_EVERY):
        guide.gaussian(z)
    check_same(guide, model, z)
    assert not is_recorded(guide)
    assert "'z' are not what was recorded" in guide._repeats.not_recorded
    runs[0] = 0
    for _ in range(NUM_CALLS):  # and for good
        guide.gaussian(z)
    assert runs[0] >= NUM_CALLS


def test_a_cleared_store_is_seen(z):
    guide = repeated(with_parameter, z)
    assert is_recorded(guide)
    pyro.clear_param_store()
    pyro.param("error", torch.tensor(0.5, dtype=torch.float64), constraint=dist.constraints.positive)
    check_same_parameter = guide.gaussian(z)
    live = guide.gaussian_of(guide.unit_model(z))
    torch.testing.assert_close(check_same_parameter.precision.tail, live.precision.tail)
    assert not is_recorded(guide)


def test_parameters_are_read_in_every_call(z):
    guide = repeated(with_parameter, z)
    before = guide.gaussian(z).precision.tail.detach()
    with torch.no_grad():
        pyro.get_param_store()._params["error"].add_(0.5)
    found, live = guide.gaussian(z), guide.gaussian_of(guide.unit_model(z))
    assert is_recorded(guide)
    torch.testing.assert_close(found.precision.tail, live.precision.tail, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found.precision.tail, before)


# --------------------------------------------------------------------------------------------------- what is left alone


def minibatches(z):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z), subsample_size=2) as index:
        pyro.sample("z", dist.Normal(pyro.sample("y", dist.Normal(mu, 1.0)), 1.0), obs=z[index])


def branching(z):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, 1.0 if bool(mu.detach() > 10) else 1.5))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)


@pytest.mark.parametrize("model", [minibatches, branching])
def test_what_cannot_be_recorded_is_run(model, z):
    guide = repeated(model, z)
    assert not is_recorded(guide)
    assert bool(guide._repeats.not_recorded) == (model is branching)


def test_plates_and_guides_of_others_are_left_alone(z):
    guide = AutoLaplaceFamily(units, create_plates=lambda z: pyro.plate("units", len(z), dim=-1))
    both, part = AutoGuideList(units), AutoLaplaceFamily(units)
    both.append(part)
    for _ in range(NUM_CALLS):
        guide.gaussian(z)
        both(z)
    assert not is_recorded(guide)
    assert not is_recorded(part)


def test_data_that_take_turns_are_not_recorded_again_and_again(z, monkeypatch):
    recorded, original = [], UnitModel.recorded
    monkeypatch.setattr(UnitModel, "recorded", lambda self, *at: recorded.append(1) or original(self, *at))
    guide, other = AutoLaplaceFamily(units), z.clone()
    for _ in range(20):
        for data in (z, z, z, z, other):
            guide.gaussian(data)
    assert len(recorded) == 1


def test_a_stored_guide_has_no_recording(z):
    guide = repeated(units, z)
    for other in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        assert not is_recorded(other)
        assert is_recorded(guide)
        for _ in range(NUM_CALLS):
            other.gaussian(z)
        assert is_recorded(other)


def test_other_units_in_between(z):
    guide = repeated(units, z)
    guide.unit_model(torch.cat([z, z]))
    check_same(guide, units, z)


def test_another_dtype_is_another_call(z):
    guide = repeated(units, z.float())
    assert is_recorded(guide)
    guide.double()
    assert guide.gaussian(z).local_loc.dtype == torch.float64
    assert not is_recorded(guide)
