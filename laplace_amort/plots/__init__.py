"""Figures of a fit, of its posterior, and of what to believe of it. Matplotlib is imported when one is drawn.

Each takes what :func:`laplace_amort.fit` returned and returns a ``matplotlib.figure.Figure``, which belongs to no
window and to no ``pyplot`` state: in a notebook it shows itself, and :func:`save_figure` writes it to a file.
"""

from laplace_amort.plots.fit import arrowhead_figure, history_figure
from laplace_amort.plots.globals import marginals_figure, pairs_figure
from laplace_amort.plots.style import require_matplotlib, save_figure
from laplace_amort.plots.units import k_hat_figure, units_figure

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
