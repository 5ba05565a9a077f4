"""What is known of a posterior without its model: the numbers that a file of a fit has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, cast

import numpy
from torch import Tensor

from laplace_amort.errors import NeedsModelError
from laplace_amort.posterior import markup
from laplace_amort.posterior.posterior import Posterior
from laplace_amort.posterior.rows import Rows
from laplace_amort.posterior.tables import PROBABILITIES, GlobalsTable, SiteSummary, units_frame
from laplace_amort.types import Vector, to_numpy

__all__ = ["Absent", "PosteriorNumbers", "StoredPosterior", "StoredRows", "numbers_of_posterior"]

# Of the quantiles of the globals that are kept.
_KEPT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.16, 0.25, 0.5, 0.75, 0.84, 0.9, 0.95, 0.975, 0.99, 0.995)


class StoredRows(NamedTuple):
    """Rows of a table of the globals as :class:`Rows` has them, with quantiles in the place of draws.

    :param list names: of the elements.
    :param Vector mean: ``(n,)``.
    :param Vector sd: ``(n,)``.
    :param list depends: for each of them, which elements of the globals it is a function of; None of any.
    :param Vector known: the quantiles, ``(Q, n)``.
    """

    names: list[str]
    mean: Vector
    sd: Vector
    depends: list[frozenset[str] | None]
    known: Vector

    def quantiles(self, probabilities: Sequence[float]) -> Vector:
        """Return quantiles ``(Q, n)``, of those that are kept."""
        found: Vector = self.known[[_KEPT.index(one) for one in probabilities]]
        return found


class PosteriorNumbers(NamedTuple):
    """A posterior in numbers.

    :param str how: how well the globals are known, in one line.
    :param float k_hat: of the weights of the globals.
    :param float log_evidence: log marginal likelihood.
    :param tuple rows: :class:`StoredRows` of the table of the globals.
    :param tuple notes: below that table.
    :param str title: above it.
    :param dict mean: means by site, in the dtype of the model.
    :param dict std: standard deviations by site.
    :param dict unit_axes: which axis of each local site holds the units.
    :param Tensor units: index of each unit in its plate, ``(N,)``.
    """

    how: str
    k_hat: float
    log_evidence: float
    rows: tuple[StoredRows, ...]
    notes: tuple[str, ...]
    title: str
    mean: dict[str, Tensor]
    std: dict[str, Tensor]
    unit_axes: dict[str, int]
    units: Tensor


def numbers_of_posterior(posterior: Posterior) -> PosteriorNumbers:
    """Return what a file keeps of a posterior: two numbers for each element of a unit, a few for each global.

    :param Posterior posterior: of the fit.
    """
    model, table = posterior.gaussian.unit_model, posterior.table(_KEPT)
    return PosteriorNumbers(
        how=posterior.how(),
        k_hat=float(posterior.k_hat),
        log_evidence=float(posterior.log_evidence),
        rows=tuple(
            StoredRows(rows.names, rows.mean, rows.sd, rows.depends, rows.quantiles(_KEPT)) for rows in table.rows
        ),
        notes=table.notes,
        title=table.title,
        mean=posterior.mean(),
        std=posterior.std(),
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

    def table(self, quantiles: Sequence[float] = PROBABILITIES) -> GlobalsTable:
        """Return mean, standard deviation and quantiles of the globals; ``print`` it.

        :param quantiles: of those that are kept: 0.005, 0.01, 0.025, 0.05, 0.1, 0.16, 0.25, 0.5, and from 0.5 up.
        :raises NeedsModelError: for another quantile.
        """
        others = [one for one in quantiles if one not in _KEPT]
        if others:
            self._refuse(f"the quantile {others[0]:g} of the globals (of those that are kept, {_KEPT})")
        found, rows = self._numbers, cast(tuple[Rows, ...], self._numbers.rows)  # which have what a table asks for
        return GlobalsTable(rows, tuple(map(float, quantiles)), found.notes, found.title)

    def to_frame(self, quantiles: Sequence[float] = PROBABILITIES) -> Any:
        """Return mean, standard deviation and quantiles of the globals, a row for each element such as ``beta[2]``.

        :param quantiles: see :meth:`table`.
        :return: a ``pandas.DataFrame``.
        :raises NeedsModelError: for another quantile.
        :raises ImportError: if pandas is not installed.
        """
        return self.table(quantiles).to_frame()

    def units_to_frame(self, quantiles: Sequence[float] = ()) -> Any:
        """Return mean and standard deviation of the units, a row for each of their elements.

        :param quantiles: none, for these are of draws.
        :return: a ``pandas.DataFrame``, with columns ``site``, ``unit``, ``element``, ``mean`` and ``sd``.
        :raises NeedsModelError: if quantiles are asked for.
        :raises ImportError: if pandas is not installed.
        """
        if len(quantiles):
            self._refuse("quantiles of the units")
        sites = [self._summary(name).along(axis) for name, axis in self._numbers.unit_axes.items()]
        return units_frame(sites, self._numbers.units, ())

    def summary(self) -> str:
        """Return the table of the globals as text."""
        return str(self.table())

    def how(self) -> str:
        """Say how well the globals are known, in one line: k-hat, draws, and what these are as good as."""
        return self._numbers.how

    def __str__(self) -> str:
        return f"{self.how()}\n\n{self.summary()}"

    def _repr_html_(self) -> str:
        return markup.division([self.table()._repr_html_(), markup.paragraph(self.how(), "how")], "laplace-amort")

    def _summary(self, name: str) -> SiteSummary:
        mean, std = to_numpy(self._numbers.mean[name]), to_numpy(self._numbers.std[name])
        return SiteSummary(name, mean, std, numpy.zeros((0, *mean.shape)))
