"""Latents of units of which neither data nor prior say anything: their density is the same wherever they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from laplace_amort.autodiff import local_information, nearby
from laplace_amort.errors import NUMERICAL_ERRORS

if TYPE_CHECKING:
    from laplace_amort.guide.problem import Problem

__all__ = ["FlatLatent", "find_flat_latent"]

# How far from the first start it is looked, and how often.
_BESIDE = (0.3, 1.0)


class FlatLatent(NamedTuple):
    """A latent of a unit that the density does not depend on.

    :param str site: its site.
    :param str unit: the first unit of which it is one, in words.
    :param int number: of units with a latent like that.
    :param int of: units that there are.

    ``str(flat)`` is what a user reads.
    """

    site: str
    unit: str
    number: int
    of: int

    def __str__(self) -> str:
        return (
            f"neither data nor prior say anything of '{self.site}' in {self.unit}, nor in {self.number} of {self.of} "
            "units in all, so there is no mode of it. Is its prior hidden by a mask, with its data? Let the mask be "
            "that of the data alone; or give it a proper prior:\n"
            f"    {self.site} = pyro.sample('{self.site}', dist.Normal(0., 1.))\n"
            "    with poutine.mask(mask=seen):\n        pyro.sample(..., obs=data)"
        )


@torch.no_grad()
def find_flat_latent(problem: Problem) -> FlatLatent | None:
    """Look for latents of units on which the log joint does not depend: first and second derivatives are zero.

    :param Problem problem: the model at its data.
    """
    model, memory = problem.unit_model, problem.memory()
    flat = None
    try:
        problem.recall()
        for i, share in enumerate(_BESIDE):
            globals_ = nearby(problem.first_loc, share, 2 * i)
            locals_ = nearby(problem.start_at(problem.first_loc), share, 2 * i + 1)
            gradient, tail = local_information(model.log_joint, globals_, locals_)
            here = (gradient == 0) & (tail == 0).all(-1)
            flat = here if flat is None else flat & here
    except NUMERICAL_ERRORS:
        return None
    finally:
        problem.recall(memory)
    if flat is None or not flat.any():
        return None
    unit, element = (int(index) for index in flat.nonzero()[0])
    site = model.layout.local_elements()[element].partition("[")[0]
    return FlatLatent(site, model.describe(unit), int(flat.any(1).sum()), len(flat))
