"""What docs/fit.rst shows runs as shown, and it names every status and setting there is."""

import inspect
import re

from helpers import documents

from laplace_amort import FitStatus, FixedDrawELBO, fit

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


def test_every_status_is_explained():
    assert set(re.findall(r"^``([A-Z_]+)``$", TEXT, re.MULTILINE)) == {status.name for status in FitStatus}


def test_defaults_are_those_of_the_code():
    assert f"ELBO on {FixedDrawELBO.num_draws} fixed" in TEXT
    assert f"more than {FixedDrawELBO.accuracy} posterior" in TEXT
    named = set(re.findall(r"``(\w+)=", TEXT))
    assert named <= set(inspect.signature(fit).parameters) | set(inspect.signature(FixedDrawELBO).parameters)
