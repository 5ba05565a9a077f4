"""Terms that depend on several units are refused by name, wrong owners are found, and many units are told apart."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.models import counts, normals
from helpers.unit_models import poisson_by_visit

from laplace_amort import AutoLaplaceFamily
from laplace_amort.errors import StructureError
from laplace_amort.model import terms as room
from laplace_amort.model.calls import UnitModels
from laplace_amort.model.terms import unit_terms

FIRST, SECOND = torch.tensor([2, 0, 0, 4]), torch.tensor([1, 3, 0, 4])
Z = torch.tensor([0.3, -1.0, 2.0, 0.4], dtype=torch.float64)


def unit_model_of(model, *args, **kwargs):
    """Not by a guide, which would refuse some of the models below before this room sees them."""
    return UnitModels(model, "units")(args, kwargs, {})[0]


def start_of(unit_model, size=0.5):
    layout = unit_model.layout
    return size * normals(layout.global_dim), size * normals(layout.num_units, layout.local_dim, seed=1)


def apart(observe, inside=None, num_units=5):
    """A model that is observed outside of the plate of the units, or inside."""

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("units", num_units):
            y = pyro.sample("y", dist.Normal(mu, 1.0))
            if inside:
                inside(y)
        if observe:
            observe(y)

    return model


# ------------------------------------------------------------------------------------------------------------- refusals


def difference(y):
    pyro.sample("z", dist.Normal(y[..., FIRST] - y[..., SECOND], 1.0), obs=Z)


def one_game(y):
    pyro.sample("z", dist.Bernoulli(logits=y[..., 1] - y[..., 3]), obs=Z[0].exp().round().clamp(max=1))


def mean(y):
    pyro.sample("z", dist.Normal(y.mean(-1), 1.0), obs=Z[0])


def sum_of_squares(y):
    pyro.factor("z", -(y**2).sum(-1))


def rows(y):
    """The event has observations of several units: element 1 has units 0 and 4."""
    pyro.sample("z", dist.Normal(y[..., FIRST[[1, 2, 2, 3]].reshape(2, 2)], 1.0).to_event(1), obs=Z.reshape(2, 2))


def nearly_its_own(y):
    pyro.sample("z", dist.Normal(y[..., FIRST] + 1e-3 * y[..., SECOND], 1.0), obs=Z)


def cancelled(y):
    """The sum of two units, of which one hardly matters where the other does not."""
    pyro.factor("z", (y[..., 0] * y[..., 1]).sin())


def walk(y):
    pyro.factor("z", -((y - y.roll(1, -1)) ** 2))


def summed_inside(y):
    pyro.factor("z", -(y**2).sum())


def centered(y):
    pyro.sample("z", dist.Normal(y - y.mean(-1, keepdim=True), 1.0), obs=torch.zeros(5))


OUTSIDE = {
    difference: (0, 2, (1, 2)),
    one_game: (None, 2, (1, 3)),
    mean: (None, 5, (0, 1)),
    sum_of_squares: (None, 5, (0, 1)),
    rows: (1, 2, (0, 4)),
    nearly_its_own: (0, 2, (1, 2)),
    cancelled: (None, 2, (0, 1)),
}
INSIDE = {walk: (0, 2, (0, 4)), summed_inside: (0, 5, (0, 1)), centered: (0, 5, (0, 1))}
REFUSED = {f: (apart(f), *rest) for f, rest in OUTSIDE.items()} | {
    f: (apart(None, f), *rest) for f, rest in INSIDE.items()
}


@pytest.mark.parametrize("why", REFUSED)
def test_terms_of_several_units_are_refused_by_name(why):
    """The message has the site, its element, how many units there are, two of them, and what to write instead."""
    model, element, num_units, (one, other) = REFUSED[why]
    unit_model = unit_model_of(model)
    where = "the only element" if element is None else f"element {element}"
    units = f"unit {one} of plate 'units' ('y') and unit {other} of plate 'units' ('y')"
    message = f"{where} of site 'z' depends on {num_units} units, {units}"
    with pytest.raises(StructureError, match=re.escape(message)) as caught:
        unit_terms(unit_model, *start_of(unit_model))
    assert "with pyro.plate('units', 5):\n        pyro.factor('z', terms_of_units)" in str(caught.value)


@pytest.mark.parametrize("how", ["zero", "recorded"])
@pytest.mark.parametrize("why", [difference, mean, walk, summed_inside])
def test_they_are_refused_from_any_start(why, how):
    unit_model = unit_model_of(REFUSED[why][0])
    start = start_of(unit_model, size=0.0 if how == "zero" else 0.5)
    unit_model = unit_model.recorded(*start) if how == "recorded" else unit_model
    with pytest.raises(StructureError, match="of site 'z' depends on"):
        unit_terms(unit_model, *start)


def test_what_the_message_says_to_write_is_taken_apart():
    unit_model = unit_model_of(apart(None, lambda y: pyro.factor("z", -(y**2))))
    point = start_of(unit_model)
    density = unit_terms(unit_model, *point)
    expected = torch.distributions.Normal(point[0], 1.0).log_prob(point[1][:, 0]) - point[1][:, 0] ** 2
    torch.testing.assert_close(density.units(*point), expected)


def test_units_of_a_minibatch_are_named_by_their_place_in_the_plate():
    def model(subsample):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("units", 6, subsample=subsample):
            y = pyro.sample("y", dist.Normal(mu, 1.0))
        pyro.factor("z", -(y.sum(-1) ** 2))

    unit_model = unit_model_of(model, torch.tensor([5, 0, 3]))
    with pytest.raises(StructureError, match=r"'z' depends on 3 units, unit 5 of plate .* and unit 0 of plate"):
        unit_terms(unit_model, *start_of(unit_model))


def test_a_sum_over_a_single_unit_is_its_own():
    unit_model = unit_model_of(apart(sum_of_squares, num_units=1))
    point = start_of(unit_model)
    density = unit_terms(unit_model, *point)
    found = torch.func.grad(lambda y: density.units(point[0], y).sum())(point[1])
    torch.testing.assert_close(found, point[0] - 3 * point[1])


# --------------------------------------------------------------------------------------------------------- planted bugs

VISITS = torch.tensor([2, 0, 0, 4, 2])
TABLE = [5, 5, *range(5), *VISITS.tolist()]  # of mu and of the plate, shared; of the units; and of the visits


def probe_of_visits(number=1):
    unit_model = unit_model_of(apart(lambda y: pyro.sample("z", dist.Normal(y[..., VISITS], 1.0), obs=normals(5))))
    return room._Probe(unit_model, *room._points(*start_of(unit_model))[number])


def swapped(one, other):
    table = list(TABLE)
    table[one], table[other] = table[other], table[one]
    return table


def replaced(index, owner):
    return [*TABLE[:index], owner, *TABLE[index + 1 :]]


WRONG = {
    "two visits are swapped": (swapped(7, 8), "element 0 of site 'z'"),
    "the last two are swapped": (swapped(10, 11), "element 3 of site 'z'"),
    "two units are swapped": (swapped(2, 6), "element 0 of site 'y'"),
    "a visit is of the unit beside": (replaced(9, 1), "element 2 of site 'z'"),
    "a visit is shared": (replaced(11, 5), "element 4 of site 'z'"),
    "a visit is of several": (replaced(11, -1), "element 4 of site 'z'"),
}


def test_owners_that_are_found_pass_the_check():
    probe = probe_of_visits()
    found = probe.owner()
    assert found.tolist() == TABLE
    probe.check(found)


@pytest.mark.parametrize("bug", WRONG)
@pytest.mark.parametrize("number", range(len(room._PROBES)))
def test_a_wrong_owner_is_found(bug, number):
    table, message = WRONG[bug]
    with pytest.raises(StructureError, match=message):
        probe_of_visits(number).check(torch.tensor(table))


def test_visits_of_one_unit_may_change_places():
    probe_of_visits().check(torch.tensor(swapped(8, 9)))


def test_wrong_owners_are_found_in_all_of_it(monkeypatch):
    """Planted: units in the order of a matrix of another width."""
    unit_model = unit_model_of(poisson_by_visit, counts(30), torch.arange(30) % 20, 20)
    unit_terms(unit_model, *start_of(unit_model))
    original = room._Probe.owner
    monkeypatch.setattr(room._Probe, "owner", lambda self: original(self) // 5 + original(self) % 5 * 4)
    with pytest.raises(StructureError, match="of site 'z'"):
        unit_terms(unit_model, *start_of(unit_model))


# ---------------------------------------------------------------------------------------------------------- many units


def visits_of(num_units, num_visits, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(num_units, generator=generator)
    more = torch.randint(num_units, (num_visits,), generator=generator)
    unit = torch.cat([order, more])[:num_visits]
    z = torch.poisson(torch.full((num_visits,), 2.0, dtype=dtype), generator=generator)
    return z, unit


@pytest.mark.parametrize(
    ("num_units", "num_visits", "dtype"),
    [
        (5000, 5000, torch.float32),
        (5000, 12000, torch.float32),
        (5000, 2000, torch.float32),
        (20000, 50000, torch.float64),
        (20000, 50000, torch.float32),
    ],
)
def test_many_units_in_any_order(num_units, num_visits, dtype):
    """Every owner, and the terms against a sum by index."""
    torch.set_default_dtype(dtype)
    z, unit = visits_of(num_units, num_visits, dtype)
    unit_model = unit_model_of(poisson_by_visit, z, unit, num_units)
    start = torch.zeros(2), torch.zeros(num_units, 1)
    found = room.unit_owners(unit_model, *start)
    assert torch.equal(found[-2], unit)
    global_, local = start_of(unit_model)
    density = unit_terms(unit_model.recorded(*start), *start)
    prior = torch.distributions.Normal(global_[0], global_[1].exp()).log_prob(local[:, 0])
    visits = torch.distributions.Poisson(local[unit, 0].exp()).log_prob(z)
    expected = prior.double().index_add(0, unit, visits.double())
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-11}[dtype]
    torch.testing.assert_close(density.units(global_, local).double(), expected, rtol=tolerance, atol=tolerance)
    assert density.units(global_, local).dtype == dtype


def test_one_of_many_that_depends_on_two_is_found():
    z, unit = visits_of(3000, 7000)
    other = unit.clone()
    other[4321] = (unit[4321] + 1) % 3000

    def observe(y):
        pyro.sample("z", dist.Poisson((y[..., unit] / 2 + y[..., other] / 2).exp()), obs=z)

    unit_model = unit_model_of(apart(observe, num_units=3000))
    with pytest.raises(StructureError, match=r"element 4321 of site 'z' depends on 2 units"):
        unit_terms(unit_model, *start_of(unit_model))


def test_a_guide_has_the_same_units():
    """Whoever makes the model of units."""
    args = counts(7), torch.tensor([0, 3, 0, 1, 0, 3, 4]), 5
    guide = AutoLaplaceFamily(poisson_by_visit).unit_model(*args)
    point = start_of(guide)
    expected = unit_terms(unit_model_of(poisson_by_visit, *args), *point).units(*point)
    assert torch.equal(unit_terms(guide, *point).units(*point), expected)


# ------------------------------------------------------------------------------------------------------ rounding errors


def several_counts(counts):
    """Three counts of each unit: the derivative of their sum is zero wherever the rate is their mean."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("units", counts.shape[-1], dim=-1):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        with pyro.plate("counts", len(counts), dim=-2):
            pyro.sample("z", dist.Poisson(y.exp()), obs=counts)


