"""A Pyro model as a function of globals and units: values, supports, starts, and when sites are looked for anew."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.dense_twin import count_units
from helpers.models import counts, normals, subsampled
from helpers.unit_models import UNIT_MODELS, UnitCase, dependent_supports, normal, poisson_by_visit
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide.initialization import init_to_mean

from laplace_amort import LogJoint, ModelError
from laplace_amort.model.calls import UnitModels


def make(case, chosen=None):
    return UnitModels(case.model, None)(case.args, case.kwargs, chosen or {})


@pytest.mark.parametrize("name", UNIT_MODELS)
def test_log_joint_is_that_of_the_packed_vector(name):
    case = UNIT_MODELS[name]()
    unit_model, plates = make(case)
    log_joint = LogJoint(case.model, *case.args, **case.kwargs)
    packed = 0.3 * normals(log_joint.size)
    global_, units = count_units(log_joint.sites, case.unit_plate)
    torch.testing.assert_close(unit_model.log_joint(packed[global_], packed[units]), log_joint(packed))
    assert (unit_model.args, unit_model.kwargs) == (case.args, case.kwargs)
    assert unit_model.units.tolist() == list(range(case.num_units))
    assert plates[case.unit_plate].indices is unit_model.units
    pyro.set_rng_seed(1)  # where a mean does not exist, the start is a median of draws
    start = log_joint.initial()
    pyro.set_rng_seed(1)
    for found, expected in zip(unit_model.start(init_to_mean), (start[global_], start[units]), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", UNIT_MODELS)
def test_constrained_and_back(name):
    case = UNIT_MODELS[name]()
    unit_model, _ = make(case)
    global_, local = 0.3 * normals(case.global_dim), 0.3 * normals(case.num_units, case.local_dim, seed=1)
    everything = unit_model.density.to_constrained(unit_model.layout.to_sites(global_, local))
    constrained = unit_model.constrain_global(global_)
    assert tuple(constrained) == case.global_sites
    for site, value in constrained.items():
        torch.testing.assert_close(value, everything[site])
    values = {site: everything[site] for site in case.local_sites}
    torch.testing.assert_close(unit_model.unconstrain_local(values, global_), local)


def test_a_value_outside_its_support_is_refused():
    case = UNIT_MODELS["gamma_rates"]()
    unit_model, _ = make(case)
    with pytest.raises(ModelError, match="the value of site 'y' lies outside its support"):
        unit_model.unconstrain_local({"y": -torch.ones(4, 1)}, torch.zeros(2))


def test_a_value_of_another_shape_is_refused():
    unit_model, _ = make(UNIT_MODELS["gamma_rates"]())
    with pytest.raises(ModelError, match=r"local site 'y' has shape \(4,\), and the site has batch shape \(4, 1\)"):
        unit_model.unconstrain_local({"y": torch.ones(4)}, torch.zeros(2))


def test_supports_that_depend_on_globals_are_differentiable():
    unit_model, _ = make(UNIT_MODELS["dependent_supports"]())
    local = normals(3, 1)

    def constrained(global_):
        return torch.stack(list(unit_model.constrain_global(global_).values()))

    def unconstrained(global_):
        return unit_model.unconstrain_local({"y": torch.tensor([1.0, 1.5, 2.0])}, global_)

    at = torch.tensor([0.9, -0.4], requires_grad=True)
    assert torch.autograd.gradcheck(constrained, at)
    assert torch.autograd.gradcheck(unconstrained, at)
    assert torch.autograd.gradcheck(lambda global_: unit_model.log_joint(global_, local), at)


def test_overflow_is_not_an_error():
    unit_model, _ = make(UnitCase(poisson_by_visit, (counts(3), torch.arange(3), 3), 2, 3, 1))
    local = torch.tensor([[0.0], [1e4], [torch.nan]])
    assert not unit_model.log_joint(torch.zeros(2), local).isfinite()
    with pytest.raises(ValueError, match="Expected"):  # validation is on again
        dist.Normal(0.0, -torch.ones(()))


def test_units_are_named_by_their_place_in_the_plate():
    case = UnitCase(subsampled, (normals(6),), 1, 3, 1, kwargs={"subsample": torch.tensor([5, 0, 3])})
    unit_model, plates = make(case)
    assert [unit_model.describe(i) for i in range(3)] == [f"unit {n} of plate 'units' ('y')" for n in (5, 0, 3)]
    assert plates["units"].indices.tolist() == unit_model.units.tolist() == [5, 0, 3]


# --------------------------------------------------------------------------------------------- plates of each call


def test_pyro_draws_other_units_in_each_call_and_the_model_follows():
    models = UnitModels(subsampled, None)
    drawn = set()
    for size in (2, 2, 2, 3, 1):
        unit_model, plates = models((normals(6), size), {}, {})
        assert len(unit_model.units) == unit_model.layout.num_units == size
        assert unit_model.density.indices["units"] is plates["units"].indices
        drawn.add(tuple(unit_model.units.tolist()))
    assert len(drawn) > 2


def test_plates_made_elsewhere_are_used():
    plate = pyro.plate("units", 6, subsample=torch.tensor([4, 1]), dim=-1)
    unit_model, plates = UnitModels(subsampled, None)((normals(6),), {}, {"units": plate})
    assert plates == {"units": plate}
    assert unit_model.units.tolist() == [4, 1]
    assert unit_model.layout.weight == 3


def test_two_choices_of_units_are_refused():
    plate = pyro.plate("units", 6, subsample=torch.tensor([4, 1]), dim=-1)
    with pytest.raises(ModelError, match=r"the model takes the units \[0, 1\]\.\.\. of plate .units. by subsample="):
        UnitModels(subsampled, None)((normals(6),), {"subsample": torch.tensor([0, 1])}, {"units": plate})


def looked_for(monkeypatch):
    """A list that grows whenever the sites of a model are looked for."""
    found, original = [], LogJoint._set_up
    monkeypatch.setattr(LogJoint, "_set_up", lambda self, *args: (found.append(1), original(self, *args))[1])
    return found


def test_sites_are_looked_for_where_they_may_have_changed(monkeypatch):
    found, models = looked_for(monkeypatch), UnitModels(normal, None)
    errors = {"errors": 0.5}
    for args, kwargs, expected in [
        ((normals(4),), errors, 1),
        ((normals(4, seed=1),), errors, 1),  # other data of the same sizes
        ((normals(5),), errors, 2),
        ((normals(5),), {"errors": 0.6}, 3),
        ((normals(5),), {"errors": torch.tensor(0.6)}, 4),
        ((normals(5),), {"errors": torch.tensor(0.7)}, 4),
    ]:
        unit_model, _ = models(args, kwargs, {})
        assert len(found) == expected
        assert unit_model.args[0] is args[0]
        assert unit_model.layout.num_units == len(args[0])
        local = torch.zeros(len(args[0]), 1)
        expected_value = LogJoint(normal, *args, **kwargs)(torch.zeros(2), local)
        found[:] = found[:expected]
        torch.testing.assert_close(unit_model.log_joint(torch.zeros(2), local), expected_value)


def test_sites_are_looked_for_in_every_call_that_subsamples(monkeypatch):
    found, models = looked_for(monkeypatch), UnitModels(subsampled, None)
    for calls in (1, 2, 3):
        models((normals(6), 2), {}, {})
        assert len(found) == calls


def test_arguments_in_lists_and_objects_are_told_apart(monkeypatch):
    def model(data):
        size, label = data
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("units", size):
            pyro.sample("y", dist.Normal(0.0, 1.0))
        return label

    found, models = looked_for(monkeypatch), UnitModels(model, None)
    # Of an object nothing is known.
    for data, expected in [([3, "a"], 1), ([3, "a"], 1), ([4, "a"], 2), ((4, len), 3), ((4, len), 4)]:
        unit_model, _ = models((data,), {}, {})
        assert len(found) == expected
        assert unit_model.layout.num_units == data[0]


def test_arrays_of_other_lengths_are_told_apart():
    def model(z):
        normal(torch.as_tensor(z))

    models = UnitModels(model, None)
    for size in (3, 4):
        unit_model, _ = models((normals(size).numpy(),), {}, {})
        assert unit_model.layout.num_units == size


def test_a_plate_that_changes_with_data_of_the_same_shape_is_refused():
    """The indices of the guide's plate would make the smaller one of this run as large, and weigh its units down."""

    def model(z, unit):
        poisson_by_visit(z, unit, int(unit.max()) + 1)

    models, z = UnitModels(model, None), counts(4)
    models((z, torch.tensor([0, 1, 2, 2])), {}, {})
    unit_model, _ = models((z, torch.tensor([0, 1, 1, 0])), {}, {})
    with pytest.raises(ModelError, match=r"plate 'units' around site 'y' has size 2 in this run .* and had 3"):
        unit_model.log_joint(torch.zeros(2), torch.zeros(3, 1))


