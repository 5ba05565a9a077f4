"""Marginals and pairs of the globals: the numbers that are drawn are those of the posterior and of the Gaussian."""

import dataclasses
import types

import numpy
import pytest
import scipy.stats
import torch
from helpers.fit_models import evidence
from helpers.plot_fits import Z, counts_fit, gaussian_fit, table_fit

from laplace_amort import plots
from laplace_amort.examples import datasets
from laplace_amort.plots.densities import density
from laplace_amort.plots.numbers import Column
from laplace_amort.plots.style import JOINT, MARGINAL, REFERENCE

NORMAL_QUANTILES = scipy.stats.norm.ppf([0.05, 0.5, 0.95])


def curves(axes, color):
    """Densities, long lines, of one color."""
    return [line.get_xydata().T for line in axes.lines if line.get_color() == color and len(line.get_xdata()) > 10]


def marks(axes, color):
    """The quantiles that are marked in one color."""
    (line,) = (line for line in axes.lines if line.get_color() == color and line.get_marker() == "|")
    return line.get_xdata()


def area(curve):
    return numpy.trapezoid(curve[1], curve[0])


@pytest.mark.parametrize("objective", ["elbo", "marginal"])
def test_marginals_of_a_normal_posterior_are_normal(objective):
    """Of the ELBO the posterior is the Gaussian, and there is one curve."""
    (axes,) = plots.marginals_figure(gaussian_fit(objective)).axes
    _, mean, sd = evidence(Z)
    (points, values), *_ = curves(axes, JOINT)
    assert values == pytest.approx(scipy.stats.norm.pdf(points, mean, sd), abs=2e-3 / sd)
    assert marks(axes, JOINT) == pytest.approx(mean + sd * NORMAL_QUANTILES, abs=1e-3)
    drawn = curves(axes, MARGINAL)
    assert len(drawn) == (objective == "marginal")
    for points, values in drawn:
        assert values == pytest.approx(scipy.stats.norm.pdf(points, mean, sd), abs=0.04 / sd)
        assert area((points, values)) == pytest.approx(1, abs=5e-3)
    labels = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert labels == [*(["posterior"] if objective == "marginal" else []), "Gaussian approximation", "5, 50, 95 %"]


def test_marginals_of_a_positive_global_are_densities_with_the_quantiles_of_the_posterior():
    result = counts_fit()
    mu, tau = plots.marginals_figure(result).axes
    assert [axes.get_title() for axes in (mu, tau)] == ["mu", "tau"]
    for color in (MARGINAL, JOINT):
        (curve,) = curves(tau, color)
        assert curve[0].min() > 0
        assert area(curve) == pytest.approx(1, abs=5e-3)
    expected = result.gaussian.quantiles([0.05, 0.5, 0.95])["tau"]
    assert marks(tau, JOINT) == pytest.approx(expected.numpy(), rel=1e-6)
    draws = result.posterior.quantiles([0.05, 0.5, 0.95], 20000)["tau"].numpy()
    assert marks(tau, MARGINAL) == pytest.approx(draws, abs=0.01)


def test_every_element_has_a_panel_and_names_choose():
    result = table_fit("binomial_slopes")
    figure = plots.marginals_figure(result)
    assert [axes.get_title() for axes in figure.axes] == ["mu[0]", "mu[1]", "tau[0]", "tau[1]"]
    figure = plots.marginals_figure(result, names=["tau"])
    assert [axes.get_title() for axes in figure.axes] == ["tau[0]", "tau[1]"]
    with pytest.raises(ValueError, match=r"there is no global site 'y'; there are 'mu', 'tau'"):
        plots.marginals_figure(result, names=["y"])


def test_a_simplex_has_no_normal_marginal():
    axes = {a.get_title(): a for a in plots.marginals_figure(table_fit("categorical_probs")).axes}
    assert set(axes) == {"center[0]", "center[1]", "center[2]", "center[3]", "strength"}
    assert not curves(axes["center[0]"], JOINT)
    (curve,) = curves(axes["center[0]"], MARGINAL)
    assert area(curve) == pytest.approx(1, abs=5e-3)
    assert curves(axes["strength"], JOINT)


def test_elements_that_the_support_fixes_are_left_out():
    """Of the Cholesky factor of a correlation, two by two, two elements vary."""
    titles = [axes.get_title() for axes in plots.marginals_figure(table_fit("correlated")).axes]
    assert titles == ["mu[0]", "mu[1]", "tau[0]", "tau[1]", "factor[1, 0]", "factor[1, 1]"]
    assert len(plots.pairs_figure(table_fit("correlated"), names=["factor"]).axes) == 4


