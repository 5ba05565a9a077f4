"""A ladder ends where the next rung would change nothing, says so, and is the rung that it ended on."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.fit_models import (
    ANSWERS,
    Interrupt,
    assert_near,
    gaussian,
    guide_for,
    one_answer,
    poisson,
    poisson_counts,
    trajectory,
    two_peaks,
)
from helpers.unit_models import UNIT_MODELS

from laplace_amort import (
    FitStatus,
    GaussHermite,
    Ladder,
    MarginalLaplace,
    MarginalQuadrature,
    ModelError,
    QuasiNewton,
    StructureError,
    StudentPoints,
    TrustRegion,
    fit,
)
from laplace_amort.fitting.objectives import ladder as room
from laplace_amort.fitting.objectives.laplace import LaplaceFunction
from laplace_amort.fitting.objectives.quadrature import QuadratureFunction
from laplace_amort.posterior.unit_draws import NestedUnits, WeightedUnits

Z = torch.tensor([1.0, 3.0, -0.5, 2.0], dtype=torch.float64)
COUNTS = poisson_counts(40).double()


def climbed(model, *args, objective=Ladder(), **options):  # noqa: B008 (never changes)
    return fit(model, guide_for(model), *args, objective=objective, **options)


@functools.cache
def on_answers(starts=1):
    """What several tests look at, and none changes."""
    return climbed(one_answer, ANSWERS, starts=starts)


def points_of(result):
    """Along a line, of the rung that a fit ended on."""
    objective = result.maximized
    return 1 if isinstance(objective, MarginalLaplace) else objective.rule.num_points


# -------------------------------------------------------------------------------------------------------- where it ends


def test_one_point_is_enough_for_normal_units():
    result = climbed(gaussian, Z)
    expected = climbed(gaussian, Z, objective=MarginalLaplace())
    assert result.maximized == MarginalLaplace()
    assert result.status is FitStatus.CONVERGED
    assert torch.equal(result.guide.loc, expected.guide.loc)
    assert result.objective == expected.objective
    assert isinstance(result.posterior.units, NestedUnits)
    (note,) = result.notes
    assert note.startswith("Laplace() is enough: GaussHermite(num_points=5) would move means by")


@pytest.mark.parametrize(("model", "z"), [(one_answer, ANSWERS), (poisson, COUNTS)], ids=["answers", "counts"])
def test_climbs_where_units_are_many_and_not_normal(model, z):
    result = climbed(model, z)
    assert isinstance(result.maximized, MarginalQuadrature)
    assert result.status.ok
    first, *_, last = result.notes
    assert first.startswith("from Laplace() to GaussHermite(num_points=5), which moves means by")
    assert last.startswith(f"{result.maximized.rule} is enough: ")
    assert len(result.notes) == 1 + len({note for note in result.notes if note.startswith("from ")})


@pytest.mark.parametrize("model", [one_answer, poisson])
def test_posterior_is_that_of_the_rung_it_ended_on(model):
    """And so are the optimum, its value and the standard errors."""
    z = ANSWERS if model is one_answer else COUNTS
    result = on_answers() if model is one_answer else climbed(model, z)
    assert isinstance(result.posterior.units, WeightedUnits)
    rung = climbed(model, z, objective=result.maximized)
    assert result.objective == pytest.approx(rung.objective, abs=1e-5)
    for name, sd in rung.posterior.std().items():
        assert ((result.posterior.mean()[name] - rung.posterior.mean()[name]).abs() < 0.01 * sd).all()
        torch.testing.assert_close(result.posterior.std()[name], sd, rtol=0.01, atol=0)
    for name, error in rung.standard_errors().items():
        torch.testing.assert_close(result.standard_errors()[name], error, rtol=0.01, atol=0)


def test_next_rung_changes_as_little_as_it_says():
    """And the first rung would be far off."""
    result = on_answers()
    true = climbed(one_answer, ANSWERS, objective=MarginalQuadrature(GaussHermite(129))).posterior
    first = climbed(one_answer, ANSWERS, objective=MarginalLaplace()).posterior
    mean, sd = true.mean()["mu"], true.std()["mu"]
    assert (result.posterior.mean()["mu"] - mean).abs() < 0.02 * sd
    assert (result.posterior.std()["mu"] / sd - 1).abs() < 0.02
    assert (first.mean()["mu"] - mean).abs() > 0.3 * sd


def test_more_accuracy_takes_more_points():
    points = [points_of(climbed(poisson, COUNTS, objective=Ladder(accuracy))) for accuracy in (1.0, 0.02, 1e-4)]
    assert points[0] == 1 < points[1] < points[2]


@pytest.mark.parametrize("max_points", [1, 5, 9])
def test_number_of_points_is_bounded(max_points):
    result = climbed(one_answer, ANSWERS, objective=Ladder(max_points=max_points))
    assert points_of(result) == max_points
    assert result.status.ok
    assert "is the last rung, although GaussHermite(num_points=" in result.notes[-1]
    assert result.notes[-1].endswith("see diagnose(result)")


def angles(seen):
    """On the real line the density of a unit never ends, and no grid settles it."""
    mu, kappa = pyro.sample("mu", dist.Normal(0.0, 1.0)), pyro.sample("kappa", dist.LogNormal(0.0, 1.0))
    with pyro.plate("units", len(seen)):
        phi = pyro.sample("phi", dist.VonMises(mu, kappa))
        pyro.sample("seen", dist.VonMises(phi, 2.0), obs=seen)


def test_past_the_longest_grid_come_points_and_a_note():
    result = climbed(angles, torch.linspace(-1.5, 2.5, 6, dtype=torch.float64))
    assert isinstance(result.maximized.rule, StudentPoints)
    assert "from GaussHermite(num_points=257) to StudentPoints(num_points=513" in "".join(result.notes)
    assert any("is the last rung, although StudentPoints(num_points=" in note for note in result.notes)


def test_notes_have_the_rungs_in_order():
    result = climbed(poisson, COUNTS, objective=Ladder(1e-5))
    rungs = ["Laplace()", *(f"GaussHermite(num_points={n})" for n in (5, 9, 17))]
    assert [note.split(" ")[1] for note in result.notes[:-1]] == rungs[:-1]
    assert [note.split(" ")[3].rstrip(",") for note in result.notes[:-1]] == rungs[1:]
    assert {step.stage for step in result.history} == {"marginal Laplace", "quadrature"}


MOVES = {
    (2.8e-17, 0.0, 5e-4, 9e-4): "means by under 0.001 sd and standard deviations by under 0.1 %, those of the units by "
    "under 0.001 sd and under 0.1 %",
    (0.0123, 0.00456, 0.5, 0.25): "means by 0.012 sd and standard deviations by 0.46 %, those of the units by 0.5 sd "
    "and 25 %",
    (math.inf, math.nan, 1.0, 1.0): "means by inf sd and standard deviations by nan %, those of the units by 1 sd "
    "and 1e+02 %",
}


@pytest.mark.parametrize("move", MOVES)
def test_rounding_errors_are_no_figures(move):
    assert str(room._Move(*move)) == MOVES[move]


def test_notes_are_printed():
    result = climbed(gaussian, Z)
    assert result.notes[0] in str(result)


def test_units_of_five_dimensions():
    """Normal ones, so that one knows the answer."""
    case = UNIT_MODELS["dim_minus_three"]()
    few = climbed(case.model, *case.args)
    assert few.maximized == MarginalLaplace()
    assert "is enough: StudentPoints(num_points=256" in few.notes[-1]
    many = climbed(case.model, *case.args, objective=MarginalQuadrature(StudentPoints(256)))
    for name, sd in few.posterior.std().items():
        torch.testing.assert_close(many.posterior.mean()[name], few.posterior.mean()[name], rtol=0, atol=0.01)
        torch.testing.assert_close(many.posterior.std()[name], sd, rtol=0.02, atol=0)


@pytest.mark.parametrize("model", [gaussian, one_answer])
def test_several_starts(model):
    z = Z if model is gaussian else ANSWERS
    one, several = climbed(model, z), climbed(model, z, starts=2)
    assert len(several.optima) == 1
    assert several.optima[0].num_starts == 2
    assert several.maximized == one.maximized
    assert several.notes[: len(one.notes)] == one.notes
    torch.testing.assert_close(several.guide.loc, one.guide.loc, rtol=0, atol=0.01)


def test_several_optima():
    result = climbed(two_peaks, Z, starts=6)
    assert result.status.ok
    assert len(result.optima) == 2
    first, second = (float(optimum.globals_["mu"]) for optimum in result.optima)
    assert first == pytest.approx(-second, abs=1e-3)


@pytest.mark.parametrize("optimizer", [TrustRegion(), QuasiNewton(), TrustRegion(max_steps=1)], ids=repr)
def test_optimizer_of_a_user(optimizer):
    """It is that of the rungs that it suits."""
    result = climbed(poisson, COUNTS, optimizer=optimizer)
    short = optimizer == TrustRegion(max_steps=1)
    assert result.status is (FitStatus.MAX_STEPS if short else FitStatus.CONVERGED)
    assert any("Laplace()" in note for note in result.notes) is not short


def test_single_precision():
    torch.set_default_dtype(torch.float32)
    result = climbed(one_answer, ANSWERS.float())
    assert result.guide.loc.dtype is torch.float32
    assert result.status.ok
    assert points_of(result) > 1


def test_no_globals():
    case = UNIT_MODELS["without_globals"]()
    assert climbed(case.model, *case.args).status.ok


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("accuracy", [0.0, -1.0, float("nan")])
def test_accuracy_is_positive(accuracy):
    with pytest.raises(ValueError, match="accuracy must be a positive number of standard deviations"):
        Ladder(accuracy)


def test_parameters_of_a_model_are_refused():
    case = UNIT_MODELS["with_params"]()
    with pytest.raises(ModelError, match="'noise' is a parameter"):
        climbed(case.model, *case.args)


def paired(z):
    """Each observation is of two units."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", 4):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
    with pyro.plate("pairs", 3):
        pyro.sample("z", dist.Normal(y[1:] - y[:-1], 1.0), obs=z)


