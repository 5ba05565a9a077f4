"""Every page of the documentation runs as shown, its commands parse, and every public name is documented."""

import ast
import re
import sys
from types import ModuleType

import pytest
import torch
from helpers import documents

import laplace_amort
from laplace_amort.cli import main as cli

# Of these a test of their own runs every block, with more to say on what comes out.
RUN_ELSEWHERE = {
    "README.rst": "test_readme.py",
    "docs/fit.rst": "test_fit_page.py",
    "docs/posterior.rst": "test_posterior_page.py",
    **dict.fromkeys(["docs/quickstart.rst", "docs/choosing.rst", "docs/question_and_answer.rst"], "test_quickstart.py"),
}
_PYTHON = r"^(import \w|from \w+ import |def |with |print\(|\w[\w., ]* = \w+[(.])"


@pytest.mark.parametrize(
    "page", [page for page in documents.PAGES if documents.name(page) not in RUN_ELSEWHERE], ids=documents.name
)
def test_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    """As in a fresh interpreter: in torch's default type, with no name defined, and files where imports find them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    torch.set_default_dtype(torch.float32)
    known = set(sys.modules)
    try:
        documents.run(page, {"__name__": "__main__"})
    finally:
        for name in set(sys.modules) - known:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
                del sys.modules[name]


def test_pages_that_run_elsewhere_are_there():
    tests = documents.ROOT / "tests" / "docs"
    for page, test in RUN_ELSEWHERE.items():
        assert (documents.ROOT / page).is_file()
        assert re.search(r"documents\.(run|python_blocks)\(", (tests / test).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", documents.PAGES, ids=documents.name)
def test_no_python_hides_in_a_block_that_is_not_run(page):
    """Literal blocks hold output, shell and examples with prompts; Python has its own kind of block."""
    for block in documents.literal_blocks(documents.read(page)):
        hidden = re.search(_PYTHON, block.source, re.M) and not block.source.startswith(">>>")
        assert not hidden, f"{documents.name(page)}:{block.line} looks like Python: write '.. code-block:: python'"
    languages = {block.language for block in documents.code_blocks(documents.read(page))}
    assert languages <= {*documents.PYTHON, *documents.SHELL, "text", "none", "r", "R", "cpp", "rst", "ini"}


@pytest.mark.parametrize("page", documents.PAGES, ids=documents.name)
def test_commands_are_those_there_are(page):
    text = documents.read(page)
    for command in documents.command_lines(text):
        if command[0] == "laplace-amort":
            assert parses(command[1:]), " ".join(command)
    for script in re.findall(r"\bpython (\w[\w/]*\.py)\b", text):
        assert (documents.ROOT / script).is_file(), script


@pytest.mark.parametrize("page", documents.PAGES, ids=documents.name)
def test_links_to_files_lead_somewhere(page):
    """Also where rst is read as it is, and not built by Sphinx."""
    text = documents.read(page)
    linked = re.findall(r"<([\w./]+\.\w+)>`_", text) + re.findall(r"^ *\.\. (?:image|figure):: (\S+)", text, re.M)
    for path in linked:
        assert (page.parent / path).is_file(), path


def parses(arguments):
    """Whether the command line takes these; words in capitals stand for what one would type."""
    arguments = [{"NAME": "radon", "MODULE:FACTORY": "module:factory"}.get(word, word) for word in arguments]
    try:
        cli._parser().parse_args([*arguments, "--help"] if len(arguments) == 1 else arguments)
    except SystemExit as stop:
        return stop.code == 0
    return True


def test_the_check_of_commands_sees_a_wrong_one(capsys):
    assert parses(["demo", "epil", "--no-plot"])
    assert parses(["check", "MODULE:FACTORY"])
    assert not parses(["demo", "epil", "--stepz", "3"])
    assert not parses(["sing"])


API = documents.ROOT / "docs" / "api"


def documented(page):
    """The names that a page of the reference documents, in order; those of the package itself without its name."""
    text = re.sub(r"^\.\. currentmodule:: laplace_amort$", "", documents.read(page), flags=re.M)
    current, names = "", []
    for directive, name in re.findall(r"^\.\. (\w+):: ([\w.]+)$", text, re.M):
        if directive == "currentmodule":
            current = f"{name}."
        elif directive.startswith("auto"):
            names.append(name if directive == "automodule" else current + name)
    return names


def test_every_public_name_is_documented_once():
    names = [name for page in API.glob("*.rst") for name in documented(page)]
    public = {name: getattr(laplace_amort, name) for name in laplace_amort.__all__}
    assert {what.__name__ if isinstance(what, ModuleType) else name for name, what in public.items()} <= set(names)
    assert len(names) == len(set(names))


TWELVE = [
    *("fit", "diagnose", "AutoLaplaceFamily", "Ladder", "MarginalLaplace", "FixedDrawELBO", "Stochastic", "NewUnits"),
    *("LogJoint", "observed_information", "dual_path_param", "SoftAbs"),
]


def test_twelve_names_come_first():
    """In the package, and in the reference on a page of their own; then the suite that checks a guide."""
    assert set(laplace_amort.__all__[:12]) == set(TWELVE)
    assert documented(API / "first.rst") == [*TWELVE, "laplace_amort.testing.check_guide"]
    pages = re.findall(r"^   (api/\w+)$", documents.read(documents.ROOT / "docs" / "index.rst"), re.M)
    assert pages[0] == "api/first"


def test_every_room_has_a_page_of_reference():
    """It begins with the room's own sentence; ``errors`` has one too."""
    rooms = {path.parent.name for path in (documents.ROOT / "laplace_amort").glob("*/__init__.py")}
    pages = {page.stem: documented(page) for page in API.glob("*.rst")}
    assert set(pages) == {*rooms, "first", "errors"} - {"cli"} | {"command_line"}
    for room in rooms - {"cli"}:
        assert f"laplace_amort.{room}" in pages[room]


