"""Time a fit and everything that is asked of it afterwards: ``python benchmarks/posterior_cost.py``.

Four shapes of data, simulated from fixed seeds: few groups with many rows, many units with little data, few units with
heavy tails, and many globals. CPU seconds of one thread, and their ratio to the fit. To compare with another checkout,
run the same file with its path: ``PYTHONPATH=../other python benchmarks/posterior_cost.py``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from tabulate import tabulate

import laplace_amort
from laplace_amort import AutoLaplaceFamily, diagnose, fit

SHAPES: dict[str, Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]] = {}


def shape(make: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]) -> Callable[[], Any]:
    """Put a shape on the list, by its docstring."""
    SHAPES[str(make.__doc__).strip().rstrip(".")] = make
    return make


@shape
def rows() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """60 groups, k = 2, 2000 rows, 4 globals."""
    group, x = torch.arange(2000) % 60, torch.randn(2000)
    logits = -0.5 + 0.8 * torch.randn(60)[group] + (0.7 + 0.5 * torch.randn(60)[group]) * x
    answers = torch.bernoulli(torch.sigmoid(logits))

    def model(x: torch.Tensor, group: torch.Tensor, answers: torch.Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(0.0, 2.5).expand([2]).to_event(1))
        tau = pyro.sample("tau", dist.HalfNormal(1.0).expand([2]).to_event(1))
        with pyro.plate("groups", 60):
            b = pyro.sample("b", dist.Normal(torch.zeros(2), tau).to_event(1))
        with pyro.plate("rows", len(answers)):
            eta = beta[0] + b[group, 0] + (beta[1] + b[group, 1]) * x
            pyro.sample("answers", dist.Bernoulli(logits=eta), obs=answers)

    return model, (x, group, answers)


@shape
def units() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """1000 units, k = 1, 5 binary answers each, 10 globals."""
    x = torch.randn(1000, 9)
    y = x @ (0.3 * torch.randn(9)) + 0.9 * torch.randn(1000)
    answers = torch.bernoulli(torch.sigmoid(y).expand(5, -1))

    def model(x: torch.Tensor, answers: torch.Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(0.0, 2.0).expand([9]).to_event(1))
        tau = pyro.sample("tau", dist.HalfNormal(1.5))
        with pyro.plate("units", len(x), dim=-1):
            y = pyro.sample("y", dist.Normal(x @ beta, tau))
            with pyro.plate("answers", 5, dim=-2):
                pyro.sample("z", dist.Bernoulli(logits=y), obs=answers)

    return model, (x, answers)


@shape
def heavy() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """27 units, k = 2, Student-t errors, 6 globals."""
    age = torch.tensor([-3.0, -1.0, 1.0, 3.0]) / 2
    size = 23 + 2 * torch.randn(27) + (0.6 + 0.3 * torch.randn(27)) * age[:, None]
    size = size + 0.8 * torch.distributions.StudentT(4.0).sample(size.shape)

    def model(age: torch.Tensor, size: torch.Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.tensor([20.0, 0.0]), torch.tensor([10.0, 3.0])).to_event(1))
        tau = pyro.sample("tau", dist.HalfNormal(torch.tensor([5.0, 2.0])).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(3.0))
        df = pyro.sample("df", dist.Gamma(2.0, 0.1))
        with pyro.plate("children", size.shape[-1], dim=-1):
            b = pyro.sample("b", dist.Normal(mean, tau).to_event(1))
            with pyro.plate("ages", 4, dim=-2):
                pyro.sample("size", dist.StudentT(df, b[..., 0] + b[..., 1] * age[:, None], sigma), obs=size)

    return model, (age, size)


@shape
def many_globals() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """316 persons, k = 2, 24 answers each, 27 globals."""
    easy, person = torch.randn(24), torch.randn(316, 2) * torch.tensor([1.2, 0.7])
    kind = torch.arange(24) % 2
    eta = person[:, 0] + person[:, 1] * kind[:, None] + easy[:, None]
    answers = torch.bernoulli(torch.sigmoid(eta))

    def model(kind: torch.Tensor, answers: torch.Tensor) -> None:
        easy = pyro.sample("easy", dist.Normal(0.0, 2.0).expand([24]).to_event(1))
        tau = pyro.sample("tau", dist.HalfNormal(2.0).expand([2]).to_event(1))
        corr = pyro.sample("corr", dist.LKJCholesky(2, 2.0))
        with pyro.plate("persons", answers.shape[-1], dim=-1):
            scale = tau.unsqueeze(-1) * corr
            y = pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=scale))
            with pyro.plate("items", 24, dim=-2):
                eta = y[..., 0] + y[..., 1] * kind[:, None] + easy[..., None]
                pyro.sample("answers", dist.Bernoulli(logits=eta), obs=answers)

    return model, (kind, answers)


def timed(task: Callable[[], Any]) -> tuple[float, Any]:
    """Return CPU seconds and the result."""
    begun = time.process_time()
    found = task()
    return time.process_time() - begun, found


def row(name: str, objective: Any) -> list[Any]:
    """Time one shape."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    model, args = SHAPES[name]()
    base, result = timed(lambda: fit(model, AutoLaplaceFamily(model), *args, objective=objective, progress=False))
    draws, posterior = timed(lambda: result.posterior)
    tasks: dict[str, Callable[[], Any]] = {
        "moments": posterior.mean,
        "sample(4000)": lambda: posterior.sample(4000),
        "predictive": lambda: posterior.predictive()(),
        "to_arviz": result.to_arviz,
        "diagnose": lambda: diagnose(result, simulations=0, progress=False),
        "100 simulations": lambda: diagnose(result, progress=False),
    }
    times = {what: timed(task)[0] for what, task in tasks.items()}
    times["moments"] += draws
    times["100 simulations"] -= times["diagnose"]
    found = posterior.globals_
    told = f"{len(found.draws)} ({found.effective:.0f}, error {found.error:.2g})"
    ratios = [f"{seconds:.2f} ({seconds / base:.1f})" for seconds in times.values()]
    return [name, result.status.name, f"{base:.2f}", told, *ratios]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="shapes whose name has one of these parts")
    parser.add_argument("--objective", default="Ladder")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    model, args = SHAPES[next(iter(SHAPES))]()
    objective = getattr(laplace_amort, options.objective)
    warm = fit(model, AutoLaplaceFamily(model), *args, objective=laplace_amort.MarginalLaplace(), progress=False)
    warm.posterior.mean()  # what is imported and loaded the first time
    headers = ["shape", "status", "fit, s", "draws (effective)", "moments, s (ratio)", "sample", "predictive"]
    headers += ["to_arviz", "diagnose", "100 simulations"]
    chosen = [name for name in SHAPES if not options.only or any(part in name for part in options.only)]
    rows = []
    for name in chosen:
        rows.append(row(name, objective()))
        print(rows[-1], flush=True)
    print(tabulate(rows, headers=headers, tablefmt="rst"))


if __name__ == "__main__":
    main()
