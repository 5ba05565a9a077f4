"""Fits in files: read without the model, with it, and gone on from."""

import os
import subprocess
import sys

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.fit_models import Interrupt, guide_for, nowhere, one_answer, poisson, poisson_counts, subsampled
from torch.distributions import constraints

from laplace_amort import (
    AutoLaplaceFamily,
    Boost,
    ClosedFormMode,
    FitResult,
    FitStatus,
    FixedDrawELBO,
    FreeMode,
    GaussHermite,
    Ladder,
    MarginalCurvature,
    MarginalLaplace,
    MarginalQuadrature,
    ModifiedCholesky,
    NeedsModelError,
    NestedELBO,
    NewtonMode,
    ResumeError,
    Stochastic,
    TrustRegion,
    Verdict,
    diagnose,
    fit,
)
from laplace_amort.fitting.objectives.base import ObjectiveFunction
from laplace_amort.plots import history_figure

Z = poisson_counts(15).double()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "fit.laf"


def conjugate(z):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)


def no_globals(z):
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Poisson(y.exp()), obs=z)


def matrices(z):
    """Globals with shapes and units with several elements, in a plate that is not the last dimension."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0).expand([2]).to_event(1))
    center = pyro.sample("center", dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2))
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("units", z.shape[0], dim=-2):
        a = pyro.sample("a", dist.Normal(center[0], scale).to_event(1))
        with pyro.plate("seen", z.shape[1], dim=-1):
            mean = a[..., :1, 0] + a[..., 1] * center[1, 0] + shares[..., 0]
            pyro.sample("z", dist.Normal(mean, 0.5), obs=z)


def without_moments(z):
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("twice", 2 * tau)
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)


def with_parameter(z):
    scale = pyro.param("scale", torch.tensor(1.3), constraint=constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, scale))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)


FITS = {
    "ladder": (poisson, (Z,), {"objective": Ladder()}),
    "laplace": (poisson, (Z,), {"objective": MarginalLaplace()}),
    "points": (one_answer, (Z[0].clamp(max=1),), {"objective": MarginalQuadrature(GaussHermite(5))}),
    "elbo": (poisson, (Z,), {"objective": FixedDrawELBO(num_draws=4)}),
    "nested": (poisson, (Z,), {"objective": NestedELBO(num_draws=4)}),
    "no globals": (no_globals, (Z[0],), {}),
    "shapes": (matrices, (torch.linspace(-1.0, 2.0, 12).double().reshape(4, 3),), {"check": False}),
    "no moments": (without_moments, (Z[0],), {}),
    "parameter": (with_parameter, (Z[0],), {}),
    "minibatches": (subsampled, (Z[0], 5), {"objective": Stochastic(window=20, max_steps=80, lr=0.2)}),
    "no recording": (lambda z: conjugate(z.clone() if bool(z[0] > 0) else z), (Z[0],), {}),
}


def fitted(name):
    model, args, options = FITS[name]
    return fit(model, *args, **options), model, args


def same_values(found, expected, **tolerance):
    assert list(found) == list(expected)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **tolerance)


@pytest.mark.parametrize("name", FITS)
def test_read_without_the_model(name, path):
    result, *_ = fitted(name)
    result.save(path)
    found = FitResult.load(path)
    assert isinstance(found, FitResult)
    assert str(found) == str(result)
    assert found.headline() == result.headline()
    assert found.judgement == result.judgement
    assert (found.verdict, found.errors) == (result.verdict, result.errors)
    for field in ("status", "objective", "standard_error", "gradient_norm", "num_draws", "history", "timings", "notes"):
        assert getattr(found, field) == getattr(result, field)
    assert (found.seed, found.seconds, repr(found.maximized)) == (result.seed, result.seconds, repr(result.maximized))
    assert (found.head_report, found.tail_report) == (result.head_report, result.tail_report)
    assert [one.objective for one in found.optima] == [one.objective for one in result.optima]
    for one, other in zip(found.optima, result.optima, strict=True):
        same_values(one.globals_, other.globals_, rtol=0, atol=0)
    posterior, expected = found.posterior, result.posterior
    assert str(posterior) == str(expected)
    assert posterior.summary() == expected.summary()
    same_values(posterior.mean(), expected.mean(), rtol=0, atol=0)
    same_values(posterior.std(), expected.std(), rtol=0, atol=0)
    assert posterior.k_hat == expected.k_hat
    numpy.testing.assert_equal(posterior.log_evidence, expected.log_evidence)
    for quantiles in ([0.05, 0.5, 0.95], [0.025, 0.975], []):
        assert posterior.to_frame(quantiles).equals(expected.to_frame(quantiles))
        assert found.table(quantiles).to_frame().equals(result.table(quantiles).to_frame())
    assert found._repr_html_() == result._repr_html_()
    assert posterior._repr_html_() == expected._repr_html_()
    assert f"{result.verdict.name}, {result.status.name}" in repr(found)
    of_units = expected.units_to_frame()[["site", "unit", "element", "mean", "sd"]]
    assert posterior.units_to_frame().equals(of_units)
    assert torch.equal(found.gaussian.global_loc, result.gaussian.global_loc)
    assert torch.equal(found.gaussian.local_loc, result.gaussian.local_loc)
    assert torch.equal(found.gaussian.schur_complement, result.gaussian.precision.schur_complement)


@pytest.mark.parametrize("name", FITS)
def test_read_with_the_model(name, path, monkeypatch):
    """As live as the one that was saved, and nothing is climbed again."""
    result, model, args = fitted(name)
    drawn, predicted = result.posterior.sample(50), None
    if name != "minibatches":
        pyro.set_rng_seed(1)
        predicted = result.predictive(num_samples=20)(*args)
    stored = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    result.save(path)
    pyro.clear_param_store()
    monkeypatch.setattr(ObjectiveFunction, "__call__", None)
    found = FitResult.load(path, model, *args)
    monkeypatch.undo()
    assert type(found) is FitResult
    near = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(found.gaussian.global_loc, result.gaussian.global_loc, rtol=0, atol=1e-14)
    torch.testing.assert_close(found.gaussian.local_loc, result.gaussian.local_loc, **near)
    torch.testing.assert_close(found.gaussian.precision.to_dense(), result.gaussian.precision.to_dense(), **near)
    same_values(found.standard_errors(), result.standard_errors(), **near)
    same_values(found.posterior.mean(), result.posterior.mean(), **near)
    same_values(found.posterior.sample(50), drawn, **near)
    assert found.history == result.history
    if predicted is not None:
        pyro.set_rng_seed(1)
        same_values(found.predictive(num_samples=20)(*args), predicted, **near)
    same_values(found.guide.median(*args), result.guide.median(*args), **near) if name != "minibatches" else None
    same_values(dict(pyro.get_param_store().items()), stored, **near)
    assert found.verdict is result.verdict
    found.save(path)  # once more
    assert FitResult.load(path).status is result.status


@pytest.mark.parametrize("name", FITS)
def test_going_on_from_a_fit_that_is_done_evaluates_nothing(name, path, monkeypatch):
    result, model, args = fitted(name)
    options = FITS[name][2]
    result.save(path)
    pyro.clear_param_store()
    monkeypatch.setattr(ObjectiveFunction, "_evaluate", None)
    for resume in (path, FitResult.load(path), FitResult.load(path, model, *args)):
        found = fit(model, *args, resume=resume, **options)
        assert found.status is result.status
        assert found.history == result.history
        assert torch.allclose(found.guide.loc, result.guide.loc, rtol=1e-6, atol=1e-8)


def test_moments_that_do_not_exist_are_left_out(path):
    result, *_ = fitted("no moments")
    assert any(reason.verdict is Verdict.NO_MOMENTS for reason in result.judgement.reasons)
    result.save(path)
    table = FitResult.load(path).table()
    columns = dict(zip(table.names, table.columns()["sd"], strict=True))
    assert numpy.isnan(columns["tau"])
    assert numpy.isnan(columns["twice"])
    assert not numpy.isnan(columns["mu"])


def test_another_process_without_the_model(path):
    result = fit(poisson, Z)
    result.save(path)
    script = (
        "import sys\nfrom laplace_amort import FitResult\nresult = FitResult.load(sys.argv[1])\n"
        "print(result)\nprint(result.posterior)\nprint(result.judgement)"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    found = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True, env=environment
    )
    assert found.stdout == f"{result}\n{result.posterior}\n{result.judgement}\n"


ASKED = {
    "draws": lambda result: result.posterior.sample(3),
    "quantiles": lambda result: result.posterior.quantiles([0.5]),
    "predictive": lambda result: result.predictive(),
    "diagnose": diagnose,
    "new units": lambda result: result.posterior_for(Z),
    "arviz": lambda result: result.to_arviz(),
    "guide": lambda result: result.guide(Z),
    "a method of the guide": lambda result: result.guide.median(Z),
    "precision": lambda result: result.gaussian.precision,
    "standard errors": lambda result: result.standard_errors(),
    "problem": lambda result: result.problem.integrals,
    "another quantile": lambda result: result.posterior.to_frame([0.33]),
    "quantiles of units": lambda result: result.posterior.units_to_frame([0.5]),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    torch.set_default_dtype(torch.float64)
    result, path = fit(poisson, Z), tmp_path_factory.mktemp("fits") / "fit.laf"
    result.save(path)
    return path


@pytest.mark.parametrize("what", ASKED)
def test_what_needs_the_model_says_what_to_type(what, kept):
    with pytest.raises(NeedsModelError, match="read from a file without its model") as caught:
        ASKED[what](FitResult.load(kept))
    line = str(caught.value).splitlines()[-1].strip()
    assert line == f"FitResult.load({str(kept)!r}, model, *args)"
    live = eval(line, {"FitResult": FitResult, "model": poisson, "args": (Z,)})  # and that works
    ASKED[what](live)


def test_what_is_absent_is_no_trap_for_python(kept):
    found = FitResult.load(kept)
    assert "not in a file" in repr(found.guide)
    assert not hasattr(found.problem, "__deepcopy__")
    assert repr(str(kept)) in repr(found)


def test_a_copy_of_a_file(kept, path):
    FitResult.load(kept).save(path)
    assert str(FitResult.load(path)) == str(FitResult.load(kept))
    assert FitResult.load(path, poisson, Z).status.ok


def test_figures_of_what_a_file_has(kept):
    assert history_figure(FitResult.load(kept)) is not None
    assert len(FitResult.load(kept).history_to_frame()) == len(FitResult.load(kept).history)


OTHERS = {
    "data": lambda path: FitResult.load(path, poisson, Z + 1),
    "number of units": lambda path: FitResult.load(path, poisson, Z[:, :-1]),
    "model": lambda path: FitResult.load(path, conjugate, Z[0]),
    "prior": lambda path: FitResult.load(path, pyro.poutine.scale(poisson, 2.0), Z),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_model_is_refused(what, kept):
    with pytest.raises(ResumeError, match=r"went another way than this one: its log joint|this guide has others"):
        OTHERS[what](kept)


def test_interrupted(path, monkeypatch):
    with monkeypatch.context() as patch:
        Interrupt(patch, ObjectiveFunction, "__call__", 3)
        result = fit(poisson, Z)
    assert result.status is FitStatus.INTERRUPTED
    result.save(path)
    found = FitResult.load(path)
    assert found.status is FitStatus.INTERRUPTED
    assert str(found) == str(result)
    assert len(found.history) == 3
    with pytest.raises(NeedsModelError, match=r"its posterior \(the fit was interrupted\)"):
        found.posterior.mean()
    live = FitResult.load(path, poisson, Z)
    assert torch.equal(live.guide.loc, result.guide.loc)
    expected = fit(poisson, Z)
    for resume in (path, found, live):
        resumed = fit(poisson, Z, resume=resume)
        assert resumed.status.ok
        assert resumed.objective == pytest.approx(expected.objective, rel=1e-9)


def test_interrupted_before_anything(path, monkeypatch):
    with monkeypatch.context() as patch:
        Interrupt(patch, ObjectiveFunction, "__call__", 0)
        result = fit(poisson, Z)
    result.save(path)
    assert str(FitResult.load(path)) == str(result)
    assert fit(poisson, Z, resume=path).status.ok


def test_without_a_posterior(path):
    result = fit(poisson, Z, objective=MarginalLaplace(), optimizer=TrustRegion(max_steps=1))
    gone = fit(nowhere, Z[0], objective=FixedDrawELBO(num_draws=2))
    assert gone.gaussian is None
    for one, model, args in ((result, poisson, (Z,)), (gone, nowhere, (Z[0],))):
        one.save(path)
        found = FitResult.load(path)
        assert str(found) == str(one)
        assert found.status is one.status
        assert (found.gaussian is None) == (one.gaussian is None)
        assert FitResult.load(path, model, *args).status is one.status
    with pytest.raises(ValueError, match="there is no posterior"):
        _ = found.posterior
    assert fit(nowhere, Z[0], objective=FixedDrawELBO(num_draws=2), resume=found).status is gone.status


def test_single_precision(path):
    torch.set_default_dtype(torch.float32)
    z = Z.float()
    result = fit(poisson, z)
    result.save(path)
    found = FitResult.load(path)
    assert str(found) == str(result)
    assert found.gaussian.global_loc.dtype == torch.float32
    assert found.exact_gaussian().global_loc.dtype == torch.float64
    assert torch.equal(found.gaussian.local_loc, result.gaussian.local_loc)
    same_values(found.posterior.mean(), result.posterior.mean(), rtol=0, atol=0)
    live = FitResult.load(path, poisson, z)
    assert live.guide.loc.dtype == torch.float32
    assert torch.equal(live.guide.loc, result.guide.loc)
    assert torch.equal(live.gaussian.global_loc, result.gaussian.global_loc)
    same_values(live.posterior.sample(20), result.posterior.sample(20))
    assert fit(poisson, z, resume=path).objective == pytest.approx(result.objective, rel=1e-9)


# -------------------------------------------------------------------------------------------- settings of the guide

SETTINGS = {
    "marginal head": {"head": MarginalCurvature()},
    "free": {"mode": FreeMode()},
    "boost": {"repair": Boost(0.01, ModifiedCholesky())},
    "newton": {"mode": NewtonMode(max_steps=50, repair=ModifiedCholesky()), "unit_plate": "units"},
}


@pytest.mark.parametrize("which", SETTINGS)
def test_a_guide_of_the_settings_of_the_fit_is_made(which, path):
    guide = guide_for(poisson, **SETTINGS[which])
    result = fit(poisson, Z, guide=guide, objective=FixedDrawELBO(num_draws=4, accuracy=1.0))
    result.save(path)
    for given in (None, guide_for(poisson, **SETTINGS[which])):
        live = FitResult.load(path, poisson, Z, guide=given)
        assert str(live.guide.settings()) == str(guide.settings())
        same_values(live.guide.quantiles([0.1], Z), result.guide.quantiles([0.1], Z), rtol=1e-6, atol=1e-6)
        same_values(live.standard_errors(), result.standard_errors(), rtol=1e-6, atol=1e-6)
    with pytest.raises(ResumeError, match="is of a fit whose guide had"):
        FitResult.load(path, poisson, Z, guide=guide_for(poisson, repair=ModifiedCholesky(floor=0.1)))


def modes(values, z):
    return {"y": (values["mu"] + z) / 2}


def test_a_guide_that_no_file_holds(path):
    guide = AutoLaplaceFamily(conjugate, ClosedFormMode(modes))
    result = fit(conjugate, Z[0], guide=guide)
    result.save(path)
    assert str(FitResult.load(path)) == str(result)
    with pytest.raises(ResumeError, match=r"had mode=ClosedFormMode\(.*which no file can hold(.|\n)*guide=AutoLapl"):
        FitResult.load(path, conjugate, Z[0])
    live = FitResult.load(path, conjugate, Z[0], guide=guide_for(conjugate, mode=ClosedFormMode(modes)))
    same_values(live.posterior.mean(), result.posterior.mean())


class Mine(MarginalLaplace):
    """An objective of a user's own."""

    def __repr__(self):
        return "Mine()"


