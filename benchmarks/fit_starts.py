"""Does the default call of fit end in one optimum, wherever it starts? On every data set that has a model here.

Run ``python benchmarks/fit_starts.py FOLDER``, where FOLDER has the data sets that ``real_data.py`` lists;
``--problems``, ``--labels`` and ``--starts`` choose. One call of ``fit`` with its default settings and 20 starts, of
which the first is the prior mean and the others are uniform between -2 and 2 in unconstrained space. A row says how
each ended: the optima, and how many starts led there; the ELBO is climbed from the best three of the marginal Laplace,
or *at once* from where the starts are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyro
import torch
from measure import machine, print_ratios
from real_data import Problem, problems

from laplace_amort import (
    AutoLaplaceFamily,
    FitResult,
    FixedDrawELBO,
    JointCurvature,
    Ladder,
    MarginalCurvature,
    MarginalLaplace,
)
from laplace_amort import fit as fit_guide

# Objective and head of the guide, by label.
CASES = {
    "ladder": (Ladder(), JointCurvature()),
    "marginal Laplace": (MarginalLaplace(), JointCurvature()),
    "ELBO, joint head": (FixedDrawELBO(), JointCurvature()),
    "ELBO, marginal head": (FixedDrawELBO(), MarginalCurvature()),
    "ELBO at once, joint head": (FixedDrawELBO(start_with=None), JointCurvature()),
}
COLUMNS = ["problem", "objective", "status", "optima (starts)", "value", "se", "draws", "evaluations", "seconds"]


def _optima(result: FitResult) -> str:
    return ", ".join(
        f"{o.objective:.2f} ({o.num_starts}{'' if o.status.ok else ' ' + o.status.name})" for o in result.optima
    )


def _row(problem: Problem, label: str, starts: int) -> tuple[Any, ...]:
    pyro.clear_param_store()
    objective, head = CASES[label]
    begun = time.perf_counter()
    guide = AutoLaplaceFamily(problem.model, head=head)
    result = fit_guide(problem.model, guide, *problem.args, objective=objective, starts=starts)
    seconds = time.perf_counter() - begun
    return (
        problem.name,
        label,
        result.status.name,
        _optima(result),
        result.objective,
        result.standard_error,
        result.num_draws,
        len(result.history),
        seconds,
    )


def rows(chosen: Iterable[Problem], labels: Iterable[str], starts: int) -> Iterable[tuple[Any, ...]]:
    """One for each problem and label, as they are done."""
    for problem in chosen:
        for label in labels:
            yield _row(problem, label, starts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--problems", nargs="+")
    parser.add_argument("--labels", nargs="+", choices=CASES, default=list(CASES)[:3], help="objectives and heads")
    parser.add_argument("--starts", type=int, default=20)
    chosen = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    print(machine(), flush=True)
    found = []
    for row in rows(problems(chosen.folder, chosen.problems).values(), chosen.labels, chosen.starts):
        found.append(row)
        print(*row, sep="; ", flush=True)
    print_ratios(f"{chosen.starts} starts", COLUMNS, found)


if __name__ == "__main__":
    main()
