r"""Are units independent of each other given the globals? One product of the Hessian with a random vector tells.

The blocks of an arrowhead are computed as if they were, and if they are not, nothing in them shows. But then the
product of the blocks with a vector is not that of the Hessian, which one reverse pass gives, whatever its structure.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_amort.autodiff.information import ArrowheadBlocks, FirstDerivatives, first_derivatives
from laplace_amort.autodiff.points import fixed_normal
from laplace_amort.errors import InformationError, StructureError
from laplace_amort.types import Density

__all__ = ["as_one_unit", "check_structure"]

# What a product may be off, relative to the sum of absolute values: rounding error to this power.
_SHARE = 0.4


def check_structure(
    log_joint: Density,
    global_: Tensor,
    local: Tensor,
    blocks: ArrowheadBlocks | None = None,
    names: Sequence[str] | None = None,
) -> None:
    r"""Check that the Hessian of a log joint is the arrowhead of its blocks: one product with a random vector.

    It sees the couplings that there are at this point, down to a share of ``eps ** 0.4`` of the curvature (5e-7 in
    float64). Do not rely on it at a point of symmetry, where the second derivative of a coupling may vanish. It costs
    one pass more than :func:`arrowhead_information`; once, at set-up, is enough. The random vector is always the same,
    and the state of torch's generators is left alone.

    :param log_joint: as in :func:`arrowhead_information`, which lists what else is raised.
    :param Tensor global_: ``(d,)``.
    :param Tensor local: ``(N, k)``.
    :param ArrowheadBlocks blocks: those at this point, if they are at hand.
    :param names: the site that each of the ``k`` coordinates of a unit belongs to.
    :raises StructureError: naming two units that are coupled, and by which coordinates.
    :raises InformationError: if the Hessian is not symmetric, because a backward somewhere is wrong.

    Example: a random walk has no units::

        >>> import torch
        >>> walk = lambda mu, y: -((y[0] - mu) ** 2).sum() - ((y[1:] - y[:-1]) ** 2).sum()
        >>> try:
        ...     check_structure(walk, torch.zeros(1), torch.zeros(3, 1), names=["state"])
        ... except StructureError as error:
        ...     print(str(error).partition(", so")[0])
        units are not independent of each other given the globals: 'state' of unit 0 and 'state' of unit 1 have a second
        derivative of 2 (3 of 3 units are coupled, by 'state')
    """
    with torch.no_grad():
        slopes = first_derivatives(log_joint, global_, local)
        blocks = slopes.blocks() if blocks is None else blocks
        vector = fixed_normal(global_, 1), fixed_normal(local, 2)
        actual, expected = slopes.product(vector), _product(blocks, vector)
        # Rounding errors are relative to sums of absolute values.
        size = _product([block.abs() for block in blocks], [part.abs() for part in vector])
        share = torch.finfo(local.dtype).eps ** _SHARE
        wrong = ~((actual[1] - expected[1]).abs() <= share * (size[1] + size[1].mean(0)))
        if wrong.any():
            _raise_coupled(slopes, wrong, names)
        if not ((actual[0] - expected[0]).abs() <= share * size[0]).all():
            raise InformationError(
                "the Hessian of log_joint is not symmetric: differentiating first by global_ and then by local gives "
                "another result than the other way round. Is there a Function whose backward is wrong?"
            )


def _product(blocks: Sequence[Tensor], vector: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The product of an arrowhead with a vector, ``(d,)`` and ``(N, k)``."""
    (head, border, tail), (v_global, v_local) = blocks, vector
    in_global = head @ v_global + (border * v_local.unsqueeze(-1)).sum((0, 1))
    return in_global, border @ v_global + (tail @ v_local.unsqueeze(-1)).squeeze(-1)


def _raise_coupled(slopes: FirstDerivatives, wrong: Tensor, names: Sequence[str] | None) -> None:
    """Name the first unit that is coupled, and the one that it is coupled to most."""
    num_units, local_dim = wrong.shape
    names = [f"coordinate {j}" if names is None else f"'{names[j]}'" for j in range(local_dim)]
    unit = int(wrong.any(1).nonzero()[0])
    others = slopes.product((torch.zeros_like(slopes.global_), fixed_normal(slopes.local, 2) * _one(wrong, unit)))[1]
    others[unit] = 0
    partner, other = divmod(int(others.abs().argmax()), local_dim)
    if others[partner, other] == 0:
        raise StructureError(
            f"the blocks are not those of log_joint at this point: unit {unit} disagrees. Leave them out, or take them "
            "anew:\n    blocks = arrowhead_information(log_joint, global_, local)"
        )
    row = slopes.product((torch.zeros_like(slopes.global_), _one(wrong, partner, other).to(slopes.local)))[1][unit]
    one = int(row.abs().argmax())
    where = ", ".join(dict.fromkeys(names[j] for j in wrong.any(0).nonzero().squeeze(-1).tolist()))
    raise StructureError(
        f"units are not independent of each other given the globals: {names[one]} of unit {unit} and {names[other]} of "
        f"unit {partner} have a second derivative of {-float(row[one]):.4g} ({int(wrong.any(1).sum())} of {num_units} "
        f"units are coupled, by {where}), so the information is no block arrowhead. Sample what couples them outside "
        f"of the plate of the units, where it is global. {as_one_unit(wrong.numel())}"
    )


def as_one_unit(number: int) -> str:
    """Say how a chain or a field is written so that it is fitted, and what that costs.

    :param int number: of its elements.
    """
    return (
        "A chain or a field, whose elements depend on each other, is one unit in a plate of size 1. That takes a dense "
        f"matrix of its {number} elements in every step: seconds for up to a hundred of them, minutes for several "
        "hundred. Of a random walk:\n"
        "    with pyro.plate('one', 1):\n"
        f"        e = pyro.sample('e', dist.Normal(0., 1.).expand([{number}]).to_event(1))\n"
        "        walk = sd.unsqueeze(-1) * e.cumsum(-1)\n"
        "        # of a field: pyro.sample('field', dist.MultivariateNormal(mean, covariance))\n"
        "        pyro.sample('data', dist.Poisson(walk.exp()).to_event(1), obs=data)\n"
        "    fit(model, *args, objective=MarginalLaplace())"
    )


def _one(like: Tensor, *index: int) -> Tensor:
    """True at one index, or in one row, of what is false."""
    mask = torch.zeros_like(like, dtype=torch.bool)
    mask[index] = True
    return mask
