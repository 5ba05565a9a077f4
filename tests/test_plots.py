"""The plots of the demo: complete, legible, and of the densities that they claim."""

import sys

import numpy
import pytest
import torch
from demo_results import LABELS, exact_result, short_results
from fit_models import guide_for, poisson, poisson_counts
from matplotlib.backends.backend_agg import FigureCanvasAgg
from pyro.infer.autoguide.initialization import init_to_value

from laplace_amort import demo, fit, plots


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


def misplaced_texts(figure):
    """Texts that leave the figure or lie on another one."""
    axes = figure.get_axes()
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    texts = [text for a in axes for text in (a.title, a.xaxis.label, a.yaxis.label)]
    for axis, (low, high) in [pair for a in axes for pair in ((a.xaxis, a.get_xlim()), (a.yaxis, a.get_ylim()))]:
        texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    texts += [text for a in axes if a.get_legend() for text in a.get_legend().get_texts()]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text() and t.get_visible()]
    width, height = figure.bbox.width, figure.bbox.height
    outside = [t for t, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]
    overlaps = [f"{t} on {other}" for i, (t, box) in enumerate(boxes) for other, its in boxes[:i] if box.overlaps(its)]
    return outside + overlaps


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
    smooth = plots._running_mean(line, 15)
    assert smooth[7:-7] == pytest.approx(line[7:-7])
    assert smooth[0] == pytest.approx(line[:8].mean())


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "laplace_amort\[plots\]"'):
        plots.demo_figure(exact_result())


def test_history_of_a_fit():
    """Every evaluation is a point, those without an objective are crosses, and infinite gradients are left out."""
    z, values = poisson_counts(), {"mu": torch.tensor(30.0), "tau": torch.tensor(11.0), "y": torch.zeros(40)}
    guide = guide_for(poisson, init_loc_fn=init_to_value(values=values))
    result = fit(poisson, guide, z, starts=3)
    figure = plots.history_figure(result)
    upper, lower = figure.axes
    drawn = sum(len(line.get_xdata()) for line in upper.lines)
    assert drawn == len(result.history)
    assert sum(len(line.get_xdata()) for line in lower.lines) == sum(
        step.gradient_norm < float("inf") for step in result.history
    )
    assert {text.get_text() for text in upper.get_legend().get_texts()} == {step.stage for step in result.history}
    figure.canvas.draw()
