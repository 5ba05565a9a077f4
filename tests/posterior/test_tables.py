"""Data frames: every number is the one of the posterior, at its own row."""

import re
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.ecosystem import fitted
from helpers.fit_models import gaussian, guide_for, poisson, poisson_counts, subsampled
from helpers.unit_models import UNIT_MODELS

from laplace_amort import Diagnosis, Finding, FixedDrawELBO, Level, MarginalLaplace, Stochastic, fit
from laplace_amort.types import element_names

Z = torch.tensor([1.0, 3.0, -0.5, 2.0], dtype=torch.float64)
QUANTILES = ["mean", "sd", "5%", "50%", "95%"]


@pytest.fixture(scope="module")
def result():
    torch.set_default_dtype(torch.float64)
    return fit(gaussian, guide_for(gaussian), Z, objective=MarginalLaplace())


# ----------------------------------------------------------------------------------------------------------- posteriors


def test_globals(result):
    frame = result.posterior.to_frame()
    assert (list(frame.index), list(frame.columns)) == (["mu"], QUANTILES)
    sd = 3**-0.5
    expected = [2.75 / 3, sd, 2.75 / 3 - 1.6449 * sd, 2.75 / 3, 2.75 / 3 + 1.6449 * sd]
    assert list(frame.loc["mu"]) == pytest.approx(expected, abs=0.05 * sd)


def test_units(result):
    frame = result.posterior.units_to_frame()
    assert list(frame.columns) == ["site", "unit", "element", *QUANTILES]
    assert list(frame["unit"]) == [0, 1, 2, 3]
    assert set(frame["site"]) == {"y"}
    assert set(frame["element"]) == {""}
    assert list(frame["mean"]) == pytest.approx(((2.75 / 3 + Z) / 2).tolist(), abs=0.02)
    assert list(frame["95%"]) == pytest.approx(result.posterior.quantiles([0.95])["y"][0].tolist())


@pytest.mark.parametrize(
    "name",
    ["categorical_logits", "nested_latents", "dim_minus_three", "units_inside_a_plate_of_data", "one_unit"],
)
def test_every_element_has_its_row(name):
    posterior, wanted = fitted(name).posterior.thinned(16), [0.1, 0.8]
    mean, std, quantiles, layout = posterior.mean(), posterior.std(), posterior.quantiles(wanted), UNIT_MODELS[name]()
    frame, units = posterior.to_frame(wanted), posterior.units_to_frame(wanted)
    assert list(frame.columns) == ["mean", "sd", "10%", "80%"]
    assert set(units["unit"]) == set(range(layout.num_units))
    for site in layout.global_sites:
        labels = element_names(site, mean[site].shape)
        assert list(frame.loc[labels, "mean"]) == mean[site].reshape(-1).tolist()
        for column, at_draws in zip(("10%", "80%"), quantiles[site], strict=True):
            found = torch.tensor(list(frame.loc[labels, column])).reshape(mean[site].shape)
            assert ((found - at_draws).abs() < 0.25 * std[site]).all()
    for site in layout.local_sites:
        rows, axis = units[units["site"] == site], posterior.unit_axis(site)
        assert len(rows) == mean[site].numel()
        for unit in range(layout.num_units):
            part = rows[rows["unit"] == unit]
            for column, values in {"mean": mean, "sd": std, "80%": {n: q[1] for n, q in quantiles.items()}}.items():
                assert list(part[column]) == values[site].select(axis, unit).reshape(-1).tolist()
            assert len(set(part["element"])) == len(part)


