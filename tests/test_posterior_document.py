"""What docs/posterior.rst shows runs as shown, and it names every rung and every check there is."""

import re
import textwrap
from pathlib import Path

import pytest
import torch
from fit_models import guide_for, poisson, poisson_counts

import laplace_amort
from laplace_amort import Ladder, diagnose, fit

DOCUMENT = Path(__file__).parents[1] / "docs" / "posterior.rst"
TEXT = DOCUMENT.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^\.\. code-block:: python\n\n((?:   .*\n|\n)+)", TEXT, re.MULTILINE)


def counts():
    return poisson_counts(12).to(torch.float64)


@pytest.fixture
def scope():
    result = fit(poisson, guide_for(poisson), counts(), objective=Ladder())
    return vars(laplace_amort) | {"model": poisson, "args": (counts(),), "result": result}


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_blocks_run(number, scope):
    exec(compile(textwrap.dedent(BLOCKS[number]), str(DOCUMENT), "exec"), scope)


def test_there_are_blocks():
    assert len(BLOCKS) == 2


@pytest.mark.parametrize("name", ["FixedDrawELBO", "NestedELBO", "MarginalLaplace", "MarginalQuadrature", "Ladder"])
def test_every_rung_is_there(name):
    assert f"``{name}(" in TEXT
    assert hasattr(laplace_amort, name)


def test_every_check_is_explained():
    result = fit(poisson, guide_for(poisson), counts(), objective=Ladder())
    names = {finding.name for finding in diagnose(result, simulations=10).findings}
    explained = set(re.findall(r"``([a-z-]+(?:, \w+)?(?: \w+)?)``", TEXT))
    assert {name.split(",")[0] if name.startswith("repair") else name for name in names} <= explained


def test_defaults_are_those_of_the_code():
    assert f"(``accuracy`` ({Ladder.accuracy}" in TEXT.replace("more than ``accuracy``", "more than (``accuracy``")
