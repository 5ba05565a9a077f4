"""The models agree: Pyro, NumPyro and TMB give the same unconstrained log joint density, all constants included.

Run ``python benchmarks/rivals/agree.py``; ``--units 100`` and ``--points 4`` choose. The exit status is 1 if a
difference, relative to the density, is above 1e-8. A tool that is not installed is left out, with a line that says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import numpy as np
import tabulate
from numpy.typing import NDArray
from outcome import NotInstalledError
from tasks import KINDS, SIZES, Task

TOLERANCE = 1e-8
Values = NDArray[np.float64]


def sites_of(task: Task, point: Values) -> dict[str, Values]:
    """Split a packed point, globals first, into unconstrained values by site."""
    values, start = {}, 0
    for site in task.kind.global_sites:
        values[site.name] = point[start : start + site.size] if site.size > 1 else point[start]
        start += site.size
    for site in task.kind.local_sites:
        values[site.name] = point[start : start + task.units]
        start += task.units
    return values


def pyro_log_joint(task: Task, points: Values) -> Values:
    """By ``laplace_amort.LogJoint``."""
    import torch

    from laplace_amort import LogJoint

    torch.set_default_dtype(torch.float64)  # constants in the model too
    log_joint = LogJoint(task.pyro_model, *task.pyro_args)
    sites = ({name: torch.tensor(value) for name, value in sites_of(task, point).items()} for point in points)
    return np.array([log_joint(values).item() for values in sites])


def numpyro_log_joint(task: Task, points: Values) -> Values:
    """By NumPyro's ``potential_fn``."""
    try:
        import jax
        import numpyro
    except ModuleNotFoundError as error:
        raise NotInstalledError(str(error.name)) from error
    from numpyro.infer.util import initialize_model
    from numpyro_models import MODELS

    numpyro.enable_x64()
    args = tuple(task.arrays.values())
    potential = initialize_model(jax.random.key(0), MODELS[task.name], model_args=args).potential_fn
    return np.array([-float(potential(sites_of(task, point))) for point in points])


def tmb_log_joint(task: Task, points: Values) -> Values:
    """By the TMB template, with nothing integrated out."""
    from r_rivals import joint_nll

    return -joint_nll(task, points)


ROUTES: dict[str, Callable[[Task, Values], Values]] = {
    "NumPyro": numpyro_log_joint,
    "TMB": tmb_log_joint,
}


def points_of(task: Task, count: int) -> Values:
    """Random points, in unconstrained coordinates, globals first and then the locals site by site."""
    size = len(task.global_names) + len(task.local_names) * task.units
    return np.random.default_rng(0).normal(0.0, 0.7, (count, size))


def evaluate(name: str, task: Task, count: int) -> Values | None:
    """Log joint densities by one route at random points; ``None``, and a line on stderr, if it is not installed."""
    try:
        return ROUTES[name](task, points_of(task, count))
    except NotInstalledError as error:
        print(f"{task.name}: {name} left out, not installed: {error}", file=sys.stderr)
        return None


def main() -> None:
    """Print the largest relative difference of each route from Pyro."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--units", type=int, default=100)
    parser.add_argument("--points", type=int, default=4)
    chosen = parser.parse_args()
    rows, worst = [], 0.0
    for name in KINDS:
        sizes = {"eight_schools": (8,), "radon": (chosen.units, SIZES["radon"][0])}.get(name, (chosen.units,))
        for units in sizes:
            task = Task(name, units, seed=0)
            reference = pyro_log_joint(task, points_of(task, chosen.points))
            for route in ROUTES:
                values = evaluate(route, task, chosen.points)
                if values is not None:
                    difference = np.max(np.abs(values / reference - 1))
                    worst = max(worst, difference)
                    rows.append((name, units, route, reference[0], difference))
    print(
        tabulate.tabulate(
            rows,
            ["task", "units", "tool", "log joint", "relative difference"],
            floatfmt=(".0f", ".0f", "", ".4f", ".1e"),
        )
    )
    sys.exit(int(not worst <= TOLERANCE))


if __name__ == "__main__":
    main()
