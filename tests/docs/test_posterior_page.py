"""What docs/posterior.rst shows runs as shown, and it names every rung and every check there is."""

import re

import pytest
import torch
from helpers import documents
from helpers.fit_models import guide_for, poisson, poisson_counts

import laplace_amort
from laplace_amort import Ladder, Level, diagnose, fit

DOCUMENT = documents.ROOT / "docs" / "posterior.rst"
TEXT = documents.read(DOCUMENT)


def counts():
    return poisson_counts(12).to(torch.float64)


def test_blocks_end_with_a_posterior_to_be_believed():
    scope = {}
    first, second = documents.python_blocks(TEXT)
    documents.execute(first, DOCUMENT, scope)
    documents.execute(second, DOCUMENT, scope)
    assert scope["draws"]["u"].shape == (1000, 59)
    assert scope["posterior"].k_hat < 0.5
    assert diagnose(scope["result"], simulations=10).level is Level.GOOD


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
