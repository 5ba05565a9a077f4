"""Ecological inference against the truth, beside R's eiPack and NumPyro's NUTS on the same precincts.

Run ``python benchmarks/ecological.py FOLDER``, where FOLDER has the data sets that ``real_data.py`` lists;
``--problems`` chooses, ``--csv FILE`` writes the scores down as they are done, ``--figure FILE`` draws the figure.

Ours are the models of ``laplace_amort.examples.ecological``, fitted by Laplace's method. eiPack's is the
multinomial-Dirichlet model by random-walk Metropolis, tuned by its own ``tuneMD`` (10 rounds of 10000), with a burn-in
of 100000, and 1000 draws, each the 100th; once as it is, once with the share of the second race as covariate. "least
ESS" is how many independent draws its worst cell is worth. eiPack comes from Debian, as ``r-base-core`` and
``r-cran-eipack``. NUTS samples our own models of senc, 4 chains of 1000 draws after 1000; it comes from PyPI, as
``numpyro``. "importance" is our own contextual model of senc with its globals from ``result.posterior``. Where one of
them is missing its rows are, and a line says so. ``--rivals`` chooses.

All get the same treatment: voters choose by chance at the rates that were drawn, and intervals are of what they chose.
Errors are in percentage points: of the shares of all voters of a race, and of those in precincts with 50 voters of a
race or more. One thread.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.util
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from measure import machine
from real_data import NAMES, hidden_tables, problems
from torch import Tensor

from laplace_amort.examples import ecological
from laplace_amort.examples.ecological_plots import tables_figure
from laplace_amort.examples.ecological_scores import (
    Score,
    TableEstimates,
    fit_tables,
    log_evidence,
    overall_table,
    score_table,
)
from laplace_amort.plots import save_figure

VOTING = tuple(name for name in NAMES if name == "senc" or name.startswith("nc2016"))
# In the figure, the one of the lower row last.
SHOWN = "same everywhere", "one scale", "eiPack", "contextual, NUTS", "contextual"
SCRIPT = Path(__file__).with_suffix(".R")
RIVALS = "importance", "nuts", "eipack", "eipack-covariate"
DRAWS, BURN_IN, THIN = 1000, 100_000, 100


def ours(name: str, voters: Tensor, votes: Tensor) -> Iterator[TableEstimates]:
    """Our models, each as soon as it is fitted."""
    models = {"same everywhere": ecological.model, "contextual": ecological.contextual_model}
    if name != "senc":
        models = {"one scale": ecological.shared_scale_model, "contextual": ecological.contextual_model}
    for label, model in models.items():
        yield fit_tables(label, model, voters, votes, progress=True)


def eipack(voters: Tensor, votes: Tensor, covariate: str) -> tuple[TableEstimates, float]:
    """eiPack's estimates, and how many independent draws they are worth at the least.

    :param Tensor voters: by race, ``(N, R)``.
    :param Tensor votes: by choice, ``(N, C)``.
    :param str covariate: ``"x"`` for the share of the second race, or ``"none"``.
    """
    (num_units, num_races), num_choices = voters.shape, votes.shape[-1]
    share = voters[:, 1:2] / voters.sum(-1, keepdim=True)
    header = ",".join([f"n_{r}" for r in range(num_races)] + [f"v_{c}" for c in range(num_choices)] + ["x"])
    with tempfile.TemporaryDirectory() as scratch:
        data, out = Path(scratch, "data.csv"), Path(scratch, "out")
        numpy.savetxt(data, torch.cat([voters, votes, share], -1).numpy(), "%.10g", ",", header=header, comments="")
        sizes = [str(size) for size in (DRAWS, BURN_IN, THIN)]
        command = ["Rscript", str(SCRIPT), str(data), str(out), *sizes, "0", covariate]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        *_, last = out.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
        beta = torch.from_numpy(numpy.fromfile(out.with_suffix(".bin")))
    tuning, sampling, least = map(float, last.split())
    rates = beta.reshape(DRAWS, num_units, num_choices, num_races).transpose(-1, -2)  # columns of R run fastest
    label = "eiPack" if covariate == "none" else "eiPack, covariate"
    return TableEstimates.of_rates(label, tuning + sampling, rates, voters), least


def is_missing(rival: str) -> bool:
    """Whether a rival is not installed here."""
    if rival == "importance":
        return False
    if rival == "nuts":
        return importlib.util.find_spec("numpyro") is None
    try:
        return bool(subprocess.run(["Rscript", "-e", "library(eiPack)"], capture_output=True).returncode)
    except FileNotFoundError:
        return True


def sampled(label: str, voters: Tensor, votes: Tensor) -> tuple[TableEstimates, float]:
    """The posterior of one of our models by NUTS."""
    from ecological_nuts import nuts

    rates, seconds, least = nuts(label, voters, votes)
    return TableEstimates.of_rates(f"{label}, NUTS", seconds, rates, voters), least


def weighted(found: TableEstimates, voters: Tensor) -> TableEstimates:
    """The same fit with its globals drawn by importance sampling, in place of the Gaussian."""
    start = time.perf_counter()
    rates = ecological.choice_rates(found.fit.posterior.sample(1000)["eta"])
    seconds = found.seconds + time.perf_counter() - start
    return TableEstimates.of_rates(f"{found.label}, importance sampling", seconds, rates, voters)


def theirs(name: str, voters: Tensor, votes: Tensor, rivals: Sequence[str]) -> Iterator[tuple[TableEstimates, float]]:
    """The rivals' estimates."""
    if "nuts" in rivals and name == "senc":
        yield from (sampled(label, voters, votes) for label in ("same everywhere", "contextual"))
    if "eipack" in rivals:
        yield eipack(voters, votes, "none")
    if "eipack-covariate" in rivals:
        yield eipack(voters, votes, "x")


