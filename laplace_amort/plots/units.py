"""The figure of the units: their posteriors in a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
from torch import Tensor

from laplace_amort.plots.numbers import posterior_of, reference_values
from laplace_amort.plots.style import (
    JOINT,
    MARGINAL,
    ON_EDGE,
    RAW,
    REFERENCE,
    blank_figure,
    note_left_out,
    require_matplotlib,
    style,
)
from laplace_amort.posterior import Posterior
from laplace_amort.types import Vector, element_name, to_numpy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["units_figure"]

_DRAWS = 1000  # of each unit, if they are few
_IN_ALL = 2**21  # draws of all units together, by which there are fewer of each
_LEAST = 200  # draws of each, however many units there are
_AT_ONCE = 2**21  # numbers in memory at a time
_PROBABILITIES = 0.05, 0.25, 0.5, 0.75, 0.95
_PANELS = 6
_LABELED = 40  # units that have a tick each


def units_figure(
    result: Any,
    site: str | None = None,
    *,
    reference: Any = None,
    truth: Any = None,
    raw_estimates: tuple[Any, Any] | None = None,
    max_units: int = 200,
) -> Figure:
    """Draw the posterior of every unit: its median, and intervals of 50 and 90 %, sorted by the mean.

    Where there are more units than ``max_units``, those shown are evenly spaced in that order, the first and the last
    among them, and the title says how many are left out. A site with several elements in each unit has a panel for
    each, of at most six, with an order of its own.

    :param FitResult result: what :func:`laplace_amort.fit` returned.
    :param str site: a site in the units; by default the first.
    :param reference: as in :func:`marginals_figure`; drawn beside each unit.
    :param truth: values that data were simulated with, of the shape of the site.
    :param raw_estimates: an estimate of each unit from its own data alone, and its standard error, both of the shape of
        the site; NaN where there is none. Behind the posteriors they show how far units are drawn together.
    :param int max_units: shown at most.
    :return: a ``matplotlib.figure.Figure``, which belongs to no window.
    :raises ImportError: if matplotlib is not installed.
    :raises TypeError: if ``result`` or ``reference`` is something else.
    :raises ValueError: if there is no posterior, or no such site, or if shapes do not fit.
    """
    require_matplotlib()
    if max_units < 2:
        raise ValueError(f"max_units is {max_units}; it takes two to show an order")
    posterior = posterior_of(result)
    name = site if site is not None else next(iter(posterior.gaussian.unit_model.layout.local_sites))
    panels = _Panels(posterior, name, max_units)
    extras = {
        "truth": _extra(panels, "truth", truth),
        "estimate": _extra(panels, "raw_estimates[0]", None if raw_estimates is None else raw_estimates[0]),
        "error": _extra(panels, "raw_estimates[1]", None if raw_estimates is None else raw_estimates[1]),
    }
    draws, known = panels.draws(), None
    if reference is not None:
        known = reference_values(reference, name, panels.shape)
        if known is None:
            raise ValueError(f"the reference has no site '{name}'")
        known = panels.intervals_of_reference(known)
    with style():
        figure = blank_figure(7.0, 0.5 + 2.1 * len(panels.order))
        cells = figure.subplots(len(panels.order), 1, squeeze=False).flatten()
        for panel, axes in enumerate(cells):
            chosen = {key: panels.of(value, panel) for key, value in extras.items() if value is not None}
            beside = None if known is None else known[panel]
            _draw_units(axes, numpy.quantile(draws[panel], _PROBABILITIES, axis=0), beside, chosen)
            _label_units(axes, panels, panel)
        note_left_out(figure, len(panels.order[0]), panels.num_units, f"units of plate '{panels.plate}'")
        _units_legend(figure, cells[0], known is not None, extras)
    return figure


class _Panels:
    """Which units are shown, for each element of a site.

    :param Posterior posterior: of a fit.
    :param str name: of the site.
    :param int max_units: shown at most.
    :raises ValueError: if there is no such site.

    Attributes: ``shape`` of the site, ``num_units``, ``plate``, ``labels`` of the panels, and ``order``, the units that
    are shown in each.
    """

    def __init__(self, posterior: Posterior, name: str, max_units: int) -> None:
        layout = posterior.gaussian.unit_model.layout
        if name not in layout.local_sites:
            known = ", ".join(map(repr, layout.local_sites))
            raise ValueError(
                f"there is no site '{name}' in the units of plate '{layout.frame.name}'; there are {known}"
            )
        self.posterior, self.name = posterior, name
        self.axis, self.plate = posterior.unit_axis(name), layout.frame.name
        mean = posterior.mean()[name]
        self.shape = tuple(mean.shape)
        rest = self.shape[: self.axis] + self.shape[self.axis + 1 :]
        indices = list(numpy.ndindex(*rest))
        self.labels = [element_name(name, index) for index in indices[:_PANELS]]
        self.num_panels = len(indices)
        values = self.flat(to_numpy(mean))
        self.num_units = values.shape[-2]
        shown = numpy.linspace(0, self.num_units - 1, min(max_units, self.num_units)).round().astype(int)
        self.order = [values[:, panel].argsort(kind="stable")[shown] for panel in range(len(self.labels))]

    def flat(self, values: Vector) -> Vector:
        """Return values ``(*, *shape)`` with the units and then the elements of each last, ``(*, N, r)``."""
        extra = values.ndim - len(self.shape)
        moved = numpy.moveaxis(values, self.axis + extra, extra)
        return moved.reshape(*moved.shape[: extra + 1], -1)

    def of(self, values: Vector, panel: int) -> Vector:
        """Return what one panel shows of values ``(*, *shape)``, ``(*, n)``."""
        shown: Vector = self.flat(values)[..., self.order[panel], panel]
        return shown

    def draws(self) -> list[Vector]:
        """Draw the units shown, ``(S, n)`` for each panel; draws of the others are not kept."""
        numbers = max(self.posterior.gaussian.local_loc.numel(), 1)
        number = min(_DRAWS, max(_IN_ALL // numbers, _LEAST))
        size = max(1, min(number, _AT_ONCE // numbers))
        parts: list[list[Vector]] = [[] for _ in self.order]
        for seed, _ in enumerate(range(0, number, size)):
            values = to_numpy(self.posterior.sample_latents(size, self.posterior.seed + seed)[self.name])
            for panel, part in enumerate(parts):
                part.append(self.of(values, panel))
        return [numpy.concatenate(part) for part in parts]

    def intervals_of_reference(self, known: Any) -> list[Vector]:
        """Return 5, 50 and 95 % quantiles of a reference, ``(3, n)`` for each panel."""
        if not isinstance(known, numpy.ndarray):
            stacked = numpy.stack([to_numpy(part) for part in (known.q05, known.q50, known.q95)])
        else:
            stacked = numpy.quantile(known, (0.05, 0.5, 0.95), axis=0)
        return [self.of(stacked, panel) for panel in range(len(self.order))]


def _extra(panels: _Panels, what: str, values: Any) -> Vector | None:
    """Return what a user knows of each unit as numbers.

    :raises ValueError: if it has another shape than the site.
    """
    if values is None:
        return None
    array = to_numpy(values) if isinstance(values, Tensor) else numpy.asarray(values, dtype=float)
    if array.shape != panels.shape:
        raise ValueError(f"{what} has shape {array.shape}, and site '{panels.name}' has {panels.shape}")
    return array


def _draw_units(axes: Any, quantiles: Vector, beside: Vector | None, extras: dict[str, Vector]) -> None:
    """Draw quantiles ``(5, n)`` of the posterior at 0 ... n - 1, and what else there is beside or behind each."""
    at = numpy.arange(quantiles.shape[1])
    shift = 0.0 if beside is None else 0.18
    size = float(numpy.clip(120 / len(at), 0.8, 4))
    if "estimate" in extras:
        raw, error = extras["estimate"], extras.get("error")
        if error is not None:
            there = numpy.isfinite(raw) & numpy.isfinite(error)
            axes.vlines(at[there], (raw - error)[there], (raw + error)[there], color=RAW, alpha=0.4, linewidth=2 * size)
        axes.plot(at, raw, "_", color=RAW, markersize=2 + size, markeredgewidth=1.2)
    axes.vlines(at - shift, quantiles[0], quantiles[4], color=MARGINAL, linewidth=0.25 * size + 0.3)
    axes.vlines(at - shift, quantiles[1], quantiles[3], color=MARGINAL, linewidth=0.6 * size + 0.5)
    axes.plot(at - shift, quantiles[2], "o", color=MARGINAL, markersize=1.1 * size + 0.6)
    if beside is not None:
        axes.vlines(at + shift, beside[0], beside[2], color=REFERENCE, linewidth=0.25 * size + 0.3)
        axes.plot(at + shift, beside[1], "o", color=REFERENCE, markersize=0.9 * size + 0.5)
    if "truth" in extras:
        axes.plot(at, extras["truth"], "x", color=JOINT, markersize=1.2 * size + 1, markeredgewidth=1)
    _limit(axes, at, quantiles if beside is None else numpy.concatenate([quantiles, beside]), extras)


def _limit(axes: Any, at: Any, seen: Vector, extras: dict[str, Vector]) -> None:
    """Let the posteriors fill the axes; raw estimates of units with next to no data are anywhere: arrows say where."""
    low, high = seen.min(), seen.max()
    if "truth" in extras:
        low, high = min(low, numpy.nanmin(extras["truth"])), max(high, numpy.nanmax(extras["truth"]))
    bottom, top = low - 0.05 * (high - low), high + 0.05 * (high - low)
    raw = extras.get("estimate", numpy.full(len(at), numpy.nan))
    there = raw[numpy.isfinite(raw)]
    if len(there):
        bottom = max(min(bottom, there.min()), low - 0.3 * (high - low))
        top = min(max(top, there.max()), high + 0.3 * (high - low))
    for beyond, edge, marker in ((raw < bottom, 0, "v"), (raw > top, 1, "^")):
        level = numpy.full(beyond.sum(), edge)
        axes.plot(at[beyond], level, marker, color=RAW, **ON_EDGE, transform=axes.get_xaxis_transform())
    axes.set_ylim(bottom, top)
    axes.set_xlim(-0.8, len(at) - 0.2)


def _label_units(axes: Any, panels: _Panels, panel: int) -> None:
    label = panels.labels[panel]
    if panel == _PANELS - 1 and panels.num_panels > _PANELS:
        label += f" ({panels.num_panels - _PANELS} more elements are left out)"
    axes.set_ylabel(label)
    order = panels.order[panel]
    if len(order) <= _LABELED:
        axes.set_xticks(numpy.arange(len(order)), [str(unit) for unit in order])
        axes.set_xlabel(f"unit of plate '{panels.plate}', sorted by posterior mean")
    else:
        axes.set_xticks([])
        axes.set_xlabel(f"units of plate '{panels.plate}', sorted by posterior mean")


def _units_legend(figure: Any, axes: Any, has_reference: bool, extras: dict[str, Any]) -> None:
    line = require_matplotlib().lines.Line2D
    entries = {
        "median": line([], [], color=MARGINAL, marker="o", linestyle="none", markersize=4),
        "50 %": line([], [], color=MARGINAL, linewidth=2.4),
        "90 %": line([], [], color=MARGINAL, linewidth=0.9),
    }
    if has_reference:
        entries["reference, 90 %"] = line([], [], color=REFERENCE, marker="o", markersize=3, linewidth=0.9)
    if extras["estimate"] is not None:
        entries["raw estimate ± se"] = line([], [], color=RAW, alpha=0.6, linewidth=3.6)
    if extras["truth"] is not None:
        entries["truth"] = line([], [], color=JOINT, marker="x", linestyle="none", markersize=4)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=len(entries), frameon=False)
