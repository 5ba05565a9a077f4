r"""The Laplace approximation to the marginal density of the globals, with exact derivatives.

.. math:: L(\theta) = f(\theta, \hat y(\theta)) - h(\theta, \hat y(\theta)) + \tfrac{N k}{2} \log 2\pi, \qquad
          h = \tfrac12 \sum_i \log|U_i|,

where :math:`f` is the log joint, :math:`\hat y(\theta)` the mode of the units and :math:`U_i` their curvature there. It
approximates :math:`\log p(\theta, z)`, and is exact where the units are normal given the globals. The minibatch of a
subsampled plate counts :math:`w = N/B` times.

Reference: Kristensen et al. (2016), *TMB: Automatic Differentiation and Laplace Approximation*, Journal of Statistical
Software 70(5), equations 2 to 4, https://doi.org/10.18637/jss.v070.i05
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from laplace_amort.autodiff import FirstDerivatives, first_derivatives, local_curvature, reverse_passes
from laplace_amort.linalg import Arrowhead, blocks
from laplace_amort.types import Density

__all__ = ["LaplaceMarginal", "LogDetAlongMode", "laplace_marginal"]


class LogDetAlongMode:
    r"""Total derivatives in the globals of :math:`h(\theta, \hat y(\theta))`, half the log-determinants at the mode.

    No mode is differentiated for them: with :math:`V = (I, -W)` for the derivative of :math:`(\theta, \hat y)`, and the
    adjoint :math:`a_i = U_i^{-1} \nabla_{y_i} h` for the second derivative of the mode, they are

    .. math:: \nabla_\theta h - W^\top \nabla_y h \qquad\text{and}\qquad
              V^\top \nabla^2 \Big( h + \sum_i a_i^\top \nabla_{y_i} f \Big) V \quad \text{with } a, W \text{ fixed,}

    the latter by ``d`` reverse passes along :math:`V`. Derivatives of both are exact where gradients are enabled,
    :math:`a` and :math:`W` included.

    Do not use it away from the mode: it knows no other derivative of the mode than :math:`-W`.

    :param log_joint: of globals ``(d,)`` and units ``(N, k)``, the terms of the units with the weight of a minibatch.
    :param Tensor global_: ``(d,)``.
    :param Tensor local: the modes of the units there, ``(N, k)``.
    :param Arrowhead arrowhead: the information of the log joint there, with tails that are positive definite.
    :param float weight: :math:`w`.
    :param FirstDerivatives slopes: those at this point, if they are at hand.
    """

    def __init__(
        self,
        log_joint: Density,
        global_: Tensor,
        local: Tensor,
        arrowhead: Arrowhead,
        weight: float = 1.0,
        slopes: FirstDerivatives | None = None,
    ) -> None:
        self.regression = arrowhead.regression
        # Derivatives along the mode see the copies `there`; what is fixed along it hangs on the arguments by `here`.
        there = first_derivatives(log_joint, global_, local) if slopes is None else slopes
        with torch.enable_grad():
            tail_there = local_curvature(there.in_local, there.local)
        here, tail = there, tail_there.detach()
        if torch.is_grad_enabled():
            here = first_derivatives(log_joint, global_, local)
            tail = local_curvature(here.in_local, here.local)
        covariance = arrowhead.conditional_covariance()
        in_tail = weight / 2 * covariance  # the gradient of the log-determinants in the elements of the tails
        tail_here = tail if torch.is_grad_enabled() else tail_there
        (slope,) = reverse_passes([tail_here], [in_tail.unsqueeze(0)], [here.local])
        adjoint = blocks.matvec(covariance, slope.squeeze(0))
        with torch.enable_grad():
            # The inverse changes along the mode: d(U^-1) = -U^-1 dU U^-1. More than the first order is not needed.
            change = blocks.multiply(blocks.multiply(in_tail, tail_there - tail), covariance)
            outputs, seeds = [tail_there, there.in_local], [in_tail - change, adjoint]
            self._first = reverse_passes(outputs, [seed.unsqueeze(0) for seed in seeds], [there.global_, there.local])
        self._there = there

    def slope(self) -> Tensor:
        r"""Return the gradient, ``(d,)``: that of :math:`h + \sum_i a_i^\top \nabla_{y_i} f` in the globals alone.

        Its gradient in the units is zero, by the choice of :math:`a`.
        """
        return self._first[0].squeeze(0)

    def curvature(self) -> Tensor:
        """Return the second derivative, symmetric, ``(d, d)``."""
        global_, regression = self._there.global_, self.regression
        identity = torch.eye(len(global_), dtype=global_.dtype, device=global_.device)
        along = [identity.unsqueeze(1), -regression.movedim(-1, 0).unsqueeze(1)]
        second = reverse_passes(self._first, along, [global_, self._there.local])
        curvature = second[0] - second[1].flatten(1) @ regression.flatten(0, 1)
        return (curvature + curvature.mT) / 2


class LaplaceMarginal(NamedTuple):
    """The Laplace approximation to a log marginal density at one point, and its derivatives, without a graph.

    :param Tensor value: :math:`L`, a scalar.
    :param Tensor gradient: ``(d,)``.
    :param Tensor information: the negative second derivative, symmetric, ``(d, d)``.
    :param Tensor regression: :math:`W`, minus the derivative of the mode, ``(N, k, d)``.
    """

    value: Tensor
    gradient: Tensor
    information: Tensor
    regression: Tensor


@torch.no_grad()
def laplace_marginal(log_joint: Density, global_: Tensor, local: Tensor, weight: float = 1.0) -> LaplaceMarginal:
    r"""Return :math:`L`, its gradient and its information.

    It takes one evaluation of the log joint, ``2 d + k + 2`` reverse passes of second order to fourth, and memory for
    one graph. Do not use it away from the mode of the units, where it approximates nothing.

    :param log_joint: of globals ``(d,)`` and units ``(N, k)``, the terms of the units with the weight of a minibatch.
    :param Tensor global_: ``(d,)``.
    :param Tensor local: the modes of the units there, ``(N, k)``.
    :param float weight: :math:`w`.
    :raises NotPositiveDefiniteError: if a tail is not: that unit is not at a mode.
    :raises InformationError: as :func:`~laplace_amort.arrowhead_information`.

    Example: :math:`y \sim N(\theta, 1)` and :math:`z \sim N(y, 1)`, so that :math:`z \sim N(\theta, \sqrt 2)`::

        >>> import torch
        >>> from torch.distributions import Normal
        >>> z = torch.tensor([[1.]])
        >>> log_joint = lambda t, y: (Normal(t, 1.).log_prob(y) + Normal(y, 1.).log_prob(z)).sum()
        >>> found = laplace_marginal(log_joint, torch.zeros(1), torch.full((1, 1), 0.5))
        >>> found.value, Normal(0., 2**0.5).log_prob(z)
        (tensor(-1.5155), tensor([[-1.5155]]))
        >>> found.gradient, found.information
        (tensor([0.5000]), tensor([[0.5000]]))
    """
    slopes = first_derivatives(log_joint, global_, local)
    arrowhead = Arrowhead(*slopes.blocks())
    log_dets = LogDetAlongMode(log_joint, global_, local, arrowhead, weight, slopes)
    in_global, in_local = slopes.in_global.detach(), slopes.in_local.detach()
    # At the mode itself the second term is zero; a search leaves its tolerance.
    along_mode = in_global - (arrowhead.regression * in_local.unsqueeze(-1)).sum((0, 1))
    half_log_det = -blocks.log_det(arrowhead.local_scale_tril).sum() / 2
    # The tails are w times those of a unit.
    constant = local.numel() / 2 * math.log(2 * math.pi * weight)
    return LaplaceMarginal(
        value=slopes.value.detach() + weight * (constant - half_log_det),
        gradient=along_mode - log_dets.slope().detach(),
        information=arrowhead.schur_complement + log_dets.curvature(),
        regression=arrowhead.regression,
    )
