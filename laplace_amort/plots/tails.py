"""The figure of the tails of the units."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

from laplace_amort.diagnostics import UNIT_TAILS, Diagnosis, UnitTails, unit_tails
from laplace_amort.plots.numbers import posterior_of
from laplace_amort.plots.style import (
    JOINT,
    MARGINAL,
    ON_EDGE,
    RAW,
    UNAMORTIZED,
    blank_figure,
    require_matplotlib,
    style,
)
from laplace_amort.posterior import K_GOOD
from laplace_amort.types import Vector

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["k_hat_figure"]

_DOUBTFUL = UNIT_TAILS.good
_WORST = 5  # units that are named


def k_hat_figure(found: Any) -> Figure:
    """Draw k-hat of every unit: the shape of the tail of its importance weights, its normal approximation the proposal.

    Above 0.5 a normal is doubtful for a unit, above 0.7 it does not do; those units are named, the worst five at most.
    Where there are more than some hundred units, those are drawn whose weights vary most. Triangles at the edges are
    values beyond them; below, minus infinity: units that are exactly normal.

    Do not take it for the k-hat of the globals, which is ``result.posterior.k_hat``.

    :param found: what :func:`laplace_amort.diagnose` or :func:`laplace_amort.fit` returned.
    :return: a ``matplotlib.figure.Figure``, which belongs to no window.
    :raises ImportError: if matplotlib is not installed.
    :raises ModelError: of a fit that took minibatches.
    :raises TypeError: if ``found`` is neither.
    :raises ValueError: if the diagnosis did not look at the units.

    Example: of what a diagnosis has found::

        >>> tails = UnitTails("schools", numpy.arange(3), numpy.array([0.1, 0.2, 0.9]), num_units=3)
        >>> k_hat_figure(Diagnosis((), unit_tails=tails)).axes[0].get_title(loc="left")
        '3 units; 1 above 0.7'
    """
    require_matplotlib()
    tails = _tails(found)
    low, high = _k_range(tails.k_hat)
    with style():
        figure = blank_figure(6.0, 3.0)
        axes = figure.subplots()
        words = {_DOUBTFUL: f"above {_DOUBTFUL:g}:\ndoubtful", K_GOOD: f"above {K_GOOD:g}:\nbad"}
        for threshold, line in zip(words, ((0, (4, 1.5)), "-"), strict=True):
            axes.axhline(threshold, color=RAW, linestyle=line, linewidth=0.9, zorder=1)
        _draw_k_hats(axes, tails, low, high)
        _name_worst(axes, tails, high)
        axes.set_xlabel(f"unit of plate '{tails.plate}'")
        axes.set_ylabel("k-hat")
        axes.set_ylim(low, high)
        axes.set_xlim(-0.02 * tails.num_units - 0.5, 1.02 * tails.num_units - 0.5)
        axes.xaxis.set_major_locator(require_matplotlib().ticker.MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_title(_looked_at(tails), loc="left")
        levels = axes.secondary_yaxis("right")
        levels.set_yticks(list(words), list(words.values()))
        levels.tick_params(length=0)
        levels.spines["right"].set_visible(False)
    return figure


def _tails(found: Any) -> UnitTails:
    """Find the tails of a diagnosis or a fit."""
    if not isinstance(found, Diagnosis):
        posterior_of(found)
        return unit_tails(found)
    if found.unit_tails is None:
        raise ValueError(f"the diagnosis has not looked at the units: {found.verdict}")
    return found.unit_tails


def _k_range(k_hat: Vector) -> tuple[float, float]:
    """Choose the ends of the axis: what is finite, as far as it is of interest."""
    finite = k_hat[numpy.isfinite(k_hat)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    return max(min(low, 0.0), -1.0) - 0.05, min(max(high, K_GOOD + 0.1), 2.0) + 0.08


def _draw_k_hats(axes: Any, tails: UnitTails, low: float, high: float) -> None:
    """Draw a point for each unit, whose shape tells the level too; triangles at the edges for those beyond."""
    bad, doubtful = ~(tails.k_hat <= K_GOOD), tails.k_hat > _DOUBTFUL
    for which, color, marker in ((~doubtful, MARGINAL, "o"), (doubtful & ~bad, UNAMORTIZED, "s"), (bad, JOINT, "D")):
        inside = which & (tails.k_hat >= low) & (tails.k_hat <= high)
        axes.plot(tails.units[inside], tails.k_hat[inside], marker, color=color, markersize=3.5, markeredgewidth=0)
    at_edge = {"linestyle": "none", "markersize": 4, **ON_EDGE, "transform": axes.get_xaxis_transform()}
    above, below = tails.units[~(tails.k_hat <= high)], tails.units[tails.k_hat < low]
    axes.plot(above, numpy.ones(len(above)), marker="^", color=JOINT, **at_edge)
    axes.plot(below, numpy.zeros(len(below)), marker="v", color=MARGINAL, **at_edge)


def _looked_at(tails: UnitTails) -> str:
    """Count the units that were looked at, and those that are bad."""
    looked, bad = len(tails.units), int((~(tails.k_hat <= K_GOOD)).sum())
    units = f"{tails.num_units} unit{'s' if tails.num_units != 1 else ''}"
    which = units if looked == tails.num_units else f"{looked} of {units}, those whose weights vary most"
    return f"{which}; {bad} above {K_GOOD:g}"


def _name_worst(axes: Any, tails: UnitTails, high: float) -> None:
    """Write the numbers of the worst units, if a normal is doubtful for them or worse, beside their points."""
    worst = tails.k_hat.argsort()[::-1][:_WORST]
    for index in worst[tails.k_hat[worst] > _DOUBTFUL]:
        unit, height = int(tails.units[index]), min(float(tails.k_hat[index]), high - 0.02)
        right = unit > 0.9 * tails.num_units
        axes.annotate(
            str(unit),
            (unit, height),
            (-4 if right else 4, 0),
            textcoords="offset points",
            fontsize=7,
            ha="right" if right else "left",
            va="center",
        )