@pytest.mark.parametrize("num_units", [3, 1000])
def test_derivatives_that_cancel_at_every_point_are_no_dependence(num_units, monkeypatch):
    """Planted: every point that is probed is a rounding error beside the mode of every unit."""
    torch.set_default_dtype(torch.float32)
    unit_model = unit_model_of(several_counts, torch.tensor([[2.0], [1.0], [0.0]]).expand(3, num_units))
    noise = torch.randn(num_units, 1, generator=torch.Generator().manual_seed(0))
    shares = [*room._PROBES, room._FROM_ZERO]
    points = [(torch.zeros(1), 1e-5 * share * noise) for share in shares]
    monkeypatch.setattr(room, "_points", lambda global_, local: points)
    owners = room.unit_owners(unit_model, torch.zeros(1), torch.zeros(num_units, 1))
    assert owners[-1].tolist() == list(range(num_units))


def test_points_that_are_probed_are_not_the_same_for_any_unit():
    """Whatever is near zero in one is not in the others."""
    start = torch.zeros(20_000, 1)
    shares = [*room._PROBES, room._FROM_ZERO]
    assert sorted(shares) == sorted(set(shares))
    points = room._points(torch.zeros(1), start)
    moves = torch.stack([local.squeeze(-1) / share for (_, local), share in zip(points, shares, strict=True)])
    assert moves.abs().max(0).values.min() > 0.02
    assert torch.corrcoef(moves).triu(1).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_data_of_another_precision_than_the_globals(dtype):
    other = {torch.float32: torch.float64, torch.float64: torch.float32}[dtype]
    torch.set_default_dtype(dtype)
    answers = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=other)
    unit_model = unit_model_of(apart(lambda y: pyro.sample("z", dist.Bernoulli(logits=y[..., FIRST]), obs=answers)))
    global_, local = (part.to(dtype) for part in start_of(unit_model))
    density = unit_terms(unit_model, global_, local)
    found = density.units(global_, local)
    assert found.dtype is dtype
    expected = torch.distributions.Normal(global_, 1.0).log_prob(local[:, 0])
    visits = torch.distributions.Bernoulli(logits=local[FIRST, 0]).log_prob(answers.to(dtype))
    torch.testing.assert_close(found, expected.index_add(0, FIRST, visits))
