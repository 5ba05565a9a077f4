"""What recording a model saves in a fit, as ratios of one run: the log joint, and the marginal Laplace density.

Run ``python benchmarks/recording_cost.py``; ``--units 1000 100000`` chooses. *Run* is the Pyro model itself, *recorded*
its tensor operations repeated, *simplified* these after the algebra of ``laplace_amort/autodiff/simplify.py``. The
marginal Laplace is value, gradient and Hessian at the modes: derivatives up to the fourth.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pyro
import torch
from family_cost import counts, model
from measure import machine, print_ratios, seconds

from laplace_amort import AutoLaplaceFamily
from laplace_amort.autodiff import record
from laplace_amort.guide import Problem
from laplace_amort.units import laplace_marginal


def variants(num_units: int) -> tuple[dict[str, Callable[..., Any]], tuple[torch.Tensor, torch.Tensor]]:
    """The log joint in three forms, and globals with the modes of the units there."""
    pyro.clear_param_store()
    problem = Problem(AutoLaplaceFamily(model), (counts(num_units),), {})
    unit_model, global_ = problem.unit_model.live(), torch.tensor([0.5, -0.36])
    local = problem.mode.find(unit_model, global_, problem.start_at(global_)).detach()
    with mock.patch("laplace_amort.autodiff.recording.simplified", lambda graph: (graph, 0)):
        plain = record(unit_model.log_joint, global_, local)
    simplified = record(unit_model.log_joint, global_, local)
    return {"run": unit_model.log_joint, "recorded": plain, "simplified": simplified}, (global_, local)


@torch.no_grad()
def evaluate(log_joint: Callable[..., Any], point: tuple[torch.Tensor, torch.Tensor]) -> Any:
    """The log joint alone, without derivatives."""
    return log_joint(*point)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--units", type=int, nargs="+", default=[100, 10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    print(machine())
    rows: list[tuple[Any, ...]] = []
    for num_units in chosen.units:
        forms, point = variants(num_units)
        tasks = {"log joint": evaluate, "marginal Laplace": lambda f, point: laplace_marginal(f, *point)}
        for task, function in tasks.items():
            times = seconds(
                {name: functools.partial(function, form, point) for name, form in forms.items()}, chosen.rounds
            )
            ratios = [times["run"] / times[name] for name in ("recorded", "simplified")]
            rows.append((num_units, task, 1e3 * times["run"], *ratios))
    print_ratios("times as fast as running the model", ["units", "of", "run, ms", "recorded", "simplified"], rows)


if __name__ == "__main__":
    main()
