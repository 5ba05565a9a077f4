"""What a fit found, and how it came about."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pyro.infer import Predictive
from torch import Tensor

from laplace_amort.errors import ResumeError
from laplace_amort.fitting.evaluation import FitStatus
from laplace_amort.fitting.history import Step
from laplace_amort.fitting.objectives.base import Objective
from laplace_amort.guide import AutoLaplaceFamily, LaplaceGaussian, Problem
from laplace_amort.linalg import RepairReport
from laplace_amort.posterior import (
    Container,
    LogLikelihood,
    MarginalLikelihood,
    Posterior,
    SeenUnits,
    Units,
    export,
    globals_table,
    installed_container,
    posterior_for,
    predictive,
    records_frame,
)

__all__ = ["FitResult", "Optimum", "summary_lines"]

_FORMAT = "laplace_amort fit 1"
_NO_GRADIENT = 1e-6  # standard deviations below which a gradient is none, and its digits are rounding errors


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
    :param maximized: the objective that was, with its settings.
    :param Problem problem: the model at its data.
    :param int seed: of the fit.
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

    @cached_property
    def posterior(self) -> Posterior:
        """The posterior for use: draws, moments and quantiles, as good as the objective of the fit knows it.

        Of an ELBO it is the guide itself. Of a marginal density, the globals are drawn by importance sampling, which
        takes some hundred evaluations the first time.

        :raises ValueError: if the fit ended where there is no posterior.
        """
        return self.maximized.posterior(self.problem, self._posterior(), self.seed)

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

    def predictive(
        self,
        units: Units = SeenUnits(),  # noqa: B008 (never changes)
        *,
        num_samples: int = 1000,
        seed: int | None = None,
        parallel: bool = False,
    ) -> Predictive:
        """Return Pyro's ``Predictive`` for this fit: call it with arguments of the model, or with none for the data.

        Observed sites are drawn, whatever the arguments hold for them; draws of what is not given come from torch's
        generator (``pyro.set_rng_seed``).

        :param units: which are predicted: :class:`~laplace_amort.SeenUnits`, :class:`~laplace_amort.NewUnits`, or
            :class:`~laplace_amort.ConditionedUnits`, new ones that have data.
        :param int num_samples: number of draws.
        :param int seed: of the draws of the posterior.
        :param bool parallel: of ``Predictive``: one run for all draws, for models that take a dimension on the left.
        :return: called, it gives values ``(num_samples, *shape)`` by site.
        :raises ModelError: when called, if plates have other sizes than there are draws for; the message has the line
            to type. And now, for units that were fitted in minibatches.

        Example::

            >>> import pyro, torch, pyro.distributions as dist
            >>> from laplace_amort import AutoLaplaceFamily, MarginalLaplace, NewUnits, fit
            >>> def model(z, size):
            ...     mu = pyro.sample("mu", dist.Normal(0., 1.))
            ...     with pyro.plate("units", size):
            ...         y = pyro.sample("y", dist.Normal(mu, 1.))
            ...         pyro.sample("z", dist.Normal(y, 1.), obs=z)
            >>> pyro.clear_param_store()
            >>> result = fit(model, AutoLaplaceFamily(model), torch.tensor([1., 3.]), 2, objective=MarginalLaplace())
            >>> result.predictive()()["z"].shape
            torch.Size([1000, 2])
            >>> result.predictive(NewUnits())(None, 5)["z"].shape
            torch.Size([1000, 5])
        """
        return predictive(self.posterior, self.problem, units, num_samples, seed, parallel)

    def posterior_for(self, *args: Any, **kwargs: Any) -> Posterior:
        """Return the posterior of new units given their data, without a refit: what amortization is for.

        The globals stay as they were fitted; for each of their draws, modes, curvatures and points of the new units are
        found as those of the fit were. It costs a few evaluations of the model.

        :param args: arguments of the model with the data of the new units.
        :param kwargs: its keyword arguments.
        :return: a posterior like that of the fit, with the new units in the place of the old.
        :raises ModelError: if the model has other latents than in the fit, or subsamples.
        :raises ModeNotFoundError: naming the units whose mode was not found.
        """
        return posterior_for(self.posterior, self.problem, args, kwargs)

    def to_arviz(
        self,
        *,
        num_samples: int = 1000,
        prior_samples: int = 500,
        log_likelihood: LogLikelihood | None = MarginalLikelihood(),  # noqa: B008 (never changes)
        coords: Mapping[str, Any] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        seed: int | None = None,
        container: Container | None = None,
    ) -> Any:
        """Return the fit for ArviZ, as one chain of independent draws: an ``xarray.DataTree``, or before version 1 of
        ArviZ an ``InferenceData``.

        Its groups are ``posterior``, ``posterior_predictive``, ``prior``, ``prior_predictive``, ``observed_data``,
        ``constant_data`` (tensors among the arguments of the model) and ``log_likelihood``. Dimensions bear the names
        of plates. Attributes say how the fit ended. Diagnostics of chains, such as R-hat, say nothing here.

        :param int num_samples: draws of the posterior. Globals are drawn by importance sampling, with enough of them
            that few repeat; the attribute ``distinct_draws_of_globals`` says how many are different.
        :param int prior_samples: draws of the prior; 0 for none.
        :param log_likelihood: what ``loo`` leaves out: :class:`~laplace_amort.MarginalLikelihood`, a unit;
            :class:`~laplace_amort.ConditionalLikelihood`, an observation of a unit that is known; None for no such
            group.
        :param coords: labels by dimension, as ``{"units": names_of_the_units}``.
        :param dims: names of dimensions by variable, those of draws left out.
        :param int seed: of all draws; torch's generator stays as it is.
        :param container: :func:`~laplace_amort.posterior.export.as_datatree` or
            :func:`~laplace_amort.posterior.export.as_inference_data`; by default what the installed ArviZ wants.
        :raises ImportError: if ArviZ is not installed, with the line to type.
        :raises ModelError: for units that were fitted in minibatches, or labels of a dimension that there is not.
        :raises ValueError: if the fit ended where there is no posterior.
        """
        groups = export(
            self.posterior,
            self.problem,
            self._attributes(),
            num_samples=num_samples,
            prior_samples=prior_samples,
            log_likelihood=log_likelihood,
            coords=coords or {},
            dims=dims or {},
            seed=self.seed if seed is None else seed,
        )
        return (container or installed_container())(groups)

    def history_to_frame(self) -> Any:
        """Return the history, a row for each evaluation in order.

        :return: a ``pandas.DataFrame`` with the fields of :class:`Step` as columns.
        :raises ImportError: if pandas is not installed.
        """
        names = [one.name for one in dataclasses.fields(Step)]
        return records_frame([dataclasses.asdict(step) for step in self.history], names)

    def _attributes(self) -> dict[str, Any]:
        """What a file of this fit should say about it: numbers and words."""
        found = {
            "inference_library": "laplace_amort",
            "inference_library_version": importlib.metadata.version("laplace_amort"),
            "objective": repr(self.maximized),
            "objective_value": float(self.objective),
            "status": self.status.name,
            "converged": int(self.status.ok),
            "message": str(self.status),
            "log_evidence": float(self.posterior.log_evidence),
            "sampling_time": float(self.seconds),
            "notes": "\n".join(self.notes),
        }
        return {name: value for name, value in found.items() if not (isinstance(value, float) and math.isnan(value))}

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


def summary_lines(result: Any) -> list[str]:
    """Return what is to be said of a fit before any table.

    :param FitResult result: the fit.
    """
    value = f"objective {result.objective:.6g}"
    if result.standard_error:
        value += f" ± {result.standard_error:.2g}"
    draws = f", {result.num_draws} draws" if result.num_draws else ""
    size = f"{result.gradient_norm:.2g}" if result.gradient_norm >= _NO_GRADIENT else f"under {_NO_GRADIENT:g}"
    gradient = f"gradient {size} posterior sd" if math.isfinite(result.gradient_norm) else ""
    evaluations = f"{len(result.history)} evaluations{draws}, {result.seconds:.3g} s"
    lines = [
        f"{result.status.name}: {result.status}",
        "; ".join(part for part in (value, gradient, evaluations) if part),
    ]
    for what, report in (("globals", result.head_report), ("units", result.tail_report)):
        if report is not None and report.num_repaired:
            lines.append(f"the precision of the {what} is not that of a maximum: {report}")
            if what == "globals" and result.num_draws and result.status is FitStatus.CONVERGED:
                lines[-1] += "; do not rely on the scales, integrate over the units:\n"
                lines[-1] += "    fit(model, guide, *args, objective=Ladder())"
    if len(result.optima) > 1:
        found = ", ".join(f"{optimum.objective:.6g} ({optimum.num_starts} starts)" for optimum in result.optima)
        lines.append(f"{len(result.optima)} optima were found: {found}")
    return lines + list(result.notes)
