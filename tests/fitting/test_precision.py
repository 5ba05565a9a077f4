"""A fit in torch's default precision ends as its twin in double does, and gives back what the model is made of."""

import pickle
import re

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import twins
from helpers.fit_models import assert_near
from helpers.twins import GUIDES, KINDS, fitted

from laplace_amort import (
    AutoLaplaceFamily,
    FitStatus,
    FixedDrawELBO,
    Ladder,
    MarginalLaplace,
    MarginalQuadrature,
    NestedELBO,
    NewUnits,
    Stochastic,
    diagnose,
    fit,
)
from laplace_amort.autodiff import arithmetic
from laplace_amort.guide import Problem, to_vector

SINGLE, DOUBLE = torch.float32, torch.float64
OBJECTIVES = {
    "MarginalLaplace": MarginalLaplace(),
    "FixedDrawELBO": FixedDrawELBO(),
    "MarginalQuadrature": MarginalQuadrature(),
    "NestedELBO": NestedELBO(),
    "Ladder": Ladder(),
}


def assert_twins(one, other, near=1e-6):
    """Both ended in the same way, in the same place, as far as exact arithmetic sees it."""
    assert one.status is other.status
    points = to_vector(one.problem.parameters()), to_vector(other.problem.parameters())
    scale = 1 + numpy.abs(points[1])
    assert (numpy.abs(points[0] - points[1]) / scale).max() < near
    assert abs(one.objective - other.objective) < near * (1 + abs(other.objective))
    assert not one.problem.numbers.reason
    assert one.problem.loc.dtype == DOUBLE


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_every_kind_of_model_ends_as_its_twin(make):
    one, other = (fitted(make, dtype, MarginalLaplace()) for dtype in (SINGLE, DOUBLE))
    assert_twins(one, other)
    assert one.status is FitStatus.CONVERGED
    assert bool(one.problem.not_recorded) == bool(other.problem.not_recorded) == (make is twins.branching)


