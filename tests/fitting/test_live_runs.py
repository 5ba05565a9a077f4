"""How often a fit runs the Python of a model: at set-up, to record it, and once at the optimum."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from laplace_amort import (
    AutoLaplaceFamily,
    FixedDrawELBO,
    Ladder,
    MarginalLaplace,
    MarginalQuadrature,
    NestedELBO,
    fit,
)
from laplace_amort.errors import ModelError, RecordingError
from laplace_amort.guide import Problem

Z = torch.linspace(-3.0, 4.0, 8, dtype=torch.float64)
UNIT = torch.tensor([2, 0, 3, 3, 1, 4, 0, 4])
OBJECTIVES = {
    "FixedDrawELBO": FixedDrawELBO(),
    "MarginalLaplace": MarginalLaplace(),
    "MarginalQuadrature": MarginalQuadrature(),
    "NestedELBO": NestedELBO(),
    "Ladder": Ladder(),
}

# One run finds the sites, one is at the start, two are compared with each other, one has its structure checked, one is
# recorded, two are compared with the recording; and one at the optimum.
AT_SET_UP, AT_THE_OPTIMUM = 8, 1


class Counting:
    """A model that counts its runs."""

    def __init__(self, error=None, by_visit=False):
        self.error, self.by_visit, self.runs = error, by_visit, 0

    def __call__(self, z):
        self.runs += 1
        error = 1.0 if self.error is None else self.error()
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("units", 5 if self.by_visit else len(z)):
            y = pyro.sample("y", dist.Normal(mu, tau))
            if not self.by_visit:
                pyro.sample("z", dist.Normal(y, error), obs=z)
        if self.by_visit:
            with pyro.plate("visits", len(z)):
                pyro.sample("z", dist.Normal(y[..., UNIT], error), obs=z)


def a_parameter():
    return pyro.param("error", torch.tensor(1.0), constraint=dist.constraints.positive)


def runs_at(model, monkeypatch):
    """Runs of the model when the problem has been set up, before its recording is compared again, and after that."""
    found, set_up, recheck = [], Problem.__init__, Problem.recheck

    def counted_set_up(self, *args):
        set_up(self, *args)
        found.append(model.runs)

    def counted_recheck(self):
        found.append(model.runs)
        differs = recheck(self)
        found.append(model.runs)
        return differs

    monkeypatch.setattr(Problem, "__init__", counted_set_up)
    monkeypatch.setattr(Problem, "recheck", counted_recheck)
    return found


@pytest.mark.parametrize("by_visit", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_fit_runs_the_model_at_set_up_and_at_the_optimum_alone(name, by_visit, monkeypatch):
    model = Counting(by_visit=by_visit)
    found = runs_at(model, monkeypatch)
    result = fit(model, AutoLaplaceFamily(model), Z, objective=OBJECTIVES[name], progress=False)
    assert result.problem.unit_model.recording is not None
    assert len(result.history) > 2
    assert found == [AT_SET_UP, AT_SET_UP, AT_SET_UP + AT_THE_OPTIMUM]
    assert model.runs == AT_SET_UP + AT_THE_OPTIMUM <= 9


@pytest.mark.parametrize("by_visit", [False, True])
def test_so_it_does_where_the_model_has_parameters(by_visit, monkeypatch):
    model = Counting(a_parameter, by_visit)
    found = runs_at(model, monkeypatch)
    result = fit(model, AutoLaplaceFamily(model), Z, objective=FixedDrawELBO(16, 16), progress=False)
    assert len(result.problem.model_parameters) == 1
    assert result.problem.unit_model.recording is not None
    assert found == [AT_SET_UP, AT_SET_UP, AT_SET_UP + AT_THE_OPTIMUM]
    assert model.runs == AT_SET_UP + AT_THE_OPTIMUM <= 9


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "FixedDrawELBO"])
def test_a_refusal_of_parameters_takes_no_further_run(name):
    model = Counting(a_parameter)
    with pytest.raises(ModelError, match="'error' is a parameter"):
        fit(model, AutoLaplaceFamily(model), Z, objective=OBJECTIVES[name], progress=False)
    assert model.runs == AT_SET_UP


def test_a_guide_that_was_called_before_looks_at_these_data_once_more(monkeypatch):
    """One run for data and parameters, three to record; the data may be others than those of the first call."""
    model = Counting()
    guide = AutoLaplaceFamily(model)
    guide.unit_model(Z)
    before = model.runs
    fit(model, guide, Z + 1, objective=MarginalLaplace(), progress=False)
    assert model.runs - before == 4 + AT_THE_OPTIMUM
    with pytest.raises(ModelError, match=r"'z' .* impossible"):
        fit(model, guide, Z.index_fill(0, torch.tensor([2]), torch.nan), objective=MarginalLaplace(), progress=False)


def test_the_recording_of_a_model_that_changes_is_found_at_the_optimum():
    """Planted: the data are others after set-up, which only a run at the end can tell."""
    model = Counting()
    shifted = lambda z: model(z + (model.runs >= AT_SET_UP))  # noqa: E731
    result = fit(shifted, AutoLaplaceFamily(shifted), Z, objective=MarginalLaplace(), progress=False)
    assert "differs from that of the model" in result.problem.not_recorded
    assert result.problem.unit_model.recording is None
    expected = fit(model, AutoLaplaceFamily(model), Z + 1, objective=MarginalLaplace(), progress=False)
    # Both stop where the gradient is small, from different starts; the shift by one moves the objective by far more.
    assert result.objective == pytest.approx(expected.objective, rel=1e-6)


def looked_up_from_the_left(z):
    """It writes in place, so that nothing is mapped, and counts from the left, so that there is no room for points."""
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with pyro.plate("units", 5):
        y = pyro.sample("y", dist.Normal(0.0, tau * (1.0 if bool(tau > 0) else 2.0)))
    with pyro.plate("rows", len(z)):
        pyro.sample("z", dist.Normal(y[UNIT], 1.0), obs=z)


def test_a_note_says_why_each_point_has_a_run_and_what_to_type():
    result = fit(
        looked_up_from_the_left,
        AutoLaplaceFamily(looked_up_from_the_left),
        Z,
        objective=MarginalLaplace(),
        progress=False,
    )
    (note,) = [note for note in result.notes if note.startswith("and for one point at a time")]
    assert result.problem.not_at_once in note
    branch, write = (line.strip() for line in note.splitlines()[1:])
    mu, a, b = torch.tensor([-1.0, 1.0]), torch.ones(2), torch.zeros(2)  # noqa: F841 (of the line)
    found, _, instead = branch.partition("# for:")
    assert eval(found).tolist() == [eval(instead, {"mu": value, "a": 1.0, "b": 0.0}) for value in mu]
    y, unit = torch.tensor([3.0, 4.0]), torch.tensor(1)
    found, _, instead = write.partition("# for:")
    tensors = torch.zeros(2), torch.zeros(2)
    exec(found, {"p": tensors[0], "y": y, "unit": unit})
    exec(instead.strip(), {"p": tensors[1], "y": y, "unit": unit})
    assert tensors[0].tolist() == tensors[1].tolist() == [4.0, 0.0]


@pytest.mark.parametrize("name", ["MarginalQuadrature", "Ladder", "FixedDrawELBO", "NestedELBO"])
def test_points_at_once_end_where_a_recording_does(name, monkeypatch):
    """The same optimum and posterior, with as many runs as there are chunks and not points."""
    found, runs = [], []
    for recorded in (True, False):
        if not recorded:
            monkeypatch.setattr("laplace_amort.model.UnitModel.recorded", _refused)
        pyro.clear_param_store()
        model = Counting()
        result = fit(model, AutoLaplaceFamily(model), Z, objective=OBJECTIVES[name], progress=False)
        assert bool(result.problem.not_recorded) != recorded
        assert not result.problem.not_at_once
        found.append((result.objective, *result.posterior.mean().values(), *result.posterior.std().values()))
        runs.append(model.runs)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert runs[1] < 600  # one by one, it is some thousands


def _refused(*args):
    raise RecordingError("switched off")
