"""What was estimated of the tables inside precincts, and how far that is from the truth where it is known."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
from tabulate import tabulate
from torch import Tensor

from laplace_amort import AutoLaplaceFamily, FitResult, MarginalCurvature, MarginalLaplace, fit
from laplace_amort.examples.ecological import CHOICES, RACES, choice_rates, draw_choices

__all__ = [
    "LEAST_VOTERS",
    "Score",
    "TableEstimates",
    "fit_tables",
    "log_evidence",
    "overall_table",
    "score_table",
]

# Cells of fewer voters say little: their shares are 0 or 1 as often as not.
LEAST_VOTERS = 50
_LEVEL = 0.9


@dataclass(frozen=True)
class TableEstimates:
    """Draws of the hidden tables, summarized.

    :param str label: how they were estimated.
    :param float seconds: that took.
    :param Tensor overall: draws of the shares of all voters of a race, ``(S, R, C)``.
    :param Tensor mean: of the shares in each precinct, ``(N, R, C)``.
    :param Tensor low: 5 % quantiles of these.
    :param Tensor high: 95 % quantiles of these.
    :param FitResult result: of the fit, if it was one of ours.
    """

    label: str
    seconds: float
    overall: Tensor
    mean: Tensor
    low: Tensor
    high: Tensor
    result: FitResult | None = None

    @classmethod
    def of_rates(cls, label: str, seconds: float, rates: Tensor, voters: Tensor, **rest: Any) -> TableEstimates:
        """Summarize draws of rates ``(S, N, R, C)``.

        Voters choose by chance at these rates, and the truth is what they chose: so tables are drawn, with the numbers
        of voters ``voters (N, R)``.
        """
        tables = draw_choices(voters, rates)
        shares = tables / voters.clamp(min=1).unsqueeze(-1)
        overall = tables.sum(1) / voters.sum(0).unsqueeze(-1)
        low, high = _quantiles(shares, ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2))
        return cls(label, seconds, overall, shares.mean(0), low, high, **rest)

    @property
    def fit(self) -> FitResult:
        """What was fitted.

        :raises ValueError: if these are not estimates of ours.
        """
        if self.result is None:
            raise ValueError(f"'{self.label}' was not fitted here")
        return self.result

    def overall_interval(self) -> tuple[Tensor, Tensor]:
        """Return 5 % and 95 % quantiles of the shares of all voters, ``(R, C)`` each."""
        return _quantiles(self.overall, ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2))


@dataclass(frozen=True)
class Score:
    """Errors of estimates, in percentage points, and how often 90 % intervals hold the truth.

    :param float overall_error: mean absolute error of the shares of all voters of a race.
    :param int overall_covered: how many of these lie in their intervals.
    :param int overall_cells: of so many.
    :param float precinct_error: the same error in precincts, over cells of races with 50 voters or more.
    :param float precinct_covered: share of those cells that lie in their intervals, in per cent.
    :param float precinct_width: mean width of these intervals.
    """

    overall_error: float
    overall_covered: int
    overall_cells: int
    precinct_error: float
    precinct_covered: float
    precinct_width: float

    @classmethod
    def of(cls, estimates: TableEstimates, truth: Tensor) -> Score:
        """Score estimates against the tables ``truth (N, R, C)``, counts of voters."""
        voters = truth.sum(-1)
        overall = truth.sum(0) / voters.sum(0).unsqueeze(-1)
        low, high = estimates.overall_interval()
        enough = voters >= LEAST_VOTERS
        shares = (truth / voters.clamp(min=1).unsqueeze(-1))[enough]
        bounds = estimates.low[enough], estimates.high[enough]
        return cls(
            overall_error=_points((estimates.overall.mean(0) - overall).abs()),
            overall_covered=int(((low <= overall) & (overall <= high)).sum()),
            overall_cells=overall.numel(),
            precinct_error=_points((estimates.mean[enough] - shares).abs()),
            precinct_covered=_points(((bounds[0] <= shares) & (shares <= bounds[1])).to(shares)),
            precinct_width=_points(bounds[1] - bounds[0]),
        )


def fit_tables(
    label: str, model: Callable[..., Any], voters: Tensor, votes: Tensor, *, seed: int = 0, progress: bool = False
) -> TableEstimates:
    """Fit a model of the tables by Laplace's method, and draw from the Gaussian it ends with.

    :param str label: of the estimates.
    :param model: one of :mod:`~laplace_amort.examples.ecological`.
    :param Tensor voters: by race, ``(N, R)``.
    :param Tensor votes: by choice, ``(N, C)``.
    :param int seed: of the draws.
    :param bool progress: whether to show a bar.
    """
    start = time.perf_counter()
    with pyro.get_param_store().scope():
        family = AutoLaplaceFamily(model, head=MarginalCurvature())
        options: Any = {"seed": seed, "progress": progress}
        result = fit(model, voters, votes, guide=family, objective=MarginalLaplace(), **options)
        if result.gaussian is None:
            raise ValueError(f"{label}: there is no posterior: {result.status}")
        pyro.set_rng_seed(seed)
        rates = choice_rates(result.gaussian.sample(1000)["eta"])
    return TableEstimates.of_rates(label, time.perf_counter() - start, rates, voters, result=result)


def log_evidence(result: FitResult) -> float:
    """Return the log evidence by Laplace's method, for globals as for units."""
    if result.gaussian is None:
        raise ValueError(f"there is no posterior: {result.status}")
    scales = result.gaussian.precision.global_scale_tril.diagonal()
    return result.objective + float(scales.log().sum()) + len(scales) / 2 * math.log(2 * math.pi)


