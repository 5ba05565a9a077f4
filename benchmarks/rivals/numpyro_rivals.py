"""The rivals in NumPyro: its automatic guides, by compiled SVI, its Laplace approximation, and NUTS."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from convergence import NO_JOINT_MODE, Params, Setting, budget_for, elbo, particles_for, search
from jax import Array
from memory import Peak
from numpy.typing import NDArray
from numpyro.diagnostics import summary
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, init_to_uniform
from numpyro.infer.autoguide import (
    AutoGuide,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from numpyro.optim import ClippedAdam
from numpyro_models import MODELS
from outcome import Estimates
from tasks import Site, Task

GUIDES = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": AutoLowRankMultivariateNormal,
    "AutoLaplaceApproximation": AutoLaplaceApproximation,
}
START = init_to_uniform(radius=0.0)  # zero in unconstrained space, as for every rival
CHAINS, WARMUP, DRAWS = 4, 1000, 1000

numpyro.enable_x64()


class CompileClock:
    """Adds up what JAX spends on tracing and compiling, from the moment it is made."""

    def __init__(self) -> None:
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, seconds: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += seconds


class SviTrainer:
    """SVI of one guide in one compiled loop; see :class:`convergence.Trainer`."""

    def __init__(self, task: Task, guide: Any, particles: int) -> None:
        # Observations stay NumPy arrays in the models' eyes: constants, of which XLA can take shapes and indices.
        self.task, self.guide, self.args = task, guide, tuple(task.arrays.values())
        self.model = MODELS[task.name]
        self.loss = Trace_ELBO(num_particles=particles)
        self.draws = max(particles, 100_000 // task.units)
        self.clip = 10.0 * task.units  # no clipping in effect, as for Pyro
        self.svi = SVI(self.model, guide, ClippedAdam(1.0, clip_norm=self.clip), self.loss)
        self.initial = self.svi.init(jax.random.key(task.seed), *self.args)
        self.state = self.initial

    def compile(self) -> None:
        """Compile the training loop. Number of steps and learning rate are its arguments."""

        def loop(state: Any, steps: Array, rate: Array, factor: Array) -> Any:
            self.svi.optim = ClippedAdam(lambda i: rate * factor**i, clip_norm=self.clip)
            return jax.lax.fori_loop(0, steps, lambda _, current: self.svi.update(current, *self.args)[0], state)

        self._loop = jax.jit(loop).lower(self.state, 1, 1.0, 1.0).compile()
        self._terms = jax.jit(self._draw)

    def start(self, setting: Setting) -> None:
        """Go back to the initial state, with another learning rate."""
        self.setting, self.state = setting, self.initial

    def advance(self, steps: int) -> None:
        """Do steps of SVI."""
        loop = self._loop(self.state, steps, self.setting.rate, self.setting.factor)
        self.state = jax.block_until_ready(loop)

    def params(self) -> Params:
        """Return a copy of the parameters of the guide, constrained."""
        return {name: np.array(value) for name, value in self.svi.get_params(self.state).items()}

    def _draw(self, params: Any, key: Array) -> Array:
        one = Trace_ELBO()
        keys = jax.random.split(key, self.draws)
        return jax.vmap(lambda key: -one.loss(key, params, self.model, self.guide, *self.args))(keys)

    def terms(self, params: Params, seed: int) -> NDArray[np.float64]:
        """Draw ``log p - log q``."""
        return np.asarray(self._terms(params, jax.random.key(seed)))


class NormalTrainer(SviTrainer):
    """Only there to evaluate: draws from a given Normal in the unconstrained space of a guide."""

    def __init__(self, of: SviTrainer, posterior: Any) -> None:
        self.of, self.posterior = of, posterior
        self._terms = jax.jit(self._draw_fixed)

    def _draw_fixed(self, key: Array) -> Array:
        latent = self.posterior.sample(key, (self.of.draws,))
        log_joint = jax.vmap(lambda value: -self.of.guide._potential_fn(self.of.guide._unpack_latent(value)))(latent)
        return log_joint - self.posterior.log_prob(latent)

    def terms(self, params: Params, seed: int) -> NDArray[np.float64]:
        """Draw ``log p - log q``."""
        return np.asarray(self._terms(jax.random.key(seed)))


def fit_guide(task: Task, name: str) -> dict[str, Any]:
    """Fit one of the guides by the convergence rule."""
    peak = Peak()
    trainer, times = _compiled_trainer(task, GUIDES[name], particles_for(task.units))
    columns = search(trainer, budget_for(task.units), peak).columns()
    columns["remark"] = f"{trainer.loss.num_particles} particles; {columns['remark']}"
    return {**times, **columns}


def _compiled_trainer(task: Task, guide_class: type[AutoGuide], particles: int) -> tuple[SviTrainer, dict[str, float]]:
    """A trainer that is ready to run, the seconds to set it up, and those to compile it."""
    clock, start = CompileClock(), time.perf_counter()
    trainer = SviTrainer(task, guide_class(MODELS[task.name], init_loc_fn=START), particles)
    trainer.compile()
    seconds = time.perf_counter() - start
    return trainer, {"setup_seconds": max(seconds - clock.seconds, 0.0), "compile_seconds": clock.seconds}


def fit_laplace(task: Task) -> dict[str, Any]:
    """Find the joint mode by Adam, then NumPyro's Hessian there."""
    peak = Peak()
    trainer, times = _compiled_trainer(task, AutoLaplaceApproximation, 1)
    trainer.draws = 1  # nothing is random: the objective is the log joint density at the parameter
    found = search(trainer, budget_for(task.units), peak)
    peak.restart()
    posterior, se_seconds, compile_seconds = _timed_posterior(trainer, found.limit)
    peak_mib = peak.growth()
    times["compile_seconds"] += compile_seconds
    if not np.diagonal(posterior.scale_tril).all():  # what NumPyro makes of a Hessian without a Cholesky factor
        raise RuntimeError(NO_JOINT_MODE.format(found.elbo))
    mean, error = elbo(NormalTrainer(trainer, posterior), {}, 60.0)
    return {
        **found.columns(),
        **times,
        "se_seconds": se_seconds,
        "objective": found.elbo,
        "elbo": mean,
        "elbo_se": error,
        "peak_mib": peak_mib,
    }


