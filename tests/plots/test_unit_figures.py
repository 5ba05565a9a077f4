"""Units and their tails, as drawn: in order, with the numbers of the posterior, and with what is left out counted."""

import dataclasses
import types

import numpy
import pytest
import torch
from helpers.fit_models import guide_for, subsampled
from helpers.plot_fits import counts_fit, gaussian_fit, table_fit

from laplace_amort import Diagnosis, ModelError, Stochastic, diagnose, fit, plots
from laplace_amort.diagnostics.diagnose import unit_tails
from laplace_amort.diagnostics.findings import UnitTails
from laplace_amort.plots.style import JOINT, MARGINAL, RAW, REFERENCE


def points(axes, color, marker="o"):
    """Positions and heights of markers of one color."""
    (line,) = (line for line in axes.lines if line.get_color() == color and line.get_marker() == marker)
    return line.get_xydata().T


def intervals(axes, color):
    """Lower and upper ends of the vertical lines of one color, by group of lines, ``(2, n)`` each."""
    from matplotlib.colors import same_color

    groups = [c for c in axes.collections if same_color(c.get_color()[0][:3], color)]
    return [numpy.array([segment[:, 1] for segment in group.get_segments()]).T for group in groups]


def test_units_are_in_order_with_their_quantiles():
    result = counts_fit()
    (axes,) = plots.units_figure(result).axes
    assert axes.get_ylabel() == "y"
    assert axes.get_xlabel() == "unit of plate 'units', sorted by posterior mean"
    order = result.posterior.mean()["y"].argsort(stable=True)
    assert [label.get_text() for label in axes.get_xticklabels()] == [str(int(unit)) for unit in order]
    at, medians = points(axes, MARGINAL)
    assert at == pytest.approx(numpy.arange(40))
    expected = result.posterior.quantiles([0.05, 0.25, 0.5, 0.75, 0.95], 4000)["y"][:, order].numpy()
    sd = result.posterior.std()["y"][order].numpy()
    assert (numpy.abs(medians - expected[2]) / sd).max() < 0.2  # of a thousand draws
    wide, narrow = intervals(axes, MARGINAL)
    assert (numpy.abs(wide - expected[[0, 4]]) / sd).max() < 0.4
    assert (numpy.abs(narrow - expected[[1, 3]]) / sd).max() < 0.25
    assert (wide[0] < narrow[0]).all()
    assert (narrow[1] < wide[1]).all()


def test_of_many_units_some_are_shown_and_the_others_counted():
    result = counts_fit()
    figure = plots.units_figure(result, max_units=11)
    assert figure.get_suptitle() == "11 of 40 units of plate 'units'; 29 are left out"
    order = result.posterior.mean()["y"].argsort(stable=True)
    shown = [int(label.get_text()) for label in figure.axes[0].get_xticklabels()]
    ranks = [order.tolist().index(unit) for unit in shown]
    assert (ranks[0], ranks[-1], len(ranks)) == (0, 39, 11)
    assert ranks == sorted(ranks)
    assert plots.units_figure(result, max_units=40).get_suptitle() == ""
    with pytest.raises(ValueError, match="max_units is 1; it takes two"):
        plots.units_figure(result, max_units=1)


def test_draws_are_made_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr("laplace_amort.plots.units._AT_ONCE", 40 * 300)
    (axes,) = plots.units_figure(counts_fit()).axes
    _, medians = points(axes, MARGINAL)
    expected = counts_fit().posterior.mean()["y"].sort().values.numpy()
    assert medians == pytest.approx(expected, abs=0.15)


def test_every_element_of_a_unit_has_a_panel_and_an_order():
    result = table_fit("binomial_slopes")
    figure = plots.units_figure(result, "y")
    assert [axes.get_ylabel() for axes in figure.axes] == ["y[0]", "y[1]"]
    mean = result.posterior.mean()["y"]
    for element, axes in enumerate(figure.axes):
        order = mean[:, element].argsort(stable=True).tolist()
        assert [label.get_text() for label in axes.get_xticklabels()] == [str(unit) for unit in order]


def test_more_elements_than_panels_are_counted(monkeypatch):
    monkeypatch.setattr("laplace_amort.plots.units._PANELS", 1)
    (axes,) = plots.units_figure(table_fit("binomial_slopes")).axes
    assert axes.get_ylabel() == "y[0] (1 more elements are left out)"


def test_units_on_another_axis_and_what_a_user_knows_of_them():
    """The units of this model are rows, (4, 1), as are the values that a user gives."""
    result = table_fit("gamma_rates")
    truth, estimate = torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([[1.1], [2.1], [float("nan")], [900.0]])
    error = 0.1 * torch.ones(4, 1)
    figure = plots.units_figure(result, truth=truth, raw_estimates=(estimate, error))
    (axes,) = figure.axes
    order = result.posterior.mean()["y"][:, 0].argsort(stable=True)
    assert points(axes, JOINT, "x")[1] == pytest.approx(truth[order, 0].numpy())
    assert points(axes, RAW, "_")[1] == pytest.approx(estimate[order, 0].numpy(), nan_ok=True)
    (bars,) = intervals(axes, RAW)
    expected = numpy.stack([estimate - error, estimate + error])[:, order, 0]
    assert bars == pytest.approx(expected[:, ~numpy.isnan(expected[0])])  # a unit without an estimate has none
    beyond, _ = points(axes, RAW, "^")  # an arrow in place of the estimate that is beyond the axes
    assert beyond == pytest.approx([order.tolist().index(3)])
    assert axes.get_ylim()[1] < 100
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["median", "50 %", "90 %", "raw estimate ± se", "truth"]
    with pytest.raises(ValueError, match=r"truth has shape \(4,\), and site 'y' has \(4, 1\)"):
        plots.units_figure(result, truth=truth[:, 0])


