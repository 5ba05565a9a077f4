"""The figures as a whole: none of them needs a window, overlaps itself, or draws what is no fit."""

import sys

import pytest
import torch
from helpers.figures import misplaced_texts
from helpers.plot_fits import counts_fit, gaussian_fit, table_fit

from laplace_amort import AutoLaplaceFamily, fit, plots
from laplace_amort.examples import datasets, epil
from laplace_amort.plots.style import STYLE

OF_A_FIT = [
    plots.marginals_figure,
    plots.pairs_figure,
    plots.units_figure,
    plots.k_hat_figure,
    plots.history_figure,
    plots.arrowhead_figure,
]


@pytest.fixture(scope="module")
def epil_fit():
    torch.set_default_dtype(torch.float64)
    return fit(epil.model, AutoLaplaceFamily(epil.model), *epil.data())


FITS = {
    "one global": gaussian_fit,
    "two globals": counts_fit,
    "one unit": lambda: counts_fit(1),
    "two latents a unit": lambda: table_fit("binomial_slopes"),
    "positive units": lambda: table_fit("gamma_rates"),
    "a simplex": lambda: table_fit("categorical_probs"),
}


@pytest.mark.parametrize("draw", OF_A_FIT, ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("name", FITS)
def test_texts_are_inside_and_apart(name, draw):
    assert misplaced_texts(draw(FITS[name]())) == []


def test_with_a_reference_of_the_datasets_and_seven_globals(epil_fit):
    reference = datasets.reference("epil")
    figures = [plots.marginals_figure(epil_fit, reference), plots.units_figure(epil_fit, reference=reference)]
    for figure in [*figures, plots.pairs_figure(epil_fit), plots.arrowhead_figure(epil_fit)]:
        assert misplaced_texts(figure) == []


@pytest.mark.parametrize("draw", OF_A_FIT, ids=lambda draw: draw.__name__)
def test_no_window_is_needed_and_no_style_stays(draw, monkeypatch, tmp_path):
    import matplotlib

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it would raise
    before = {key: matplotlib.rcParams[key] for key in STYLE}
    figure = draw(gaussian_fit())
    assert {key: matplotlib.rcParams[key] for key in STYLE} == before != STYLE
    assert figure.canvas.manager is None
    plots.save_figure(figure, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("draw", OF_A_FIT, ids=lambda draw: draw.__name__)
def test_what_is_no_fit_is_refused(draw):
    with pytest.raises(TypeError, match=r"got AutoLaplaceFamily(.|\n)*fit\(model, \*args\)"):
        draw(AutoLaplaceFamily(epil.model))


@pytest.mark.parametrize("draw", OF_A_FIT, ids=lambda draw: draw.__name__)
def test_without_matplotlib_the_extra_is_named(draw, monkeypatch):
    result = gaussian_fit()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "laplace_amort\[plots\]"'):
        draw(result)
