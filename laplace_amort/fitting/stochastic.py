"""Stochastic optimization with a stopping rule: for minibatches, and for any ELBO of Pyro's."""

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

from laplace_amort.errors import NUMERICAL_ERRORS
from laplace_amort.fitting.evaluation import Evaluation, FitStatus, Maximum
from laplace_amort.fitting.history import History, Step
from laplace_amort.fitting.objectives.elbo import ELBOFunction
from laplace_amort.guide import to_vector
from laplace_amort.linalg import Whitening
from laplace_amort.types import Vector

__all__ = ["Stochastic"]

# Split R-hat of iterates below which a window of them counts as stationary.
_STATIONARY = 1.1
# Steps in a row that may fail before a fit gives up.
_FAILURES = 20
# Windows that a phase has at least: half of them are for forgetting where it began.
_LEAST_WINDOWS = 4
_PARTICLES = 8
# Evaluations that the final value is the mean of.
_FINAL = 50


@dataclass(frozen=True)
class Stochastic:
    r"""Steps along noisy gradients of an ELBO, by any optimizer of torch, until averages of iterates agree.

    Parameters move in whitening whose unit is a posterior standard deviation, so that one learning rate suits all.
    At a constant learning rate iterates become a stationary process around the optimum, seen by a split
    :math:`\hat R` of each global below 1.1; their average then is a better estimate than any of them, and its Monte
    Carlo error is known. The rate is halved, from the average on, until the averages at two rates agree to within the
    accuracy: so neither noise nor the bias of a finite rate is taken for convergence.

    Do not use it where all units fit into memory: :class:`~laplace_amort.FixedDrawELBO` by itself takes some ten
    evaluations of all units, and has no such noise.

    :param optimizer: of torch, called with a list of tensors and ``lr``, such as ``torch.optim.Adam``.
    :param float lr: learning rate to begin with, in posterior standard deviations.
    :param ELBO elbo: one of Pyro's; by default ``Trace_ELBO`` with 8 vectorized particles.
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

    def begin(self, seed: int) -> StochasticState:
        """Return the state of a fit that has not begun."""
        return StochasticState(rng=torch.Generator().manual_seed(seed).get_state())

    def climb(self, run: History, state: StochasticState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Maximum:
        """Optimize from the state on, and put the guide at the average of its last iterates.

        :param History run: has the guide, the history and the bar.
        :param StochasticState state: of :meth:`begin`, or of a fit before; it is changed in place, window by window.
        :param tuple args: arguments of the model.
        :param dict kwargs: its keyword arguments.
        """
        if state.status is FitStatus.MAX_STEPS and state.num_steps < self.max_steps:
            state.status = None  # more are allowed now
        with torch.random.fork_rng(devices=[]):
            walk = _Walk(self, run, state, args, kwargs)
            try:
                while state.status is None:
                    walk.window()
            except KeyboardInterrupt:  # what the windows before have come to is in the state
                pass
            return walk.finish()


@dataclass
class Phase:
    """A constant learning rate under way: what the next window follows from, and the iterates of those before."""

    lr: float
    origin: Vector
    whitening: Whitening
    u: Tensor
    optimizer: dict[str, Any] | None = None
    means: list[Tensor] = field(default_factory=list)  # of each window, (P,)
    globals_: list[Tensor] = field(default_factory=list)  # iterates of each window, (W, d)

    def late(self) -> slice:
        """The later half of the windows, in which the beginning is forgotten."""
        return slice(len(self.means) // 2, None)

    def average(self) -> Vector:
        """The parameters at the average of the late iterates; where the phase began if there are none."""
        if not self.means:
            return self.origin
        mean = torch.stack(self.means[self.late()]).mean(0)
        return self.origin + self.whitening.step(mean.numpy())

    def is_stationary(self, accuracy: float) -> bool:
        """Whether the late iterates are a stationary process, and their average is known to an accuracy."""
        late = torch.cat(self.globals_[self.late()])
        if len(self.globals_) < _LEAST_WINDOWS:
            return False
        if not late.numel():
            return True
        r_hat = split_gelman_rubin(late.unsqueeze(0), chain_dim=0, sample_dim=1)
        error = late.std(0) / effective_sample_size(late.unsqueeze(0), chain_dim=0, sample_dim=1).clamp(min=1).sqrt()
        return bool((r_hat < _STATIONARY).all() and (error < accuracy).all())


@dataclass
class StochasticState:
    """All that a stochastic fit goes on from, in plain values that can be saved.

    :param Tensor rng: state of torch's generator.
    :param Phase phase: the present one; None before the first.
    :param warm_start: what the guide remembers of modes.
    :param Vector previous: the average of the phase before.
    :param float shift: how far the averages of the last two phases are from each other, in standard deviations.
    :param float loss: mean over the last window.
    :param FitStatus status: None while it goes on.
    """

    rng: Tensor
    phase: Phase | None = None
    warm_start: Any = None
    num_steps: int = 0
    previous: Vector | None = None
    shift: float = math.inf
    loss: float = math.inf
    status: FitStatus | None = None


class _Walk:
    """A stochastic fit under way: the state, and what is made of it anew in each session."""

    def __init__(
        self, how: Stochastic, run: History, state: StochasticState, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.how, self.run, self.state, self.args, self.kwargs = how, run, state, args, kwargs
        self.guide = run.problem.guide
        self.function = ELBOFunction(run.problem, 2, 0)  # for its parameters and whitening; the draws are never made
        nesting = run.problem.unit_model.density.max_plate_nesting
        self.elbo: Any = how.elbo or Trace_ELBO(_PARTICLES, nesting, vectorize_particles=True)
        self.failures, self.problem = 0, ""
        self.phase = state.phase or self._new_phase(self.function.point(), how.lr)

    def window(self) -> None:
        """Take the steps of one window, then look at the iterates; of one that is interrupted nothing is kept."""
        state, begun = self.state, time.perf_counter()
        self._restore()
        iterates: list[Tensor] = []
        losses: list[float] = []
        while len(iterates) < self.how.window and self.failures < _FAILURES:
            losses.append(self._step())
            iterates.append(self.u.detach().clone())
            self.run.bar.set_postfix_str(f"loss {losses[-1]:.6g}, lr {self.phase.lr:.3g} sd", refresh=False)
            self.run.bar.update()
        self._keep(iterates, losses)
        label, seconds = f"stochastic, lr {self.phase.lr:.3g}", time.perf_counter() - begun
        self.run.history.append(Step(label, -state.loss, state.shift, 0, seconds, self.problem))
        self.run.add_time("stochastic", seconds)
        self._judge()

    def finish(self) -> Maximum:
        """Put the guide at the average, and say where that is."""
        point = self.phase.average()
        self.function.move(point)
        value, error = -self.state.loss, 0.0
        if self.state.status in (FitStatus.CONVERGED, FitStatus.MAX_STEPS):
            with torch.no_grad():
                losses = torch.tensor(
                    [self.elbo.loss(self.guide.model, self.guide, *self.args, **self.kwargs) for _ in range(_FINAL)],
                    dtype=torch.float64,
                )
            value, error = -float(losses.mean()), float(losses.std()) / _FINAL**0.5
        found = Evaluation(value, numpy.zeros_like(point), standard_error=error, problem=self.problem)
        status = FitStatus.INTERRUPTED if self.state.status is None else self.state.status
        return Maximum(point, found, status, self.state.shift)

    def _new_phase(self, point: Vector, lr: float) -> Phase:
        """Begin a learning rate at a point, in coordinates of its own."""
        self.function.move(point)
        zero = torch.zeros(len(point), dtype=torch.float64)
        phase = Phase(lr, point, self.function.whitening(), zero)
        self.state.phase, self.state.warm_start = phase, self.run.problem.memory()
        return phase

    def _restore(self) -> None:
        """Go to where the last window ended."""
        torch.set_rng_state(self.state.rng)
        self.run.problem.recall(self.state.warm_start)
        self.u = self.phase.u.clone().requires_grad_()
        self.good = self.phase.u.clone()
        self.optimizer = self.how.optimizer([self.u], lr=self.phase.lr, **self.how.settings)
        if self.phase.optimizer is not None:
            self.optimizer.load_state_dict(copy.deepcopy(self.phase.optimizer))

    def _keep(self, iterates: list[Tensor], losses: list[float]) -> None:
        """Make what the window has come to part of the state."""
        state, phase, stacked = self.state, self.phase, torch.stack(iterates)
        state.rng, state.warm_start = torch.get_rng_state(), self.run.problem.memory()
        state.num_steps += len(iterates)
        finite = [loss for loss in losses if math.isfinite(loss)]
        state.loss = sum(finite) / len(finite) if finite else math.inf
        phase.u, phase.optimizer = self.u.detach().clone(), copy.deepcopy(self.optimizer.state_dict())
        phase.means.append(stacked.mean(0))
        phase.globals_.append(stacked[:, : len(self.guide.loc)])

    def _judge(self) -> None:
        """Go on, with the same learning rate or with half of it, or be done."""
        state, phase = self.state, self.phase
        if self.failures >= _FAILURES:
            state.status = FitStatus.START_FAILED if math.isinf(state.loss) else FitStatus.STUCK
        elif phase.is_stationary(self.how.accuracy / 2):
            average = phase.average()
            if state.previous is not None:
                state.shift = phase.whitening.distance(average - state.previous) / max(len(self.guide.loc), 1) ** 0.5
            if state.shift <= self.how.accuracy:
                state.status = FitStatus.CONVERGED
            else:
                state.previous = average
                self.phase = self._new_phase(average, phase.lr / 2)
        if state.status is None and state.num_steps >= self.how.max_steps:
            state.status = FitStatus.MAX_STEPS

    def _step(self) -> float:
        """One step of the optimizer; from where there is no objective, half-way back to where there was one."""
        now = self.u.detach().clone()
        self.function.move(self.phase.origin + self.phase.whitening.step(now.numpy()))
        try:
            loss = float(self.elbo.loss_and_grads(self.guide.model, self.guide, *self.args, **self.kwargs))
            problem = "" if math.isfinite(loss) else f"the loss is {loss}"
        except NUMERICAL_ERRORS as error:
            loss, problem = math.nan, f"{type(error).__name__}: {error}"
        gradient = torch.from_numpy(self.phase.whitening.vjp(self._take_gradient()))
        if problem or not bool(gradient.isfinite().all()):
            self.failures, self.problem = self.failures + 1, problem or "the gradient of the loss is not finite"
            with torch.no_grad():
                self.u.copy_((now + self.good) / 2)
            return math.nan
        self.failures, self.good = 0, now
        self.u.grad = gradient
        self.optimizer.step()
        return loss

    def _take_gradient(self) -> Vector:
        """The gradient that the last backward has left at the parameters, ``(P,)``; nothing is left there."""
        grads = []
        for parameter in self.function.parameters:
            grads.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
            parameter.grad = None
        return to_vector(grads)
