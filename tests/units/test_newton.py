"""The Newton search: that it finds modes from anywhere, in few evaluations, in float32 too."""

import math
from collections.abc import Callable

import pytest
import torch
from helpers.mode_problems import (
    ONE_MODE,
    PROBLEMS,
    ModeSolution,
    UnitProblem,
    assert_modes,
    cauchy,
    conditional_sd,
    gamma,
    location_scale,
    mixture,
    poisson,
    solve,
    solve_for,
    student,
    uniform,
)
from helpers.strategies import seeds, standard_normal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from laplace_amort.units import newton
from laplace_amort.units.newton import ModeStatus, NewtonSearch


@pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS)
def test_every_problem_from_its_start(make: Callable[..., UnitProblem]) -> None:
    problem = make(30)
    assert_modes(problem, solve(problem))


def test_assert_modes_can_fail() -> None:
    """Planted: a point beside the mode, a minimum between two modes, a unit that is not said to have converged."""
    problem = student(30, spread=8.0)
    solution = solve(problem)
    with pytest.raises(AssertionError):
        assert_modes(problem, solution._replace(mode=solution.mode + 1e-6))
    with pytest.raises(AssertionError):
        assert_modes(problem, solution._replace(status=solution.status.index_fill(0, torch.tensor([3]), 1)))
    valley = UnitProblem(lambda theta, y: y[:, 0] ** 2, torch.zeros(1), torch.zeros(2, 1))
    with pytest.raises(AssertionError):
        assert_modes(valley, ModeSolution(valley.start, torch.zeros(2), torch.zeros(2), 1))


@given(st.sampled_from(sorted(ONE_MODE)), seeds, st.sampled_from([0.1, 1.0, 5.0, 20.0, 50.0]))
def test_one_mode_is_found_from_random_starts(name: str, seed: int, scale: float) -> None:
    problem = ONE_MODE[name](5, seed=seed)
    mode = solve(problem).mode
    sd = conditional_sd(problem, mode)
    solution = solve(problem, mode + scale * sd * standard_normal(*mode.shape, seed=seed))
    assert_modes(problem, solution)
    assert ((solution.mode - mode).abs() < 1e-8 * sd).all()


@given(st.sampled_from(sorted(PROBLEMS)), seeds, st.sampled_from([0.1, 1.0, 3.0, 10.0]))
def test_some_mode_is_found_from_random_starts(name: str, seed: int, scale: float) -> None:
    problem = PROBLEMS[name](5, seed=seed)
    start = problem.start + scale * standard_normal(*problem.start.shape, seed=seed)
    assert_modes(problem, solve(problem, start), 1e-7)


@pytest.mark.parametrize("sds", [-50, 50])
@pytest.mark.parametrize("count", [0, 1, 1e6])
def test_poisson_from_fifty_standard_deviations(count: float, sds: float) -> None:
    problem = poisson(counts=torch.tensor([count]))
    mode = solve(problem).mode
    solution = solve(problem, mode + sds * conditional_sd(problem, mode))
    assert_modes(problem, solution)
    assert solution.num_steps <= 20


@pytest.mark.parametrize("start", [-50.0, 50.0])
def test_poisson_from_where_the_rate_is_absurd(start: float) -> None:
    problem = poisson(counts=torch.tensor([0.0, 1.0, 40.0, 1e6]))
    solution = solve(problem, torch.full((4, 1), start))
    assert_modes(problem, solution)
    assert solution.num_steps <= 25


class Trials:
    """A log joint that keeps the points it is evaluated at, and whether the gradient there is finite."""

    def __init__(self, problem: UnitProblem) -> None:
        self.problem = problem
        self.points: list[Tensor] = []

    def __call__(self, theta: Tensor, y: Tensor) -> Tensor:
        self.points.append(y.detach().clone())
        return self.problem.log_joint(theta, y)

    def finite(self) -> list[bool]:
        gradient = torch.func.grad(lambda v: self.problem.density(self.problem.theta, v).sum())
        return [bool(gradient(point).isfinite().all()) for point in self.points]


def test_trials_that_overflow_are_refused() -> None:
    """Far left of the mode the curvature is that of the prior, and Newton's step ends where exp is infinite."""
    trials = Trials(poisson(counts=torch.tensor([1e6])))
    solution = solve_for(trials, trials.problem.theta, torch.full((1, 1), -50.0))
    assert_modes(trials.problem, solution)
    assert not all(trials.finite())


def test_many_orders_of_magnitude_too_far() -> None:
    """Far left, log-gamma densities are linear: Newton's step is exp(80) long."""
    problem = gamma(5)
    assert_modes(problem, solve(problem, torch.full((5, 1), -80.0)))


@given(seeds, st.sampled_from([student, cauchy]))
def test_starts_in_a_heavy_tail(seed: int, make: Callable[..., UnitProblem]) -> None:
    """There the tail is indefinite, and near the inflection points next to nothing."""
    problem = make(40, seed=seed)
    start = 30 * standard_normal(40, 1, seed=seed + 1)
    if make is cauchy:
        assert (problem.precision(problem.theta, start) < 0).any()
    assert_modes(problem, solve(problem, start), 1e-7)


