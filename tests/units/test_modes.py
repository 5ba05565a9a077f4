"""The three kinds of modes as a guide uses them: values, warm starts, graphs, messages."""

import copy
import io
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from helpers.mode_problems import (
    CLOSED_FORMS,
    UnitProblem,
    beta,
    cauchy,
    gamma,
    normal,
    poisson,
    regression,
    solve,
    solve_for,
)
from helpers.strategies import standard_normal
from torch import Tensor

from laplace_amort.errors import ModeNotFoundError, ModeWarning
from laplace_amort.linalg.boost import Boost
from laplace_amort.linalg.softabs import SoftAbs
from laplace_amort.units.closed_form import ClosedFormMode
from laplace_amort.units.modes import FreeMode, Mode, NewtonMode
from laplace_amort.units.newton import ModeStatus


def closed_form(problem: UnitProblem) -> ClosedFormMode:
    return ClosedFormMode(lambda sites: {"y": problem.mode(sites["theta"])})


@pytest.mark.parametrize("kind", [NewtonMode(), FreeMode(), ClosedFormMode(dict)], ids=lambda kind: type(kind).__name__)
def test_all_are_modes(kind: object) -> None:
    assert isinstance(kind, Mode)
    assert type(kind.prepare(torch.zeros(3, 2))) is type(kind)


# ------------------------------------------------------------------------------------------------------------- Newton


