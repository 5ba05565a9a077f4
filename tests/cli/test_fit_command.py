"""``laplace-amort fit``: columns to parameters, streams, files and exit codes."""

import csv
import functools
import importlib.util
import io
import os
import re
import signal
import subprocess
import sys

import matplotlib.image
import pyro
import pytest
import torch
import xarray
from helpers.cli_trial import MODELS, ROWS, WAITS

from laplace_amort import FitStatus, MarginalLaplace
from laplace_amort.cli import fitting as fit_command
from laplace_amort.cli import main as cli
from laplace_amort.cli.report import as_options
from laplace_amort.fitting.history import History

DATA = ("--data", "trial.csv", "--categorical", "clinic")
IMPOSSIBLE = "observed site 'healed' (Binomial) has 1 of 10 values that are impossible, the first 99 at index [1]"
QUICK = (*DATA, "--objective", "laplace", "--quiet")


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """A user's directory, as the current one."""
    (tmp_path / "trial.csv").write_text(ROWS)
    (tmp_path / "models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, target, *options):
    code = cli.main(["fit", f"models.py:{target}", *options])
    return code, *capsys.readouterr()


def numbers(out):
    """Mean and standard deviation by name in the printed tables."""
    rows = re.findall(r"^(\w+(?:\[[^\]]*\])?) +(-?[\d.e-]+) +([\d.e-]+) ", out, re.M)
    return {name: (float(mean), float(sd)) for name, mean, sd in rows}


def test_a_fit_as_a_newcomer_types_it(capsys):
    code, out, err = run(capsys, "model", *DATA)
    assert code == 0
    assert out.startswith("RIGHT: ")
    assert "\nfound by Ladder(" in out
    assert set(numbers(out)) == {"mu", "effect", "sigma"}
    assert abs(numbers(out)["effect"][0] - 0.75) < 0.3  # positive, about what lme4 makes of all eight clinics
    assert "10 rows\nclinic: codes of 5 labels, 1, 2, 3, 4, 5, integers because the model indexes with them\n" in err
    assert "arm: codes of 2 labels, control, drug\n" in err
    # It ran in float64 with parameters of its own, and left no trace.
    assert len(pyro.get_param_store()) == 0


def test_float32_and_seed_and_starts_reach_the_fit(capsys, monkeypatch):
    seen = {}
    original = fit_command.laplace_amort.fit

    def spied(*args, **kwargs):
        seen.update(kwargs, dtype=args[2 + 2].dtype)
        return original(*args, **kwargs)

    monkeypatch.setattr(fit_command.laplace_amort, "fit", spied)
    assert run(capsys, "model", *QUICK, "--float32", "--seed", "3", "--starts", "2")[0] == 0
    assert (seen["seed"], seen["starts"], seen["dtype"], seen["progress"]) == (3, 2, torch.float32, False)
    assert torch.get_default_dtype() == torch.float64


def test_ways_to_say_the_same(capsys, directory, monkeypatch):
    """A dict of columns, a module of Pyro, a module by name, another separator, standard input."""
    expected = numbers(run(capsys, "model", *QUICK)[1])
    assert numbers(run(capsys, "of_dict", *QUICK)[1]) == expected
    assert numbers(run(capsys, "module", *QUICK)[1]) == expected
    (directory / "renamed.csv").write_text(ROWS.replace("arm", "treatment").replace(",", ";"))
    renamed = "--data", "renamed.csv", "--separator", "semicolon", "--map", "arm=treatment", *QUICK[2:]
    assert numbers(run(capsys, "model", *renamed)[1]) == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO(ROWS))
    assert numbers(run(capsys, "model", "--data", "-", *QUICK[2:])[1]) == expected
    (directory / "models_by_name.py").write_text(MODELS)
    assert cli.main(["fit", "models_by_name:model", *QUICK]) == 0
    assert numbers(capsys.readouterr().out) == expected
    sys.modules.pop("models_by_name")


def test_values_that_are_no_columns(capsys):
    code, _, err = run(capsys, "yes_or_no", *DATA, "--objective", "laplace", "--arg", "scale=1.5", "--arg", "prior=2")
    assert code == 0
    assert "prior: 2\nscale: 1.5\n" in err or "scale: 1.5\nprior: 2\n" in err