def test_every_page_is_in_the_table_of_contents():
    index = documents.ROOT / "docs" / "index.rst"
    listed = set(re.findall(r"^   ([\w/]+)$", documents.read(index), re.M))
    there = {page.relative_to(index.parent).with_suffix("").as_posix() for page in index.parent.rglob("*.rst")}
    assert there - {"index"} == listed


PAGE = """
Title
=====

Two colons::

    output 1

.. code-block:: python

   x = 1

   y = x + 1

- In a list:

  .. code-block:: python
     :emphasize-lines: 1

     z = y + 1

  .. note::

     .. code:: python

        zz = z + 1

>>> zz
4
>>> zz += 1; zz
5

.. code-block:: pycon

   >>> zz
   5

.. code-block:: sh

   $ python -m pip install . && laplace-amort demo epil \\
       --no-plot   # a comment

In ``data.csv``:

.. code-block:: text

   a,b
"""


def test_blocks_are_found_wherever_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    page, scope = tmp_path / "page.rst", {}
    page.write_text(PAGE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert documents.run(page, scope) == 7
    assert scope["zz"] == 5
    assert (tmp_path / "data.csv").read_text(encoding="utf-8") == "a,b\n"
    for block in documents.python_blocks(PAGE):
        ast.parse(block.source)
        assert PAGE.splitlines()[block.line - 1].strip() == block.source.splitlines()[0]
    assert [block.source for block in documents.literal_blocks(PAGE)] == ["output 1\n"]
    commands = list(documents.command_lines(PAGE))
    assert commands == [["python", "-m", "pip", "install", "."], ["laplace-amort", "demo", "epil", "--no-plot"]]


@pytest.mark.parametrize(
    ("planted", "expected"), [("z = y + 1", NameError), (">>> zz\n4", AssertionError), ("   x = 1", ZeroDivisionError)]
)
def test_a_page_that_does_not_run_is_found(planted, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    wrong = {NameError: "z = w + 1", AssertionError: ">>> zz\n7", ZeroDivisionError: "   x = 1 / 0"}[expected]
    page = tmp_path / "page.rst"
    page.write_text(PAGE.replace(planted, wrong, 1), encoding="utf-8")
    with pytest.raises(expected):
        documents.run(page, {})


def test_python_in_a_literal_block_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    page = tmp_path / "page.rst"
    page.write_text(PAGE.replace("output 1", "result = fit(model, guide)"), encoding="utf-8")
    with pytest.raises(AssertionError, match=r"page.rst:7 looks like Python"):
        test_no_python_hides_in_a_block_that_is_not_run(page)
