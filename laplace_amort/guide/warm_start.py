"""Where to start the search for the modes of the units: from where they were, moved with the globals."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["WarmStart"]


class WarmStart(nn.Module):
    r"""The last mode of every unit and its derivative, extrapolated to other globals.

    .. math:: \hat y_i(\theta) \approx \hat y_i(\theta_0) - W_i (\theta - \theta_0), \qquad W_i = U_i^{-1} C_i,

    by the implicit function theorem. In a fit, where the globals move little from step to step, that leaves an error of
    second order in the step, and Newton's method one iteration less to do. A guess only: the search may start anywhere.

    It holds buffers and no parameters, and none of them is part of the state that is saved.

    :param Tensor start: first guess, ``(N, k)``, for all units of the plate.
    :param int global_dim: number ``d`` of globals.

    Example::

        >>> warm_start = WarmStart(torch.zeros(3, 1), global_dim=1)
        >>> units = torch.tensor([0, 2])
        >>> warm_start.remember(units, torch.tensor([1.]), torch.ones(2, 1), torch.full((2, 1, 1), -0.5))
        >>> warm_start.at(units, torch.tensor([1.2])).flatten()
        tensor([1.1000, 1.1000])
    """

    intercept: Tensor
    slope: Tensor

    def __init__(self, start: Tensor, global_dim: int) -> None:
        super().__init__()
        self.register_buffer("intercept", start.detach().clone(), persistent=False)
        self.register_buffer("slope", start.new_zeros(*start.shape, global_dim), persistent=False)

    @torch.no_grad()
    def at(self, units: Tensor, global_: Tensor) -> Tensor:
        """Return a start ``(*S, B, k)`` for units ``(B,)`` at globals ``(*S, d)``, without a graph."""
        return self.intercept[units] - torch.tensordot(global_, self.slope[units], dims=([-1], [-1]))

    @torch.no_grad()
    def remember(self, units: Tensor, global_: Tensor, local: Tensor, regression: Tensor) -> None:
        """Keep the modes ``(B, k)`` of units ``(B,)`` at globals ``(d,)``, and their regression ``W (B, k, d)``."""
        self.intercept[units] = local + regression @ global_
        self.slope[units] = regression

    def state(self) -> tuple[Tensor, Tensor]:
        """Return a copy of what is remembered."""
        return self.intercept.clone(), self.slope.clone()

    @torch.no_grad()
    def restore(self, state: tuple[Tensor, Tensor]) -> None:
        """Bring back what :meth:`state` returned."""
        self.intercept.copy_(state[0])
        self.slope.copy_(state[1])

    def resized(self, num_units: int) -> WarmStart:
        """Return one for another number of units, which knows nothing of them but their average."""
        other = WarmStart(self.intercept.mean(0).expand(num_units, -1), self.slope.shape[-1])
        other.slope += self.slope.mean(0)
        return other