def test_observations_of_two_units_are_refused():
    with pytest.raises((StructureError, ModelError), match="unit"):
        climbed(paired, Z[1:])


# --------------------------------------------------------------------------------------------------------------- resume


def assert_same(actual, expected):
    assert trajectory(actual) == trajectory(expected)
    assert torch.equal(actual.guide.loc, expected.guide.loc)
    assert actual.objective == expected.objective
    assert actual.status is expected.status
    assert actual.notes == expected.notes
    assert actual.maximized == expected.maximized


PLACES = [(LaplaceFunction, "__call__", 1), (QuadratureFunction, "__call__", 0), (QuadratureFunction, "__call__", 8)]
PLACES += [(QuadratureFunction, "information", 1)]


def assert_resumes(stopped, path, expected, **options):
    assert stopped.status is FitStatus.INTERRUPTED
    stopped.save(path)
    assert_same(fit(one_answer, stopped.guide, ANSWERS, objective=Ladder(), resume=stopped, **options), expected)
    by_file = fit(one_answer, ANSWERS, objective=Ladder(), resume=path, **options)
    assert_near(by_file, expected)
    assert by_file.maximized == expected.maximized


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0].__name__}{place[1]}{place[2]}")
def test_resumed_fit_is_the_fit(place, monkeypatch, tmp_path):
    """On whichever rung it was interrupted: bit by bit by the result itself, and by a file to the same optimum."""
    expected = on_answers()
    with monkeypatch.context() as patch:
        Interrupt(patch, *place)
        stopped = climbed(one_answer, ANSWERS)
    assert_resumes(stopped, tmp_path / "fit.pt", expected)


def test_interrupted_between_two_rungs(monkeypatch, tmp_path):
    expected = on_answers(starts=2)
    with monkeypatch.context() as patch:
        Interrupt(patch, room, "_units_moved", 2)
        stopped = climbed(one_answer, ANSWERS, starts=2)
    assert stopped.gaussian is not None
    assert_resumes(stopped, tmp_path / "fit.pt", expected, starts=2)


def test_goes_on_with_more_accuracy():
    """The rungs are the same as far as they go."""
    saved = climbed(one_answer, ANSWERS, objective=Ladder(0.1))
    further = climbed(one_answer, ANSWERS, resume=saved)
    assert_same(further, on_answers())
    assert points_of(further) > points_of(saved)