def test_more_globals_than_there_is_room_for_are_counted(monkeypatch):
    monkeypatch.setattr("laplace_amort.plots.globals._COLUMNS", 1)
    monkeypatch.setattr("laplace_amort.plots.globals._ROWS", 3)
    figure = plots.marginals_figure(table_fit("binomial_slopes"))
    assert len(figure.axes) == 3
    assert figure.get_suptitle() == "3 of 4 globals; 1 are left out"
    monkeypatch.setattr("laplace_amort.plots.globals._PAIRED", 3)
    assert plots.pairs_figure(table_fit("binomial_slopes")).get_suptitle() == "3 of 4 globals; 1 are left out"


def draws_of(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "mu": 0.5 + 0.1 * torch.randn(shape, generator=generator),
        "tau": (0.1 * torch.randn(shape, generator=generator)).exp(),
    }


class FakeInferenceData:
    """What ArviZ and xarray have: a group of variables, each with chains and draws first."""

    def __init__(self, draws):
        self.posterior = types.MappingProxyType({name: value.reshape(4, -1) for name, value in draws.items()})


@pytest.mark.parametrize("form", ["draws", "arrays", "chains", "arviz", "fit"])
def test_a_reference_in_every_form(form):
    draws = draws_of(2000)
    reference = {
        "draws": draws,
        "arrays": {name: value.numpy() for name, value in draws.items()},
        "chains": {name: value.reshape(4, 500) for name, value in draws.items()},
        "arviz": FakeInferenceData(draws),
        "fit": counts_fit(),
    }[form]
    mu, tau = plots.marginals_figure(counts_fit(), reference).axes
    labels = [text.get_text() for text in mu.figure.legends[0].get_texts()]
    assert labels == ["posterior", "Gaussian approximation", "reference", "5, 50, 95 %"]
    values = counts_fit().posterior.sample(1000) if form == "fit" else draws
    for axes, name in ((mu, "mu"), (tau, "tau")):
        expected = numpy.quantile(values[name].numpy(), [0.05, 0.5, 0.95])
        assert marks(axes, REFERENCE) == pytest.approx(expected, abs=4e-3)
        (curve,) = curves(axes, REFERENCE)
        assert area(curve) == pytest.approx(1, abs=5e-3)


def test_what_arviz_gets_is_a_reference_too():
    result = counts_fit()
    tree = result.to_arviz(num_samples=400, prior_samples=0, log_likelihood=None)
    mu, _ = plots.marginals_figure(result, tree).axes
    expected = numpy.quantile(numpy.asarray(tree.posterior["mu"]), [0.05, 0.5, 0.95])
    assert marks(mu, REFERENCE) == pytest.approx(expected, abs=4e-3)
    (units,) = plots.units_figure(result, reference=tree).axes
    assert units.get_ylabel() == "y"


def test_a_reference_of_the_datasets_is_its_quantiles():
    """Made up for the names of another model: what counts is where it is drawn."""
    summary = datasets.reference("epil").variables["sigma"]
    reference = types.SimpleNamespace(variables={"tau": summary})
    mu, tau = plots.marginals_figure(counts_fit(), reference).axes
    assert marks(tau, REFERENCE) == pytest.approx([float(v) for v in (summary.q05, summary.q50, summary.q95)])
    assert not [line for line in mu.lines if line.get_color() == REFERENCE and line.get_marker() == "|"]
    labels = [text.get_text() for text in mu.figure.legends[0].get_texts()]
    assert "reference, 5 to 95 %" in labels


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ([1.0, 2.0], TypeError, "a reference is a result of fit, draws by name"),
        ({"nu": torch.zeros(10)}, ValueError, "the reference has no site of 'mu', 'tau'"),
        ({"mu": torch.zeros(10, 3, 2)}, ValueError, r"has shape \(10, 3, 2\) for 'mu', and the model \(draws\)"),
        ({"mu": torch.tensor(1.0)}, ValueError, r"has shape \(\) for 'mu'"),
        ({"mu": torch.full((10,), float("nan"))}, ValueError, "10 draws of 'mu', or some that are not finite"),
        ({"mu": torch.ones(10)}, ValueError, "all draws of 'mu' are 1: there is no density to draw"),
    ],
)
def test_references_that_are_none(reference, error, message):
    with pytest.raises(error, match=message):
        plots.marginals_figure(counts_fit(), reference)


@pytest.mark.parametrize("space", ["constrained", "unconstrained"])
def test_contours_hold_their_share_of_the_gaussian(space):
    result = counts_fit()
    axes = {a.get_xlabel() + "/" + a.get_ylabel(): a for a in plots.pairs_figure(result, space=space).axes}
    suffix = "" if space == "constrained" else ", unconstrained"
    panel = axes[f"mu{suffix}/tau{suffix}"]
    center = result.gaussian.global_loc.numpy()
    precision = result.gaussian.precision.schur_complement.detach().numpy()
    for line, mass in zip((line for line in panel.lines if len(line.get_xdata()) > 10), (0.5, 0.9), strict=True):
        points = line.get_xydata() if space == "unconstrained" else line.get_xydata() * [1, 0]
        if space == "constrained":
            points[:, 1] = numpy.log(line.get_ydata())
        off = points - center
        distance = ((off @ precision) * off).sum(1)
        assert distance == pytest.approx(scipy.stats.chi2.ppf(mass, 2), rel=1e-8)


