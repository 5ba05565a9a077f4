"""How a fit is shown: the verdict, the posterior's table, and how it was found, as text and as HTML."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from laplace_amort.fitting.evaluation import FitStatus
from laplace_amort.posterior import GlobalsTable, markup

if TYPE_CHECKING:
    from laplace_amort.fitting.result import FitResult

__all__ = ["headline", "how_found", "html", "in_one_line", "text"]

_NO_GRADIENT = 1e-6  # standard deviations below which a gradient is none, and its digits are rounding errors


def text(result: FitResult) -> str:
    """Return all that is to be said of a fit: the verdict, a table of the globals, how it was found.

    :param FitResult result: the fit.
    """
    return "\n\n".join([str(result.judgement), str(_table(result)), result.how()])


def html(result: FitResult) -> str:
    """Return what :func:`text` does, as HTML.

    :param FitResult result: the fit.
    """
    verdict, _, reasons = str(result.judgement).partition("\n")
    bold, dot, estimated = verdict.partition(". Estimated")
    table = _table(result)
    return markup.division(
        [
            markup.strong(bold, dot + estimated, f"verdict {'ok' if result.verdict.ok else 'not-ok'}"),
            *([markup.paragraph(reasons, "reasons")] if reasons else []),
            table._repr_html_() if isinstance(table, GlobalsTable) else markup.paragraph(table),
            markup.paragraph(result.how(), "how"),
        ],
        "laplace-amort",
    )


def in_one_line(result: FitResult) -> str:
    """Return a fit in one line, from what is known of it already.

    :param FitResult result: the fit.
    """
    known = vars(result)
    parts = [known["judgement"].verdict.name] if "judgement" in known else []
    parts += [result.status.name, repr(result.asked), result.problem.unit_model.sizes()]
    if "posterior" in known and result.posterior.k_hat > -math.inf:
        parts.append(f"k-hat {result.posterior.k_hat:.2g}")
    return f"FitResult({', '.join(parts)})"


def headline(result: FitResult) -> str:
    """Return how a fit ended, where, repairs, other optima, notes.

    :param FitResult result: the fit.
    """
    lines = [f"{result.status.name}: {result.status}", _where(result)]
    for repair, advice in _repairs(result):
        lines.append(f"{repair}; {advice}" if advice else repair)
    return "\n".join([*lines, *_optima(result), *result.notes])


def how_found(result: FitResult) -> str:
    """Return how a fit was found, without what the verdict says of it: lines of objective, status, draws, notes.

    :param FitResult result: the fit.
    """
    said = str(result.judgement)
    taken = "" if result.asked == result.maximized else f", which took {result.maximized!r}"
    lines = [f"found by {result.asked!r}{taken}", f"{result.status.name}: {result.status}", _where(result)]
    if "posterior" in vars(result):  # it was needed for the table, where there is one
        lines.append(result.posterior.how())
    repairs = [repair for repair, _ in _repairs(result)]
    return "\n".join([*lines, *_optima(result), *(line for line in (*repairs, *result.notes) if line not in said)])


def _table(result: FitResult) -> GlobalsTable | str:
    """The table; where there is none, a sentence why."""
    try:
        return result.table()
    except ValueError as error:
        return str(error)


def _where(result: FitResult) -> str:
    value = f"objective {result.objective:.6g}"
    if result.standard_error:
        value += f" ± {result.standard_error:.2g}"
    draws = f", {result.num_draws} draws" if result.num_draws else ""
    size = f"{result.gradient_norm:.2g}" if result.gradient_norm >= _NO_GRADIENT else f"under {_NO_GRADIENT:g}"
    gradient = f"gradient {size} posterior sd" if math.isfinite(result.gradient_norm) else ""
    evaluations = f"{len(result.history)} evaluations{draws}, {result.seconds:.3g} s"
    return "; ".join(part for part in (value, gradient, evaluations) if part)


def _optima(result: FitResult) -> list[str]:
    if len(result.optima) < 2:
        return []
    found = ", ".join(f"{optimum.objective:.6g} ({optimum.num_starts} starts)" for optimum in result.optima)
    return [f"{len(result.optima)} optima were found: {found}"]


def _repairs(result: FitResult) -> list[tuple[str, str]]:
    """What was repaired of the precisions, each with advice or without."""
    found = []
    for what, report in (("globals", result.head_report), ("units", result.tail_report)):
        if report is not None and report.num_repaired:
            is_elbo = what == "globals" and result.num_draws and result.status is FitStatus.CONVERGED
            advice = "do not rely on the scales, integrate over the units:\n    fit(model, *args)" if is_elbo else ""
            found.append((f"the precision of the {what} is not that of a maximum: {report}", advice))
    return found