def test_bounds_that_come_with_the_data_are_those_of_each_call():
    def model(bound):
        with pyro.plate("units", 2):
            pyro.sample("y", dist.ImproperUniform(constraints.interval(0.0, float(bound)), (), ()))

    models = UnitModels(model, None)
    for bound in (torch.tensor(1.0), torch.tensor(3.0)):
        unit_model, _ = models((bound,), {}, {})
        unconstrained = unit_model.layout.to_sites(torch.zeros(0), torch.zeros(2, 1))
        assert torch.equal(unit_model.density.to_constrained(unconstrained)["y"], (bound / 2).expand(2))


def test_nothing_is_kept_of_the_arguments():
    """The memory of data that were passed once can be freed."""
    models = UnitModels(normal, None)
    models((normals(4),), {}, {})
    assert (models._density.args, models._density.kwargs) == ((), {})


# --------------------------------------------------------------------------------------------------- hidden latents


def test_a_model_that_draws_apart_from_its_latents_is_refused():
    case = UNIT_MODELS["normal"]()
    global_, local = torch.zeros(2), torch.zeros(5, 1)
    make(case)[0].check_deterministic(global_, local)
    hidden = case._replace(model=poutine.block(case.model, hide=["mu"]))
    unit_model, _ = make(hidden)
    with pytest.raises(ModelError, match=r"and then .* at one and the same latents: it draws random numbers elsewhere"):
        unit_model.check_deterministic(global_[:1], local)
    condition = poutine.condition(case.model, data={"mu": torch.tensor(0.0)})  # as the message says
    make(case._replace(model=condition))[0].check_deterministic(global_[:1], local)


