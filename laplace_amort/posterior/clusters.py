"""A proposal of importance sampling for a density of several parts: t distributions, each fitted to some of the draws.

A posterior that bends, as those of two scales of which either explains the data, is nowhere near one distribution with
axes: a mixture follows it around the bend.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import scipy.special

from laplace_amort.posterior.proposals import DF
from laplace_amort.types import Vector
from laplace_amort.units import sobol_points, student_log_density, student_points

__all__ = ["SeveralT", "clustered"]

# Parts at most, and effective draws for each dimension of a part.
_MOST, _EACH = 6, 10
_STEPS = 20  # of the EM algorithm
# Draws that a part has beside its own, spread as all are but for this variance: its covariance is never singular.
_MORE, _VARIANCE = 10.0, 0.2
_WIDER = 1.05
# Shares of the draws that are around all parts, and how far, so that nothing is lost that the parts leave out.
_AROUND, _FAR = (0.15, 0.1), (1.5, 3.0)


@dataclass(frozen=True)
class SeveralT:
    """A mixture of multivariate t distributions.

    :param Vector shares: of the parts, ``(M,)``, that sum to one.
    :param Vector locs: ``(M, d)``.
    :param Vector trils: lower triangular, ``(M, d, d)``.
    """

    shares: Vector
    locs: Vector
    trils: Vector

    def draw(self, number: int, seed: int) -> Vector:
        """Quasi-random draws, ``(S, d)``."""
        d = self.locs.shape[1]
        uniform = sobol_points(number, d + (d > 1) + 1, seed)
        part = numpy.searchsorted(self.shares.cumsum(), uniform[:, -1]).clip(max=len(self.shares) - 1)
        z = student_points(uniform[:, :-1], DF)
        draws: Vector = self.locs[part] + (self.trils[part] @ z[..., None])[..., 0]
        return draws

    def log_density(self, draws: Vector) -> Vector:
        """At draws ``(S, d)``, as ``(S,)``."""
        parts = []
        for share, loc, tril in zip(self.shares, self.locs, self.trils, strict=True):
            z = numpy.linalg.solve(tril, (draws - loc).T).T
            parts.append(numpy.log(share) + student_log_density(z, DF) - numpy.log(numpy.diag(tril)).sum())
        log_density: Vector = scipy.special.logsumexp(parts, axis=0)
        return log_density


def clustered(draws: Vector, weights: Vector, loc: Vector, tril: Vector) -> SeveralT:
    """Return a mixture fitted to weighted draws by the EM algorithm, of more parts the more draws count.

    Two more parts lie around all of them.

    :param Vector draws: ``(S, d)``.
    :param Vector weights: that sum to one, ``(S,)``.
    :param Vector loc: mean of the draws, ``(d,)``.
    :param Vector tril: lower triangular, about a root of their covariance, ``(d, d)``: parts are looked for in these
        coordinates.
    """
    d, effective = len(loc), 1 / (weights**2).sum()
    number = int(min(max(effective / (_EACH * d), 1), _MOST))
    z = numpy.linalg.solve(tril, (draws - loc).T).T
    chosen = numpy.random.default_rng(0).choice(len(z), size=number, p=weights)
    centers, covs, shares = z[chosen], numpy.tile(0.3 * numpy.eye(d), (number, 1, 1)), numpy.full(number, 1 / number)
    for _ in range(_STEPS):
        off = z[:, None] - centers
        square = numpy.einsum("smi,mij,smj->sm", off, numpy.linalg.inv(covs), off)
        level = numpy.log(shares) - square / 2 - numpy.linalg.slogdet(covs)[1] / 2
        member = effective * weights[:, None] * numpy.exp(level - scipy.special.logsumexp(level, axis=1, keepdims=True))
        size = member.sum(0) + 1e-3
        centers = member.T @ z / size[:, None]
        off = z[:, None] - centers
        spread = numpy.einsum("sm,smi,smj->mij", member, off, off) + _MORE * _VARIANCE * numpy.eye(d)
        covs, shares = spread / (size + _MORE)[:, None, None], size / size.sum()
    locs, trils = loc + centers @ tril.T, tril @ numpy.linalg.cholesky(_WIDER * covs)
    around = numpy.array(_AROUND)
    return SeveralT(
        numpy.concatenate([shares * (1 - around.sum()), around]),
        numpy.concatenate([locs, numpy.tile(loc, (len(around), 1))]),
        numpy.concatenate([trils, numpy.array(_FAR)[:, None, None] * tril]),
    )
