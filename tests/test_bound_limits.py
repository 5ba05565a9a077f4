"""Bound objectives where there is nothing to find: no error, words, and a way back; and where nothing is recorded."""

import math
from functools import partial

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import Figures, relative_error
from pyro.distributions import constraints
from unit_models import UNIT_MODELS, UnitCase

from laplace_amort import ModeNotFoundError, NoRepair, SoftAbs
from laplace_amort.block_repair import repair_head, repair_tails
from laplace_amort.bound import BoundELBO, BoundMarginal
from laplace_amort.guides import AutoLaplaceFamily
from laplace_amort.modes import FreeMode
from laplace_amort.target import Target

figures = Figures()


def make_target(case, **options):
    return Target(AutoLaplaceFamily(case.model, **options), case.args, case.kwargs)


def vanishing_mode(z):
    """The units have a mode, log(slope + z), where that is positive; the globals have a wall at 3."""
    slope = pyro.sample("slope", dist.Normal(1.0, 0.1))
    pyro.factor("wall", torch.log(3.0 - slope))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.ImproperUniform(constraints.real, (), ()))
        pyro.factor("z", (slope + z) * y - y.exp())


MODELS = {"vanishing": lambda: UnitCase(vanishing_mode, (torch.tensor([0.0, 0.5, 2.0]),), 1, 3, 1), **UNIT_MODELS}
ELBO = partial(BoundELBO, num_draws=64, seed=1)
FREE = {"mode": FreeMode()}
# The objective, the model, options, a point, and the problem it has there.
NOWHERE = {
    "marginal, no mode": (BoundMarginal, "vanishing", {}, [-1.0], "ModeNotFoundError: the conditional mode was not"),
    "elbo, no mode": (ELBO, "vanishing", {}, [-1.0], "ModeNotFoundError: the conditional mode was not"),
    "elbo, draws beyond the wall": (ELBO, "vanishing", {}, [2.9], "the objective is nan"),
    "marginal, beyond the wall": (BoundMarginal, "vanishing", {}, [3.1], "InformationError: log_joint is nan"),
    "marginal, overflow": (BoundMarginal, "normal", {}, [0.0, 800.0], "Error: "),
    "elbo, overflow": (ELBO, "normal", {}, [0.0, 800.0], "Error: "),
    "elbo, underflow": (ELBO, "normal", {}, [0.0, -800.0], "Error: "),
    "elbo, not finite": (ELBO, "normal", {}, [0.0, numpy.inf], "Error: "),
    "elbo, not a number": (ELBO, "normal", {}, [0.0, numpy.nan], "Error: "),
    "elbo, no repair": (ELBO, "normal", {"repair": NoRepair()}, [0.0, -1.5], "NotPositiveDefiniteError: "),
    "elbo, free, overflow": (ELBO, "poisson_by_visit", FREE, [0.0, 0.0] + [800.0] * 5, "Error: "),
}


@pytest.mark.parametrize("where", NOWHERE)
def test_where_there_is_no_objective(where):
    """Minus infinity and words, not an error; and no trace of it is left."""
    make, name, options, point, problem = NOWHERE[where]
    bound = make(make_target(MODELS[name](), **options))
    start, good = bound.point(), bound(bound.point())
    state = bound.target.guide.warm_start.state()
    found = bound(numpy.array(point))
    assert found.value == -math.inf
    assert problem in found.problem
    assert found.gradient.shape == start.shape
    assert numpy.isnan(found.gradient).all()
    if "ModeNotFound" in problem:
        assert not torch.equal(state[0], bound.target.first[0])  # from which it looked once more
    if "ModeNotFound" in found.problem or "InformationError" in found.problem:
        for before, after in zip(state, bound.target.guide.warm_start.state(), strict=True):
            assert torch.equal(before, after)
    again = bound(start)
    assert (good.problem, again.problem) == ("", "")
    assert again.value == pytest.approx(good.value, rel=1e-8)


@pytest.mark.parametrize("make", [BoundMarginal, ELBO])
def test_recovers_from_a_bad_warm_start(make):
    """Modes that are not found from where they were last are found from the first start."""
    bound = make(make_target(UNIT_MODELS["poisson_by_visit"]()))
    expected, warm_start = bound(bound.point()), bound.target.guide.warm_start
    warm_start.intercept.fill_(800.0)
    with pytest.raises(ModeNotFoundError):
        bound._evaluate()
    found = bound(bound.point())
    assert found.value == pytest.approx(expected.value, rel=1e-8)
    assert warm_start.intercept.abs().max() < 10


def test_coordinates_where_there_are_none():
    """A start from which the optimizer has to come back has the scale of the parameters themselves."""
    bound = ELBO(make_target(MODELS["vanishing"](), mode=FreeMode()))
    assert bound.coordinates().with_units
    bound.move(numpy.array([-1.0, 0.0, 0.0, 0.0]))
    coordinates = bound.coordinates()
    assert (coordinates.size, coordinates.with_units) == (4, False)
    assert coordinates.step(numpy.arange(4.0)) == pytest.approx(numpy.arange(4.0))


@pytest.mark.parametrize("make", [BoundMarginal, ELBO])
@pytest.mark.parametrize("name", UNIT_MODELS)
def test_recorded_and_live_models_give_the_same(name, make):
    target = make_target(UNIT_MODELS[name]())
    bound = make(target)
    assert target.unit_model.recording is not None
    recorded = bound(bound.point())
    target.unit_model = target.unit_model.live()
    live = bound(bound.point())
    for what in ("value", "gradient"):
        pair = [torch.as_tensor(getattr(found, what)) for found in (recorded, live)]
        assert figures.add(f"recorded: {what}", relative_error(*pair)) < 1e-8


@pytest.mark.parametrize("large", [1e155, 1e200, 1e300])
def test_precisions_whose_squares_overflow_are_repaired(large):
    """As trial points have them: of a unit in which exp(y) is large."""
    tail = torch.tensor([large, -1.0, 1.0]).reshape(3, 1, 1)
    repaired, _ = repair_tails(SoftAbs(), tail)
    assert (repaired.isfinite() & (repaired > 0)).all()
    head = torch.diag(torch.tensor([large, 1.0]))
    repaired, _ = repair_head(SoftAbs(), -head, head)
    torch.testing.assert_close(repaired, head)


def test_a_huge_value_is_a_value():
    """Precisions of 1e282 have no square, but the objective is a number all the same."""
    bound = ELBO(make_target(UNIT_MODELS["poisson_by_visit"](), **FREE))
    found = bound(numpy.array([0.0, 0.0] + [650.0] * 5))
    assert -math.inf < found.value < -1e280
    assert not found.problem
