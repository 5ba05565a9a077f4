"""Time what a fit does in this checkout against another one, in alternation: ``python benchmarks/against.py ../other``.

Each round runs both checkouts in processes of their own, one after the other, on one thread, so that what else the
machine does falls on both. A row is a task; the ratio is that of the smallest times, below 1 where this checkout is
faster.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from tabulate import tabulate

TASKS = """
import json, sys, time
import pyro, torch
import pyro.distributions as dist
from pyro.infer import SVI, Trace_ELBO
from laplace_amort import AutoLaplaceFamily, FixedDrawELBO, Ladder, MarginalLaplace, fit

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)

def poisson(counts):
    mu = pyro.sample("mu", dist.Normal(0., 3.))
    tau = pyro.sample("tau", dist.LogNormal(0., 1.))
    with pyro.plate("units", counts.shape[-1], dim=-1):
        y = pyro.sample("y", dist.Normal(mu, tau))
        with pyro.plate("counts", 3, dim=-2):
            pyro.sample("z", dist.Poisson(y.exp()), obs=counts)

def slopes(x, group, answers):
    beta = pyro.sample("beta", dist.Normal(0., 2.).expand([2]).to_event(1))
    tau = pyro.sample("tau", dist.LogNormal(0., 1.).expand([2]).to_event(1))
    with pyro.plate("groups", int(group.max()) + 1):
        b = pyro.sample("b", dist.Normal(torch.zeros(2), tau).to_event(1))
    with pyro.plate("answers", len(answers)):
        logits = beta[0] + b[group, 0] + (beta[1] + b[group, 1]) * x
        pyro.sample("z", dist.Bernoulli(logits=logits), obs=answers)

pyro.set_rng_seed(0)
small, large = (torch.poisson((0.5 + 0.7 * torch.randn(n)).exp().expand(3, -1)) for n in (1000, 20000))
group, x = torch.arange(60).repeat_interleave(30), torch.randn(1800)
answers = torch.bernoulli(torch.sigmoid(-0.5 + torch.randn(60)[group] + (0.8 + 0.5 * torch.randn(60)[group]) * x))

def fitted(model, *args, **options):
    pyro.clear_param_store()
    return fit(model, AutoLaplaceFamily(model), *args, progress=False, **options)

def stepped(data):
    pyro.clear_param_store()
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=2)
    svi = SVI(poisson, AutoLaplaceFamily(poisson), pyro.optim.Adam({"lr": 0.01}), elbo)
    for step in range(30):
        svi.step(data)

fitted(poisson, small[:, :10], objective=MarginalLaplace())       # what torch loads the first time
TASKS = {
    "MarginalLaplace, Poisson, 1000 units": lambda: fitted(poisson, small, objective=MarginalLaplace()),
    "MarginalLaplace, Poisson, 20000 units": lambda: fitted(poisson, large, objective=MarginalLaplace()),
    "FixedDrawELBO, Poisson, 1000 units": lambda: fitted(poisson, small, objective=FixedDrawELBO()),
    "Ladder, Poisson, 1000 units": lambda: fitted(poisson, small, objective=Ladder()),
    "Ladder, Poisson, 20000 units": lambda: fitted(poisson, large, objective=Ladder()),
    "MarginalLaplace, slopes, 60 groups": lambda: fitted(slopes, x, group, answers, objective=MarginalLaplace()),
    "posterior, Poisson, 1000 units": lambda: fitted(poisson, small, objective=Ladder()).posterior.mean(),
    "30 steps of SVI, Poisson, 1000 units": lambda: stepped(small),
    "30 steps of SVI, Poisson, 20000 units": lambda: stepped(large),
}
chosen, found = sys.argv[1:], {}
for name, task in TASKS.items():
    if not chosen or any(part in name for part in chosen):
        begun = time.process_time()
        task()
        found[name] = time.process_time() - begun
print(json.dumps(found))
"""


def run(checkout: Path, parts: list[str]) -> dict[str, float]:
    """Return CPU seconds by task."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TASKS, *parts]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="tasks whose name has one of these parts")
    options = parser.parse_args()
    here = Path(__file__).parents[1]
    times: dict[str, tuple[list[float], list[float]]] = {}
    for _ in range(options.rounds):
        for number, checkout in enumerate((here, options.other.resolve())):
            for name, seconds in run(checkout, options.only).items():
                times.setdefault(name, ([], []))[number].append(seconds)
    rows = [
        [name, f"{min(new):.3g} to {max(new):.3g}", f"{min(old):.3g} to {max(old):.3g}", f"{min(new) / min(old):.2f}"]
        for name, (new, old) in times.items()
    ]
    print(tabulate(rows, headers=["task", "this, CPU s", "other, CPU s", "ratio"], tablefmt="rst"))


if __name__ == "__main__":
    main()
