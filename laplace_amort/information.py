r"""Observed information: the negative Hessian of a log joint density, every argument independent of the others.

.. math:: I(v) = -\nabla^2_v \log p(v, z), \qquad v = (v_1, \dots, v_m) \text{ flattened and concatenated.}
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_amort.derivatives import (
    LogDensity,
    argument_names,
    check_finite,
    check_values,
    differentiate,
    gradients,
    independent_copies,
    log_joint_at,
)
from laplace_amort.errors import NotPositiveDefiniteError

__all__ = ["observed_information", "subsample_information"]


def observed_information(log_joint: LogDensity, *values: Tensor) -> Tensor:
    r"""Return the negative Hessian of a scalar function with respect to all its arguments together.

    Each argument counts as independent, even if one was computed from another: the function is called with copies, so
    the Hessian never sees :math:`\partial\hat y/\partial\hat\theta`, while derivatives *of the result* flow back into
    every value, and from there to whatever it was computed from. Pass the curvature output of
    :func:`~laplace_amort.dual_path.dual_path` for :math:`\theta`, so that :func:`~laplace_amort.dual_path.check_paths`
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
