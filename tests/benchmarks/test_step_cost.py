"""benchmarks/step_cost.py: what it measures is there, and the table says what was left out."""

import csv
import importlib
import math
from pathlib import Path

import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal

from laplace_amort import AutoLaplaceFamily, MarginalLaplace, fit

OWN = """\
import torch
from step_cost_models import normal


def make(num_units):
    return normal(num_units)


def fails(num_units):
    raise ValueError(f"no {num_units}")


def model_only(num_units):
    return normal(num_units)[0]
"""
QUICK = "--sizes", "4,2", "--objective", "laplace"


@pytest.fixture
def bench(monkeypatch):
    """The script; these tests look at what is printed, and the times may be rough."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    script = importlib.import_module("step_cost")
    monkeypatch.setattr(script, "_SECONDS", 0.0)
    return script


@pytest.fixture
def run(bench, capsys):
    """Run the script with options: its exit code, and both streams."""

    def ran(*options):
        try:
            code = bench.main(list(options))
        except SystemExit as stop:  # of argparse
            code = stop.code
        return code, *capsys.readouterr()

    return ran


def test_the_table(bench, run, monkeypatch):
    monkeypatch.setattr(bench, "_DENSE_LATENTS", 4)
    code, out, _ = run(*QUICK)
    assert code == 0
    assert out.startswith("poisson, objective laplace, ")
    assert f"torch {torch.__version__}" in out
    rows = [line.split() for line in out.splitlines() if line.split()[:1] in (["2"], ["4"])]
    assert [row[0] for row in rows] == ["2", "4"]
    assert [len(row) for row in rows] == [9, 9]
    assert rows[0][-1] != "-"
    assert rows[1][-2:] == ["-", "-"]  # 4 units and 2 globals are more than 4
    assert "-: left out, a dense matrix for more than 4 latents" in out


def test_csv(run):
    code, out, _ = run(*QUICK, "--format", "csv", "--against", "AutoNormal")
    assert code == 0
    rows = list(csv.DictReader(out.splitlines()))
    assert [row["units"] for row in rows] == ["2", "4"]
    assert all(row["status"] == "CONVERGED" for row in rows)
    assert all(0 < float(row["seconds_each"]) * int(row["evaluations"]) <= float(row["seconds"]) for row in rows)
    assert all(float(row["AutoNormal"]) > 0 for row in rows)


def test_without_peers(run):
    code, out, _ = run(*QUICK, "--against", "none")
    assert code == 0
    assert "step" not in out


def test_a_model_of_ones_own(run, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    assert run("own.py:make", *QUICK, "--against", "none")[0] == 0
    code, out, err = run("own.py:fails", *QUICK)
    assert (code, out) == (1, "")
    assert "own.py:fails(2) raised ValueError: no 2" in err
    code, _, err = run("own.py:model_only", *QUICK)
    assert code == 2
    assert "must return (model, args); it returned a function" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "a"], "'a' is not a list of numbers of units such as 100,1000"),
        (["--sizes", "1"], "'1' is not a list"),
        (["--against", "NUTS"], "there is no peer 'NUTS'; there are AutoNormal, AutoMultivariateNormal"),
        (["lasso"], "'lasso' is not of the form MODULE:FACTORY"),
    ],
)
def test_wrong_usage(run, options, message):
    code, out, err = run(*options)
    assert (code, out) == (2, "")
    assert message in err


def test_an_interrupt_shows_what_was_measured(bench, run, monkeypatch):
    def interrupted(peer, model, args):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "_step_seconds", interrupted)
    code, out, err = run(*QUICK)
    assert code == 130
    assert len(out.splitlines()) == 6
    assert "sizes that were done are shown" in err


def test_a_fit_that_does_not_converge_is_told(bench, run, monkeypatch):
    monkeypatch.setattr(bench, "_peak", lambda: math.nan)  # as on a system that does not tell
    code, out, err = run(*QUICK[:2], "--objective", "FixedDrawELBO(num_draws=4, max_draws=4)", "--against", "none")
    assert code == 3
    assert "TOO_FEW_DRAWS" in out
    assert "a fit has not converged" in err


def test_the_memory_is_that_of_a_fit(bench):
    """It grows with what is allocated, and never falls."""
    before = bench._peak()
    kept = torch.ones(2**23)  # 64 MiB
    assert bench._peak() >= before
    assert bench._peak() > kept.numel() * kept.element_size() / 2**20


@pytest.mark.parametrize("name", ["poisson", "logistic", "normal"])
def test_built_in_models_find_what_their_data_were_made_with(bench, name):
    assert len(bench.BUILT_IN) == 3
    model, args = bench.BUILT_IN[name](400)
    result = fit(model, AutoLaplaceFamily(model), *args, objective=MarginalLaplace())
    mean, sd = result.posterior.mean()["mu"], result.posterior.std()["mu"]
    assert result.status.ok
    assert abs(mean - 0.5) < 4.5 * sd


def test_a_dense_peer_is_measured_below_its_bound(bench):
    model, args = bench.BUILT_IN["normal"](3)
    assert bench._step_seconds(AutoMultivariateNormal, model, args) > 0
