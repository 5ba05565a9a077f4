"""The history of a fit and its precision, as drawn."""

import dataclasses
import math

import numpy
import pytest
import torch
from helpers.fit_models import guide_for, poisson, poisson_counts
from helpers.plot_fits import counts_fit, gaussian_fit, table_fit
from pyro.infer.autoguide.initialization import init_to_value

from laplace_amort import Arrowhead, RepairReport, fit, plots


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


def test_gradients_that_are_zero_have_no_logarithm():
    steps = [dataclasses.replace(step, gradient_norm=0.0) for step in counts_fit().history]
    _, lower = plots.history_figure(dataclasses.replace(counts_fit(), history=steps)).axes
    assert lower.get_yscale() == "linear"


def test_a_fit_without_a_history_is_refused():
    with pytest.raises(ValueError, match="there is no history to draw"):
        plots.history_figure(dataclasses.replace(counts_fit(), history=[]))


@pytest.mark.parametrize("name", ["binomial_slopes", "gamma_rates"])
def test_the_matrix_is_that_of_the_fit(name):
    result = table_fit(name)
    image = plots.arrowhead_figure(result).axes[0].images[0].get_array()
    precision = result.gaussian.precision
    size = len(image)
    assert size == precision.global_dim + precision.local_dim * (
        min(precision.num_units, max(3, (28 - precision.global_dim) // precision.local_dim))
    )
    dense = precision.to_dense().detach().numpy()[:size, :size]
    scale = numpy.diag(dense) ** -0.5
    expected = scale[:, None] * dense * scale
    shown = image.filled(0.0)
    assert shown == pytest.approx(expected, abs=1e-12)
    assert not expected[image.mask].any()  # what is gray is zero by structure
    units = numpy.arange(size) >= precision.global_dim
    block = (numpy.arange(size) - precision.global_dim) // precision.local_dim
    apart = units & units[:, None] & (block != block[:, None])
    assert (image.mask == apart).all()


def test_globals_are_named_and_units_counted():
    axes = plots.arrowhead_figure(table_fit("binomial_slopes")).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mu[0]", "mu[1]", "tau[0]", "tau[1]"]
    num_units = table_fit("binomial_slopes").gaussian.precision.num_units
    assert f"of {num_units} units, 2 each" in axes.get_xlabel() or f"{num_units} units, 2 each" in axes.get_xlabel()


def test_repairs_are_those_of_the_reports():
    head, tail = RepairReport(-0.5, 0.5, 1.25, 1, 1), RepairReport(-3.0, 3.0, 2.0, 7, 40, (3,))
    gaussian = dataclasses.replace(counts_fit().gaussian, head_report=head, tail_report=tail)
    axes = plots.arrowhead_figure(gaussian).axes[1]
    points = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert points == [-0.5, 0.5, -3.0, 3.0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[0].startswith("globals: 1 of 1 repaired,\nlargest relative change 1.25")
    assert labels[1].startswith("units: 7 of 40 repaired,\nlargest relative change 2")


def test_of_no_matrices_there_is_no_eigenvalue():
    nothing = RepairReport(math.inf, math.inf, 0.0, 0, 0)
    gaussian = dataclasses.replace(counts_fit().gaussian, head_report=nothing)
    axes = plots.arrowhead_figure(gaussian).axes[1]
    assert axes.get_yticklabels()[0].get_text().startswith("globals: there are none")
    assert len([line for line in axes.lines if line.get_marker() == "o"]) == 2


def test_an_arrowhead_alone_has_one_panel_and_no_names():
    arrowhead = Arrowhead(torch.eye(2) * 5, torch.ones(3, 1, 2) / 2, torch.ones(3, 1, 1))
    matrix, bar = plots.arrowhead_figure(arrowhead).axes
    assert matrix.images[0].get_array()[0, 2] == pytest.approx(0.5 / 5**0.5)
    assert not matrix.get_yticks().size
    assert bar.get_ylim() == (-1.0, 1.0)


def test_a_batch_and_a_failed_fit_are_refused():
    arrowhead = Arrowhead(torch.eye(2).expand(4, 2, 2) * 5, torch.ones(4, 3, 1, 2), torch.ones(4, 3, 1, 1))
    with pytest.raises(ValueError, match=r"batch of arrowheads, of shape \(4,\)"):
        plots.arrowhead_figure(arrowhead)
    with pytest.raises(ValueError, match="there is no posterior"):
        plots.arrowhead_figure(dataclasses.replace(gaussian_fit(), gaussian=None))
