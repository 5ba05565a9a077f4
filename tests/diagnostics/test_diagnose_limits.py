"""A diagnosis of what has no data to draw, no globals, no units at once, or single precision."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.diagnoses import NAMES, Z, diagnosed, finding, fitted, followed, level
from helpers.fit_models import gaussian, guide_for, poisson, poisson_counts, subsampled
from helpers.unit_models import UNIT_MODELS

from laplace_amort import FixedDrawELBO, Level, MarginalLaplace, Stochastic, diagnose, fit


def factored(z):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        pyro.factor("z", -((z - y) ** 2) / 2)


def test_units_of_five_dimensions():
    case = UNIT_MODELS["dim_minus_three"]()
    found = diagnosed(case.model, *case.args, objective=MarginalLaplace())
    assert found.ok, found
    assert "StudentPoints" in finding(found, "error, units").sentence


def test_without_simulations():
    found = diagnosed(gaussian, Z, simulations=0)
    assert [one.name for one in found.findings] == NAMES[:-1]


def test_factor_as_the_likelihood():
    """No data can be drawn; all else is looked at."""
    found = diagnosed(factored, Z)
    assert [one.name for one in found.findings] == NAMES
    assert level(found, "simulated scores") is Level.UNKNOWN
    assert "pyro.factor" in finding(found, "simulated scores").sentence
    assert found.ok


def test_too_few_simulations():
    found = diagnosed(gaussian, Z, simulations=2)
    assert level(found, "simulated scores") is Level.UNKNOWN
    assert "take at least 3" in finding(found, "simulated scores").sentence


def test_minibatches():
    """What needs all units is not known, and what is known stays."""
    few = Stochastic(window=20, max_steps=20, lr=0.2)
    result = fit(subsampled, guide_for(subsampled), poisson_counts(12)[0].double(), 4, objective=few)
    found = diagnose(result)
    assert [one.name for one in found.findings] == [*NAMES[:3], "units"]
    assert level(found, "units") is Level.UNKNOWN
    assert "minibatches" in finding(found, "units").sentence


def test_advice_for_minibatches_is_one_that_they_can_follow():
    few = Stochastic(window=20, max_steps=20, lr=0.2)
    result = fit(subsampled, guide_for(subsampled), poisson_counts(12)[0].double(), 4, objective=few)
    assert "MarginalQuadrature" not in diagnose(result).advice


@pytest.mark.parametrize("model", [gaussian, poisson])
def test_single_precision(model):
    torch.set_default_dtype(torch.float32)
    result = fitted(model, Z.float() if model is gaussian else poisson_counts(20))
    assert result.guide.loc.dtype is torch.float32
    found = diagnose(result, simulations=25, progress=False)
    assert found.ok, found


# ----------------------------------------------------------------------------------------------------------- no globals


def test_no_globals():
    case = UNIT_MODELS["without_globals"]()
    found = diagnosed(case.model, *case.args, objective=MarginalLaplace())
    assert finding(found, "error, globals").sentence == "there are none"
    assert finding(found, "simulated scores").sentence == "there are no globals"
    assert level(found, "k-hat, globals") is Level.GOOD


def test_advice_without_globals_runs():
    case = UNIT_MODELS["without_globals"]()
    result = fitted(case.model, *case.args, objective=MarginalLaplace())
    found = diagnose(result)
    assert diagnose(followed(found, case.model, case.args)).ok


def test_guide_without_globals_covers_them():
    case = UNIT_MODELS["without_globals"]()
    found = diagnosed(case.model, *case.args, objective=FixedDrawELBO())
    assert level(found, "k-hat, globals") is Level.GOOD
