"""The figure of the demo: guides beside a reference posterior."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from laplace_amort.plots.style import (
    BARS,
    JOINT,
    MARGINAL,
    RAW,
    REFERENCE,
    STYLE,
    UNAMORTIZED,
    require_matplotlib,
)
from laplace_amort.types import to_numpy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["demo_figure"]

_COLORS = {"un-amortized": UNAMORTIZED, "joint head": JOINT, "marginal head": MARGINAL}
_LINES: dict[str, dict[str, Any]] = {
    "un-amortized": {"linestyle": (0, (1, 1)), "linewidth": 1.2, "zorder": 4},
    "joint head": {"linestyle": (0, (4, 1.5)), "linewidth": 1.4, "zorder": 3},
    "marginal head": {"linestyle": "-", "linewidth": 1.8, "zorder": 2},
}
_RAW_BARS = {"alpha": 0.4, "linewidth": 3.6}
_COLUMNS = 4
_QUANTILES = 0.05, 0.5, 0.95  # the reference has these


def demo_figure(result: Any) -> Figure:
    """Draw marginals of the globals, a caterpillar of the units and the histories of the ELBO.

    The figure belongs to no window and to no ``pyplot`` state, so it can be drawn without a display.

    :param result: what :func:`laplace_amort.examples.demo.run` returned.
    :return: a ``matplotlib.figure.Figure``.
    :raises ImportError: if matplotlib is not installed.
    """
    matplotlib = require_matplotlib()
    names, locals_ = list(result.numbers("global")), list(result.problem.locals_)
    rows = -(-(len(names) + 1) // _COLUMNS)  # one more cell, for the legend
    with matplotlib.rc_context(STYLE):
        heights = 1.75 * rows, 0.7 + 2.4 * len(locals_)
        figure = matplotlib.figure.Figure(figsize=(8.0, sum(heights)), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
        upper, lower = figure.subfigures(2, 1, height_ratios=heights)
        cells = upper.subplots(rows, _COLUMNS, squeeze=False).flatten()
        for axes, (label, name, index) in zip(cells, names, strict=False):
            _draw_marginal(axes, result, label, name, index)
        for axes in cells[len(names) :]:
            axes.set_axis_off()
        below = lower.subplot_mosaic([[name, "history"] for name in locals_], width_ratios=[2, 1])
        raw_estimates = result.problem.raw_estimates(result.args, result.reference)
        for name in locals_:
            _draw_units(below[name], result, name, raw_estimates[name])
        _draw_history(below["history"], result)
        _draw_legend(cells[-1], matplotlib)
    return figure


def _draw_marginal(axes: Any, result: Any, label: str, name: str, index: int) -> None:
    """The guides' densities over the reference's band; below, 5, 50 and 95 % quantiles of all."""
    summary = result.reference.variables[name]
    quantiles = [float(value.flatten()[index]) for value in (summary.q05, summary.q50, summary.q95)]
    axes.axvspan(quantiles[0], quantiles[2], color=REFERENCE, alpha=0.1, linewidth=0)
    intervals = [(quantiles, REFERENCE)]
    z = torch.linspace(-3.5, 3.5, 301, dtype=torch.float64)
    normal = (-(z**2) / 2).exp() / (2 * torch.pi) ** 0.5
    top = 0.0
    for fit in result.fits:
        values = to_numpy(_quantiles(fit, torch.special.ndtr(z), name, index))
        density = to_numpy(normal) / numpy.gradient(values, to_numpy(z))  # change of variables
        axes.plot(values, density, color=_COLORS[fit.label], **_LINES[fit.label])
        intervals.append((_quantiles(fit, _QUANTILES, name, index).tolist(), _COLORS[fit.label]))
        top = max(top, float(density.max()))
    for row, ((low, middle, high), color) in enumerate(intervals):
        height = -top * (0.1 + 0.1 * row)
        axes.plot([low, high], [height, height], color=color, linewidth=1.2, solid_capstyle="butt")
        axes.plot([low, middle, high], [height] * 3, "|", color=color, markersize=4, markeredgewidth=1.0)
    axes.axhline(0, color=REFERENCE, linewidth=0.4)
    axes.set_ylim(-top * (0.1 + 0.1 * len(intervals)), 1.06 * top)
    axes.set_title(label)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.locator_params(axis="x", nbins=4)


def _quantiles(fit: Any, quantiles: Any, name: str, index: int) -> Tensor:
    return fit.gaussian.quantiles(quantiles)[name].reshape(len(quantiles), -1)[:, index]


def _draw_units(axes: Any, result: Any, name: str, raw_estimates: tuple[Tensor, Tensor]) -> None:
    """Every unit's raw estimate, its reference posterior and those of the last two guides, by the reference mean."""
    summary, fits = result.reference.variables[name], result.fits[-2:]
    order = summary.mean.argsort()
    raw, se, center, spread = (to_numpy(v[order]) for v in (*raw_estimates, summary.mean, summary.sd))
    at = numpy.arange(len(order))
    axes.axhline(0, color=RAW, linewidth=0.6, linestyle=":", zorder=0)
    axes.vlines(at, raw - se, raw + se, color=RAW, **_RAW_BARS)
    axes.plot(at, raw, linestyle="none", marker="_", color=RAW, markersize=3.6, markeredgewidth=1.2)
    posteriors: list[tuple[Any, ...]] = [(center, spread, REFERENCE)]
    posteriors += [(*(to_numpy(v[order]) for v in fit.moments[name]), _COLORS[fit.label]) for fit in fits]
    for column, (mean, sd, color) in enumerate(posteriors):
        axes.errorbar(at + 0.6 * (column / len(fits) - 0.5), mean, yerr=sd, color=color, **BARS)
    low, high = (center - spread).min(), (center + spread).max()
    margin = 0.45 * (high - low)
    _draw_beyond(axes, at, raw, low - margin, high + margin)
    axes.set_xlim(-1, len(order))
    lowest, highest = numpy.nanmin(raw - 1.1 * se), numpy.nanmax(raw + 1.1 * se)
    axes.set_ylim(max(low - margin, lowest), min(high + margin, highest))
    axes.set_xlabel(f"{result.problem.unit}, sorted by posterior mean")
    axes.set_ylabel(f"{name}, {result.problem.locals_[name]}")
    axes.set_xticks([])


