"""What docs/command_line.rst shows is what the command does: every line is typed, every output compared."""

import contextlib
import functools
import importlib
import io
import re
import shlex

import pytest
from helpers import documents

from laplace_amort.cli import fitting
from laplace_amort.cli import main as cli
from laplace_amort.cli.exits import Exit

PAGE = documents.ROOT / "docs" / "command_line.rst"
TEXT = documents.read(PAGE)
BLOCKS = documents.code_blocks(TEXT)
LINES = TEXT.splitlines()
_WORDS = 3  # of a line of output that are compared: what is to the right depends on digits


def file_of(block):
    """The file that a block is shown to be in, as 'In ``trial.py``:' says; empty for output."""
    before = [line for line in LINES[: block.line - 1] if line.strip() and not line.lstrip().startswith("..")]
    found = re.search(r"(?:^|[.,] |)(?:In|Further down in) ``([\w.]+)``:$", before[-1])
    return found[1] if found else ""


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """With the files that the page shows."""
    monkeypatch.chdir(tmp_path)
    for block in BLOCKS:
        if file_of(block):
            with (tmp_path / file_of(block)).open("a") as file:
                file.write(block.source + "\n\n")
    return tmp_path


def test_the_page_has_files_commands_and_outputs():
    files = [file_of(block) for block in BLOCKS if file_of(block)]
    assert files == ["trial.csv", "trial.py", "trial.py"]
    typed = {command[1] for command in documents.command_lines(TEXT) if command[0] == "laplace-amort"}
    assert typed >= {"fit", "demo", "check"}
    scripts = {command[1] for command in documents.command_lines(TEXT) if command[0] == "python"}
    assert scripts == {"benchmarks/step_cost.py"}


def masked(text):
    """Words without digits, so that other processors and versions say the same."""
    lines = [re.sub(r"-?\d[\d.]*(?:e[-+]\d+)?", "#", line) for line in text.splitlines() if "Python" not in line]
    return [re.sub(r"-{2,}", "-", line).split()[:_WORDS] for line in lines if line.strip()]


@pytest.fixture
def step_cost(monkeypatch):
    """The script that the page runs."""
    monkeypatch.syspath_prepend(documents.ROOT / "benchmarks")
    return importlib.import_module("step_cost")


def typed(line, scripts):
    """Run a line in this process, and return the exit code and both streams."""
    (words, *_) = documents._simple_commands(shlex.split(line))
    main, arguments = (cli.main, words[1:]) if words[0] == "laplace-amort" else (scripts[words[1]], words[2:])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()


def test_every_line_does_what_is_shown(directory, step_cost, monkeypatch):
    monkeypatch.setattr(step_cost, "_DENSE_LATENTS", 50)
    monkeypatch.setattr(step_cost, "_SECONDS", 0.0)
    monkeypatch.setattr(fitting, "diagnose", functools.partial(fitting.diagnose, simulations=10))
    scripts = {"benchmarks/step_cost.py": step_cost.main}
    out = err = ""
    compared = 0
    for block in BLOCKS:
        if block.language == "sh":
            for line in block.source.splitlines():
                code, out, err = typed(line.replace("100,1000,10000", "10,20,50"), scripts)
                expected = Exit.NOT_TRUSTED if "--objective elbo" in line else Exit.OK
                assert code == expected, (line, out, err)
        elif not file_of(block) and block.language == "text":
            shown = masked(block.source)
            assert shown in (masked(out), masked(err)), block.line
            compared += 1
    assert compared == 6
    assert {path.name for path in directory.iterdir()} >= {"posterior.csv", "posterior.nc", "marginals.png", "fit.laf"}


def test_the_table_of_exit_codes_is_that_of_the_code():
    table = dict(re.findall(r"^(\d+) +(\S.*)$", TEXT[TEXT.index("Exit codes\n---") :], re.M))
    assert table == {str(code.value): str(code) for code in Exit}


def test_every_option_that_is_named_is_there(step_cost):
    parser = cli._parser()
    commands = next(action for action in parser._actions if action.choices).choices
    options = {
        option
        for parser in (*commands.values(), step_cost.parser())
        for action in parser._actions
        for option in action.option_strings
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", TEXT))
    assert named <= options | {"--help"}
    # And the other way around, for those of the command that the page is about.
    told = {option for action in commands["fit"]._actions for option in action.option_strings if option[:2] == "--"}
    assert told - named <= {"--seed", "--unit-plate", "--unit-labels", "--help"}


def test_the_masks_see_a_difference():
    assert masked("mu  -1.20  0.5\n---- ---") == masked("mu 3e-05 22\n-- -----")
    assert masked("mu  -1.20  0.5") != masked("nu  -1.20  0.5")
