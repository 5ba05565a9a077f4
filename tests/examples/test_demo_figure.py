"""The plots of the demo: complete, legible, and of the densities that they claim."""

import numpy
import pytest
from helpers.demo_results import LABELS, short_results
from helpers.figures import misplaced_texts

from laplace_amort import plots
from laplace_amort.examples import demo
from laplace_amort.examples import demo_figure as demo_plots


@pytest.fixture(scope="module")
def result():
    return short_results()


@pytest.mark.parametrize("name", demo.PROBLEMS)
def test_the_plot_is_complete_and_nothing_overlaps(result, name, tmp_path):
    figure = plots.demo_figure(result[name])
    path = tmp_path / "plot.png"
    plots.save_figure(figure, path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    found = result[name]
    labels = [label for label, _, _ in found.numbers("global")]
    axes = figure.get_axes()
    assert [a.get_title() for a in axes if a.get_title()] == labels
    (history,) = (a for a in axes if a.get_ylabel() == "ELBO \N{MINUS SIGN} log evidence (nats)")
    assert len(history.get_lines()) == 7  # of each guide its steps and their running mean; the log evidence
    for local, label in found.problem.locals_.items():
        (units,) = (a for a in axes if a.get_ylabel() == f"{local}, {label}")
        assert units.get_xlabel().startswith(found.problem.unit)
        assert len(units.containers) == 3  # the reference and either head
    (legend,) = (a.get_legend() for a in axes if a.get_legend())
    texts = [text.get_text() for text in legend.get_texts()]
    assert [text for text in texts if text in LABELS] == LABELS
    assert misplaced_texts(figure) == []
    axes[0].set_title("a title that is far too long for its little panel")
    assert misplaced_texts(figure) != []


def test_densities_integrate_to_one(result):
    figure = plots.demo_figure(result["epil"])
    sigma = next(axes for axes in figure.get_axes() if axes.get_title() == "sigma")
    curves = [line for line in sigma.get_lines() if len(line.get_xdata()) > 100]
    assert len(curves) == 3
    for curve in curves:
        area = numpy.trapezoid(curve.get_ydata(), curve.get_xdata())
        assert area == pytest.approx(1, abs=1e-3)


def test_running_mean_keeps_a_line_and_its_ends():
    line = numpy.arange(40.0)
    smooth = demo_plots._running_mean(line, 15)
    assert smooth[7:-7] == pytest.approx(line[7:-7])
    assert smooth[0] == pytest.approx(line[:8].mean())