def overall_table(estimates: Sequence[TableEstimates], truth: Tensor | None, races: Sequence[str] = RACES) -> str:
    """Return a table of the shares of all voters of a race, in per cent, with 90 % intervals.

    :param estimates: a column for each.
    :param Tensor truth: the tables, ``(N, R, C)``, for a column of its own.
    :param races: names.
    """
    rows = []
    for r, race in enumerate(races):
        for c, choice in enumerate(CHOICES):
            row = [race, choice]
            if truth is not None:
                row.append(f"{100 * float(truth[:, r, c].sum() / truth[:, r].sum()):.1f}")
            for found in estimates:
                low, high = (float(end[r, c]) for end in found.overall_interval())
                row.append(f"{100 * float(found.overall[:, r, c].mean()):.1f} ({100 * low:.1f} to {100 * high:.1f})")
            rows.append(row)
    headers = ["race", "choice", *(["truth"] if truth is not None else []), *(found.label for found in estimates)]
    return tabulate(rows, headers, disable_numparse=True, stralign="right", colalign=("left", "left"))


def score_table(estimates: Sequence[TableEstimates], truth: Tensor) -> str:
    """Return a table of errors, coverage and seconds, a row for each.

    :param estimates: what to score.
    :param Tensor truth: the tables, ``(N, R, C)``.
    """
    rows = []
    for found in estimates:
        score = Score.of(found, truth)
        rows.append(
            [
                found.label,
                f"{score.overall_error:.2f}",
                f"{score.overall_covered} of {score.overall_cells}",
                f"{score.precinct_error:.2f}",
                f"{score.precinct_covered:.0f} %",
                f"{score.precinct_width:.1f}",
                f"{found.seconds:.1f}",
            ]
        )
    headers = ["", "error", "in 90 %", "error, precincts", "in 90 %", "width", "seconds"]
    return tabulate(rows, headers, disable_numparse=True, stralign="right", colalign=("left",))


def _points(values: Tensor) -> float:
    return 100 * float(values.mean())


def _quantiles(draws: Tensor, levels: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Two quantiles along the first dimension; ``torch.quantile`` refuses tensors of many elements."""
    ordered = draws.sort(0).values
    low, high = (ordered[min(int(level * len(draws)), len(draws) - 1)] for level in levels)
    return low, high
