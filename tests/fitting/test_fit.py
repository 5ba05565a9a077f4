"""One call that converges, and says that it has."""

import io
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.fit_models import (
    COUNTS,
    branching,
    evidence,
    flat,
    gaussian,
    guide_for,
    kinked,
    nowhere,
    poisson,
    poisson_counts,
    trajectory,
    two_peaks,
)
from helpers.unit_models import UNIT_MODELS, counts_alone
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide.initialization import init_to_value

from laplace_amort import (
    Boost,
    ClosedFormMode,
    FitStatus,
    FixedDrawELBO,
    FreeMode,
    Ladder,
    MarginalCurvature,
    MarginalLaplace,
    ModelError,
    QuasiNewton,
    RecordingError,
    Stochastic,
    TrustRegion,
    fit,
)
from laplace_amort.examples import epil
from laplace_amort.fitting.history import progress_bar

Z = torch.tensor([1.0, 3.0, -0.5, 2.0], dtype=torch.float64)
OBJECTIVES = {"ELBO": FixedDrawELBO(), "ELBO at once": FixedDrawELBO(start_with=None), "marginal": MarginalLaplace()}


# ------------------------------------------------------------------------------------------------ the right answer


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_exact_where_the_model_is_gaussian(objective):
    value, mean, sd = evidence(Z)
    result = fit(gaussian, guide_for(gaussian), Z, objective=objective)
    assert result.status is FitStatus.CONVERGED
    if isinstance(objective, MarginalLaplace):  # the density of the globals at their mode: evidence times posterior
        value += float(dist.Normal(mean, sd).log_prob(torch.tensor(mean)))
    assert result.objective == pytest.approx(value, abs=1e-9)
    assert result.standard_error < 1e-9
    assert result.gaussian.global_loc.item() == pytest.approx(mean, abs=1e-5)
    assert result.standard_errors()["mu"].item() == pytest.approx(sd, abs=1e-9)
    joint = torch.linalg.inv(result.gaussian.precision.to_dense())
    torch.testing.assert_close(result.standard_errors()["y"], joint.diagonal()[1:].sqrt())


MODELS = [name for name in UNIT_MODELS if name not in ("without_globals", "one_unit")]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_converges_to_one_optimum(name):
    """From its default start and from a random one, by both objectives; no note, so it was recorded."""
    case = UNIT_MODELS[name]()
    for objective in (MarginalLaplace(), FixedDrawELBO(num_draws=8, accuracy=1.0)):
        guide = guide_for(case.model, unit_plate=case.unit_plate)
        parameters = guide.unit_model(*case.args, **case.kwargs).density.parameters()
        if parameters and isinstance(objective, MarginalLaplace):
            continue  # which is refused
        first = fit(case.model, guide, *case.args, objective=objective, **case.kwargs)
        # Its neighborhood, in standard deviations: far away some of these have other optima.
        with torch.no_grad():
            loc = guide.loc.clone()
            noise = torch.randn(loc.shape, generator=torch.Generator().manual_seed(1))
            guide.loc += 2 * first.gaussian.precision.global_scale_tril @ noise
        second = fit(case.model, guide, *case.args, objective=objective, **case.kwargs)
        for result in (first, second):
            assert result.status.ok, result
            assert not result.notes
            assert all(step.objective == step.objective for step in result.history)
        shift = torch.linalg.solve_triangular(
            first.gaussian.precision.global_scale_tril, (guide.loc.detach() - loc)[:, None], upper=False
        )
        assert shift.norm() < (1e-4 if isinstance(objective, MarginalLaplace) else 0.01)


