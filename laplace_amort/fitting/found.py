"""What a fit has found: where it ended, the Gaussian there, and the posterior."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from laplace_amort.fitting.evaluation import FitStatus
from laplace_amort.fitting.history import Step
from laplace_amort.fitting.objectives.base import Objective
from laplace_amort.fitting.objectives.quadrature import MarginalQuadrature
from laplace_amort.fitting.records import Optimum
from laplace_amort.guide import AutoLaplaceFamily, LaplaceGaussian, Problem
from laplace_amort.linalg import RepairReport
from laplace_amort.posterior import Posterior
from laplace_amort.units import Laplace, QuadratureRule

__all__ = ["Found"]


@dataclass(frozen=True)
class Found:
    """A fit without a word on how far to trust it: what a verdict looks at.

    The parameters are those of :class:`~laplace_amort.FitResult`.
    """

    status: FitStatus
    guide: AutoLaplaceFamily
    objective: float
    standard_error: float
    gradient_norm: float
    num_draws: int
    history: list[Step]
    timings: dict[str, float]
    optima: list[Optimum]
    notes: list[str]
    gaussian: LaplaceGaussian | None
    saved: Any = field(repr=False)
    maximized: Objective = field(repr=False)
    problem: Problem = field(repr=False)
    seed: int = field(repr=False)
    asked: Objective = field(repr=False)
    check: bool = field(default=True, repr=False)
    in_double: LaplaceGaussian | None = field(default=None, repr=False)
    sampled: Posterior | None = field(default=None, repr=False, compare=False)

    @cached_property
    def posterior(self) -> Posterior:
        """The posterior for use: draws, moments and quantiles, as good as the objective of the fit knows it.

        Of an ELBO it is the guide itself. Of a marginal density, the globals are drawn by importance sampling, which
        takes some hundred evaluations the first time.

        :raises ValueError: if the fit ended where there is no posterior.
        """
        if self.sampled is not None:
            return dataclasses.replace(self.sampled, gaussian=self.exact_gaussian())
        return self.maximized.posterior(self.problem, self.exact_gaussian(), self.seed)

    @property
    def rule(self) -> QuadratureRule:
        """How the objective integrates over units: of all but a quadrature, one point each."""
        return self.maximized.rule if isinstance(self.maximized, MarginalQuadrature) else Laplace()

    @property
    def head_report(self) -> RepairReport | None:
        """What was repaired in the precision of the globals."""
        return None if self.gaussian is None else self.gaussian.head_report

    @property
    def tail_report(self) -> RepairReport | None:
        """What was repaired in the precisions of the units."""
        return None if self.gaussian is None else self.gaussian.tail_report

    @property
    def seconds(self) -> float:
        """Seconds in all."""
        return sum(self.timings.values())

    def standard_errors(self) -> dict[str, Tensor]:
        r"""Return standard deviations of all latents in unconstrained space, by site, in its unconstrained shape.

        They are those of ``gaussian``, the Gaussian approximation at the optimum; ``posterior.std()`` has those of the
        posterior, in constrained space.
        Those of the units are the roots of the diagonals of :math:`U_i^{-1} + W_i S^{-1} W_i^\top`: the delta method,
        the dependence of the mode on the globals included.

        :raises ValueError: if the fit ended where there is no posterior.
        """
        gaussian = self.exact_gaussian()
        variances = gaussian.precision.global_variance(), gaussian.precision.local_variance()
        return self.problem.rounded(gaussian.unit_model.layout.to_sites(*(part.sqrt() for part in variances)))

    def exact_gaussian(self) -> LaplaceGaussian:
        """Return the posterior as it was computed: in double precision, whatever the dtype of the model.

        :raises ValueError: if the fit ended where there is no posterior.
        """
        if self.gaussian is None:
            raise ValueError(f"there is no posterior: {self.status}")
        return self.in_double or self.gaussian
