"""What a fit found, and how it came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from laplace_amort.errors import ResumeError
from laplace_amort.family import LaplaceGaussian
from laplace_amort.fit_status import FitStatus
from laplace_amort.guides import AutoLaplaceFamily
from laplace_amort.objectives import Objective
from laplace_amort.posterior import Posterior
from laplace_amort.repair import RepairReport
from laplace_amort.run import Step
from laplace_amort.summaries import globals_table, summary_lines
from laplace_amort.target import Target

__all__ = ["FitResult", "Optimum", "Rung"]

_FORMAT = "laplace_amort fit 1"


class Rung(NamedTuple):
    """What was fitted, to go on working with.

    :param objective: that was maximized.
    :param Target target: the model at its data.
    :param int seed: of the fit.
    """

    objective: Objective
    target: Target
    seed: int


@dataclass(frozen=True)
class Optimum:
    """One place where starts ended.

    :param float objective: its value there.
    :param int num_starts: that ended there.
    :param dict globals_: constrained values of the global sites, by name.
    :param FitStatus status: how the best of these starts ended.
    """

    objective: float
    num_starts: int
    globals_: Mapping[str, Tensor]
    status: FitStatus


@dataclass(frozen=True)
class FitResult:
    """What :func:`~laplace_amort.fit` returns; ``print(result)`` shows it.

    :param FitStatus status: how the fit ended, a sentence; ``status.ok`` if it converged.
    :param AutoLaplaceFamily guide: the guide, standing at the optimum.
    :param float objective: the value there; of an ELBO, on draws that the optimizer has not seen. After an interrupt,
        that of the stage it came in: see ``history``.
    :param float standard_error: of that value; 0 where it is exact.
    :param float gradient_norm: in posterior standard deviations: to first order how far the optimum still is.
    :param int num_draws: draws that the optimizer averaged over; 0 for an objective without.
    :param list history: of :class:`Step`, every evaluation in order.
    :param dict timings: seconds by stage.
    :param list optima: :class:`Optimum`, the best first; one, unless several starts ended in several places.
    :param list notes: what a user should know, in sentences.
    :param LaplaceGaussian gaussian: the posterior that was found, without a graph: of ``MarginalLaplace`` the one with
        the marginal curvature as its head, of an ELBO the guide. ``None`` if a fit ended where there is none.
    :param saved: what a later fit needs to go on, see :meth:`save`.
    :param Rung rung: what was fitted.
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
    rung: Rung = field(repr=False)

    @cached_property
    def posterior(self) -> Posterior:
        """The posterior for use: draws, moments and quantiles, as good as the objective of the fit knows it.

        Of an ELBO it is the guide itself. Of a marginal density, the globals are drawn by importance sampling, which
        takes some hundred evaluations the first time.

        :raises ValueError: if the fit ended where there is no posterior.
        """
        return self.rung.objective.posterior(self.rung.target, self._posterior(), self.rung.seed)

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

        Those of the units are the roots of the diagonals of :math:`U_i^{-1} + W_i S^{-1} W_i^\top`: the delta method,
        the dependence of the mode on the globals included.

        :raises ValueError: if the fit ended where there is no posterior.
        """
        precision, layout = self._posterior().precision, self._posterior().unit_model.layout
        return layout.to_sites(precision.global_variance().sqrt(), precision.local_variance().sqrt())

    def summary(self) -> str:
        """Return a table of the globals in constrained space, with how the fit ended above it."""
        lines = summary_lines(self)
        return "\n".join(lines if self.gaussian is None else [*lines, "", globals_table(self.gaussian)])

    def __str__(self) -> str:
        return self.summary()

    def save(self, path: str | Path) -> None:
        """Write what a later fit needs to go on from here: ``fit(model, guide, *args, resume=path)``.

        The parameters of the guide are saved as those of every module: ``torch.save(guide.state_dict(), path)``.
        """
        torch.save({"format": _FORMAT, "saved": self.saved}, path)

    def _posterior(self) -> LaplaceGaussian:
        if self.gaussian is None:
            raise ValueError(f"there is no posterior: {self.status}")
        return self.gaussian


def load_saved(resume: FitResult | str | Path) -> Any:
    """Return what was saved of a fit.

    :param resume: a result, or the path of one that was saved. Load only files that you trust: they may hold code.
    :raises ResumeError: if it is neither.
    """
    if isinstance(resume, FitResult):
        return resume.saved
    try:
        content = torch.load(resume, weights_only=False)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ResumeError(f"{resume} was not written by FitResult.save: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ResumeError(f"{resume} was not written by FitResult.save of this version, whose format is '{_FORMAT}'")
    return content["saved"]