class Counted:
    """The problem, and how often its log joint is evaluated."""

    def __init__(self, problem: UnitProblem) -> None:
        self.calls = 0
        self.problem = problem.replace()
        object.__setattr__(self.problem, "log_joint", self.log_joint)
        self._log_joint = problem.log_joint

    def log_joint(self, theta: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return self._log_joint(theta, y)


@pytest.mark.parametrize("make", CLOSED_FORMS.values(), ids=CLOSED_FORMS)
def test_newton_agrees_with_the_closed_form(make: Callable[..., UnitProblem]) -> None:
    problem = make(50)
    mode = NewtonMode().find(problem, problem.theta, problem.start)
    torch.testing.assert_close(mode.detach(), problem.mode(problem.theta), atol=1e-12, rtol=0)


def test_a_step_of_a_fit_takes_no_evaluation_more_than_the_search() -> None:
    """The last point of the search gives both the factor and the gradient that derivatives go through."""
    problem = poisson(20)
    theta = problem.theta.clone().requires_grad_()
    mode = NewtonMode().find(problem, theta, problem.start).detach()
    for moved, calls in [(0.0, 1), (1e-3, 3)]:
        counted = Counted(problem)
        found = NewtonMode().find(counted.problem, (theta + moved), mode)
        found.sum().backward()
        assert counted.calls <= calls
        assert theta.grad.abs().max() > 0.1
    counted = Counted(problem)
    NewtonMode(differentiable_steps=2).find(counted.problem, theta, mode)
    assert counted.calls == 2


def test_without_gradients_there_is_no_graph() -> None:
    problem = poisson(20)
    theta = problem.theta.clone().requires_grad_()
    attached = NewtonMode().find(problem, theta, problem.start)
    for steps in (1, 2):
        with torch.no_grad():
            mode = NewtonMode(differentiable_steps=steps).find(problem, theta, problem.start)
        assert not mode.requires_grad
        assert torch.equal(mode, attached)
    solution = solve_for(problem.log_joint, theta, problem.start)
    assert not any(value.requires_grad for value in solution[:3])
    assert torch.equal(solution.mode, attached)
    assert theta.grad is None


def test_start_is_a_constant() -> None:
    problem = gamma()
    start = (problem.start + 0.1).requires_grad_()
    theta = problem.theta.clone().requires_grad_()
    NewtonMode().find(problem, theta, start).sum().backward()
    assert start.grad is None
    assert theta.grad is not None


def test_modes_not_found_are_named() -> None:
    """Of a minibatch: units by their index in the whole plate, no more than five of them in words."""
    counts = torch.tensor([3.0, 1e6, 2.0, 1e6, 1e6, 1e6, 1e6, 1e6, 1e6])
    units = torch.tensor([4, 12, 7, 30, 31, 32, 33, 34, 35])
    problem = poisson(counts=counts).replace(units=units)
    with pytest.raises(ModeNotFoundError) as caught:
        NewtonMode(max_steps=5).find(problem, problem.theta, problem.start + 0.2)
    assert caught.value.units == [12, 30, 31, 32, 33, 34, 35]
    assert caught.value.status == [ModeStatus.MAX_STEPS] * 7
    lines = str(caught.value).splitlines()
    assert lines[0] == "the conditional mode was not found for 7 of 9 units:"
    assert lines[1].startswith(
        "    unit 12 of plate 'units' ('y'): no convergence in the steps allowed: raise max_steps"
    )
    assert "standard deviations" in lines[1]
    assert [line.split()[1] for line in lines[1:6]] == ["12", "30", "31", "32", "33"]
    assert lines[6] == "    and 2 more"
    assert "ClosedFormMode(" in lines[-1]


def test_every_unit_has_its_own_reason() -> None:
    def density(theta: Tensor, y: Tensor) -> Tensor:
        a, b, c, d = y[:, 0]
        return torch.stack([-((a - theta[0]) ** 2), b * math.nan, 0 * c, -((d - 0.3).abs()) - d**2 / 50])

    problem = UnitProblem(density, torch.zeros(1), torch.tensor([[1.0], [-1.0], [0.0], [5.0]]))
    with pytest.raises(ModeNotFoundError, match="3 of 4 units") as caught:
        NewtonMode().find(problem, problem.theta, problem.start)
    assert caught.value.status == [ModeStatus.NOT_FINITE, ModeStatus.NOT_MAXIMUM, ModeStatus.STALLED]
    assert caught.value.units == [1, 2, 3]
    assert all(str(status) in str(caught.value) for status in caught.value.status)
    assert "more" not in str(caught.value).splitlines()[4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerance": 0.0}, "tolerance must be between 0 and 1 standard deviation, got 0.0"),
        ({"tolerance": 1.5}, "got 1.5"),
        ({"max_steps": -1}, "max_steps must be at least 0, got -1"),
        ({"differentiable_steps": 0}, "differentiable_steps must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NewtonMode(**settings)


def test_tolerance_is_that_of_the_last_point() -> None:
    problem = regression(20)
    loose = solve(problem, tolerance=1e-3)
    tight = solve(problem)
    assert tight.decrement.max() <= 1e-9 < 1e-7 < loose.decrement.max() <= 1e-3
    assert loose.num_steps < tight.num_steps
    assert (loose.mode - tight.mode).abs().max() < 1e-5


def test_repair_is_prepared_and_used() -> None:
    assert NewtonMode().prepare(torch.zeros(5, 2)) == NewtonMode()
    boosted = NewtonMode(repair=Boost()).prepare(torch.zeros(5, 1))
    assert sum(parameter.numel() for parameter in boosted.repair.parameters()) == 1
    problem = cauchy(5)
    indefinite = problem.start - 1.5 * problem.start.sign() * torch.tensor([[1.0], [0.0], [1.0], [0.0], [0.0]])
    num_indefinite = int((problem.precision(problem.theta, indefinite) < 0).sum())
    assert 0 < num_indefinite < 5
    boosted.find(problem, problem.theta, indefinite)
    calls = []

    class Spy(SoftAbs):
        def __call__(self, matrix: Tensor, scale: Tensor | None = None) -> object:
            calls.append(len(matrix))
            return super().__call__(matrix, scale)

    NewtonMode(repair=Spy()).find(problem, problem.theta, indefinite)
    assert calls[0] == num_indefinite


def test_no_units_and_one_unit() -> None:
    empty = UnitProblem(lambda theta, y: -(y[:, 0] ** 2), torch.zeros(1), torch.zeros(0, 1))
    assert NewtonMode().find(empty, empty.theta, empty.start).shape == (0, 1)
    assert NewtonMode().find(normal(1), torch.zeros(2), torch.zeros(1, 1)).shape == (1, 1)


# ----------------------------------------------------------------------------------------------------------- free mode


def test_free_mode_is_a_parameter() -> None:
    start = standard_normal(6, 2, seed=0)
    mode = FreeMode().prepare(start)
    assert torch.equal(mode.loc, start)
    problem = regression(3).replace(units=torch.tensor([4, 0, 2]))
    theta = problem.theta.clone().requires_grad_()
    found = mode.find(problem, theta, torch.zeros(3, 2))
    assert torch.equal(found, start[[4, 0, 2]])
    (found**2).sum().backward()
    assert theta.grad is None
    expected = torch.zeros(6, 2).index_copy(0, problem.units, 2 * start[problem.units])
    torch.testing.assert_close(mode.loc.grad, expected)
    start += 1
    assert not torch.equal(mode.loc, start)


def test_free_mode_is_kept_in_the_state() -> None:
    mode = FreeMode().prepare(standard_normal(6, 2, seed=0))
    other = FreeMode().prepare(torch.zeros(6, 2))
    other.load_state_dict(mode.state_dict())
    assert torch.equal(other.loc, mode.loc)
    assert torch.equal(copy.deepcopy(mode).loc, mode.loc)
    file = io.BytesIO()
    torch.save(mode, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).loc, mode.loc)


def test_free_mode_refuses_units_it_does_not_have() -> None:
    problem = regression(3)
    with pytest.raises(ValueError, match="FreeMode has no parameter yet"):
        FreeMode().find(problem, problem.theta, problem.start)
    with pytest.raises(ValueError, match=r"FreeMode holds 2 units, and unit 2 is asked for(.|\n)*NewtonMode\(\)"):
        FreeMode().prepare(torch.zeros(2, 2)).find(problem, problem.theta, problem.start)


# --------------------------------------------------------------------------------------------------------- closed form


@pytest.mark.parametrize("make", CLOSED_FORMS.values(), ids=CLOSED_FORMS)
def test_closed_form_is_what_the_function_says(make: Callable[..., UnitProblem]) -> None:
    problem = make(20)
    theta = problem.theta.clone().requires_grad_()
    found = closed_form(problem).prepare(problem.start).find(problem, theta, problem.start)
    assert torch.equal(found, problem.mode(theta))
    assert found.requires_grad
    with torch.no_grad():
        assert not closed_form(problem).find(problem, theta, problem.start).requires_grad


def test_closed_form_has_constrained_sites_and_arguments() -> None:
    """The gamma problem in terms of x = exp(y): its mode there has the log-Jacobian in it."""
    base = gamma(5)
    counts = torch.exp(base.mode(torch.zeros(2)))[:, 0] * 2 - 1

    class Positive(UnitProblem):
        def constrain_global(self, theta: Tensor) -> dict[str, Tensor]:
            return {"shape": theta[0].exp(), "rate": theta[1].exp()}

        def unconstrain_local(self, values: dict[str, Tensor], theta: Tensor) -> Tensor:
            return values["x"].log().unsqueeze(-1)

    problem = Positive(base.density, base.theta, base.start, args=(counts,), kwargs={"exposure": 1.0})
    mode = ClosedFormMode(lambda sites, z, exposure: {"x": (sites["shape"] + z) / (sites["rate"] + exposure)})
    torch.testing.assert_close(mode.find(problem, base.theta, base.start), base.mode(base.theta))
    # Planted: the mode of x itself, without the log-Jacobian.
    naive = ClosedFormMode(lambda sites, z, exposure: {"x": (sites["shape"] + z - 0.9) / (sites["rate"] + exposure)})
    with pytest.warns(ModeWarning, match="log-Jacobian included"):
        naive.find(problem, base.theta, base.start)


def test_closed_form_that_is_no_mode_warns_once() -> None:
    problem = beta(30)
    off = 0.3 * (torch.arange(30) % 10 == 4).unsqueeze(-1)
    mode = ClosedFormMode(lambda sites: {"y": problem.mode(sites["theta"]) + off}).prepare(problem.start)
    with pytest.warns(ModeWarning) as caught:
        mode.find(problem, problem.theta, problem.start)
    lines = str(caught[0].message).splitlines()
    assert lines[0] == "the closed form is not the mode of 3 of 30 units:"
    assert [line.split()[1] for line in lines[1:4]] == ["4", "14", "24"]
    assert "standard deviations long" in lines[1]
    assert lines[-1] == "    NewtonMode()"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mode.find(problem, problem.theta, problem.start)
        # A hundredth of a standard deviation is no reason.
        ClosedFormMode(lambda sites: {"y": problem.mode(sites["theta"]) + 0.01}).find(
            problem, problem.theta, problem.start
        )
    with pytest.warns(ModeWarning):
        mode.prepare(problem.start).find(problem, problem.theta, problem.start)


def test_closed_form_that_ignores_the_globals_is_told_so() -> None:
    problem = normal(3)
    for values in (lambda sites: torch.zeros(3, 1), lambda sites: sites["theta"].detach()[:1].expand(3, 1) + 9.0):
        with pytest.warns(ModeWarning, match="does not depend on the globals at all"):
            ClosedFormMode(lambda sites, values=values: {"y": values(sites)}).find(
                problem, problem.theta, problem.start
            )
    with pytest.warns(ModeWarning) as caught:
        ClosedFormMode(lambda sites: {"y": problem.mode(sites["theta"]) + 9.0}).find(
            problem, problem.theta, problem.start
        )
    assert "does not depend" not in str(caught[0].message)


def test_globals_that_overflow_are_a_mode_that_is_not_found() -> None:
    problem = normal(3)
    mode = ClosedFormMode(lambda sites: {"y": torch.zeros(3, 1)})
    with pytest.raises(ModeNotFoundError, match="global site 'theta' overflows: it is"):
        mode.find(problem, problem.theta + math.inf, problem.start)


@pytest.mark.parametrize(
    ("density", "reason"), [(lambda y: y**2, "curves upwards"), (lambda y: y * math.nan, "inf standard deviations")]
)
def test_closed_form_at_a_minimum_or_without_a_gradient(density: Callable[[Tensor], Tensor], reason: str) -> None:
    problem = UnitProblem(lambda theta, y: density(y[:, 0]), torch.zeros(1), torch.zeros(2, 1))
    with pytest.warns(ModeWarning, match=reason):
        ClosedFormMode(lambda sites: {"y": torch.zeros(2, 1)}).find(problem, problem.theta, problem.start)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (torch.zeros(3, 1), TypeError, "returned Tensor, not a dict of the local sites by name"),
        ({"y": [0.0, 0.0, 0.0]}, TypeError, "returned list for site 'y', not a tensor"),
        ({"y": torch.zeros(2, 1)}, ValueError, r"units of shape \(2, 1\), expected \(3, 1\)(.|\n)*expand"),
        ({"y": torch.zeros(1)}, ValueError, r"units of shape \(1,\), expected \(3, 1\)"),
    ],
)
def test_closed_forms_that_are_refused(values: object, error: type[Exception], message: str) -> None:
    problem = normal(3)
    with pytest.raises(error, match=message):
        ClosedFormMode(lambda sites: values).find(problem, problem.theta, problem.start)