@pytest.mark.parametrize("make", [twins.counted, twins.captured], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_ends_as_its_twin(name, make):
    assert_twins(*(fitted(make, dtype, OBJECTIVES[name]) for dtype in (SINGLE, DOUBLE)))


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.parametrize("objective", [MarginalLaplace(), FixedDrawELBO(num_draws=8, max_draws=8)])
def test_every_kind_of_guide_ends_as_its_twin(objective, name):
    one, other = (fitted(twins.plain, dtype, objective, GUIDES[name]) for dtype in (SINGLE, DOUBLE))
    assert_twins(one, other, near=1e-5)  # a search that sees gradients only ends within its tolerance


def test_parameters_of_the_model_end_as_their_twins_and_are_handed_back():
    objective = FixedDrawELBO(num_draws=8, max_draws=8)
    one = fitted(twins.parameters, SINGLE, objective)
    store = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    other = fitted(twins.parameters, DOUBLE, objective)
    assert_twins(one, other, near=1e-5)
    assert store.keys() == dict(pyro.get_param_store().items()).keys()
    assert len(store) == 5
    for name, value in pyro.get_param_store().items():
        assert store[name].dtype == SINGLE
        torch.testing.assert_close(store[name].double(), value.detach(), rtol=1e-4, atol=1e-5)


def test_a_constant_that_is_left_in_single_precision_is_caught(monkeypatch):
    """The bug that these tests are for: the conversion overlooks the data of one shape."""
    converted = arithmetic._Converting.converted

    def forgetful(self, tensor):
        if tensor.shape == (24,) and tensor.is_floating_point() and not tensor.requires_grad:
            return tensor.float().double()  # as a constant that was made in float32
        return converted(self, tensor)

    assert_twins(*(fitted(twins.far_from_zero, dtype, MarginalLaplace()) for dtype in (SINGLE, DOUBLE)))
    monkeypatch.setattr(arithmetic._Converting, "converted", forgetful)
    with pytest.raises(AssertionError):
        assert_twins(*(fitted(_with_a_third, dtype, MarginalLaplace()) for dtype in (SINGLE, DOUBLE)))


def _with_a_third(dtype):
    """A covariate that is computed in the model, and large beside what it explains."""
    model, (year, z) = twins.far_from_zero(dtype)
    return lambda year, z: model(year * 1e3 / 3, z), (year, z)


@pytest.mark.parametrize("objective", [MarginalLaplace(), Ladder(), FixedDrawELBO()])
def test_what_comes_back_is_in_the_dtype_of_the_model(objective):
    one = fitted(twins.counted, SINGLE, objective)
    other = fitted(twins.counted, DOUBLE, objective)
    torch.set_default_dtype(SINGLE)
    posterior, exact = one.posterior, other.posterior
    doors = {
        "mean": posterior.mean(),
        "std": posterior.std(),
        "quantiles": posterior.quantiles([0.1, 0.9]),
        "sample": posterior.sample(5),
        "median": one.gaussian.median(),
        "draws of the Gaussian": one.gaussian.sample(3),
        "standard errors": one.standard_errors(),
        "optimum": dict(one.optima[0].globals_),
        "predictive": posterior.predictive(num_samples=4)(),
        "new units": posterior.predictive(NewUnits(), num_samples=4)(),
        "new units with data": posterior.posterior_for(2 * twins.COUNTS[:, :5]).mean(),
    }
    for door, values in doors.items():
        assert {value.dtype for value in values.values()} == {SINGLE}, door
    assert one.gaussian.global_loc.dtype == one.gaussian.precision.global_variance().dtype == SINGLE
    assert pyro.param("AutoLaplaceFamily.loc").dtype == DOUBLE  # of the twin, which was fitted last
    for name, value in exact.mean().items():
        torch.testing.assert_close(posterior.mean()[name].double(), value, rtol=2e-7, atol=2e-7)
        torch.testing.assert_close(posterior.std()[name].double(), exact.std()[name], rtol=2e-7, atol=2e-7)
    assert abs(posterior.globals_.effective - exact.globals_.effective) < 1e-6 * exact.globals_.effective


def test_the_guide_stands_at_the_optimum_in_its_own_dtype():
    one = fitted(twins.counted, SINGLE, MarginalLaplace())
    assert one.guide.loc.dtype == SINGLE
    assert torch.equal(one.guide.loc.detach(), one.problem.loc.float())
    torch.testing.assert_close(one.guide._warm_start.intercept, one.problem.memory()[0].float())
    median = one.guide.median(twins.COUNTS)
    torch.testing.assert_close(median["mu"], one.gaussian.median()["mu"])


def test_a_posterior_is_that_of_the_fit_wherever_the_guide_has_gone_since():
    expected = fitted(twins.counted, SINGLE, MarginalLaplace()).posterior.mean()
    one = fitted(twins.counted, SINGLE, MarginalLaplace())
    torch.set_default_dtype(SINGLE)
    with torch.no_grad():
        one.guide.loc.add_(3.0)
    for name, value in one.posterior.mean().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


def test_a_diagnosis_is_that_of_the_twin():
    found = []
    for dtype in (SINGLE, DOUBLE):
        result = fitted(twins.counted, dtype, MarginalQuadrature())
        found.append(diagnose(result, simulations=5, progress=False))
    # Which of two like units is the worst may be a matter of rounding.
    one, other = (re.sub(r"unit \d+", "unit", str(one)) for one in found)
    assert one == other


@pytest.mark.parametrize("name", ["MarginalLaplace", "FixedDrawELBO"])
def test_a_saved_fit_goes_on_with_the_same_numbers(name, tmp_path, monkeypatch):
    whole = fitted(twins.counted, SINGLE, OBJECTIVES[name])
    pyro.clear_param_store()
    model, args = twins.counted(SINGLE)
    move, calls = Problem.remember, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return move(self, *arguments)

    monkeypatch.setattr(Problem, "remember", interrupted)
    first = fit(model, AutoLaplaceFamily(model), *args, objective=OBJECTIVES[name], progress=False)
    monkeypatch.undo()
    assert first.status is FitStatus.INTERRUPTED
    assert torch.equal(first.guide.loc.detach(), first.problem.loc.float())  # it stands at the best point found
    first.save(tmp_path / "fit")
    guide = AutoLaplaceFamily(model)
    second = fit(model, guide, *args, objective=OBJECTIVES[name], resume=tmp_path / "fit", progress=False)
    assert_near(second, whole)


def test_noisy_steps_are_in_the_dtype_of_the_guide_and_end_in_double():
    objective = Stochastic(lr=0.2, max_steps=400)
    one = fitted(twins.plain, SINGLE, objective)
    assert one.status in (FitStatus.CONVERGED, FitStatus.MAX_STEPS)
    assert one.guide.loc.dtype == SINGLE
    assert one.problem.loc.dtype == DOUBLE
    assert torch.equal(one.guide.loc.detach(), one.problem.loc.float())
    exact = fitted(twins.plain, DOUBLE, FixedDrawELBO())
    sd = exact.gaussian.precision.global_variance().sqrt()
    assert ((one.problem.loc - exact.problem.loc) / sd).abs().max() < 0.5


def test_a_result_can_be_stored():
    one = fitted(twins.counted, SINGLE, MarginalLaplace())
    copied = pickle.loads(pickle.dumps(one.gaussian.precision))
    assert copied.tail.dtype == SINGLE


def test_files_have_data_and_draws_in_the_dtype_of_the_model():
    pytest.importorskip("arviz_base")
    tree = fitted(twins.counted, SINGLE, MarginalLaplace()).to_arviz(num_samples=20, prior_samples=5)
    for group in ("posterior", "posterior_predictive", "prior", "observed_data"):
        kinds = {str(variable.dtype) for variable in tree[group].data_vars.values()}
        assert kinds == {"float32"}, group
    assert "constant_data" not in tree.children  # the counts are the observed data


# ------------------------------------------------------------------------------------------------- what cannot be cast


def only_single(z):
    """A model that refuses every other dtype."""
    if z.dtype != torch.get_default_dtype() or z.dtype != torch.float32:
        raise TypeError(f"this model takes float32, got {z.dtype}")
    twins.plain(SINGLE)[0](z)


@torch.jit.script
def scripted(y: torch.Tensor) -> torch.Tensor:
    return y.to(torch.float32) * 1.5


def rounding(z):
    """A model that takes digits away where torch's Python does not see it."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        pyro.sample("z", dist.Normal(scripted(y), 1.0), obs=z)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (only_single, "this model takes float32, got torch.float64"),
        (rounding, "it makes less than double precision of a number (aten._to_copy.default)"),
    ],
)
def test_what_does_not_run_in_double_stays_as_it_is_and_a_note_says_why(model, said):
    torch.set_default_dtype(SINGLE)
    result = fit(model, AutoLaplaceFamily(model), twins.Z, objective=MarginalLaplace(), progress=False)
    (note,) = [note for note in result.notes if said in note]
    assert note.startswith("computed in torch.float32, since the model does not run in double precision: ")
    assert "torch.set_default_dtype(torch.float64)" in note
    assert "data.double()" in note
    assert result.problem.loc.dtype == result.gaussian.global_loc.dtype == SINGLE
    assert {value.dtype for value in result.posterior.mean().values()} == {SINGLE}


def test_the_line_of_the_note_gives_double_precision():
    """Typed as it stands, for a model that has a constant of the default dtype in a product of matrices."""
    torch.set_default_dtype(SINGLE)

    def model(z):
        if z.dtype != torch.get_default_dtype() and z.dtype == torch.float64:
            raise TypeError("float64 in a float32 world")
        if torch.get_default_dtype() == torch.float64 and seen and seen[0] == torch.float32:
            raise TypeError("this model was imported under another default")
        twins.plain(z.dtype)[0](z)

    seen, data = [torch.get_default_dtype()], twins.Z
    first = fit(model, AutoLaplaceFamily(model), data, objective=MarginalLaplace(), progress=False)
    (note,) = [note for note in first.notes if "double precision" in note]
    line, _, hint = note.partition("    ")[2].partition("   # and ")
    exec(line)
    seen[:], data = [torch.get_default_dtype()], eval(hint)
    pyro.clear_param_store()
    second = fit(model, AutoLaplaceFamily(model), data, objective=MarginalLaplace(), progress=False)
    assert second.status.ok
    assert not second.problem.numbers.reason
    assert second.gaussian.global_loc.dtype == DOUBLE
