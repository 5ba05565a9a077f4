r"""Observed information of many units, as the blocks of an arrowhead, in as many reverse passes as there are rows.

Units are independent of each other given the globals, so that in

.. math:: -\nabla^2_{(\theta, y)} f = \begin{pmatrix} G & C^\top \\ C & U \end{pmatrix}, \qquad
          f(\theta, y) = \log p(\theta, y, z),

:math:`U` is block diagonal. One pass back from each element of :math:`\nabla_\theta f` gives a row of :math:`G` and of
:math:`C^\top`; one pass back from the j-th element of :math:`\nabla_y f` in *all* units at once gives the j-th row of
every :math:`U_i`: together :math:`d + k` passes, and not :math:`d + N k`. Where in the model the observations are does
not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from laplace_amort.blocks import matvec
from laplace_amort.derivatives import (
    check_finite,
    check_values,
    differentiate,
    gradients,
    independent_copies,
    log_joint_at,
)
from laplace_amort.errors import InformationError, StructureError

__all__ = [
    "ArrowheadBlocks",
    "Slopes",
    "arrowhead_information",
    "check_structure",
    "local_curvature",
    "local_information",
    "reverse_passes",
    "slopes_at",
]

LogJoint = Callable[[Tensor, Tensor], Tensor]

_NAMES = ("argument 'global_'", "argument 'local' (a row for each unit)")

# Passes are made together while they bring back no more elements than this. Beyond, arithmetic takes longer than calls,
# and it is faster where memory is near.
_TOGETHER = 50_000

# What a product may be off, relative to the sum of absolute values: rounding error to this power.
_SHARE = 0.4


class ArrowheadBlocks(NamedTuple):
    """The blocks of an arrowhead.

    :param Tensor head: :math:`G`, symmetric, ``(d, d)``.
    :param Tensor border: :math:`C`, ``(N, k, d)``.
    :param Tensor tail: :math:`U`, symmetric, ``(N, k, k)``.
    """

    head: Tensor
    border: Tensor
    tail: Tensor


def arrowhead_information(log_joint: LogJoint, global_: Tensor, local: Tensor) -> ArrowheadBlocks:
    r"""Return the blocks of the negative Hessian of a log joint whose units are independent given the globals.

    Both arguments count as independent, as in :func:`~laplace_amort.observed_information`, the dense one for few units:
    the Hessian never sees :math:`\partial\hat y/\partial\hat\theta`, while derivatives of the blocks flow back into
    both.

    Do not use it where :func:`check_structure` has not passed: if units are coupled, what it returns is wrong, and
    nothing shows.

    :param log_joint: a function of ``global_`` and ``local`` that returns a scalar tensor.
    :param Tensor global_: :math:`\theta`, ``(d,)``.
    :param Tensor local: :math:`y`, ``(N, k)``, a row for each unit.
    :return: ``head (d, d)``, ``border (N, k, d)`` and ``tail (N, k, k)``, differentiable to any order where gradients
        are enabled, and without a graph under ``no_grad``.
    :raises InformationError: as :func:`~laplace_amort.observed_information`; the message names the argument, and the
        index of the first unit that is not finite.
    :raises ValueError: if an argument has another number of dimensions.
    :raises TypeError: if an argument is not a real floating-point tensor.

    Example: :math:`\mu \sim N(0, 1)`, and :math:`y_i \sim N(\mu, 1/\sqrt{2})` for two units::

        >>> import torch
        >>> log_joint = lambda mu, y: -(mu ** 2).sum() / 2 - ((y - mu) ** 2).sum()
        >>> head, border, tail = arrowhead_information(log_joint, torch.zeros(1), torch.zeros(2, 1))
        >>> head.item(), border.flatten().tolist(), tail.flatten().tolist()
        (5.0, [-2.0, -2.0], [2.0, 2.0])
    """
    return slopes_at(log_joint, global_, local).blocks()


def local_information(log_joint: LogJoint, global_: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return gradient and negative Hessian of a log joint in the latents of each unit: what a Newton step takes.

    Do not use it for anything that is final: nothing is checked. A unit whose numbers overflow has NaN or infinities,
    and no other has.

    :param log_joint: as in :func:`arrowhead_information`.
    :param Tensor global_: ``(d,)``.
    :param Tensor local: ``(N, k)``.
    :return: the gradient :math:`\nabla_y f`, ``(N, k)``, and :math:`U`, ``(N, k, k)``, both differentiable in both
        arguments where gradients are enabled.

    Example::

        >>> import torch
        >>> log_joint = lambda mu, y: -(mu ** 2).sum() / 2 - ((y - mu) ** 2).sum()
        >>> gradient, tail = local_information(log_joint, torch.zeros(1), torch.tensor([[1.], [3.]]))
        >>> gradient.flatten().tolist(), tail.flatten().tolist()
        ([-2.0, -6.0], [2.0, 2.0])
    """
    with torch.enable_grad():
        theta, y = independent_copies((global_, local))
        (found,) = differentiate(log_joint(theta, y), [y], _NAMES[1:], "first")
    gradient = torch.zeros_like(y) if found is None else found
    return gradient if torch.is_grad_enabled() else gradient.detach(), local_curvature(gradient, y)


