"""Figures of how a fit went: its history, and the precision that it ended with."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy

from laplace_amort.fitting import CHECK, FitResult
from laplace_amort.guide import LaplaceGaussian
from laplace_amort.linalg import Arrowhead, RepairReport
from laplace_amort.plots.numbers import require_fit
from laplace_amort.plots.style import (
    GREEN,
    JOINT,
    MARGINAL,
    PURPLE,
    RAW,
    REFERENCE,
    blank_figure,
    require_matplotlib,
    style,
)
from laplace_amort.types import Vector, element_name, to_numpy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["arrowhead_figure", "history_figure"]

_STAGES = MARGINAL, JOINT, GREEN, PURPLE
_MARKERS = "o", "s", "D", "^"
_FAR = 1e9  # nats; of a step that went farther off, the line leaves the axes
_CELLS = 28  # rows of the matrix that is drawn
_NOTHING = "#E8E8E8"  # zero by structure
_LABELED = 14  # globals that are named


def history_figure(result: Any) -> Figure:
    """Draw how a fit went: by evaluation, what was missing to each stage's best value, and the gradient.

    Points where the objective did not exist are crosses at the top.

    :param FitResult result: what :func:`laplace_amort.fit` returned.
    :return: a ``matplotlib.figure.Figure``, which belongs to no window.
    :raises ImportError: if matplotlib is not installed.
    :raises TypeError: if ``result`` is no result of a fit.
    :raises ValueError: if it has no history.
    """
    require_matplotlib()
    require_fit(result)
    if not result.history:
        raise ValueError(f"there is no history to draw: {result.status}")
    stages = list(dict.fromkeys(step.stage for step in result.history))
    with style():
        figure = blank_figure(6.0, 4.2)
        upper, lower = figure.subplots(2, 1, sharex=True)
        for stage, color, marker in zip(stages, itertools.cycle(_STAGES), itertools.cycle(_MARKERS), strict=False):
            at = numpy.array([i for i, step in enumerate(result.history, 1) if step.stage == stage])
            steps = [step for step in result.history if step.stage == stage]
            values, norms = (numpy.array([getattr(s, name) for s in steps]) for name in ("objective", "gradient_norm"))
            there, finite = numpy.isfinite(values), numpy.isfinite(norms)
            missing = values[there].max(initial=-numpy.inf) - values
            # Checks between rounds are no sequence.
            line = "none" if stage == CHECK else "-"
            drawn = {"color": color, "marker": marker, "markersize": 3, "linestyle": line, "linewidth": 0.6}
            upper.plot(at[there], missing[there], label=stage, **drawn)
            top = numpy.full((~there).sum(), 0.96)
            upper.plot(at[~there], top, "x", color=color, transform=upper.get_xaxis_transform())
            lower.plot(at[finite], norms[finite], **drawn)
        upper.set_yscale("symlog", linthresh=1e-3, linscale=2)
        upper.yaxis.get_major_locator().set_params(numticks=7)
        upper.set_ylim(bottom=0)
        upper.set_ylim(top=min(upper.get_ylim()[1], _FAR))
        upper.set_ylabel("best of the stage \N{MINUS SIGN} objective (nats)")
        upper.legend(frameon=False)
        upper.set_title(f"{result.status.name}, {result.seconds:.3g} s", loc="left")
        if any(0 < step.gradient_norm < math.inf for step in result.history):
            lower.set_yscale("log")
        lower.set_ylabel("gradient (posterior sd)")
        lower.set_xlabel("evaluation")
        lower.xaxis.get_major_locator().set_params(integer=True)
    return figure


def arrowhead_figure(precision: Any) -> Figure:
    r"""Draw the precision of a fit, and what was repaired in it.

    At the left the matrix, divided by the roots of its diagonal, so that every element is between -1 and 1: the head of
    the globals, the borders, and the tails of as many units as there is room for. Gray is zero because units are
    independent given the globals. At the right, of a fit, the smallest eigenvalues before and after the repair: of the
    globals as shares of their information with all units known, and of the units in hundredths of their diagonals.

    :param precision: what :func:`laplace_amort.fit` returned, its ``gaussian``, or an
        :class:`~laplace_amort.Arrowhead`, which knows of no repair.
    :return: a ``matplotlib.figure.Figure``, which belongs to no window.
    :raises ImportError: if matplotlib is not installed.
    :raises TypeError: if ``precision`` is something else.
    :raises ValueError: if there is no posterior, or if it is a batch of arrowheads.

    Example::

        >>> import torch
        >>> figure = arrowhead_figure(Arrowhead(torch.eye(2), torch.zeros(3, 1, 2), torch.ones(3, 1, 1)))
        >>> figure.axes[0].get_xlabel()
        '2 globals, then 3 units, 1 each'
    """
    require_matplotlib()
    arrowhead, names, reports = _parts(precision)
    if arrowhead.head.dim() != 2:
        raise ValueError(
            f"this is a batch of arrowheads, of shape {tuple(arrowhead.head.shape[:-2])}; draw one of them:\n"
            "    Arrowhead(head[0], border[0], tail[0])"
        )
    with style():
        figure = blank_figure(7.4 if reports else 4.0, 3.6)
        axes = figure.subplots(1, 2, squeeze=False, width_ratios=[1.25, 1])[0] if reports else [figure.subplots()]
        _draw_matrix(figure, axes[0], arrowhead, names)
        if reports:
            _draw_repairs(axes[1], reports)
    return figure


def _parts(precision: Any) -> tuple[Arrowhead, list[str], dict[str, RepairReport]]:
    """Find the arrowhead, the names of its globals, and the reports of repairs by block."""
    if isinstance(precision, Arrowhead):
        return precision, [], {}
    gaussian = precision.gaussian if isinstance(precision, FitResult) else precision
    if gaussian is None:
        raise ValueError(f"there is no posterior: {precision.status}")
    if not isinstance(gaussian, LaplaceGaussian):
        raise TypeError(
            f"this figure is one of a fit, its gaussian or an Arrowhead, and got {type(precision).__name__}:\n"
            "    arrowhead_figure(fit(model, *args))"
        )
    names = []
    for name, site in gaussian.unit_model.layout.global_sites.items():
        names += [element_name(name, index) for index in numpy.ndindex(*site.shape)]
    return gaussian.precision, names, {"globals": gaussian.head_report, "units": gaussian.tail_report}


def scaled_matrix(arrowhead: Arrowhead, num_units: int) -> Vector:
    """Return the dense matrix of the globals and the first units, with a diagonal of ones; NaN off the arrowhead."""
    d, k = arrowhead.global_dim, arrowhead.local_dim
    head, border, tail = (
        to_numpy(part) for part in (arrowhead.head, arrowhead.border[:num_units], arrowhead.tail[:num_units])
    )
    size = d + num_units * k
    matrix = numpy.full((size, size), numpy.nan)
    matrix[:d, :d] = head
    for unit in range(num_units):  # a figure has room for a few
        at = slice(d + unit * k, d + (unit + 1) * k)
        matrix[at, :d], matrix[:d, at], matrix[at, at] = border[unit], border[unit].T, tail[unit]
    scale = numpy.sqrt(numpy.diag(matrix))
    scaled: Vector = matrix / scale / scale[:, None]
    return scaled


def _draw_matrix(figure: Any, axes: Any, arrowhead: Arrowhead, names: list[str]) -> None:
    d, k, n = arrowhead.global_dim, arrowhead.local_dim, arrowhead.num_units
    shown = min(n, max(3, (_CELLS - d) // max(k, 1)))
    matplotlib = require_matplotlib()
    signs = matplotlib.colors.LinearSegmentedColormap.from_list("signs", [JOINT, "white", MARGINAL])
    colors = signs.with_extremes(bad=_NOTHING)
    image = axes.imshow(scaled_matrix(arrowhead, shown), cmap=colors, vmin=-1, vmax=1, interpolation="nearest")
    axes.axhline(d - 0.5, color=REFERENCE, linewidth=0.8)
    axes.axvline(d - 0.5, color=REFERENCE, linewidth=0.8)
    if names and d <= _LABELED:
        axes.set_yticks(range(d), names, fontsize=6)
    else:
        axes.set_yticks([])
    axes.set_xticks([])
    axes.spines[:].set_visible(True)
    of_units = f"{shown} of {n} units" if shown < n else f"{n} unit{'s' if n != 1 else ''}"
    axes.set_xlabel(f"{d} global{'s' if d != 1 else ''}, then {of_units}, {k} each")
    axes.set_title("precision, scaled to a diagonal of 1", loc="left")
    bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=18, ticks=[-1, -0.5, 0, 0.5, 1])
    bar.outline.set_linewidth(0.5)


def _draw_repairs(axes: Any, reports: dict[str, RepairReport]) -> None:
    """Draw of each kind of block the smallest eigenvalue before and after, on an axis that has zero."""
    units = {
        "globals": "shares of their information\nwith all units known",
        "units": "in hundredths of\ntheir diagonals",
    }
    values = [value for report in reports.values() for value in (report.smallest_before, report.smallest_after)]
    sizes = [abs(value) for value in values if math.isfinite(value) and value]
    axes.axvline(0, color=REFERENCE, linewidth=0.6)
    for row, report in enumerate(reports.values()):
        before, after = report.smallest_before, report.smallest_after
        if math.isfinite(before):
            axes.plot([before, after], [row, row], color=RAW, linewidth=1.2, zorder=1)
            axes.plot(before, row, "o", color=JOINT, markersize=7, markerfacecolor="white", markeredgewidth=1.4)
            axes.plot(after, row, "o", color=MARGINAL, markersize=4)
    axes.set_xscale("symlog", linthresh=10.0 ** math.floor(math.log10(min([*sizes, 1.0]))))
    axes.xaxis.get_major_locator().set_params(numticks=5)
    labels = [f"{name}: {_in_words(report)},\n{units[name]}" for name, report in reports.items()]
    axes.set_yticks(range(len(reports)), labels)
    axes.set_ylim(len(reports) - 0.5, -0.5)
    axes.set_xlabel("smallest eigenvalue")
    axes.set_title("before (open) and after repair", loc="left")


def _in_words(report: RepairReport) -> str:
    if not math.isfinite(report.smallest_before):
        return "there are none"
    words = f"{report.num_repaired} of {report.num_matrices} repaired"
    return words + (f",\nlargest relative change {report.relative_change:.3g}" if report.num_repaired else "")
