"""``docs/what_pyro_differentiates.rst`` names every test of the ``test_pyro_*.py`` files, and its snippets run."""

import doctest
import re
from pathlib import Path

import torch

DOCUMENT = Path(__file__).parents[2] / "docs" / "what_pyro_differentiates.rst"
PARTS = [*(Path(__file__).parents[1] / "guide").glob("test_pyro_*.py"), Path(__file__)]


def test_document_names_every_test_and_its_snippets_run():
    here = {name for part in PARTS for name in re.findall(r"^def (test_\w+)", part.read_text(), re.MULTILINE)}
    first_paragraph = DOCUMENT.read_text().split("\n\n")[1]
    assert set(re.findall(r"test_pyro_\w+\.py", first_paragraph)) == {part.name for part in PARTS}
    for part in DOCUMENT.read_text().split("Statement and test\n"):  # the prose, and the table at the end
        assert set(re.findall(r"``(test_\w+)``", part)) == here
    torch.set_default_dtype(torch.float32)
    results = doctest.testfile(str(DOCUMENT), module_relative=False)
    assert results.attempted > 10
    assert results.failed == 0
