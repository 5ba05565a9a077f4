"""What tests of integrals over units share: models of the table taken apart, and problems whose modes are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from helpers.models import normals
from helpers.separable import KnownMode
from helpers.unit_models import UNIT_MODELS
from laplace_amort.autodiff.batching import SeparableDensity
from laplace_amort.model.calls import UnitModels
from laplace_amort.model.terms import unit_terms
from laplace_amort.units.integrals import Integrals, Reduction, UnitIntegrals
from laplace_amort.units.quadrature import QuadraturePoints, QuadratureRule

REDUCTIONS: dict[str, Reduction] = {
    "log_integral": QuadraturePoints.log_integral,
    "mean_gain": QuadraturePoints.mean_gain,
}


class Problem:
    """A model of the table, its terms, several globals, and a start of the units at zero.

    In float32 it has the same data and globals; that is then the default.
    """

    def __init__(
        self, name: str, num_globals: int = 1, how: str = "recorded", dtype: torch.dtype = torch.float64
    ) -> None:
        case = UNIT_MODELS[name]()
        self.globals_ = (0.3 * normals(num_globals, case.global_dim)).to(dtype)
        self.start = torch.zeros(num_globals, case.num_units, case.local_dim, dtype=dtype)
        torch.set_default_dtype(dtype)
        self.args = tuple(_to(arg, dtype) for arg in case.args)
        model = UnitModels(case.model, case.unit_plate)(self.args, case.kwargs, {})[0]
        self.model = model
        if how == "recorded":
            model = model.recorded(self.globals_[0], self.start[0])
        self.density = unit_terms(model, self.globals_[0], self.start[0])
        self.integrals = UnitIntegrals(self.density)

    def points(self, rule: QuadratureRule) -> QuadraturePoints:
        return rule.points(self.start.shape[-1], self.start)

    def values(self, rule: QuadratureRule, reduction: str = "log_integral") -> Integrals:
        return self.integrals.values(self.points(rule), REDUCTIONS[reduction], self.globals_, self.start)

    def gradients(self, rule: QuadratureRule, reduction: str = "log_integral") -> Integrals:
        return self.integrals.values_and_gradients(self.points(rule), REDUCTIONS[reduction], self.globals_, self.start)

    def shared(self) -> Tensor:
        """At the first globals."""
        return self.density.shared(self.globals_[0], self.start[0])


def _to(arg: Any, dtype: torch.dtype) -> Any:
    return arg.to(dtype) if isinstance(arg, Tensor) and arg.is_floating_point() else arg


def terms_of(problem: KnownMode) -> SeparableDensity:
    """The terms of a problem whose modes are known, unit by unit."""
    alone = [problem.unit(i) for i in range(problem.num_units)]

    def shared(theta: Tensor, y: Tensor) -> Tensor:
        return -(theta**2).sum() / 2

    def units(theta: Tensor, y: Tensor) -> Tensor:
        terms = [unit.log_joint(theta, y[i : i + 1]) - shared(theta, y) for i, unit in enumerate(alone)]
        return torch.stack(terms)

    return SeparableDensity(shared, units)


def straight(problem: KnownMode, points: QuadraturePoints, reduction: str) -> Callable[[Tensor], Tensor]:
    """The sum that integrals are made of, as a function of the globals that torch.func differentiates straight through.

    The mode is the closed form, the Hessians are dense, and the factor is that of textbooks.
    """
    density, n, k = terms_of(problem), problem.num_units, problem.local_dim

    def value(theta: Tensor) -> Tensor:
        mode = problem.mode(theta)
        full = torch.func.hessian(lambda y: density.units(theta, y).sum())(mode)
        tails = torch.stack([-full[i, :, i] for i in range(n)])
        root = torch.linalg.cholesky(torch.linalg.inv(tails))
        nodes = mode + torch.einsum("nij,qj->qni", root, points.points)
        values = torch.stack([density.units(theta, node) for node in nodes]) - points.log_density[:, None]
        probs = points.log_probs.exp()[:, None]
        each = (probs * values.exp()).sum(0).log() if reduction == "log_integral" else (probs * values).sum(0)
        return each.sum() + sum(root[:, j, j].log().sum() for j in range(k)) + density.shared(theta, mode)

    return value
