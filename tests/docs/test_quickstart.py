"""docs/quickstart.rst and its like: what is printed is what the page says is printed."""

import re

import pytest
import torch
from helpers import documents

DOCS = documents.ROOT / "docs"
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def agree(shown, printed):
    """Whether two lines have the same words, and numbers within a tenth; what is shown may break off with dots."""
    words, found = (_NUMBER.sub("#", line).split() for line in (shown, printed))
    if words[-1:] == ["..."]:
        words, found = words[:-1], found[: len(words) - 1]
    numbers = zip(*(map(float, _NUMBER.findall(line)) for line in (shown, printed)), strict=False)
    return words == found and all(abs(a - b) <= 0.1 * abs(a) + 5e-3 for a, b in numbers)


@pytest.mark.parametrize("name", ["quickstart.rst", "choosing.rst", "question_and_answer.rst"])
def test_what_is_shown_is_printed(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    documents.run(DOCS / name, {})
    printed = capsys.readouterr().out.splitlines()
    for block in documents.literal_blocks(documents.read(DOCS / name)):
        for line in filter(str.strip, block.source.splitlines()):
            if line.strip("- .") and not re.fullmatch(r"[\s-]+", line):
                assert any(agree(line, other) for other in printed), line


@pytest.mark.parametrize(
    ("shown", "printed", "expected"),
    [
        ("sigma 0.54 0.067", "sigma  0.541  0.0669", True),
        ("sigma 0.54 ...", "sigma 0.541 0.0669 and so on", True),
        ("sigma 0.54", "sigma 0.74", False),
        ("sigma 0.54 0.067", "sigma 0.54", False),
        ("sigma 0.54", "mu 0.54", False),
    ],
)
def test_lines_are_compared_by_words_and_numbers(shown, printed, expected):
    assert agree(shown, printed) is expected
