"""Time the default call and its verdict: ``python benchmarks/verdict_cost.py``.

Seconds of one core for the fit, its posterior with all moments, the verdict, and a diagnosis without simulations: of
the examples ``epil`` and ``radon``, and of counts, three in each of so many units, which ``--units`` chooses.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from measure import machine
from tabulate import tabulate

from laplace_amort import diagnose, fit
from laplace_amort.examples import epil, radon

Case = tuple[Callable[..., Any], tuple[Any, ...]]


def counts(units: int) -> Case:
    """Return a hierarchy of counts and its data."""
    torch.manual_seed(0)
    data = torch.poisson((0.5 + 0.7 * torch.randn(units)).exp().expand(3, -1))

    def model(data: torch.Tensor) -> None:
        mu, tau = pyro.sample("mu", dist.Normal(0.0, 3.0)), pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        with pyro.plate("units", data.shape[1], dim=-1):
            y = pyro.sample("y", dist.Normal(mu, tau))
            with pyro.plate("counts", 3, dim=-2):
                pyro.sample("z", dist.Poisson(y.exp()), obs=data)

    return model, (data,)


def seconds(case: Case) -> dict[str, float]:
    """Return the seconds of each part, by its name."""
    model, args = case
    found: dict[str, float] = {}

    def timed(part: str, compute: Callable[[], Any]) -> Any:
        begun = time.process_time()
        result = compute()
        found[part] = time.process_time() - begun
        return result

    result = timed("fit", lambda: fit(model, *args, progress=False))
    timed("posterior", lambda: result.posterior.moments)
    timed("verdict", lambda: result.verdict)
    timed("diagnose", lambda: diagnose(result, simulations=0, progress=False))
    return {**found, "says": result.verdict.name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--units", type=int, nargs="*", default=[1000, 10_000, 100_000])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), flush=True)
    cases = {"epil": (epil.model, epil.data()), "radon": (radon.model, radon.data())}
    cases |= {f"{units} units": counts(units) for units in chosen.units}
    seconds((epil.model, epil.data()))  # what is imported when it is needed first is no part of a fit
    rows = []
    for name, case in cases.items():
        rows.append({"case": name, **seconds(case)})
        print(rows[-1], flush=True)
    print(tabulate(rows, headers="keys", floatfmt=".2f"))


if __name__ == "__main__":
    main()
