"""Models that are not recorded, run for many points at once: which take them, and that none takes them wrongly."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.models import normals
from pyro.distributions import constraints

from laplace_amort import AutoLaplaceFamily
from laplace_amort.autodiff.batching import Broadcast, OneByOne, points_of, values_and_gradients
from laplace_amort.errors import RecordingError
from laplace_amort.model import at_once, unit_terms
from laplace_amort.model.at_once import MappedRuns, PointsOnTheLeft, _number_unlike, many_points

N, ROWS = 5, 15
UNIT = torch.arange(ROWS) % N
Z, X = normals(ROWS).double(), normals(ROWS, 2, seed=1).double()


def hierarchy(of_unit):
    """A model of rows, and how it finds what it knows of each."""

    def model(z):
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
        with pyro.plate("units", N):
            y = pyro.sample("y", dist.Normal(0.0, tau))
        with pyro.plate("rows", ROWS):
            pyro.sample("z", dist.Normal(of_unit(beta, y), 1.0), obs=z)

    return model


def in_place(beta, y):
    """What vmap does not map: latents are written into a tensor that does not depend on them."""
    mean = torch.zeros((*y.shape[:-1], ROWS))
    mean[..., :] = y[..., UNIT] + (X * beta).sum(-1)
    return mean


def in_place_from_the_left(beta, y):
    mean = torch.zeros(ROWS)
    mean[:] = y[UNIT] + X @ beta
    return mean


def with_a_parameter(beta, y):
    return y[..., UNIT] * pyro.param("slope", torch.tensor(0.7), constraint=constraints.positive) + (X * beta).sum(-1)


MAPPED = {
    "from the right": lambda beta, y: y[..., UNIT] + (X * beta).sum(-1),
    "an index from the left": lambda beta, y: y[UNIT] + (X * beta).sum(-1),
    "a product from the left": lambda beta, y: y[..., UNIT] + X @ beta,
    "a product from the right": lambda beta, y: y[..., UNIT] + beta @ X.T,
    "a parameter of the model": with_a_parameter,
}


def unit_model(model, *args):
    guide = AutoLaplaceFamily(model, unit_plate="units")
    found = guide.unit_model(*args)
    return found, *found.start(pyro.infer.autoguide.init_to_mean)


def points(model, number, seed=0):
    layout = model.layout
    return 0.3 * normals(number, layout.global_dim, seed=seed), 0.3 * normals(
        number, layout.num_units, layout.local_dim, seed=seed + 1
    )


def assert_same(fast, live, number):
    """Values, gradients and terms by unit at so many points, and second derivatives, are those of runs one by one."""
    globals_, locals_ = points(live, number)
    parameters = list(live.density.parameters().values())
    found = values_and_gradients(fast, globals_, locals_, parameters)
    right = values_and_gradients(live, globals_, locals_, parameters)
    for one, other in zip([*found[:3], *found.in_parameters], [*right[:3], *right.in_parameters], strict=True):
        torch.testing.assert_close(one, other)
    densities = [unit_terms(one, globals_[0], locals_[0]) for one in (fast, live)]
    assert isinstance(points_of(densities[0].units), Broadcast)
    assert isinstance(points_of(densities[1].units), OneByOne)
    for locals_of in (locals_[:, None], torch.stack([locals_, locals_ + 0.1], 1)):
        torch.testing.assert_close(*(density.units_at(globals_, locals_of) for density in densities))
    torch.testing.assert_close(*(density.shared_at(globals_, locals_[0]) for density in densities))
    second = []
    for density in densities:
        y = locals_.flatten(0, 1).clone().requires_grad_()
        (first,) = torch.autograd.grad(density.sum_of_units(globals_, y), y, create_graph=True)
        second.append(torch.autograd.grad(first.sum(), y)[0])
    torch.testing.assert_close(*second)


@pytest.mark.parametrize("number", [1, 2, N, ROWS, 7])
@pytest.mark.parametrize("name", MAPPED)
def test_vmap_maps_over_runs(name, number):
    """Also where there are as many points as units, or as rows."""
    live, *start = unit_model(hierarchy(MAPPED[name]), Z)
    fast = live.at_once(*start)
    assert isinstance(fast.points, MappedRuns)
    assert_same(fast, live, number)


@pytest.mark.parametrize("number", [1, 2, N, ROWS, 7])
def test_what_writes_in_place_takes_points_on_the_left(number):
    live, *start = unit_model(hierarchy(in_place), Z)
    fast = live.at_once(*start)
    assert isinstance(fast.points, PointsOnTheLeft)
    assert_same(fast, live, number)


def nested(z):
    """Plates beside and inside that of the units, an event in each unit, and a factor."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("units", N, dim=-2):
        y = pyro.sample("y", dist.Normal(mu, torch.ones(3)).to_event(1))
        with pyro.plate("visits", 4, dim=-1):
            level = torch.zeros((*y.shape[:-3], N, 4))
            level[..., :] = y.sum(-1)
            v = pyro.sample("v", dist.Normal(level, 1.0))
            pyro.sample("z", dist.Normal(v, 1.0), obs=z)
    pyro.factor("rest", -(mu**2).sum(-1))


