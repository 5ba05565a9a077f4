r"""Scales that ran to zero, with what they are the scales of: effects in a plate beside that of the units.

Units are integrated over, globals are not. So where the globals hold a scale and its own effects, as of a second plate,
what is maximized is the joint density of both: of :math:`n` effects :math:`b_j \sim N(0, \tau^2)` it has a factor
:math:`\tau^{-n}`, which grows without end, or up to a peak of no volume, as scale and effects go to zero together.
There, all that is known of the effects is their prior, and integrating over them would take the scale far away.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from laplace_amort.autodiff import arrowhead_information
from laplace_amort.errors import NUMERICAL_ERRORS
from laplace_amort.guide.problem import Problem
from laplace_amort.types import Vector

__all__ = ["Collapse", "find_collapse"]

# Exponent with which the information of a prior grows with what may be its scale: 2 for a standard deviation on the
# logarithmic scale, 1 for a variance.
_GROWS = 0.5
# Share of the information of the effects that is their prior's, from which on the data say nothing of them; it is
# below a half where the joint density of a scale and its effects has a peak of its own.
_NOTHING = 0.9
# The same of units, up to which the joint density of a scale and its effects has a peak of its own: of normal ones.
_KNOWN = 0.25
# Standard deviations of the scale that integrating over the effects would move it by.
_FAR = 3.0


class Collapse(NamedTuple):
    """A scale that ran to zero with its effects.

    :param str scale: name of the element.
    :param float value: of it, constrained.
    :param str effects: the site of which it is the scale.
    :param int number: of these effects.
    :param str plate: that they lie in; empty if in none.
    :param tuple children: how many units belong to each of the effects, where each unit belongs to one; else empty.
    :param bool units_are_known: whether the data say so much of each unit that its latents, as globals, would have a
        mode with their scale.
    :param str unit_plate: the plate of the units.
    :param str unit_site: the first site of the units.

    ``str(collapse)`` is what a user reads: what happened, and the lines to type.
    """

    scale: str
    value: float
    effects: str
    number: int
    plate: str
    children: tuple[int, ...]
    units_are_known: bool
    unit_plate: str
    unit_site: str

    def __str__(self) -> str:
        said = (
            f"{self.scale} ran to {self.value:.2g} together with the {self.number} elements of '{self.effects}', of "
            "which it is the scale. These are globals, which are not integrated over, and their joint density has its "
            "peak, or no end, where scale and elements are zero"
        )
        return f"{said}. {self._nested() if self.children else self._crossed()}"

    def _nested(self) -> str:
        most = max(self.children)
        each = f"{most} each" if min(self.children) == most else f"up to {most} each; mask the data that are not there"
        return (
            f"Each unit of '{self.unit_plate}' belongs to one of these elements: let them be the units, and integrated "
            f"over, with a plate inside ({each}):\n"
            f"    with pyro.plate('{self.plate or self.effects}', {self.number}, dim=-2):\n"
            f"        {self.effects} = pyro.sample('{self.effects}', ...)\n"
            f"        with pyro.plate('{self.unit_plate}', {most}, dim=-1):\n"
            f"            {self.unit_site} = pyro.sample('{self.unit_site}', ...)   # of shape "
            f"({self.number}, {most})"
        )

    def _crossed(self) -> str:
        scaled = (
            "write them as multiples of their scale, and take the ELBO, which knows how far they spread:\n"
            f"    {self.effects} = {self.scale} * pyro.sample('{self.effects}', dist.Normal(0., 1.))"
            f"   # for dist.Normal(0., {self.scale})\n"
            "    fit(model, *args, objective=FixedDrawELBO())"
        )
        if not (self.plate and self.units_are_known):
            return f"W{scaled[1:]}"
        return (
            f"The data say enough of each of the '{self.unit_plate}' for these to be globals, so let '{self.plate}' be "
            f"the units:\n    fit(model, *args, guide=AutoLaplaceFamily(model, unit_plate='{self.plate}'))\n"
            f"Or {scaled}"
        )


@torch.no_grad()
def find_collapse(problem: Problem, point: Vector, information: Vector | None = None) -> Collapse | None:
    """Return the scale that ran to zero where a maximization ended; None if none did.

    Do not use it for scales of the units: these are integrated over.

    :param Problem problem: the model at its data.
    :param Vector point: where it ended, the globals first, ``(P,)``.
    :param Vector information: minus the second derivative there of what was maximized, ``(d, d)``; by default, that of
        the joint density.
    """
    sites = problem.unit_model.layout.global_sites
    if not any(site.shape.numel() > 1 for site in sites.values()):
        return None
    globals_ = torch.from_numpy(point[: len(problem.loc)]).to(problem.loc)
    try:
        return _collapsed(problem, globals_, _modes(problem, globals_), information)
    except NUMERICAL_ERRORS:
        return None


def _modes(problem: Problem, point: Tensor) -> Tensor:
    guess = problem.start_at(point)
    try:
        return problem.mode.find(problem.unit_model, point, guess)
    except NUMERICAL_ERRORS:
        return guess


def _collapsed(problem: Problem, point: Tensor, local: Tensor, information: Vector | None) -> Collapse | None:
    model, begin = problem.unit_model, 0
    blocks = arrowhead_information(model.log_joint, point, local)
    diagonal = blocks.head.diagonal()
    if information is not None and len(information) == len(point):
        diagonal = torch.from_numpy(information).diagonal().to(point)
    for name, site in model.layout.global_sites.items():
        where = slice(begin, begin + site.shape.numel())
        begin = where.stop
        prior, growth = _prior_information(problem, point, local, name, where)
        growth[where] = 0.0  # an element is no scale of its own
        scale = int(growth.abs().argmax())
        share = prior / diagonal[where]
        if len(share) < 2 or not growth.abs()[scale] > _GROWS or not share.mean() > _NOTHING:
            continue
        held = float(diagonal[scale])
        if share.sum() > _FAR * math.sqrt(max(held, 0.0)):
            value = torch.cat([part.reshape(-1) for part in _constrained(problem, point)])[scale]
            return Collapse(
                scale=problem.global_elements()[scale],
                value=float(value),
                effects=name,
                number=len(share),
                plate=site.plates[-1].name if site.plates else "",
                children=_children(blocks.border[..., where]),
                units_are_known=_prior_share_of_units(problem, point, local, blocks.tail) < _KNOWN,
                unit_plate=model.layout.frame.name,
                unit_site=next(iter(model.layout.local_sites)),
            )
    return None


def _constrained(problem: Problem, point: Tensor) -> list[Tensor]:
    """The values of the global sites, as many elements as the unconstrained ones where that is the same number."""
    sites = problem.unit_model.layout.global_sites
    values = problem.unit_model.constrain_global(point)
    raw = problem.unit_model.layout.global_to_sites(point)
    return [values[name] if values[name].numel() == raw[name].numel() else raw[name] for name in sites]


@torch.enable_grad()
def _prior_information(
    problem: Problem, point: Tensor, local: Tensor, name: str, where: slice
) -> tuple[Tensor, Tensor]:
    """Return what the prior of a site says of its elements ``(n,)``, and how its logarithm grows with globals ``(d,)``.

    Elements that depend on each other have the sums of the rows.
    """
    theta = point.clone().requires_grad_()
    own = [terms.values.sum() for terms in problem.unit_model.flat_terms(theta, local) if terms.name == name]
    value = torch.stack(own).sum()

    def derivative(of: Tensor) -> Tensor:
        if not of.requires_grad:
            return torch.zeros_like(theta)
        return torch.autograd.grad(of, theta, create_graph=True, materialize_grads=True)[0]

    prior = -derivative(derivative(value)[where].sum())[where]
    growth = derivative(prior.sum()) / prior.sum()
    return prior.detach(), growth.detach().nan_to_num(nan=0.0)


@torch.enable_grad()
def _prior_share_of_units(problem: Problem, point: Tensor, local: Tensor, tail: Tensor) -> float:
    """Return the share of the information of the units ``(N, k, k)`` that is their prior's, on average."""
    y = local.clone().requires_grad_()
    model = problem.unit_model
    own = [terms.values.sum() for terms in model.flat_terms(point, y) if terms.name in model.layout.local_sites]
    (gradient,) = torch.autograd.grad(torch.stack(own).sum(), y, create_graph=True)
    rows = [
        torch.autograd.grad(one.sum(), y, retain_graph=True)[0][:, j] if one.requires_grad else torch.zeros_like(one)
        for j, one in enumerate(gradient.unbind(1))
    ]
    return float((-torch.stack(rows, 1) / tail.diagonal(dim1=-2, dim2=-1)).mean())


def _children(border: Tensor) -> tuple[int, ...]:
    """How many units ``(N, k, n)`` belong to each of ``n`` effects, if each belongs to one and none has none."""
    coupled = (border != 0).any(1)
    if not bool((coupled.sum(1) == 1).all()):
        return ()
    counts = coupled.sum(0)
    return tuple(counts.tolist()) if bool((counts > 0).all()) and len(counts) < len(border) else ()
