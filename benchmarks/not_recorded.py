"""What a model costs that is not recorded, beside the same model recorded: fits, and their posteriors.

Run ``python benchmarks/not_recorded.py FOLDER``, where FOLDER has the data sets that ``real_data.py`` lists;
``--problems`` and ``--ways`` choose. Recording is switched off, and the model is run for many points at once: *mapped*
by ``torch.func.vmap``, or with the points *on the left* of all plates. *One by one* is what is left to a model that
takes no points; it is not run by default, since it takes long. Seconds are those of the processor.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pyro
import torch
from measure import machine, print_ratios
from real_data import Problem, problems

from laplace_amort import AutoLaplaceFamily, Ladder, MarginalQuadrature, fit
from laplace_amort.errors import RecordingError
from laplace_amort.model import UnitModel
from laplace_amort.model.at_once import MappedRuns, PointsOnTheLeft

OBJECTIVES = {"MarginalQuadrature": MarginalQuadrature(), "Ladder": Ladder()}
NAMES = ["eight_schools", "radon_mn", "epil", "effects_errors", "effects_errors_floor"]
WAYS = ["recorded", "mapped", "on the left", "one by one"]
COLUMNS = ["problem", "objective", "way", "status", "fit, s", "ratio", "posterior, s", "ratio", "means differ by"]


def refused(*args: Any) -> Any:
    """Stand in for what is switched off."""
    raise RecordingError("switched off")


@contextlib.contextmanager
def only(way: str) -> Iterator[None]:
    """Let models be evaluated in one way."""
    off = {
        "recorded": [],
        "mapped": [(UnitModel, "recorded")],
        "on the left": [(UnitModel, "recorded"), (MappedRuns, "terms")],
        "one by one": [(UnitModel, "recorded"), (MappedRuns, "terms"), (PointsOnTheLeft, "terms")],
    }[way]
    with contextlib.ExitStack() as stack:
        for owner, name in off:
            stack.enter_context(mock.patch.object(owner, name, refused))
        yield


def timed(problem: Problem, objective: Any) -> tuple[Any, float, float]:
    """Fit, and take the moments of the posterior; return the result and the seconds of both."""
    pyro.clear_param_store()
    begun = time.process_time()
    result = fit(problem.model, AutoLaplaceFamily(problem.model), *problem.args, objective=objective, progress=False)
    fitted = time.process_time()
    result.posterior.mean()
    return result, fitted - begun, time.process_time() - fitted


def compared(problem: Problem, label: str, ways: list[str]) -> Iterator[tuple[Any, ...]]:
    """Yield a row for each way."""
    first, means = (0.0, 0.0), {}
    for way in ways:
        with only(way):
            result, *seconds = timed(problem, OBJECTIVES[label])
        found = result.posterior.mean()
        if not means:
            first, means = (seconds[0], seconds[1]), found
        off = max(float((found[name] - means[name]).abs().max()) for name in means)
        ratios = [one / other for one, other in zip(seconds, first, strict=True)]
        status = result.status.name
        yield problem.name, label, way, status, seconds[0], ratios[0], seconds[1], ratios[1], off


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--problems", nargs="+", default=NAMES)
    parser.add_argument("--ways", nargs="+", default=WAYS[:3], choices=WAYS)
    chosen = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    print(machine())
    found = problems(chosen.folder, chosen.problems)
    timed(next(iter(found.values())), OBJECTIVES["Ladder"])  # what torch loads the first time is nobody's
    rows = [row for one in found.values() for label in OBJECTIVES for row in compared(one, label, chosen.ways)]
    print_ratios("seconds, and ratios to the first way", COLUMNS, rows)


if __name__ == "__main__":
    main()
