r"""Observed information, the negative Hessian of a log joint density: dense, and by the blocks of an arrowhead.

.. math:: I(v) = -\nabla^2_v \log p(v, z), \qquad v = (v_1, \dots, v_m) \text{ flattened and concatenated,}

every argument independent of the others. Dense, it takes a reverse pass for each element of :math:`v`.

If units are independent of each other given the globals, then in

.. math:: -\nabla^2_{(\theta, y)} f = \begin{pmatrix} G & C^\top \\ C & U \end{pmatrix}, \qquad
          f(\theta, y) = \log p(\theta, y, z),

:math:`U` is block diagonal. One pass back from each element of :math:`\nabla_\theta f` gives a row of :math:`G` and of
:math:`C^\top`; one pass back from the j-th element of :math:`\nabla_y f` in *all* units at once gives the j-th row of
every :math:`U_i`: together :math:`d + k` passes, and not :math:`d + N k`. Where in the model the observations are does
not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from laplace_amort.autodiff.derivatives import (
    ARGUMENTS,
    argument_names,
    check_finite,
    check_values,
    differentiate,
    gradients,
    independent_copies,
    log_joint_at,
    recorded_at,
    reverse_passes,
)
from laplace_amort.autodiff.recording import Recording
from laplace_amort.errors import NotPositiveDefiniteError
from laplace_amort.types import Density

__all__ = [
    "ArrowheadBlocks",
    "FirstDerivatives",
    "arrowhead_information",
    "first_derivatives",
    "local_curvature",
    "local_information",
    "observed_information",
    "subsample_information",
]


def observed_information(log_joint: Density, *values: Tensor) -> Tensor:
    r"""Return the negative Hessian of a scalar function with respect to all its arguments together.

    Each argument counts as independent, even if one was computed from another: the function is called with copies, so
    the Hessian never sees :math:`\partial\hat y/\partial\hat\theta`, while derivatives *of the result* flow back into
    every value, and from there to whatever it was computed from. Pass the curvature output of
    :func:`~laplace_amort.dual_path` for :math:`\theta`, so that :func:`~laplace_amort.check_paths`
    and the gains apply.

    It is dense: ``D`` reverse passes, batched, and ``(D, D)`` numbers. Do not use it for many thousands of units.

    :param log_joint: a function of ``len(values)`` tensors that returns a scalar tensor.
    :param Tensor values: floating-point tensors of any shapes, ``D`` elements in all; on one device, of one dtype.
    :return: symmetric matrix of shape ``(D, D)``, differentiable to any order where gradients are enabled (that is
        third order and more in ``log_joint``), and without a graph under ``no_grad``.
    :raises InformationError: if the result is not a scalar, an argument does not matter, anything is NaN or infinite,
        an operation lacks a second derivative, or under inference mode or the JIT; the message names the argument.
    :raises TypeError: if a value is not a real floating-point tensor, or there are none.

    Example: a normal density has its precision as information, wherever it is taken::

        >>> import torch
        >>> log_joint = lambda mu, y: -2 * (y - mu) ** 2 - mu ** 2 / 2
        >>> observed_information(log_joint, torch.tensor(1.), torch.tensor(3.)).detach()
        tensor([[ 5., -4.],
                [-4.,  4.]])

    References:

    [1] Efron & Hinkley (1978), *Assessing the accuracy of the maximum likelihood estimator: observed versus expected
    Fisher information*, Biometrika 65(3), eq. 1.1.
    """
    names = argument_names(log_joint, values)
    check_values(names, values)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        copies = independent_copies(values)
        slopes = gradients(log_joint_at(log_joint, copies, names), copies, names)
        hessian = _hessian(slopes, copies, names)
        information = (hessian + hessian.mT) / -2
    return information if create_graph else information.detach()


def subsample_information(information: Tensor, scale: Tensor) -> Tensor:
    r"""Return the precision that a subsampled plate calls for, from the information of the scaled log joint.

    Pyro multiplies the terms of :math:`B` out of :math:`N` units by :math:`w = N/B`, so the Hessian of the *scaled* log
    joint gives blocks :math:`G, wC, wU`. The marginal precision of the globals, :math:`S = G - wC^\top U^{-1} C`, comes
    out right from them, and so does the regression :math:`W = U^{-1} C`; the conditional precision of a unit does not:
    it is :math:`U`, not :math:`wU`. The result is the precision with :math:`S`, :math:`W` and the unscaled :math:`U`,

    .. math:: \begin{pmatrix} S + C^\top U^{-1} C & C^\top \\ C & U \end{pmatrix}.

    Without subsampling (all scales 1) the information is returned as it is.

    :param Tensor information: ``(D, D)``, of the log joint as Pyro scales it.
    :param Tensor scale: ``(D,)``, the subsampling factor :math:`w` of every coordinate, 1 for globals.
    :return: ``(D, D)``, symmetric.
    :raises ValueError: if the shapes disagree, or more than one factor other than 1 occurs (nested subsampling).
    :raises NotPositiveDefiniteError: if the block of the units cannot be solved with.

    Example: one global, one of two units drawn::

        >>> import torch
        >>> scaled = torch.tensor([[5., 2.], [2., 4.]])              # G = 5, w C = 2, w U = 4, w = 2
        >>> subsample_information(scaled, torch.tensor([1., 2.]))    # C = 1, U = 2, S = 5 - 2 * 2 / 4 = 4
        tensor([[4.5000, 1.0000],
                [1.0000, 2.0000]])
    """
    if information.dim() != 2 or information.shape != scale.shape * 2:
        raise ValueError(
            f"information has shape {tuple(information.shape)} and scale {tuple(scale.shape)}; expected (D, D) and (D,)"
        )
    local = scale != 1
    factors = scale[local].unique()
    if factors.numel() == 0:
        return information
    if factors.numel() > 1:
        raise ValueError(
            f"coordinates are subsampled by different factors {factors.tolist()}: nested or several subsampled plates "
            "have no common weight. Subsample one plate, or pass the whole of the others."
        )
    inside, outside = local.nonzero().squeeze(-1), (~local).nonzero().squeeze(-1)
    scaled_tail = information[inside][:, inside]
    scaled_border = information[inside][:, outside]
    chol, info = torch.linalg.cholesky_ex(scaled_tail)
    if info.any():
        raise NotPositiveDefiniteError(
            f"the information of the {inside.numel()} subsampled coordinates is not positive definite (leading minor "
            f"{int(info)}): is the mode of the units the maximum at these globals? Compute it for this minibatch."
        )
    explained = scaled_border.mT @ torch.cholesky_solve(scaled_border, chol)
    weight = factors[0].to(information.dtype)
    precision = information.index_put((inside[:, None], inside), scaled_tail / weight)
    precision = precision.index_put((inside[:, None], outside), scaled_border / weight)
    precision = precision.index_put((outside[:, None], inside), scaled_border.mT / weight)
    head = information[outside][:, outside] - explained * (1 - 1 / weight)
    return precision.index_put((outside[:, None], outside), head)


def _hessian(slopes: Sequence[Tensor], values: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    flat = torch.cat([gradient.reshape(-1) for gradient in slopes])
    size = flat.numel()
    if not (flat.requires_grad and size):  # log_joint is linear in everything, or there is nothing
        return flat.new_zeros(size, size)
    basis = torch.eye(size, dtype=flat.dtype, device=flat.device)
    rows = differentiate(flat, values, names, "second", basis)
    columns = [
        basis.new_zeros(size, value.numel()) if row is None else row.reshape(size, value.numel())
        for row, value in zip(rows, values, strict=True)
    ]
    for name, column in zip(names, columns, strict=True):
        check_finite(column, f"the second derivative of log_joint with respect to {name}")
    return torch.cat(columns, dim=1)


class ArrowheadBlocks(NamedTuple):
    """The blocks of an arrowhead.

    :param Tensor head: :math:`G`, symmetric, ``(d, d)``.
    :param Tensor border: :math:`C`, ``(N, k, d)``.
    :param Tensor tail: :math:`U`, symmetric, ``(N, k, k)``.
    """

    head: Tensor
    border: Tensor
    tail: Tensor


def arrowhead_information(log_joint: Density, global_: Tensor, local: Tensor) -> ArrowheadBlocks:
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
    if isinstance(log_joint, Recording) and log_joint.information is not None:
        check_values(ARGUMENTS, (global_, local))
        blocks: ArrowheadBlocks = log_joint.information.blocks(global_, local)
        if _are_finite(blocks):
            return blocks
    return first_derivatives(log_joint, global_, local).blocks()


def _are_finite(blocks: ArrowheadBlocks) -> bool:
    """Whether all is finite, its sum included."""
    return bool(torch.stack([block.detach().sum() for block in blocks]).isfinite().all())


def local_information(log_joint: Density, global_: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
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
        (found,) = differentiate(log_joint(theta, y), [y], ARGUMENTS[1:], "first")
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


class FirstDerivatives(NamedTuple):
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
        for name, block in zip((ARGUMENTS[0], " and ".join(ARGUMENTS), ARGUMENTS[1]), blocks, strict=True):
            check_finite(block, f"the second derivative of log_joint with respect to {name}")
        return blocks

    def product(self, vector: tuple[Tensor, Tensor]) -> list[Tensor]:
        """The product of the information, all of it, with a vector of parts ``(d,)`` and ``(N, k)``."""
        seeds = [-part.unsqueeze(0) for part in vector]
        products = reverse_passes([self.in_global, self.in_local], seeds, [self.global_, self.local])
        return [product.squeeze(0) for product in products]


def first_derivatives(log_joint: Density, global_: Tensor, local: Tensor) -> FirstDerivatives:
    """Differentiate a log joint once, and refuse what has no information.

    :param log_joint: as in :func:`arrowhead_information`, which lists what is raised.
    :param Tensor global_: ``(d,)``.
    :param Tensor local: ``(N, k)``.
    """
    check_values(ARGUMENTS, (global_, local))
    if global_.dim() != 1 or local.dim() != 2 or local.shape[1] == 0:
        raise ValueError(
            f"global_ has shape {tuple(global_.shape)} and local {tuple(local.shape)}; expected (d,) and (N, k), a row "
            "for each unit and k at least 1. Reshape them:\n    global_.reshape(-1), local.reshape(num_units, -1)"
        )
    with torch.enable_grad():
        theta, y = independent_copies((global_, local))
        if isinstance(log_joint, Recording):
            value = recorded_at(log_joint, (theta, y))
        else:
            value = log_joint_at(log_joint, (theta, y), ARGUMENTS)
        in_global, in_local = gradients(value, (theta, y), ARGUMENTS)
    return FirstDerivatives(theta, y, in_global, in_local, value)