def test_functions_that_make_the_model(capsys):
    """With a guide of their own, or with data of their own; columns are integers where the model needs them."""
    code, out, _ = run(capsys, "case", *DATA, "--objective", "elbo", "--quiet")
    assert code in (0, 4)  # as its verdict is
    assert "\nfound by FixedDrawELBO(" in out
    assert "\nGaussian approximation at the optimum\n" in out
    original, halved = (numbers(run(capsys, name, *QUICK)[1]) for name in ("model", "pair"))
    assert abs(halved["mu"][0] - original["mu"][0] - original["effect"][0] / 2) < 0.1


def test_units_have_their_labels(capsys, directory):
    (directory / "trial.csv").write_text(ROWS.replace("\n1,", "\nBonn,").replace("\n2,", "\nUlm,"))
    _, out, _ = run(capsys, "model", *QUICK, "--units")
    assert [name for name in numbers(out) if "level" in name] == [f"level[{n}]" for n in ("3", "4", "5", "Bonn", "Ulm")]
    code, _, err = run(capsys, "model", *QUICK, "--units", "--unit-labels", "arm")
    assert code == 2
    assert "plate 'clinics' has 5 units, and no column of that name" in err


def test_a_column_that_does_not_count_from_0_is_noted(capsys):
    _, _, err = run(capsys, "model", "--data", "trial.csv", "--objective", "laplace")
    assert "note: nothing is at 0 in 'clinic'" in err


def test_csv_on_standard_output(capsys):
    code, out, err = run(capsys, "model", *QUICK, "--units", "--format", "csv")
    assert code == 0
    rows = list(csv.DictReader(out.splitlines()))
    assert [row["site"] for row in rows] == ["mu", "effect", "sigma", *["level"] * 5]
    assert [row["unit"] for row in rows] == ["", "", "", *"12345"]
    assert float(rows[2]["5%"]) < float(rows[2]["mean"]) < float(rows[2]["95%"])
    assert err.startswith(("RIGHT: ", "INEXACT: "))
    assert "\nCONVERGED: " in err


def test_files(capsys, directory):
    names = {"--save": "fit.pt", "--plot": "marginals.png"}
    files = [word for pair in names.items() for word in pair]
    code, _, err = run(capsys, "model", *QUICK, "--output", "p.csv", "--output", "p.nc", "--draws", "50", *files)
    assert code == 0
    assert err.splitlines() == [f"wrote {name}" for name in ("fit.pt", "p.csv", "p.nc", "marginals.png")]
    assert [row["site"] for row in csv.DictReader((directory / "p.csv").read_text().splitlines())] == [
        "mu",
        "effect",
        "sigma",
    ]
    with xarray.open_datatree("p.nc", engine="h5netcdf") as tree:
        assert tree["posterior"]["level"].shape == (1, 50, 5)
        assert tree["posterior"]["clinics"].values.tolist() == list("12345")
    assert matplotlib.image.imread("marginals.png").std() > 0.01
    before = (directory / "p.csv").read_bytes()
    code, out, err = run(capsys, "model", *QUICK, "--output", "p.csv")
    assert (code, out) == (2, "")
    assert "p.csv is there already" in err
    (directory / "p.csv").write_text("old")
    assert run(capsys, "model", *QUICK, "--output", "p.csv", "--overwrite")[0] == 0
    assert (directory / "p.csv").read_bytes() == before


