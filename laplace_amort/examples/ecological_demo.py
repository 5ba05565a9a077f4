"""The demo of ecological inference: two models of the same precincts, beside the truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from laplace_amort import FitStatus
from laplace_amort.examples import ecological
from laplace_amort.examples.ecological_plots import tables_figure
from laplace_amort.examples.ecological_scores import (
    Score,
    TableEstimates,
    fit_tables,
    log_evidence,
    overall_table,
    score_table,
)
from laplace_amort.examples.settings import own_settings
from laplace_amort.examples.titles import TITLES

__all__ = ["TITLE", "EcologicalResult", "run"]

TITLE = TITLES["senc"]
_MODELS = {"same everywhere": ecological.model, "contextual": ecological.contextual_model}


@dataclass(frozen=True)
class EcologicalResult:
    """What :func:`run` found; ``print(result)`` shows it beside the truth.

    :param list estimates: of the hidden tables, one for each model that was fitted.
    :param Tensor truth: the tables, ``(212, 3, 3)``.
    :param bool interrupted: whether the user stopped it.
    """

    estimates: list[TableEstimates]
    truth: Tensor
    interrupted: bool = False

    def __str__(self) -> str:
        if not self.estimates:
            return f"senc: {TITLE}\n\nnothing was fitted"
        sections = [
            f"senc: {TITLE}",
            f"Shares of all voters of a race, %, with 90 % intervals\n\n{overall_table(self.estimates, self.truth)}",
            f"Errors in percentage points, of all voters and in precincts\n\n{score_table(self.estimates, self.truth)}",
            *(_verdict(found, self.truth) for found in self.estimates),
        ]
        if len(self.estimates) == len(_MODELS):
            sections.append(_comparison(*self.estimates))
        return "\n\n".join(sections)

    def figures(self) -> dict[str, Any]:
        """Draw the estimates beside the truth, if there are any.

        :return: figures, by what is added to the name of a file.
        :raises ImportError: if matplotlib is not installed.
        """
        return {"": tables_figure(self.estimates, self.truth)} if self.estimates else {}


def run(*, seed: int = 0, progress: bool = True) -> EcologicalResult:
    """Fit both models by Laplace's method; a minute at most.

    :param int seed: of the draws.
    :param bool progress: whether to show bars.
    """
    with own_settings():
        estimates: list[TableEstimates] = []
        truth = ecological.truth()
        try:
            for label, model in _MODELS.items():
                found = fit_tables(label, model, *ecological.data(), seed=seed, progress=progress)
                if found.fit.status is FitStatus.INTERRUPTED:
                    raise KeyboardInterrupt
                estimates.append(found)
        except KeyboardInterrupt:
            return EcologicalResult(estimates, truth, interrupted=True)
    return EcologicalResult(estimates, truth)


def _verdict(found: TableEstimates, truth: Tensor) -> str:
    score = Score.of(found, truth)
    held = f"{score.overall_covered} of {score.overall_cells} shares of all voters lie in their 90 % intervals"
    trust = "believe its intervals" if score.overall_covered >= 0.75 * score.overall_cells else "do not believe them"
    return f"{found.label}: {found.fit.status.name}; {held}: {trust}."


def _comparison(first: TableEstimates, second: TableEstimates) -> str:
    worse, better = sorted((first, second), key=lambda found: log_evidence(found.fit))
    gap = log_evidence(better.fit) - log_evidence(worse.fit)
    return (
        f"Without the truth: the log evidence of '{better.label}' is {gap:.1f} above that of '{worse.label}' (both by "
        "Laplace's method).\nCompare models before you believe one: no check of a fit says that its model is wrong."
    )