def test_an_objective_that_no_file_holds(path):
    result = fit(poisson, Z, objective=Mine())
    result.save(path)
    assert repr(FitResult.load(path).maximized) == "Mine()"
    assert str(FitResult.load(path).posterior) == str(result.posterior)
    with pytest.raises(ResumeError, match=r"the objective Mine\(\)") as caught:
        FitResult.load(path, poisson, Z)
    line = str(caught.value).splitlines()[-1].replace("...", "Mine()")
    assert eval(line, {"fit": fit, "model": poisson, "args": (Z,), "Mine": Mine}).history == result.history


# ----------------------------------------------------------------------------------------------------------- its size


def noisy(z):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, tau))
        pyro.sample("z", dist.Normal(y, 1.0), obs=z)


@pytest.mark.parametrize("num_units", [50, 1000])
def test_a_file_is_small(num_units, path):
    """Units that are all different: three numbers for each of their elements, and some for each evaluation."""
    z = torch.randn(num_units, generator=torch.Generator().manual_seed(0))
    result = fit(noisy, z)
    result.save(path)
    d = result.gaussian.global_loc.numel()
    each = 8 * (1 + d + d**2) + 200  # a value, gradient and curvature, and the words around them
    assert path.stat().st_size < 8000 + 8 * 3 * num_units + each * len(result.history)
