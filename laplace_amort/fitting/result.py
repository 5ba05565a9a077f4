"""What a fit found, and how it came about."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pyro.infer import Predictive

from laplace_amort.errors import NUMERICAL_ERRORS, LaplaceAmortError
from laplace_amort.evidence import heavy_tails
from laplace_amort.fitting import shown
from laplace_amort.fitting.evaluation import FitStatus
from laplace_amort.fitting.found import Found
from laplace_amort.fitting.history import Step
from laplace_amort.fitting.judge import judge
from laplace_amort.fitting.objectives.elbo import FixedDrawELBO
from laplace_amort.fitting.objectives.ladder import Ladder
from laplace_amort.fitting.records import KNOWN, Saved
from laplace_amort.fitting.saving import read, write
from laplace_amort.fitting.stored import content_of, load_line, revived, saved_in, without_model
from laplace_amort.fitting.verdict import Errors, Judgement, Verdict
from laplace_amort.guide import AutoLaplaceFamily
from laplace_amort.linalg import RepairReport
from laplace_amort.posterior import (
    PROBABILITIES,
    Absent,
    GlobalsTable,
    Posterior,
    SeenUnits,
    StoredPosterior,
    Units,
    records_frame,
)

__all__ = ["FitResult", "load_saved"]

# Fields of a result that have forms of their own in a file, or none.
_NOT_PLAIN = {"guide", "problem", "gaussian", "in_double", "sampled", "saved", "maximized", "asked"}
_NO_GRADIENT = 1e-6  # standard deviations below which a gradient is none, and its digits are rounding errors


@dataclass(frozen=True, repr=False)
class FitResult(Found):
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
    :param LaplaceGaussian gaussian: the Gaussian approximation at the optimum, without a graph: of ``MarginalLaplace``
        the one with the marginal curvature as its head, of an ELBO the guide. ``None`` if a fit ended where there is
        none. In the dtype of the model, like all tensors here. For results take ``posterior``.
    :param saved: what a later fit needs to go on, see :meth:`save`.
    :param maximized: the objective that was, with its settings.
    :param Problem problem: the model at its data.
    :param int seed: of the fit.
    :param Objective asked: the objective that was asked for, or taken by default.
    :param bool check: whether the verdict compares the posterior with one by better integrals.
    :param LaplaceGaussian in_double: the Gaussian as it was computed; None if ``gaussian`` is.
    :param Posterior sampled: the posterior, where the fit has found it on its way; else None.
    """

    @cached_property
    def judgement(self) -> Judgement:
        """The verdict with what it rests on, and the line to type next; looked at when it is first asked for."""
        return judge(self)

    @property
    def verdict(self) -> Verdict:
        """How far to trust the posterior: a sentence; ``verdict.ok`` if nothing speaks against it."""
        return self.judgement.verdict

    @property
    def errors(self) -> Errors | None:
        """How far off the posterior may be, as estimated; None where there was nothing to compare it with."""
        return self.judgement.errors

    def table(self, quantiles: Sequence[float] = PROBABILITIES) -> GlobalsTable:
        """Return the table of the globals that ``print(result)`` shows: that of :meth:`Posterior.table`.

        Means and standard deviations that do not exist are left out, as far as the verdict has seen it. After an
        interrupt it is the Gaussian where the fit was then, which takes no time.

        :param quantiles: between 0 and 1.
        :raises ValueError: if there is no posterior, with the reason.
        """
        table = self.posterior_to_show().table(quantiles)
        if self.status is FitStatus.INTERRUPTED:
            return dataclasses.replace(table, title="Gaussian approximation where the fit was interrupted")
        have_mean = self.have_mean()
        return table.without_moments(have_mean) if have_mean else table

    def have_mean(self) -> dict[str, bool]:
        """Return which globals have no standard deviation, as far as the verdict has seen it, and whether a mean."""
        if not any(reason.verdict is Verdict.NO_MOMENTS for reason in self.judgement.reasons):
            return {}
        return {tail.name: tail.has_mean for tail in heavy_tails(self.posterior)}

    def posterior_to_show(self) -> Posterior:
        """Return the posterior; after an interrupt the Gaussian where the fit was then, which takes no time.

        :raises ValueError: if there is none, with the reason.
        """
        gaussian = self.exact_gaussian()
        try:
            if self.status is FitStatus.INTERRUPTED:
                return FixedDrawELBO().posterior(self.problem, gaussian, self.seed)
            return self.posterior
        except (*NUMERICAL_ERRORS, LaplaceAmortError, ValueError) as error:
            raise ValueError(f"there is no posterior: {error}") from error

    def summary(self) -> str:
        """Return the verdict, a table of the globals, and how they were found: what ``print(result)`` shows."""
        return shown.text(self.judgement, self._table_or_reason(), self.how())

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        known = vars(self)  # nothing is computed for this
        parts = [self.judgement.verdict.name] if "judgement" in known else []
        parts += [self.status.name, repr(self.asked), self.problem.unit_model.sizes()]
        if "posterior" in known and self.posterior.k_hat > -math.inf:
            parts.append(f"k-hat {self.posterior.k_hat:.2g}")
        return f"FitResult({', '.join(parts)})"

    def _repr_html_(self) -> str:
        return shown.html(self.judgement, self._table_or_reason(), self.how())

    def headline(self) -> str:
        """Return how the fit ended, without a look at the posterior: status, value, repairs, other optima, notes."""
        lines = [f"{self.status.name}: {self.status}", self._where()]
        for what, report in self._repairs():
            lines.append(_repaired(what, report))
            if what == "globals" and self.num_draws and self.status is FitStatus.CONVERGED:
                lines[-1] += "; do not rely on the scales, integrate over the units:\n    fit(model, *args)"
        return "\n".join([*lines, *self._other_optima(), *self.notes])

    def how(self) -> str:
        """Return how the posterior was found, in lines: objective, status, draws, and notes that no verdict has."""
        said = str(self.judgement)
        taken = f", which took {self.maximized!r}" if isinstance(self.asked, Ladder) else ""
        lines = [f"found by {self.asked!r}{taken}", f"{self.status.name}: {self.status}", self._where()]
        if "posterior" in vars(self):  # the table needed it, where there is one
            lines.append(self.posterior.how())
        rest = [*(_repaired(*repair) for repair in self._repairs()), *self.notes]
        return "\n".join([*lines, *self._other_optima(), *(line for line in rest if line not in said)])

    def predictive(self, units: Units = SeenUnits(), **options: Any) -> Predictive:  # noqa: B008 (never changes)
        """Return Pyro's ``Predictive`` for this fit; see :meth:`Posterior.predictive` for its options."""
        return self.posterior.predictive(units, **options)

    def posterior_for(self, *args: Any, **kwargs: Any) -> Posterior:
        """Return the posterior of new units given their data, without a refit; see :meth:`Posterior.posterior_for`."""
        return self.posterior.posterior_for(*args, **kwargs)

    def to_arviz(self, **options: Any) -> Any:
        """Return the fit for ArviZ, with how it ended as attributes; see :meth:`Posterior.to_arviz` for its options."""
        options["attrs"] = {**self._attributes(), **(options.get("attrs") or {})}
        return self.posterior.to_arviz(**options)

    def history_to_frame(self) -> Any:
        """Return the history, a row for each evaluation in order.

        :return: a ``pandas.DataFrame`` with the fields of :class:`Step` as columns.
        :raises ImportError: if pandas is not installed.
        """
        names = [one.name for one in dataclasses.fields(Step)]
        return records_frame([dataclasses.asdict(step) for step in self.history], names)

    def _table_or_reason(self) -> GlobalsTable | str:
        """The table; where there is none, a sentence why, if the verdict has not said it."""
        if self.verdict is Verdict.NO_POSTERIOR:
            return ""
        try:
            return self.table()
        except ValueError as error:
            return str(error)

    def _where(self) -> str:
        value = f"objective {self.objective:.6g}"
        if self.standard_error:
            value += f" ± {self.standard_error:.2g}"
        draws = f", {self.num_draws} draws" if self.num_draws else ""
        size = f"{self.gradient_norm:.2g}" if self.gradient_norm >= _NO_GRADIENT else f"under {_NO_GRADIENT:g}"
        is_one = math.isfinite(self.objective) and math.isfinite(self.gradient_norm)
        gradient = f"gradient {size} posterior sd" if is_one else ""
        evaluations = f"{len(self.history)} evaluations{draws}, {self.seconds:.3g} s"
        return "; ".join(part for part in (value, gradient, evaluations) if part)

    def _other_optima(self) -> list[str]:
        if len(self.optima) < 2:
            return []
        found = ", ".join(f"{optimum.objective:.6g} ({optimum.num_starts} starts)" for optimum in self.optima)
        return [f"{len(self.optima)} optima were found: {found}"]

    def _repairs(self) -> list[tuple[str, RepairReport]]:
        reports = (("globals", self.head_report), ("units", self.tail_report))
        return [(what, report) for what, report in reports if report is not None and report.num_repaired]

    def _attributes(self) -> dict[str, Any]:
        """What a file of this fit should say about it: numbers and words."""
        found = {
            "objective": repr(self.maximized),
            "objective_value": float(self.objective),
            "status": self.status.name,
            "converged": int(self.status.ok),
            "message": str(self.status),
            "sampling_time": float(self.seconds),
            "notes": "\n".join(self.notes),
            "verdict": self.verdict.name,
            "verdict_message": "\n".join([str(self.verdict), *map(str, self.judgement.reasons)]),
            "errors": "" if self.errors is None else str(self.errors),
        }
        return {name: value for name, value in found.items() if not (isinstance(value, float) and math.isnan(value))}

    def save(self, path: str | Path) -> None:
        """Write the result to a file, from which :meth:`load` reads it, and from which a fit goes on by ``resume=``.

        It has the numbers of all evaluations, the posterior's table, and means and standard deviations of the units;
        no draws, and no code. The verdict and the posterior are computed now, unless they were before or the fit was
        interrupted. Where writing fails, a file that was there stays as it was.

        :param path: of the file.
        :raises OSError: if there is no such directory, no room, or no permission.
        """
        names = {one.name for one in dataclasses.fields(FitResult)} - _NOT_PLAIN
        plain = {name: getattr(self, name) for name in sorted(names)}
        write(path, content_of(self, plain), KNOWN)

    @staticmethod
    def load(
        path: str | Path,
        model: Callable[..., Any] | None = None,
        *args: Any,
        guide: AutoLaplaceFamily | None = None,
        **kwargs: Any,
    ) -> FitResult:
        """Return the result that :meth:`save` wrote.

        Without the model it is what can be read: status, verdict, objective, history, optima, notes, the posterior's
        tables. With the model, at the data of the fit, it is as it was: draws, predictions, diagnoses. Nothing in the
        file is executed.

        :param path: of the file.
        :param model: the Pyro model that was fitted; None for the numbers by themselves.
        :param args: arguments of the model, as they were fitted.
        :param AutoLaplaceFamily guide: one with the settings of the fit, if no file can hold these.
        :param kwargs: keyword arguments of the model.
        :raises ResumeError: if the file is none, or is of another model, other data or another guide.
        :raises OSError: if there is no such file.
        """
        content = read(path, KNOWN)
        if model is None:
            return StoredResult(**without_model(content, path), content=content, path=str(path))
        return FitResult(**revived(content, path, model, guide, args, kwargs))


