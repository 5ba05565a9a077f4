"""A log joint taken apart by unit: sums, owners, what depends on what, refusals, and planted bugs."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.models import counts, normals, subsampled
from helpers.oracles import relative_error
from helpers.unit_models import UNIT_MODELS, UnitCase, poisson_by_visit
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine

from laplace_amort.autodiff.recording import Recording
from laplace_amort.errors import RecordingError
from laplace_amort.model import terms as room
from laplace_amort.model.calls import UnitModels
from laplace_amort.model.terms import unit_terms


def unit_model_of(case):
    """Not by a guide, which would refuse some of the models below before this room sees them."""
    return UnitModels(case.model, case.unit_plate)(case.args, case.kwargs, {})[0]


def point_of(case, seed=0, size=0.5):
    return size * normals(case.global_dim, seed=seed), size * normals(case.num_units, case.local_dim, seed=seed + 1)


def taken_apart(case, how="live"):
    """The model and its terms, from another point than those that tests look at."""
    unit_model, start = unit_model_of(case), point_of(case, seed=10)
    unit_model = unit_model.recorded(*start) if how == "recorded" else unit_model
    return unit_model, unit_terms(unit_model, *start)


def both(f, point):
    """Value and gradients."""
    (first, second), value = torch.func.grad_and_value(f, argnums=(0, 1))(*point)
    return [value, first, second]


def assert_adds_up(unit_model, density, point):
    found = both(lambda t, y: density.shared(t, y) + density.units(t, y).sum(), point)
    for actual, expected in zip(found, both(unit_model.live().log_joint, point), strict=True):
        assert relative_error(actual, expected) < 1e-11


def assert_apart(density, point):
    """No unit's term depends on another unit, and what is shared on none; returns the gradients of the units."""
    jacobian = torch.func.jacrev(density.units, argnums=1)(*point)  # (N, N, k)
    own = torch.eye(len(jacobian), dtype=torch.bool)
    assert (jacobian[~own] == 0).all()
    assert (torch.func.grad(density.shared, argnums=1)(*point) == 0).all()
    return jacobian[own]


# ---------------------------------------------------------------------------------------------------- the whole table


@pytest.mark.parametrize("how", ["live", "recorded"])
@pytest.mark.parametrize("name", UNIT_MODELS)
def test_terms_add_up_and_each_knows_its_own_unit(name, how):
    case = UNIT_MODELS[name]()
    unit_model, density = taken_apart(case, how)
    assert isinstance(density.units, Recording) == isinstance(density.shared, Recording) == (how == "recorded")
    for seed in (0, 2):
        point = point_of(case, seed, size=0.6)
        assert density.shared(*point).shape == ()
        assert density.units(*point).shape == (case.num_units,)
        assert_adds_up(unit_model, density, point)
        own = assert_apart(density, point)
        expected = torch.func.grad(unit_model.live().log_joint, argnums=1)(*point)
        assert expected.abs().max() > 0.01
        assert relative_error(own, expected) < 1e-11


