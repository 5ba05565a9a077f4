r"""The head of a guide's precision: which curvature stands for the marginal precision of the globals.

The Schur complement :math:`S = G - \sum_i C_i^\top U_i^{-1} C_i` of the observed information is the curvature of the
*profile* :math:`f(\theta, \hat y(\theta))`. Where each unit says little, as of the scale of a hierarchy, that is far
from the curvature of the marginal density, which is that of :math:`f(\theta, \hat y(\theta)) - \frac12 \sum_i
\log|U_i|` to Laplace order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from laplace_amort import blocks
from laplace_amort.arrowhead import Arrowhead
from laplace_amort.arrowhead_information import LogJoint, local_curvature, reverse_passes, slopes_at

__all__ = ["Head", "JointCurvature", "MarginalCurvature"]


@runtime_checkable
class Head(Protocol):
    """What chooses the marginal precision of the globals; any object that can be called like this."""

    def __call__(
        self, log_joint: LogJoint, global_: Tensor, local: Tensor, arrowhead: Arrowhead, weight: float = 1.0
    ) -> Tensor:
        """Return a symmetric matrix ``(d, d)``, which need not be positive definite yet.

        :param log_joint: of globals ``(d,)`` and units ``(N, k)``, the terms of the units with the weight of a
            minibatch.
        :param Tensor global_: ``(d,)``.
        :param Tensor local: the modes of the units there, ``(N, k)``.
        :param Arrowhead arrowhead: the information of the log joint there, with tails that are positive definite.
        :param float weight: N/B, where B of N units are a minibatch.
        """


@dataclass(frozen=True)
class JointCurvature:
    """The Schur complement of the observed information, as it is.

    Do not use it where units say little and their spread is to be inferred: the curvature of the profile in the scale
    of a hierarchy is wrong there, often not even positive. See :class:`MarginalCurvature`.

    Calling it takes what :class:`Head` lists, and returns ``(d, d)``.

    Example::

        >>> import torch
        >>> arrowhead = Arrowhead(torch.eye(1) * 5, torch.full((2, 1, 1), 2.), torch.full((2, 1, 1), 4.))
        >>> JointCurvature()(None, torch.zeros(1), torch.zeros(2, 1), arrowhead)     # 5 - (2 * 2 + 2 * 2) / 4
        tensor([[3.]])
    """

    def __call__(
        self, log_joint: LogJoint, global_: Tensor, local: Tensor, arrowhead: Arrowhead, weight: float = 1.0
    ) -> Tensor:
        """Return the Schur complement, ``(d, d)``."""
        return arrowhead.schur_complement


@dataclass(frozen=True)
class MarginalCurvature:
    r"""The curvature of the Laplace approximation to the marginal density of the globals.

    .. math:: S + \nabla^2_\theta\, h(\theta, \hat y(\theta)), \qquad h = \tfrac{w}{2} \sum_i \log|U_i|,

    the total second derivative along the mode, for the weight :math:`w` of a minibatch. No mode is differentiated for
    it: with :math:`V = (I, -W)` for the derivative of :math:`(\theta, \hat y)`, and the adjoint
    :math:`a_i = U_i^{-1} \nabla_{y_i} h` for the second derivative of the mode, it is

    .. math:: V^\top \nabla^2 \Big( h + \sum_i a_i^\top \nabla_{y_i} f \Big) V \qquad \text{with } a, W \text{ fixed,}

    ``d`` reverse passes along :math:`V`. Derivatives of the result are exact, :math:`a` and :math:`W` included: they
    take five derivatives of the log joint, all of which torch must have.

    Do not use it away from the mode of the units, as with free modes that have not converged: it knows no other
    derivative of the mode than :math:`-W`. It costs several times what the information itself does.

    Where a tail was repaired, :math:`U_i` in the above is the repaired one of the arrowhead, and the amount by which it
    was moved counts as fixed along the mode: so the result is finite everywhere.

    Calling it takes what :class:`Head` lists, and returns ``(d, d)``.

    Example: one unit whose precision given :math:`\theta` is :math:`1 + e^{2\theta}`, with a convex logarithm::

        >>> import torch
        >>> from laplace_amort.arrowhead_information import arrowhead_information
        >>> log_joint = lambda t, y: -(t ** 2).sum() / 2 - (y ** 2).sum() * (1 + torch.exp(2 * t).sum()) / 2
        >>> t, y = torch.zeros(1), torch.zeros(1, 1)
        >>> arrowhead = Arrowhead(*arrowhead_information(log_joint, t, y))
        >>> JointCurvature()(log_joint, t, y, arrowhead).item(), MarginalCurvature()(log_joint, t, y, arrowhead).item()
        (1.0, 1.5)

    Reference: Tierney & Kadane (1986), *Accurate Approximations for Posterior Moments and Marginal Densities*, JASA
    81(393), equation 3.2.
    """

    def __call__(
        self, log_joint: LogJoint, global_: Tensor, local: Tensor, arrowhead: Arrowhead, weight: float = 1.0
    ) -> Tensor:
        """Return the Schur complement and the curvature of the log-determinants, ``(d, d)``."""
        # Derivatives along the mode see the copies `there`; what is fixed along it hangs on the arguments by `here`.
        with torch.enable_grad():
            here, there = (slopes_at(log_joint, global_, local) for _ in range(2))
            tail, tail_there = (local_curvature(at.in_local, at.local) for at in (here, there))
        covariance, regression = arrowhead.conditional_covariance(), arrowhead.regression
        pull = weight / 2 * covariance  # of the log-determinants on the elements of the tails
        (slope,) = reverse_passes([tail], [pull.unsqueeze(0)], [here.local])
        adjoint = blocks.matvec(covariance, slope.squeeze(0))
        with torch.enable_grad():
            # The inverse changes along the mode: d(U^-1) = -U^-1 dU U^-1. More than the first order is not needed.
            change = blocks.multiply(blocks.multiply(pull, tail_there - tail), covariance)
            outputs, seeds = [tail_there, there.in_local], [pull - change, adjoint]
            first = reverse_passes(outputs, [seed.unsqueeze(0) for seed in seeds], [there.global_, there.local])
        identity = torch.eye(len(global_), dtype=global_.dtype, device=global_.device)
        along = [identity.unsqueeze(1), -regression.movedim(-1, 0).unsqueeze(1)]
        second = reverse_passes(first, along, [there.global_, there.local])
        curvature = second[0] - second[1].flatten(1) @ regression.flatten(0, 1)
        return arrowhead.schur_complement + (curvature + curvature.mT) / 2