def _draw_beyond(axes: Any, at: Any, raw: Any, low: float, high: float) -> None:
    """Mark raw estimates that lie beyond the axes; a unit with next to no data has one anywhere."""
    for beyond, edge, marker in ((raw < low, low, "v"), (raw > high, high, "^")):
        axes.plot(
            at[beyond], numpy.full(beyond.sum(), edge), marker, color=RAW, markersize=5, clip_on=False, in_layout=False
        )


def _draw_history(axes: Any, result: Any) -> None:
    """The ELBO of every step, less the log evidence, on a scale that is linear within a nat and logarithmic past it."""
    evidence = result.reference.log_evidence
    lowest = -10.0
    for fit in result.fits:
        if not fit.elbos:
            continue
        gap = numpy.asarray(fit.elbos) - evidence
        steps = numpy.arange(1, len(gap) + 1)
        color = _COLORS[fit.label]
        axes.plot(steps, gap, color=color, linewidth=0.5, alpha=0.35, zorder=1)
        axes.plot(steps, _running_mean(gap), color=color, **_LINES[fit.label])
        lowest = min(lowest, float(gap.min()))
    axes.axhline(0, color=REFERENCE, linewidth=1.0)
    axes.set_yscale("symlog", linthresh=1.0, linscale=0.8)
    axes.set_ylim(1.5 * lowest, 0.7)
    where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right", "va": "bottom"}
    axes.annotate("log evidence", (1, 0), (0, 2), **where, fontsize=7, in_layout=False)
    decades = [-(10.0**k) for k in range(int(numpy.log10(-lowest)) + 1)]
    ticks = [*sorted(decades), 0.0]
    axes.set_yticks(ticks, [f"\N{MINUS SIGN}{-tick:g}" if tick else "0" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_xlabel("SVI step")
    axes.set_ylabel("ELBO \N{MINUS SIGN} log evidence (nats)")


def _running_mean(values: NDArray[Any], width: int = 15) -> NDArray[Any]:
    """The mean over a centered window, shorter near both ends."""
    total = numpy.concatenate([[0.0], numpy.cumsum(values)])
    at = numpy.arange(len(values))
    low, high = numpy.maximum(at - width // 2, 0), numpy.minimum(at + width // 2 + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _draw_legend(axes: Any, matplotlib: Any) -> None:
    line, patch = matplotlib.lines.Line2D, matplotlib.patches.Patch
    entries: list[tuple[Any, str]] = [(patch(color=REFERENCE, alpha=0.1), "reference, 5 to 95 %")]
    entries += [(line([], [], color=_COLORS[k], **_LINES[k]), k) for k in _COLORS]
    ticks = {"linewidth": 1.2, "marker": "|", "markersize": 5, "color": REFERENCE}
    entries += [(line([], [], **ticks), "5, 50 and 95 % quantiles")]
    entries += [(axes.errorbar([], [], yerr=[], color=REFERENCE, **BARS), "unit, mean ± sd")]
    entries += [(line([], [], color=RAW, **_RAW_BARS), "unit, raw estimate ± se")]
    axes.legend(*zip(*entries, strict=True), loc="center left", frameon=False, borderaxespad=0)