def _timed_posterior(trainer: SviTrainer, params: Params) -> tuple[Any, float, float]:
    """The posterior at the mode, the seconds of a call, and those of compiling before it."""
    seconds = []
    compiled = jax.jit(lambda values: trainer.guide.get_transform(values).scale_tril)
    for _ in range(2):
        start = time.perf_counter()
        scale_tril = jax.block_until_ready(compiled(params))
        seconds.append(time.perf_counter() - start)
    loc = params[f"{trainer.guide.prefix}_loc"]
    posterior = dist.MultivariateNormal(loc, scale_tril=scale_tril, validate_args=False)
    return posterior, seconds[1], seconds[0] - seconds[1]


def fit_nuts(task: Task) -> dict[str, Any]:
    """Draw by NUTS, the chains one after the other."""
    clock = CompileClock()
    sampler = MCMC(
        NUTS(MODELS[task.name], init_strategy=START),
        num_warmup=WARMUP,
        num_samples=DRAWS,
        num_chains=CHAINS,
        chain_method="sequential",
        progress_bar=False,
    )
    start = time.perf_counter()
    sampler.run(jax.random.key(task.seed), *task.arrays.values(), extra_fields=("num_steps", "diverging"))
    jax.block_until_ready(sampler.get_samples())
    seconds, compile_seconds = time.perf_counter() - start, clock.seconds
    extra = sampler.get_extra_fields()
    diagnostics = summary(sampler.get_samples(group_by_chain=True)).values()
    least, largest = min(np.min(s["n_eff"]) for s in diagnostics), max(np.max(s["r_hat"]) for s in diagnostics)
    remark = (
        f"{CHAINS} chains, {WARMUP} + {DRAWS} draws; least ESS {least:.0f}, largest R-hat {largest:.3f}, "
        f"{int(np.sum(extra['diverging']))} divergences; steps are of the draws after warmup"
    )
    return {
        "fit_seconds": seconds - compile_seconds,
        "compile_seconds": compile_seconds,
        "steps": int(np.sum(extra["num_steps"])),
        "remark": remark,
        "estimates": _estimates(task, sampler.get_samples()),
    }


def _estimates(task: Task, samples: dict[str, Array]) -> Estimates:
    """Posterior means and standard deviations in unconstrained coordinates."""

    def draws(site: Site) -> NDArray[np.float64]:
        values = np.asarray(samples[site.name])
        return np.log(values) if site.positive else values

    global_draws = np.concatenate([draws(s).reshape(CHAINS * DRAWS, -1) for s in task.kind.global_sites], axis=1)
    local_draws = np.stack([draws(site) for site in task.kind.local_sites], axis=1)
    return Estimates(global_draws.mean(0), global_draws.std(0, ddof=1), local_draws.mean(0), local_draws.std(0, ddof=1))