def test_a_file_that_fails_loses_neither_the_result_nor_the_others(capsys, directory, monkeypatch):
    monkeypatch.setattr(fit_command.Report, "plot", lambda self, path: 1 / 0)
    code, out, err = run(capsys, "model", *QUICK, "--output", "p.csv", "--plot", "p.png")
    assert code == 1
    assert "p.png was not written: ZeroDivisionError" in err
    assert set(numbers(out)) == {"mu", "effect", "sigma"}
    assert (directory / "p.csv").exists()


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("model", (), "needs clinic, arm, healed, total, and there is no data:\n    --data FILE.csv"),
        ("model", ("--data", "absent.csv"), "cannot read absent.csv"),
        ("model", ("--data", "holes.csv"), "holes.csv: 1 missing value: line 3, column 'healed': 'NA'"),
        ("model", ("--data", "other.csv"), "other.csv has no column arm, which models.py:model needs; it has clinic, "),
        ("model", ("--data", "other.csv"), "    --map arm=COLUMN\n    --arg arm=VALUE"),
        ("model", (*DATA, "--map", "arn=arm"), "--map: models.py:model has no parameter 'arn'; there are: clinic, arm"),
        ("model", (*DATA, "--map", "arm=arn"), "--map: trial.csv has no column 'arn'; there are: clinic, arm"),
        ("model", (*DATA, "--map", "arm"), "--map 'arm' is not of the form NAME=VALUE"),
        ("model", (*DATA, "--arg", "x=1"), "--arg: models.py:model has no parameter 'x'"),
        ("model", (*DATA, "--index", "x"), "--index: trial.csv has no column 'x'"),
        ("model", ("--data", "half.csv", "--index", "clinic"), "--index clinic: the column has numbers that are not"),
        ("modell", DATA, "'models.py' has no 'modell'; its functions are: Class, "),
        ("Class", DATA, "models.py:Class is a class"),
        ("model", (*DATA, "--objective", "best"), "--objective 'best' is unknown; it is one of ladder, laplace, "),
        ("model", (*DATA, "--objective", "Ladder(0)"), "ValueError: accuracy must be a positive number"),
        ("model", (*DATA, "--objective", "GaussHermite(3)"), "objective must be one such as FixedDrawELBO()"),
        ("model", (*DATA, "--objective", "().__class__()"), "--objective '().__class__()' is unknown"),
        ("model", (*DATA, "--head", "none"), "--head 'none' is unknown; it is one of joint, marginal, or a call such"),
        ("model", (*DATA, "--mode", "free", "--head", "marginal"), "MarginalCurvature is the curvature along the mode"),
        ("case", (*DATA, "--head", "joint"), "models.py:case returns a guide of its own: leave --head out"),
        ("model", (*DATA, "--output", "a.txt"), "--output a.txt must end in one of .csv, .nc"),
        ("model", (*DATA, "--output", "nowhere/a.nc"), "there is no directory nowhere"),
        ("model", (*DATA, "--save", "."), ". is a directory, and the result a file"),
        ("model", (*DATA, "--plot", "a.xyz"), "the plot's name a.xyz must end in one of"),
        ("model", (*DATA, "--draws", "9"), "--draws is for a file of draws"),
        ("model", (*DATA, "--resume", "absent.pt"), "there is no file absent.pt to resume from"),
        ("model", (*DATA, "--starts", "0"), "0 is not a positive number"),
    ],
)
def test_wrong_usage(capsys, directory, target, options, message):
    (directory / "holes.csv").write_text(ROWS.replace("10,37", "NA,37"))
    (directory / "other.csv").write_text(ROWS.replace("arm", "treatment"))
    (directory / "half.csv").write_text(ROWS.replace("\n1,", "\n1.5,"))
    code, out, err = run(capsys, target, *options)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("broken", DATA, "models.py:broken raised ValueError: not today"),
        ("of_absent", DATA, "raised KeyError: 'clinik'; the columns are: clinic, arm, healed, total"),
        ("shifted", ("--data", "trial.csv"), "--index COLUMN, one of clinic, healed, total"),
        ("short", ("--data", "trial.csv"), "--categorical COLUMN, one of clinic, healed, total"),
        ("triple", DATA, "it returned a tuple of 5"),
        ("other_guide", DATA, "the guide an AutoLaplaceFamily; it is a int"),
        ("bare_argument", DATA, "args is a Tensor, write (data,) for one argument"),
        ("minibatch", (*DATA, "--objective", "ladder"), "On the command line: --objective stochastic"),
        ("model", (*DATA, "--unit-plate", "rows"), "On the command line: --unit-plate NAME"),
        (
            "model",
            (*QUICK[:-1], "--data", "impossible.csv"),
            "observed site 'healed' (Binomial) has 1 of 10 values that are impossible, the first 99 at index [1]",
        ),
    ],
)
def test_failures_of_the_model(capsys, directory, target, options, message):
    (directory / "impossible.csv").write_text(ROWS.replace("10,37", "99,37"))
    code, out, err = run(capsys, target, *options)
    assert (code, out) == (1, "")
    assert message in err


def test_a_failure_shows_the_lines_of_the_user_alone(capsys):
    _, _, err = run(capsys, "broken", *QUICK)
    assert 'raise ValueError("not today")' in err
    assert "binding.py" not in err


def test_index_says_what_does_not_show(capsys):
    code, _, _ = run(capsys, "shifted", "--data", "trial.csv", "--index", "clinic", "--objective", "laplace")
    assert code == 0


