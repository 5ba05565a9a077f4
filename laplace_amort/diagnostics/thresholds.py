"""What counts as good, doubtful and bad in each check of a diagnosis."""

from __future__ import annotations

from typing import NamedTuple

import numpy

from laplace_amort.diagnostics.consistency import Consistency
from laplace_amort.diagnostics.findings import Level
from laplace_amort.evidence import Comparison
from laplace_amort.posterior import K_GOOD, ImportanceSample

__all__ = [
    "CONVERGED",
    "GLOBALS",
    "OTHER_MODE",
    "REPAIRED",
    "SCORES",
    "SKEWNESS",
    "UNITS",
    "UNIT_TAILS",
    "WEIGHTED_TAILS",
    "WEIGHTS",
    "Accuracy",
    "Bounds",
    "Scores",
    "Weights",
]


class Bounds(NamedTuple):
    """Up to which size a number is good, and above which it is bad; in between it is doubtful.

    Example::

        >>> [str(Bounds(0.1, 0.3).level(value)) for value in (0.1, 0.2, 0.4, float("nan"))]
        ['good', 'doubtful', 'bad', 'bad']
    """

    good: float
    bad: float

    def level(self, value: float) -> Level:
        """Return how bad a number is; one that is NaN is bad."""
        if not value <= self.bad:
            return Level.BAD
        return Level.GOOD if value <= self.good else Level.DOUBTFUL

    def beyond(self, margin: float) -> Bounds:
        """Return bounds that are larger by a margin."""
        return Bounds(self.good + margin, self.bad + margin)


class Accuracy(NamedTuple):
    """How far moments may be from those of the next rung.

    :param Bounds mean: in posterior standard deviations.
    :param Bounds sd: of standard deviations, as a share.
    """

    mean: Bounds
    sd: Bounds

    def level(self, found: Comparison) -> Level:
        """Return how bad the worse of both is."""
        return max(self.mean.level(found.mean), self.sd.level(found.sd))

    def beyond(self, margin: float) -> Accuracy:
        """Return bounds that are larger by a margin."""
        return Accuracy(self.mean.beyond(margin), self.sd.beyond(margin))


class Weights(NamedTuple):
    """What importance weights must be like for a sample to be relied on.

    :param Bounds k_hat: shape of their tail.
    :param Bounds error: of the moments, by sampling, in posterior standard deviations.
    """

    k_hat: Bounds
    error: Bounds

    def level(self, found: ImportanceSample) -> Level:
        """Return how bad the worse of both is."""
        return max(self.k_hat.level(found.k_hat), self.error.level(found.error))


class Scores(NamedTuple):
    """When scores of simulated data speak against a density.

    :param float p_value: below which they are not zero on average.
    :param Bounds bias: of the globals, if so, in posterior standard deviations.
    """

    p_value: float
    bias: Bounds

    def level(self, found: Consistency) -> Level:
        """Return how bad the largest bias is, if there is one."""
        return self.bias.level(float(numpy.abs(found.bias).max())) if found.p_value < self.p_value else Level.GOOD


# Newton decrement, in posterior standard deviations.
CONVERGED = Bounds(0.05, 0.05)
# Change of a precision, or share of the units that have one, if any was repaired.
REPAIRED = Bounds(0.0, 0.05)
WEIGHTS = Weights(k_hat=Bounds(K_GOOD, K_GOOD), error=Bounds(0.05, 0.15))
GLOBALS = Accuracy(mean=Bounds(0.05, 0.2), sd=Bounds(0.03, 0.15))
UNITS = Accuracy(mean=Bounds(0.1, 0.3), sd=Bounds(0.05, 0.2))
SKEWNESS = Bounds(1.0, 2.5)
# k-hat of units: normal draws do not reach far into their tails, and find it smaller than it is.
UNIT_TAILS = Bounds(0.5, K_GOOD)
# The same for a rung whose points are weighted by the density itself.
WEIGHTED_TAILS = Bounds(K_GOOD, K_GOOD)
# Share of a unit's mass at another mode.
OTHER_MODE = Bounds(0.01, 0.05)
SCORES = Scores(p_value=1e-3, bias=Bounds(0.1, 0.4))
