"""Noisy steps, and a rule for when to stop that can be relied on."""

import re

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.fit_models import guide_for, poisson, poisson_counts, subsampled
from pyro.infer import Trace_ELBO

from laplace_amort import (
    AutoLaplaceFamily,
    FitStatus,
    FixedDrawELBO,
    MarginalLaplace,
    ModelError,
    QuasiNewton,
    Stochastic,
    fit,
)
from laplace_amort.fitting.objectives.stochastic import WalkState
from laplace_amort.linalg.whitening import Whitening

Z = poisson_counts(40).double()[0]


def state_of(iterates, window=100):
    """A learning rate with iterates ``(n, 1)`` behind it."""
    whitening = Whitening.of_information(numpy.eye(1))
    state = WalkState(0.1, numpy.zeros(1), whitening, torch.zeros(1), torch.get_rng_state())
    for part in iterates.split(window):
        state.globals_.append(part)
        state.means.append(part.mean(0))
    return state


def autoregression(n, coefficient, seed=0):
    noise = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    values = [torch.zeros(())]
    for epsilon in noise:
        values.append(coefficient * values[-1] + (1 - coefficient**2) ** 0.5 * epsilon)
    return torch.stack(values[1:])[:, None]


# Iterates, and whether their average is one to rely on to 0.3 standard deviations.
ITERATES = {
    "independent": (autoregression(1000, 0.0), True),
    "correlated": (autoregression(2000, 0.8), True),
    "too correlated for so few": (autoregression(1000, 0.99), False),
    "drifting": (torch.linspace(0, 3, 1000)[:, None] + 0.3 * autoregression(1000, 0.0), False),
    "too few windows": (autoregression(300, 0.0), False),
    "drift at first": (torch.cat([torch.linspace(5, 0, 400)[:, None], autoregression(600, 0.0)]), True),
    "none of it matters": (torch.zeros(400, 0), True),
}


@pytest.mark.parametrize("name", ITERATES)
def test_when_iterates_count_as_stationary(name):
    iterates, expected = ITERATES[name]
    assert state_of(iterates).is_stationary(0.3) is expected


def test_average_is_that_of_the_later_half():
    iterates = torch.cat([torch.full((200, 1), 7.0), torch.full((200, 1), 2.0)])
    assert state_of(iterates).average() == pytest.approx(2.0)


def test_minibatches_find_the_optimum_of_all():
    """Four minibatches of 10, to half a standard deviation; those of the noise at the end are below 0.1."""
    expected = fit(subsampled, guide_for(subsampled), Z, None, objective=FixedDrawELBO(num_draws=256))
    result = fit(subsampled, guide_for(subsampled), Z, 10, objective=Stochastic(accuracy=0.4, window=50))
    assert result.status is FitStatus.CONVERGED
    sd = expected.standard_errors()["mu"]
    assert abs(result.guide.loc - expected.guide.loc) < 0.5 * sd
    assert result.standard_error > 0
    assert abs(result.objective - expected.objective) < 6 * (result.standard_error + expected.standard_error)
    assert any(step.stage.startswith("stochastic") for step in result.history)


def test_minibatches_are_noticed():
    few = fit(subsampled, guide_for(subsampled), Z, 10, objective=Stochastic(window=20, max_steps=20))
    assert few.status is FitStatus.MAX_STEPS
    assert few.gaussian.local_loc.shape == (10, 1)
    with pytest.raises(ModelError, match=r"takes 10 of 40 units of plate 'units'.*\n.*Stochastic\(\)"):
        fit(subsampled, guide_for(subsampled), Z, 10, optimizer=QuasiNewton())


def test_default_for_minibatches(monkeypatch):
    monkeypatch.setattr(Stochastic, "__init__", lambda self: self.__dict__.update(vars(SHORT)))
    result = fit(subsampled, guide_for(subsampled), Z, 10)
    assert result.status is FitStatus.MAX_STEPS