def test_two_values_that_are_not_finite_do_not_count_as_different():
    unit_model, _ = make(UnitCase(dependent_supports, (normals(3),), 2, 3, 1))
    unit_model.check_deterministic(torch.full((2,), 1e5), torch.zeros(3, 1))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_recorded_model_can_be_stored(duplicate):
    unit_model = UnitModels(normal, None)((normals(4),), {}, {})[0]
    point = normals(unit_model.layout.global_dim), normals(4, 1, seed=1)
    recorded = unit_model.recorded(*point)
    other = duplicate(recorded)
    assert torch.equal(other.log_joint(*point), recorded.log_joint(*point))
    torch.testing.assert_close(
        sum(terms.values.sum() for terms in other.flat_terms(*point)), unit_model.log_joint(*point)
    )


def test_constant_bounds_are_constants_in_every_call():
    """Numbers that come with the data, and numbers of the model: what a guide is asked for again has its own."""

    def model(bound):
        pyro.sample("scale", dist.Uniform(0.0, 10.0))
        with pyro.plate("units", 2):
            pyro.sample("y", dist.Uniform(0.0, bound))

    models = UnitModels(model, None)
    for bound in (torch.tensor(1.0), torch.tensor(3.0)):
        sites = models((bound,), {}, {})[0].density.sites
        assert sites["scale"].transform(torch.zeros(())).item() == 5.0
        assert torch.equal(sites["y"].transform(torch.zeros(2)), (bound / 2).expand(2))
