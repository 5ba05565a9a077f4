r"""The log likelihood point by point, which leave-one-out is made of.

Two of them, and they answer different questions:

.. math:: \log p(z_i \mid \theta) = \log \int p(z_i \mid y_i, \theta)\, p(y_i \mid \theta)\, dy_i
          \qquad\text{and}\qquad \log p(z_{ij} \mid y_i, \theta).

The first leaves out a unit: how well is another unit predicted, of which nothing is known? The second leaves out an
observation and keeps what the rest says of its unit; where a unit has few observations, its importance weights have
tails that are too heavy.

Reference: Merkle, Furr & Rabe-Hesketh (2019), *Bayesian comparison of latent variable models: conditional versus
marginal likelihoods*, Psychometrika 84(3), https://arxiv.org/abs/1802.04452
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from laplace_amort.autodiff import at_points, record
from laplace_amort.errors import ModelError, ModeNotFoundError, RecordingError, StructureError
from laplace_amort.model import UnitModel
from laplace_amort.posterior.draws import PosteriorDraws
from laplace_amort.posterior.known import distinct_rows
from laplace_amort.posterior.unit_draws import NestedUnits, WeightedUnits
from laplace_amort.units import Laplace, QuadraturePoints, QuadratureRule, accurate_rule

__all__ = [
    "ConditionalLikelihood",
    "LogLikelihood",
    "MarginalLikelihood",
    "Pointwise",
    "rule_of",
    "unit_log_likelihood",
]


class Pointwise(NamedTuple):
    """Log likelihoods at ``S`` draws.

    :param Tensor values: ``(S, *batch)``.
    :param tuple plates: frames of the plates that the batch dimensions are those of.
    """

    values: Tensor
    plates: tuple[Any, ...]


@runtime_checkable
class LogLikelihood(Protocol):
    """Which log likelihood is written; any object with this method."""

    def evaluate(
        self, posterior: PosteriorDraws, names: list[str], globals_: Tensor, locals_: Tensor
    ) -> dict[str, Pointwise]:
        """Return log likelihoods by name.

        :param Posterior posterior: that the draws are of.
        :param list names: of the observed sites.
        :param Tensor globals_: ``(S, d)``, unconstrained.
        :param Tensor locals_: ``(S, N, k)``.
        """


@dataclass(frozen=True)
class MarginalLikelihood:
    r"""That of each unit, :math:`\log p(z_i \mid \theta)`, its latents integrated out.

    What ``loo`` needs to leave out a unit. It is one variable named ``marginal``, of the units alone.

    Do not use it where single observations are to be predicted for units that are known:
    :class:`ConditionalLikelihood`.

    :param QuadratureRule rule: how units are integrated over; by default as the fit does, so that the likelihood that
        is taken out is the one that went in. Of an ELBO, which integrates over none: nine points along each dimension,
        or beyond three dimensions 256 in all.

    Where the model scales or masks terms, the likelihood is that of what is left.
    """

    rule: QuadratureRule | None = None

    def evaluate(
        self, posterior: PosteriorDraws, names: list[str], globals_: Tensor, locals_: Tensor
    ) -> dict[str, Pointwise]:
        """See :class:`LogLikelihood`.

        :raises StructureError: if an observation depends on two units.
        :raises ModeNotFoundError: if a unit's mode was not found at some draw.
        """
        rule = self.rule or rule_of(posterior)
        try:
            units = _nested_units(posterior, rule)
        except StructureError as error:
            line = "to_arviz(log_likelihood=ConditionalLikelihood())"
            raise StructureError(f"{error}\nOr take the likelihood of each observation:\n    {line}") from error
        distinct, inverse = distinct_rows(globals_)
        values = unit_log_likelihood(units, rule, distinct)
        _refuse_lost_modes(values, distinct, posterior.gaussian.unit_model)
        return {"marginal": Pointwise(values[inverse], (posterior.gaussian.unit_model.layout.frame,))}


@dataclass(frozen=True)
class ConditionalLikelihood:
    r"""That of each observation given its unit, :math:`\log p(z_{ij} \mid y_i, \theta)`.

    One variable for each observed site, under its name. Terms that are scaled or masked in the model are so here.

    Do not use it to compare models of units with few observations each: it predicts an observation from draws that have
    seen it, and the weights that would undo that have heavy tails (a high k-hat of ``loo``).
    """

    @torch.no_grad()
    def evaluate(
        self, posterior: PosteriorDraws, names: list[str], globals_: Tensor, locals_: Tensor
    ) -> dict[str, Pointwise]:
        """See :class:`LogLikelihood`.

        :raises ModelError: if the model has no observed site.
        """
        model = posterior.gaussian.unit_model.live()
        found = [term for term in model.terms(globals_[0], locals_[0]) if term[0] in names]
        if not found:
            raise ModelError(
                "the model has no observed site, only factors, so that there are no single observations. Take the "
                "likelihood of each unit, or none:\n"
                "    to_arviz(log_likelihood=MarginalLikelihood())\n    to_arviz(log_likelihood=None)"
            )

        flat = _Rows(model, names) if model.points is None else _RowsAtOnce(model, names)
        rows = _at_draws(flat, globals_, locals_)
        parts = rows.split([values.numel() for _, _, values in found], dim=1)
        return {
            name: Pointwise(part.reshape(len(rows), *values.shape), plates)
            for (name, plates, values), part in zip(found, parts, strict=True)
        }


class _Rows:
    """The terms of some sites in one row.

    :param UnitModel model: not recorded.
    :param list names: of the sites.
    """

    def __init__(self, model: UnitModel, names: list[str]) -> None:
        self.model, self.names = model, names

    def __call__(self, global_: Tensor, local: Tensor) -> Tensor:
        """Evaluate at globals ``(d,)`` and units ``(N, k)``, as ``(n,)``."""
        terms = self.model.terms(global_, local)
        return torch.cat([values.reshape(-1) for name, _, values in terms if name in self.names])


class _RowsAtOnce(_Rows):
    """The same of a model that takes many points at once."""

    def __init__(self, model: UnitModel, names: list[str]) -> None:
        super().__init__(model, names)
        self.num_bytes = model.points.num_bytes if model.points else 0

    def at(self, globals_: Tensor, locals_: Tensor) -> Tensor:
        """Evaluate at globals ``(S, d)`` and units ``(S, N, k)``, as ``(S, n)``."""
        terms = self.model.terms_at(globals_, locals_)
        return torch.cat([values.flatten(1) for name, _, values in terms if name in self.names], dim=1)


def _refuse_lost_modes(values: Tensor, globals_: Tensor, model: UnitModel) -> None:
    """Refuse values ``(S, N)`` of which some are NaN."""
    if not values.isnan().any():
        return
    draw, unit = values.isnan().nonzero()[0].tolist()
    raise ModeNotFoundError(
        f"the mode of {model.describe(unit)} was not found at globals {globals_[draw].tolist()}, so that its "
        f"likelihood is not known ({int(values.isnan().any(0).sum())} units in all). See diagnose(result), or leave "
        "the likelihood out:\n    to_arviz(log_likelihood=None)",
        units=[int(model.units[unit])],
    )


def _nested_units(posterior: PosteriorDraws, rule: QuadratureRule) -> NestedUnits:
    """The units as the posterior knows them; of a Gaussian, as the rule does."""
    if isinstance(posterior.units, NestedUnits):
        return posterior.units
    gaussian = posterior.gaussian
    integrals = posterior.problem.integrals_of(gaussian.unit_model, gaussian.global_loc, gaussian.local_loc)
    return NestedUnits(gaussian, integrals) if isinstance(rule, Laplace) else WeightedUnits(gaussian, integrals, rule)


def rule_of(posterior: PosteriorDraws) -> QuadratureRule:
    """Return how a posterior integrates over units; of one that does not, a rule that is accurate for most models."""
    if isinstance(posterior.units, WeightedUnits):
        return posterior.units.rule
    if isinstance(posterior.units, NestedUnits) and not math.isnan(posterior.log_evidence):
        return Laplace()
    return accurate_rule(posterior.gaussian.local_loc.shape[1])


@torch.no_grad()
def unit_log_likelihood(units: NestedUnits, rule: QuadratureRule, globals_: Tensor) -> Tensor:
    r"""Return :math:`\log p(z_i \mid \theta)`, ``(S, N)``; NaN where a mode was not found.

    :param NestedUnits units: given the globals.
    :param QuadratureRule rule: how they are integrated over.
    :param Tensor globals_: ``(S, d)``.
    """
    there = units.conditionals(globals_)
    points = rule.points(there.mode.shape[-1], globals_)
    values = units.integrals.units_reduced(globals_, there, points, QuadraturePoints.log_integral)
    return (values + there.log_det()).masked_fill(~there.found, torch.nan)


def _at_draws(function: Callable[[Tensor, Tensor], Tensor], globals_: Tensor, locals_: Tensor) -> Tensor:
    """Evaluate a function of globals and units at all draws: as a recording, if it can be recorded."""
    with contextlib.suppress(RecordingError):  # draw by draw, then
        function = record(function, globals_[0], locals_[0])
    return at_points(function, globals_, locals_)
