"""Each cause is planted, found and named; and with the lines of its own message typed, the fit succeeds."""

import functools
import inspect

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.causes import (
    ANSWERS,
    COUNTS,
    COVARIATE,
    HEIGHT,
    MARKS,
    MASKED,
    MISSING,
    TIMES,
    UNITS,
    YEAR,
    counts,
    covariate,
    crossed,
    crossed_by_grid,
    crossed_by_multiples,
    errors,
    flat_levels,
    hidden_data,
    hidden_prior,
    hinge,
    in_single,
    nested_levels,
    peaked_prior,
    undivided,
)
from pyro.infer.autoguide.initialization import init_to_value

import laplace_amort
from laplace_amort import (
    FitStatus,
    FixedDrawELBO,
    InformationError,
    MarginalLaplace,
    ModelError,
    QuasiNewton,
    TrustRegion,
    fit,
)

NAMES = {name: getattr(laplace_amort, name) for name in laplace_amort.__all__}
NAMES |= {"torch": torch, "dist": dist, "init_to_value": init_to_value}


def fitted(model, *args, **options):
    return fit(model, *args, progress=False, **options)


def lines_of(message):
    """The lines to type."""
    return [line.strip() for line in message.splitlines() if line.startswith("    ")]


def typed(message, begins, **names):
    """What a line of a message gives when it is typed."""
    (line,) = [line for line in lines_of(message) if line.startswith(begins)]
    return eval(line, {**NAMES, **names})


# -------------------------------------------------------------------------------------------------- collapsed scales


@functools.cache
def collapsed():
    return fitted(crossed, ANSWERS)


def test_a_scale_that_ran_to_zero_is_no_success():
    result = collapsed()
    assert result.status is FitStatus.COLLAPSED
    assert not result.verdict.ok
    assert float(result.optima[0].globals_["tau_i"]) < 0.01
    (note,) = result.notes
    assert "tau_i ran to 0.00" in note
    assert "the 6 elements of 'ease'" in note


def test_the_other_plate_integrated_over_gives_the_posterior():
    """That of a grid, without any of this package."""
    result = typed(collapsed().notes[0], "fit(model, *args, guide=", model=crossed, args=(ANSWERS,))
    mean, sd = crossed_by_grid()
    assert result.verdict.ok
    assert float(result.posterior.mean()["tau_i"]) == pytest.approx(mean, abs=0.1 * sd)
    assert float(result.posterior.std()["tau_i"]) == pytest.approx(sd, rel=0.1)


def test_multiples_of_the_scale_come_near_it():
    line, elbo = lines_of(collapsed().notes[0])[-2:]
    assert line.partition("  #")[0].strip() in inspect.getsource(crossed_by_multiples)
    result = typed(collapsed().notes[0], elbo, model=crossed_by_multiples, args=(ANSWERS,))
    mean, sd = crossed_by_grid()
    assert result.status.ok
    assert float(result.posterior.mean()["tau_i"]) == pytest.approx(mean, abs=0.3 * sd)


def test_of_nested_levels_the_upper_are_the_units():
    result = fitted(flat_levels, MARKS)
    assert result.status is FitStatus.COLLAPSED
    source = inspect.getsource(nested_levels)
    for line in lines_of(result.notes[0]):
        assert line.partition("...")[0] in source
    assert fitted(nested_levels, MARKS).verdict.ok


def test_an_elbo_begins_elsewhere_than_at_the_collapse():
    result = fitted(flat_levels, MARKS, objective=FixedDrawELBO())
    assert float(result.optima[0].globals_["s"][0]) > 0.1


@pytest.mark.parametrize("model", [crossed_by_multiples, nested_levels, counts])
def test_no_scale_that_stays_is_said_to_collapse(model):
    data = {crossed_by_multiples: ANSWERS, nested_levels: MARKS, counts: COUNTS}[model]
    assert fitted(model, data, objective=MarginalLaplace(), check=False).status is FitStatus.CONVERGED


# ------------------------------------------------------------------------------------------------------------- kinks


@pytest.mark.parametrize("objective", [None, FixedDrawELBO()], ids=["ladder", "ELBO"])
def test_a_kink_in_every_unit_ends_a_fit_before_it_begins(objective):
    result = fitted(errors, TIMES, objective=objective)
    assert result.status is FitStatus.KINKED
    assert len(result.history) <= 2
    (note,) = result.notes
    assert "plate 'units' ('a') (12 units have one)" in note


def kind_typed(message):
    (line,) = [line for line in lines_of(message) if line.startswith("dist.")]
    return eval(line.partition("(")[0])


def bend_typed(message):
    (line,) = [line for line in lines_of(message) if "softplus" in line]
    return lambda x: eval(line, {"torch": torch, "x": x})


def test_what_is_smooth_in_its_place_is_fitted():
    kind = kind_typed(fitted(errors, TIMES).notes[0])
    assert fitted(functools.partial(errors, kind=kind), TIMES).verdict.ok


