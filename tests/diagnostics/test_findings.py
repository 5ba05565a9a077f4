"""Findings, their verdict, what counts as bad, and how far two posteriors are apart."""

import math
from types import SimpleNamespace

import numpy
import pytest
import torch
from helpers.fit_models import gaussian, guide_for

from laplace_amort import Diagnosis, Finding, Level, MarginalLaplace, fit
from laplace_amort.diagnostics.consistency import Consistency
from laplace_amort.diagnostics.thresholds import SCORES, Accuracy, Bounds
from laplace_amort.evidence.comparison import Comparison, compare

LEVELS = [Level.GOOD, Level.UNKNOWN, Level.DOUBTFUL, Level.BAD]


def of(*levels, advice=""):
    return Diagnosis(tuple(Finding(f"check {i}", level, f"{i}.5", "words") for i, level in enumerate(levels)), advice)


# ------------------------------------------------------------------------------------------------------------- findings


def test_levels_are_in_order():
    assert Level.GOOD < Level.UNKNOWN < Level.DOUBTFUL < Level.BAD
    assert max(LEVELS) is Level.BAD
    assert [str(level) for level in LEVELS] == ["good", "not known", "doubtful", "bad"]


@pytest.mark.parametrize("worst", LEVELS)
def test_the_worst_counts(worst):
    found = of(Level.GOOD, worst, Level.GOOD)
    assert found.level is worst
    assert found.ok is (worst in (Level.GOOD, Level.UNKNOWN))


def test_nothing_looked_at():
    assert Diagnosis(()).ok
    assert Diagnosis(()).level is Level.GOOD


VERDICTS = {
    "good": ((Level.GOOD, Level.UNKNOWN), "It fits: nothing that was looked at speaks against this posterior."),
    "doubtful": ((Level.DOUBTFUL, Level.GOOD, Level.DOUBTFUL), "It may not fit: check 0, check 2."),
    "bad": ((Level.GOOD, Level.BAD), "It does not fit: check 1."),
    "both": ((Level.DOUBTFUL, Level.BAD), "It does not fit: check 1. Doubtful: check 0."),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_verdict(case):
    levels, verdict = VERDICTS[case]
    assert of(*levels).verdict == verdict


def test_table_has_a_row_for_each_finding():
    found = of(*LEVELS)
    verdict, empty, header, _, *rows = str(found).splitlines()
    assert (verdict, empty) == (found.verdict, "")
    assert header.split() == ["check", "level", "value", "meaning"]
    for one, row in zip(found.findings, rows, strict=True):
        assert row.split() == [*one.name.split(), *str(one.level).split(), one.value, one.sentence]


def test_numbers_are_printed_as_they_are():
    assert "0.10" in str(Diagnosis((Finding("one", Level.GOOD, "0.10", "words"),)))


def test_long_sentences_are_broken():
    text = str(Diagnosis((Finding("one", Level.GOOD, "1", "many words " * 30),)))
    assert max(len(line) for line in text.splitlines()) < 100
    assert text.count("many") == 30


def test_next_line_stands_at_the_end_if_there_is_one():
    assert str(of(Level.BAD, advice="fit(model)")).endswith("\n\nNext:\n    fit(model)")
    assert "Next" not in str(of(Level.BAD))


# ----------------------------------------------------------------------------------------------------------- thresholds


def test_bounds_count_as_the_better_level():
    bounds = Bounds(0.1, 0.3)
    levels = [bounds.level(value) for value in (-math.inf, 0.1, 0.2, 0.3, 0.31, math.inf, math.nan)]
    assert levels == [Level.GOOD] * 2 + [Level.DOUBTFUL] * 2 + [Level.BAD] * 3
    assert bounds.beyond(0.25).level(0.31) is Level.GOOD


def test_the_worse_of_two_numbers_counts():
    accuracy = Accuracy(mean=Bounds(0.1, 0.3), sd=Bounds(0.2, 0.4))
    assert accuracy.level(Comparison(0.1, 0.2, "mu")) is Level.GOOD
    assert accuracy.level(Comparison(0.2, 0.2, "mu")) is Level.DOUBTFUL
    assert accuracy.level(Comparison(0.1, 0.5, "mu")) is Level.BAD
    assert accuracy.beyond(0.1).level(Comparison(0.2, 0.5, "mu")) is Level.DOUBTFUL


@pytest.mark.parametrize(("p_value", "bias", "expected"), [
    (0.01, 0.5, Level.GOOD), (1e-4, 0.05, Level.GOOD), (1e-4, -0.2, Level.DOUBTFUL), (1e-4, -0.5, Level.BAD),
])  # fmt: skip
def test_a_bias_counts_where_chance_does_not_explain_it(p_value, bias, expected):
    found = Consistency(numpy.array([0.0, bias]), numpy.array([0.1, 0.1]), p_value, 100, 0)
    assert SCORES.level(found) is expected


# ----------------------------------------------------------------------------------------------------------- comparison


def posterior(mean, sd, locals_=()):
    """Of given means and standard deviations by site, those of units among them."""
    layout = SimpleNamespace(global_sites=[name for name in mean if name not in locals_], local_sites=list(locals_))
    unit_model = SimpleNamespace(layout=layout)
    parts = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in mean.items()}
    sds = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in sd.items()}
    return SimpleNamespace(gaussian=SimpleNamespace(unit_model=unit_model), moments=(parts, sds))