def estimates(
    name: str, voters: Tensor, votes: Tensor, rivals: Sequence[str]
) -> Iterator[tuple[TableEstimates, dict[str, Any]]]:
    """All estimates of a problem, and what else there is to say of each."""
    for found in ours(name, voters, votes):
        evidence = log_evidence(found.fit)
        yield found, {"status": found.fit.status.name, "log evidence": f"{evidence:.1f}", "least ESS": ""}
    if "importance" in rivals and name == "senc":
        yield weighted(found, voters), {}
    for found, least in theirs(name, voters, votes, rivals):
        yield found, {"status": "", "log evidence": "", "least ESS": f"{least:.0f}"}


def rows_of(name: str, found: TableEstimates, truth: Tensor | None, extra: dict[str, Any]) -> dict[str, Any]:
    """One line of the results."""
    score = {} if truth is None else dataclasses.asdict(Score.of(found, truth))
    overall = " ".join(f"{float(x):.5f}" for x in torch.cat([found.overall.mean(0), found.overall.std(0)]).flatten())
    return {
        "problem": name,
        "method": found.label,
        "seconds": f"{found.seconds:.1f}",
        **extra,
        **score,
        "overall": overall,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--problems", nargs="+", choices=VOTING, default=VOTING)
    parser.add_argument("--csv", type=Path, help="where to write the scores")
    parser.add_argument("--figure", type=Path, help="where to write the figure of the last problem with a truth")
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=RIVALS)
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    print(machine())
    missing = [rival for rival in options.rivals if is_missing(rival)]
    if missing:
        print(f"not installed, and left out: {', '.join(missing)}")
    rivals = [rival for rival in options.rivals if rival not in missing]
    rows: list[dict[str, Any]] = []
    for name, problem in problems(options.folder, options.problems).items():
        voters, votes = problem.args
        truth, done = hidden_tables(options.folder, name), []
        for found, extra in estimates(name, voters, votes, rivals):
            done.append(found)
            rows.append(rows_of(name, found, truth, extra))
            print(name, found.label, f"{found.seconds:.1f} s", extra, flush=True)
            if options.csv:
                _write(options.csv, rows)
        races = ecological.RACES if name == "senc" else ("white", "black", "other")
        print(f"\n{name}, {len(voters)} precincts\n\n{overall_table(done, truth, races)}\n")
        if truth is not None:
            print(f"{score_table(done, truth)}\n", flush=True)
            if options.figure:
                shown = [found for label in SHOWN for found in done if found.label == label]
                save_figure(tables_figure(shown, truth, races=races), options.figure)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
