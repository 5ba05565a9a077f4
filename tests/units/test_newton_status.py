"""The Newton search: what it says of each unit, and that one odd unit does not spoil the others."""

import math
from collections.abc import Callable

import pytest
import torch
from helpers.mode_problems import ModeSolution, UnitProblem, assert_modes, cauchy, poisson, regression, solve
from helpers.strategies import standard_normal
from torch import Tensor

from laplace_amort.linalg.softabs import SoftAbs
from laplace_amort.units.newton import ModeStatus
from laplace_amort.units.newton_step import newton_point


def beside(problem: UnitProblem, odd: Callable[[Tensor, Tensor], Tensor], start: float) -> UnitProblem:
    """The problem with one more unit in front, of another density."""

    def density(theta: Tensor, y: Tensor) -> Tensor:
        return torch.cat([odd(theta, y[:1]).reshape(1), problem.density(theta, y[1:])])

    first = problem.start.new_full((1, problem.start.shape[-1]), start)
    return problem.replace(density=density, start=torch.cat([first, problem.start]), units=None)


ODD_UNITS = {
    "is NaN": (lambda theta, y: y * math.nan, 0.0, ModeStatus.NOT_FINITE),
    "is infinite": (lambda theta, y: -(y + 900).exp(), 800.0, ModeStatus.NOT_FINITE),
    "runs away": (lambda theta, y: (1 + y**2).sqrt() + y, 3.0, ModeStatus.STALLED),
    "has a kink": (lambda theta, y: -((y - 0.3).abs()) - (y - 1) ** 2 / 10, 0.0, ModeStatus.STALLED),
    "is flat": (lambda theta, y: 0 * y, 0.0, ModeStatus.NOT_MAXIMUM),
    "ends in a flat": (lambda theta, y: -((y - 1).clamp(max=0) ** 4), -3.0, ModeStatus.NOT_MAXIMUM),
}


@pytest.mark.parametrize("name", ODD_UNITS)
def test_one_odd_unit_does_not_spoil_the_others(name: str) -> None:
    odd, start, status = ODD_UNITS[name]
    problem = poisson()
    alone, solution = solve(problem), solve(beside(problem, odd, start))
    assert solution.status.tolist() == [status] + [ModeStatus.CONVERGED] * 6
    # A vector of numbers ends elsewhere with one unit more, and exp may round the last ones otherwise; decrements of
    # units that have converged, 4e-10 at most, are differences of numbers of that size.
    torch.testing.assert_close(solution.mode[1:], alone.mode, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(solution.decrement[1:], alone.decrement, rtol=1e-4, atol=1e-12)


def test_units_that_need_repair_are_not_spoilt_either() -> None:
    """The scale of a repair is that of typical units, so one that overflows nearly does not matter."""
    problem, start = cauchy(20), 10 * standard_normal(20, 1, seed=1)
    crowded = beside(problem, lambda theta, y: -y.exp(), 300.0)
    solution = solve(crowded, torch.cat([torch.full((1, 1), 300.0), start]))
    assert_modes(problem, ModeSolution(solution.mode[1:], solution.status[1:], solution.decrement[1:], 0), 1e-7)


def test_starts_that_overflow_are_replaced() -> None:
    problem = poisson(20)
    start = problem.start.index_fill(0, torch.tensor([3, 8]), 800.0)
    assert solve(problem, problem.start + 800).status.tolist() == [ModeStatus.NOT_FINITE] * 20
    solution = solve(problem, start)
    assert_modes(problem, solution)
    torch.testing.assert_close(solution.mode, solve(problem).mode)


def test_unit_without_data() -> None:
    """Its prior alone counts, and of two coordinates one may be without data."""
    problem = regression(4)

    def density(theta: Tensor, y: Tensor) -> Tensor:
        prior = -((y - theta[:2]) ** 2).sum(-1) / 2
        return torch.cat([prior[:1], (prior + 3 * y[:, 0] - y[:, 0].exp())[1:]])

    mode = solve(problem.replace(density=density), 20 * standard_normal(4, 2, seed=3)).mode
    torch.testing.assert_close(mode[0], problem.theta[:2], atol=1e-12, rtol=0)
    torch.testing.assert_close(mode[:, 1], problem.theta[1].expand(4), atol=1e-12, rtol=0)


def test_start_at_a_minimum_or_a_saddle_is_left() -> None:
    """z ~ N(y**2, 1) with y ~ N(0, 1), begun at 0, where the gradient is exactly zero: modes at +-sqrt(z - 1/2)."""
    z = torch.tensor([3.0, 0.75, 0.2])
    problem = UnitProblem(
        lambda theta, y: -((z - y[:, 0] ** 2) ** 2) / 2 - (y**2).sum(-1) / 2, torch.zeros(1), torch.zeros(3, 2)
    )
    solution = solve(problem)
    assert_modes(problem, solution)
    expected = torch.tensor([2.5, 0.25, 0.0]).sqrt()
    torch.testing.assert_close(solution.mode, torch.stack([expected, torch.zeros(3)], dim=-1))


def test_every_status_has_its_sentence() -> None:
    assert [int(status) for status in ModeStatus] == [0, 1, 2, 3, 4]
    assert len({str(status) for status in ModeStatus}) == 5
    seen = {status for _, _, status in ODD_UNITS.values()} | {ModeStatus.CONVERGED, ModeStatus.MAX_STEPS}
    assert seen == set(ModeStatus)


@pytest.mark.parametrize("max_steps", [0, 1, 3])
def test_search_ends_at_max_steps(max_steps: int) -> None:
    problem = poisson(counts=torch.tensor([1e6, 1.0]))
    solution = solve(problem, torch.tensor([[0.0], [0.2]]), max_steps=max_steps)
    assert solution.num_steps == max_steps + 1
    assert solution.status[0] == ModeStatus.MAX_STEPS
    assert solution.decrement[0] > 1


def test_modes_at_a_kink_are_told_apart() -> None:
    """With a Laplace prior many modes lie at its kink."""
    z = 2 * standard_normal(200, seed=0)
    problem = UnitProblem(
        lambda theta, y: -((z - y[:, 0]) ** 2) / 2 - (y[:, 0] - 0.3).abs(), torch.zeros(1), z.unsqueeze(-1)
    )
    solution = solve(problem)
    at_kink = (z - 0.3).abs() < 1
    assert torch.equal(solution.status == ModeStatus.STALLED, at_kink)
    assert torch.equal(solution.status == ModeStatus.CONVERGED, ~at_kink)


def test_newton_point_repairs_what_needs_it_and_nothing_else() -> None:
    tail = torch.tensor([[[4.0, 1.0], [1.0, 2.0]], [[-1.0, 0.0], [0.0, 3.0]], [[1.0, 1.0], [1.0, 1.0]]])
    gradient = torch.tensor([[1.0, 2.0], [1.0, 0.0], [1.0, -1.0]])
    point = newton_point(torch.zeros(3, 2), gradient, tail, SoftAbs())
    assert point.concave.tolist() == [True, False, False]
    torch.testing.assert_close(point.factor[0] @ point.factor[0].mT, tail[0])
    torch.testing.assert_close(point.step[:2], torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    torch.testing.assert_close(point.decrement[:2], torch.tensor([2.0, 1.0]).sqrt())
    assert point.decrement[2] < 100  # a pivot of zero, or of a rounding error, is not divided by