def matrix(z):
    b = pyro.sample("B", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
    level = pyro.sample("level", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal((b * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum() + level[0], 1.0))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)


@pytest.mark.parametrize("objective", [MarginalLaplace(), FixedDrawELBO(accuracy=0.2)])
def test_an_element_has_one_name_everywhere(objective):
    found = fit(matrix, guide_for(matrix), Z, objective=objective)
    names = ["B[0, 0]", "B[0, 1]", "B[1, 0]", "B[1, 1]", "level[0]"]
    frame = found.posterior.to_frame()
    assert list(frame.index) == names
    for shown in (str(found), str(found.posterior)):
        rows = [re.split(r" {2,}", line.strip()) for line in shown.splitlines()]
        start = next(index for index, row in enumerate(rows) if row[0] == "global")
        assert rows[start] == ["global", *(column.replace("%", " %") for column in frame.columns)]
        of_table = rows[start + 2 : start + 2 + len(names)]
        assert [row[0] for row in of_table] == names
        # The table has the numbers of the frame.
        assert [row[1:] for row in of_table] == [[f"{x:.4g}" for x in frame.loc[name]] for name in names]
    assert list(found.posterior.draws_to_frame(2).columns[:5]) == names


def test_draws(result):
    frame, draws = result.posterior.draws_to_frame(7, seed=3), result.posterior.sample(7, seed=3)
    assert list(frame.columns) == ["mu", "y[0]", "y[1]", "y[2]", "y[3]"]
    assert frame.index.name == "draw"
    assert list(frame["y[2]"]) == draws["y"][:, 2].tolist()


def test_quantiles_of_globals_are_those_of_the_table(result):
    found = fit(poisson, guide_for(poisson), poisson_counts(), objective=MarginalLaplace()).posterior
    table = {row.split()[0]: row.split()[1:] for row in found.summary().splitlines()[2:]}
    frame = found.to_frame()
    assert {name: [f"{x:.4g}" for x in frame.loc[name]] for name in frame.index} == table


def test_units_of_a_minibatch_bear_their_own_numbers():
    z = torch.poisson(torch.ones(20))
    objective = Stochastic(window=20, max_steps=20)
    found = fit(subsampled, guide_for(subsampled), z, 5, objective=objective, progress=False).posterior
    assert list(found.units_to_frame(num_samples=20)["unit"]) == found.gaussian.unit_model.units.tolist()


def test_without_globals():
    posterior = fitted("without_globals").posterior
    assert (len(posterior.to_frame()), list(posterior.to_frame().columns)) == (0, QUANTILES)
    assert posterior.draws_to_frame(2).shape[0] == 2


def test_float32():
    torch.set_default_dtype(torch.float32)
    posterior = fit(gaussian, guide_for(gaussian), Z.float(), objective=FixedDrawELBO()).posterior
    assert posterior.to_frame().loc["mu", "mean"] == pytest.approx(2.75 / 3, abs=0.05)
    assert len(posterior.units_to_frame()) == 4


@pytest.mark.parametrize("method", ["to_frame", "units_to_frame"])
def test_quantiles_are_probabilities(result, method):
    with pytest.raises(ValueError, match="quantiles must be between 0 and 1"):
        getattr(result.posterior, method)([5, 95])


# ---------------------------------------------------------------------------------------------------- fits and findings


def test_history(result):
    frame = result.history_to_frame()
    assert list(frame.columns) == ["stage", "objective", "gradient_norm", "num_draws", "seconds", "problem"]
    assert list(frame["objective"]) == [step.objective for step in result.history]


def test_diagnosis():
    diagnosis = Diagnosis((Finding("k-hat", Level.BAD, "0.9", "heavy"), Finding("repair", Level.GOOD, "0", "none")))
    frame = diagnosis.to_frame()
    assert list(frame.columns) == ["check", "level", "value", "meaning"]
    assert list(frame["level"]) == ["bad", "good"]
    assert list(frame["check"]) == ["k-hat", "repair"]
    assert list(Diagnosis(()).to_frame().columns) == list(frame.columns)


def test_pandas_is_optional(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    for make in (
        result.posterior.to_frame,
        result.posterior.units_to_frame,
        result.posterior.draws_to_frame,
        result.history_to_frame,
        Diagnosis(()).to_frame,
    ):
        with pytest.raises(ImportError, match=r"pip install 'laplace_amort\[pandas\]'"):
            make()
