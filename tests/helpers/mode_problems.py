"""Log joints of globals and units in plain torch, with closed-form modes where there are any, for the search of modes.

Each is what a mode strategy knows of a Pyro model: ``log_joint``, ``units``, ``describe`` and the constrained values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from helpers.strategies import standard_normal
from laplace_amort.units.modes import NewtonMode
from laplace_amort.units.newton import ModeStatus


@dataclass(frozen=True)
class UnitProblem:
    """Units that are independent given theta.

    ``density(theta, y)`` has the terms ``(N,)`` of the units at ``y (N, k)``; ``mode(theta)`` is the closed form.
    """

    density: Callable[[Tensor, Tensor], Tensor]
    theta: Tensor
    start: Tensor
    mode: Callable[[Tensor], Tensor] | None = None
    weight: float = 1.0
    units: Tensor = field(default=None)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.units is None:
            object.__setattr__(self, "units", torch.arange(len(self.start)))

    def log_joint(self, theta: Tensor, y: Tensor) -> Tensor:
        return self.weight * self.density(theta, y).sum() - theta @ theta / 2

    def describe(self, unit: int) -> str:
        return f"unit {int(self.units[unit])} of plate 'units' ('y')"

    def constrain_global(self, theta: Tensor) -> dict[str, Tensor]:
        return {"theta": theta}

    def unconstrain_local(self, values: Mapping[str, Tensor], theta: Tensor) -> Tensor:
        return values["y"]

    def unit_axis(self, name: str) -> int:
        return 0

    def precision(self, theta: Tensor, y: Tensor) -> Tensor:
        """Negative Hessian blocks ``(N, k, k)``, by torch.func, forward over reverse."""
        gradient = torch.func.grad(lambda v: self.density(theta.detach(), v).sum())
        basis = torch.eye(y.shape[-1], dtype=y.dtype)
        rows = [torch.func.jvp(gradient, (y.detach(),), (row.expand_as(y),))[1] for row in basis]
        return -torch.stack(rows, dim=-2)

    def replace(self, **changes: Any) -> UnitProblem:
        return dataclasses.replace(self, **changes)


def uniform(*shape: int, seed: int) -> Tensor:
    return torch.special.ndtr(standard_normal(*shape, seed=seed))


def normal(num_units: int = 6, seed: int = 0) -> UnitProblem:
    """y ~ N(mu, tau), z ~ N(y, s)."""
    z, s = 3 * standard_normal(num_units, seed=seed), 0.2 + uniform(num_units, seed=seed + 1)

    def density(theta: Tensor, y: Tensor) -> Tensor:
        prior = -((y[:, 0] - theta[0]) ** 2) * torch.exp(-2 * theta[1]) / 2 - theta[1]
        return prior - ((z - y[:, 0]) / s) ** 2 / 2

    def mode(theta: Tensor) -> Tensor:
        precision = torch.exp(-2 * theta[1])
        return ((precision * theta[0] + z / s**2) / (precision + s**-2)).unsqueeze(-1)

    return UnitProblem(density, torch.tensor([0.5, -0.3]), torch.zeros(num_units, 1), mode)


def gamma(num_units: int = 6, seed: int = 0) -> UnitProblem:
    """x = exp(y) ~ Gamma(exp(theta0), exp(theta1)), counts ~ Poisson(x); with the log-Jacobian of y."""
    counts = (20 * uniform(num_units, seed=seed)).floor()

    def density(theta: Tensor, y: Tensor) -> Tensor:
        shape, rate = theta.exp()
        normalizer = shape * theta[1] - torch.lgamma(shape)
        return normalizer + (shape + counts) * y[:, 0] - (rate + 1) * y[:, 0].exp()

    def mode(theta: Tensor) -> Tensor:
        shape, rate = theta.exp()
        return ((shape + counts) / (rate + 1)).log().unsqueeze(-1)

    return UnitProblem(density, torch.tensor([0.2, -0.5]), torch.zeros(num_units, 1), mode)


def beta(num_units: int = 6, seed: int = 0) -> UnitProblem:
    """Successes out of 8, logit-probability y, prior Beta(exp(theta0), exp(theta1)); with the log-Jacobian."""
    successes = (9 * uniform(num_units, seed=seed)).floor()

    def density(theta: Tensor, y: Tensor) -> Tensor:
        a, b = theta.exp()
        normalizer = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
        return normalizer - (a + successes) * softplus(-y[:, 0]) - (b + 8 - successes) * softplus(y[:, 0])

    def mode(theta: Tensor) -> Tensor:
        a, b = theta.exp()
        return ((a + successes).log() - (b + 8 - successes).log()).unsqueeze(-1)

    return UnitProblem(density, torch.tensor([0.3, 0.1]), torch.zeros(num_units, 1), mode)


def linear(num_units: int = 4, seed: int = 0) -> UnitProblem:
    """k = 3: correlated normal prior, whose correlations depend on theta, and observations of other combinations."""
    design, z = standard_normal(num_units, 2, 3, seed=seed), standard_normal(num_units, 2, seed=seed + 1)

    def prior(theta: Tensor) -> Tensor:
        root = torch.stack(
            [torch.cat([torch.cos(theta), theta[:1]]), torch.ones(3), torch.cat([theta, theta[:1] ** 2])]
        )
        return root @ root.mT + torch.eye(3)

    def density(theta: Tensor, y: Tensor) -> Tensor:
        away = y - theta[0]
        fit = z - (design @ y.unsqueeze(-1)).squeeze(-1)
        return -((away @ prior(theta)) * away).sum(-1) / 2 - (fit**2).sum(-1) * theta[1].exp() / 2

    def mode(theta: Tensor) -> Tensor:
        precision = prior(theta) + theta[1].exp() * design.mT @ design
        shift = prior(theta).sum(-1) * theta[0] + theta[1].exp() * (design.mT @ z.unsqueeze(-1)).squeeze(-1)
        return torch.linalg.solve(precision, shift)

    return UnitProblem(density, torch.tensor([0.4, 0.2]), torch.zeros(num_units, 3), mode)


def poisson(num_units: int = 6, seed: int = 0, counts: Tensor | None = None) -> UnitProblem:
    """Poisson log-normal: log rate y ~ N(mu, tau)."""
    if counts is None:
        counts = torch.cat([torch.tensor([0.0, 1e6]), torch.exp(8 * uniform(num_units - 2, seed=seed)).floor()])

    def density(theta: Tensor, y: Tensor) -> Tensor:
        prior = -((y[:, 0] - theta[0]) ** 2) * torch.exp(-2 * theta[1]) / 2 - theta[1]
        return prior + counts * y[:, 0] - y[:, 0].exp()

    return UnitProblem(density, torch.tensor([0.5, 0.1]), torch.zeros(len(counts), 1))


def bernoulli(num_units: int = 6, seed: int = 0) -> UnitProblem:
    """Successes out of 5, logit-probability y ~ N(mu, tau)."""
    successes = (6 * uniform(num_units, seed=seed)).floor()

    def density(theta: Tensor, y: Tensor) -> Tensor:
        prior = -((y[:, 0] - theta[0]) ** 2) * torch.exp(-2 * theta[1]) / 2 - theta[1]
        return prior + successes * y[:, 0] - 5 * softplus(y[:, 0])

    return UnitProblem(density, torch.tensor([0.5, 0.3]), torch.zeros(num_units, 1))


def student(num_units: int = 6, seed: int = 0, spread: float = 3.0) -> UnitProblem:
    """Student-t prior with 4 degrees of freedom, normal likelihood; with a large spread many units are bimodal."""
    z, s = spread * standard_normal(num_units, seed=seed), 0.5 + 2 * uniform(num_units, seed=seed + 1)

    def density(theta: Tensor, y: Tensor) -> Tensor:
        prior = -2.5 * torch.log1p((y[:, 0] - theta[0]) ** 2 * torch.exp(-2 * theta[1]) / 4) - theta[1]
        return prior - ((z - y[:, 0]) / s) ** 2 / 2

    return UnitProblem(density, torch.tensor([0.3, -0.2]), z.unsqueeze(-1))


def cauchy(num_units: int = 6, seed: int = 0) -> UnitProblem:
    """Cauchy prior and Cauchy likelihood: bimodal, and flat between the modes."""
    z = 8 * standard_normal(num_units, seed=seed)

    def density(theta: Tensor, y: Tensor) -> Tensor:
        return -torch.log1p((y[:, 0] - theta[0]) ** 2) - torch.log1p((z - y[:, 0]) ** 2 * theta[1].exp())

    return UnitProblem(density, torch.tensor([0.3, 0.4]), z.unsqueeze(-1))


def mixture(num_units: int = 6, seed: int = 0) -> UnitProblem:
    """Mixtures of three normal densities, some of them very narrow: many modes, and valleys between them."""
    a, b = 5 * standard_normal(num_units, seed=seed), 6 * uniform(num_units, seed=seed + 1)
    means = torch.stack([a, -a, b], dim=-1)
    sds = 0.02 + uniform(num_units, 3, seed=seed + 2) * torch.tensor([5.0, 1.3, 3.0])

    def density(theta: Tensor, y: Tensor) -> Tensor:
        parts = -(((y - means - theta[0]) / sds) ** 2) / 2 - sds.log()
        return torch.logsumexp(parts, dim=-1) - (y[:, 0] - theta[1]) ** 2 / 1000

    return UnitProblem(density, torch.tensor([0.2, -0.4]), torch.zeros(num_units, 1))


def regression(num_units: int = 4, seed: int = 0) -> UnitProblem:
    """k = 2: a Poisson regression in each unit, intercept and slope coupled by a design that is not centered."""
    x = 2 + standard_normal(num_units, 6, seed=seed)
    counts = (5 * uniform(num_units, 6, seed=seed + 1)).floor()

    def density(theta: Tensor, y: Tensor) -> Tensor:
        log_rate = y[:, :1] + y[:, 1:] * x
        return (counts * log_rate - log_rate.exp()).sum(-1) - ((y - theta[:2]) ** 2).sum(-1) * theta[2].exp() / 2

    return UnitProblem(density, torch.tensor([0.3, -0.2, 0.5]), torch.zeros(num_units, 2))


def location_scale(num_units: int = 4, seed: int = 0) -> UnitProblem:
    """k = 2: mean and log standard deviation of normal data in each unit, not concave far from the mode."""
    z = 3 * standard_normal(num_units, 1, seed=seed) + standard_normal(num_units, 6, seed=seed + 1)

    def density(theta: Tensor, y: Tensor) -> Tensor:
        mean, log_scale = y[:, :1], y[:, 1:]
        data = (-((z - mean) ** 2) * torch.exp(-2 * log_scale) / 2 - log_scale).sum(-1)
        return data - (y[:, 0] - theta[0]) ** 2 / 20 - (y[:, 1] - theta[1]) ** 2 / 2

    return UnitProblem(density, torch.tensor([0.5, 0.2]), torch.zeros(num_units, 2))


def bent(num_units: int = 4, seed: int = 0) -> UnitProblem:
    """k = 3: coordinates that bend and scale each other, and a heavy-tailed prior."""
    z = standard_normal(num_units, 4, 3, seed=seed)

    def density(theta: Tensor, y: Tensor) -> Tensor:
        a, b, c = y.unbind(-1)
        mean = torch.stack([a, b * torch.exp(a / 2), c + a * b], dim=-1).unsqueeze(1)
        prior = -(y[:, :2] ** 2).sum(-1) * theta[1].exp() / 2 - 2 * torch.log1p((c - theta[0]) ** 2)
        return prior - ((z - mean) ** 2).sum((-2, -1)) / 2

    return UnitProblem(density, torch.tensor([0.3, -0.2]), torch.zeros(num_units, 3))


CLOSED_FORMS = {make.__name__: make for make in (normal, gamma, beta, linear)}
ONE_MODE = {make.__name__: make for make in (normal, gamma, beta, linear, poisson, bernoulli, regression)}
SEVERAL_MODES = {make.__name__: make for make in (student, cauchy, mixture, location_scale, bent)}
PROBLEMS = {**ONE_MODE, **SEVERAL_MODES}


# ------------------------------------------------------------------------------------------------------------- modes


class ModeSolution(NamedTuple):
    """Modes ``(N, k)``, what became of the search for each ``(N,)``, the last decrements ``(N,)``, and evaluations."""

    mode: Tensor
    status: Tensor
    decrement: Tensor
    num_steps: int


def solve_for(
    log_joint: Callable[[Tensor, Tensor], Tensor], theta: Tensor, start: Tensor, **settings: object
) -> ModeSolution:
    """Search without a graph, and raise for none that is not found."""
    at, _, status, num_steps = NewtonMode(**settings).search(start.dtype)(log_joint, theta.detach(), start)
    found = (status == ModeStatus.CONVERGED).unsqueeze(-1)
    return ModeSolution(at.local + at.step.where(found, 0 * at.step), status, at.decrement, num_steps)


def solve(problem: UnitProblem, start: Tensor | None = None, **settings: object) -> ModeSolution:
    return solve_for(problem.log_joint, problem.theta, problem.start if start is None else start, **settings)


def assert_modes(problem: UnitProblem, solution: ModeSolution, tolerance: float = 1e-8) -> None:
    """Every unit is at a maximum, by a route that shares nothing with the search: decrements by torch.func."""
    assert [ModeStatus.CONVERGED] * len(problem.start) == solution.status.tolist()
    gradient = torch.func.grad(lambda v: problem.density(problem.theta, v).sum())(solution.mode)
    precision = problem.precision(problem.theta, solution.mode)
    assert (torch.linalg.eigvalsh(precision) > 0).all()
    step = torch.linalg.solve(precision, gradient)
    assert ((gradient * step).sum(-1).sqrt() < tolerance).all()


def conditional_sd(problem: UnitProblem, mode: Tensor) -> Tensor:
    return torch.linalg.inv(problem.precision(problem.theta, mode)).diagonal(dim1=-2, dim2=-1).sqrt()
