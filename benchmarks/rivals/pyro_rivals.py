"""The rivals in Pyro: its automatic guides, by SVI, and its Laplace approximation at the joint mode."""

from __future__ import annotations

import functools
import importlib.util
import time
from typing import Any

import numpy as np
import pyro
import torch
from convergence import NO_JOINT_MODE, Params, Setting, budget_for, elbo, particles_for, search
from memory import Peak
from numpy.typing import NDArray
from outcome import NotInstalledError
from pyro import poutine
from pyro.infer import SVI, JitTrace_ELBO
from pyro.infer.autoguide import (
    AutoGaussian,
    AutoGuide,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_uniform,
)
from pyro.optim import ClippedAdam
from tasks import Task

GUIDES: dict[str, Any] = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": AutoLowRankMultivariateNormal,
    "AutoGaussian": functools.partial(AutoGaussian, backend="dense"),
    "AutoGaussian-funsor": functools.partial(AutoGaussian, backend="funsor"),
}
# Every rival starts where ours does: at zero in unconstrained space, a reasonable place in all tasks. Pyro's default is
# the median of draws from the prior, which is elsewhere in each run.
START = functools.partial(init_to_uniform, radius=0.0)


class SviTrainer:
    """SVI of one guide; see :class:`convergence.Trainer`."""

    def __init__(self, task: Task, guide: AutoGuide, particles: int) -> None:
        self.task, self.guide = task, guide
        self.model, self.args = task.pyro_model, task.pyro_args
        # The same gradients as those of Trace_ELBO, in half the time where Python is most of it.
        self.loss = JitTrace_ELBO(
            particles,
            vectorize_particles=particles > 1,
            max_plate_nesting=task.kind.max_plate_nesting,
            ignore_jit_warnings=True,
        )
        # Enough draws at once to hide Python, and few enough not to need more memory than training does.
        self.draws = max(particles, 100_000 // task.units)
        guide(*self.args)
        self.initial = self.params()

    def start(self, setting: Setting) -> None:
        """Go back to the initial parameters, with a new optimizer."""
        self.restore(self.initial)
        pyro.set_rng_seed(self.task.seed)
        # Adam needs no clipping; the default of 10 would cut the gradients of globals, which are sums over units.
        clip = 10.0 * self.task.units
        optimizer = ClippedAdam({"lr": setting.rate, "lrd": setting.factor, "clip_norm": clip})
        self.svi = SVI(self.model, self.guide, optimizer, self.loss)

    def advance(self, steps: int) -> None:
        """Do steps of SVI."""
        for _ in range(steps):
            self.svi.step(*self.args)

    def params(self) -> Params:
        """Return a copy of all unconstrained parameters of the guide."""
        return {name: value.detach().numpy().copy() for name, value in self.guide.named_parameters()}

    def restore(self, params: Params) -> None:
        """Set the parameters."""
        with torch.no_grad():
            for name, value in self.guide.named_parameters():
                value.copy_(torch.from_numpy(params[name]))

    @torch.no_grad()
    def terms(self, params: Params, seed: int) -> NDArray[np.float64]:
        """Draw ``log p - log q``."""
        current = self.params()
        self.restore(params)
        with torch.random.fork_rng(devices=[]):
            pyro.set_rng_seed(seed)
            terms = elbo_terms(self.model, self.guide, self.args, self.task.kind.max_plate_nesting, self.draws)
        self.restore(current)
        return terms


def elbo_terms(model: Any, guide: Any, args: tuple[Any, ...], nesting: int, draws: int) -> NDArray[np.float64]:
    """Draws of ``log p - log q``, vectorized as Pyro's ELBOs do it: ``(draws,)``."""

    def total(trace: poutine.Trace) -> torch.Tensor:
        trace.compute_log_prob()
        sums: torch.Tensor = torch.zeros(draws)
        for site in trace.nodes.values():
            if site["type"] == "sample":
                sums = sums + site["log_prob"].expand(draws, *site["log_prob"].shape[1:]).reshape(draws, -1).sum(-1)
        return sums

    with pyro.plate("particles", draws, dim=-1 - nesting):
        guide_trace = poutine.trace(guide).get_trace(*args)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)
    return (total(model_trace) - total(guide_trace)).numpy()


class MapTrainer(SviTrainer):
    """MAP: there is nothing random, and the objective is the log joint density at the parameter."""

    def __init__(self, task: Task) -> None:
        super().__init__(task, AutoLaplaceApproximation(task.pyro_model, init_loc_fn=START), 1)
        self.draws = 1


def set_up() -> None:
    """Double precision as everywhere here, and no validation, which costs Pyro time."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    # The first steps of all import a thousand modules of torch, which are neither time nor memory of a fit.
    small = Task("eight_schools", 8, 0)
    warmed(SviTrainer(small, AutoNormal(small.pyro_model), 2))
    pyro.clear_param_store()


def warmed(trainer: SviTrainer) -> float:
    """Do the first steps, in which ``torch.jit`` traces and the guide sets itself up; the seconds they take."""
    start = time.perf_counter()
    trainer.start(Setting(1e-6, 10))
    trainer.advance(3)
    return time.perf_counter() - start


def fit_guide(task: Task, name: str) -> dict[str, Any]:
    """Fit one of the guides by the convergence rule."""
    if name.endswith("funsor") and importlib.util.find_spec("funsor") is None:
        raise NotInstalledError("funsor")
    set_up()
    peak = Peak()
    start = time.perf_counter()
    guide = GUIDES[name](task.pyro_model, init_loc_fn=START)
    trainer = SviTrainer(task, guide, particles_for(task.units))
    setup_seconds = time.perf_counter() - start
    compile_seconds = warmed(trainer)
    columns = search(trainer, budget_for(task.units), peak).columns()
    columns["remark"] = f"{trainer.loss.num_particles} particles; {columns['remark']}"
    return {"setup_seconds": setup_seconds, "compile_seconds": compile_seconds, **columns}


def fit_laplace(task: Task) -> dict[str, Any]:
    """Find the joint mode by Adam, then Pyro's Hessian there."""
    set_up()
    peak = Peak()
    start = time.perf_counter()
    trainer = MapTrainer(task)
    setup_seconds = time.perf_counter() - start
    compile_seconds = warmed(trainer)
    found = search(trainer, budget_for(task.units), peak)
    trainer.restore(found.limit)
    peak.restart()
    start = time.perf_counter()
    try:
        posterior = trainer.guide.laplace_approximation(*task.pyro_args)
    except torch.linalg.LinAlgError as failure:
        raise RuntimeError(NO_JOINT_MODE.format(found.elbo)) from failure
    se_seconds, peak_mib = time.perf_counter() - start, peak.growth()
    normal = SviTrainer(task, posterior, 1)
    mean, error = elbo(normal, normal.initial, 60.0)
    return {
        **found.columns(),
        "setup_seconds": setup_seconds,
        "compile_seconds": compile_seconds,
        "se_seconds": se_seconds,
        "objective": found.elbo,
        "elbo": mean,
        "elbo_se": error,
        "peak_mib": peak_mib,
    }
