"""An ELBO by noisy steps with a stopping rule, as an objective: for minibatches, and for any ELBO of Pyro's."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from pyro.infer import ELBO, Trace_ELBO
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

from laplace_amort.errors import NUMERICAL_ERRORS, ModelError
from laplace_amort.fitting.evaluation import Evaluation, FitStatus, Maximum
from laplace_amort.fitting.history import History, Step
from laplace_amort.fitting.objectives.base import Objective
from laplace_amort.fitting.objectives.elbo import ELBOFunction, FixedDrawELBO
from laplace_amort.fitting.optimizers import Optimizer, TrustRegion
from laplace_amort.guide import LaplaceGaussian, Problem, to_vector
from laplace_amort.linalg import Whitening
from laplace_amort.posterior import Posterior
from laplace_amort.types import Vector

__all__ = ["Stochastic"]

# Split R-hat of iterates below which a window of them counts as stationary.
_STATIONARY = 1.1
# Steps in a row that may fail before a fit gives up.
_FAILURES = 20
# Windows that a learning rate has at least: half of them are for forgetting where it began.
_LEAST_WINDOWS = 4
_PARTICLES = 8
# Evaluations that the final value is the mean of.
_FINAL = 50


@dataclass(frozen=True)
class Stochastic:
    r"""Steps along noisy gradients of an ELBO, by any optimizer of torch, until averages of iterates agree.

    Parameters move in coordinates whose unit is a posterior standard deviation, so that one learning rate suits all.
    At a constant learning rate iterates become a stationary process around the optimum, seen by a split
    :math:`\hat R` of each global below 1.1; their average then is a better estimate than any of them, and its Monte
    Carlo error is known. The rate is halved, from the average on, until the averages at two rates agree to within the
    accuracy: so neither noise nor the bias of a finite rate is taken for convergence.

    Do not use it where all units fit into memory: :class:`~laplace_amort.FixedDrawELBO` by itself takes some ten
    evaluations of all units, and has no such noise.

    :param optimizer: of torch, called with a list of tensors and ``lr``, such as ``torch.optim.Adam``.
    :param float lr: learning rate to begin with, in posterior standard deviations.
    :param ELBO elbo: one of Pyro's; by default ``Trace_ELBO`` with 8 particles, vectorized where the model takes that.
    :param int window: steps between two looks at the iterates.
    :param int max_steps: steps at most.
    :param float accuracy: of the optimum, in posterior standard deviations. The noise of a minibatch of B out of N
        units is some :math:`\sqrt{N/B}` of them, so that it takes the square of that over the accuracy in steps.
    :param dict settings: other arguments of the optimizer.
    :raises ValueError: if a number is out of its range.

    References:

    [1] Dhaka, Catalina, Andersen, Magnusson, Huggins & Vehtari (2020), *Robust, Accurate Stochastic Optimization for
    Variational Inference*, NeurIPS, https://arxiv.org/abs/2009.00666
    [2] Welandawe, Andersen, Vehtari & Huggins (2022), *Robust, Automated, and Accurate Black-box Variational
    Inference*, https://arxiv.org/abs/2203.15945
    """

    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    lr: float = 0.1
    elbo: ELBO | None = None
    window: int = 100
    max_steps: int = 20_000
    accuracy: float = 0.2
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("lr", "accuracy"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be a positive number of standard deviations, got {getattr(self, name)}")
        if self.window < 20 or self.max_steps < self.window:
            raise ValueError(
                f"a window needs 20 steps, to tell noise from drift, and max_steps at least one window; got "
                f"window={self.window} and max_steps={self.max_steps}"
            )

    @property
    def start_with(self) -> Objective | None:
        """None: a fit finds its start on one minibatch."""
        return None

    @property
    def default_optimizer(self) -> Optimizer:
        """What finds the start on one minibatch; the steps are by an optimizer of torch."""
        return TrustRegion()

    def check(self, problem: Problem) -> None:
        """Refuse nothing: minibatches are what it is for."""

    def gaussian(self, problem: Problem, maximum: Maximum) -> LaplaceGaussian:
        """Return the guide."""
        return problem.gaussian()

    def posterior(self, problem: Problem, gaussian: LaplaceGaussian, seed: int) -> Posterior:
        """Return the guide itself."""
        return FixedDrawELBO().posterior(problem, gaussian, seed)

    def climb(self, history: History, optimizer: Optimizer) -> Maximum:
        """Optimize from where the guide stands, or where an earlier fit ended, and put the guide at the average.

        :param History history: its ``walk`` is the state that an earlier fit ended in; it is changed window by window.
        :param optimizer: of no effect.
        """
        with torch.random.fork_rng(devices=[]):
            walk = _Walk(self, history)
            walk.begin()
            try:
                while walk.state.status is None:
                    walk.window()
                    walk.judge()
            except KeyboardInterrupt:  # what the windows before have come to is in the state
                pass
            return walk.finish()


@dataclass
class WalkState:
    """All that a stochastic fit goes on from, in plain values that can be saved.

    Of the learning rate under way there are the coordinates, in standard deviations from where it began, and all of its
    iterates; the rest is of the whole fit.

    :param float lr: the learning rate.
    :param Vector origin: the parameters where it began, ``(P,)``.
    :param Whitening whitening: in which it moves.
    :param Tensor u: where the parameters are now, ``(P,)``.
    :param Tensor rng: state of torch's generator.
    :param memory: what the guide remembers of modes.
    :param optimizer: state of the optimizer; None before its first step.
    :param list means: of the iterates of each window, ``(P,)``.
    :param list globals_: iterates of each window, ``(W, d)``.
    :param list history: of :class:`Step`, one for each window in all.
    :param int num_steps: in all.
    :param Vector previous: the average at the learning rate before, ``(P,)``; None if it is the first.
    :param float shift: between the averages of the last two learning rates, in standard deviations.
    :param float loss: mean over the last window.
    :param FitStatus status: None while it goes on.
    """

    lr: float
    origin: Vector
    whitening: Whitening
    u: Tensor
    rng: Tensor
    memory: Any = None
    optimizer: dict[str, Any] | None = None
    means: list[Tensor] = field(default_factory=list)
    globals_: list[Tensor] = field(default_factory=list)
    history: list[Step] = field(default_factory=list)
    num_steps: int = 0
    previous: Vector | None = None
    shift: float = math.inf
    loss: float = math.inf
    status: FitStatus | None = None

    def late(self) -> slice:
        """Return the later half of the windows, in which the beginning is forgotten."""
        return slice(len(self.means) // 2, None)

    def average(self) -> Vector:
        """Return the parameters at the average of the late iterates; where they began if there are none."""
        if not self.means:
            return self.origin
        mean = torch.stack(self.means[self.late()]).mean(0)
        return self.origin + self.whitening.step(mean.numpy())

    def is_stationary(self, accuracy: float) -> bool:
        """Return whether the late iterates are a stationary process, and their average is known to an accuracy."""
        if len(self.globals_) < _LEAST_WINDOWS:
            return False
        late = torch.cat(self.globals_[self.late()])
        if not late.numel():
            return True
        r_hat = split_gelman_rubin(late.unsqueeze(0), chain_dim=0, sample_dim=1)
        error = late.std(0) / effective_sample_size(late.unsqueeze(0), chain_dim=0, sample_dim=1).clamp(min=1).sqrt()
        return bool((r_hat < _STATIONARY).all() and (error < accuracy).all())


def _elbo_for(chosen: Any, problem: Problem) -> tuple[Any, tuple[str, ...]]:
    """The ELBO whose steps are taken, and what is to be said of it.

    :param chosen: by the user; None for that of this objective.
    :param Problem problem: has the model.
    :raises ModelError: if the chosen one gives the model a dimension of particles, and it does not take any.
    """
    num_particles = _PARTICLES if chosen is None else getattr(chosen, "num_particles", 1)
    vectorized = chosen is None or (getattr(chosen, "vectorize_particles", False) and num_particles > 1)
    if not vectorized or problem.takes_particles(num_particles):
        nesting = problem.unit_model.density.max_plate_nesting
        return chosen or Trace_ELBO(num_particles, nesting, vectorize_particles=True), ()
    why = "the model does not take a dimension of particles on the left, as an index a[county] or x @ beta does not"
    how = "Write a[..., county], or (x * beta).sum(-1)"
    if chosen is not None:
        raise ModelError(
            f"{why}. {how}; or take one particle after the other:\n"
            f"    objective=Stochastic(elbo={type(chosen).__name__}(num_particles={num_particles}))"
        )
    return Trace_ELBO(num_particles), (f"{why}: particles were taken one by one, which takes longer. {how}",)


class _Walk:
    """A stochastic fit under way: begin, then windows of steps, each of them judged, and finish.

    :param Stochastic how: the settings.
    :param History history: has the guide and the data, and the state if an earlier fit had one.
    """

    state: WalkState

    def __init__(self, how: Stochastic, history: History) -> None:
        self.how, self.history = how, history
        history.problem.hand_back()
        self.problem = history.problem.as_given()  # Pyro's ELBO sees the guide itself, and minibatches have more noise
        self.guide, self.model = self.problem.guide, self.problem.unit_model
        self.completed = self.problem.completed_model
        # For parameters and whitening; the draws are never made.
        self.function, self.exact = (ELBOFunction(problem, 2, 0) for problem in (self.problem, history.problem))
        self.elbo, self.notes = _elbo_for(how.elbo, self.problem)
        self.failures, self.failure = 0, ""  # steps in a row that failed, and why the last did

    def begin(self) -> None:
        """Go on from the state of an earlier fit, or begin where the guide stands."""
        if self.history.walk is None:
            rng = torch.Generator().manual_seed(self.history.seed).get_state()
            self.state = self.history.walk = self._state_at(self.function.point(), self.how.lr, rng)
            return
        self.state = self.history.walk
        for step in self.state.history:
            self._show(step)
        if self.state.status is FitStatus.MAX_STEPS and self.state.num_steps < self.how.max_steps:
            self.state.status = None  # more are allowed now

    def _state_at(self, point: Vector, lr: float, rng: Tensor) -> WalkState:
        """Return a state that begins with a learning rate at a point, in coordinates of its own."""
        self.function.move(point)
        self.exact.move(point)
        zero = torch.zeros(len(point), dtype=torch.float64)
        return WalkState(lr, point, self.exact.whitening(), zero, rng, self.problem.memory())

    def window(self) -> None:
        """Take the steps of one window, and make them part of the state; of one that is interrupted nothing is."""
        state, begun = self.state, time.perf_counter()
        torch.set_rng_state(state.rng)
        self.problem.recall(state.memory)
        self.u, self.good = state.u.clone().requires_grad_(), state.u.clone()
        self.optimizer = self.how.optimizer([self.u], lr=state.lr, **self.how.settings)
        if state.optimizer is not None:
            self.optimizer.load_state_dict(copy.deepcopy(state.optimizer))
        iterates: list[Tensor] = []
        losses: list[float] = []
        while len(iterates) < self.how.window and self.failures < _FAILURES:
            losses.append(self._step())
            iterates.append(self.u.detach().clone())
            self.history.bar.set_postfix_str(f"loss {losses[-1]:.6g}, lr {state.lr:.3g} sd", refresh=False)
            self.history.bar.update()
        self._keep(iterates, losses)
        label, seconds = f"stochastic, lr {state.lr:.3g}", time.perf_counter() - begun
        state.history.append(Step(label, -state.loss, state.shift, 0, seconds, self.failure))
        self._show(state.history[-1])

    def _show(self, step: Step) -> None:
        """Make a window part of the history of the fit."""
        self.history.steps.append(step)
        self.history.add_time("stochastic", step.seconds)

    def _step(self) -> float:
        """Take one step of the optimizer; from where there is no objective, half-way back to where there was one."""
        now = self.u.detach().clone()
        self.function.move(self.state.origin + self.state.whitening.step(now.numpy()))
        try:
            loss = float(self.elbo.loss_and_grads(self.completed, self.guide, *self.model.args, **self.model.kwargs))
            failure = "" if math.isfinite(loss) else f"the loss is {loss}"
        except NUMERICAL_ERRORS as error:
            loss, failure = math.nan, f"{type(error).__name__}: {error}"
        gradient = torch.from_numpy(self.state.whitening.vjp(self._take_gradient()))
        if failure or not bool(gradient.isfinite().all()):
            self.failures, self.failure = self.failures + 1, failure or "the gradient of the loss is not finite"
            with torch.no_grad():
                self.u.copy_((now + self.good) / 2)
            return math.nan
        self.failures, self.good = 0, now
        self.u.grad = gradient
        self.optimizer.step()
        return loss

    def _take_gradient(self) -> Vector:
        """Return the gradient that the last backward has left at the parameters, ``(P,)``, and leave none there."""
        grads = []
        for parameter in self.function.parameters:
            grads.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
            parameter.grad = None
        return to_vector(grads)

    def _keep(self, iterates: list[Tensor], losses: list[float]) -> None:
        """Make what a window has come to part of the state."""
        state, stacked = self.state, torch.stack(iterates)
        finite = [loss for loss in losses if math.isfinite(loss)]
        state.loss = sum(finite) / len(finite) if finite else math.inf
        state.num_steps += len(iterates)
        state.rng, state.memory = torch.get_rng_state(), self.problem.memory()
        state.u, state.optimizer = self.u.detach().clone(), copy.deepcopy(self.optimizer.state_dict())
        state.means.append(stacked.mean(0))
        state.globals_.append(stacked[:, : len(self.guide.loc)])

    def judge(self) -> None:
        """Go on, with the same learning rate or from the average on with half of it, or be done."""
        state = self.state
        if self.failures >= _FAILURES:
            state.status = FitStatus.START_FAILED if math.isinf(state.loss) else FitStatus.STUCK
        elif state.is_stationary(self.how.accuracy / 2):
            average = state.average()
            if state.previous is not None:
                state.shift = state.whitening.distance(average - state.previous) / max(len(self.guide.loc), 1) ** 0.5
            if state.shift <= self.how.accuracy:
                state.status = FitStatus.CONVERGED
            else:
                half = self._state_at(average, state.lr / 2, state.rng)
                half.num_steps, half.previous, half.shift, half.loss = state.num_steps, average, state.shift, state.loss
                half.history = state.history
                self.state = self.history.walk = half
        if self.state.status is None and self.state.num_steps >= self.how.max_steps:
            self.state.status = FitStatus.MAX_STEPS

    def finish(self) -> Maximum:
        """Put the guide at the average, and say where that is."""
        state, point = self.state, self.state.average()
        torch.set_rng_state(state.rng)  # also where no window was left to take
        self.function.move(point)
        self.exact.move(point)
        value, error = -state.loss, 0.0
        if state.status in (FitStatus.CONVERGED, FitStatus.MAX_STEPS):
            with torch.no_grad():
                losses = [
                    self.elbo.loss(self.completed, self.guide, *self.model.args, **self.model.kwargs)
                    for _ in range(_FINAL)
                ]
            average = torch.tensor(losses, dtype=torch.float64)
            value, error = -float(average.mean()), float(average.std()) / _FINAL**0.5
        found = Evaluation(value, numpy.zeros_like(point), standard_error=error, failure=self.failure)
        status = FitStatus.INTERRUPTED if state.status is None else state.status
        # The ELBO on fixed draws has the same optimum and the same posterior.
        return Maximum(point, found, status, state.shift, objective=FixedDrawELBO(), notes=self.notes)
