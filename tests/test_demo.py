"""The demo: its numbers against the reference, what it says about them, interrupts, and the plot."""

import dataclasses
import sys

import numpy
import pyro
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from pyro.infer import SVI, Trace_ELBO

from laplace_amort import RepairReport, datasets, demo, plots


@pytest.fixture(scope="module")
def result():
    """Short runs of both examples, shared by the tests that only look at them."""
    return {name: demo.run(name, steps=3, progress=False) for name in demo.PROBLEMS}


@pytest.fixture(scope="module")
def exact():
    """A result made up from the reference itself, so that every error is known: none."""
    problem, reference = demo.PROBLEMS["multisite"], datasets.reference("multisite")
    variables = [reference.variables[name] for name in ("mu", "log_raw_scale", "log_raw_df", "t")]
    with demo.own_settings():
        args = problem.example.data()
        guide = problem.example.AmortizedGuide(*args)
    fit = demo.Fit(
        label="amortized",
        log_joint=guide.log_joint,
        loc=torch.cat([summary.mean.reshape(-1) for summary in variables]).double(),
        sd=torch.cat([summary.sd.reshape(-1) for summary in variables]).double(),
        elbos=[-30.0, -27.0],
        steps=2,
        seconds=1.0,
        num_parameters=3,
        elbo=-26.9,
        elbo_standard_error=0.01,
        repair=RepairReport(1.0, 1.0, 0.0, 0, 1),
    )
    return demo.DemoResult(problem, args, reference, [fit])


def with_fit(result, **changes):
    return dataclasses.replace(result, fits=[dataclasses.replace(result.fits[0], **changes)])


def test_amortized_fit_agrees_with_the_reference():
    """Seeded, so it passes or fails for good. The limit of this guide is 0.03 posterior sds and 8 %."""
    result = demo.run("multisite", steps=250, progress=False)
    un_amortized, amortized = result.fits
    assert (un_amortized.num_parameters, amortized.num_parameters) == (47, 3)
    for name in ("mu", "log_raw_scale", "log_raw_df", "t"):
        error, ratio = result.errors(amortized, name)
        assert error.abs().max() < 0.1, name
        assert ((ratio - 1).abs() < 0.1).all(), name
    # No correct ELBO is above the log evidence: five standard errors of their difference, 3e-7.
    noise = (amortized.elbo_standard_error**2 + result.reference.log_evidence_standard_error**2) ** 0.5
    gap = result.reference.log_evidence - amortized.elbo
    assert -5 * noise < gap < 0.2
    assert amortized.repair.num_repaired == 0


@pytest.mark.parametrize("name", demo.PROBLEMS)
def test_a_short_run_reports_every_global_of_both_guides(result, name):
    found = result[name]
    assert not found.interrupted
    assert [fit.label for fit in found.fits] == ["un-amortized", "amortized"]
    assert [len(fit.elbos) for fit in found.fits] == [3, 3]
    text = str(found)
    assert text.startswith(f"{name}: ")
    sizes = {"multisite": (3, 47, 3), "epil": (7, 66, 7)}[name]
    assert text.count("NUTS") == sizes[0]
    for label, _, _ in found.global_numbers():
        assert f"\n{label} " in text
    for fit, size in zip(found.fits, sizes[1:], strict=True):
        assert fit.num_parameters == size
        assert f"{fit.elbo:.3f} ± {fit.elbo_standard_error:.3f}" in text
        assert str(fit.repair) in text
    assert f"{found.reference.log_evidence:.3f}" in text


def test_epil_names_its_coefficients(result):
    labels = [label for label, _, _ in result["epil"].global_numbers()]
    assert labels[2] == "beta[2] treatment"
    assert labels[-1] == "sigma"


def test_three_steps_from_the_start_are_not_to_be_relied_on(result):
    """The words follow the numbers: far from the posterior, they warn."""
    text = str(result["multisite"])
    assert text.count("Do not rely on this posterior for") == 2
    assert "log_raw_scale" in text[text.index("Do not rely") :]


def test_no_error_no_warning(exact):
    text = str(exact)
    for name in ("mu", "log_raw_scale", "log_raw_df", "t"):
        error, ratio = exact.errors(exact.fits[0], name)
        torch.testing.assert_close(error, torch.zeros_like(error), rtol=0, atol=1e-6)
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-6, atol=0)
    assert "log evidence - ELBO" in text
    assert " 0.107" in text  # -26.793 - -26.9
    for warning in ("Do not rely", "not positive definite", "Interrupted"):
        assert warning not in text


def test_planted_errors_are_named(exact):
    fit, summary = exact.fits[0], exact.reference.variables["mu"]
    loc, sd = fit.loc.clone(), fit.sd.clone()
    loc[0] -= 0.5 * float(summary.sd)
    sd[2] *= 1.4
    loc[3 + 7] += 2 * sd[3 + 7]
    text = str(with_fit(exact, loc=loc, sd=sd))
    assert "mean of mu, -0.50 posterior sds; sd of log_raw_df, 40 % too wide." in text
    assert "Largest errors of a site: mean of 7, +2.00 posterior sds" in text
    assert "Do not rely on this posterior for mu, log_raw_df." in text


def test_a_repair_at_the_end_and_an_early_end_are_told(exact):
    text = str(with_fit(exact, repair=RepairReport(-0.2, 0.2, 0.1, 1, 1), steps=9))
    assert "has not reached a maximum" in text
    assert "Interrupted after 2 of 9 steps" in text
    assert "2 of 9" in text[: text.index("Largest")]


