r"""The head of a guide's precision: which curvature stands for the marginal precision of the globals.

The Schur complement :math:`S = G - \sum_i C_i^\top U_i^{-1} C_i` of the observed information is the curvature of the
*profile* :math:`f(\theta, \hat y(\theta))`. Where each unit says little, as of the scale of a hierarchy, that is far
from the curvature of the marginal density, which is that of :math:`f(\theta, \hat y(\theta)) - \frac12 \sum_i
\log|U_i|` to Laplace order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from laplace_amort.linalg import Arrowhead
from laplace_amort.types import Density
from laplace_amort.units import LogDetAlongMode

__all__ = ["Head", "JointCurvature", "MarginalCurvature"]


@runtime_checkable
class Head(Protocol):
    """What chooses the marginal precision of the globals; any object that can be called like this."""

    def __call__(
        self, log_joint: Density, global_: Tensor, local: Tensor, arrowhead: Arrowhead, weight: float = 1.0
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
        self, log_joint: Density, global_: Tensor, local: Tensor, arrowhead: Arrowhead, weight: float = 1.0
    ) -> Tensor:
        """Return the Schur complement, ``(d, d)``."""
        return arrowhead.schur_complement


@dataclass(frozen=True)
class KnownCurvature:
    """A matrix that is known already, as at the optimum of a fit.

    Do not use it in a guide that moves: it stays as it is.

    :param matrix: ``(d, d)``, symmetric; anything that ``torch.as_tensor`` takes.

    Calling it takes what :class:`Head` lists, and returns the matrix in the dtype of the globals.

    Example::

        >>> KnownCurvature([[2.0]])(None, torch.zeros(1), None, None)
        tensor([[2.]])
    """

    matrix: Any

    def __call__(
        self, log_joint: Density, global_: Tensor, local: Tensor, arrowhead: Arrowhead, weight: float = 1.0
    ) -> Tensor:
        """Return the matrix, ``(d, d)``."""
        return torch.as_tensor(self.matrix).to(global_)


@dataclass(frozen=True)
class MarginalCurvature:
    r"""The curvature of the Laplace approximation to the marginal density of the globals.

    .. math:: S + \nabla^2_\theta\, h(\theta, \hat y(\theta)), \qquad h = \tfrac{w}{2} \sum_i \log|U_i|,

    the total second derivative along the mode, for the weight :math:`w` of a minibatch, by
    :class:`~laplace_amort.units.LogDetAlongMode`. Derivatives of the result are exact: they take five derivatives
    of the log joint, all of which torch must have.

    Do not use it away from the mode of the units, as with free modes that have not converged: it knows no other
    derivative of the mode than :math:`-W`. It costs several times what the information itself does.

    Where a tail was repaired, :math:`U_i` in the above is the repaired one of the arrowhead, and the amount by which it
    was moved counts as fixed along the mode: so the result is finite everywhere.

    Calling it takes what :class:`Head` lists, and returns ``(d, d)``.

    Example: one unit whose precision given :math:`\theta` is :math:`1 + e^{2\theta}`, with a convex logarithm::

        >>> import torch
        >>> from laplace_amort.autodiff.information import arrowhead_information
        >>> log_joint = lambda t, y: -(t ** 2).sum() / 2 - (y ** 2).sum() * (1 + torch.exp(2 * t).sum()) / 2
        >>> t, y = torch.zeros(1), torch.zeros(1, 1)
        >>> arrowhead = Arrowhead(*arrowhead_information(log_joint, t, y))
        >>> JointCurvature()(log_joint, t, y, arrowhead).item(), MarginalCurvature()(log_joint, t, y, arrowhead).item()
        (1.0, 1.5)

    Reference: Tierney & Kadane (1986), *Accurate Approximations for Posterior Moments and Marginal Densities*, JASA
    81(393), equation 3.2.
    """

    def __call__(
        self, log_joint: Density, global_: Tensor, local: Tensor, arrowhead: Arrowhead, weight: float = 1.0
    ) -> Tensor:
        """Return the Schur complement and the curvature of the log-determinants, ``(d, d)``."""
        log_dets = LogDetAlongMode(log_joint, global_, local, arrowhead, weight)
        return arrowhead.schur_complement + log_dets.curvature()