def test_gradient_of_the_guides_own_elbo_is_zero_there():
    """By SVI's own ELBO, on draws of its own, in standard deviations of the posterior; false alarms below 2e-5."""
    z, guide = poisson_counts(), guide_for(poisson)
    result = fit(poisson, guide, z, objective=FixedDrawELBO(num_draws=1024))
    elbo = Trace_ELBO(200, max_plate_nesting=2, vectorize_particles=True)
    (leaf,) = guide.parameters()
    losses, pulls = [], []
    for _ in range(40):
        leaf.grad = None
        losses.append(elbo.loss_and_grads(poisson, guide, z))
        pulls.append(result.gaussian.precision.global_scale_tril.mT @ leaf.grad)
    pulls, losses = torch.stack(pulls), torch.tensor(losses)
    error = pulls.std(0) / 40**0.5
    assert (pulls.mean(0).abs() < 5.4 * error + 0.02).all()  # |t| with 39 degrees of freedom
    assert error.max() < 0.1
    error = (losses.var() / 40 + result.standard_error**2) ** 0.5
    assert abs(losses.mean() + result.objective) < 5.4 * error


def test_epil_reaches_the_elbo_of_its_family():
    """The evidence is -689.68, and long runs of SVI end at -690.2 to -690.3 (``laplace-amort demo epil``)."""
    args = epil.data()
    result = fit(epil.model, guide_for(epil.model), *args, objective=FixedDrawELBO())
    assert result.status.ok
    assert -690.5 < result.objective < -689.9
    assert len(result.history) < 40


def test_more_draws_until_others_agree():
    """Counts so small that the posterior of the scale is skewed: two draws cannot be enough."""
    result = fit(poisson, guide_for(poisson), poisson_counts(8), objective=FixedDrawELBO(num_draws=2, max_draws=4096))
    assert result.status.ok
    assert result.num_draws > 2
    numbers = [step.num_draws for step in result.history if step.stage == "ELBO"]
    assert numbers == sorted(numbers)
    other = fit(
        poisson, guide_for(poisson), poisson_counts(8), seed=7, objective=FixedDrawELBO(num_draws=result.num_draws)
    )
    shift = (result.gaussian.global_loc - other.gaussian.global_loc) / result.standard_errors()["mu"]
    assert shift.abs().max() < 0.5


def test_draws_that_can_never_be_enough_are_told():
    def funnel(z, errors):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(z)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("z", dist.Normal(theta, errors), obs=z)

    z = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    errors = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    result = fit(funnel, guide_for(funnel), z, errors, objective=FixedDrawELBO())
    assert result.status is FitStatus.TOO_FEW_DRAWS
    assert "fit(model, *args, objective=Ladder())" in str(result)
    assert fit(funnel, z, errors, objective=Ladder()).verdict.ok  # the line, typed


# --------------------------------------------------------------------------------------------------- other strategies


@pytest.mark.parametrize("head", [None, MarginalCurvature()], ids=["joint", "marginal"])
def test_modes_in_closed_form_and_found_are_the_same_fit(head):
    options = {} if head is None else {"head": head}
    closed = ClosedFormMode(lambda sites, z: {"y": (sites["mu"] + z) / 2})
    found, by_hand = (fit(gaussian, guide_for(gaussian, **o), Z) for o in (options, {"mode": closed, **options}))
    assert found.objective == pytest.approx(by_hand.objective, abs=1e-9)
    torch.testing.assert_close(found.gaussian.global_loc, by_hand.gaussian.global_loc, atol=1e-6, rtol=0)


def test_unamortized_family():
    """The centers are parameters: the optimum is at least as good, and has them near the modes."""
    z = poisson_counts(12)
    amortized = fit(poisson, guide_for(poisson), z, objective=FixedDrawELBO(num_draws=256))
    free = fit(poisson, guide_for(poisson, mode=FreeMode()), z, objective=FixedDrawELBO(num_draws=256))
    assert free.status.ok
    error = free.standard_error + amortized.standard_error
    assert free.objective > amortized.objective - 5 * error
    off = (free.gaussian.local_loc - amortized.gaussian.local_loc).flatten() / free.standard_errors()["y"]
    assert 0 < off.abs().max() < 1