def test_a_reference_is_beside_each_unit():
    result, generator = counts_fit(), torch.Generator().manual_seed(0)
    draws = torch.randn(500, 40, generator=generator)
    order = result.posterior.mean()["y"].argsort(stable=True)
    quantiles = numpy.quantile(draws.numpy(), [0.05, 0.5, 0.95], axis=0)[:, order]
    summary = types.SimpleNamespace(
        mean=draws.mean(0), **{f"q{p:02}": torch.quantile(draws, p / 100, dim=0) for p in (5, 50, 95)}
    )
    of_datasets = types.SimpleNamespace(variables={"y": summary})
    for reference in ({"y": draws}, of_datasets):
        (axes,) = plots.units_figure(result, reference=reference).axes
        assert points(axes, REFERENCE)[1] == pytest.approx(quantiles[1], abs=1e-6)
        (lines,) = intervals(axes, REFERENCE)
        assert lines == pytest.approx(quantiles[[0, 2]], abs=1e-6)
    with pytest.raises(ValueError, match="the reference has no site 'y'"):
        plots.units_figure(result, reference={"mu": draws})
    summary.mean = draws.mean()
    with pytest.raises(ValueError, match=r"has shape \(\) for 'y', and the model \(40\)"):
        plots.units_figure(result, reference=of_datasets)


def test_a_site_that_is_not_in_the_units_is_refused():
    with pytest.raises(ValueError, match="there is no site 'mu' in the units of plate 'units'; there are 'y'"):
        plots.units_figure(counts_fit(), "mu")
    with pytest.raises(ValueError, match="there is no posterior"):
        plots.units_figure(dataclasses.replace(counts_fit(), gaussian=None))


# --------------------------------------------------------------------------------------------------------------- k-hat


def drawn(axes):
    """Unit and k-hat of every point inside the axes."""
    lines = [line for line in axes.lines if line.get_marker() in "osD" and line.get_linestyle() == "None"]
    return numpy.concatenate([line.get_xydata() for line in lines])


def test_k_hats_are_those_of_the_diagnosis_and_of_the_fit():
    result = counts_fit()
    diagnosis = diagnose(result, simulations=0)
    tails = unit_tails(result)
    assert (tails.k_hat == diagnosis.unit_tails.k_hat).all()
    assert f"{tails.k_hat.max():.2f}" == next(f.value for f in diagnosis.findings if f.name == "k-hat, units")
    for found in (result, diagnosis):
        axes = plots.k_hat_figure(found).axes[0]
        there = drawn(axes)
        assert there[there[:, 0].argsort(), 1] == pytest.approx(tails.k_hat[tails.units.argsort()])
    assert axes.get_xlabel() == "unit of plate 'units'"
    assert axes.get_title(loc="left") == "40 units; 0 above 0.7"


def test_thresholds_triangles_and_the_worst_by_name():
    k_hat = numpy.array([0.1, 0.55, 0.9, 0.7, -numpy.inf, numpy.inf, 0.3, 5.0, 0.71])
    tails = UnitTails("schools", 10 * numpy.arange(9), k_hat, 100)
    axes = plots.k_hat_figure(Diagnosis((), unit_tails=tails)).axes[0]
    by_marker = {line.get_marker(): line.get_xdata() for line in axes.lines if line.get_linestyle() == "None"}
    expected = {"o": [0, 60], "s": [10, 30], "D": [20, 80], "^": [50, 70], "v": [40]}
    assert {marker: list(units) for marker, units in by_marker.items()} == expected
    assert [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() != "None"] == [0.5, 0.7]
    assert [text.get_text() for text in axes.texts] == ["50", "70", "20", "80", "30"]
    assert axes.get_title(loc="left") == "9 of 100 units, those whose weights vary most; 4 above 0.7"


def test_units_that_are_exactly_normal_are_below():
    axes = plots.k_hat_figure(gaussian_fit()).axes[0]
    (below,) = (line for line in axes.lines if line.get_marker() == "v")
    assert sorted(below.get_xdata()) == [0, 1, 2, 3]


def test_what_has_no_k_hats_says_so():
    with pytest.raises(ValueError, match="the diagnosis has not looked at the units"):
        plots.k_hat_figure(Diagnosis(()))
    with pytest.raises(ValueError, match="there is no posterior"):
        plots.k_hat_figure(dataclasses.replace(counts_fit(), gaussian=None))
    z = torch.tensor([1.0, 2.0, 0.0, 3.0])
    minibatches = fit(subsampled, guide_for(subsampled), z, 2, objective=Stochastic(window=20, max_steps=20))
    with pytest.raises(ModelError, match="the fit is one of minibatches"):
        plots.k_hat_figure(minibatches)
