r"""A learnable repair: precision added to every coordinate, by an amount that the fit chooses."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from laplace_amort.linalg.repair import Repair, RepairReport
from laplace_amort.linalg.softabs import SoftAbs

__all__ = ["Boost"]


class Boost(nn.Module):
    r"""Add a learnable diagonal :math:`M_\psi` to the information, and repair what is still indefinite.

    The guide is then of the family :math:`N\big(\hat\varphi, (I(\hat\varphi) + M_\psi)^{-1}\big)`, with the ELBO to
    choose :math:`\psi` as well: narrower than the curvature at one point says where that serves the objective. The
    diagonal is ``softplus(raw) * scale``, one strength for each coordinate, shared by all units of a batch.

    Do not use it where the observed information is wanted as it is: a strength that has grown is part of the guide, and
    the report, which is of the ``base`` repair of what is boosted already, does not count it. Read ``strength``.

    :param float strength: at the start, as a share of the scale; positive and small.
    :param Repair base: what repairs the result, :class:`~laplace_amort.SoftAbs` by default.
    :raises ValueError: if the strength is not positive.

    :meth:`prepare` it for a size before calling it with matrices ``(*, n, n)`` and scales, as for the base; a call
    returns what the base returns, and raises what it raises.

    Example::

        >>> import torch
        >>> boost = Boost(strength=0.5).prepare(2, like=torch.zeros(()))
        >>> boost(torch.eye(2), scale=torch.tensor([1., 4.]))[0]
        tensor([[1.5000, 0.0000],
                [0.0000, 3.0000]], grad_fn=<AddBackward0>)
    """

    raw: nn.Parameter | None

    def __init__(self, strength: float = 1e-3, base: Repair | None = None) -> None:
        super().__init__()
        if not (strength > 0 and math.isfinite(strength)):
            raise ValueError(f"strength must be a positive share of the scale, got {strength}; the default is 1e-3")
        self.initial_strength = strength
        self.base: Repair = SoftAbs() if base is None else base
        self.register_parameter("raw", None)

    def prepare(self, size: int, like: Tensor) -> Boost:
        """Return a copy with a new parameter ``raw (size,)``, of the dtype and device of ``like``."""
        prepared = copy.deepcopy(self)
        # The inverse of softplus, written for numbers of any size.
        raw = self.initial_strength + math.log(-math.expm1(-self.initial_strength))
        prepared.raw = nn.Parameter(torch.full((size,), raw, dtype=like.dtype, device=like.device))
        prepared.base = self.base.prepare(size, like)
        return prepared

    @property
    def strength(self) -> Tensor:
        """What is added to every coordinate, ``(n,)``, as a share of the scale."""
        if self.raw is None:
            raise RuntimeError(
                "this Boost has no parameter yet, as it has not been told the size of the matrices:\n"
                "    boost = boost.prepare(matrix.shape[-1], like=matrix)"
            )
        return softplus(self.raw)

    def forward(self, matrix: Tensor, scale: Tensor | None = None) -> tuple[Tensor, RepairReport]:
        """Boost and repair ``matrix``, ``(*, n, n)``, in units of ``scale``, ``(*, n)`` or ``(n,)``."""
        strength = self.strength
        if matrix.shape[-1:] != strength.shape:
            raise ValueError(
                f"this Boost was prepared for matrices of size {len(strength)}, and this one is {tuple(matrix.shape)}"
            )
        return self.base(matrix + torch.diag_embed(strength if scale is None else strength * scale), scale)
