"""Data sets drawn from a model, evaluated together, against each by itself."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.fit_models import guide_for, poisson, poisson_counts
from helpers.unit_models import UNIT_MODELS

from laplace_amort import LogJoint
from laplace_amort.autodiff import Recording
from laplace_amort.errors import RecordingError
from laplace_amort.guide.problem import Problem
from laplace_amort.model import simulated as module
from laplace_amort.model.simulated import simulated_units

NUMBER = 13


def start_of(model, args, unit_plate=None):
    problem = Problem(guide_for(model, unit_plate=unit_plate), args, {})
    return problem.unit_model.live(), problem.loc + 0.1, problem.start


def terms(model, args, unit_plate=None):
    """The terms ``(S, N)`` of all data sets at one place, and those that each comes with."""
    live, global_, local = start_of(model, args, unit_plate)
    torch.manual_seed(7)
    found = list(simulated_units(live, global_, local, NUMBER))
    return torch.stack([units(row, local) for units, rows in found for row in rows]), found


def counted(counts):
    poisson(counts)


def indexed(group, x, z):
    """Observations outside of the plate of the units, of whole numbers, and others beside them."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 4):
        a = pyro.sample("a", dist.Normal(mu, 1.0))
        pyro.sample("seen", dist.Normal(a, 0.5), obs=torch.zeros(4))
    with pyro.plate("rows", len(z)):
        pyro.sample("z", dist.Bernoulli(logits=a[group] * x), obs=z)


GROUP = torch.arange(12) % 4
CASES = {
    "poisson": (counted, (poisson_counts(8).double(),)),
    "indexed": (indexed, (GROUP, torch.linspace(0.5, 2.0, 12), (GROUP > 1).double())),
    **{name: (UNIT_MODELS[name]().model, UNIT_MODELS[name]().args) for name in ("binomial_slopes", "dim_minus_three")},
}


@pytest.mark.parametrize("name", CASES)
def test_together_they_are_what_each_is(name, monkeypatch):
    together, found = terms(*CASES[name])
    assert len(found) > 1
    assert isinstance(found[0][0], Recording)

    def refused(*args):
        raise RecordingError("planted")

    monkeypatch.setattr(module, "record", refused)
    apart, alone = terms(*CASES[name])
    assert len(alone) == NUMBER
    torch.testing.assert_close(together, apart)
    assert len(together.sum(1).unique()) > NUMBER // 2  # the data sets differ


def test_many_data_are_drawn_one_after_the_other(monkeypatch):
    together, _ = terms(*CASES["poisson"])
    monkeypatch.setattr(module, "_MOST", 100)
    apart, alone = terms(*CASES["poisson"])
    assert len(alone) == NUMBER
    torch.testing.assert_close(together, apart)


def test_a_number_that_is_off_by_one_would_be_found(monkeypatch):
    right, _ = terms(*CASES["poisson"])
    original = module._row
    monkeypatch.setattr(module, "_row", lambda global_, number: original(global_, number + 1))
    wrong, _ = terms(*CASES["poisson"])
    assert not torch.allclose(right[:-1], wrong[:-1])
    torch.testing.assert_close(right[1:], wrong[:-1])


def test_gradients_reach_the_globals_alone():
    live, global_, local = start_of(*CASES["poisson"])
    (units, rows), *_ = simulated_units(live, global_, local, NUMBER)
    row = rows[1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(units(row, local).sum(), row)
    assert (gradient[:-1] != 0).all()
    assert gradient[-1] == 0


def test_functions_of_latents_follow_them_where_data_are_drawn():
    """Pyro's uncondition makes a value of a pyro.deterministic, which would stay where the data were drawn."""

    def model(deterministic, z):
        y = pyro.sample("y", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        twice = pyro.deterministic("twice", 2 * y) if deterministic else 2 * y
        with pyro.plate("rows", 3):
            pyro.sample("z", dist.Normal(twice, 1.0), obs=z)

    values = []
    for deterministic in (True, False):
        torch.manual_seed(0)
        drawn = LogJoint(model, deterministic, torch.zeros(3)).simulated({"y": torch.ones(3)})
        values.append([float(drawn(point)) for point in (torch.zeros(3), torch.ones(3))])
    assert values[0] == pytest.approx(values[1])
