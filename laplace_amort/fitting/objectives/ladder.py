"""An objective that climbs from rung to rung until the next one would change nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import scipy.special
import torch

from laplace_amort.errors import NUMERICAL_ERRORS
from laplace_amort.evidence import against_next, compare_globals
from laplace_amort.fitting.evaluation import Maximum
from laplace_amort.fitting.history import History
from laplace_amort.fitting.objectives.base import Objective
from laplace_amort.fitting.objectives.laplace import MarginalLaplace
from laplace_amort.fitting.objectives.quadrature import MarginalQuadrature
from laplace_amort.fitting.optimizers import Optimizer, QuasiNewton, TrustRegion
from laplace_amort.guide import LaplaceGaussian, Problem
from laplace_amort.posterior import NestedUnits, Posterior
from laplace_amort.units import Laplace, QuadraturePoints, QuadratureRule, UnitIntegrals, matched_normal, unit_moments

__all__ = ["Ladder"]

# Draws by which two rungs are compared, and the share of them that must count.
_DRAWS, _COUNTING = 32, 0.5
# A change in standard deviations, or as a share of one, that no better look at it would make small.
_FAR = 0.3
# Standard deviations, and shares of one, that are not told from none: rounding errors would be.
_NOTHING = 1e-3


class _Move(NamedTuple):
    """By how much the next rung moves the posterior, at most: in posterior standard deviations, and as shares of them.

    :param float mean: means of the globals.
    :param float sd: standard deviations of the globals.
    :param float unit_mean: means of the units.
    :param float unit_sd: standard deviations of the units.
    """

    mean: float
    sd: float
    unit_mean: float
    unit_sd: float

    def within(self, accuracy: float) -> bool:
        """Whether all of it is: of units it may be twice as much."""
        return max(self.mean, self.sd, self.unit_mean / 2, self.unit_sd / 2) <= accuracy

    def __str__(self) -> str:
        return (
            f"means by {_in_sds(self.mean)} and standard deviations by {_in_percent(self.sd)}, those of the units by "
            f"{_in_sds(self.unit_mean)} and {_in_percent(self.unit_sd)}"
        )


def _in_sds(move: float) -> str:
    return f"under {_NOTHING:g} sd" if move < _NOTHING else f"{move:.2g} sd"


def _in_percent(share: float) -> str:
    return f"under {100 * _NOTHING:g} %" if share < _NOTHING else f"{100 * share:.2g} %"


@dataclass(frozen=True)
class Ladder:
    """The marginal density of the globals, units integrated over by as many points as it takes.

    It begins with one point for each unit (:class:`~laplace_amort.MarginalLaplace`) and goes on with grids of 5, 9, 17
    and more along each dimension, or beyond three dimensions with 256 points and more, until the next rung would move
    no mean and no standard deviation by more than the accuracy. The notes of the result tell what it did, and its
    posterior is that of the rung it ended on.

    Do not take it for the whole of a diagnosis: it compares integrals over units around one mode of each.
    :func:`~laplace_amort.diagnose` looks for other modes, and at the globals.

    :param float accuracy: in posterior standard deviations of the globals, and as a share of these; twice that for
        units.
    :param int max_points: of a rule, for each unit; where more would be needed, the fit ends with a note.

    Example::

        >>> import pyro, torch, pyro.distributions as dist
        >>> from laplace_amort import fit
        >>> def model(z):
        ...     mu = pyro.sample("mu", dist.Normal(0., 1.))
        ...     with pyro.plate("units", len(z)):
        ...         y = pyro.sample("y", dist.Normal(mu, 1.))
        ...         pyro.sample("z", dist.Bernoulli(logits=y), obs=z)
        >>> result = fit(model, torch.tensor([0., 1., 1.]))       # objective=Ladder() is the default
        >>> result.notes[0].split(":")[0]
        'Laplace() is enough'
    """

    accuracy: float = 0.02
    max_points: int = 2048

    def __post_init__(self) -> None:
        if not self.accuracy > 0:
            raise ValueError(f"accuracy must be a positive number of standard deviations, got {self.accuracy}")

    @property
    def start_with(self) -> Objective | None:
        """None: the first rung is the start of the others."""
        return None

    @property
    def default_optimizer(self) -> Optimizer:
        """What suits the rungs with points; the first has an optimizer of its own."""
        return QuasiNewton()

    def check(self, problem: Problem) -> None:
        """Refuse what this objective is none for; see :class:`~laplace_amort.fitting.objectives.base.Objective`."""
        MarginalQuadrature().check(problem)

    def climb(self, history: History, optimizer: Optimizer) -> Maximum:
        """Climb from where the guide stands, and put the guide at the optimum of the last rung."""
        k, notes = history.problem.start.shape[1], []
        rung: MarginalLaplace | MarginalQuadrature = MarginalLaplace()
        rule: QuadratureRule = Laplace()
        maximum = rung.climb(history, optimizer if isinstance(optimizer, TrustRegion) else rung.default_optimizer)
        step = None
        while maximum.status.ok:
            finer = rule.finer(k)
            step = _Step(history, rung, maximum, finer)
            move = step.compared()
            if move.within(self.accuracy):
                notes.append(f"{rule} is enough: {finer} would move {move}")
                break
            if len(finer.points(k, history.problem.loc).points) > self.max_points:
                notes.append(f"{rule} is the last rung, although {finer} would move {move}: see diagnose(result)")
                break
            notes.append(f"from {rule} to {finer}, which moves {move}")
            rung, rule = MarginalQuadrature(finer), finer
            maximum = rung.climb(history, optimizer if isinstance(optimizer, QuasiNewton) else rung.default_optimizer)
        return maximum._replace(objective=rung, notes=tuple(notes), posterior=step and step.posterior)

    def gaussian(self, problem: Problem, maximum: Maximum) -> LaplaceGaussian:
        """Return the posterior as a Gaussian, with the curvature of the last rung for the globals."""
        return MarginalLaplace().gaussian(problem, maximum)

    def posterior(self, problem: Problem, gaussian: LaplaceGaussian, seed: int) -> Posterior:
        """Return that of the first rung; the result of a fit has that of the last."""
        return MarginalLaplace().posterior(problem, gaussian, seed)


class _Step:
    """A comparison of two rungs where the guide stands.

    :param History history: the fit.
    :param rung: the rung below.
    :param Maximum maximum: its optimum.
    :param QuadratureRule finer: that of the rung above.

    Attribute ``posterior``: of the rung below, where it took draws of it to tell; None where it did not.
    """

    def __init__(self, history: History, rung: Any, maximum: Maximum, finer: QuadratureRule) -> None:
        self.history, self.rung, self.maximum, self.finer = history, rung, maximum, finer
        self.rule = rung.rule if isinstance(rung, MarginalQuadrature) else Laplace()
        self.posterior: Posterior | None = None

    def compared(self) -> _Move:
        """Compare; what is kept for a fit that goes on are numbers."""
        return _Move(*self.history.timed(f"{self.rule} against {self.finer}", lambda: tuple(self._move())))

    @torch.no_grad()
    def _move(self) -> _Move:
        problem = self.history.problem
        try:
            gaussian = MarginalLaplace().gaussian(problem, self.maximum)
            of_globals = _moved_near_normal(problem.integrals, gaussian, self.rule, self.finer)
            of_globals = of_globals or self._moved_by_its_own_draws(gaussian)
            return _Move(*of_globals, *_units_moved(problem, gaussian, self.rule, self.finer))
        except NUMERICAL_ERRORS:
            return _Move(*[numpy.inf] * 4)

    def _moved_by_its_own_draws(self, gaussian: LaplaceGaussian) -> tuple[float, float]:
        """Return the changes of the globals by draws of the marginal density itself, as the posterior has them."""
        self.posterior = self.rung.posterior(self.history.problem, gaussian, self.history.seed)
        found = compare_globals(*against_next(self.posterior, self.rule, 0, self.finer))
        return found.mean, found.sd


def _moved_near_normal(
    integrals: UnitIntegrals, gaussian: LaplaceGaussian, rule: QuadratureRule, finer: QuadratureRule
) -> tuple[float, float] | None:
    """Return the largest changes of means and standard deviations of the globals, by the same draws for both rules.

    None where few of these draws count: they are those of a normal distribution, and the density is not near one. That
    few count by the finer rule alone says that it is another density, and as far off as it seems, or farther.
    """
    d = len(gaussian.global_loc)
    if d == 0:
        return 0.0, 0.0
    z = matched_normal(max(_DRAWS, 8 * d), d, seed=0)
    draws = gaussian.global_loc + torch.from_numpy(z).to(gaussian.global_loc) @ gaussian.precision.global_scale_tril.mT
    start = NestedUnits(gaussian, integrals).start(draws)
    moments, counting = [], []
    for one in (rule, finer):
        points = one.points(gaussian.local_loc.shape[1], draws)
        exact = integrals if isinstance(one, Laplace) else integrals.loose()
        values = exact.values(points, QuadraturePoints.log_integral, draws, start).values
        log_ratios = values.nan_to_num(nan=-torch.inf).double().cpu().numpy() + (z**2).sum(-1) / 2
        weights = numpy.exp(log_ratios - scipy.special.logsumexp(log_ratios))
        counting.append(1 / (weights**2).sum() >= _COUNTING * len(z))
        if not counting[0]:
            return None
        mean = weights @ z
        moments.append((mean, numpy.sqrt(weights @ (z - mean) ** 2)))
    (mean, sd), (true_mean, true_sd) = moments
    moves = float((numpy.abs(mean - true_mean) / true_sd).max()), float(numpy.abs(sd / true_sd - 1).max())
    return moves if counting[1] or max(moves) > _FAR else None


def _units_moved(
    problem: Problem, gaussian: LaplaceGaussian, rule: QuadratureRule, finer: QuadratureRule
) -> tuple[float, float]:
    """The largest changes of conditional means and standard deviations of the units, at the center of the globals."""
    there = problem.integrals.conditionals(gaussian.global_loc[None], gaussian.local_loc[None])
    after = unit_moments(problem.integrals, there, gaussian.global_loc, finer)
    mean, sd = torch.zeros_like(after.mean), torch.ones_like(after.sd)  # of one point, for a normal unit
    if not isinstance(rule, Laplace):
        mean, sd, _ = unit_moments(problem.integrals, there, gaussian.global_loc, rule)
    return float(((mean - after.mean) / after.sd).abs().max()), float((sd / after.sd - 1).abs().max())
