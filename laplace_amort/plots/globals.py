"""Figures of the globals: their marginals and their pairs, with the Gaussian beside the posterior."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy

from laplace_amort.plots.densities import density, gaussian_contour, gaussian_density, gaussian_points
from laplace_amort.plots.numbers import (
    Column,
    columns,
    free_columns,
    posterior_of,
    reference_values,
    with_reference,
)
from laplace_amort.plots.style import JOINT, MARGINAL, REFERENCE, blank_figure, note_left_out, require_matplotlib, style
from laplace_amort.posterior import Posterior, weighted_quantiles
from laplace_amort.types import Vector

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["marginals_figure", "pairs_figure"]

Space = Literal["constrained", "unconstrained"]

_COLUMNS = 4  # of panels, at most
_ROWS = 6
_PAIRED = 12  # globals in a figure of pairs
_SHOWN = 1500  # points in a panel of pairs
_PROBABILITIES = 0.05, 0.5, 0.95
_Z = 1.6448536269514722  # of the outer two
_LEVELS = {0.5: "-", 0.9: (0, (4, 1.5))}  # of the Gaussian's contours, and their lines
_SEEN = 0.002, 0.998  # quantiles of the draws where axes end
_BEYOND_Z = 2.0  # standard deviations of the Gaussian that are always seen: it is not to squeeze the draws
_TALLEST = 1.8  # a Gaussian's peak, as a multiple of the posterior's, that is drawn in full

_POSTERIOR_LINE: dict[str, Any] = {"color": MARGINAL, "linestyle": "-", "linewidth": 1.8, "zorder": 3}
_GAUSSIAN_LINE: dict[str, Any] = {"color": JOINT, "linestyle": (0, (4, 1.5)), "linewidth": 1.4, "zorder": 4}
_REFERENCE_LINE: dict[str, Any] = {"color": REFERENCE, "linestyle": "-", "linewidth": 0.8, "zorder": 2}
_SHADE: dict[str, Any] = {"color": REFERENCE, "alpha": 0.12, "linewidth": 0}


def marginals_figure(result: Any, reference: Any = None, names: Sequence[str] | None = None) -> Figure:
    """Draw the marginal density of every global: of the posterior, of the Gaussian, and of a reference.

    Below the curves are 5, 50 and 95 % quantiles. Densities of draws are smoothed in unconstrained space, by kernels
    that leave mean and variance there as they are. Of an ELBO the posterior is the Gaussian, and drawn once.

    Do not read details of a curve as more than they are where it comes from few draws: ``print(result.posterior)`` has
    their number.

    :param FitResult result: what :func:`laplace_amort.fit` returned.
    :param reference: to compare with: another result of ``fit``; a dict of draws ``(S, *shape)`` by site, such as
        ``mcmc.get_samples()``; an object of ArviZ with a posterior; or one of
        ``laplace_amort.examples.datasets.reference``, of which 5 to 95 % are shaded.
    :param names: global sites to draw; all by default, of which the first 24 elements are drawn.
    :return: a ``matplotlib.figure.Figure``, which belongs to no window.
    :raises ImportError: if matplotlib is not installed.
    :raises TypeError: if ``result`` or ``reference`` is something else.
    :raises ValueError: if there is no posterior or no global, or the reference has none of them or in other shapes.

    Example::

        >>> import pyro, torch, pyro.distributions as dist
        >>> from laplace_amort import fit
        >>> def model(z):
        ...     mu = pyro.sample("mu", dist.Normal(0., 1.))
        ...     with pyro.plate("units", len(z)):
        ...         y = pyro.sample("y", dist.Normal(mu, 1.))
        ...         pyro.sample("z", dist.Normal(y, 1.), obs=z)
        >>> result = fit(model, torch.tensor([1., 3.]))
        >>> figure = marginals_figure(result, reference={"mu": torch.randn(500) / 2 ** 0.5 + 1})
        >>> [axes.get_title() for axes in figure.axes]
        ['mu']
    """
    require_matplotlib()
    posterior = posterior_of(result)
    found = columns(posterior, names)
    known = _references(reference, posterior, found)
    shown = found[: _COLUMNS * _ROWS]
    down = -(-len(shown) // _COLUMNS)
    across = -(-len(shown) // down)
    with style():
        figure = blank_figure(max(2.0 * across, 3.4), 1.7 * down + 0.4)
        cells = figure.subplots(down, across, squeeze=False).flatten()
        for axes, column in zip(cells, shown, strict=False):
            _draw_marginal(axes, posterior, column, known.get(column.label))
        for axes in cells[len(shown) :]:
            axes.remove()
        note_left_out(figure, len(shown), len(found), "globals")
        _draw_legend(figure, _lines_of(posterior), known)
    return figure


def pairs_figure(result: Any, names: Sequence[str] | None = None, space: Space = "constrained") -> Figure:
    """Draw every pair of globals: the draws of the posterior, and 50 and 90 % contours of the Gaussian.

    The area of a point is its importance weight. In constrained space the contours are the images of the ellipses: they
    hold the same mass.

    Do not look for contours of a site whose support is not element by element, such as a simplex: they are drawn in
    unconstrained space alone.

    :param FitResult result: what :func:`laplace_amort.fit` returned.
    :param names: global sites to draw; all by default, of which the first 12 elements are drawn.
    :param str space: "constrained", as the model has them, or "unconstrained", where the contours are ellipses.
    :return: a ``matplotlib.figure.Figure``, which belongs to no window.
    :raises ImportError: if matplotlib is not installed.
    :raises TypeError: if ``result`` is no result of a fit.
    :raises ValueError: if there is no posterior, no global, or no such space.
    """
    require_matplotlib()
    if space not in _SPACES:
        raise ValueError(f"space is {space!r}; it is one of {', '.join(map(repr, _SPACES))}")
    posterior = posterior_of(result)
    found = _SPACES[space](posterior, names)
    shown = found[:_PAIRED]
    d = len(shown)
    size = max(0.95, min(2.2, 7.5 / d)) * d
    with style():
        figure = blank_figure(max(size, 3.4) + 0.4, max(size, 2.2) + 0.3)
        grid = figure.subplots(d, d, squeeze=False, sharex="col")
        for row, column in itertools.product(range(d), range(d)):
            axes = grid[row, column]
            if row == column:
                _draw_density(axes, posterior, shown[row])
            elif row > column:
                _draw_pair(axes, posterior, shown[column], shown[row])
            else:
                axes.set_axis_off()
            _label_pair(axes, shown, row, column)
        note_left_out(figure, d, len(found), "globals")
        _pairs_legend(figure, posterior, d)
    return figure


def _lines_of(posterior: Posterior) -> dict[str, dict[str, Any]]:
    gaussian = {"Gaussian approximation": _GAUSSIAN_LINE}
    return gaussian if posterior.is_gaussian else {"posterior": _POSTERIOR_LINE, **gaussian}


def _references(reference: Any, posterior: Posterior, found: list[Column]) -> dict[str, Any]:
    """Find what a reference says of each column, by label: a column of draws, or three quantiles."""
    if reference is None:
        return {}
    shapes = {name: tuple(value.shape) for name, value in posterior.gaussian.median().items()}
    sites = {column.site for column in found}
    values = {name: reference_values(reference, name, shapes[name]) for name in sites}
    if all(value is None for value in values.values()):
        raise ValueError(f"the reference has no site of {', '.join(sorted(map(repr, sites)))}")
    known: dict[str, Any] = {}
    for column in found:
        value = values[column.site]
        if isinstance(value, numpy.ndarray):
            known[column.label] = with_reference(column, posterior.gaussian, value)
        elif value is not None:
            parts = (value.q05, value.q50, value.q95)
            known[column.label] = numpy.array([float(part.reshape(-1)[column.position]) for part in parts])
    return known


def _draw_marginal(axes: Any, posterior: Posterior, column: Column, known: Any) -> None:
    """Draw densities above, quantiles below; what is seen is where the posterior and the reference are."""
    intervals = _draw_density(axes, posterior, column)
    low, high = axes.get_xlim()
    top = axes.get_ylim()[1]
    if isinstance(known, Column):
        points, values = density(known)
        axes.fill_between(points, values, **_SHADE)
        axes.plot(points, values, **_REFERENCE_LINE)
        intervals.append((weighted_quantiles(known.values, known.weights, _PROBABILITIES), REFERENCE))
        ends, top = weighted_quantiles(known.values, known.weights, _SEEN), max(top, 1.06 * values.max())
        low, high = min(low, ends[0]), max(high, ends[1])
    elif known is not None:
        axes.axvspan(known[0], known[2], **_SHADE)
        intervals.append((known, REFERENCE))
        margin = 0.1 * (known[2] - known[0])
        low, high = min(low, known[0] - margin), max(high, known[2] + margin)
    for row, (marks, color) in enumerate(intervals):
        height = -top * (0.09 + 0.09 * row)
        axes.plot(marks[[0, 2]], [height, height], color=color, linewidth=1.2, solid_capstyle="butt")
        axes.plot(marks, [height] * 3, "|", color=color, markersize=4, markeredgewidth=1.0)
    axes.axhline(0, color=REFERENCE, linewidth=0.4)
    axes.set_xlim(low, high)
    axes.set_ylim(-top * (0.09 + 0.09 * len(intervals)), top)
    axes.set_title(column.label)
    axes.locator_params(axis="x", nbins=4)


def _draw_density(axes: Any, posterior: Posterior, column: Column) -> list[tuple[Vector, str]]:
    """Draw the posterior and the Gaussian of one column; return the quantiles of both with their colors."""
    intervals, ends, tops = [], [], []
    is_gaussian = posterior.is_gaussian and column.coordinate is not None
    if not is_gaussian:
        points, values = density(column)
        axes.plot(points, values, **_POSTERIOR_LINE)
        intervals.append((weighted_quantiles(column.values, column.weights, _PROBABILITIES), MARGINAL))
        ends.append(weighted_quantiles(column.values, column.weights, _SEEN))
        tops.append(values.max())
    if column.coordinate is not None:
        points, values = gaussian_density(posterior.gaussian, column)
        axes.plot(points, values, **_GAUSSIAN_LINE)
        intervals.append((gaussian_points(posterior.gaussian, column, numpy.array([-_Z, 0.0, _Z])), JOINT))
        far = 3.0 if is_gaussian else _BEYOND_Z
        ends.append(gaussian_points(posterior.gaussian, column, numpy.array([-far, far])))
        tops.append(min(values.max(), _TALLEST * tops[0]) if tops else values.max())
    axes.set_xlim(min(e.min() for e in ends), max(e.max() for e in ends))
    axes.set_ylim(0, 1.06 * max(tops))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    return intervals


def _draw_pair(axes: Any, posterior: Posterior, across: Column, up: Column) -> None:
    order = numpy.random.default_rng(0).permutation(len(across.weights))[:_SHOWN]  # any: areas tell the weights
    area = 5 * across.weights[order] * len(across.weights)
    axes.scatter(
        across.values[order], up.values[order], s=area.clip(max=60), color=MARGINAL, alpha=0.35, linewidth=0, zorder=2
    )
    if across.coordinate is not None and up.coordinate is not None:
        for mass, line in _LEVELS.items():
            contour = gaussian_contour(posterior.gaussian, across, up, mass)
            axes.plot(*contour, color=JOINT, linestyle=line, linewidth=1.2, zorder=3)
    ends = weighted_quantiles(up.values, up.weights, _SEEN)
    margin = 0.08 * (ends[1] - ends[0])
    axes.set_ylim(ends[0] - margin, ends[1] + margin)


def _label_pair(axes: Any, shown: list[Column], row: int, column: int) -> None:
    """Put names and ticks at the left and below."""
    last = len(shown) - 1
    axes.locator_params(nbins=3 if last < 6 else 2)
    axes.tick_params(labelbottom=row == last, labelleft=column == 0 and row > 0)
    if row == last:
        axes.set_xlabel(shown[column].label)
    if column == 0 and row > 0:
        axes.set_ylabel(shown[row].label)


def _pairs_legend(figure: Any, posterior: Posterior, d: int) -> None:
    line = require_matplotlib().lines.Line2D
    entries = {name: line([], [], **settings) for name, settings in _lines_of(posterior).items()}
    if d > 1:
        dots = {"color": MARGINAL, "marker": "o", "linestyle": "none", "markersize": 3, "alpha": 0.6}
        entries = {"draw, area its weight": line([], [], **dots)}
        entries |= {
            f"Gaussian approximation, {100 * mass:g} %": line([], [], color=JOINT, linestyle=style, linewidth=1.2)
            for mass, style in _LEVELS.items()
        }
    legend = figure.legend(entries.values(), entries.keys(), loc="upper right", frameon=False)
    legend.set_in_layout(False)


def _draw_legend(figure: Any, lines: dict[str, dict[str, Any]], known: dict[str, Any]) -> None:
    matplotlib = require_matplotlib()
    line = matplotlib.lines.Line2D
    entries = {name: line([], [], **settings) for name, settings in lines.items()}
    if any(isinstance(value, Column) for value in known.values()):
        entries["reference"] = matplotlib.patches.Patch(facecolor=(0, 0, 0, 0.12), edgecolor=REFERENCE, linewidth=0.8)
    elif known:
        entries["reference, 5 to 95 %"] = matplotlib.patches.Patch(**_SHADE)
    ticks = {"linewidth": 1.2, "marker": "|", "markersize": 5, "color": REFERENCE}
    entries["5, 50, 95 %"] = line([], [], **ticks)
    columns = 2 if figure.get_figwidth() < 5 else len(entries)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False)


_SPACES: dict[str, Callable[[Posterior, Sequence[str] | None], list[Column]]] = {
    "constrained": columns,
    "unconstrained": free_columns,
}
