"""What docs/fit.rst shows runs as shown, and it names every status and setting there is."""

import inspect
import re
import textwrap
from pathlib import Path

import pytest
import torch
from fit_models import guide_for, poisson_counts, subsampled

import laplace_amort
from laplace_amort import FitStatus, FixedDrawELBO, fit

DOCUMENT = Path(__file__).parents[1] / "docs" / "fit.rst"
TEXT = DOCUMENT.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^\.\. code-block:: python\n\n((?:   .*\n|\n)+)", TEXT, re.MULTILINE)


@pytest.fixture
def scope(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(laplace_amort.Stochastic, "max_steps", 100)
    guide, args = guide_for(subsampled), (poisson_counts(12).double()[0], None)
    found = vars(laplace_amort) | {"torch": torch, "model": subsampled, "guide": guide, "args": args}
    return found | {"result": fit(subsampled, guide_for(subsampled), *args)}


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_blocks_run(number, scope, capsys):
    block = textwrap.dedent(BLOCKS[number]).replace("accuracy=0.2", "accuracy=0.2, max_steps=100")
    exec(compile(block, str(DOCUMENT), "exec"), scope)


def test_there_are_blocks():
    assert len(BLOCKS) == 3


def test_every_status_is_explained():
    assert set(re.findall(r"^``([A-Z_]+)``$", TEXT, re.MULTILINE)) == {status.name for status in FitStatus}


def test_defaults_are_those_of_the_code():
    assert f"ELBO on {FixedDrawELBO.num_draws} fixed" in TEXT
    assert f"more than {FixedDrawELBO.accuracy} posterior" in TEXT
    named = set(re.findall(r"``(\w+)=", TEXT))
    assert named <= set(inspect.signature(fit).parameters) | set(inspect.signature(FixedDrawELBO).parameters)
