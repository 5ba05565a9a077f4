"""The guides of the demo by plain SVI: their numbers against the reference, what is said of them, and interrupts."""

import dataclasses
import sys

import numpy
import pyro
import pytest
import torch
from helpers.demo_results import LABELS, exact_result, short_results
from pyro.infer import SVI, Trace_ELBO

from laplace_amort import Arrowhead, RepairReport
from laplace_amort.examples import svi_demo as demo
from laplace_amort.examples.catalogue import EXAMPLES
from laplace_amort.examples.settings import own_settings


@pytest.fixture(autouse=True)
def _few_particles(monkeypatch):
    """Most tests look at words; their ELBOs may be rough."""
    monkeypatch.setattr(demo, "_EVALUATION", (2, 10))


@pytest.fixture(scope="module")
def result():
    return short_results()


@pytest.fixture(scope="module")
def exact():
    return exact_result()


def with_fit(result, **changes):
    return dataclasses.replace(result, fits=[dataclasses.replace(result.fits[0], **changes)])


def with_gaussian(result, **changes):
    return with_fit(result, gaussian=dataclasses.replace(result.fits[0].gaussian, **changes))


def assert_not_above_the_evidence(result, fit, gap):
    """No correct ELBO is above the log evidence: five standard errors of their difference, 3e-7."""
    noise = (fit.elbo_standard_error**2 + result.yardstick.reference.log_evidence_standard_error**2) ** 0.5
    assert -5 * noise < result.yardstick.reference.log_evidence - fit.elbo < gap


def keep(monkeypatch, *labels):
    """Fit only some of the guides, in half the steps, and evaluate them well."""
    guides = demo.guides
    monkeypatch.setattr(demo, "guides", lambda example: {label: guides(example)[label] for label in labels})
    monkeypatch.setattr(demo, "_EVALUATION", (20, 100))
    monkeypatch.setattr(demo, "_LEARNING_RATE", (0.2, 0.002))


def test_the_joint_head_agrees_with_the_reference_where_units_are_informative(monkeypatch):
    """Seeded, so it passes or fails for good. The limit of this guide is 0.03 posterior sds and 8 %."""
    keep(monkeypatch, "joint head")
    result = demo.run("multisite", steps=150, progress=False)
    (fit,) = result.fits
    for name in ("mu", "log_raw_scale", "log_raw_df", "t"):
        error, ratio = result.yardstick.errors(fit.moments, name)
        assert error.abs().max() < 0.1, name
        assert ((ratio - 1).abs() < 0.1).all(), name
    assert_not_above_the_evidence(result, fit, gap=0.2)
    assert fit.gaussian.head_report.num_repaired == 0


def test_both_heads_of_epil_come_through_an_indefinite_start(monkeypatch):
    """Seeded. The limits are KL divergences of 0.58 and 0.53, and errors of sigma of 0.07 posterior sds."""
    keep(monkeypatch, *LABELS[1:])
    example = EXAMPLES["epil"]
    with own_settings():
        starts = {label: guide.gaussian(*example.module.data()) for label, guide in demo.guides(example).items()}
    assert starts["joint head"].head_report.smallest_before < 0
    result = demo.run("epil", steps=90, progress=False)
    for fit in result.fits:
        assert_not_above_the_evidence(result, fit, gap=1.0)
        error, ratio = result.yardstick.errors(fit.moments, "sigma")
        assert error.abs() < 0.25
        assert (ratio - 1).abs() < 0.25
        assert fit.gaussian.head_report.smallest_before > 0


