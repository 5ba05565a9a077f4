"""The ELBO of a guide on fixed draws, as an objective, with as many draws as it takes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from laplace_amort.errors import NUMERICAL_ERRORS
from laplace_amort.fitting.evaluation import Evaluation, FitStatus, Maximum
from laplace_amort.fitting.history import CHECK, History
from laplace_amort.fitting.identification import is_flat
from laplace_amort.fitting.objectives.base import Objective, ObjectiveFunction, posterior_whitening
from laplace_amort.fitting.objectives.draws import Draws, antithetic_draws, mean_of_pairs
from laplace_amort.fitting.objectives.laplace import LaplaceFunction, MarginalLaplace
from laplace_amort.fitting.optimizers import Optimizer, QuasiNewton
from laplace_amort.guide import LaplaceGaussian, Problem, to_vector
from laplace_amort.linalg import Whitening
from laplace_amort.posterior import LinearUnits, Posterior, gaussian_sample
from laplace_amort.units import FreeMode

__all__ = ["ELBOFunction", "FixedDrawELBO"]

# Times max_draws that the noise on few draws may call for before more are not even tried.
_HOPELESS = 100
# Times the draws of one round that the next may have.
_GROWTH = 16
# Standard errors by which the value at the optimum and that on fresh draws may differ.
_AGREE = 3


@dataclass(frozen=True)
class FixedDrawELBO:
    r"""The ELBO with common random numbers: one function, the same at every evaluation.

    .. math:: \frac1S \sum_s \Big( \log p(\theta_s, y_s, z) + \tfrac12 \epsilon_s^\top \epsilon_s \Big)
              + \tfrac{D}{2} \log 2\pi - \tfrac12 \log|P|, \qquad
              (\theta_s, y_s) = (\hat\theta, \hat y) + P^{-1/2} \epsilon_s,

    with antithetic :math:`\epsilon_s`, all made from one Hessian. With these draws fixed, this differs from the ELBO
    with the analytic entropy by a constant that is zero on average and that takes the noise of a quadratic
    :math:`\log p` away. Because it is deterministic, quasi-Newton methods apply; because the family has few parameters,
    few draws do. Whether they did is seen on fresh ones: a fit goes on with more until it is.

    Do not use it with a minibatch, which is another function of the parameters each time: that is for
    :class:`~laplace_amort.Stochastic`.

    :param int num_draws: draws to begin with, an even number.
    :param int max_draws: as many as there may be in the end.
    :param float accuracy: what fresh draws may move the optimum by, in posterior standard deviations (the root of the
        mean square over the parameters), before more are taken.
    :param start_with: an objective whose optimum is the start, by default :class:`MarginalLaplace`; None for none.
    :raises ValueError: if a number of draws is not even, or a number not positive.

    References:

    [1] Giordano, Ingram & Broderick (2024), *Black Box Variational Inference with a Deterministic Objective*, JMLR
    25(18), https://arxiv.org/abs/2304.05527
    [2] Burroni, Domke & Sheldon (2024), *Sample Average Approximation for Black-Box VI*, UAI,
    https://arxiv.org/abs/2304.06803
    """

    num_draws: int = 16
    max_draws: int = 2048
    accuracy: float = 0.05
    start_with: Objective | None = MarginalLaplace()

    def __post_init__(self) -> None:
        for name in ("num_draws", "max_draws"):
            number = getattr(self, name)
            if number < 2 or number % 2:
                raise ValueError(
                    f"{name} must be even, for draws come in pairs of opposite sign, and positive: {number}"
                )
        if self.max_draws < self.num_draws:
            raise ValueError(f"max_draws must be at least num_draws ({self.num_draws}), got {self.max_draws}")
        if not self.accuracy > 0:
            raise ValueError(f"accuracy must be a positive number of standard deviations, got {self.accuracy}")

    def check(self, problem: Problem) -> None:
        """Refuse nothing: the ELBO is one of every model that a guide takes."""

    def gaussian(self, problem: Problem, maximum: Maximum) -> LaplaceGaussian:
        """Return the guide."""
        return problem.gaussian()

    def posterior(self, problem: Problem, gaussian: LaplaceGaussian, seed: int) -> Posterior:
        """Return the guide itself."""
        return Posterior(problem, gaussian, gaussian_sample(gaussian, seed), LinearUnits(gaussian), seed)

    def bind(self, problem: Problem, num_draws: int, seed: int) -> ELBOFunction:
        """Return the objective for a guide, its data, and as many draws."""
        return ELBOFunction(problem, num_draws, seed)

    @property
    def default_optimizer(self) -> Optimizer:
        """What suits it: there is no second derivative."""
        return QuasiNewton()

    def climb(self, history: History, optimizer: Optimizer) -> Maximum:
        """Maximize from where the guide stands, with as many draws as it takes, and put the guide there."""
        return _unless_flat(history, self._climb(history, optimizer))

    def _climb(self, history: History, optimizer: Optimizer) -> Maximum:
        num_draws, seed = self.num_draws, history.seed
        while True:
            # Draws of every round are others, so that nothing is an optimum by chance twice.
            function, fresh = (self.bind(history.problem, num_draws, one) for one in (seed, seed + 1))
            whitening = history.timed("whitening", function.whitening)
            norm = _norm_in(whitening)
            watched = history.watched("ELBO", function, norm, num_draws)
            maximum = history.maximize(optimizer, watched, function.point(), _always(whitening))
            function.move(maximum.point)
            if not maximum.status.ok or not len(maximum.point):
                return maximum
            check = history.watched(CHECK, fresh, norm, num_draws)(maximum.point)
            needed = self._needed(num_draws, maximum.evaluation, check, whitening)
            if needed <= num_draws:
                return maximum
            if num_draws >= self.max_draws or needed > _HOPELESS * self.max_draws:
                return maximum._replace(status=FitStatus.TOO_FEW_DRAWS)
            num_draws = min(self.max_draws, max(2 * num_draws, min(needed, _GROWTH * num_draws)))
            seed += 2

    def _needed(self, num_draws: int, found: Evaluation, fresh: Evaluation, whitening: Whitening) -> int:
        """Return how many draws it seems to take: the square of a shift falls with their number."""
        if fresh.value == -math.inf:
            return 2 * num_draws
        pull, d = whitening.vjp(fresh.gradient), whitening.precision.global_dim
        # The gradient at the optimum of some draws on others has the noise of both.
        shift = max(float((part**2).mean() / 2) ** 0.5 for part in (pull[:d], pull[d:]) if len(part))
        error = math.hypot(found.standard_error, fresh.standard_error)
        if shift <= self.accuracy and abs(found.value - fresh.value) <= _AGREE * error:
            return num_draws
        return max(num_draws + 2, 2 * math.ceil(num_draws / 2 * (shift / self.accuracy) ** 2))


def _norm_in(whitening: Whitening) -> Callable[[Evaluation], float]:
    return lambda found: whitening.norm(found.gradient)


def _always(whitening: Whitening) -> Callable[[], Whitening]:
    return lambda: whitening


def _unless_flat(history: History, maximum: Maximum) -> Maximum:
    """Say so where the globals are not identified: a search that sees gradients only takes a plain for a top."""
    d = len(history.problem.loc)
    if not d or maximum.status is FitStatus.START_FAILED:
        return maximum
    # The ELBO is flat where the log density is, of which the marginal density has the second derivative at hand.
    found: Evaluation = history.timed("curvature", lambda: LaplaceFunction(history.problem)(maximum.point[:d]))
    if found.information is None or not is_flat(found.information, found.rounding):
        return maximum
    evaluation = maximum.evaluation._replace(information=found.information)
    return maximum._replace(evaluation=evaluation, status=FitStatus.NO_MAXIMUM)


class ELBOFunction(ObjectiveFunction):
    """A :class:`~laplace_amort.FixedDrawELBO` of one guide at given data, with its draws.

    :param Problem problem: the guide and the data.
    :param int num_draws: number of draws.
    :param int seed: of the draws.
    """

    def __init__(self, problem: Problem, num_draws: int, seed: int) -> None:
        # All parameters are in Pyro's store from here on, also if there is no Gaussian where the guide stands now.
        with contextlib.suppress(*NUMERICAL_ERRORS):
            problem.gaussian()
        super().__init__(problem, problem.parameters())
        self.num_draws, self.seed = num_draws, seed

    @cached_property
    def draws(self) -> Draws:
        """The draws, made when they are needed first."""
        return antithetic_draws(self.num_draws, self.problem.loc, self.problem.start, self.seed)

    def whitening(self) -> Whitening:
        """Return coordinates in which the posterior is standard normal, as far as the marginal curvature knows it."""
        size = sum(p.numel() for p in self.parameters)
        return posterior_whitening(self.problem, size, isinstance(self.problem.guide.mode, FreeMode))

    def _evaluate(self) -> Evaluation:
        problem = self.problem
        with torch.enable_grad():
            gaussian = problem.gaussian()
            global_, local = self._at(gaussian)
            half_log_det = gaussian.precision.log_det() / 2
        found = problem.gradients(global_.detach(), local.detach())
        with torch.enable_grad():
            # What has the gradient of the sum over draws, without the graph of the model's run at any of them.
            pulled = (found.in_global * global_).sum() + (found.in_local * local).sum()
            for parameter, part in zip(problem.model_parameters, found.in_parameters, strict=True):
                pulled = pulled + (part * parameter).sum()
            surrogate = pulled / self.num_draws - half_log_det
        value, error = mean_of_pairs(found.values + self._entropy(gaussian))
        return Evaluation(value, to_vector(self._gradients_of(surrogate)), standard_error=error)

    @torch.no_grad()
    def values(self) -> Tensor:
        """Return the terms whose mean is the value, ``(S,)``, pairs of draws half the number apart."""
        gaussian = self.problem.gaussian()
        global_, local = self._at(gaussian)
        return self.problem.values(global_, local) + self._entropy(gaussian)

    def _at(self, gaussian: LaplaceGaussian) -> tuple[Tensor, Tensor]:
        """Return globals ``(S, d)`` and units ``(S, N, k)`` of all draws."""
        deviation, local_deviation = gaussian.precision.draw(*self.draws)
        return gaussian.global_loc + deviation, gaussian.local_loc + local_deviation

    def _entropy(self, gaussian: LaplaceGaussian) -> Tensor:
        """Return minus the log density of the guide at its draws, ``(S,)``, without a graph."""
        dimension = gaussian.global_loc.numel() + gaussian.local_loc.numel()
        log_det = gaussian.precision.log_det().detach()
        return self.draws.half_squares() + (dimension * math.log(2 * math.pi) - log_det) / 2
