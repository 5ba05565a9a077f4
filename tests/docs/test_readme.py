"""The README says what runs, and what it says runs."""

import re

import pyro
import pytest
import torch
from helpers import documents

import laplace_amort

README = documents.ROOT / "README.rst"
BLOCKS = documents.python_blocks(documents.read(README))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_guide_for_an_existing_model_runs_as_shown(dtype, capsys):
    """In torch's default type, and in float64; it finds the scale that the data were made with."""
    torch.set_default_dtype(dtype)
    scope = {}
    documents.execute(BLOCKS[0], README, scope)
    printed = capsys.readouterr().out
    assert "unit plate 'units': 1000 units, dim -1" in printed
    low, median, high = map(float, re.search(r"tensor\(\[(.*)\]", printed)[1].split(","))
    assert abs(median - 0.7) < 0.1  # of the start, exp(0.5), it is 0.9 away
    assert 0.02 < high - low < 0.15
    assert printed.startswith("RIGHT: ")
    assert scope["result"].guide.loc.shape == (2,)
    assert "AutoLaplaceFamily.loc" not in pyro.get_param_store()


@pytest.mark.parametrize("dtype", ["torch.float64", "torch.float32"])
def test_the_answer_runs_as_shown(dtype, capsys):
    """As shown, and in float32; the guide fits, and passes the check that the README prints."""
    scope = {}
    for block in BLOCKS[1:]:
        documents.execute(block._replace(source=block.source.replace("torch.float64", dtype)), README, scope)
    printed = capsys.readouterr().out
    assert re.search(r"(\d+) of \1 checks passed", printed)
    # After the fit: theta has moved, and the loss is below that of the start.
    fitted = pyro.param("theta").detach().clone()
    assert fitted.abs().max() > 0.3
    z, se = scope["z"], scope["se"]
    after = sum(scope["svi"].evaluate_loss(z, se) for _ in range(20))
    with torch.no_grad():
        pyro.param("theta").unconstrained().zero_()
    assert after < sum(scope["svi"].evaluate_loss(z, se) for _ in range(20))


def test_the_answer_is_short():
    """Guide, mode and imports: what a reader has to take in, without the model that was there before."""
    _, answer, _ = (block.source for block in BLOCKS)
    model = answer[answer.index("def model") : answer.index("def mode(")]
    lines = [line for line in answer.replace(model, "").splitlines() if line.strip()]
    assert len(lines) <= 20


def test_the_two_commands_are_there_once():
    """One installs and runs the main job, one installs and runs the tests; CI reads the second from here."""
    blocks = documents.code_blocks(documents.read(README))
    demo, tests = (block.source.strip() for block in blocks if block.language == "sh")
    assert demo.endswith("&& laplace-amort demo")
    assert tests.endswith("&& pytest")
    ci = (README.parent / ".ci" / "run").read_text(encoding="utf-8")
    assert "&& pytest$' README.rst" in ci


def test_what_is_in_it_begins_with_twelve_names():
    """Then comes the suite that checks a guide, and the rest under its room."""
    text = documents.read(README)
    part = text[text.index("What is in it\n---") : text.index("What it cannot do yet\n---")]
    terms = re.findall(r"^``(\w+)``$", part, re.M)
    rooms = {path.parent.name for path in (documents.ROOT / "laplace_amort").glob("*/__init__.py")}
    assert set(terms[:12]) == set(laplace_amort.__all__[:12])
    assert part.index("laplace_amort.testing.check_guide") > part.index(terms[11])
    assert set(terms[12:]) == rooms - {"testing"}


def test_files_that_it_links_to_exist():
    for path in re.findall(r"<([\w./]+\.rst)>`_", documents.read(README)):
        assert (README.parent / path).is_file(), path