def test_moments_of_a_constrained_site_are_exact(result):
    fit = result["epil"].fits[1]
    at = fit.log_joint.sites["sigma"].start
    loc, sd = float(fit.loc[at]), 0.3
    fit = dataclasses.replace(fit, sd=torch.full_like(fit.sd, sd))
    mean, spread = (float(value) for value in fit.moments()["sigma"])
    assert mean == pytest.approx(numpy.exp(loc + sd**2 / 2), rel=1e-12)
    assert spread == pytest.approx(mean * numpy.sqrt(numpy.expm1(sd**2)), rel=1e-10)
    beta, beta_sd = fit.moments()["beta"]
    torch.testing.assert_close(beta, fit.loc[:6])
    torch.testing.assert_close(beta_sd, fit.sd[:6])
    assert float(fit.at(torch.tensor([0.0, 2.0]))["sigma"][1]) == pytest.approx(numpy.exp(loc + 2 * sd))


def test_a_run_leaves_the_callers_state_alone(capsys):
    torch.set_default_dtype(torch.float32)
    pyro.param("theta", torch.tensor([1.0, 2.0]))
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first, second = (demo.run("multisite", steps=1, seed=seed, progress=False) for seed in (3, 3))
    assert first.fits[1].elbos == second.fits[1].elbos
    assert first.fits[1].elbos != demo.run("multisite", steps=1, seed=4, progress=False).fits[1].elbos
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert torch.get_default_dtype() == torch.float32
    assert dict(pyro.get_param_store().items())["theta"].tolist() == [1.0, 2.0]
    assert first.fits[1].loc.dtype == torch.float64
    assert capsys.readouterr() == ("", "")


def test_progress_is_silent_where_stderr_is_no_terminal(capsys, monkeypatch):
    demo.run("multisite", steps=1)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    demo.run("multisite", steps=1)
    out, err = capsys.readouterr()
    assert out == ""
    assert "un-amortized: 100%" in err
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


@pytest.mark.parametrize(("call", "steps"), [(1, [0]), (3, [2]), (5, [4, 0])])
def test_an_interrupt_keeps_what_was_found(monkeypatch, call, steps):
    interrupt_at(monkeypatch, SVI, "step", call)
    result = demo.run("multisite", steps=4, progress=False)
    assert result.interrupted
    assert [len(fit.elbos) for fit in result.fits] == steps
    assert f"Interrupted after {steps[-1]} of 4 steps" in str(result)
    assert len(plots.demo_figure(result).axes) == 6  # an early end can be drawn
    assert pyro.get_param_store().keys() == set()


def test_an_interrupt_of_the_evaluation(monkeypatch):
    interrupt_at(monkeypatch, Trace_ELBO, "loss", 21)  # twenty batches evaluate the first guide
    result = demo.run("multisite", steps=1, progress=False)
    assert result.interrupted
    assert [fit.label for fit in result.fits] == ["un-amortized"]
    interrupt_at(monkeypatch, Trace_ELBO, "loss", 1)
    with pytest.raises(KeyboardInterrupt):
        demo.run("multisite", steps=1, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "schools"}, "there is no demo 'schools'; the names are: multisite, epil"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        demo.run(**arguments)


@pytest.mark.parametrize("name", demo.PROBLEMS)
def test_the_plot_is_complete_and_nothing_overlaps(result, name, tmp_path):
    figure = plots.demo_figure(result[name])
    path = tmp_path / "plot.png"
    plots.save_figure(figure, path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    labels = [label for label, _, _ in result[name].global_numbers()]
    axes = figure.get_axes()
    assert [a.get_title() for a in axes if a.get_title()] == labels
    units, history = axes[-2:]
    assert units.get_xlabel().startswith(result[name].problem.unit)
    assert history.get_ylabel() == "ELBO \N{MINUS SIGN} log evidence (nats)"
    assert len(units.get_legend().get_texts()) == 3
    assert misplaced_texts(figure) == []
    axes[0].set_title("a title that is far too long for its little panel")
    assert misplaced_texts(figure) != []


def misplaced_texts(figure):
    """Texts that leave the figure or lie on another one."""
    axes = figure.get_axes()
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    texts = [text for a in axes for text in (a.title, a.xaxis.label, a.yaxis.label)]
    for axis, (low, high) in [pair for a in axes for pair in ((a.xaxis, a.get_xlim()), (a.yaxis, a.get_ylim()))]:
        texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    texts += [text for a in axes if a.get_legend() for text in a.get_legend().get_texts()]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text() and t.get_visible()]
    width, height = figure.bbox.width, figure.bbox.height
    outside = [t for t, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]
    overlaps = [f"{t} on {other}" for i, (t, box) in enumerate(boxes) for other, its in boxes[:i] if box.overlaps(its)]
    return outside + overlaps


def test_densities_integrate_to_one(result):
    figure = plots.demo_figure(result["epil"])
    sigma = next(axes for axes in figure.get_axes() if axes.get_title() == "sigma")
    curves = [line for line in sigma.get_lines() if len(line.get_xdata()) > 100]
    assert len(curves) == 2
    for curve in curves:
        area = numpy.trapezoid(curve.get_ydata(), curve.get_xdata())
        assert area == pytest.approx(1, abs=1e-3)


def test_running_mean_keeps_a_line_and_its_ends():
    line = numpy.arange(40.0)
    smooth = plots._running_mean(line, 15)
    assert smooth[7:-7] == pytest.approx(line[7:-7])
    assert smooth[0] == pytest.approx(line[:8].mean())


def test_without_matplotlib_the_extra_is_named(exact, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "laplace_amort\[plots\]"'):
        plots.demo_figure(exact)
