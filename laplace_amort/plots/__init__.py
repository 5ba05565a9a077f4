"""Figures of a fit, of its posterior, and of what to believe of it."""

from laplace_amort.plots.fit import arrowhead_figure, history_figure
from laplace_amort.plots.globals import marginals_figure, pairs_figure
from laplace_amort.plots.style import require_matplotlib, save_figure
from laplace_amort.plots.tails import k_hat_figure
from laplace_amort.plots.units import units_figure

__all__ = [
    "arrowhead_figure",
    "history_figure",
    "k_hat_figure",
    "marginals_figure",
    "pairs_figure",
    "require_matplotlib",
    "save_figure",
    "units_figure",
]
