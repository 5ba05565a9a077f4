"""The command line without torch: its help, and what is wrong before a model is imported."""

import json
import subprocess
import sys

import pytest
from helpers.cli_trial import MODELS, ROWS

DATA = "--data", "trial.csv"
# Which of the slow packages a command line has loaded, after its output.
PROGRAM = """
import json, sys
from laplace_amort.cli.main import main
code = main(json.loads(sys.argv[1]))
loaded = sorted({"torch", "pyro", "pandas", "scipy", "arviz_stats"} & set(sys.modules))
print("\\n" + json.dumps([code, loaded]))
"""


def run(directory, *arguments):
    """The exit code, what was loaded, and all that was printed, of a process of its own."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(arguments)]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True)
    *printed, last = done.stdout.splitlines()
    return *json.loads(last), "\n".join(printed) + done.stderr


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "trial.csv").write_text(ROWS)
    (tmp_path / "short.csv").write_text("a,b\n1\n")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--help",), "exit codes:"),
        (("--version",), "laplace-amort 0"),
        (("fit", "--help"), "ladder, laplace, quadrature"),
        (("check", "--help"), "FILE.py:FACTORY"),
        (("demo", "--help"), "59 patients of an epilepsy trial"),
        (("demo", "--list"), "212 precincts of North Carolina"),
    ],
)
def test_help_loads_no_torch(directory, arguments, said):
    code, loaded, printed = run(directory, *arguments)
    assert (code, loaded) == (0, [])
    assert said in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sing",), "invalid choice: 'sing'"),
        (("demo", "schools"), "invalid choice: 'schools'"),
        (("demo", "senc", "--svi"), "--svi is for multisite, epil, radon"),
        (("demo", "--plot", "a.xyz"), "the plot's name a.xyz must end in one of"),
        (("check", "models"), "'models' is not of the form MODULE:FACTORY or FILE.py:FACTORY"),
        (("check", "absent.py:case"), "there is no file absent.py"),
        (("check", "absent:case"), "module 'absent' cannot be imported: ModuleNotFoundError: No module named 'absent'"),
        (("fit", "models:model", "--wrong"), "unrecognized arguments: --wrong"),
        (("fit", "absent.py:model"), "there is no file absent.py"),
        (("fit", "models.py:model", "--data", "absent.csv"), "cannot read absent.csv"),
        (("fit", "models.py:model", "--data", "short.csv"), "short.csv, line 2: 1 cells, and the first line names 2"),
        (("fit", "models.py:model", *DATA, "--map", "arm"), "--map 'arm' is not of the form NAME=VALUE"),
        (("fit", "models.py:model", *DATA, "--arg", "=1"), "--arg '=1' is not of the form NAME=VALUE"),
        (("fit", "models.py:model", *DATA, "--map", "arm=arn"), "--map: trial.csv has no column 'arn'"),
        (("fit", "models.py:model", *DATA, "--index", "x"), "--index: trial.csv has no column 'x'"),
        (("fit", "models.py:model", *DATA, "--objective", "best"), "    --objective 'Ladder()'"),
        (("fit", "models.py:model", *DATA, "--objective", "Ladder(rule=Hermite(3))"), "laplace_amort has no 'Hermite'"),
        (
            ("fit", "models.py:model", *DATA, "--mode", "newt"),
            "--mode 'newt' is unknown; it is one of newton, free",
        ),
        (("fit", "models.py:model", *DATA, "--head", "1"), "    --head 'JointCurvature()'"),
        (("fit", "models.py:model", *DATA, "--resume", "absent.pt"), "there is no file absent.pt to resume from"),
        (("fit", "models.py:model", *DATA, "--output", "a.txt"), "--output a.txt must end in one of .csv, .nc"),
    ],
)
def test_what_is_wrong_before_a_model_is_told_without_torch(directory, arguments, said):
    code, loaded, printed = run(directory, *arguments)
    assert (code, loaded) == (2, [])
    assert said in printed


def test_torch_is_seen_where_a_model_is_imported(directory):
    """The absence of torch elsewhere means something."""
    code, loaded, printed = run(directory, "fit", "models.py:modell", *DATA)
    assert code == 2
    assert "'models.py' has no 'modell'" in printed
    assert {"torch", "pyro"} <= set(loaded)