def local_curvature(gradient: Tensor, local: Tensor) -> Tensor:
    """Return the tails of the information from the gradient in the units and its graph: ``k`` passes.

    Do not use it where units may be coupled. Nothing is checked.

    :param Tensor gradient: of the log joint, ``(N, k)``.
    :param Tensor local: what it is the gradient in, ``(N, k)``.
    :return: symmetric, ``(N, k, k)``, differentiable where gradients are enabled.
    """
    k = local.shape[1]
    seeds = -torch.eye(k, dtype=local.dtype, device=local.device)
    seeds = seeds.unsqueeze(1).expand(-1, *local.shape)  # the same for every unit
    (found,) = reverse_passes([gradient], [seeds], [local])
    if k == 1:
        return found.movedim(0, -1)
    # The lower triangle and its mirror image: exactly symmetric, and each element contiguous over the units.
    rows = [row.unbind(-1) for row in found.unbind(0)]
    elements = [rows[max(i, j)][min(i, j)] for i in range(k) for j in range(k)]
    return torch.stack(elements).unflatten(0, (k, k)).movedim(-1, 0)


class Slopes(NamedTuple):
    """The gradient of a log joint, with a graph that leads to copies of its arguments, even under ``no_grad``.

    :param Tensor global_: copy of the globals, ``(d,)``, itself attached to what it is a copy of.
    :param Tensor local: copy of the units, ``(N, k)``.
    :param Tensor in_global: gradient in the globals, ``(d,)``.
    :param Tensor in_local: gradient in the units, ``(N, k)``.
    :param Tensor value: the log joint itself, a scalar.
    """

    global_: Tensor
    local: Tensor
    in_global: Tensor
    in_local: Tensor
    value: Tensor

    def blocks(self) -> ArrowheadBlocks:
        """The blocks of the information, all of them finite."""
        seeds = -torch.eye(len(self.global_), dtype=self.global_.dtype, device=self.global_.device)
        head, border = reverse_passes([self.in_global], [seeds], [self.global_, self.local])
        tail = local_curvature(self.in_local, self.local)
        blocks = ArrowheadBlocks((head + head.mT) / 2, border.movedim(0, -1), tail)
        for name, block in zip((_NAMES[0], " and ".join(_NAMES), _NAMES[1]), blocks, strict=True):
            check_finite(block, f"the second derivative of log_joint with respect to {name}")
        return blocks

    def product(self, vector: tuple[Tensor, Tensor]) -> list[Tensor]:
        """The product of the information, all of it, with a vector of parts ``(d,)`` and ``(N, k)``."""
        seeds = [-part.unsqueeze(0) for part in vector]
        products = reverse_passes([self.in_global, self.in_local], seeds, [self.global_, self.local])
        return [product.squeeze(0) for product in products]


def slopes_at(log_joint: LogJoint, global_: Tensor, local: Tensor) -> Slopes:
    """Differentiate a log joint once, and refuse what has no information.

    :param log_joint: as in :func:`arrowhead_information`, which lists what is raised.
    :param Tensor global_: ``(d,)``.
    :param Tensor local: ``(N, k)``.
    """
    check_values(_NAMES, (global_, local))
    if global_.dim() != 1 or local.dim() != 2 or local.shape[1] == 0:
        raise ValueError(
            f"global_ has shape {tuple(global_.shape)} and local {tuple(local.shape)}; expected (d,) and (N, k), a row "
            "for each unit and k at least 1. Reshape them:\n    global_.reshape(-1), local.reshape(num_units, -1)"
        )
    with torch.enable_grad():
        theta, y = independent_copies((global_, local))
        value = log_joint_at(log_joint, (theta, y), _NAMES)
        in_global, in_local = gradients(value, (theta, y), _NAMES)
    return Slopes(theta, y, in_global, in_local, value)


