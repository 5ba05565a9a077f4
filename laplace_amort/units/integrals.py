r"""The conditionals of the units at many globals at once: modes, curvatures, and integrals around them.

.. math:: M_i(\theta) = \log \int e^{h_i(\theta, y_i)} dy_i \approx
          \log|T_i| + \log \sum_q p_q \frac{e^{h_i(\theta, \hat y_i + T_i \epsilon_q)}}{\pi(\epsilon_q)}, \qquad
          T_i T_i^\top = U_i^{-1},

with the points of a :class:`~laplace_amort.units.QuadratureRule` moved to the mode :math:`\hat y_i(\theta)` and scaled
by the curvature there, at each :math:`\theta`. The gradient is that of the sum as it is computed, not of what it
approximates: it knows that points move and how.

References: Pinheiro & Bates (1995), *Approximations to the log-likelihood function in the nonlinear mixed-effects
model*, Journal of Computational and Graphical Statistics 4(1), for the adaptive rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from laplace_amort.autodiff import SeparableDensity, local_information
from laplace_amort.linalg import blocks
from laplace_amort.units.modes import NewtonMode
from laplace_amort.units.newton import ModeStatus
from laplace_amort.units.quadrature import QuadraturePoints, QuadratureRule

__all__ = ["Conditionals", "Integrals", "Reduction", "UnitIntegrals", "UnitMoments", "unit_moments"]

# Newton decrement at which a search ends where points surround the mode: they need not do so exactly.
_LOOSE = 1e-2
# Steps after which globals whose units are all found leave the search, so that the others go on alone; twice as many
# the next time.
_ROUND = 1
# Newton decrement up to which a step that was not tried yet may be where the next round starts.
_NEAR = 1.0
# Dimensions of a unit up to which products with its factor are sums, and no calls of a library for each.
_UNROLLED = 4
# What the passes back of one evaluation of Newton's method take, as a multiple of the memory of a value.
_PASSES = 5

# From the values (S, Q, N) at the points of a rule to one number of each unit, (S, N).
Reduction = Callable[[QuadraturePoints, Tensor], Tensor]


class Conditionals(NamedTuple):
    """The conditionals of ``N`` units at ``S`` globals.

    :param Tensor mode: ``(S, N, k)``.
    :param Tensor scale_tril: :math:`T`, ``(S, N, k, k)``.
    :param Tensor found: whether the mode was, bool, ``(S, N)``; where not, the rest means nothing.
    """

    mode: Tensor
    scale_tril: Tensor
    found: Tensor

    def at(self, points: Tensor) -> Tensor:
        """Return the images of standardized points ``(Q, k)`` or ``(S, Q, N, k)``, as ``(S, Q, N, k)``."""
        if points.dim() == 2 and points.shape[-1] > _UNROLLED:
            return self.mode.unsqueeze(1) + (points @ self.scale_tril.mT).movedim(-2, 1)
        points = points.unsqueeze(-2) if points.dim() == 2 else points
        return self.mode.unsqueeze(1) + (self.scale_tril.unsqueeze(1) * points.unsqueeze(-2)).sum(-1)

    def log_det(self) -> Tensor:
        r"""Return :math:`\log|T|`, ``(S, N)``."""
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)


class Integrals(NamedTuple):
    """A marginal log density at ``S`` globals.

    :param Tensor values: ``(S,)``; NaN where a mode was not found.
    :param Tensor gradients: ``(S, d)``; empty if none were asked for.
    :param Tensor mode: of the units there, ``(S, N, k)``.
    :param Tensor lost: whether a unit's mode was not found, bool, ``(S, N)``.
    """

    values: Tensor
    gradients: Tensor
    mode: Tensor
    lost: Tensor


@dataclass(frozen=True)
class UnitIntegrals:
    """The marginal log density of the globals, unit by unit.

    :param SeparableDensity density: the model.
    :param NewtonMode mode: how the modes are found. By default as far as rounding errors allow.

    Do not use it for units whose conditionals have several modes: it knows of the one that is nearest to the start.
    """

    density: SeparableDensity = field(repr=False)
    mode: NewtonMode = NewtonMode()

    def loose(self) -> UnitIntegrals:
        """Return the same for points that surround a mode, but not exactly: fewer steps of the search for it."""
        return dataclasses.replace(self, mode=dataclasses.replace(self.mode, tolerance=_LOOSE))

    def limited(self, max_steps: int) -> UnitIntegrals:
        """Return the same with fewer steps of the search for modes, where not all need be found."""
        return dataclasses.replace(self, mode=dataclasses.replace(self.mode, max_steps=max_steps))

    def conditionals(self, globals_: Tensor, start: Tensor) -> Conditionals:
        """Find modes and curvatures, attached to the globals where gradients are enabled.

        :param Tensor globals_: ``(S, d)``.
        :param Tensor start: a guess of the modes, ``(S, N, k)``.
        """
        if not (torch.is_grad_enabled() and globals_.requires_grad):
            return self._constants_in_chunks(globals_.detach(), start)
        log_joint = self.density.sum_of_units
        result = self.mode.search(start.dtype)(log_joint, globals_, start.flatten(0, 1))
        # One Newton step with the curvature as a constant: it has the derivative of the mode.
        mode = result.at.local + blocks.cholesky_solve(result.gradient.unsqueeze(-1), result.at.factor).squeeze(-1)
        scale, failed = blocks.scale_tril(local_information(log_joint, globals_, mode)[1])
        return _conditionals(len(globals_), mode, scale, (result.status == ModeStatus.CONVERGED) & ~failed)

    def _constants_in_chunks(self, globals_: Tensor, start: Tensor) -> Conditionals:
        chunk = self.density.chunk(_PASSES)
        parts = [self._constants(*some) for some in zip(globals_.split(chunk), start.split(chunk), strict=True)]
        return parts[0] if len(parts) == 1 else Conditionals(*map(torch.cat, zip(*parts, strict=True)))

    def _constants(self, globals_: Tensor, start: Tensor) -> Conditionals:
        """Find the conditionals without a graph; globals leave the search as soon as all of their units are found."""
        steps = min(_ROUND, self.mode.max_steps)
        there, left = self._round(steps, globals_, start)
        num_steps = steps
        while num_steps < self.mode.max_steps and left.numel():
            steps = min(2 * steps, self.mode.max_steps - num_steps)
            rest, still = self._round(steps, globals_[left], there.mode[left])
            there = Conditionals(*(part.index_copy(0, left, new) for part, new in zip(there, rest, strict=True)))
            num_steps, left = num_steps + steps, left[still]
        return there

    def _round(self, max_steps: int, globals_: Tensor, start: Tensor) -> tuple[Conditionals, Tensor]:
        """Search for so many steps; the second value is the globals at which more of them may find more, by index."""
        result = self.mode.search(start.dtype, max_steps)(self.density.sum_of_units, globals_, start.flatten(0, 1))
        # The curvature at the last point of the search is that at the mode, within the tolerance.
        found = (result.status == ModeStatus.CONVERGED) & result.at.concave
        moves = found | (result.at.concave & (result.at.decrement < _NEAR))
        mode = result.at.local + result.at.step * moves.unsqueeze(-1)
        there = _conditionals(len(globals_), mode, blocks.covariance_tril(result.at.factor), found)
        under_way = (result.status == ModeStatus.MAX_STEPS) | (result.status == ModeStatus.STALLED)
        return there, under_way.unflatten(0, (len(globals_), -1)).any(-1).nonzero().squeeze(-1)

    @torch.no_grad()
    def values(self, points: QuadraturePoints, reduce: Reduction, globals_: Tensor, start: Tensor) -> Integrals:
        """Return the marginal log density.

        :param QuadraturePoints points: of a rule.
        :param reduce: what makes one number of the values at the points of a unit.
        :param Tensor globals_: ``(S, d)``.
        :param Tensor start: a guess of the modes, ``(S, N, k)``.
        """
        return self.values_given(self.conditionals(globals_, start), points, reduce, globals_)

    @torch.no_grad()
    def values_given(
        self, there: Conditionals, points: QuadraturePoints, reduce: Reduction, globals_: Tensor
    ) -> Integrals:
        """Return the marginal log density where the conditionals are known; see :meth:`values`.

        :param Conditionals there: at these globals.
        """
        units = self.units_reduced(globals_, there, points, reduce) + there.log_det()
        total = units.sum(-1) + self.density.shared_at(globals_, there.mode[0])
        return Integrals(_where_found(total, there), globals_[:0], there.mode, ~there.found)

    def units_reduced(
        self, globals_: Tensor, there: Conditionals, points: QuadraturePoints, reduce: Reduction
    ) -> Tensor:
        """Reduce the terms of the units at the points of a rule to one number each, as ``(S, N)``.

        :param Tensor globals_: ``(S, d)``.
        :param Conditionals there: at these globals.
        :param QuadraturePoints points: of the rule.
        :param reduce: as in :meth:`values`.
        """
        chunk = self.density.chunk(len(points.points))
        pieces = zip(globals_.split(chunk), *(part.split(chunk) for part in there), strict=True)
        return torch.cat([reduce(points, self.units_at(some, Conditionals(*at), points)) for some, *at in pieces])

    def values_and_gradients(
        self, points: QuadraturePoints, reduce: Reduction, globals_: Tensor, start: Tensor
    ) -> Integrals:
        """Return the marginal log density and its exact gradient; see :meth:`values`."""
        return self._in_chunks(self._values_and_gradients, points, reduce, globals_, start)

    def _in_chunks(
        self,
        compute: Callable[..., Integrals],
        points: QuadraturePoints,
        reduce: Reduction,
        globals_: Tensor,
        start: Tensor,
    ) -> Integrals:
        chunk = self.density.chunk(len(points.points))
        split = zip(globals_.split(chunk), start.split(chunk), strict=True)
        parts = [compute(points, reduce, *some) for some in split]
        return parts[0] if len(parts) == 1 else Integrals(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def units_at(self, globals_: Tensor, there: Conditionals, points: QuadraturePoints) -> Tensor:
        """Evaluate the terms of the units at the points of a rule, as ``(S, Q, N)``, in chunks of these.

        :param Tensor globals_: ``(S, d)``.
        :param Conditionals there: at these globals.
        :param QuadraturePoints points: of the rule.
        """
        chunks = self._chunks(points, len(globals_))
        return torch.cat([self.density.units_at(globals_, there.at(some)) for some in chunks], dim=1)

    def _chunks(self, points: QuadraturePoints, num_globals: int) -> tuple[Tensor, ...]:
        return points.points.split(max(1, self.density.chunk() // num_globals))

    def _values_and_gradients(
        self, points: QuadraturePoints, reduce: Reduction, globals_: Tensor, start: Tensor
    ) -> Integrals:
        r"""The same with gradients, in which the nodes :math:`x_q = \hat y(\theta) + T(\theta) \epsilon_q` move.

        With :math:`r` for what is reduced of the values at the nodes, summed over the units,

        .. math:: \frac{d}{d\theta} r(\theta, x(\theta)) = \frac{\partial r}{\partial \theta} + \sum_q
                  \frac{\partial r}{\partial x_q} \cdot \frac{d}{d\theta} \big( \hat y + T \epsilon_q \big).

        The partial derivatives come first, chunk by chunk; as constants they are then the weights of a sum of nodes,
        and one pass back through that, through modes and scales, has all the rest.
        """
        with torch.enable_grad():
            theta = globals_.detach().requires_grad_()
            there = self.conditionals(theta, start)
            values, in_globals, in_nodes = self._partial(theta.detach(), there, points, reduce)
            log_det, shared = there.log_det(), self.density.shared_at(theta, start[0])
            rest = log_det.sum() + shared.sum() + _weighted_nodes(in_nodes, there, points)
            gradients = in_globals
            if theta.numel() and rest.requires_grad:
                gradients = gradients + torch.autograd.grad(rest, theta, materialize_grads=True)[0]
        total = (values + log_det.detach()).sum(-1) + shared.detach()
        return Integrals(_where_found(total, there), gradients.detach(), there.mode.detach(), ~there.found)

    def _partial(
        self, globals_: Tensor, there: Conditionals, points: QuadraturePoints, reduce: Reduction
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reduce to one number for each unit ``(S, N)``, and differentiate their sum in globals and nodes.

        A reduction takes the values at all points at once, while memory may hold the graph of one chunk of them only.
        So if there are several, each is evaluated twice: first for its values, and again, now that the derivatives of
        the reduction are known, for its graph.
        """
        there = Conditionals(*(part.detach() for part in there))
        chunks = self._chunks(points, len(globals_))
        only = self._graph(globals_, there.at(chunks[0])) if len(chunks) == 1 else None
        with torch.no_grad():
            values = only[2].detach() if only else self.units_at(globals_, there, points)
        values.requires_grad_()
        reduced = reduce(points, values)
        (weights,) = torch.autograd.grad(reduced.sum(), values)
        in_globals, in_nodes = torch.zeros_like(globals_), []
        for some, weight in zip(chunks, weights.split([len(some) for some in chunks], dim=1), strict=True):
            theta, nodes, at_nodes = only or self._graph(globals_, there.at(some))
            found = torch.autograd.grad(at_nodes, (theta, nodes), weight, materialize_grads=True)
            in_globals = in_globals + found[0]
            in_nodes.append(found[1])
        return reduced.detach(), in_globals, torch.cat(in_nodes, dim=1)

    def _graph(self, globals_: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        theta, nodes = globals_.detach().requires_grad_(), nodes.detach().requires_grad_()
        return theta, nodes, self.density.units_at(theta, nodes)


def _weighted_nodes(weights: Tensor, there: Conditionals, points: QuadraturePoints) -> Tensor:
    r"""Return :math:`\sum_q w_q \cdot (\hat y + T \epsilon_q)`, summed over globals and units.

    Over the points first, so that the graph holds nothing of the size of all nodes.

    :param Tensor weights: constants, ``(S, Q, N, k)``.
    """
    of_scale = (weights.unsqueeze(-1) * points.points[:, None, None, :]).sum(1)
    return (weights.sum(1) * there.mode).sum() + (of_scale * there.scale_tril).sum()


def _conditionals(num_globals: int, mode: Tensor, scale: Tensor, found: Tensor) -> Conditionals:
    shape = num_globals, -1
    return Conditionals(mode.unflatten(0, shape), scale.unflatten(0, shape), found.unflatten(0, shape))


def _where_found(values: Tensor, there: Conditionals) -> Tensor:
    return values.masked_fill(~there.found.all(-1), torch.nan)


class UnitMoments(NamedTuple):
    """Moments of the units in conditional standard deviations from the mode, coordinate by coordinate.

    :param Tensor mean: ``(N, k)``; 0 if normal.
    :param Tensor sd: ``(N, k)``; 1 if normal.
    :param Tensor skewness: ``(N, k)``; 0 if normal.
    """

    mean: Tensor
    sd: Tensor
    skewness: Tensor


@torch.no_grad()
def unit_moments(integrals: UnitIntegrals, there: Conditionals, global_: Tensor, rule: QuadratureRule) -> UnitMoments:
    """Return moments of all units at globals ``(d,)``, by a rule.

    :param UnitIntegrals integrals: of the model.
    :param Conditionals there: at these globals, one set.
    :param Tensor global_: ``(d,)``.
    :param QuadratureRule rule: how to integrate.
    """
    points = rule.points(there.mode.shape[-1], global_)
    z = points.points.unsqueeze(1)  # (Q, 1, k)
    weights = points.log_weights(integrals.units_at(global_[None], there, points)[0]).exp().unsqueeze(-1)  # (Q, N, 1)
    mean = (weights * z).sum(0)
    sd = (weights * (z - mean) ** 2).sum(0).clamp(min=torch.finfo(z.dtype).tiny).sqrt()
    skewness = (weights * ((z - mean) / sd) ** 3).sum(0)
    return UnitMoments(mean, sd, skewness)