def test_plates_in_plates():
    live, *start = unit_model(nested, normals(N, 4))
    fast = live.at_once(*start)
    assert isinstance(fast.points, PointsOnTheLeft)
    for number in (2, 3, 4, N):
        assert_same(fast, live, number)


@pytest.mark.parametrize(
    ("of_unit", "said"),
    [
        (in_place_from_the_left, r"index \d is out of bounds for dimension 0 with size \d"),
        (lambda beta, y: y[..., UNIT] * (1.0 if bool((beta > -9).all()) else 2.0), "would look at a latent"),
    ],
)
def test_what_takes_no_points_says_why(of_unit, said):
    live, *start = unit_model(hierarchy(of_unit), Z)
    with pytest.raises(RecordingError, match=said):
        live.at_once(*start)
    assert isinstance(points_of(live.many), OneByOne)


def wrongly(beta, y):
    """Planted: with several points, what it writes in place is that of the first of them, in the right shape."""
    mean = torch.zeros((*y.shape[:-1], ROWS))
    mean[..., :] = (y[:1] if y.dim() > 1 else y)[..., UNIT]
    return mean


def test_a_model_that_takes_points_wrongly_is_caught():
    live, *start = unit_model(hierarchy(wrongly), Z)
    with pytest.raises(RecordingError, match="the values of several points at once differ from those of one at a time"):
        live.at_once(*start)


def wrong_by_size(beta, y):
    """Planted: where there are as many points as units, it takes the one for the other."""
    mean = torch.zeros((*y.shape[:-1], ROWS))
    mean[..., :] = (y[:N].mT if y.dim() > 1 and len(y) == N else y)[..., UNIT]
    return mean


def test_points_are_as_many_as_nothing_else(monkeypatch):
    """A number that is a size would be compared where sizes coincide, and of nothing else it says anything."""
    seen = []

    def counted(model, how, globals_, locals_):
        seen.append(len(globals_))

    monkeypatch.setattr(at_once, "_compare", counted)
    live, *start = unit_model(hierarchy(in_place), Z)
    many_points(live, *start)
    assert set(seen) == {4}  # of 3 unconstrained globals, 5 units, 15 rows, 2 columns and 1 latent in each unit
    assert _number_unlike({1, 3, 4, 5, 7}) == 6
    assert _number_unlike(set()) == 3


def test_gradients_are_compared_as_well(monkeypatch):
    """Planted: values are right, and nothing comes back."""

    def detached(beta, y):
        mean = torch.zeros((*y.shape[:-1], ROWS))
        mean[..., :] = (y.detach() if y.dim() > 1 else y)[..., UNIT]
        return mean

    live, *start = unit_model(hierarchy(detached), Z)
    with pytest.raises(RecordingError, match="the gradients in the units of several points at once differ"):
        live.at_once(*start)


def test_chunks_are_as_large_as_memory_allows(monkeypatch):
    live, *start = unit_model(hierarchy(MAPPED["from the right"]), Z)
    fast = live.at_once(*start)
    runs, terms = [], live.density.terms

    def counted(*args):
        runs.append(1)
        return terms(*args)

    fast.density.terms = counted
    globals_, locals_ = points(live, 7)
    monkeypatch.setattr("laplace_amort.autodiff.batching._CHUNK_BYTES", 3 * fast.points.num_bytes)
    found = values_and_gradients(fast, globals_, locals_, [])
    assert len(runs) == 3  # of 3, 3 and 1
    torch.testing.assert_close(found.values, values_and_gradients(live, globals_, locals_, []).values)