def undamped(search: NewtonSearch, state: object, new: object) -> object:
    """Planted: every trial is taken, and Newton's own step is always the next."""
    free = state._replace(at=new, multiplier=torch.ones_like(state.multiplier))
    return search._settle(free, torch.zeros_like(state.kicked))


def test_undamped_steps_fail_where_damped_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NewtonSearch, "_proceed", undamped)
    for problem, start in [(poisson(), torch.full((6, 1), -50.0)), (cauchy(40), 30 * standard_normal(40, 1, seed=1))]:
        assert solve(problem, start).status.any()


def test_units_that_keep_turning_are_held_to_shorter_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without that, some of these go to and fro between their modes for ever."""
    problem, start = mixture(2000), 5 * standard_normal(2000, 1, seed=3)
    assert_modes(problem, solve(problem, start), 1e-7)

    def forgetful(search: NewtonSearch, state: object, new: object) -> object:
        return original(search, state._replace(turns=0 * state.turns), new)._replace(turns=0 * state.turns)

    original = patched(monkeypatch, forgetful)
    assert (solve(problem, start).status == ModeStatus.MAX_STEPS).any()


def test_steps_past_an_inflection_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a unit may end up in the far tail, where the gradient is small, and is long on its way back."""
    problem, start = cauchy(2000, seed=2), 5 * standard_normal(2000, 1, seed=3)
    solution = solve(problem, start)
    assert_modes(problem, solution, 1e-7)
    assert solution.num_steps <= 25

    def blind(search: NewtonSearch, state: object, new: object) -> object:
        return original(search, state, new._replace(tail=new.tail.abs()))

    original = patched(monkeypatch, blind)
    assert solve(problem, start).num_steps > 50


def patched(monkeypatch: pytest.MonkeyPatch, planted: Callable[..., object]) -> Callable[..., object]:
    original = NewtonSearch._proceed
    monkeypatch.setattr(NewtonSearch, "_proceed", planted)
    return original


# --------------------------------------------------------------------------------------------- evaluations, precision


@pytest.mark.parametrize("make", ONE_MODE.values(), ids=ONE_MODE)
def test_warm_starts_take_few_evaluations(make: Callable[..., UnitProblem]) -> None:
    problem = make(100)
    mode = solve(problem).mode
    assert solve(problem, mode).num_steps == 1
    assert solve(problem.replace(theta=problem.theta + 1e-3), mode).num_steps <= 3
    assert solve(problem.replace(theta=problem.theta + 0.03), mode).num_steps <= 4


def test_weights_of_a_minibatch_change_nothing() -> None:
    problem = location_scale(20)
    weighted = solve(problem.replace(weight=500.0))
    assert_modes(problem, weighted)
    torch.testing.assert_close(weighted.mode, solve(problem).mode, atol=1e-9, rtol=0)


def in_float32(counts: Tensor) -> tuple[ModeSolution, Tensor]:
    """Modes of a Poisson problem in float32, and their error in conditional standard deviations."""
    problem = poisson(counts=counts)
    exact = solve(problem).mode
    torch.set_default_dtype(torch.float32)
    single = poisson(counts=counts.float()).replace(theta=problem.theta.float(), start=problem.start.float())
    solution = solve(single)
    assert solution.mode.dtype == torch.float32
    return solution, (solution.mode - exact) / conditional_sd(problem, exact)


@pytest.mark.parametrize(("size", "error"), [(1.0, 1e-4), (5e3, 1e-4), (1e6, 1e-3), (1e9, 0.1)])
def test_rounding_errors_count_as_convergence(size: float, error: float) -> None:
    """Of 1e5 units in float32 some always have a gradient above the tolerance; at 1e9 all do."""
    solution, errors = in_float32((size * (0.5 + uniform(100_000, seed=0))).floor())
    assert not solution.status.any()
    assert solution.num_steps <= 25
    assert errors.abs().max() < error


def test_rounding_errors_would_go_on_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a search that waits for the tolerance and nothing else."""
    monkeypatch.setattr(newton, "_COORDINATE", 0)
    monkeypatch.setattr(NewtonSearch, "_near", lambda search, dtype: 0.0)
    solution, _ = in_float32((1e6 * (0.5 + uniform(2000, seed=0))).floor())
    assert solution.status.any()


def test_tolerance_beyond_rounding_errors_is_no_trap() -> None:
    counts = (1e6 * (0.5 + uniform(1000, seed=0))).floor()
    problem = poisson(counts=counts)
    solution = solve(problem, tolerance=1e-16)
    assert not solution.status.any()
    assert solution.num_steps <= 25


def test_skewed_units_do_not_count_as_limited_by_rounding() -> None:
    """With a shape of 1e-5 log-gamma is so skewed that Newton's steps fail where they are short already."""
    rate = torch.full((50,), 1e-5)
    torch.set_default_dtype(torch.float32)
    problem = UnitProblem(
        lambda theta, y: rate.to(y) * y[:, 0] - y[:, 0].exp(), torch.zeros(1), standard_normal(50, 1, seed=0).float()
    )
    solution = solve(problem)
    assert not solution.status.any()
    assert (solution.mode - math.log(1e-5)).abs().max() < 0.1  # of a standard deviation of 316
