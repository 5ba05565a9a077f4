"""Rounding errors of a log joint, measured: the models that compute in fewer digits than their arguments have."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from laplace_amort.autodiff import nearby
from laplace_amort.errors import NUMERICAL_ERRORS

if TYPE_CHECKING:
    from laplace_amort.guide.problem import Problem

__all__ = ["Coarseness", "find_coarseness"]

# The order of differences, which take what is smooth away, and steps between the points.
_ORDER, _STEPS = 6, (1e-6, 1e-4)
# Rounding errors of a density in its own digits are below this many of its last.
_SOME = 1e3


class Coarseness(NamedTuple):
    """Rounding errors of a log joint that are far above those of its arguments.

    :param float noise: standard deviation of the log joint by rounding.
    :param float expected: what it would be in the digits of the arguments.
    :param str site: the first whose density has fewer digits than the latents; empty if none has.

    ``str(coarseness)`` is what a user reads.
    """

    noise: float
    expected: float
    site: str

    def __str__(self) -> str:
        where = f" (the density of site '{self.site}' is in float32)" if self.site else ""
        return (
            f"the log joint has rounding errors of {self.noise:.1g}, where those of its arguments are "
            f"{self.expected:.0e}{where}: too coarse to tell a better point from a worse. Does the model make float32 "
            "of something? Leave that out, and let it compute in the dtype of its latents:\n"
            "    x = x.double()                 # for x.float()\n    torch.set_default_dtype(torch.float64)"
        )


@torch.no_grad()
def find_coarseness(problem: Problem) -> Coarseness | None:
    """Measure the rounding errors of the log joint by differences of high order, where the globals stand.

    :param Problem problem: the model at its data.

    Reference: Moré & Wild (2011), *Estimating computational noise*, SIAM Journal on Scientific Computing 33(3).
    """
    loc, local = problem.loc, problem.start
    if not len(loc):
        return None
    direction = nearby(torch.zeros_like(loc), 1.0, 3)
    share = math.comb(2 * _ORDER, _ORDER) ** -0.5
    found = []
    try:
        for step in _STEPS:
            points = loc + step * torch.arange(2.0 * _ORDER + 1).to(loc).unsqueeze(-1) * direction
            values = problem.values(points, local.expand(len(points), *local.shape))
            differences = values
            for _ in range(_ORDER):
                differences = differences.diff()
            found.append(share * float(differences.square().mean().sqrt()))
    except NUMERICAL_ERRORS:
        return None
    expected = torch.finfo(loc.dtype).eps * (1 + float(values.abs().max()))
    noise = max(found)
    if not (math.isfinite(noise) and noise > _SOME * expected):
        return None
    terms = problem.unit_model.flat_terms(loc, local)
    coarse = [term.name for term in terms if torch.finfo(term.values.dtype).bits < torch.finfo(loc.dtype).bits]
    return Coarseness(noise, expected, coarse[0] if coarse else "")