@pytest.mark.parametrize("name", UNIT_MODELS)
def test_recorded_and_live_agree(name):
    case = UNIT_MODELS[name]()
    (_, live), (_, recorded) = (taken_apart(case, how) for how in ("live", "recorded"))
    point = point_of(case)
    torch.testing.assert_close(recorded.units(*point), live.units(*point), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(recorded.shared(*point), live.shared(*point), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["normal", "crossed_items", "tempered", "with_factors", "non_centered"])
def test_shared_is_what_remains_where_units_are_far(name):
    """The prior of the globals, which is the log joint with all units' terms taken away."""
    case = UNIT_MODELS[name]()
    unit_model, density = taken_apart(case)
    global_, near = point_of(case)
    for local in (near, near + 1.0):
        remains = unit_model.log_joint(global_, local) - density.units(global_, local).sum()
        torch.testing.assert_close(density.shared(global_, near), remains, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("how", ["live", "recorded"])
def test_parameters_count_with_their_values_at_the_time(how):
    case = UNIT_MODELS["with_params"]()
    unit_model, density = taken_apart(case, how)
    point = point_of(case)
    before = density.units(*point)
    with torch.no_grad():
        for leaf in unit_model.density.parameters().values():
            leaf += 0.3
    assert (density.units(*point) - before).abs().min() > 1e-3
    assert_adds_up(unit_model, density, point)


def test_a_minibatch_keeps_its_weight():
    """Three units of six, so that each counts twice."""
    z, chosen = normals(6), torch.tensor([5, 0, 3])
    case = UnitCase(subsampled, (z,), 1, 3, 1, kwargs={"subsample": chosen})
    unit_model, density = taken_apart(case)
    assert unit_model.layout.weight == 2
    assert_adds_up(unit_model, density, point_of(case))
    everything = UnitCase(subsampled, (z,), 1, 6, 1, kwargs={"subsample": torch.arange(6)})
    global_, local = point_of(everything)
    found = density.units(global_, local[chosen])
    torch.testing.assert_close(found, 2 * taken_apart(everything)[1].units(global_, local)[chosen])


def test_nothing_of_the_start_is_attached():
    """Or changed: it may require gradients and be without a graph."""
    case = UNIT_MODELS["poisson_by_visit"]()
    start = [part.requires_grad_() for part in point_of(case)]
    with torch.no_grad():
        density = unit_terms(unit_model_of(case), *start)
    assert all(part.grad is None for part in start)
    assert_adds_up(unit_model_of(case), density, point_of(case, seed=4))


def test_what_cannot_be_recorded_is_run(monkeypatch):
    case = UNIT_MODELS["poisson_by_visit"]()
    unit_model = unit_model_of(case).recorded(*point_of(case))

    def refuse(*args):
        raise RecordingError("planted")

    monkeypatch.setattr(room, "record", refuse)
    density = unit_terms(unit_model, *point_of(case))
    assert not isinstance(density.units, Recording)
    assert_adds_up(unit_model, density, point_of(case, seed=4))


# ---------------------------------------------------------------------------------- observations apart from the units


def apart(observe, num_units, prior=lambda mu: dist.Normal(mu, 1.0), local_dim=1):
    """A model whose observations are made outside of the plate of the units."""

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("units", num_units):
            y = pyro.sample("y", prior(mu))
        observe(y)

    return UnitCase(model, (), 1, num_units, local_dim, ("mu",))


def poisson_terms(z, unit, global_, local):
    """Of ``poisson_by_visit``, unit by unit, with nothing of the package."""
    mu, tau = global_[0], global_[1].exp()
    found = torch.distributions.Normal(mu, tau).log_prob(local[:, 0])
    for visit, i in enumerate(unit.tolist()):
        found[i] += torch.distributions.Poisson(local[i, 0].exp()).log_prob(z[visit])
    return found


@given(st.data())
def test_visits_in_any_order(data):
    """Of units that have many or none."""
    num_units = data.draw(st.integers(1, 12))
    unit = torch.tensor(data.draw(st.lists(st.integers(0, num_units - 1), min_size=1, max_size=20)))
    z = counts(len(unit))
    case = UnitCase(poisson_by_visit, (z, unit, num_units), 2, num_units, 1)
    _, density = taken_apart(case)
    point = point_of(case)
    torch.testing.assert_close(density.units(*point), poisson_terms(z, unit, *point), rtol=1e-11, atol=1e-11)


UNIT = torch.tensor([2, 0, 0, 4, 2, 0])  # of five; units 1 and 3 have none
Z = torch.tensor([0.3, -1.0, 2.0, 0.4, -0.2, 1.0], dtype=torch.float64)
KEPT = torch.tensor([True, False, True, True, True, False])
POWERS = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5, 1.0], dtype=torch.float64)


def masked(y):
    pyro.sample("z", dist.Normal(y[..., UNIT], 0.7).mask(KEPT), obs=Z)


def scaled(y):
    with poutine.scale(scale=POWERS):
        pyro.sample("z", dist.Normal(y[..., UNIT], 0.7), obs=Z)


def in_a_matrix(y):
    with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
        pyro.sample("z", dist.Normal(y[..., UNIT.reshape(2, 3)], 0.7), obs=Z.reshape(2, 3))


def unit_by_unit(y):
    for i in range(6):
        pyro.sample(f"z_{i}", dist.Normal(y[..., UNIT[i]], 0.7), obs=Z[i])


def as_factors(y):
    pyro.factor("z", dist.Normal(y[..., UNIT], 0.7).log_prob(Z))


def as_events(y):
    """Both observations of a pair are of one unit."""
    pairs = torch.stack([UNIT, UNIT], -1)
    pyro.sample("z", dist.Normal(y[..., pairs], 0.7).to_event(1), obs=torch.stack([Z, Z], -1))


ONE = torch.ones(6, dtype=torch.float64)
WEIGHTS = {masked: KEPT * ONE, scaled: POWERS, in_a_matrix: ONE, unit_by_unit: ONE, as_factors: ONE, as_events: 2 * ONE}


@pytest.mark.parametrize("how", ["live", "recorded"])
@pytest.mark.parametrize("observe", WEIGHTS)
def test_observations_of_many_kinds(observe, how):
    case = apart(observe, 5)
    _, density = taken_apart(case, how)
    global_, local = point_of(case)
    expected = torch.distributions.Normal(global_, 1.0).log_prob(local[:, 0])
    visits = WEIGHTS[observe] * torch.distributions.Normal(local[UNIT, 0], 0.7).log_prob(Z)
    torch.testing.assert_close(density.units(global_, local), expected.index_add(0, UNIT, visits))
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(global_[0])
    torch.testing.assert_close(density.shared(global_, local), prior)


