"""The posterior that a fit found, for use: draws, moments and quantiles of every site."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy
import torch
from tabulate import tabulate
from torch import Tensor

from laplace_amort.guide import LaplaceGaussian
from laplace_amort.posterior.importance import ImportanceSample, ImportanceSampler, normal_sample
from laplace_amort.posterior.psis import K_GOOD
from laplace_amort.posterior.tables import UnitSite, draws_frame, globals_frame, units_frame
from laplace_amort.posterior.unit_draws import NestedUnits, UnitPosterior, WeightedUnits
from laplace_amort.types import Vector
from laplace_amort.units import Laplace, QuadraturePoints, QuadratureRule, UnitIntegrals

__all__ = ["Posterior", "gaussian_sample", "marginal_sample"]

# Draws for quantiles.
_DRAWS = 4000
# Draws of the globals that units are averaged over: of units in all at most, but for the least.
_AVERAGED, _LEAST = 2**20, 512
_PROBABILITIES = (0.05, 0.5, 0.95)
# Draws of the globals at most, when more are asked for.
_MOST = 8192


@dataclass(frozen=True)
class Posterior:
    r"""Weighted draws of the globals, and for each of them the units.

    What :attr:`FitResult.posterior` is. All values are those of the sites in constrained space.

    Do not rely on it where :attr:`k_hat` is above 0.7, or where :func:`~laplace_amort.diagnose` says so.

    :param LaplaceGaussian gaussian: the Gaussian that the draws of the globals come from.
    :param ImportanceSample globals_: draws of the globals in unconstrained space, with weights.
    :param units: what is known of the units given the globals.
    :param int seed: of draws.
    :param int averaged: draws of the globals, at most, over which moments of the units are averages; by default all,
        but where units are many.

    Example::

        >>> import pyro, torch, pyro.distributions as dist
        >>> from laplace_amort import AutoLaplaceFamily, MarginalQuadrature, fit
        >>> def model(z):
        ...     mu = pyro.sample("mu", dist.Normal(0., 1.))
        ...     with pyro.plate("units", len(z)):
        ...         y = pyro.sample("y", dist.Normal(mu, 1.))
        ...         pyro.sample("z", dist.Normal(y, 1.), obs=z)
        >>> pyro.clear_param_store()
        >>> z = torch.tensor([1., 3.])
        >>> result = fit(model, AutoLaplaceFamily(model), z, objective=MarginalQuadrature())
        >>> {name: value.round(decimals=1) for name, value in result.posterior.mean().items()}
        {'mu': tensor(1.), 'y': tensor([1., 2.])}
        >>> result.posterior.sample(5)["y"].shape
        torch.Size([5, 2])
    """

    gaussian: LaplaceGaussian
    globals_: ImportanceSample
    units: UnitPosterior
    seed: int = 0
    averaged: int | None = None

    def thinned(self, averaged: int | None) -> Posterior:
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
    def sample(self, num_samples: int, seed: int | None = None) -> dict[str, Tensor]:
        """Draw from the posterior.

        :param int num_samples: number of draws.
        :param int seed: of these draws; another one gives others.
        :return: constrained values ``(num_samples, *shape)`` by site.

        Values of the globals repeat where there are more draws than weighted ones, or where weights are unequal; see
        :meth:`refined`.
        """
        parts = [self.gaussian.constrained(*some) for some in self._drawn(num_samples, seed)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @torch.no_grad()
    def sample_unconstrained(self, num_samples: int, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Draw from the posterior, the same draws as :meth:`sample`, in the coordinates of the fit.

        :param int num_samples: number of draws.
        :param int seed: of these draws.
        :return: globals ``(num_samples, d)`` and units ``(num_samples, N, k)``.
        """
        globals_, locals_ = zip(*self._drawn(num_samples, seed), strict=True)
        return torch.cat(globals_), torch.cat(locals_)

    def refined(self, num_samples: int) -> Posterior:
        """Return the same with enough draws of the globals for so many samples, so that few repeat.

        It takes one value of the marginal density for each draw of the globals, 8192 at most. Do not use it for moments
        and quantiles: these are as good without.

        :param int num_samples: number of draws that are wanted.
        """
        found = self.globals_
        if found.effective >= num_samples or not self.gaussian.unit_model.layout.global_dim:
            return self
        if found.k_hat == -math.inf and math.isnan(found.log_integral):  # of a Gaussian as it is
            number = 2 ** math.ceil(math.log2(num_samples))
            return dataclasses.replace(self, globals_=gaussian_sample(self.gaussian, self.seed, number))
        if not isinstance(self.units, NestedUnits):
            return self
        needed = num_samples * len(found.draws) / max(found.effective, 1.0)
        number = 2 ** math.ceil(math.log2(min(needed, _MOST)))
        rule = self.units.rule if isinstance(self.units, WeightedUnits) else Laplace()
        globals_ = marginal_sample(self.units.integrals, rule, self.gaussian, self.seed, number)
        return dataclasses.replace(self, globals_=globals_)

    def mean(self) -> dict[str, Tensor]:
        """Return the means, by site: weighted averages over globals, and over units by quadrature."""
        return self._moments[0]

    def std(self) -> dict[str, Tensor]:
        """Return the standard deviations, by site; see :meth:`mean`."""
        return self._moments[1]

    def quantiles(self, quantiles: Sequence[float], num_samples: int = _DRAWS) -> dict[str, Tensor]:
        """Return quantiles ``(Q, *shape)`` by site, of draws.

        :param quantiles: between 0 and 1.
        :param int num_samples: number of draws.
        :raises ValueError: if one is not.
        """
        _check_probabilities(quantiles)
        draws = self.sample(num_samples)
        return {name: _quantiles(value, torch.as_tensor(quantiles).to(value)) for name, value in draws.items()}

    def to_frame(self, quantiles: Sequence[float] = _PROBABILITIES) -> Any:
        """Return mean, standard deviation and quantiles of the globals, a row for each element such as ``beta[2]``.

        :param quantiles: between 0 and 1.
        :return: a ``pandas.DataFrame``.
        :raises ImportError: if pandas is not installed.
        """
        _check_probabilities(quantiles)
        names = self.gaussian.unit_model.layout.global_sites
        mean, std = self.mean(), self.std()
        globals_, weights = self._weighted()
        values = self.gaussian.constrained_globals(globals_) if names else {}
        found = {}
        for name, value in values.items():
            columns = value.reshape(len(value), -1).unbind(1)
            rows = torch.tensor([_weighted_quantiles(column, weights, quantiles) for column in columns])
            found[name] = rows.mT.reshape(-1, *value.shape[1:])
        return globals_frame({n: mean[n] for n in names}, {n: std[n] for n in names}, found, quantiles)

    def units_to_frame(self, quantiles: Sequence[float] = _PROBABILITIES, num_samples: int = _DRAWS) -> Any:
        """Return mean, standard deviation and quantiles of the units, a row for each of their elements.

        :param quantiles: between 0 and 1, of draws.
        :param int num_samples: number of draws.
        :return: a ``pandas.DataFrame``, with columns ``site``, ``unit``, ``element``, ``mean``, ``sd`` and quantiles.
        :raises ImportError: if pandas is not installed.
        """
        mean, std, found = self.mean(), self.std(), self.quantiles(quantiles, num_samples)
        model = self.gaussian.unit_model
        axes = {name: self.unit_axis(name) for name in model.layout.local_sites}
        sites = [UnitSite(name, axis, mean[name], std[name], found[name]) for name, axis in axes.items()]
        return units_frame(sites, model.units, quantiles)

    def draws_to_frame(self, num_samples: int = 1000, seed: int | None = None) -> Any:
        """Return draws, a row for each, with a column for each element of each site.

        :param int num_samples: number of draws.
        :param int seed: of these draws; see :meth:`sample`.
        :return: a ``pandas.DataFrame``.
        :raises ImportError: if pandas is not installed.
        """
        return draws_frame(self.sample(num_samples, seed))

    def unit_axis(self, name: str) -> int:
        """Return which axis of the constrained value of a local site holds the units."""
        return self.gaussian.unit_model.unit_axis(name)

    def summary(self) -> str:
        """Return a table of mean, standard deviation and quantiles of the globals."""
        names = self.gaussian.unit_model.layout.global_sites
        if not names:
            return "there are no globals"
        mean, std = self.mean(), self.std()
        globals_, weights = self._weighted()
        values = self.gaussian.constrained_globals(globals_)
        rows = []
        for name in names:
            columns = values[name].reshape(len(globals_), -1)
            for index in range(columns.shape[1]):
                label = name if columns.shape[1] == 1 else f"{name}[{index}]"
                moments = (float(part[name].reshape(-1)[index]) for part in (mean, std))
                rows.append([label, *moments, *_weighted_quantiles(columns[:, index], weights, _PROBABILITIES)])
        headers = ["global", "mean", "sd", *(f"{100 * p:g} %" for p in _PROBABILITIES)]
        return tabulate(rows, headers, floatfmt=".4g")

    def __str__(self) -> str:
        found = self.globals_
        reliable = "" if found.k_hat <= K_GOOD else f": above {K_GOOD}, do not rely on it"
        weighted = f"k-hat of the globals {found.k_hat:.2f}{reliable}; " if found.k_hat > -math.inf else ""
        return (
            f"{weighted}{len(found.draws)} draws of the globals, as good as {found.effective:.0f} equal ones; error of "
            f"their moments {found.error:.2g}{f'; {found.note}' if found.note else ''}\n\n{self.summary()}"
        )

    def _drawn(self, num_samples: int, seed: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Draws of globals and units, in pieces."""
        generator = torch.Generator().manual_seed(self.seed if seed is None else seed)
        globals_ = self._resampled(num_samples, generator)
        for some in globals_.split(self.units.chunk()):
            yield some, self.units.draw(some, generator)

    def _weighted(self) -> tuple[Tensor, Tensor]:
        """The draws of the globals, ``(S, d)``, and their weights, ``(S,)``."""
        loc = self.gaussian.global_loc
        return torch.from_numpy(self.globals_.draws).to(loc), torch.from_numpy(self.globals_.weights).to(loc)

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
        globals_, weights = self._weighted()
        averaged = self.averaged or max(_LEAST, _AVERAGED // max(self.gaussian.local_loc.numel(), 1))
        if len(globals_) <= averaged:
            return globals_, weights
        equal = weights.new_full((averaged,), 1 / averaged)
        if not numpy.ptp(self.globals_.log_weights):
            return globals_[:averaged], equal  # the first of a quasi-random sequence are balanced
        return self._resampled(averaged, torch.Generator().manual_seed(self.seed)), equal

    @cached_property
    @torch.no_grad()
    def _moments(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        center = self.gaussian.median()
        moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in center.items()}
        for weights, values in itertools.chain([self._weighted_globals()], self._weighted_units()):
            for name, value in values.items():
                deviation = value - center[name]  # so that squares of small spreads have digits left
                weighted = weights[name].reshape(weights[name].shape + (1,) * (value.dim() - weights[name].dim()))
                moments[name][0].add_((weighted * deviation).sum(0))
                moments[name][1].add_((weighted * deviation**2).sum(0))
        mean = {name: center[name] + first for name, (first, _) in moments.items()}
        std = {name: (second - first**2).clamp(min=0).sqrt() for name, (first, second) in moments.items()}
        return mean, std

    def _weighted_globals(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights and constrained values ``(S, ...)`` of the global sites."""
        globals_, weights = self._weighted()
        values = self.gaussian.constrained_globals(globals_)
        return dict.fromkeys(values, weights), values

    def _weighted_units(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
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


def marginal_sample(
    integrals: UnitIntegrals, rule: QuadratureRule, gaussian: LaplaceGaussian, seed: int, num_draws: int = 128
) -> ImportanceSample:
    """Draw globals from their marginal density.

    :param UnitIntegrals integrals: of the model.
    :param QuadratureRule rule: how the units are integrated over.
    :param LaplaceGaussian gaussian: the first proposal, and where modes are about.
    :param int seed: of the draws.
    :param int num_draws: of the first round.
    """
    points = rule.points(gaussian.local_loc.shape[1], gaussian.global_loc)
    integrals = integrals.loose() if len(points.points) > 1 else integrals
    nested = NestedUnits(gaussian, integrals)

    def log_density(draws: Vector) -> Vector:
        globals_ = torch.from_numpy(draws).to(gaussian.global_loc)
        values: Vector = _numpy(
            integrals.values(points, QuadraturePoints.log_integral, globals_, nested.start(globals_)).values
        )
        return values

    with torch.no_grad():
        sampler = ImportanceSampler(seed=seed, num_draws=num_draws)
        return sampler(log_density, _numpy(gaussian.global_loc), _numpy(gaussian.precision.global_scale_tril))


def gaussian_sample(gaussian: LaplaceGaussian, seed: int, num_draws: int = 1024) -> ImportanceSample:
    """Draw globals from a Gaussian as it is.

    :param LaplaceGaussian gaussian: the Gaussian.
    :param int seed: of the draws.
    :param int num_draws: a power of two.
    """
    loc, scale_tril = _numpy(gaussian.global_loc), _numpy(gaussian.precision.global_scale_tril)
    return normal_sample(loc, scale_tril, num_draws, seed)


def _check_probabilities(quantiles: Sequence[float]) -> None:
    if not all(0 <= float(probability) <= 1 for probability in quantiles):
        raise ValueError(f"quantiles must be between 0 and 1, got {list(map(float, quantiles))}")


def _numpy(tensor: Tensor) -> Vector:
    return tensor.detach().double().cpu().numpy()


def _quantiles(values: Tensor, probabilities: Tensor) -> Tensor:
    """As ``torch.quantile`` along the first dimension, for any number of elements."""
    ordered = values.sort(0).values
    position = probabilities * (len(values) - 1)
    low = position.floor().long()
    share = (position - low).reshape(-1, *(1,) * (values.dim() - 1))
    return torch.lerp(ordered[low], ordered[(low + 1).clamp(max=len(values) - 1)], share.expand_as(ordered[low]))


def _weighted_quantiles(values: Tensor, weights: Tensor, probabilities: Sequence[float]) -> list[float]:
    order = values.argsort()
    below = weights[order].cumsum(0) - weights[order] / 2
    found = numpy.interp(probabilities, below.double().cpu().numpy(), values[order].double().cpu().numpy())
    return [float(value) for value in found]
