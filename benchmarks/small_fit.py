"""What a fit of few units consists of, in CPU seconds: ``python benchmarks/small_fit.py``; ``--units 300`` chooses.

A run of the model by itself (traced, with its log density), how many of these a fit makes, its set-up, of which they
are a part, and its evaluations. Smallest of ``--rounds`` fits in one process, on one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pyro
import torch
from family_cost import counts, model
from pyro import poutine
from tabulate import tabulate

from laplace_amort import AutoLaplaceFamily, MarginalLaplace, fit
from laplace_amort.model.runs import ModelRuns


def timed(task: Callable[[], Any]) -> tuple[float, Any]:
    """Return CPU seconds and the result."""
    begun = time.process_time()
    found = task()
    return time.process_time() - begun, found


def fitted(data: Any) -> Any:
    """Fit with all standard errors, as a user's first fit of these data."""
    pyro.clear_param_store()
    with mock.patch.object(time, "perf_counter", time.process_time):  # by which a fit times its parts
        result = fit(model, AutoLaplaceFamily(model), data, objective=MarginalLaplace(), progress=False)
        result.standard_errors()
    return result


def row(units: int, rounds: int) -> list[Any]:
    """Time the parts of a fit of so many units."""
    data = counts(units)
    fitted(data)
    total, result = min((timed(lambda: fitted(data)) for _ in range(rounds)), key=lambda one: one[0])
    once = min(timed(lambda: poutine.trace(model).get_trace(data).log_prob_sum())[0] for _ in range(rounds))
    with mock.patch.object(ModelRuns, "_run", autospec=True, side_effect=ModelRuns._run) as runs:
        fitted(data)
    set_up, all_parts = result.timings["set-up"], sum(result.timings.values())
    return [units, total, once, runs.call_count, set_up, len(result.history), all_parts - set_up]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--units", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    rows = [row(units, options.rounds) for units in options.units]
    headers = ["units", "fit with errors, s", "a run of the model, s", "runs", "set-up, s", "evaluations", "these, s"]
    print(tabulate(rows, headers=headers, tablefmt="rst", floatfmt=".3g"))


if __name__ == "__main__":
    main()