def test_parameters_of_repair_and_model_are_fitted():
    case = UNIT_MODELS["with_params"]()
    guide = guide_for(case.model, repair=Boost())
    result = fit(case.model, guide, *case.args, objective=FixedDrawELBO(num_draws=64, accuracy=1.0))
    before = {name: value.clone() for name, value in pyro.get_param_store().items()}
    pyro.clear_param_store()
    start = fit(case.model, guide_for(case.model, repair=Boost()), *case.args, optimizer=QuasiNewton(max_steps=1))
    assert result.objective > start.objective
    assert len(before) >= 3
    with pytest.raises(ModelError, match="is a parameter"):
        fit(case.model, guide_for(case.model), *case.args, objective=MarginalLaplace())


def test_model_without_globals():
    for objective in OBJECTIVES.values():
        result = fit(counts_alone, guide_for(counts_alone), COUNTS, objective=objective)
        assert result.status.ok
        assert result.objective == result.objective
        assert "there are no globals" in str(result)


def test_float32():
    torch.set_default_dtype(torch.float32)
    z = poisson_counts()
    single = fit(poisson, guide_for(poisson), z, objective=MarginalLaplace())
    torch.set_default_dtype(torch.float64)
    double = fit(poisson, guide_for(poisson), z.double(), objective=MarginalLaplace())
    assert single.gaussian.global_loc.dtype == torch.float32
    shift = (single.gaussian.global_loc.double() - double.gaussian.global_loc) / double.standard_errors()["mu"]
    assert single.status.ok, single
    assert shift.abs().max() < 0.01


