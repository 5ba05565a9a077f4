r"""Importance sampling of a few variables whose log density is known up to a constant.

The first proposal is normal around the mode, with draws that have its mean and covariance exactly: where the density is
near that, a hundred are enough. Where it is not, there follow a Student-t distribution whose two halves along each axis
have scales of their own, as the density falls off there (Geweke's split t), and mixtures that are fitted to what was
found; every draw counts with the density of all proposals. Draws are quasi-random, and parts of their sequence, each of
them a balanced set, tell how large the error is at most. Mass that no draw fell on shows in no weight: before all is
said to be well, a few draws look further around.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy
import scipy.special

from laplace_amort.posterior.clusters import SeveralT, clustered
from laplace_amort.posterior.proposals import Normal, SplitT, split_along_axes
from laplace_amort.posterior.psis import K_GOOD, pareto_smoothed
from laplace_amort.posterior.weighted import SETS, ImportanceSample, error_of_moments
from laplace_amort.types import Vector

__all__ = ["ImportanceSampler"]

# Share of the draws that their effective number must be, and shape of the tail, for no other proposal to be made.
_KEPT, _K_KEPT = 0.3, 0.4
# Shape of the tail to aim at: the weights have a variance.
_K_AIM = 0.5
# The share for a normal proposal to do by itself: its tails hide from the error and from k-hat what they leave out.
_NEAR_NORMAL = 0.95
# Draws of the first round for each dimension.
_EACH = 24
# More draws than the error asks for, as it is not known well.
_SPARE = 1.25
# How much wider than what was found a last look around is, and its draws at least.
_WIDE, _LEAST_WIDE = 2.5, 128
# The same where all seems normal: how many draws, from a seed of their own; how far above the proposal the density is
# where that has left something out, as a logarithm; and how much of the mass may be.
_FEW_WIDE, _OTHER_SEED, _BEYOND, _HIDDEN = 64, 500, 2.5, 0.003
_SINGULAR = "the draws do not spread in every direction, so proposals kept the scales of the curvature"


@dataclass
class _Mixture:
    """The proposals so far, with what was found at their draws; one of each for each round."""

    proposals: list[Normal | SplitT | SeveralT] = field(default_factory=list)
    draws: list[Vector] = field(default_factory=list)
    values: list[Vector] = field(default_factory=list)

    @property
    def is_normal(self) -> bool:
        """Whether no proposal was a t."""
        return all(isinstance(proposal, Normal) for proposal in self.proposals)

    def extended(
        self, proposal: Normal | SplitT | SeveralT, log_density: Callable[[Vector], Vector], number: int, seed: int
    ) -> ImportanceSample:
        """Draw from one more proposal, and return all draws, weighed."""
        draws = proposal.draw(number, seed + 1000 * len(self.draws))
        self.proposals.append(proposal)
        self.draws.append(draws)
        self.values.append(log_density(draws))
        return self.sample()

    def log_density(self, draws: Vector) -> Vector:
        """Return the log density of the mixture, each proposal with the weight of its draws."""
        pairs = zip(self.proposals, self.draws, strict=True)
        parts = [proposal.log_density(draws) + math.log(len(own)) for proposal, own in pairs]
        total: Vector = scipy.special.logsumexp(parts, axis=0) - math.log(sum(len(own) for own in self.draws))
        return total

    def sample(self) -> ImportanceSample:
        """Weigh all draws."""
        draws, values = numpy.concatenate(self.draws), numpy.concatenate(self.values)
        lost = numpy.isnan(values)
        log_ratios = numpy.where(lost, -numpy.inf, values - self.log_density(draws))
        if not numpy.isfinite(log_ratios.max()):
            nothing = numpy.full(len(draws), -math.log(len(draws)))
            return ImportanceSample(draws, nothing, math.inf, 0.0, math.inf, -math.inf, int(lost.sum()))
        smoothed = pareto_smoothed(log_ratios)
        weights = numpy.exp(smoothed.log_weights)
        found = ImportanceSample(
            draws=draws,
            log_weights=smoothed.log_weights,
            k_hat=float(smoothed.k_hat),
            effective=float(1 / (weights**2).sum()),
            error=0.0,
            log_integral=float(scipy.special.logsumexp(log_ratios) - math.log(len(draws))),
            num_lost=int(lost.sum()),
            # Parts of the sequence of each round, the same part of all.
            sets=numpy.concatenate([numpy.arange(len(own)) * SETS // len(own) for own in self.draws]),
            # Equal weights pull nothing where the draws have the moments of their proposal.
            known=1 / len(draws) if self.is_normal else 0.0,
        )
        return replace(found, error=error_of_moments(found, weights - found.known, found.sets))


@dataclass(frozen=True)
class ImportanceSampler:
    """Draws from a density with as many evaluations as its shape and the accuracy ask for.

    Do not use it for a density whose mass lies far from the start, or in more than some twenty dimensions: the shape of
    the tail of the weights tells.

    :param float accuracy: error of means, in standard deviations, and of standard deviations, as shares, to aim at.
    :param int num_draws: of the first round.
    :param int max_draws: of all rounds.
    :param int seed: of the draws.

    Example: a normal distribution, from a start that is too wide::

        >>> sampler = ImportanceSampler(seed=1)
        >>> found = sampler(lambda x: -(x ** 2).sum(-1) / 2, numpy.ones(2), 2 * numpy.eye(2))
        >>> found.k_hat < 0.7, bool(abs(found.mean()).max() < 0.1)
        (True, True)

    Reference: Cornuet, Marin, Mira & Robert (2012), *Adaptive multiple importance sampling*, Scandinavian Journal of
    Statistics 39(4), https://arxiv.org/abs/0907.1254
    """

    accuracy: float = 1 / 30
    num_draws: int = 128
    max_draws: int = 8192
    seed: int = 0

    def __call__(
        self,
        log_density: Callable[[Vector], Vector],
        loc: Vector,
        scale_tril: Vector,
        rough: Callable[[Vector], Vector] | None = None,
    ) -> ImportanceSample:
        """Draw, and weigh.

        :param log_density: of draws ``(S, d)``; returns ``(S,)``, NaN where it does not exist.
        :param Vector loc: ``(d,)``, near the mode.
        :param Vector scale_tril: lower triangular, ``(d, d)``: the scale there.
        :param rough: about the same density, to look at along the axes; by default the density itself.
        """
        if len(loc) == 0:
            value = float(log_density(numpy.zeros((1, 0)))[0])
            return ImportanceSample(numpy.zeros((1, 0)), numpy.zeros(1), -math.inf, 1.0, 0.0, value, 0)
        mixture, note = _Mixture(), ""
        number = min(self.max_draws, max(self.num_draws, 2 ** math.ceil(math.log2(_EACH * len(loc)))))
        found = mixture.extended(Normal(loc, scale_tril), log_density, number, self.seed)
        # Of weights that are nearly the same the tail has a shape too, and a better one is none of theirs.
        near_normal = found.effective >= _NEAR_NORMAL * number and found.error <= self.accuracy
        near_normal = near_normal and found.k_hat < K_GOOD
        if number >= self.max_draws or (near_normal and not self._hides(found, mixture, log_density, scale_tril)):
            return found
        first = split_along_axes(rough or log_density, loc, scale_tril)
        proposal: Normal | SplitT | SeveralT = first
        while True:
            number = min(self._missing(found), self.max_draws - len(found.draws))
            found = mixture.extended(proposal, log_density, number, self.seed)
            hidden = 0.0
            if self._suffices(found) and len(found.draws) < self.max_draws:  # one more look, further around
                before, tril = found, _spread(found, scale_tril)[0]
                number = min(
                    max(_LEAST_WIDE, 1 << (len(found.draws) // 8).bit_length()), self.max_draws - len(found.draws)
                )
                found = mixture.extended(_wide(found.mean(), tril), log_density, number, self.seed)
                hidden = _moved(before, found)
                if self._suffices(found) and hidden <= self.accuracy:
                    return replace(found, note=note)
            if len(found.draws) >= self.max_draws:
                return replace(found, note=note)
            fits = found.effective >= _KEPT * len(found.draws) and found.k_hat <= _K_KEPT and hidden <= self.accuracy
            known = found.effective > 2 * len(loc)
            if (fits and proposal is first) or not known:
                proposal = first
            else:
                tril, said = _spread(found, scale_tril)
                note = note or said
                proposal = clustered(found.draws, found.weights, found.mean(), tril)

    def for_as_many(self, found: ImportanceSample, effective: float) -> ImportanceSampler:
        """Return the same for about so many effective draws, of a density of which some are at hand.

        :param ImportanceSample found: what this sampler found of it.
        :param float effective: number of draws that are wanted, as good as equal ones.
        """
        number = min(self.max_draws, math.ceil(effective * len(found.draws) / max(found.effective, 1.0)))
        if found.effective >= _NEAR_NORMAL * len(found.draws):  # one round does
            return replace(self, num_draws=1 << (number - 1).bit_length())
        first = 1 << ((number + 1) // 2 - 1).bit_length()
        return replace(self, accuracy=0.0, num_draws=first, max_draws=2 * first)

    def _hides(
        self, found: ImportanceSample, mixture: _Mixture, log_density: Callable[[Vector], Vector], tril: Vector
    ) -> bool:
        """Whether there is mass where a normal proposal has none, as far as a few draws from a wide one tell.

        Such draws are no part of the sample, whose own have the very moments of their proposal.
        """
        wide = _wide(found.mean(), tril)
        draws = wide.draw(_FEW_WIDE, self.seed + _OTHER_SEED)
        values = log_density(draws) - found.log_integral
        beyond = values > mixture.log_density(draws) + _BEYOND
        mass = numpy.exp(values[beyond] - wide.log_density(draws[beyond])).sum() / _FEW_WIDE
        return bool(mass > _HIDDEN)

    def _missing(self, found: ImportanceSample) -> int:
        """How many draws more it should take, a power of two, of which parts are balanced sets.

        As many as there are at most, as the next proposal may be better.
        """
        most = wanted = len(found.draws)
        if found.k_hat < K_GOOD and self.accuracy:
            share = _SPARE * ((found.error / self.accuracy) ** 2 - 1)
            wanted = math.ceil(most * min(max(share, 0.25), 1.0))
        return min(1 << (wanted - 1).bit_length(), 1 << (most.bit_length() - 1))

    def _suffices(self, found: ImportanceSample) -> bool:
        return found.error <= self.accuracy and found.k_hat < _K_AIM


def _spread(found: ImportanceSample, scale_tril: Vector) -> tuple[Vector, str]:
    """The factor of the covariance of what was found, in no direction narrower than a tenth of a scale, and a note."""
    try:
        return numpy.asarray(
            numpy.linalg.cholesky(found.covariance() + 0.01 * scale_tril @ scale_tril.T), dtype=float
        ), ""
    except numpy.linalg.LinAlgError:  # as of globals that are not identified: all draws are on a line
        return scale_tril, _SINGULAR


def _wide(mean: Vector, tril: Vector) -> SplitT:
    """A proposal wider than all that was found: mass that no draw fell on shows in no weight."""
    return SplitT(mean, _WIDE * tril, numpy.ones((2, len(mean))))


def _moved(before: ImportanceSample, after: ImportanceSample) -> float:
    """By how much more draws moved a mean, in standard deviations, or a standard deviation, as a share."""
    was, sd = (numpy.sqrt(numpy.diag(one.covariance())) for one in (before, after))
    return float(max((numpy.abs(after.mean() - before.mean()) / sd).max(), numpy.abs(was / sd - 1).max()))