def test_rows_with_holes_are_dropped_on_request(capsys, directory):
    (directory / "holes.csv").write_text(ROWS.replace("10,37", "NA,37"))
    code, _, err = run(capsys, "model", "--data", "holes.csv", "--drop-missing", *DATA[2:], "--objective", "laplace")
    assert code == 0
    assert err.startswith("9 rows; 1 left out, in which something is missing\n")


@pytest.mark.parametrize("options", [(), ("--format", "csv"), ("--units", "--diagnose")])
def test_a_fit_that_has_not_converged_is_shown(capsys, options, monkeypatch):
    monkeypatch.setattr(fit_command, "diagnose", functools.partial(fit_command.diagnose, simulations=0))
    few = "--objective", "FixedDrawELBO(num_draws=4, max_draws=4)", "--quiet"
    code, out, err = run(capsys, "model", *DATA, *few, *options)
    assert code == 3
    assert "TOO_FEW_DRAWS" in (err if "csv" in options else out)
    assert "the fit has not converged" in err


def test_a_diagnosis_that_is_bad_has_a_code_of_its_own(capsys, monkeypatch):
    monkeypatch.setattr(fit_command, "diagnose", functools.partial(fit_command.diagnose, simulations=0))
    code, out, _ = run(capsys, "model", *DATA, "--objective", "elbo", "--diagnose", "--quiet")
    assert code == 4
    assert "It does not fit: " in out or "It may not fit: " in out
    assert "laplace-amort fit ... --objective 'MarginalQuadrature(GaussHermite(num_points=9))'" in out
    following = re.search(r"--objective '(.*)'", out)[1]
    code, out, err = run(capsys, "model", *DATA, "--objective", following, "--diagnose", "--quiet", "--format", "csv")
    assert code == 0
    assert "It fits" in err
    assert "check" not in out


def test_a_posterior_that_cannot_be_had_is_an_error(capsys, monkeypatch):
    def none(self, *args, **kwargs):
        raise ValueError("Matrix is not positive definite")

    with monkeypatch.context() as patch:
        patch.setattr(MarginalLaplace, "posterior", none)
        code, out, err = run(capsys, "model", *QUICK, "--diagnose")
        assert code == 1
        assert "\nCONVERGED: " in out
        assert "there is no posterior: Matrix is not positive definite" in err
        assert run(capsys, "model", *QUICK, "--format", "csv")[:2] == (1, "")
    monkeypatch.setattr(fit_command, "diagnose", none)
    code, out, err = run(capsys, "model", *QUICK, "--diagnose")
    assert code == 4
    assert "there is no diagnosis: Matrix" in err


def test_a_verdict_that_is_not_good_has_the_same_code(capsys):
    """One answer of ten or so patients each is far from normal for a clinic; what it says to type cures it."""
    code, out, _ = run(capsys, "model", *DATA, "--objective", "elbo", "--quiet")
    assert code == 4
    assert not out.startswith("RIGHT: ")
    assert "    laplace-amort fit ...   # without --objective and --no-check" in out
    assert run(capsys, "model", *DATA, "--quiet")[0] == 0


def test_without_a_check_nothing_is_known_to_be_good(capsys):
    code, out, _ = run(capsys, "model", *DATA, "--quiet", "--no-check")
    assert code == 4
    assert out.startswith("NOT_COMPARED: ")
    assert set(numbers(out)) == {"mu", "effect", "sigma"}
    assert "    laplace-amort fit ...   # without --objective and --no-check" in out


@pytest.mark.parametrize(
    ("target", "objective"), [("model", "Ladder"), ("with_parameter", "FixedDrawELBO"), ("minibatch", "Stochastic")]
)
def test_the_default_objective_follows_the_model(capsys, target, objective):
    code, out, _ = run(capsys, target, *DATA, "--quiet")
    assert code in (0, 4)  # as its verdict is
    assert f"\nfound by {objective}(" in out


def test_the_rows_of_a_table_become_columns_of_a_csv(capsys):
    code, out, _ = run(capsys, "named", *DATA, "--no-check", "--quiet", "--format", "csv")
    assert code == 4
    rows = list(csv.DictReader(out.splitlines()))
    assert [(row["site"], row["element"]) for row in rows] == [
        ("mu", ""),
        ("tau", "0"),
        ("tau", "1"),
        ("corr(L)", "1, 0"),
        ("ratio", ""),
    ]
    assert all(row["mean"] and row["unit"] == "" for row in rows)