@pytest.mark.parametrize("optimizer", [QuasiNewton(tolerance=1e-5), TrustRegion()])
def test_marginal_by_either_optimizer(optimizer):
    z = poisson_counts()
    result = fit(poisson, guide_for(poisson), z, objective=MarginalLaplace(), optimizer=optimizer)
    assert result.status.ok
    expected = fit(poisson, guide_for(poisson), z, objective=MarginalLaplace())
    torch.testing.assert_close(result.gaussian.global_loc, expected.gaussian.global_loc, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------- starts


@pytest.mark.parametrize("far", [-30.0, 30.0, 500.0])
@pytest.mark.parametrize("objective", [FixedDrawELBO(), MarginalLaplace()], ids=["ELBO", "marginal"])
def test_start_in_a_bad_place(far, objective):
    """It ends in the optimum or in a status that says that it did not, and never in NaN."""
    z = poisson_counts()
    values = {"mu": torch.tensor(far), "tau": torch.tensor(abs(far) / 3 + 1), "y": torch.zeros(z.shape[-1])}
    result = fit(poisson, guide_for(poisson, init_loc_fn=init_to_value(values=values)), z, objective=objective)
    expected = fit(poisson, guide_for(poisson), z, objective=objective)
    assert result.guide.loc.isfinite().all()
    assert result.status.ok, result
    assert (result.gaussian.global_loc - expected.gaussian.global_loc).abs().max() < 0.02


def test_no_start_at_all():
    for objective in (MarginalLaplace(), FixedDrawELBO()):
        result = fit(nowhere, guide_for(nowhere), Z, objective=objective)
        assert result.status is FitStatus.START_FAILED
        assert "ModeNotFoundError" in str(result)
        assert result.gaussian is None
        with pytest.raises(ValueError, match="no posterior"):
            result.standard_errors()


@pytest.mark.parametrize("objective", [FixedDrawELBO(accuracy=0.3), MarginalLaplace()], ids=["ELBO", "marginal"])
def test_several_starts_report_the_optima(objective):
    z = torch.tensor([4.0, 3.5, 4.2, 4.4])
    result = fit(two_peaks, guide_for(two_peaks), z, objective=objective, starts=8)
    assert len(result.optima) == 2
    assert sum(optimum.num_starts for optimum in result.optima) == 8
    signs = {float(optimum.globals_["mu"].sign()) for optimum in result.optima}
    assert signs == {-1.0, 1.0}
    assert "2 optima were found" in result.summary()
    one = fit(two_peaks, guide_for(two_peaks), z, objective=objective)
    assert len(one.optima) == 1


# ----------------------------------------------------------------------------------------------------------- recording


def test_a_model_that_cannot_be_recorded_is_run():
    result = fit(branching, COUNTS)
    assert result.status.ok
    assert any("every evaluation ran the model in Python" in note for note in result.notes)


def test_a_recording_that_fails_at_the_optimum_is_given_up(monkeypatch):
    from laplace_amort.autodiff.recording import Recording

    seen = []

    def check(self, log_joint, global_, local):
        seen.append(global_)
        if len(seen) == 3:  # two at set-up, and then the optimum
            raise RecordingError("it is another function here")

    monkeypatch.setattr(Recording, "check", check)
    z = poisson_counts()
    result = fit(poisson, guide_for(poisson), z, objective=MarginalLaplace())
    assert "it is another function here" in result.notes[0]
    assert result.status.ok
    monkeypatch.undo()
    expected = fit(poisson, guide_for(poisson), z, objective=MarginalLaplace())
    torch.testing.assert_close(result.gaussian.global_loc, expected.gaussian.global_loc, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------------------ manners


def test_seeds():
    z = poisson_counts()
    state = torch.get_rng_state()
    one, same, other = (fit(poisson, z, seed=seed, objective=FixedDrawELBO()) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert trajectory(one) == trajectory(same)
    assert trajectory(one) != trajectory(other)


def test_progress_is_shown_on_a_terminal_only(monkeypatch, capsys):
    fit(gaussian, guide_for(gaussian), Z)
    assert capsys.readouterr() == ("", "")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    fit(poisson, guide_for(poisson), poisson_counts())
    assert "gradient" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", Terminal())
    fit(poisson, guide_for(poisson), poisson_counts(), progress=False)
    assert sys.stderr.getvalue() == ""
    assert progress_bar(False).disable


def test_timings_and_history():
    result = fit(poisson, poisson_counts(), objective=FixedDrawELBO())
    assert {"set-up", "marginal Laplace", "ELBO", "fresh draws", "value"} <= set(result.timings)
    assert all(seconds >= 0 for seconds in result.timings.values())
    assert result.seconds == pytest.approx(sum(result.timings.values()))
    assert result.history[-1].stage == "fresh draws"
    assert result.head_report.num_repaired == 0
    assert result.tail_report.num_repaired == 0


def assert_same_fit(actual, expected):
    assert trajectory(actual) == trajectory(expected)
    assert (actual.objective, actual.status, actual.num_draws) == (
        expected.objective,
        expected.status,
        expected.num_draws,
    )
    assert torch.equal(actual.guide.loc, expected.guide.loc)
    assert actual.maximized == expected.maximized


def test_a_stochastic_optimizer_is_an_objective_now():
    """The form of before does the same, and says what to write."""
    few, z = Stochastic(window=20, max_steps=40), poisson_counts(6)
    with pytest.warns(DeprecationWarning, match=r"\n    fit\(model, \*args, objective=Stochastic\(\)\)") as told:
        once = fit(poisson, guide_for(poisson), z, optimizer=few)
    assert told[0].filename == __file__  # where the call is
    assert_same_fit(once, fit(poisson, guide_for(poisson), z, objective=few))


@pytest.mark.parametrize("num_draws", [4, 4096])
def test_a_number_of_draws_is_a_setting_of_the_objective_now(num_draws):
    """The form of before does the same, and says what to write."""
    z = poisson_counts(6)
    with pytest.warns(DeprecationWarning, match=rf"objective=FixedDrawELBO\(num_draws={num_draws}\)\)") as told:
        once = fit(poisson, guide_for(poisson), z, num_draws=num_draws)
    assert told[0].filename == __file__
    objective = FixedDrawELBO(num_draws=num_draws, max_draws=max(2048, num_draws))
    assert_same_fit(once, fit(poisson, guide_for(poisson), z, objective=objective))


REFUSALS = {
    "another guide": (
        lambda: (poisson, pyro.infer.autoguide.AutoNormal(poisson), {}),
        TypeError,
        r"fit\(model, \*args\)",
    ),
    "another model": (lambda: (poisson, guide_for(gaussian), {}), ModelError, "another model"),
    "objective as a class": (
        lambda: (poisson, guide_for(poisson), {"objective": MarginalLaplace}),
        TypeError,
        r"objective=MarginalLaplace\(\)",
    ),
    "an ELBO of Pyro": (lambda: (poisson, guide_for(poisson), {"objective": Trace_ELBO()}), TypeError, "Stochastic"),
    "an optimizer of torch": (
        lambda: (poisson, guide_for(poisson), {"optimizer": torch.optim.Adam}),
        TypeError,
        r"Stochastic\(torch.optim.Adam",
    ),
    "noise for the marginal": (
        lambda: (poisson, guide_for(poisson), {"optimizer": Stochastic(), "objective": MarginalLaplace()}),
        TypeError,
        "MarginalLaplace",
    ),
    "no second derivative": (
        lambda: (poisson, guide_for(poisson), {"optimizer": TrustRegion(), "objective": FixedDrawELBO()}),
        TypeError,
        "second derivatives",
    ),
    "two optimizers": (
        lambda: (poisson, guide_for(poisson), {"objective": Stochastic(), "optimizer": QuasiNewton()}),
        TypeError,
        r"steps by an optimizer of torch's, and QuasiNewton\(.*\) is another",
    ),
    "odd draws": (lambda: (poisson, guide_for(poisson), {"num_draws": 3}), ValueError, "even"),
    "draws for the marginal": (
        lambda: (poisson, guide_for(poisson), {"num_draws": 4, "objective": MarginalLaplace()}),
        ValueError,
        "leave num_draws out",
    ),
    "no starts": (lambda: (poisson, guide_for(poisson), {"starts": 0}), ValueError, "at least 1"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals(what):
    make, error, message = REFUSALS[what]
    model, guide, options = make()
    with pytest.raises(error, match=message):
        fit(model, guide, poisson_counts(), **options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_draws": 0}, "num_draws"),
        ({"num_draws": 3}, "even"),
        ({"max_draws": 7}, "max_draws"),
        ({"num_draws": 64, "max_draws": 32}, "at least num_draws"),
        ({"accuracy": 0.0}, "accuracy"),
    ],
)
def test_settings_of_the_elbo(settings, message):
    with pytest.raises(ValueError, match=message):
        FixedDrawELBO(**settings)


# ---------------------------------------------------------------------------------------------------------------- kinks


def binomial(z, total_count=6):
    """Half of the trials are successes, so that every mode is at a logit of zero."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("units", len(z)):
        y = pyro.sample("y", dist.Normal(mu, 1.0))
        pyro.sample("z", dist.Binomial(total_count, logits=y), obs=z)


def test_binomial_at_logits_of_zero():
    """Torch's density has no curvature there: a quarter of the trials is what there is."""
    result = fit(binomial, guide_for(binomial), torch.full((4,), 3.0), objective=MarginalLaplace())
    torch.testing.assert_close(result.gaussian.precision.tail.flatten(), torch.full((4,), 2.5))
    assert not result.notes


def test_a_kink_at_the_mode_is_told():
    result = fit(kinked, guide_for(kinked), torch.ones(4), objective=MarginalLaplace())
    assert "is there a kink" in result.notes[-1].lower()
    assert "4 of 4 units" in result.notes[-1]


def test_globals_that_are_not_identified_are_named():
    """A sum of two with flat priors: any two with the same sum are as good."""

    result = fit(flat, guide_for(flat), Z, objective=MarginalLaplace())
    assert result.status is FitStatus.NO_MAXIMUM
    assert "+1 a -0.5 b" in next(note for note in result.notes if "flattest" in note)
    elbo = fit(flat, guide_for(flat), Z)
    assert elbo.head_report.num_repaired == 1
    assert "the precision of the globals is not that of a maximum" in str(elbo)
