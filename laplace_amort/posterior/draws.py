"""Weighted draws of the globals of a fit, and for each of them the units: draws and moments of every site."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import numpy
import torch
from torch import Tensor

from laplace_amort.guide import LaplaceGaussian, Problem
from laplace_amort.posterior.importance import ImportanceSampler
from laplace_amort.posterior.known import distinct_rows
from laplace_amort.posterior.marginal import marginal_sample
from laplace_amort.posterior.quantiles import check_probabilities, quantiles_of_draws
from laplace_amort.posterior.unit_draws import NestedUnits, UnitPosterior
from laplace_amort.posterior.weighted import ImportanceSample, normal_sample
from laplace_amort.types import Vector, to_numpy

__all__ = ["DRAWS", "PosteriorDraws", "gaussian_sample"]

# Draws for quantiles.
DRAWS = 4000
# Draws of the globals that units are averaged over: of units in all about so many, within bounds.
_AVERAGED, _LEAST, _MOST_AVERAGED = 2**17, 256, 512
# Draws for each weight that is calibrated, at least.
_EACH = 4
# Draws at the same globals that share what the units are drawn from, at most.
_SHARED = 16
# Draws of the globals at most, when more are asked for.
_MOST = 8192


@dataclass(frozen=True)
class PosteriorDraws:
    """Draws and moments of a posterior: what :class:`~laplace_amort.Posterior` has before it is put to use.

    The parameters are those of :class:`~laplace_amort.Posterior`.
    """

    problem: Problem = field(repr=False)
    gaussian: LaplaceGaussian
    globals_: ImportanceSample
    units: UnitPosterior
    seed: int = 0
    averaged: int | None = None
    fitted: PosteriorDraws | None = field(default=None, repr=False)

    def thinned(self, averaged: int | None) -> Self:
        """Return the same with fewer draws of the globals to average the units over."""
        return dataclasses.replace(self, averaged=averaged)

    @property
    def k_hat(self) -> float:
        """Shape of the tail of the importance weights of the globals; minus infinity where none were needed."""
        return self.globals_.k_hat

    @property
    def log_evidence(self) -> float:
        """Log marginal likelihood of the data, to the accuracy of the integrals over units; NaN without any."""
        return self.globals_.log_integral

    @torch.no_grad()
    def sample_latents(self, num_samples: int, seed: int | None = None) -> dict[str, Tensor]:
        """Draw the latents from the posterior.

        :param int num_samples: number of draws.
        :param int seed: of these draws; another one gives others.
        :return: constrained values ``(num_samples, *shape)`` by site.

        Values of the globals repeat where there are more draws than weighted ones, or where weights are unequal; see
        :meth:`refined`.
        """
        places, globals_, locals_ = zip(*self._drawn(num_samples, seed), strict=True)
        parts = [self.gaussian.constrained(*some) for some in zip(globals_, locals_, strict=True)]
        order = torch.cat(places).argsort()
        return self.problem.rounded({name: torch.cat([part[name] for part in parts])[order] for name in parts[0]})

    @torch.no_grad()
    def sample_unconstrained(self, num_samples: int, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Draw from the posterior, the same draws as :meth:`sample_latents`, in the coordinates of the fit.

        :param int num_samples: number of draws.
        :param int seed: of these draws.
        :return: globals ``(num_samples, d)`` and units ``(num_samples, N, k)``.
        """
        places, globals_, locals_ = map(torch.cat, zip(*self._drawn(num_samples, seed), strict=True))
        order = places.argsort()
        return globals_[order], locals_[order]

    def refined(self, num_samples: int) -> Self:
        """Return the same with enough draws of the globals for so many samples, so that few repeat.

        It takes one value of the marginal density for each draw of the globals, 8192 at most. Do not use it for moments
        and quantiles: these are as good without.

        :param int num_samples: number of draws that are wanted.
        """
        if self.fitted is not None:
            fitted = self.fitted.refined(num_samples)
            return dataclasses.replace(self, globals_=fitted.globals_, fitted=fitted)
        found = self.globals_
        if found.effective >= num_samples or not self.gaussian.unit_model.layout.global_dim:
            return self
        if found.k_hat == -math.inf and math.isnan(found.log_integral):  # of a Gaussian as it is
            number = 2 ** math.ceil(math.log2(num_samples))
            return dataclasses.replace(self, globals_=gaussian_sample(self.gaussian, self.seed, number))
        if not isinstance(self.units, NestedUnits):
            return self
        sampler = ImportanceSampler().for_as_many(found, min(num_samples, _MOST))
        return dataclasses.replace(self, globals_=marginal_sample(self.units, self.seed, sampler))

    def part(self, num_draws: int) -> Self:
        """Return the same with fewer draws of the globals, of equal weights.

        :param int num_draws: of the globals.
        """
        generator = torch.Generator().manual_seed(self.seed)
        draws = to_numpy(self._resampled(num_draws, generator))
        equal = numpy.full(num_draws, -math.log(num_draws))
        globals_ = dataclasses.replace(self.globals_, draws=draws, log_weights=equal, sets=None, known=0.0)
        return dataclasses.replace(self, globals_=globals_, averaged=num_draws)

    def mean(self) -> dict[str, Tensor]:
        """Return the means, by site: weighted averages over globals, and over units by quadrature."""
        return self.problem.rounded(self.moments[0])

    def std(self) -> dict[str, Tensor]:
        """Return the standard deviations, by site; see :meth:`mean`."""
        return self.problem.rounded(self.moments[1])

    def quantiles(self, quantiles: Sequence[float], num_samples: int = DRAWS) -> dict[str, Tensor]:
        """Return quantiles ``(Q, *shape)`` by site, of draws.

        :param quantiles: between 0 and 1.
        :param int num_samples: number of draws.
        :raises ValueError: if one is not.
        """
        check_probabilities(quantiles)
        draws = self.sample_latents(num_samples)
        return {name: quantiles_of_draws(value, quantiles) for name, value in draws.items()}

    def unit_axis(self, name: str) -> int:
        """Return which axis of the constrained value of a local site holds the units."""
        return self.gaussian.unit_model.unit_axis(name)

    def weighted_globals(self) -> tuple[Tensor, Tensor]:
        """Return the draws of the globals, ``(S, d)``, and their weights, ``(S,)``."""
        loc = self.gaussian.global_loc
        return torch.from_numpy(self.globals_.draws).to(loc), torch.from_numpy(self.globals_.weights).to(loc)

    def some_globals(self, number: int) -> tuple[Tensor, Vector]:
        """Return so many draws of the globals at most, ``(S, d)``, and their weights, ``(S,)``."""
        globals_, _ = self.weighted_globals()
        if len(globals_) <= number:
            return globals_, self.globals_.weights
        some = self._resampled(number, torch.Generator().manual_seed(self.seed))
        return some, numpy.full(number, 1 / number)

    @property
    def is_gaussian(self) -> bool:
        """Whether the globals are those of the Gaussian itself, as of an ELBO."""
        return math.isnan(self.log_evidence)

    def _drawn(self, num_samples: int, seed: int | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Draws of globals and units with the places of these draws, those of the same globals together."""
        generator = torch.Generator().manual_seed(self.seed if seed is None else seed)
        distinct, which = distinct_rows(self._resampled(num_samples, generator))
        order = which.argsort(stable=True)
        rank = torch.arange(num_samples, device=which.device) - torch.searchsorted(which[order], which[order])
        begins = rank % _SHARED == 0
        row = begins.cumsum(0) - 1
        globals_, chunk = distinct[which[order[begins]]], self.units.chunk()
        for first in range(0, len(globals_), chunk):
            some, here = globals_[first : first + chunk], (row >= first) & (row < first + chunk)
            inside = row[here] - first
            yield order[here], some[inside], self.units.draw(some, inside, generator)

    def _resampled(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Draws of the globals in random order, each as often as its share calls for, ``(num_samples, d)``."""
        # A stride through a quasi-random sequence is all but random, so the order comes first.
        order = torch.randperm(len(self.globals_.draws), generator=generator).numpy()
        shift = float(torch.rand((), generator=generator))
        positions = (numpy.arange(num_samples) + shift) / num_samples
        index = numpy.searchsorted(self.globals_.weights[order].cumsum(), positions).clip(max=len(order) - 1)
        chosen = order[index][torch.randperm(num_samples, generator=generator).numpy()]
        return torch.from_numpy(self.globals_.draws[chosen]).to(self.gaussian.global_loc)

    def _averaged(self) -> tuple[Tensor, Tensor]:
        """Draws of the globals ``(S, d)`` that the units are averaged over, and their weights."""
        globals_, weights = self.weighted_globals()
        size = max(self.gaussian.local_loc.numel(), 1)
        averaged = self.averaged or min(max(_LEAST, _AVERAGED // size), _MOST_AVERAGED)
        if len(globals_) <= averaged:
            return globals_, weights
        some = self._resampled(averaged, torch.Generator().manual_seed(self.seed))
        return some, self._calibrated(some, globals_, weights)

    def _calibrated(self, some: Tensor, globals_: Tensor, weights: Tensor) -> Tensor:
        r"""Weigh a part of the draws so that averages of linear functions, and of squares, are those of all draws.

        With the standardized globals and their squares as features :math:`\phi`, the weights of draws are
        :math:`1/S + \lambda^\top (\phi_s - \bar\phi)`: an average over few draws misses what it does by chance, as far
        as a regression on the features knows it.

        Reference: Deville & Särndal (1992), *Calibration estimators in survey sampling*, JASA 87(418).
        """
        scale, center = self.gaussian.precision.global_scale_tril, self.gaussian.global_loc
        equal = weights.new_full((len(some),), 1 / len(some))

        def features(at: Tensor) -> Tensor:
            z = torch.linalg.solve_triangular(scale, (at - center).mT, upper=False).mT
            return torch.cat([z, z**2], 1)[:, : len(some) // _EACH]

        found, wanted = features(some), weights @ features(globals_)
        centered = found - found.mean(0)
        solved = torch.linalg.lstsq(centered.mT @ centered, (wanted - found.mean(0)).unsqueeze(-1), driver="gelsd")
        return equal + (centered @ solved.solution).squeeze(-1)

    @cached_property
    @torch.no_grad()
    def moments(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Means and standard deviations by site, in double precision."""
        center = self.gaussian.median()
        local = {name: center[name] for name in self.gaussian.unit_model.layout.local_sites}
        of_globals, of_units = self.global_moments, _moments(local, self._constrained_units())
        mean, std = ({**of_globals[part], **of_units[part]} for part in range(2))
        return {name: mean[name] for name in center}, {name: std[name] for name in center}

    @cached_property
    @torch.no_grad()
    def global_moments(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The same of the global sites alone, which takes no look at the units."""
        weights, values = self._constrained_globals()
        center = self.gaussian.constrained_globals(self.gaussian.global_loc[None])
        return _moments({name: value[0] for name, value in center.items()}, [(weights, values)])

    def _constrained_globals(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights and constrained values ``(S, ...)`` of the global sites."""
        globals_, weights = self.weighted_globals()
        values = self.gaussian.constrained_globals(globals_)
        return dict.fromkeys(values, weights), values

    def _constrained_units(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Weights and constrained values ``(S Q, ...)`` of the local sites, at points of the units."""
        layout = self.gaussian.unit_model.layout
        globals_, weights = self._averaged()
        chunk = self.units.chunk()
        for some, weight in zip(globals_.split(chunk), weights.split(chunk), strict=True):
            points, log_shares = self.units.points(some)
            values = self.gaussian.constrained(some.repeat_interleave(points.shape[1], 0), points.flatten(0, 1))
            shares = (weight[:, None, None] * log_shares.exp()).flatten(0, 1)  # (S Q, N)
            local = {name: values[name] for name in layout.local_sites}
            yield {name: self._along_units(shares, name, value) for name, value in local.items()}, local

    def _along_units(self, shares: Tensor, name: str, value: Tensor) -> Tensor:
        """Shares ``(L, N)`` in a shape that broadcasts against a value ``(L, *shape)`` of a local site."""
        axis = 1 + self.unit_axis(name)
        return shares.reshape(len(shares), *(1,) * (axis - 1), -1, *(1,) * (value.dim() - axis - 1))


def _moments(
    center: Mapping[str, Tensor], parts: Iterable[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return means and standard deviations by site.

    :param center: values near the means, so that squares of small spreads have digits left.
    :param parts: weights and values of some draws at a time, with the draws first.
    """
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in center.items()}
    for weights, values in parts:
        for name, value in values.items():
            deviation = value - center[name]
            weighted = weights[name].reshape(weights[name].shape + (1,) * (value.dim() - weights[name].dim()))
            moments[name][0].add_((weighted * deviation).sum(0))
            moments[name][1].add_((weighted * deviation**2).sum(0))
    mean = {name: center[name] + first for name, (first, _) in moments.items()}
    return mean, {name: (second - first**2).clamp(min=0).sqrt() for name, (first, second) in moments.items()}


def gaussian_sample(gaussian: LaplaceGaussian, seed: int, num_draws: int = 1024) -> ImportanceSample:
    """Draw globals from a Gaussian as it is.

    :param LaplaceGaussian gaussian: the Gaussian.
    :param int seed: of the draws.
    :param int num_draws: a power of two.
    """
    loc, scale_tril = to_numpy(gaussian.global_loc), to_numpy(gaussian.precision.global_scale_tril)
    return normal_sample(loc, scale_tril, num_draws, seed)