@pytest.mark.parametrize(("name", "globals_", "parameters"), [("multisite", 3, 47), ("epil", 7, 66), ("radon", 5, 175)])
def test_a_short_run_reports_every_global_of_every_guide(result, name, globals_, parameters):
    found = result[name]
    assert not found.interrupted
    assert [fit.label for fit in found.fits] == LABELS
    assert [fit.num_parameters for fit in found.fits] == [parameters, globals_, globals_]
    text = str(found)
    assert text.startswith(f"{name}: ")
    assert text.count("NUTS") == globals_
    for label, _, _ in found.yardstick.numbers("global"):
        assert f"\n{label} " in text
    for fit in found.fits:
        assert len(fit.elbos) == 3
        assert f"{fit.elbo:.3f} ± {fit.elbo_standard_error:.3f}" in text
        assert f"Precision of the globals (1: as with all units known) at the end: {fit.gaussian.head_report}." in text
        assert (
            f"Precision of the units (in hundredths of their diagonals) at the end: {fit.gaussian.tail_report}." in text
        )
    assert f"{found.yardstick.reference.log_evidence:.3f}" in text


def test_numbers_have_names(result):
    labels = [label for label, _, _ in result["epil"].yardstick.numbers("global")]
    assert labels[2] == "beta[2] treatment"
    assert labels[-1] == "sigma"
    numbers = list(result["radon"].yardstick.numbers("local"))
    assert numbers[0] == ("alpha[0]", "alpha", 0)
    assert numbers[-1] == ("beta[84]", "beta", 84)


def test_three_steps_from_the_start_are_not_to_be_relied_on(result):
    """The words follow the numbers: far from the posterior, they warn."""
    text = str(result["multisite"])
    assert text.count("Do not rely on this posterior for mu, log_raw_scale") == 3
    assert text.count("Do not rely on this posterior for t[") == 3
    assert " more.\n" in text


def test_raw_estimates_of_radon(result):
    yardstick = result["radon"].yardstick
    args = county, floor, log_radon = yardstick.example.module.data()
    estimates = yardstick.example.raw_estimates(args, yardstick.reference)
    sigma = float(yardstick.reference.variables["sigma_y"].mean)
    of_one, c = {}, 1  # a county with homes of both kinds
    for kind in (0, 1):
        of_one[kind] = log_radon[(county == c) & (floor == kind)]
    raw, se = (float(value[c]) for value in estimates["alpha"])
    assert raw == pytest.approx(float(of_one[0].mean()))
    assert se == pytest.approx(sigma / len(of_one[0]) ** 0.5)
    raw, se = (float(value[c]) for value in estimates["beta"])
    assert raw == pytest.approx(float(of_one[1].mean() - of_one[0].mean()))
    assert se == pytest.approx(sigma * (1 / len(of_one[0]) + 1 / len(of_one[1])) ** 0.5)
    assert int(estimates["beta"][0].isnan().sum()) == 25  # counties without a home on the ground floor


def test_no_error_no_warning(exact):
    text = str(exact)
    for name in ("mu", "log_raw_scale", "log_raw_df", "t"):
        error, ratio = exact.yardstick.errors(exact.fits[0].moments, name)
        torch.testing.assert_close(error, torch.zeros_like(error), rtol=0, atol=1e-6)
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-6, atol=0)
    assert "log evidence - ELBO" in text
    assert " 0.107" in text  # -26.793 - -26.9
    for warning in ("Do not rely", "not positive definite", "Interrupted"):
        assert warning not in text


def test_planted_errors_are_named(exact):
    gaussian = exact.fits[0].gaussian
    loc, local_loc = gaussian.global_loc.clone(), gaussian.local_loc.clone()
    loc[0] -= 0.5 * gaussian.precision.global_variance()[0].sqrt()
    local_loc[7] += 2 * gaussian.precision.local_variance()[7].sqrt()
    head = gaussian.precision.head.clone()
    head[2, 2] /= 1.4**2
    precision = Arrowhead(head, gaussian.precision.border, gaussian.precision.tail)
    text = str(with_gaussian(exact, global_loc=loc, local_loc=local_loc, precision=precision))
    assert "mean of mu, -0.50 posterior sds; sd of log_raw_df, 40 % too wide." in text
    assert "Largest errors of a site: mean of t[7], +2.00 posterior sds" in text
    assert "Do not rely on this posterior for mu, log_raw_df." in text
    assert "Do not rely on this posterior for t[7]." in text


