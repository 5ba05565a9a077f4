"""The figure of an ecological inference: shares of all voters, and of each precinct, beside the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from laplace_amort.examples.ecological import CHOICES, RACES
from laplace_amort.examples.ecological_scores import LEAST_VOTERS, TableEstimates
from laplace_amort.plots.style import GREEN, JOINT, MARGINAL, PURPLE, RAW, REFERENCE, blank_figure, style
from laplace_amort.types import to_numpy

__all__ = ["tables_figure"]

# The last of the estimates is the one that the figure is about.
_LAST = MARGINAL, "o"
_OTHERS = (RAW, "s"), (GREEN, "^"), (JOINT, "D"), (PURPLE, "v")
_FULL = {"natam": "Native American", "none": "neither", "dem": "Democrat", "rep": "Republican"}


def tables_figure(
    estimates: Sequence[TableEstimates], truth: Tensor, *, choice: int = 1, races: Sequence[str] = RACES
) -> Any:
    """Draw the shares of all voters with 90 % intervals, and the shares in precincts against the truth.

    The upper row has a panel for each choice, with the truth as a line. The lower has one for each race: precincts by
    the true share of one choice, as the last of ``estimates`` has it, larger where there are more voters; intervals
    that miss the truth are drawn in full color.

    :param estimates: to compare, the one for the lower row last.
    :param Tensor truth: the tables, counts ``(N, R, C)``.
    :param int choice: that the lower row shows.
    :param races: names.
    :return: a ``matplotlib.figure.Figure``, which belongs to no window.
    :raises ImportError: if matplotlib is not installed.
    """
    with style():
        figure = blank_figure(7.2, 2.2 + 0.13 * len(races) * len(estimates) + 2.5)
        upper, lower = figure.subfigures(2, 1, height_ratios=[1.1 + 0.13 * len(races) * len(estimates), 2.5])
        panels = upper.subplots(1, len(CHOICES), sharey=True, squeeze=False)[0]
        for c, axes in enumerate(panels):
            _draw_overall(axes, estimates, truth, c)
            axes.set_title(_full(CHOICES[c]))
            axes.set_xlabel("share of the race's voters (%)")
        panels[0].set_yticks(range(len(races)), [_full(race) for race in races])
        panels[0].set_ylim(len(races) - 0.4, -0.6)
        shown = panels[0].get_legend_handles_labels()
        upper.legend(*shown, loc="outside upper center", ncols=min(len(shown[0]), 5), columnspacing=1.2, frameon=False)
        for r, axes in enumerate(lower.subplots(1, len(races), squeeze=False)[0]):
            held, of = _draw_precincts(axes, estimates[-1], truth, r, choice)
            axes.set_title(f"{_full(races[r])}, {_full(CHOICES[choice])}\n{held} of {of} in their intervals")
            axes.set_xlabel("true share in the precinct (%)")
            if r == 0:
                axes.set_ylabel(f"estimate, 90 % interval (%)\n{estimates[-1].label}")
    return figure


def _draw_overall(axes: Any, estimates: Sequence[TableEstimates], truth: Tensor, choice: int) -> None:
    """Estimates of one choice, a row for each race; the truth is a line across the row."""
    shares = to_numpy(100 * truth[:, :, choice].sum(0) / truth.sum((0, 2)))
    rows = numpy.arange(len(shares))
    axes.vlines(shares, rows - 0.42, rows + 0.42, color=REFERENCE, linewidth=1.3, label="truth", zorder=1)
    for at, found in enumerate(estimates):
        low, high = (to_numpy(100 * end[:, choice]) for end in found.overall_interval())
        center = to_numpy(100 * found.overall.mean(0)[:, choice])
        color, marker = _LAST if found is estimates[-1] else _OTHERS[at % len(_OTHERS)]
        height = rows + 0.6 * ((at + 0.5) / len(estimates) - 0.5)
        axes.errorbar(
            center,
            height,
            xerr=numpy.clip([center - low, high - center], 0, None),
            color=color,
            marker=marker,
            markersize=3.5,
            elinewidth=1.2,
            linestyle="none",
            label=found.label,
            zorder=2,
        )
    for row in rows[1:]:
        axes.axhline(row - 0.5, color=RAW, linewidth=0.4, zorder=0)
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=5)


def _draw_precincts(axes: Any, found: TableEstimates, truth: Tensor, race: int, choice: int) -> tuple[int, int]:
    """Every precinct with enough voters of a race: estimate and interval against the truth; how many intervals hold."""
    voters = truth[:, race].sum(-1)
    enough = voters >= LEAST_VOTERS
    actual = truth[enough, race, choice] / voters[enough]
    center, low, high = (part[enough, race, choice] for part in (found.mean, found.low, found.high))
    missed = (actual < low) | (actual > high)
    x, y, below, above = (to_numpy(100 * part) for part in (actual, center, low, high))
    size = to_numpy(4 + 30 * (voters[enough] / voters.max().clamp(min=1)))
    for some, color, alpha in ((~missed, MARGINAL, 0.3), (missed, JOINT, 0.9)):
        index = some.cpu().numpy()
        axes.vlines(x[index], below[index], above[index], color=color, alpha=alpha, linewidth=0.7)
        axes.scatter(x[index], y[index], s=size[index], color=color, alpha=min(1.0, 2 * alpha), linewidths=0)
    ends = [float(torch.stack([low, actual]).min()) * 100, float(torch.stack([high, actual]).max()) * 100]
    axes.plot(ends, ends, color=REFERENCE, linewidth=0.8, zorder=0)
    axes.locator_params(nbins=5)
    return int((~missed).sum()), len(missed)


def _full(name: str) -> str:
    return _FULL.get(name, name)
