"""The posterior that a fit found, for use: tables, frames, predictions, units that are new, and files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from pyro.infer import Predictive
from torch import Tensor

from laplace_amort.posterior import markup
from laplace_amort.posterior.draws import DRAWS, PosteriorDraws
from laplace_amort.posterior.export import as_datatree, export
from laplace_amort.posterior.filled import filled_in
from laplace_amort.posterior.likelihood import LogLikelihood, MarginalLikelihood
from laplace_amort.posterior.new_units import posterior_for
from laplace_amort.posterior.predictive import SeenUnits, Units, predictive
from laplace_amort.posterior.psis import K_GOOD
from laplace_amort.posterior.quantiles import check_probabilities
from laplace_amort.posterior.rows import Rows, rows_of
from laplace_amort.posterior.tables import (
    PROBABILITIES,
    GlobalsTable,
    SiteSummary,
    draws_frame,
    units_frame,
)
from laplace_amort.types import to_numpy

__all__ = ["Posterior"]


@dataclass(frozen=True)
class Posterior(PosteriorDraws):
    r"""Weighted draws of the globals, and for each of them the units.

    What :attr:`FitResult.posterior` is. All values are those of the sites in constrained space, in the dtype of the
    model; they are computed in double precision, in which ``gaussian`` and ``globals_`` are.

    Do not rely on it where :attr:`k_hat` is above 0.7, or where :func:`~laplace_amort.diagnose` says so.

    :param Problem problem: the model at the data of the fit.
    :param LaplaceGaussian gaussian: the Gaussian that the draws of the globals come from, with the units in question.
    :param ImportanceSample globals_: draws of the globals in unconstrained space, with weights.
    :param units: what is known of the units given the globals.
    :param int seed: of draws.
    :param int averaged: draws of the globals, at most, over which moments of the units are averages; by default all,
        but where units are many.
    :param fitted: the posterior that the globals are from, where the units are others than those of the fit.

    Example::

        >>> import pyro, torch, pyro.distributions as dist
        >>> from laplace_amort import fit
        >>> def model(z):
        ...     mu = pyro.sample("mu", dist.Normal(0., 1.))
        ...     with pyro.plate("units", len(z)):
        ...         y = pyro.sample("y", dist.Normal(mu, 1.))
        ...         pyro.sample("z", dist.Normal(y, 1.), obs=z)
        >>> result = fit(model, torch.tensor([1., 3.]))
        >>> {name: value.round(decimals=1) for name, value in result.posterior.mean().items()}
        {'mu': tensor(1.), 'y': tensor([1., 2.])}
        >>> result.posterior.sample(5)["y"].shape
        torch.Size([5, 2])
    """

    def sample(self, num_samples: int, seed: int | None = None) -> dict[str, Tensor]:
        """Draw from the posterior.

        :param int num_samples: number of draws.
        :param int seed: of these draws; another one gives others.
        :return: constrained values ``(num_samples, *shape)`` by site: of all latents, and of sites of which
            ``obs_mask`` hides a part, filled in. What is hidden is drawn, by a run of the model for each draw;
            :meth:`sample_latents` has the latents alone.

        Values of the globals repeat where there are more draws than weighted ones, or where weights are unequal; see
        :meth:`refined`.
        """
        drawn = self.sample_latents(num_samples, seed)
        return {**drawn, **filled_in(self, drawn, self.seed if seed is None else seed)}

    def to_frame(self, quantiles: Sequence[float] = PROBABILITIES) -> Any:
        """Return mean, standard deviation and quantiles of the globals, a row for each element such as ``beta[2]``.

        The rows are those of :meth:`table`.

        :param quantiles: between 0 and 1.
        :return: a ``pandas.DataFrame``.
        :raises ImportError: if pandas is not installed.
        """
        return self.table(quantiles).to_frame()

    def units_to_frame(self, quantiles: Sequence[float] = PROBABILITIES, num_samples: int = DRAWS) -> Any:
        """Return mean, standard deviation and quantiles of the units, a row for each of their elements.

        :param quantiles: between 0 and 1, of draws.
        :param int num_samples: number of draws.
        :return: a ``pandas.DataFrame``, with columns ``site``, ``unit``, ``element``, ``mean``, ``sd`` and quantiles.
        :raises ImportError: if pandas is not installed.
        """
        mean, std, found = self.mean(), self.std(), self.quantiles(quantiles, num_samples)
        model = self.gaussian.unit_model
        sites = [
            SiteSummary(name, *map(to_numpy, (mean[name], std[name], found[name]))).along(self.unit_axis(name))
            for name in model.layout.local_sites
        ]
        return units_frame(sites, model.units, quantiles)

    def draws_to_frame(self, num_samples: int = 1000, seed: int | None = None) -> Any:
        """Return draws, a row for each, with a column for each element of each site.

        :param int num_samples: number of draws.
        :param int seed: of these draws; see :meth:`sample`.
        :return: a ``pandas.DataFrame``.
        :raises ImportError: if pandas is not installed.
        """
        return draws_frame(self.sample(num_samples, seed))

    def table(self, quantiles: Sequence[float] = PROBABILITIES) -> GlobalsTable:
        """Return mean, standard deviation and quantiles of the globals; ``print`` it.

        Every element of a global site has a row, constants left out; a Cholesky factor ``L`` of correlations has
        ``corr(L)[1, 0]`` instead. Deterministic sites of the model follow, of up to 64 elements, where they depend on
        globals alone; those of units are in what :meth:`predictive` returns, as ``result.predictive()()["site"]``.
        :meth:`mean`, :meth:`sample` and their kin have latent sites only. Do not take numbers for moments that exist:
        :meth:`FitResult.table` leaves out those that do not.

        :param quantiles: between 0 and 1.
        :raises ValueError: if one is not.
        """
        check_probabilities(quantiles)
        rows, notes = self._rows
        title = "Gaussian approximation at the optimum" if self.is_gaussian else ""
        return GlobalsTable(tuple(rows), tuple(map(float, quantiles)), tuple(notes), title)

    def summary(self) -> str:
        """Return the table of the globals as text."""
        return str(self.table())

    def __str__(self) -> str:
        return f"{self.how()}\n\n{self.summary()}"

    def __repr__(self) -> str:
        weighted = f", k-hat {self.k_hat:.2g}" if self.k_hat > -math.inf else ""
        return f"Posterior({self.gaussian.unit_model.sizes()}, {len(self.globals_.draws)} draws{weighted})"

    def _repr_html_(self) -> str:
        return markup.division([self.table()._repr_html_(), markup.paragraph(self.how(), "how")], "laplace-amort")

    def how(self) -> str:
        """Say how well the globals are known, in one line: k-hat, draws, and what these are as good as."""
        found = self.globals_
        reliable = "" if found.k_hat <= K_GOOD else f": above {K_GOOD}, do not rely on it"
        weighted = f"k-hat of the globals {found.k_hat:.2f}{reliable}; " if found.k_hat > -math.inf else ""
        return (
            f"{weighted}{len(found.draws)} draws of the globals, as good as {found.effective:.0f} equal ones; error of "
            f"their moments {found.error:.2g}{f'; {found.note}' if found.note else ''}"
        )

    def predictive(
        self,
        units: Units = SeenUnits(),  # noqa: B008 (never changes)
        *,
        num_samples: int = 1000,
        seed: int | None = None,
        parallel: bool = False,
    ) -> Predictive:
        """Return Pyro's ``Predictive``: call it with arguments of the model, or with none for those of the data.

        Observed sites are drawn, whatever the arguments hold for them; draws of what is not given come from torch's
        generator (``pyro.set_rng_seed``).

        :param units: which are predicted: :class:`~laplace_amort.SeenUnits`, :class:`~laplace_amort.NewUnits`, or
            :class:`~laplace_amort.ConditionedUnits`, new ones that have data.
        :param int num_samples: number of draws.
        :param int seed: of the draws of the posterior.
        :param bool parallel: of ``Predictive``: one run for all draws, for models that take a dimension on the left.
        :return: called, it gives values ``(num_samples, *shape)`` by site.
        :raises ModelError: when called, if plates have other sizes than there are draws for; the message has the line
            to type. And now, for units that were fitted in minibatches.

        Example::

            >>> import pyro, torch, pyro.distributions as dist
            >>> from laplace_amort import NewUnits, fit
            >>> def model(z, size):
            ...     mu = pyro.sample("mu", dist.Normal(0., 1.))
            ...     with pyro.plate("units", size):
            ...         y = pyro.sample("y", dist.Normal(mu, 1.))
            ...         pyro.sample("z", dist.Normal(y, 1.), obs=z)
            >>> posterior = fit(model, torch.tensor([1., 3.]), 2).posterior
            >>> posterior.predictive()()["z"].shape
            torch.Size([1000, 2])
            >>> posterior.predictive(NewUnits())(None, 5)["z"].shape
            torch.Size([1000, 5])
        """
        return predictive(self, units, num_samples, seed, parallel)

    def posterior_for(self, *args: Any, **kwargs: Any) -> Self:
        """Return the posterior of new units given their data, without a refit: what amortization is for.

        The globals stay as they were fitted; for each of their draws, modes, curvatures and points of the new units are
        found as those of the fit were. It costs a few evaluations of the model. Evidence and k-hat stay those of the
        fit.

        :param args: arguments of the model with the data of the new units.
        :param kwargs: its keyword arguments.
        :return: a posterior like that of the fit, with the new units in the place of the old.
        :raises ModelError: if the model has other latents than in the fit, or subsamples.
        :raises ModeNotFoundError: naming the units whose mode was not found.
        """
        return posterior_for(self, args, kwargs)

    def to_arviz(
        self,
        *,
        num_samples: int = 1000,
        prior_samples: int = 500,
        log_likelihood: LogLikelihood | None = MarginalLikelihood(),  # noqa: B008 (never changes)
        coords: Mapping[str, Any] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        seed: int | None = None,
        attrs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return an ``xarray.DataTree`` for ArviZ, with one chain of independent draws.

        Its groups are ``posterior``, ``posterior_predictive``, ``prior``, ``prior_predictive``, ``observed_data``,
        ``constant_data`` (tensors among the arguments of the model) and ``log_likelihood``. Dimensions bear the names
        of plates. Diagnostics of chains, such as R-hat, say nothing here.

        :param int num_samples: draws of the posterior. Globals are drawn by importance sampling, with enough of them
            that few repeat; the attribute ``distinct_draws_of_globals`` says how many are different.
        :param int prior_samples: draws of the prior; 0 for none.
        :param log_likelihood: what ``loo`` leaves out: :class:`~laplace_amort.MarginalLikelihood`, a unit;
            :class:`~laplace_amort.ConditionalLikelihood`, an observation of a unit that is known; None for no such
            group.
        :param coords: labels by dimension, as ``{"units": names_of_the_units}``.
        :param dims: names of dimensions by variable, those of draws left out.
        :param int seed: of all draws; torch's generator stays as it is.
        :param attrs: attributes of the tree, beside those that say what it is of, such as ``k_hat``.
        :raises ImportError: if ArviZ is not installed, with the line to type.
        :raises ModelError: for units that were fitted in minibatches, or labels of a dimension that there is not.
        """
        groups = export(
            self,
            num_samples=num_samples,
            prior_samples=prior_samples,
            log_likelihood=log_likelihood,
            coords=coords or {},
            dims=dims or {},
            seed=self.seed if seed is None else seed,
            attrs=attrs or {},
        )
        return as_datatree(groups)

    @cached_property
    def _rows(self) -> tuple[list[Rows], list[str]]:
        return rows_of(self)
