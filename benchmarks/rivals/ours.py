"""The rows of laplace_amort: ``fit`` with its default settings, on the same plain Pyro models."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from memory import Peak
from outcome import Estimates
from tasks import Task

from laplace_amort import (
    AutoLaplaceFamily,
    FitResult,
    FixedDrawELBO,
    JointCurvature,
    MarginalCurvature,
    MarginalLaplace,
    MarginalQuadrature,
)
from laplace_amort import fit as fit_guide
from laplace_amort.fitting.objectives.draws import mean_of_pairs
from laplace_amort.fitting.objectives.elbo import ELBOFunction
from laplace_amort.guide.problem import Problem
from laplace_amort.posterior.psis import pareto_smoothed

HEADS = {"joint": JointCurvature, "marginal": MarginalCurvature}

# What the limit of an ELBO is taken from: many more draws than a fit needs, and then as many for the comparison.
LIMIT = FixedDrawELBO(num_draws=256, max_draws=4096, accuracy=0.01)
LARGEST_LIMIT = 100_000  # units
LIMIT_NUMBERS, COMPARED_NUMBERS = 2**24, 2**22  # drawn at a time


def _timed_fit(task: Task, guide: AutoLaplaceFamily, objective: Any) -> tuple[FitResult, float]:
    begun = time.perf_counter()
    result = fit_guide(task.pyro_model, guide, *task.pyro_args, objective=objective, progress=False)
    return result, time.perf_counter() - begun


def _prepared() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    # The first backward pass with seeds of its own makes torch load sympy, some 0.3 s: once a process, as loading R's
    # packages is, and no part of a fit.
    x = torch.ones(1, requires_grad=True)
    torch.autograd.grad(2 * x, x, torch.ones(1))


def fit_marginal_laplace(task: Task) -> dict[str, Any]:
    """The optimum of the marginal Laplace density, and all standard errors."""
    _prepared()
    result, seconds = _timed_fit(task, AutoLaplaceFamily(task.pyro_model), MarginalLaplace())
    begun = time.perf_counter()
    gaussian = result.gaussian
    if not result.status.ok or gaussian is None:
        raise RuntimeError(str(result.status))
    precision = gaussian.precision
    estimates = Estimates(
        *(np.asarray(v) for v in (gaussian.global_loc, precision.global_variance().sqrt())),
        *(np.asarray(v.T) for v in (gaussian.local_loc, precision.local_variance().sqrt())),
    )
    set_up, climb = result.timings["set-up"], result.timings["marginal Laplace"]
    return {
        "setup_seconds": set_up,
        "fit_seconds": climb,
        "se_seconds": seconds - set_up - climb + time.perf_counter() - begun,
        "steps": len(result.history),
        "objective": result.objective,
        "estimates": estimates,
    }


def fit_quadrature(task: Task) -> dict[str, Any]:
    """The top rung: nine points for each unit, and from there draws of the globals and moments of everything.

    Sites of these tasks have unconstrained values. The optimum with its standard errors, which is what lme4 gives, is
    in ``fit_seconds``; ``se_seconds`` are what the posterior takes.
    """
    _prepared()
    pareto_smoothed(np.arange(30.0))  # loads ArviZ
    result, seconds = _timed_fit(task, AutoLaplaceFamily(task.pyro_model), MarginalQuadrature())
    begun = time.perf_counter()
    posterior = result.posterior
    mean, sd = posterior.mean(), posterior.std()
    posterior_seconds = time.perf_counter() - begun
    sites = task.kind.global_sites, task.kind.local_sites
    parts = [[np.asarray(part[site.name]).reshape(-1) for site in kind] for kind in sites for part in (mean, sd)]
    return {
        "setup_seconds": result.timings["set-up"],
        "fit_seconds": seconds - result.timings["set-up"],
        "se_seconds": posterior_seconds,
        "steps": len(result.history),
        "objective": result.objective,
        "remark": f"{result.status.name}; k-hat {posterior.k_hat:.2f}, {len(posterior.globals_.draws)} draws",
        "estimates": Estimates(*(np.concatenate(p) for p in parts[:2]), *(np.stack(p) for p in parts[2:])),
    }


def fit_elbo(task: Task, head: str) -> dict[str, Any]:
    """The ELBO with one of the heads: seconds of the default fit, and how far below its own limit that ended."""
    _prepared()
    peak = Peak()
    guide = AutoLaplaceFamily(task.pyro_model, head=HEADS[head]())
    result, seconds = _timed_fit(task, guide, FixedDrawELBO())
    set_up = result.timings["set-up"]
    found = {
        "setup_seconds": set_up,
        "fit_seconds": seconds - set_up,  # with the check on fresh draws, the final value and its standard error
        "steps": len(result.history),
        "peak_mib": peak.growth(),
        "elbo": result.objective,
        "elbo_se": result.standard_error,
        "remark": result.status.name,
    }
    return found | _limit(task, guide, result) if task.units <= LARGEST_LIMIT else found


def _limit(task: Task, guide: AutoLaplaceFamily, result: FitResult) -> dict[str, Any]:
    """The limit, and how far from it the fit ended."""
    reached = guide.loc.detach().clone()
    begun = time.perf_counter()
    num_draws = min(LIMIT.num_draws, max(16, LIMIT_NUMBERS // task.units // 2 * 2))
    limit, _ = _timed_fit(task, guide, replace(LIMIT, num_draws=num_draws))
    gap, error, elbo, elbo_error = _gap(task, guide, reached)
    return {
        "search_seconds": time.perf_counter() - begun,
        "elbo": elbo,
        "elbo_se": elbo_error,
        "remark": f"{result.status.name}; {gap:+.3f} (se {error:.3f}) from its limit ({limit.status.name})",
    }


def _gap(task: Task, guide: AutoLaplaceFamily, reached: torch.Tensor) -> tuple[float, float, float, float]:
    """ELBO at the parameter reached less that at the limit, on the same draws; and the limit. Each with its error."""
    problem = Problem(guide, task.pyro_args, {})
    limit, numbers = problem.loc.clone(), problem.start.numel() + len(reached)
    num_draws = int(min(4096, max(8, COMPARED_NUMBERS // numbers // 2 * 2)))
    size = min(64, num_draws)
    values = []
    for point in (reached, limit):
        problem.place(point)
        batches = [ELBOFunction(problem, size, 10_000 + batch).values() for batch in range(num_draws // size)]
        values.append(torch.cat([terms.unflatten(0, (2, -1)).mean(0) for terms in batches]).repeat(2))
    return *mean_of_pairs(values[0] - values[1]), *mean_of_pairs(values[1])
