"""Which sites are global, which belong to the units, and where their elements go."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.dense_twin import count_units
from helpers.models import MODELS, normals
from helpers.unit_models import UNIT_MODELS, crossed_items, level_and_spread, nested_latents

from laplace_amort import LogJoint, ModelError
from laplace_amort.model.layout import UnitLayout, find_layout


def sites_of(model, *args, **kwargs):
    return LogJoint(model, *args, **kwargs).sites


def layout_of(name):
    case = UNIT_MODELS[name]()
    log_joint = LogJoint(case.model, *case.args, **case.kwargs)
    return case, log_joint, find_layout(log_joint.sites)


def numbered(log_joint, plate):
    """The packed vector that holds its own places; the globals and the units as found by counting them."""
    packed = torch.arange(log_joint.size, dtype=torch.get_default_dtype())
    global_, units = count_units(log_joint.sites, plate)
    return packed, packed[global_], packed[units]


@pytest.mark.parametrize("name", UNIT_MODELS)
def test_choice_and_sizes(name):
    case, _, layout = layout_of(name)
    assert (layout.frame.name, layout.weight) == (case.unit_plate, 1)
    assert (layout.global_dim, layout.num_units, layout.local_dim) == (case.global_dim, case.num_units, case.local_dim)
    assert (tuple(layout.global_sites), tuple(layout.local_sites)) == (case.global_sites, case.local_sites)
    assert len(layout.local_elements()) == len(set(layout.local_elements())) == case.local_dim


@pytest.mark.parametrize("name", UNIT_MODELS)
def test_elements_go_where_counting_puts_them(name):
    case, log_joint, layout = layout_of(name)
    packed, global_, local = numbered(log_joint, case.unit_plate)
    sites = layout.to_sites(global_, local)
    expected = log_joint.unpack(packed)
    assert set(sites) == set(expected)
    assert all(torch.equal(sites[site], expected[site]) for site in expected)
    back = layout.from_sites(sites)
    assert torch.equal(back[0], global_)
    assert torch.equal(back[1], local)
    # Each coordinate of a unit is of the site that it is named after.
    for coordinate, element in enumerate(layout.local_elements()):
        assert torch.isin(local[:, coordinate], sites[element.partition("[")[0]].reshape(-1)).all()


@pytest.mark.parametrize("enclosing", [(3,), (1,), (2, 3)])
@pytest.mark.parametrize("name", UNIT_MODELS)
def test_each_of_many_particles_goes_where_one_would(name, enclosing):
    _, log_joint, layout = layout_of(name)
    room = (1,) * max(len(site.shape) - site.event_dim for site in log_joint.sites.values())
    global_ = normals(*enclosing, *room, layout.global_dim)
    local = normals(*enclosing, layout.num_units, layout.local_dim, seed=1)
    particles = torch.Size(enclosing).numel()
    for value in (local, local.flatten(0, len(enclosing) - 1)):
        sites = layout.to_sites(global_, value)
        for i in range(particles):
            one = layout.to_sites(global_.reshape(particles, -1)[i], local.reshape(particles, *local.shape[-2:])[i])
            for site, expected in one.items():
                assert sites[site].shape[: len(enclosing)] == enclosing
                found = sites[site].reshape(particles, *sites[site].shape[len(enclosing) :])[i]
                assert torch.equal(found.reshape(expected.shape), expected)


def test_a_wrong_axis_is_found(monkeypatch):
    """The count finds units that are taken along another dimension of the same size."""
    log_joint = LogJoint(nested_latents, normals(3, 3).exp().round())
    _, global_, local = numbered(log_joint, "units")
    layout = find_layout(log_joint.sites, "units")
    right = layout.to_sites(global_, local)["item"]
    axes = {"level": 0, "item": 1}
    monkeypatch.setattr(UnitLayout, "unit_axis", lambda self, name: axes[name])
    assert torch.equal(layout.to_sites(global_, local)["item"], right.mT)


def test_printed():
    z = normals(4, 3)
    assert str(find_layout(sites_of(level_and_spread, z))) == (
        "unit plate 'units': 4 units, dim -2\nglobal, 1 in all: mu ()\nlocal, 2 in each unit: level (1,), spread (1,)"
    )
    case = MODELS["subsample_size"]()
    layout = find_layout(sites_of(case.model, *case.args))
    assert str(layout).splitlines()[0] == "unit plate 'units': 2 of 6 units, dim -1"
    assert (layout.num_units, layout.weight) == (2, 3.0)
    assert "global, 0 in all: none" in str(layout_of("without_globals")[2])


def test_the_largest_of_several_plates_and_any_that_is_named():
    answers = torch.zeros(5, 3)  # of five items, three units
    assert find_layout(sites_of(crossed_items, answers)).frame.name == "items"
    assert find_layout(sites_of(crossed_items, answers.mT)).frame.name == "units"
    layout = find_layout(sites_of(crossed_items, answers), "units")
    assert (layout.frame.name, layout.global_dim, layout.num_units, layout.local_dim) == ("units", 6, 3, 1)
    # An inner plate can be named: what is outside of it is global then.
    layout = find_layout(sites_of(nested_latents, torch.ones(3, 2)), "items")
    assert (layout.global_dim, layout.num_units, layout.local_dim) == (4, 2, 3)


def without_plates(z):
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("tau", dist.Exponential(1.0))
    with pyro.plate("units", len(z)):
        pyro.sample("z", dist.Normal(0.0, 1.0), obs=z)


def other_subsampled(z, size):
    units, items = pyro.plate("units", 4, dim=-1), pyro.plate("items", 3, subsample_size=size, dim=-2)
    with items:
        pyro.sample("difficulty", dist.Normal(0.0, 1.0))
    with units:
        pyro.sample("y", dist.Normal(0.0, 1.0))


def nested_subsampled(z, size):
    with pyro.plate("units", 4, dim=-2), pyro.plate("items", 3, subsample_size=size, dim=-1):
        pyro.sample("item", dist.Normal(0.0, 1.0))


def refused(message, model, *args, **options):
    with pytest.raises(ModelError, match=re.escape(message)):
        find_layout(sites_of(model, *args), **options)


def test_a_loop_over_units_is_refused():
    refused(
        "latent site 'y_0' lies in the sequential plate 'units', a loop in Python over the units. Vectorize it:\n"
        "    with pyro.plate('units', num_units):\n        pyro.sample(...)",
        MODELS["sequential"]().model,
        normals(3),
    )


def test_a_model_without_units_is_refused():
    refused(
        "no latent site lies in a plate (mu, tau), so there are no units. If each unit has a latent, sample it in a "
        "plate (not by .expand or .to_event):\n    with pyro.plate('units', num_units):\n"
        "        y = pyro.sample('y', dist.Normal(mu, tau))",
        without_plates,
        normals(3),
    )


def test_a_plate_without_latents_is_refused():
    refused(
        "no latent site lies in a plate named 'repeats'; the plates that hold latents are 'units':\n"
        "    unit_plate='units'",
        level_and_spread,
        normals(4, 3),
        unit_plate="repeats",
    )


def test_subsampled_plates_other_than_the_units_are_refused():
    refused(
        "latent site 'difficulty' is global, but lies in plate 'items' too, which subsamples 2 of 3; of plates with "
        "latents only the unit plate 'units' can be subsampled. Use the whole plate, or make it the unit plate:\n"
        "    unit_plate='items'",
        other_subsampled,
        normals(3),
        2,
    )
    refused("latent site 'item' belongs to the units, but lies in plate 'items' too", nested_subsampled, normals(3), 2)
    assert find_layout(sites_of(other_subsampled, normals(3), 2), "items").weight == 1.5
    assert find_layout(sites_of(nested_subsampled, normals(3), 2), "items").weight == 1.5
    assert find_layout(sites_of(other_subsampled, normals(3), 3)).weight == 1
