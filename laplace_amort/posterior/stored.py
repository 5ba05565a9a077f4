"""What is known of a posterior without its model: the numbers that a file of a fit has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import numpy
from torch import Tensor

from laplace_amort.errors import NeedsModelError
from laplace_amort.posterior.posterior import Posterior
from laplace_amort.posterior.tables import PROBABILITIES, SiteSummary, globals_frame, units_frame
from laplace_amort.types import Vector, to_numpy

__all__ = ["Absent", "PosteriorNumbers", "StoredPosterior", "numbers_of_posterior"]

# Of the quantiles of the globals that are kept.
_KEPT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.16, 0.25, 0.5, 0.75, 0.84, 0.9, 0.95, 0.975, 0.99, 0.995)


class PosteriorNumbers(NamedTuple):
    """A posterior in numbers.

    :param str text: as it is printed.
    :param str summary: the table in it.
    :param float k_hat: of the weights of the globals.
    :param float log_evidence: log marginal likelihood.
    :param dict mean: means by site, in the dtype of the model.
    :param dict std: standard deviations by site.
    :param dict quantiles: of the global sites, ``(Q, *shape)``.
    :param tuple probabilities: of the quantiles.
    :param dict unit_axes: which axis of each local site holds the units.
    :param Tensor units: index of each unit in its plate, ``(N,)``.
    """

    text: str
    summary: str
    k_hat: float
    log_evidence: float
    mean: dict[str, Tensor]
    std: dict[str, Tensor]
    quantiles: dict[str, Vector]
    probabilities: tuple[float, ...]
    unit_axes: dict[str, int]
    units: Tensor


def numbers_of_posterior(posterior: Posterior) -> PosteriorNumbers:
    """Return what a file keeps of a posterior: two numbers for each element of a unit, a few for each global.

    :param Posterior posterior: of the fit.
    """
    model = posterior.gaussian.unit_model
    return PosteriorNumbers(
        text=str(posterior),
        summary=posterior.summary(),
        k_hat=float(posterior.k_hat),
        log_evidence=float(posterior.log_evidence),
        mean=posterior.mean(),
        std=posterior.std(),
        quantiles={site.name: site.quantiles for site in posterior.global_summaries(_KEPT)},
        probabilities=_KEPT,
        unit_axes={name: posterior.unit_axis(name) for name in model.layout.local_sites},
        units=model.units,
    )


class Absent:
    """In the place of what a file of a fit does not hold: whoever asks it for anything is told what to type.

    :param str what: what is asked for, as the subject of a sentence.
    :param str line: to type instead.
    """

    def __init__(self, what: str, line: str) -> None:
        self._what, self._line = what, line

    def __getattr__(self, name: str) -> Any:
        """Say that it is not there.

        :raises NeedsModelError: with the line to type.
        """
        if name.startswith("__"):  # what Python itself looks for: not there, as of any object
            raise AttributeError(name)
        self._refuse(f"{self._what} ('{name}' was asked for)")

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Say that it is not there."""
        self._refuse(self._what)

    def __repr__(self) -> str:
        return f"<{self._what}: not in a file without its model>"

    def _refuse(self, what: str) -> NoReturn:
        raise NeedsModelError(
            f"this fit was read from a file without its model, and {what} cannot be had without. Give it the model and "
            f"the arguments that were fitted:\n    {self._line}"
        )


class StoredPosterior(Absent):
    """A posterior as a file has it: means, standard deviations and tables. For all else it says what to type.

    :param PosteriorNumbers numbers: of the posterior.
    :param str line: that sets up the model.
    """

    def __init__(self, numbers: PosteriorNumbers, line: str) -> None:
        super().__init__("the posterior with its draws", line)
        self._numbers = numbers

    @property
    def k_hat(self) -> float:
        """Shape of the tail of the importance weights of the globals; minus infinity where none were needed."""
        return self._numbers.k_hat

    @property
    def log_evidence(self) -> float:
        """Log marginal likelihood of the data, to the accuracy of the integrals over units; NaN without any."""
        return self._numbers.log_evidence

    def mean(self) -> dict[str, Tensor]:
        """Return the means, by site."""
        return {name: value.clone() for name, value in self._numbers.mean.items()}

    def std(self) -> dict[str, Tensor]:
        """Return the standard deviations, by site."""
        return {name: value.clone() for name, value in self._numbers.std.items()}

    def to_frame(self, quantiles: Sequence[float] = PROBABILITIES) -> Any:
        """Return mean, standard deviation and quantiles of the globals, a row for each element such as ``beta[2]``.

        :param quantiles: of those that are kept: 0.005, 0.01, 0.025, 0.05, 0.1, 0.16, 0.25, 0.5, and from 0.5 up.
        :return: a ``pandas.DataFrame``.
        :raises NeedsModelError: for another quantile.
        :raises ImportError: if pandas is not installed.
        """
        kept = self._numbers.probabilities
        others = [one for one in quantiles if one not in kept]
        if others:
            self._refuse(f"the quantile {others[0]:g} of the globals (of those that are kept, {kept})")
        rows = [kept.index(one) for one in quantiles]
        sites = [self._summary(name, found[rows]) for name, found in self._numbers.quantiles.items()]
        return globals_frame(sites, quantiles)

    def units_to_frame(self, quantiles: Sequence[float] = ()) -> Any:
        """Return mean and standard deviation of the units, a row for each of their elements.

        :param quantiles: none, for these are of draws.
        :return: a ``pandas.DataFrame``, with columns ``site``, ``unit``, ``element``, ``mean`` and ``sd``.
        :raises NeedsModelError: if quantiles are asked for.
        :raises ImportError: if pandas is not installed.
        """
        if len(quantiles):
            self._refuse("quantiles of the units")
        sites = [
            self._summary(name, numpy.zeros((0, *self._numbers.mean[name].shape))).along(axis)
            for name, axis in self._numbers.unit_axes.items()
        ]
        return units_frame(sites, self._numbers.units, ())

    def summary(self) -> str:
        """Return a table of mean, standard deviation and quantiles of the globals."""
        return self._numbers.summary

    def __str__(self) -> str:
        return self._numbers.text

    def _summary(self, name: str, quantiles: Vector) -> SiteSummary:
        mean, std = self._numbers.mean[name], self._numbers.std[name]
        return SiteSummary(name, to_numpy(mean), to_numpy(std), quantiles)