def test_a_repair_at_the_end_and_an_early_end_are_told(exact):
    indefinite = RepairReport(-0.2, 0.2, 0.1, 1, 1)
    for report in ("head_report", "tail_report"):
        assert "has not reached a maximum" in str(with_gaussian(exact, **{report: indefinite}))
    text = str(with_fit(exact, steps=9))
    assert "Interrupted after 2 of 9 steps" in text
    assert "2 of 9" in text[: text.index("Largest")]


def test_moments_of_a_constrained_site_are_exact(result):
    gaussian = result["epil"].fits[1].gaussian
    mean, sd = result["epil"].fits[1].moments["sigma"]
    at = float(gaussian.global_loc[-1])
    log_sd = float(gaussian.precision.global_variance()[-1].sqrt())
    assert float(mean) == pytest.approx(numpy.exp(at + log_sd**2 / 2), rel=1e-9)
    assert float(sd) == pytest.approx(float(mean) * numpy.sqrt(numpy.expm1(log_sd**2)), rel=1e-6)
    beta, beta_sd = result["epil"].fits[1].moments["beta"]
    torch.testing.assert_close(beta, gaussian.global_loc[:6])
    torch.testing.assert_close(beta_sd, gaussian.precision.global_variance()[:6].sqrt())


def test_a_run_leaves_the_callers_state_alone(capsys):
    torch.set_default_dtype(torch.float32)
    pyro.param("AutoLaplaceFamily.loc", torch.tensor([1.0, 2.0]))
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first, second = (demo.run("multisite", steps=1, seed=seed, progress=False) for seed in (3, 3))
    assert first.fits[1].elbos == second.fits[1].elbos
    assert first.fits[1].elbos != demo.run("multisite", steps=1, seed=4, progress=False).fits[1].elbos
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert torch.get_default_dtype() == torch.float32
    assert dict(pyro.get_param_store().items())["AutoLaplaceFamily.loc"].tolist() == [1.0, 2.0]
    assert first.fits[1].gaussian.global_loc.dtype == torch.float64
    assert capsys.readouterr() == ("", "")


def test_progress_is_silent_where_stderr_is_no_terminal(capsys, monkeypatch):
    demo.run("multisite", steps=1)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    demo.run("multisite", steps=1)
    out, err = capsys.readouterr()
    assert out == ""
    for label in LABELS:
        assert f"{label}: 100%" in err
    assert "loss=" in err
    demo.run("multisite", steps=1, progress=False)
    assert capsys.readouterr().err == ""


def interrupt_at(monkeypatch, owner, method, call):
    """Let the n-th call of a method raise what Ctrl-C raises."""
    original, calls = getattr(owner, method), []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, method, interrupted)


@pytest.mark.parametrize(("call", "steps"), [(1, [0]), (3, [2]), (5, [4, 0]), (11, [4, 4, 2])])
def test_an_interrupt_keeps_what_was_found(monkeypatch, call, steps):
    interrupt_at(monkeypatch, SVI, "step", call)
    result = demo.run("multisite", steps=4, progress=False)
    assert result.interrupted
    assert [len(fit.elbos) for fit in result.fits] == steps
    assert f"Interrupted after {steps[-1]} of 4 steps" in str(result)
    assert pyro.get_param_store().keys() == set()


def test_an_interrupt_of_the_evaluation(monkeypatch):
    interrupt_at(monkeypatch, Trace_ELBO, "loss", 3)  # two batches evaluate the first guide
    result = demo.run("multisite", steps=1, progress=False)
    assert result.interrupted
    assert [fit.label for fit in result.fits] == ["un-amortized"]
    interrupt_at(monkeypatch, Trace_ELBO, "loss", 1)
    with pytest.raises(KeyboardInterrupt):
        demo.run("multisite", steps=1, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "schools"}, "there is no demo 'schools'; the names are: multisite, epil, radon"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        demo.run(**arguments)