def test_a_kink_of_a_mean():
    result = fitted(hinge, TIMES)
    assert result.status is FitStatus.KINKED
    assert fitted(functools.partial(hinge, bend=bend_typed(result.notes[0])), TIMES).status.ok


def test_a_kink_of_a_prior_of_the_globals():
    result = fitted(peaked_prior, UNITS)
    assert result.status is FitStatus.STUCK
    assert "the density has a kink along 'mu'" in result.notes[-1]
    assert fitted(functools.partial(peaked_prior, kind=kind_typed(result.notes[-1])), UNITS).verdict.ok


# -------------------------------------------------------------------------------------- masks, NaN, rounding and priors


def test_a_prior_under_a_mask():
    result = fitted(hidden_prior, MASKED)
    assert result.status is FitStatus.START_FAILED
    (note,) = result.notes
    assert "neither data nor prior say anything of 'u' in unit 3 of plate 'units'" in note
    source = inspect.getsource(hidden_data)
    for line in lines_of(note):
        assert line.partition("Normal(0., 1.)")[0].partition("=seen")[0].partition("...")[0] in source
    assert fitted(hidden_data, MASKED).verdict.ok


def test_a_covariate_that_is_missing():
    with pytest.raises(ModelError, match=r"Argument x of the model is NaN at index \[5\]") as caught:
        fitted(covariate, MISSING, MASKED)
    names = {"x": MISSING}
    for line in lines_of(str(caught.value)):
        exec(line, names)
    assert fitted(covariate, names["x"], MASKED[names["keep"]]).status.ok


def test_a_covariate_that_is_not_missing_is_taken():
    assert fitted(covariate, COVARIATE, MASKED).status.ok


def weighted_hierarchy(z, prior):
    with pyro.poutine.scale(scale=5.0):
        mu, tau = pyro.sample("mu", dist.Normal(0.0, 3.0)), pyro.sample("tau", prior)
        with pyro.plate("units", len(z)):
            y = pyro.sample("y", dist.Normal(mu, tau))
            pyro.sample("z", dist.Normal(y, 1.0), obs=z)


def test_a_scale_without_end():
    """With a weight of 5 the density of tau given the data rises as tau to the power of minus 4 per unit."""
    z = torch.tensor([1.0, 3.0, -0.5, 2.0, 0.3, 1.1], dtype=torch.float64)
    result = fitted(weighted_hierarchy, z, dist.HalfNormal(1.0))
    assert not result.status.ok
    (cause,) = [note for note in result.notes if "no maximum" in note]
    assert cause.startswith("tau ran to ")
    assert "poutine.scale" in cause
    (line,) = lines_of(cause)
    prior = eval(line.removeprefix("pyro.sample('tau', ").removesuffix(")"), NAMES)
    again = fitted(weighted_hierarchy, z, prior)
    assert again.status.ok


def test_a_model_that_computes_in_fewer_digits():
    result = fitted(in_single, HEIGHT, YEAR)
    assert not result.status.ok
    assert "the log joint has rounding errors of" in result.notes[-1]
    (line,) = [line for line in lines_of(result.notes[-1]) if line.startswith("x = ")]

    def number(x):
        names = {"x": x}
        exec(line, names)
        return names["x"]

    assert fitted(functools.partial(in_single, number=number), HEIGHT, YEAR).verdict.ok


def test_globals_that_are_not_identified():
    result = fitted(undivided, MASKED)
    assert result.status is FitStatus.NO_MAXIMUM
    (line,) = lines_of(result.notes[-1])
    prior = eval(line.partition(", ")[2].partition(")   #")[0])
    assert fitted(functools.partial(undivided, prior=prior), MASKED).status.ok


@pytest.mark.parametrize("optimizer", [TrustRegion(max_steps=3), QuasiNewton(max_steps=3)], ids=repr)
def test_a_search_of_few_steps(optimizer):
    result = fitted(counts, COUNTS, objective=MarginalLaplace(), optimizer=optimizer)
    assert result.status is FitStatus.MAX_STEPS
    assert "the objective was still rising, by" in result.notes[-1]
    again = functools.partial(fit, objective=MarginalLaplace())
    assert typed(result.notes[-1], "fit(", model=counts, args=(COUNTS,), fit=again).status.ok


def far(y):
    """Poisson counts that overflow where the start is."""
    mu = pyro.sample("mu", dist.Normal(2000.0, 1000.0))
    with pyro.plate("units", len(y)):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Poisson((u + mu).exp()), obs=y)


def test_a_start_where_the_density_overflows():
    with pytest.raises(InformationError, match="near the start, where latents are at the means of") as caught:
        fitted(far, COUNTS)
    names = {**NAMES, "model": far}
    for line in lines_of(str(caught.value)):
        exec(line, names)
    assert fitted(far, COUNTS, guide=names["guide"]).status.ok


def test_a_fit_that_converged_has_no_cause():
    result = fitted(counts, COUNTS)
    assert all("enough" in note or note.startswith("from ") for note in result.notes)
