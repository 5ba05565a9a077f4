"""What is interrupted is not lost, and what goes on goes the same way."""

import pytest
import torch
from helpers.fit_models import Interrupt, assert_near, guide_for, poisson, poisson_counts, subsampled, trajectory

from laplace_amort import (
    Boost,
    FitStatus,
    FixedDrawELBO,
    FreeMode,
    Ladder,
    MarginalCurvature,
    MarginalLaplace,
    MarginalQuadrature,
    QuasiNewton,
    ResumeError,
    Stochastic,
    TrustRegion,
    fit,
)
from laplace_amort.fitting.objectives.base import ObjectiveFunction
from laplace_amort.fitting.objectives.stochastic import _Walk

Z = poisson_counts(15).double()
CASES = {
    "joint": ({}, {"objective": FixedDrawELBO(num_draws=4)}),
    "marginal head": ({"head": MarginalCurvature()}, {"objective": FixedDrawELBO(num_draws=4)}),
    "marginal Laplace": ({}, {"objective": MarginalLaplace()}),
    "no first stage": ({}, {"objective": FixedDrawELBO(num_draws=8, start_with=None)}),
    "free": ({"mode": FreeMode()}, {"objective": FixedDrawELBO(num_draws=8, accuracy=1.0)}),
    "boost": ({"repair": Boost()}, {"objective": FixedDrawELBO(num_draws=8, accuracy=1.0)}),
    "three starts": ({}, {"objective": FixedDrawELBO(num_draws=4), "starts": 3}),
}


def assert_same(actual, expected):
    assert trajectory(actual) == trajectory(expected)
    assert torch.equal(actual.guide.loc, expected.guide.loc)
    assert actual.objective == expected.objective
    assert actual.status == expected.status


