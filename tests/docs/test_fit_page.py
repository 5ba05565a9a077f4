"""What docs/fit.rst shows runs as shown, and it names every status and setting there is."""

import inspect
import re

from helpers import documents

import laplace_amort
from laplace_amort import FitStatus, FixedDrawELBO, Ladder, Verdict, fit
from laplace_amort.fitting import judge

DOCUMENT = documents.ROOT / "docs" / "fit.rst"
TEXT = documents.read(DOCUMENT)


def test_blocks_say_how_the_fits_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope, results = {}, []
    for block in documents.python_blocks(TEXT):
        documents.execute(block, DOCUMENT, scope)
        results.append(scope["result"])
    assert [result.status.name for result in results] == ["CONVERGED", *["MAX_STEPS"] * 3, "CONVERGED"]
    assert scope["draws"]["y"].shape == (1000, 50)
    assert results[2].objective != results[1].objective  # it went on
    assert scope["filled"].shape == (100, 30, 4)
    assert scope["filled"].isfinite().all()


def test_every_status_and_every_verdict_is_explained():
    verdicts, statuses = TEXT.split("How it ended\n---")
    assert re.findall(r"^``([A-Z_]+)``$", verdicts, re.MULTILINE) == [verdict.name for verdict in Verdict]
    assert set(re.findall(r"^``([A-Z_]+)``$", statuses, re.MULTILINE)) == {status.name for status in FitStatus}


def test_bounds_of_the_verdict_are_those_of_the_code():
    words = " ".join(TEXT.split())
    assert f"means {judge._MEAN} standard deviations, standard deviations {judge._SD:.0f} %" in words
    assert f"those of units {judge._UNIT_MEAN} and {judge._UNIT_SD:.0f} %" in words
    assert f"k-hat {judge.K_GOOD}; {judge._EFFECTIVE} draws" in words
    assert f"{100 * judge._ELSEWHERE:.0f} % of the mass of a unit" in words


def test_the_table_of_defaults_has_objectives_there_are():
    table = TEXT[TEXT.index("The objective\n~~~") : TEXT.index("The way up\n~~~")]
    named = re.findall(r"``(\w+)\(\)``", table)
    assert named == ["Ladder", "Stochastic", "FixedDrawELBO"]
    assert set(named) <= set(dir(laplace_amort))


def test_defaults_are_those_of_the_code():
    words = " ".join(TEXT.split())
    assert f"ELBO on {FixedDrawELBO.num_draws} fixed" in words
    assert f"more than {FixedDrawELBO.accuracy} posterior" in words
    assert f"more than {Ladder.accuracy} posterior standard deviations ({2 * Ladder.accuracy} for units)" in words
    named = set(re.findall(r"``(\w+)=", TEXT))
    assert named <= {name for call in (fit, FixedDrawELBO) for name in inspect.signature(call).parameters}
