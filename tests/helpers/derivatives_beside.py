"""Derivatives at a point beside those of the points around it: a kink, a jump, or a formula of its own shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from helpers.distributions import Row

ORDERS = 4
STEP = 1e-3
TOLERANCE = 1e-5  # of a derivative, or of one; torch's trigamma is off by 1e-9, of which differences make 4e-6


def derivatives(function: Callable[[Tensor], Tensor], at: float, orders: int = ORDERS) -> Tensor:
    """The value and so many derivatives of a function of one number, by autograd."""
    x = torch.tensor(at, requires_grad=True)
    found = [function(x)]
    for _ in range(orders):
        (slope,) = torch.autograd.grad(found[-1], x, create_graph=True, materialize_grads=True)
        found.append(slope if slope.requires_grad else slope + 0 * x)
    return torch.stack([value.detach().reshape(()) for value in found])


def faults(function: Callable[[Tensor], Tensor], at: float = 0.0) -> dict[int, float]:
    """The orders of derivatives that are not the slopes of the order below them, each with its error."""
    here = derivatives(function, at)[1:]
    near, far = (
        (derivatives(function, at + step, ORDERS - 1) - derivatives(function, at - step, ORDERS - 1)) / (2 * step)
        for step in (STEP, 2 * STEP)
    )
    errors = (here - (4 * near - far) / 3).abs() / here.abs().clamp(min=1.0)
    return {order: float(error) for order, error in enumerate(errors, 1) if not error < TOLERANCE}


def faults_of_row(row: Row, dressed: Callable[[object], object]) -> dict[str, set[int]]:
    """The faults of a distribution by parameter, at its own parameters, at unconstrained zeros, and at one zero each.

    :param row: of the table.
    :param dressed: what its densities are taken from.
    """
    row = replace(row, make=lambda make=row.make, **params: dressed(make(**params)))
    points = row.unconstrained()
    names = [*row.params, *["value"] * row.latent]
    places = [points, [torch.zeros_like(point) for point in points]]
    places += [[torch.zeros_like(p) if p is zero else p for p in points] for zero in points]
    found: dict[str, set[int]] = {}
    for place in places:
        for at, name in enumerate(names):
            generator = torch.Generator().manual_seed(1)
            direction = torch.randn(place[at].shape, generator=generator) if place[at].numel() > 1 else 1.0

            def along(x: Tensor, place=place, at=at, direction=direction) -> Tensor:
                return row.log_joint(*place[:at], place[at] + x * direction, *place[at + 1 :])

            wrong = faults(along)
            if wrong:
                found.setdefault(name, set()).update(wrong)
    return found
