"""Objectives where there is nothing to find: no error, words, and a way back; and where nothing is recorded."""

import math
from functools import partial

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.oracles import Figures, relative_error
from helpers.unit_models import UNIT_MODELS, UnitCase
from pyro.distributions import constraints

from laplace_amort import ModeNotFoundError, NoRepair, SoftAbs
from laplace_amort.fitting.objectives.elbo import ELBOFunction
from laplace_amort.fitting.objectives.laplace import LaplaceFunction
from laplace_amort.guide.auto import AutoLaplaceFamily
from laplace_amort.guide.problem import Problem
from laplace_amort.linalg.arrowhead_repair import repair_head, repair_tails
from laplace_amort.units.modes import FreeMode

figures = Figures()


def make_target(case, **options):
    return Problem(AutoLaplaceFamily(case.model, **options), case.args, case.kwargs)


def vanishing_mode(z):
    """The units have a mode, log(slope + z), where that is positive; the globals have a wall at 3."""
    slope = pyro.sample("slope", dist.Normal(1.0, 0.1))
    pyro.factor("wall", torch.log(3.0 - slope))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.ImproperUniform(constraints.real, (), ()))
        pyro.factor("z", (slope + z) * y - y.exp())


MODELS = {"vanishing": lambda: UnitCase(vanishing_mode, (torch.tensor([0.0, 0.5, 2.0]),), 1, 3, 1), **UNIT_MODELS}
ELBO = partial(ELBOFunction, num_draws=64, seed=1)
FREE = {"mode": FreeMode()}
# The objective, the model, options, a point, and the problem it has there.
NOWHERE = {
    "marginal, no mode": (LaplaceFunction, "vanishing", {}, [-1.0], "ModeNotFoundError: the conditional mode was not"),
    "elbo, no mode": (ELBO, "vanishing", {}, [-1.0], "ModeNotFoundError: the conditional mode was not"),
    "elbo, draws beyond the wall": (ELBO, "vanishing", {}, [2.9], "the objective is nan"),
    "marginal, beyond the wall": (LaplaceFunction, "vanishing", {}, [3.1], "InformationError: log_joint is nan"),
    "marginal, overflow": (LaplaceFunction, "normal", {}, [0.0, 800.0], "Error: "),
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
    function = make(make_target(MODELS[name](), **options))
    first = function.problem.memory()
    start, good = function.point(), function(function.point())
    state = function.problem.memory()
    found = function(numpy.array(point))
    assert found.value == -math.inf
    assert problem in found.failure
    assert found.gradient.shape == start.shape
    assert numpy.isnan(found.gradient).all()
    if "ModeNotFound" in problem:
        assert not torch.equal(state[0], first[0])  # from which it looked once more
    if "ModeNotFound" in found.failure or "InformationError" in found.failure:
        for before, after in zip(state, function.problem.memory(), strict=True):
            assert torch.equal(before, after)
    again = function(start)
    assert (good.failure, again.failure) == ("", "")
    assert again.value == pytest.approx(good.value, rel=1e-8)


@pytest.mark.parametrize("make", [LaplaceFunction, ELBO])
def test_recovers_from_a_bad_warm_start(make):
    """Modes that are not found from where they were last are found from the first start."""
    function = make(make_target(UNIT_MODELS["poisson_by_visit"]()))
    expected, memory = function(function.point()), function.problem.memory()
    function.problem.recall((torch.full_like(memory[0], 800.0), memory[1]))
    with pytest.raises(ModeNotFoundError):
        function._evaluate()
    found = function(function.point())
    assert found.value == pytest.approx(expected.value, rel=1e-8)
    assert function.problem.memory()[0].abs().max() < 10


def test_coordinates_where_there_are_none():
    """A start from which the optimizer has to come back has the scale of the parameters themselves."""
    function = ELBO(make_target(MODELS["vanishing"](), mode=FreeMode()))
    assert function.whitening().with_units
    function.move(numpy.array([-1.0, 0.0, 0.0, 0.0]))
    whitening = function.whitening()
    assert (whitening.size, whitening.with_units) == (4, False)
    assert whitening.step(numpy.arange(4.0)) == pytest.approx(numpy.arange(4.0))


@pytest.mark.parametrize("make", [LaplaceFunction, ELBO])
@pytest.mark.parametrize("name", UNIT_MODELS)
def test_recorded_and_live_models_give_the_same(name, make):
    problem = make_target(UNIT_MODELS[name]())
    function = make(problem)
    assert problem.unit_model.recording is not None
    recorded = function(function.point())
    problem.unit_model = problem.unit_model.live()
    live = function(function.point())
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
    function = ELBO(make_target(UNIT_MODELS["poisson_by_visit"](), **FREE))
    found = function(numpy.array([0.0, 0.0] + [650.0] * 5))
    assert -math.inf < found.value < -1e280
    assert not found.failure