SHORT = Stochastic(window=20, max_steps=40)


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        (torch.optim.SGD, {"momentum": 0.5}),
        (torch.optim.RMSprop, {}),
        (torch.optim.AdamW, {"weight_decay": 0.0, "betas": (0.8, 0.95)}),
    ],
)
@pytest.mark.parametrize("elbo", [None, Trace_ELBO()], ids=["vectorized", "looped"])
def test_any_optimizer_of_torch_and_any_elbo_of_pyro(optimizer, settings, elbo):
    """From three standard deviations away towards the optimum; nothing else is asked of so few steps."""
    z = poisson_counts(20)
    guide = guide_for(poisson)
    how = Stochastic(optimizer, lr=0.1, elbo=elbo, window=20, max_steps=40, settings=settings)
    result = fit(poisson, guide, z, objective=how)
    expected = fit(poisson, z, objective=FixedDrawELBO())
    sd = torch.stack([expected.standard_errors()[name] for name in ("mu", "tau")])
    assert ((result.guide.loc - expected.guide.loc).abs() < 2 * sd).all()
    assert result.guide.loc.isfinite().all()


def test_steps_that_fail_are_stepped_back_from(monkeypatch):
    """A loss that is NaN now and then; and one that always is."""
    elbo = Trace_ELBO()
    original, calls = elbo.loss_and_grads, []

    def sometimes(*args):
        calls.append(None)
        loss = original(*args)
        return float("nan") if len(calls) % 3 == 0 else loss

    elbo.loss_and_grads = sometimes
    how = Stochastic(elbo=elbo, window=20, max_steps=40)
    result = fit(subsampled, guide_for(subsampled), Z, 10, objective=how)
    assert result.status is FitStatus.MAX_STEPS
    assert any("the loss is nan" in step.problem for step in result.history)
    assert result.guide.loc.isfinite().all()
    elbo.loss_and_grads = lambda *args: float("nan")
    result = fit(subsampled, guide_for(subsampled), Z, 10, objective=how)
    assert result.status is FitStatus.START_FAILED


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr must be"),
        ({"accuracy": -1.0}, "accuracy must be"),
        ({"window": 5}, "20 steps"),
        ({"window": 100, "max_steps": 50}, "one window"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Stochastic(**settings)


def test_minibatches_are_no_marginal_density():
    with pytest.raises(ModelError, match="MarginalLaplace needs all of them"):
        fit(subsampled, guide_for(subsampled), Z, 10, objective=MarginalLaplace())


COUNTY = torch.arange(12) % 4
ROWS = torch.linspace(-1.0, 2.0, 12, dtype=torch.float64)


def counties(z):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("counties", 4):
        a = pyro.sample("a", dist.Normal(mu, 1.0))
    with pyro.plate("rows", 12):
        pyro.sample("z", dist.Normal(a[COUNTY], 1.0), obs=z)


def counties_on_the_right(z):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("counties", 4):
        a = pyro.sample("a", dist.Normal(mu, 1.0))
    with pyro.plate("rows", 12):
        pyro.sample("z", dist.Normal(a[..., COUNTY], 1.0), obs=z)


def walked(model, **settings):
    pyro.clear_param_store()
    objective = Stochastic(window=20, max_steps=40, **settings)
    return fit(model, AutoLaplaceFamily(model), ROWS, objective=objective, progress=False)


def told_of_particles(result):
    return any("one by one" in note or "particles" in note for note in result.notes)


def test_a_walk_whose_steps_are_spent_says_how_it_goes_on():
    result = walked(counties_on_the_right)
    assert result.status is FitStatus.MAX_STEPS
    (line,) = [line.strip() for note in result.notes for line in note.splitlines() if line.startswith("    fit(")]
    names = {"fit": fit, "Stochastic": lambda max_steps: Stochastic(window=20, max_steps=60), "result": result}
    further = eval(line, names | {"model": counties_on_the_right, "args": (ROWS,)})
    assert len(further.history) > len(result.history)


def test_a_model_that_takes_no_particles_gets_them_one_by_one():
    result, written = walked(counties), walked(counties_on_the_right)
    assert "a[county]" in result.notes[0]
    assert "one by one" in result.notes[0]
    assert "Write a[..., county]" in result.notes[0]
    assert not told_of_particles(written)  # which is so
    assert abs(result.objective - written.objective) < 4 * (result.standard_error + written.standard_error)


def test_vectorized_particles_of_ones_own_are_refused_with_what_to_type():
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    with pytest.raises(ModelError, match="does not take a dimension of particles") as error:
        walked(counties, elbo=elbo)
    line = re.search(r"\n    objective=Stochastic\(elbo=(.*)\)$", str(error.value))
    assert not told_of_particles(walked(counties, elbo=eval(line[1])))
    assert not told_of_particles(walked(counties_on_the_right, elbo=elbo))
