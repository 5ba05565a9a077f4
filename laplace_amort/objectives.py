"""What a fit maximizes, and how it goes about it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy

from laplace_amort.bound import BoundELBO, BoundMarginal
from laplace_amort.coordinates import Coordinates
from laplace_amort.evaluation import Evaluation, Maximum
from laplace_amort.family import LaplaceGaussian
from laplace_amort.fit_status import FitStatus
from laplace_amort.heads import Head, KnownCurvature, MarginalCurvature
from laplace_amort.identification import is_flat
from laplace_amort.optimizers import Optimizer, QuasiNewton, TrustRegion, newton_decrement
from laplace_amort.posterior import Posterior, gaussian_sample, marginal_sample
from laplace_amort.rules import Laplace
from laplace_amort.run import CHECK, Run
from laplace_amort.target import Target
from laplace_amort.unit_draws import LinearUnits, NestedUnits

__all__ = ["FixedDrawELBO", "MarginalLaplace", "Objective"]

# Times max_draws that the noise on few draws may call for before more are not even tried.
_HOPELESS = 100
# Times the draws of one round that the next may have.
_GROWTH = 16
# Standard errors by which the value at the optimum and that on fresh draws may differ.
_AGREE = 3


@runtime_checkable
class Objective(Protocol):
    """What a fit maximizes; any object with these."""

    @property
    def start_with(self) -> Objective | None:
        """An objective whose optimum is the start; None for none."""

    @property
    def default_optimizer(self) -> Optimizer:
        """What suits it."""

    def check(self, target: Target) -> None:
        """Refuse a model that this is no objective for.

        :raises ModelError: naming what is in the way.
        """

    def gaussian(self, target: Target, maximum: Maximum) -> LaplaceGaussian:
        """Return the posterior where the guide stands, as a Gaussian."""

    def posterior(self, target: Target, gaussian: LaplaceGaussian, seed: int) -> Posterior:
        """Return the posterior for use, as good as this objective knows it.

        :param Target target: the model at its data.
        :param LaplaceGaussian gaussian: what :meth:`gaussian` returned.
        :param int seed: of draws.
        """

    def climb(self, run: Run, optimizer: Optimizer) -> Maximum:
        """Maximize from where the guide stands, and put the guide there."""


@dataclass(frozen=True)
class MarginalLaplace:
    r"""The Laplace approximation to the marginal density of the globals: what TMB maximizes.

    .. math:: \log p(\theta, \hat y(\theta), z) - \tfrac12 \sum_i \log|U_i| + \tfrac{N k}{2} \log 2\pi,

    a function of the globals alone, with exact gradient and Hessian through the mode. Its optimum is the posterior mode
    of the globals in unconstrained space, to Laplace order, and its curvature there gives their standard errors and, by
    the delta method, those of the units.

    Do not use it where a unit says little and units are many: its bias does not fall with their number, while the
    standard errors do. And do not compare its value with an ELBO, or with that of another parameterization.

    Reference: Kristensen et al. (2016), *TMB: Automatic Differentiation and Laplace Approximation*, Journal of
    Statistical Software 70(5), https://doi.org/10.18637/jss.v070.i05
    """

    @property
    def start_with(self) -> Objective | None:
        """None: this is what others start with."""
        return None

    def check(self, target: Target) -> None:
        """Refuse a model with parameters of its own, which this does not move."""
        target.refuse_model_parameters()

    def gaussian(self, target: Target, maximum: Maximum) -> LaplaceGaussian:
        """Return the posterior as a Gaussian, with the curvature of this objective for the globals."""
        information = maximum.evaluation.information
        head: Head = MarginalCurvature() if information is None else KnownCurvature(information)
        return target.guide.gaussian_of(target.unit_model, mode=target.mode, head=head)

    def posterior(self, target: Target, gaussian: LaplaceGaussian, seed: int) -> Posterior:
        """Return the globals by importance sampling of this density, and the units as normal given each of them."""
        globals_ = marginal_sample(target.integrals, Laplace(), gaussian, seed)
        return Posterior(gaussian, globals_, NestedUnits(gaussian, target.integrals), seed)

    def bind(self, target: Target) -> BoundMarginal:
        """Return the objective for a guide and its data."""
        return BoundMarginal(target)

    @property
    def default_optimizer(self) -> Optimizer:
        """What suits it: Newton's method."""
        return TrustRegion()

    def climb(self, run: Run, optimizer: Optimizer) -> Maximum:
        """Maximize from where the guide stands, and put the guide there."""
        bound = self.bind(run.target)
        function = run.function("marginal Laplace", bound, newton_decrement)
        start = bound.point()

        def coordinates() -> Coordinates:
            information = function(start).information
            return Coordinates.of_information(numpy.eye(len(start)) if information is None else information)

        maximum = optimizer.maximize(function, start, coordinates)
        bound.move(maximum.point)
        return maximum


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

    def check(self, target: Target) -> None:
        """Refuse nothing: the ELBO is one of every model that a guide takes."""

    def gaussian(self, target: Target, maximum: Maximum) -> LaplaceGaussian:
        """Return the guide."""
        return target.guide.gaussian_of(target.unit_model)

    def posterior(self, target: Target, gaussian: LaplaceGaussian, seed: int) -> Posterior:
        """Return the guide itself."""
        return Posterior(gaussian, gaussian_sample(gaussian, seed), LinearUnits(gaussian), seed)

    def bind(self, target: Target, num_draws: int, seed: int) -> BoundELBO:
        """Return the objective for a guide, its data, and as many draws."""
        return BoundELBO(target, num_draws, seed)

    @property
    def default_optimizer(self) -> Optimizer:
        """What suits it: there is no second derivative."""
        return QuasiNewton()

    def climb(self, run: Run, optimizer: Optimizer) -> Maximum:
        """Maximize from where the guide stands, with as many draws as it takes, and put the guide there."""
        return _unless_flat(run, self._climb(run, optimizer))

    def _climb(self, run: Run, optimizer: Optimizer) -> Maximum:
        num_draws, seed = self.num_draws, run.seed
        while True:
            # Draws of every round are others, so that nothing is an optimum by chance twice.
            bound, fresh = self.bind(run.target, num_draws, seed), self.bind(run.target, num_draws, seed + 1)
            coordinates = run.timed("coordinates", bound.coordinates)
            norm = _norm_in(coordinates)
            maximum = optimizer.maximize(run.function("ELBO", bound, norm), bound.point(), _always(coordinates))
            bound.move(maximum.point)
            if not maximum.status.ok or not len(maximum.point):
                return maximum
            check = run.function(CHECK, fresh, norm)(maximum.point)
            needed = self._needed(num_draws, maximum.evaluation, check, coordinates)
            if needed <= num_draws:
                return maximum
            if num_draws >= self.max_draws or needed > _HOPELESS * self.max_draws:
                return maximum._replace(status=FitStatus.TOO_FEW_DRAWS)
            num_draws = min(self.max_draws, max(2 * num_draws, min(needed, _GROWTH * num_draws)))
            seed += 2

    def _needed(self, num_draws: int, found: Evaluation, fresh: Evaluation, coordinates: Coordinates) -> int:
        """How many draws it seems to take: the square of a shift falls with their number."""
        if fresh.value == -math.inf:
            return 2 * num_draws
        pull, d = coordinates.pull(fresh.gradient), coordinates.precision.global_dim
        # The gradient at the optimum of some draws on others has the noise of both.
        shift = max(float((part**2).mean() / 2) ** 0.5 for part in (pull[:d], pull[d:]) if len(part))
        error = math.hypot(found.standard_error, fresh.standard_error)
        if shift <= self.accuracy and abs(found.value - fresh.value) <= _AGREE * error:
            return num_draws
        return max(num_draws + 2, 2 * math.ceil(num_draws / 2 * (shift / self.accuracy) ** 2))


def _unless_flat(run: Run, maximum: Maximum) -> Maximum:
    """Say so where the globals are not identified: a search that sees gradients only takes a plain for a top."""
    d = len(run.target.loc)
    if not d or maximum.status is FitStatus.START_FAILED:
        return maximum
    # The ELBO is flat where the log density is, of which the marginal density has the second derivative at hand.
    found: Evaluation = run.timed("curvature", lambda: BoundMarginal(run.target)(maximum.point[:d]))
    if found.information is None or not is_flat(found.information, found.rounding):
        return maximum
    evaluation = maximum.evaluation._replace(information=found.information)
    return maximum._replace(evaluation=evaluation, status=FitStatus.NO_MAXIMUM)


def _norm_in(coordinates: Coordinates) -> Callable[[Evaluation], float]:
    return lambda found: coordinates.norm(found.gradient)


def _always(coordinates: Coordinates) -> Callable[[], Coordinates]:
    return lambda: coordinates