def _repaired(what: str, report: RepairReport) -> str:
    return f"the precision of the {what} is not that of a maximum: {report}"


@dataclass(frozen=True, kw_only=True, repr=False)
class StoredResult(FitResult):
    """A fit as a file has it, without its model: what needs that says what to type."""

    content: Mapping[str, Any] = field(repr=False)
    path: str = field(repr=False)

    @property
    def posterior(self) -> Any:
        """The posterior's tables, means and standard deviations; see :class:`StoredPosterior`.

        :raises ValueError: if the fit ended where there is no posterior.
        """
        found = self.posterior_to_show()
        why = self.content["missing"]
        return Absent(f"its posterior ({why})", load_line(self.path)) if why else found

    @property
    def judgement(self) -> Judgement:
        """The verdict with what it rests on, and the line to type next."""
        found: Judgement = self.content["judgement"]
        return found

    def posterior_to_show(self) -> Any:
        """Return the posterior; after an interrupt the Gaussian where the fit was then.

        :raises ValueError: if there is none, with the reason.
        """
        if self.content["shown"] is None:
            raise ValueError(self.content["missing"])
        return StoredPosterior(self.content["shown"], load_line(self.path))

    def have_mean(self) -> dict[str, bool]:
        """Return which globals have no standard deviation, as far as the verdict has seen it, and whether a mean."""
        return dict(self.content["have_mean"])

    def how(self) -> str:
        """Return how the posterior was found, in lines."""
        return str(self.content["how"])

    def __repr__(self) -> str:
        return f"FitResult({self.verdict.name}, {self.status.name}, {self.asked!r}, read from {self.path!r})"

    def save(self, path: str | Path) -> None:
        """Write the same to another file."""
        write(path, self.content, KNOWN)


def load_saved(resume: FitResult | str | Path) -> Saved:
    """Return what a fit goes on from.

    :param resume: a result, or the path of one that was saved.
    :raises ResumeError: if it is neither.
    """
    saved: Saved = resume.saved if isinstance(resume, FitResult) else saved_in(read(resume, KNOWN))
    return saved