def test_points_are_the_draws_and_areas_their_weights():
    result = counts_fit()
    grid = plots.pairs_figure(result).axes
    (dots,) = (collection for axes in grid for collection in axes.collections)
    sample = result.posterior.globals_
    offsets = numpy.asarray(dots.get_offsets())
    order = numpy.lexsort(offsets.T)
    expected = numpy.stack([sample.draws[:, 0], numpy.exp(sample.draws[:, 1])], axis=1)
    there = numpy.lexsort(expected.T)
    assert offsets[order] == pytest.approx(expected[there])
    areas, weights = dots.get_sizes()[order], sample.weights[there]
    assert areas / areas.sum() == pytest.approx(weights, rel=1e-9)


def test_pairs_are_below_the_diagonal():
    result = table_fit("binomial_slopes")
    axes = plots.pairs_figure(result).axes
    assert len(axes) == 16
    assert sum(a.axison for a in axes) == 10
    assert [a.get_xlabel() for a in axes if a.get_xlabel()] == ["mu[0]", "mu[1]", "tau[0]", "tau[1]"]
    with pytest.raises(ValueError, match="space is 'log'; it is one of 'constrained', 'unconstrained'"):
        plots.pairs_figure(result, space="log")


def test_a_simplex_has_contours_in_unconstrained_space_alone():
    result = table_fit("categorical_probs")
    constrained = plots.pairs_figure(result, names=["center"]).axes
    assert len(constrained) == 16
    assert not any(line.get_color() == JOINT for axes in constrained for line in axes.lines)
    free = plots.pairs_figure(result, names=["center"], space="unconstrained").axes
    assert len(free) == 9
    assert sum(line.get_color() == JOINT for axes in free for line in axes.lines) == 3 + 2 * 3


def test_without_globals_or_posterior_there_is_nothing_to_draw():
    with pytest.raises(ValueError, match=r"the model has no globals to draw(.|\n)*units_figure\(result\)"):
        plots.marginals_figure(table_fit("without_globals"))
    with pytest.raises(ValueError, match="there is no posterior"):
        plots.pairs_figure(dataclasses.replace(counts_fit(), gaussian=None))


def column_of(values, **changes):
    """Equal weights, positive."""
    weights = numpy.full(len(values), 1 / len(values))
    column = Column("x", "x", 0, 0, values, numpy.log(values), weights, lambda moved: numpy.exp(moved[0]))
    return dataclasses.replace(column, **changes)


def test_density_keeps_mean_and_variance_of_weighted_draws():
    """In the unconstrained coordinate, for few draws with unequal weights."""
    generator = numpy.random.default_rng(0)
    values, weights = generator.normal(size=60), generator.uniform(size=60)
    weights /= weights.sum()
    column = Column("x", "x", 0, None, values, values, weights, lambda moved: moved[0])
    points, found = density(column)
    mean = numpy.trapezoid(found * points, points)
    variance = numpy.trapezoid(found * (points - mean) ** 2, points)
    assert mean == pytest.approx(weights @ values, abs=5e-3)
    assert variance == pytest.approx(weights @ (values - weights @ values) ** 2, rel=2e-2)


def test_density_at_the_edge_of_a_support_is_reflected_there():
    """Half normal draws, evenly spaced: the density is largest at zero, and there is none beyond."""
    values = scipy.stats.halfnorm.ppf((numpy.arange(1000) + 0.5) / 1000)
    points, found = density(column_of(values))
    assert 0 <= points[0] < 1e-100
    assert found == pytest.approx(scipy.stats.halfnorm.pdf(points), abs=0.03)


def test_density_away_from_the_edge_is_that_of_the_logarithm():
    values = scipy.stats.lognorm.ppf((numpy.arange(1000) + 0.5) / 1000, 0.3)
    points, found = density(column_of(values))
    assert points.min() > 0.2
    assert found == pytest.approx(scipy.stats.lognorm.pdf(points, 0.3), abs=0.04)


def test_the_legend_of_pairs_names_what_is_drawn():
    def labels(figure):
        return [text.get_text() for text in figure.legends[0].get_texts()]

    assert labels(plots.pairs_figure(gaussian_fit("elbo"))) == ["Gaussian approximation"]
    assert labels(plots.pairs_figure(gaussian_fit("marginal"))) == ["posterior", "Gaussian approximation"]
    contours = [f"Gaussian approximation, {mass} %" for mass in (50, 90)]
    assert labels(plots.pairs_figure(counts_fit())) == ["draw, area its weight", *contours]