def reverse_passes(outputs: Sequence[Tensor], seeds: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    r"""Return the products :math:`\sum_o s_o^\top \partial o / \partial v` for each of ``m`` seeds.

    They have a graph where gradients are enabled; the graph of the outputs is kept.

    :param outputs: tensors of any shape; those without a graph add nothing.
    :param seeds: for each output, ``(m, *output.shape)``.
    :param values: globals and units that the graph of the outputs leads to, or units alone.
    :return: for each value, ``(m, *value.shape)``.
    :raises InformationError: naming the value, if an operation has no such derivative.
    """
    num_seeds = len(seeds[0])
    attached = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o.requires_grad]
    products: Sequence[Tensor | None] = [None] * len(values)
    if attached and num_seeds:
        together = num_seeds > 1 and num_seeds * sum(value.numel() for value in values) <= _TOGETHER
        try:
            products = (_batched if together else _one_by_one)(attached, values)
        except RuntimeError:
            for output, seed in attached:
                differentiate(output, values, _NAMES[-len(values) :], "second", seed)  # finds the one to blame
            raise
    return [v.new_zeros(num_seeds, *v.shape) if p is None else p for v, p in zip(values, products, strict=True)]


def _batched(attached: Sequence[tuple[Tensor, Tensor]], values: Sequence[Tensor]) -> Sequence[Tensor | None]:
    outputs, seeds = zip(*attached, strict=True)
    graph = torch.is_grad_enabled()
    return torch.autograd.grad(
        outputs, values, seeds, retain_graph=True, create_graph=graph, allow_unused=True, is_grads_batched=True
    )


def _one_by_one(attached: Sequence[tuple[Tensor, Tensor]], values: Sequence[Tensor]) -> Sequence[Tensor | None]:
    outputs, seeds = zip(*attached, strict=True)
    graph = torch.is_grad_enabled()
    rows = [
        torch.autograd.grad(outputs, values, seed, retain_graph=True, create_graph=graph, allow_unused=True)
        for seed in zip(*seeds, strict=True)
    ]
    return [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]


def check_structure(
    log_joint: LogJoint,
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
        >>> check_structure(walk, torch.zeros(1), torch.zeros(3, 1), names=["state"])
        Traceback (most recent call last):
            ...
        laplace_amort.errors.StructureError: units are not independent of each other given the globals: 'state' of unit
        0 and 'state' of unit 1 have a second derivative of 2 (3 of 3 units are coupled, by 'state'), so the information
        is no block arrowhead. Sample what couples them outside of the plate of the units, where it is global; a
        chain of states is for pyro.infer.autoguide.AutoGaussian
    """
    with torch.no_grad():
        slopes = slopes_at(log_joint, global_, local)
        blocks = slopes.blocks() if blocks is None else blocks
        vector = _random_like(global_), _random_like(local)
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


def _random_like(value: Tensor) -> Tensor:
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(value.dim())).to(value)


def _product(blocks: Sequence[Tensor], vector: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The product of an arrowhead with a vector, ``(d,)`` and ``(N, k)``."""
    (head, border, tail), (v_global, v_local) = blocks, vector
    in_global = head @ v_global + (border * v_local.unsqueeze(-1)).sum((0, 1))
    return in_global, border @ v_global + matvec(tail, v_local)


def _raise_coupled(slopes: Slopes, wrong: Tensor, names: Sequence[str] | None) -> None:
    """Name the first unit that is coupled, and the one that it is coupled to most."""
    num_units, local_dim = wrong.shape
    names = [f"coordinate {j}" if names is None else f"'{names[j]}'" for j in range(local_dim)]
    unit = int(wrong.any(1).nonzero()[0])
    others = slopes.product((torch.zeros_like(slopes.global_), _random_like(slopes.local) * _one(wrong, unit)))[1]
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
        "of the plate of the units, where it is global; a chain of states is for pyro.infer.autoguide.AutoGaussian"
    )


def _one(like: Tensor, *index: int) -> Tensor:
    """True at one index, or in one row, of what is false."""
    mask = torch.zeros_like(like, dtype=torch.bool)
    mask[index] = True
    return mask