@pytest.mark.parametrize("case", CASES)
def test_resumed_fit_is_the_fit(case, monkeypatch, tmp_path):
    """Wherever it was interrupted: bit by bit by the result itself, and by a file of it to the same optimum."""
    options, settings = CASES[case]
    expected = fit(poisson, guide_for(poisson, **options), Z, **settings)
    calls = len(expected.history)
    for call in sorted({0, 2, calls // 2, calls - 1}):
        with monkeypatch.context() as patch:
            Interrupt(patch, ObjectiveFunction, "__call__", call)
            stopped = fit(poisson, guide_for(poisson, **options), Z, **settings)
        assert stopped.status is FitStatus.INTERRUPTED
        assert len(stopped.history) == call
        path = tmp_path / f"{call}.laf"
        stopped.save(path)
        assert_same(fit(poisson, stopped.guide, Z, **settings, resume=stopped), expected)  # with the guide as it stands
        resumed = fit(poisson, guide_for(poisson, **options), Z, **settings, resume=path)
        assert trajectory(resumed)[:call] == trajectory(stopped)
        assert_near(resumed, expected)


def test_interrupted_fit_has_the_best_point(monkeypatch):
    Interrupt(monkeypatch, ObjectiveFunction, "__call__", 4)
    result = fit(poisson, guide_for(poisson), Z, objective=MarginalLaplace())
    values = [step.objective for step in result.history]
    assert result.objective == max(values)
    assert result.gaussian is not None
    assert result.gaussian.global_loc.isfinite().all()
    assert "go on with resume=" in str(result)


def test_interrupted_among_several_starts(monkeypatch):
    """What the first start found is kept when the second has just begun."""
    first = fit(poisson, guide_for(poisson), Z, objective=MarginalLaplace())
    Interrupt(monkeypatch, ObjectiveFunction, "__call__", len(first.history) + 1)
    result = fit(poisson, guide_for(poisson), Z, objective=MarginalLaplace(), starts=3)
    assert result.status is FitStatus.INTERRUPTED
    assert torch.equal(result.guide.loc, first.guide.loc)


def test_interrupted_twice(monkeypatch):
    expected = fit(poisson, guide_for(poisson), Z, objective=FixedDrawELBO(num_draws=4))
    result = None
    for _ in range(3):
        with monkeypatch.context() as patch:
            Interrupt(patch, ObjectiveFunction, "__call__", 3)
            result = fit(poisson, guide_for(poisson), Z, objective=FixedDrawELBO(num_draws=4), resume=result)
    assert len(result.history) == 9
    assert_same(fit(poisson, guide_for(poisson), Z, objective=FixedDrawELBO(num_draws=4), resume=result), expected)


FEW_STEPS = {
    "Laplace": (MarginalLaplace(), lambda most: TrustRegion(max_steps=most), 3),
    "quadrature": (MarginalQuadrature(start_with=None), lambda most: QuasiNewton(max_steps=most), 4),
    "ladder": (Ladder(), lambda most: TrustRegion(max_steps=most), 3),
    "elbo": (FixedDrawELBO(num_draws=4), lambda most: QuasiNewton(max_steps=most), 2),
}


@pytest.mark.parametrize("what", FEW_STEPS)
def test_a_fit_that_ran_out_of_steps_goes_on_with_more(what, tmp_path):
    """What it did when its steps were spent, such as to begin elsewhere, is left out then."""
    objective, optimizer, few = FEW_STEPS[what]
    expected = fit(poisson, guide_for(poisson), Z, objective=objective, optimizer=optimizer(200))
    assert expected.status is FitStatus.CONVERGED
    short = fit(poisson, guide_for(poisson), Z, objective=objective, optimizer=optimizer(few))
    assert short.status is FitStatus.MAX_STEPS
    short.save(tmp_path / "fit.laf")
    for resume in (short, tmp_path / "fit.laf"):
        resumed = fit(poisson, guide_for(poisson), Z, objective=objective, optimizer=optimizer(200), resume=resume)
        assert_near(resumed, expected)
        assert len(resumed.history) == len(expected.history)
        assert_same(
            fit(poisson, guide_for(poisson), Z, objective=objective, optimizer=optimizer(few), resume=resume), short
        )


def test_more_steps_after_too_few():
    short = fit(poisson, guide_for(poisson), Z, objective=MarginalLaplace(), optimizer=TrustRegion(max_steps=3))
    assert short.status is FitStatus.MAX_STEPS
    assert "optimizer=TrustRegion(max_steps=2000)" in str(short)
    assert len(short.history) <= 3 * 4  # from other starts as well


RESUMED_BY_ANOTHER = {
    "other data": (lambda guide, saved: fit(poisson, guide, poisson_counts(15, seed=1).double(), resume=saved)),
    "other objective": (
        lambda guide, saved: fit(poisson, guide, Z, objective=FixedDrawELBO(start_with=None), resume=saved)
    ),
    "other draws": (lambda guide, saved: fit(poisson, guide, Z, objective=FixedDrawELBO(num_draws=32), resume=saved)),
}


@pytest.mark.parametrize("what", RESUMED_BY_ANOTHER)
def test_another_fit_cannot_go_on_from_it(what):
    saved = fit(poisson, guide_for(poisson), Z)
    with pytest.raises(ResumeError, match="went another way"):
        RESUMED_BY_ANOTHER[what](guide_for(poisson), saved)


def test_another_number_of_units_cannot():
    saved = fit(poisson, guide_for(poisson), Z)
    with pytest.raises(ResumeError, match="this guide has others"):
        fit(poisson, guide_for(poisson), Z[:, :-1], resume=saved)


def test_files_that_are_none(tmp_path):
    path = tmp_path / "fit.laf"
    with pytest.raises(FileNotFoundError):
        fit(poisson, guide_for(poisson), Z, resume=path)
    path.write_text("not a fit")
    with pytest.raises(ResumeError, match=r"was not written by FitResult\.save"):
        fit(poisson, guide_for(poisson), Z, resume=path)
    torch.save({"format": "another"}, path)
    with pytest.raises(ResumeError, match=r"was not written by FitResult\.save, but by torch\.save"):
        fit(poisson, guide_for(poisson), Z, resume=path)


# ---------------------------------------------------------------------------------------------------------- stochastic

FEW = Stochastic(window=20, max_steps=80, lr=0.2)
COUNTS = Z[0]


@pytest.mark.parametrize("step", [0, 5, 20, 47, 79])
def test_resumed_walk_is_the_walk(step, monkeypatch, tmp_path):
    """Nothing but whole windows counts, so that it goes on from the end of the last one."""
    expected = fit(subsampled, guide_for(subsampled), COUNTS, 5, objective=FEW)
    with monkeypatch.context() as patch:
        Interrupt(patch, _Walk, "_step", step)
        stopped = fit(subsampled, guide_for(subsampled), COUNTS, 5, objective=FEW)
    assert stopped.status is FitStatus.INTERRUPTED
    stopped.save(tmp_path / "fit.laf")
    resumed = fit(subsampled, stopped.guide, COUNTS, 5, objective=FEW, resume=stopped)
    assert torch.equal(resumed.guide.loc, expected.guide.loc)
    assert resumed.objective == expected.objective
    assert resumed.status is expected.status is FitStatus.MAX_STEPS
    assert_near(fit(subsampled, guide_for(subsampled), COUNTS, 5, objective=FEW, resume=tmp_path / "fit.laf"), expected)


def test_walk_goes_on_with_more_steps():
    more = Stochastic(window=20, max_steps=160, lr=0.2)
    expected = fit(subsampled, guide_for(subsampled), COUNTS, 5, objective=more)
    short = fit(subsampled, guide_for(subsampled), COUNTS, 5, objective=FEW)
    resumed = fit(subsampled, guide_for(subsampled), COUNTS, 5, objective=more, resume=short)
    assert torch.equal(resumed.guide.loc, expected.guide.loc)