def test_moments_that_do_not_exist_are_empty_cells(capsys):
    code, out, _ = run(capsys, "cauchy", *DATA, "--quiet", "--format", "csv")
    assert code == 4
    row = next(row for row in csv.DictReader(out.splitlines()) if row["site"] == "nu")
    assert (row["mean"], row["sd"]) == ("", "")
    assert float(row["50%"]) > 0


def test_advice_as_options():
    assert as_options("fit(model, *args, objective=MarginalLaplace(), starts=20)") == (
        "--objective 'MarginalLaplace()' --starts 20"
    )
    assert as_options("") == as_options("see there") == ""


class Interrupt:
    """Ctrl-C in one of the evaluations of a fit."""

    def __init__(self, monkeypatch, call):
        original = History._keep_best
        self.left = call

        def interrupted(this, *args):
            original(this, *args)
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

        monkeypatch.setattr(History, "_keep_best", interrupted)


def test_an_interrupted_fit_is_shown_kept_and_resumed(capsys, directory, monkeypatch):
    expected = run(capsys, "model", *QUICK)[1]
    with monkeypatch.context() as patch:
        Interrupt(patch, 3)
        code, out, err = run(capsys, "model", *QUICK, "--save", "fit.pt", "--output", "p.csv", "--diagnose")
    assert code == 130
    assert out.startswith("NOT_CONVERGED: ")
    assert f"\n{FitStatus.INTERRUPTED.name}: " in out
    assert "Gaussian approximation where the fit was interrupted" in out
    assert set(numbers(out)) == {"mu", "effect", "sigma"}
    assert "interrupted; go on with --resume fit.pt" in err
    assert (directory / "p.csv").exists()
    code, out, _ = run(capsys, "model", *QUICK, "--resume", "fit.pt", "--save", "fit.pt")
    assert code == 0
    assert numbers(out) == numbers(expected)
    (directory / "trial.csv").write_text(ROWS.replace("10,37", "11,37"))
    code, out, err = run(capsys, "model", *QUICK, "--resume", "fit.pt")
    assert (code, out) == (1, "")
    assert "ResumeError" in err
    assert "On the command line: " in err


def test_ctrl_c_in_a_process_of_its_own(directory):
    """A real signal, in the middle of a fit of a model that runs in Python each time; however long that takes."""
    (directory / "signals.py").write_text(WAITS)
    program = "import sys; from laplace_amort.cli.main import main; sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen(
        [sys.executable, "-c", program, "fit", "signals.py:waiting", *QUICK, "--save", "fit.pt"],
        env={"PATH": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    ) as process:
        said = next(iter(process.stderr), "")  # when the model says so, or the process has ended
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert said == "under way\n", said + err
    assert process.returncode == 130, err
    assert "\nINTERRUPTED: " in out
    assert "effect" in numbers(out)
    assert "Traceback" not in err
    assert (directory / "fit.pt").exists()


def test_an_interrupt_in_the_posterior_loses_no_fit(capsys, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_command.Report, "text", interrupted)
    code, out, err = run(capsys, "model", *QUICK)
    assert code == 130
    assert out.startswith("CONVERGED: ")
    assert err == "laplace-amort: interrupted\n"


@pytest.mark.parametrize(
    ("package", "options", "extra"),
    [
        ("pandas", ("--units",), "laplace_amort[pandas]"),
        ("pandas", ("--output", "a.csv"), "laplace_amort[pandas]"),
        ("matplotlib", ("--plot", "a.png"), "laplace_amort[plots]"),
    ],
)
def test_what_is_not_installed_is_told_before_the_fit(capsys, monkeypatch, package, options, extra):
    monkeypatch.setitem(sys.modules, package, None)
    code, out, err = run(capsys, "model", *QUICK, *options)
    assert (code, out) == (2, "")
    assert extra in err


def test_netcdf_needs_a_package_that_writes_it(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = run(capsys, "model", *QUICK, "--output", "a.nc")
    assert code == 2
    assert "laplace_amort[arviz]" in err


def test_help_teaches(capsys):
    assert cli.main(["fit", "--help"]) == 0
    out = capsys.readouterr().out
    for text in ("laplace-amort fit mymodel.py:model --data trial.csv", "exit codes:", "  4  the fit has converged"):
        assert text in out
    assert max(map(len, out.splitlines())) <= 120
