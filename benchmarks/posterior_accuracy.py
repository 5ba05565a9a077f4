"""How far is the posterior that a fit found from the true one? Every problem with a reference, on every rung.

Run ``python benchmarks/posterior_accuracy.py FOLDER``, where FOLDER has the data sets and the reference posteriors that
``real_data.py`` lists; ``--problems`` and ``--rungs`` choose, ``--csv FILE`` writes the rows down as they are done. The
problems are those of FOLDER/reference, whose posteriors are from long runs of NUTS, and the Poisson task of
``rivals/tasks.py`` with 100, 2000 and 100 000 units, on the data of ``exact.py`` and against its quadrature.

Errors are those of ``result.posterior``, in constrained space, each the worst of all elements of the globals or of all
elements of the units: of a mean, its absolute error in standard deviations of the reference; of a standard deviation,
by how much it is too large, or with a minus too small, in per cent of that of the reference. Below the table is how
well each reference knows its own means and standard deviations. The seconds are of the fit, and of making the posterior
and its moments; k-hat is that of the weights of the globals, and empty where they have none: an ELBO's posterior is the
guide as it is. Then what the verdict says, with the errors of the globals that it estimates, and its seconds. A fit
that raises makes a row with the name of the error.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import tabulate
import torch
from exact import Array, largest_change, poisson_posterior
from measure import machine
from real_data import NAMES, Problem, problems
from rivals.tasks import pyro_models, simulate_poisson
from torch import Tensor

from laplace_amort import (
    AutoLaplaceFamily,
    FixedDrawELBO,
    GaussHermite,
    JointCurvature,
    Ladder,
    MarginalCurvature,
    MarginalLaplace,
    MarginalQuadrature,
    NestedELBO,
    StudentPoints,
)
from laplace_amort import fit as fit_guide
from laplace_amort.fitting.objectives.base import Objective
from laplace_amort.guide.heads import Head

# Objective and head of the guide, by label.
RUNGS: dict[str, tuple[Objective | None, Head]] = {
    "by default": (None, JointCurvature()),
    "joint Gaussian": (FixedDrawELBO(), JointCurvature()),
    "marginal head": (FixedDrawELBO(), MarginalCurvature()),
    "nested": (NestedELBO(), MarginalCurvature()),
    "marginal Laplace": (MarginalLaplace(), JointCurvature()),
    "quadrature": (MarginalQuadrature(GaussHermite(9)), JointCurvature()),
    "importance": (MarginalQuadrature(StudentPoints(256)), JointCurvature()),
    "ladder": (Ladder(), JointCurvature()),
}
POISSON = {f"poisson_{units}": units for units in (100, 2000, 100_000)}
GLOBAL, LOCAL = "global", "local"


@dataclass(frozen=True)
class Truth:
    """A reference posterior, by the names of the sites, in constrained space.

    :param dict mean: posterior means.
    :param dict sd: posterior standard deviations, of the same shapes.
    :param dict role: ``GLOBAL`` or ``LOCAL``.
    :param str note: how well it is known.
    """

    mean: dict[str, Array]
    sd: dict[str, Array]
    role: dict[str, str]
    note: str


class Case(NamedTuple):
    """A problem, and what makes its reference posterior."""

    problem: Problem
    truth: Callable[[], Truth]


class Worst(NamedTuple):
    """The worst errors over elements: of a mean, in standard deviations; of a standard deviation, in per cent."""

    mean: float
    sd: float
    where: str


class Row(NamedTuple):
    """One line of the file, and but for ``remark`` of the table; what a fit that raised did not find is ``None``.

    The remark names the elements that the errors are of, in their order; or it is the message of what was raised.
    """

    problem: str
    rung: str
    status: str
    global_mean_error: float | None = None
    global_sd_error: float | None = None
    local_mean_error: float | None = None
    local_sd_error: float | None = None
    k_hat: float | None = None
    fit_seconds: float | None = None
    moments_seconds: float | None = None
    verdict: str = ""
    estimated_mean_error: float | None = None
    estimated_sd_error: float | None = None
    verdict_seconds: float | None = None
    remark: str = ""


# Headings and formats of the columns of the table.
COLUMNS = {
    "problem": "",
    "rung": "",
    "status": "",
    "globals: mean": ".3f",
    "globals: sd, %": "+.1f",
    "locals: mean": ".3f",
    "locals: sd, %": "+.1f",
    "k-hat": ".2f",
    "fit, s": ".2f",
    "moments, s": ".2f",
    "verdict": "",
    "estimated: mean": ".3f",
    "estimated: sd, %": ".1f",
    "verdict, s": ".2f",
}


def read_truth(path: Path) -> Truth:
    """The reference posterior of a file, without what is derived from its sites."""
    sites = json.loads(path.read_text(encoding="utf-8"))["variables"]

    def column(key: str) -> dict[str, Array]:
        return {name: np.asarray(site[key], dtype=np.float64) for name, site in sites.items()}

    sd = column("sd")
    parts = []
    for role in (GLOBAL, LOCAL):
        errors = [
            max(float((column(key)[name] / sd[name]).max()) for name in sites if sites[name]["role"] == role)
            for key in ("mcse_mean", "mcse_sd")
        ]
        parts.append(f"{role}s: mean {errors[0]:.3f} sd, sd {100 * errors[1]:.1f} %")
    note = f"worst Monte Carlo standard errors of the reference: {'; '.join(parts)}"
    return Truth(column("mean"), sd, {name: site["role"] for name, site in sites.items()}, note)


def _counts(units: int) -> Array:
    return simulate_poisson(units, np.random.default_rng(0))["z"]


def poisson_truth(units: int) -> Truth:
    """The exact posterior of the Poisson task, with twice the steps that its check is against."""
    z = _counts(units)
    found = poisson_posterior(z, resolution=2)
    change = largest_change(poisson_posterior(z), found)
    note = f"the reference is by quadrature, and half its steps change no mean and no sd by more than {change:.0e} sd"
    return Truth(found.mean, found.sd, {"mu": GLOBAL, "log_tau": GLOBAL, "y": LOCAL}, note)


def poisson_problem(name: str) -> Problem:
    """The Poisson task, which needs no file."""
    units = POISSON[name]
    return Problem(name, pyro_models()["poisson"], (torch.from_numpy(_counts(units)),), "units", units, None)


def cases(folder: Path, names: Iterable[str] | None = None) -> dict[str, Case]:
    """Problems that have a reference, and their references, by name.

    :param Path folder: laid out as ``real_data.LAYOUT`` says.
    :param names: of these problems; ``None`` for all that the folder has a reference of, and the Poisson task.
    :raises FileNotFoundError: if there is no reference of a problem that was named, or a file of data is missing.
    """

    def reference(name: str) -> Path:
        return folder / "reference" / f"{name}.json"

    if names is None:
        names = [*(name for name in NAMES if reference(name).is_file()), *POISSON]
    found = {}
    for name in names:
        if name in POISSON:
            found[name] = Case(poisson_problem(name), functools.partial(poisson_truth, POISSON[name]))
        elif reference(name).is_file():
            found[name] = Case(problems(folder, [name])[name], functools.partial(read_truth, reference(name)))
        else:
            raise FileNotFoundError(f"there is no reference posterior '{reference(name)}'")
    return found


def worst(truth: Truth, role: str, mean: dict[str, Tensor], sd: dict[str, Tensor]) -> Worst:
    """The worst errors over all elements of the sites of a role; NaN if any of them is.

    :param Truth truth: the reference.
    :param str role: of the sites.
    :param dict mean: means by site, of all sites of that role.
    :param dict sd: standard deviations, alike.
    """
    labels, off, ratio = [], [], []
    for name in (name for name in truth.role if truth.role[name] == role):
        true_mean, true_sd = truth.mean[name], truth.sd[name]
        found = [part[name].numpy().reshape(true_mean.shape) for part in (mean, sd)]
        off.append(np.ravel(np.abs(found[0] - true_mean) / true_sd))
        ratio.append(np.ravel(100 * (found[1] / true_sd - 1)))
        indices = [",".join(map(str, index)) for index in np.ndindex(true_mean.shape)]
        labels += [f"{name}[{index}]" if index else name for index in indices]
    offs, ratios = np.concatenate(off), np.concatenate(ratio)
    first, second = int(offs.argmax()), int(np.abs(ratios).argmax())
    return Worst(float(offs[first]), float(ratios[second]), f"{labels[first]}, {labels[second]}")


def _row(problem: Problem, truth: Truth, label: str) -> Row:
    pyro.clear_param_store()
    objective, head = RUNGS[label]
    begun = time.perf_counter()
    try:
        guide = AutoLaplaceFamily(problem.model, head=head)
        result = fit_guide(problem.model, guide, *problem.args, objective=objective, progress=False)
        fitted = time.perf_counter()
        posterior = result.posterior
        mean, sd = posterior.mean(), posterior.std()
        done = time.perf_counter()
        verdict, errors = result.verdict.name, result.errors
        judged = time.perf_counter()
    except Exception as error:  # whatever it is, it is a result
        seconds = time.perf_counter() - begun
        message = " ".join(str(error).split())
        return Row(problem.name, label, type(error).__name__, fit_seconds=seconds, remark=message)
    globals_, locals_ = (worst(truth, role, mean, sd) for role in (GLOBAL, LOCAL))
    return Row(
        problem.name,
        label,
        result.status.name,
        *globals_[:2],
        *locals_[:2],
        posterior.k_hat if math.isfinite(posterior.k_hat) else None,
        fitted - begun,
        done - fitted,
        verdict,
        errors.mean if errors else None,
        errors.sd if errors else None,
        judged - done,
        f"{globals_.where}; {locals_.where}",
    )


def rows(chosen: dict[str, Case], labels: Iterable[str], notes: dict[str, str]) -> Iterator[Row]:
    """One for each problem and rung, as they are done.

    :param dict chosen: what :func:`cases` returns.
    :param labels: of ``RUNGS``.
    :param dict notes: is given the notes on the references, by problem.
    """
    for name, (problem, make_truth) in chosen.items():
        truth = make_truth()
        notes[name] = truth.note
        for label in labels:
            yield _row(problem, truth, label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the data are")
    known = [*NAMES, *POISSON]
    parser.add_argument("--problems", nargs="+", choices=known, metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS))
    parser.add_argument("--csv", type=Path, metavar="FILE", help="where to write the rows")
    chosen = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    try:
        found_cases = cases(chosen.folder, chosen.problems)
    except FileNotFoundError as error:
        parser.exit(1, f"{error}\n")
    # The first backward pass with a seed of its own makes torch load sympy: no part of the first fit.
    x = torch.ones(1, requires_grad=True)
    torch.autograd.grad(2 * x, x, torch.ones(1))
    print(machine(), flush=True)
    notes: dict[str, str] = {}
    found: list[Row] = []
    if chosen.csv:
        _append(chosen.csv, Row._fields, mode="w")
    for row in rows(found_cases, chosen.rungs, notes):
        found.append(row)
        print(*row, sep="; ", flush=True)
        if chosen.csv:
            _append(chosen.csv, row)
    table = [row[: len(COLUMNS)] for row in found]
    print(f"\n{tabulate.tabulate(table, list(COLUMNS), floatfmt=tuple(COLUMNS.values()))}\n")
    for name, note in notes.items():
        print(f"{name}: {note}")


def _append(path: Path, row: Iterable[Any], mode: str = "a") -> None:
    with path.open(mode, encoding="utf-8", newline="") as file:
        csv.writer(file).writerow(row)


if __name__ == "__main__":
    main()
