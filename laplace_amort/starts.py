"""Where else to start a fit: where the first start leads nowhere, or to see whether there are several optima."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor
from torch.distributions.transforms import ComposeTransform, ExpTransform, IndependentTransform, Transform

from laplace_amort.target import Target

__all__ = ["other_starts", "positive", "random_starts"]

# By how much logarithms of positive globals are lowered. With small scales of a hierarchy, units have one mode each.
_LOWERED = 2.0


def other_starts(target: Target, start: Tensor) -> Iterator[Tensor]:
    """Yield starts for when a fit from one comes to nothing, nearest first.

    First the same with small scales: where the scale of a hierarchy is large, the conditional of a unit may have
    several modes, and the path of the fit leads past points where one ends. Then the images of zero.

    :param Target target: has the sites of the model.
    :param Tensor start: ``(d,)``.
    """
    marks = positive(target)
    if marks.any():
        for times in (1, 2):
            yield start - times * _LOWERED * marks
    yield -_LOWERED * marks.to(start)


def random_starts(target: Target, num_starts: int, seed: int) -> Iterator[Tensor]:
    """Yield starts ``(d,)`` by Pyro's ``init_to_uniform``: between -2 and 2 in unconstrained space, as Stan's.

    (A simplex has other coordinates here than there, so that its starts are not uniform.)

    :param Target target: has the sites of the model.
    :param int num_starts: how many.
    :param int seed: of their own; the state of torch's generator stays as it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        starts = [target.unit_model.start(init_to_uniform)[0] for _ in range(num_starts)]
    yield from starts


def positive(target: Target) -> Tensor:
    """Return which elements of the globals are logarithms, ``(d,)``, 1 or 0."""
    sites = target.unit_model.layout.global_sites.values()
    marks = [target.loc.new_full((site.shape.numel(),), float(_is_exp(site.transform))) for site in sites]
    return torch.cat(marks) if marks else target.loc.new_zeros(0)


def _is_exp(transform: Transform | None) -> bool:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    if isinstance(transform, ComposeTransform):
        return any(_is_exp(part) for part in transform.parts)
    return isinstance(transform, ExpTransform)