def in_two_coordinates(y):
    """Some observations see one of the two, others both, or their difference, whose derivatives cancel."""
    pyro.sample("first", dist.Normal(y[..., UNIT, 0], 0.7), obs=Z)
    pyro.sample("second", dist.Normal(y[..., UNIT.flip(0), 1].exp(), 0.7), obs=Z)
    pyro.sample("difference", dist.Normal(y[..., UNIT, 0] - y[..., UNIT, 1], 0.7), obs=Z)
    pyro.factor("both", -((y[..., 3, 0] * y[..., 3, 1] - 1) ** 2))


@pytest.mark.parametrize("how", ["live", "recorded"])
def test_observations_of_one_coordinate_or_of_their_difference(how):
    case = apart(in_two_coordinates, 5, lambda mu: dist.Normal(mu, 1.0).expand([2]).to_event(1), local_dim=2)
    unit_model, density = taken_apart(case, how)
    point = point_of(case)
    assert_adds_up(unit_model, density, point)
    assert_apart(density, point)


def hidden(y):
    """No term depends on a unit, whatever it is."""
    pyro.sample("nothing", dist.Normal(y[..., UNIT], 0.7).mask(False), obs=Z)
    pyro.sample("zero", dist.Normal(0 * y[..., UNIT], 0.7), obs=Z)
    pyro.sample("no_grad", dist.Normal(y[..., UNIT].detach(), 0.7).mask(torch.tensor(False)), obs=Z)
    pyro.sample("other", dist.Normal(0.0, 0.7), obs=Z[0])


@pytest.mark.parametrize("how", ["live", "recorded"])
def test_terms_that_depend_on_no_unit_are_shared(how):
    case = apart(hidden, 5)
    unit_model, density = taken_apart(case, how)
    global_, local = point_of(case)
    assert_adds_up(unit_model, density, (global_, local))
    assert_apart(density, (global_, local))
    expected = torch.distributions.Normal(global_, 1.0).log_prob(local[:, 0])
    torch.testing.assert_close(density.units(global_, local), expected)


def without_observations(y):
    pass


def test_units_without_any_observation():
    case = apart(without_observations, 3)
    unit_model, density = taken_apart(case)
    assert_adds_up(unit_model, density, point_of(case))
    assert_apart(density, point_of(case))


# ---------------------------------------------------------------------------------------------- zero where it is probed


@pytest.mark.parametrize("probe", [None, *range(len(room._PROBES))])
def test_observations_at_their_maximum_find_their_owner(probe):
    """At the start, or exactly where the model is probed: there is no derivative, and there is one elsewhere."""
    start = torch.zeros(1), torch.zeros(5, 1)
    local = start[1] if probe is None else room._points(*start)[probe][1]
    z = local[UNIT, 0]

    def observe(y):
        pyro.sample("z", dist.Normal(y[..., UNIT], 0.7), obs=z)

    case = apart(observe, 5)
    unit_model = unit_model_of(case)
    owners = room.unit_owners(unit_model, *start)
    assert owners[-1].tolist() == UNIT.tolist()
    assert_apart(unit_terms(unit_model, *start), point_of(case))
    zero = room._Probe(unit_model, start[0], local).size[-6:]
    assert (zero == 0).all()


def far_apart(errors, dtype):
    def observe(y):
        pyro.sample("z", dist.Normal(y[..., UNIT], errors.to(dtype)), obs=Z.to(dtype))

    return apart(observe, 5)


@pytest.mark.parametrize(
    ("dtype", "least"),
    [
        (torch.float64, 1e-4),
        (torch.float32, 0.1),
        (torch.float64, 1e-9),
        (torch.float32, 1e-3),
    ],
)
def test_observations_of_very_different_precision(dtype, least):
    """One is exact, and the derivatives of others are a tiny share of its own."""
    torch.set_default_dtype(dtype)
    case = far_apart(torch.tensor([1.0, 1.0, least, 1.0, 1.0, 1.0]), dtype)
    owners = room.unit_owners(unit_model_of(case), torch.zeros(1), torch.zeros(5, 1))
    assert owners[-1].tolist() == UNIT.tolist()


@pytest.mark.parametrize("start", [15.0, 40.0])
def test_answers_that_are_certain_at_the_start(start):
    def observe(y):
        pyro.sample("z", dist.Bernoulli(logits=y[..., UNIT]), obs=torch.ones(6))

    case = apart(observe, 5)
    owners = room.unit_owners(unit_model_of(case), torch.zeros(1), torch.full((5, 1), start))
    assert owners[-1].tolist() == UNIT.tolist()
