"""One ELBO gradient of AutoLaplaceFamily against AutoNormal with the same particles, as ratios of one run.

Run ``python benchmarks/family_cost.py``; ``--units 1000 10000`` and ``--particles 4`` choose.

The model is a hierarchical Poisson: three counts per unit, so d = 2 and k = 1. The guide of the family has 2 parameters
and ``AutoNormal`` 2 (2 + N). A step of the family finds the modes (from those of the step before, as in a fit, after an
update of the parameter by a learning rate of 0.01), takes the blocks of the information, samples, evaluates the model
and differentiates all of it. The growth exponent is the slope of log time in log N, by least squares.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from measure import machine, peak_mebibytes, print_ratios, seconds
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from laplace_amort import AutoLaplaceFamily, JointCurvature, MarginalCurvature

_BEFORE = 6  # steps that are not timed: calls that repeat each other are recorded by then


def model(z: torch.Tensor) -> None:
    """Counts ``z (3, N)`` of N units."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    log_tau = pyro.sample("log_tau", dist.Normal(0.0, 1.0))
    with pyro.plate("units", z.shape[-1], dim=-1):
        y = pyro.sample("y", dist.Normal(mu, log_tau.exp()))
        with pyro.plate("counts", z.shape[-2], dim=-2):
            pyro.sample("z", dist.Poisson(y.exp()), obs=z)


def counts(num_units: int) -> torch.Tensor:
    """Data with mu = 0.5, tau = 0.7."""
    generator = torch.Generator().manual_seed(num_units)
    y = 0.5 + 0.7 * torch.randn(num_units, generator=generator)
    return torch.poisson(y.exp().expand(3, -1), generator=generator)


class Steps:
    """Steps of one guide near its optimum: a loss, its gradient, and an update of the parameters."""

    def __init__(self, guide: Any, data: torch.Tensor, particles: int) -> None:
        self.guide, self.data = guide, data
        # Two plates of the model, and one for the particles.
        self.elbo = Trace_ELBO(particles, vectorize_particles=particles > 1, max_plate_nesting=2)
        with pyro.get_param_store().scope() as self.store:  # guides of one class have parameters of one name
            guide(data)
        self.optimizer = torch.optim.Adam(guide.parameters(), lr=0.01)
        for _ in range(_BEFORE):
            self()

    def __call__(self) -> None:
        """Do one step."""
        self.optimizer.zero_grad()
        with pyro.get_param_store().scope(self.store):
            self.elbo.loss_and_grads(model, self.guide, self.data)
        self.optimizer.step()


def guides() -> dict[str, Any]:
    """The guides compared, started near the truth."""

    def init(site: Any) -> torch.Tensor:
        return {"mu": torch.tensor(0.5), "log_tau": torch.tensor(math.log(0.7))}.get(
            site["name"], torch.zeros(site["fn"].shape())
        )

    return {
        "AutoNormal": AutoNormal(model, init_loc_fn=init),
        "joint head": AutoLaplaceFamily(model, head=JointCurvature(), init_loc_fn=init),
        "marginal head": AutoLaplaceFamily(model, head=MarginalCurvature(), init_loc_fn=init),
    }


def exponent(sizes: list[int], times: list[float]) -> float:
    """Slope of log time in log size."""
    x, y = torch.tensor(sizes).double().log(), torch.tensor(times).double().log()
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--units", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    print(machine())
    for particles in chosen.particles:
        rows: list[tuple[Any, ...]] = []
        times: dict[str, list[float]] = {name: [] for name in guides()}
        for num_units in chosen.units:
            data = counts(num_units)
            steps = {name: Steps(guide, data, particles) for name, guide in guides().items()}
            measured = seconds(steps, rounds=chosen.rounds)
            for name, time in measured.items():
                times[name].append(time)
                memory = peak_mebibytes(steps[name])
                ratio, bytes_per_unit = time / measured["AutoNormal"], 2**20 * memory / num_units
                rows.append((num_units, name, 1e3 * time, ratio, memory, bytes_per_unit))
        columns = ["units", "guide", "milliseconds", "ratio", "peak MiB", "bytes per unit"]
        print_ratios(f"one step, {particles} particles", columns, rows)
        if len(chosen.units) > 1:
            growth = [(name, exponent(chosen.units, values)) for name, values in times.items()]
            print_ratios(
                f"growth of the time in the number of units, {particles} particles", ["guide", "exponent"], growth
            )


if __name__ == "__main__":
    main()
