"""The demo: both posteriors against the reference, what it says about them, its figures, and interrupts."""

import dataclasses
import sys

import pyro
import pytest
import torch
from helpers.demo_results import demo_result
from helpers.figures import misplaced_texts

from laplace_amort import FitStatus
from laplace_amort.examples import demo

NAMES = list(demo.EXAMPLES)


@pytest.mark.parametrize("name", NAMES)
def test_the_ladder_agrees_with_the_reference(name):
    """Within a few errors of 2000 draws, those of the reference included."""
    result = demo_result(name)
    assert result.fits["ladder"].status.ok
    for role, largest in (("global", 0.05), ("local", 0.1)):
        for label, site, index in result.yardstick.numbers(role):
            error, ratio = (part[index] for part in result.yardstick.errors(result.moments["ladder"], site))
            assert abs(error) < largest, label
            assert abs(ratio - 1) < largest, label
    posterior = result.fits["ladder"].posterior
    assert abs(posterior.log_evidence - result.yardstick.reference.log_evidence) < 0.05


@pytest.mark.parametrize(("name", "gap"), [("multisite", 0.1), ("epil", 0.7), ("radon", 8.0)])
def test_the_family_is_below_the_evidence(name, gap):
    """No correct ELBO is above the log evidence; how far below is what the family gets wrong."""
    result = demo_result(name)
    reference, family = result.yardstick.reference, result.fits["family"]
    noise = (family.standard_error**2 + reference.log_evidence_standard_error**2) ** 0.5
    assert -5 * noise < reference.log_evidence - family.objective < gap + 5 * noise


@pytest.mark.parametrize(("name", "globals_"), [("multisite", 3), ("epil", 7), ("radon", 5)])
def test_both_posteriors_stand_beside_nuts(name, globals_):
    result = demo_result(name)
    text = str(result)
    assert text.startswith(f"{name}: ")
    table = text.split("\n\n")[1]
    assert [table.count(posterior) for posterior in ("NUTS", "family", "ladder")] == [globals_] * 3
    for label, _, _ in result.yardstick.numbers("global"):
        assert f"\n{label} " in table
    for label, fit in result.fits.items():
        assert all(line in text for line in fit.headline().splitlines())
        assert f"\n{label}, {type(demo.OBJECTIVES[label]).__name__}():\n" in text
    assert f"ELBO {result.fits['family'].objective:.3f} ± " in text
    assert f"Reference log evidence {result.yardstick.reference.log_evidence:.3f}" in text


def test_words_say_where_the_family_is_wrong():
    """What the joint curvature does to the scales of a hierarchy shows in radon; the ladder has nothing to warn of."""
    family, ladder = str(demo_result("radon")).split("\n\n")[3:]
    assert "Do not rely on this posterior for sigma_alpha, sigma_beta" in family
    assert "the precision of the globals is not that of a maximum" in family
    assert "Do not rely" not in ladder
    assert "too wide" in ladder or "too narrow" in ladder
    assert "Do not rely" not in str(demo_result("multisite"))


@pytest.mark.parametrize("name", NAMES)
def test_the_figures_are_complete_and_nothing_overlaps(name):
    result = demo_result(name)
    figures = result.figures()
    sites = dict.fromkeys(site for _, site, _ in result.yardstick.numbers("local"))
    assert list(figures) == ["", "_family", *(f"_{site}" for site in sites)]
    names = {label.split()[0] for label, _, _ in result.yardstick.numbers("global")}
    for addition in ("", "_family"):
        assert {axes.get_title() for axes in figures[addition].get_axes()} == names
    for site in sites:
        (axes,) = figures[f"_{site}"].get_axes()
        assert axes.get_ylabel() == site
    for figure in figures.values():
        texts = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        assert any(text.startswith("reference") for text in texts)
        assert misplaced_texts(figure) == []


def test_a_run_leaves_the_callers_state_alone(capsys):
    torch.set_default_dtype(torch.float32)
    pyro.param("AutoLaplaceFamily.loc", torch.tensor([1.0, 2.0]))
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first, second = (demo.run("multisite", seed=seed, progress=False).fits["family"] for seed in (3, 4))
    assert first.objective != second.objective
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert torch.get_default_dtype() == torch.float32
    assert dict(pyro.get_param_store().items())["AutoLaplaceFamily.loc"].tolist() == [1.0, 2.0]
    assert first.gaussian.global_loc.dtype == torch.float64
    assert capsys.readouterr() == ("", "")


def test_progress_is_silent_where_stderr_is_no_terminal(capsys, monkeypatch):
    demo.run("multisite")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    demo.run("multisite")
    out, err = capsys.readouterr()
    assert out == ""
    assert "evaluations" in err or "it/s" in err


def interrupted_fit(monkeypatch, call, ends):
    """Let the n-th fit end as one does after Ctrl-C."""
    original, calls = demo.fit, []

    def fit(*args, **kwargs):
        calls.append(None)
        return ends(original(*args, **kwargs)) if len(calls) == call else demo_result("multisite").fits["family"]

    monkeypatch.setattr(demo, "fit", fit)


def as_interrupted(result):
    return dataclasses.replace(result, status=FitStatus.INTERRUPTED)


def raising(result):
    raise KeyboardInterrupt


@pytest.mark.parametrize("ends", [as_interrupted, raising])
@pytest.mark.parametrize(("call", "found"), [(1, []), (2, ["family"])])
def test_an_interrupt_keeps_what_was_found(monkeypatch, call, found, ends):
    interrupted_fit(monkeypatch, call, ends)
    result = demo.run("multisite", progress=False)
    assert result.interrupted
    assert list(result.fits) == list(result.moments) == found
    assert ("nothing was fitted" in str(result)) == (not found)
    assert pyro.get_param_store().keys() == set()


def test_a_name_that_there_is_not():
    with pytest.raises(ValueError, match="there is no demo 'schools'; the names are: multisite, epil, radon"):
        demo.run("schools")