def test_by_hand():
    """In standard deviations of the reference; the worst element counts a share twice."""
    one = posterior({"mu": 1.0, "y": [[0.0, 3.0], [0.0, 0.0]]}, {"mu": 1.5, "y": [[1.0, 1.0], [1.0, 3.0]]}, ["y"])
    other = posterior({"mu": 2.0, "y": [[0.0, 2.0], [0.0, 0.0]]}, {"mu": 2.0, "y": [[1.0, 1.0], [1.0, 2.0]]}, ["y"])
    found = compare(one, other)
    assert found.globals_ == (0.5, 0.25, "mu")
    assert found.units[:2] == (1.0, 0.5)
    assert found.units.where in ("y[0, 1]", "y[1, 1]")
    assert compare(other, one).globals_.mean == pytest.approx(1 / 1.5)


def test_worst_of_several_sites():
    zero = {"a": [0.0, 0.0], "b": [0.0, 0.0]}
    one, other = (
        posterior({"a": [0.1, 0.2], "b": [0.0, -0.9]}, {"a": [1.0, 1.0], "b": [1.0, 1.0]}),
        posterior(zero, {"a": [1.0, 1.0], "b": [1.0, 1.0]}),
    )
    assert compare(one, other).globals_ == (0.9, 0.0, "b[1]")


def test_what_is_fixed_is_not_compared():
    """As the diagonal of a correlation matrix, whose standard deviation is a rounding error."""
    one = posterior({"corr": [1.0, 0.5]}, {"corr": [1e-17, 0.1]})
    other = posterior({"corr": [1.0 + 1e-16, 0.5]}, {"corr": [0.0, 0.1]})
    assert compare(one, other).globals_[:2] == (0.0, 0.0)


def test_no_sites_and_sites_without_elements():
    nothing = posterior({"empty": torch.zeros(0)}, {"empty": torch.zeros(0)})
    assert compare(nothing, nothing) == ((0.0, 0.0, ""), (0.0, 0.0, ""))


@pytest.mark.parametrize("which", ["mean", "sd"])
def test_infinite_moments_are_infinitely_wrong(which):
    mean, sd = {"mu": [0.0, 0.0]}, {"mu": [1.0, 1.0]}
    broken = {"mu": [0.0, math.inf]}
    one = posterior(broken, sd) if which == "mean" else posterior(mean, broken)
    found = compare(one, posterior(mean, sd)).globals_
    assert getattr(found, which) == math.inf
    assert found.where == "mu[1]"


@pytest.mark.parametrize("which", ["mean", "sd"])
def test_not_a_number_is_not_good(which):
    mean, sd = {"mu": [0.0, 0.0]}, {"mu": [1.0, 1.0]}
    broken = {"mu": [0.0, math.nan]}
    one = posterior(broken, sd) if which == "mean" else posterior(mean, broken)
    found = compare(one, posterior(mean, sd)).globals_
    assert not getattr(found, which) <= 1
    assert found.where == "mu[1]"


def test_posterior_against_itself():
    z = torch.tensor([1.0, 3.0, -0.5])
    found = fit(gaussian, guide_for(gaussian), z, objective=MarginalLaplace()).posterior
    same = compare(found, found)
    assert same.globals_ == (0.0, 0.0, "mu")
    assert same.units[:2] == (0.0, 0.0)
    assert same.units.where.startswith("y[")