def test_closed_form_that_is_not_finite_names_its_units() -> None:
    problem = normal(3).replace(units=torch.tensor([5, 8, 9]))
    with pytest.raises(ModeNotFoundError, match="not finite for 2 of 3 units") as caught:
        ClosedFormMode(lambda sites: {"y": torch.tensor([[math.nan], [0.0], [math.inf]])}).find(
            problem, problem.theta, problem.start
        )
    assert caught.value.units == [5, 9]
    assert caught.value.status == [ModeStatus.NOT_FINITE] * 2
    assert "unit 9 of plate 'units' ('y'): 'y' is inf" in str(caught.value)


def test_closed_form_that_is_not_finite_in_unconstrained_space_names_its_units() -> None:
    class Positive(UnitProblem):
        def unconstrain_local(self, values: dict[str, Tensor], theta: Tensor) -> Tensor:
            return values["y"].log()

    base = normal(3)
    problem = Positive(base.density, base.theta, base.start)
    with pytest.raises(ModeNotFoundError, match="not finite for 1 of 3 units") as caught:
        ClosedFormMode(lambda sites: {"y": torch.tensor([[1.0], [0.0], [1.0]])}).find(problem, base.theta, base.start)
    assert "unit 1 of plate 'units' ('y'): [-inf] in unconstrained space" in str(caught.value)
