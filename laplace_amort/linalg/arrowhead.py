r"""Precision matrices in the form of a block arrowhead, in time and memory linear in the number of units.

Given the globals :math:`\theta`, the units :math:`y_i` are independent of each other, so that the precision of all is

.. math:: P = \begin{pmatrix} G & C^\top \\ C & U \end{pmatrix}, \qquad U = \operatorname{diag}(U_1, \dots, U_N), \qquad
          W_i = U_i^{-1} C_i, \qquad S = G - \sum_i C_i^\top W_i,

and the normal distribution with this precision, around zero, is

.. math:: \theta \sim N(0, S^{-1}), \qquad y_i \mid \theta \sim N(-W_i \theta,\; U_i^{-1}).

Everything is made of two triangular scales, :math:`T_i T_i^\top = U_i^{-1}` and :math:`T_S T_S^\top = S^{-1}`, and the
whitened borders :math:`V_i = T_i^\top C_i`, for then :math:`W_i = T_i V_i` and :math:`S = G - \sum_i V_i^\top V_i`.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from laplace_amort.linalg import blocks
from laplace_amort.linalg.arrowhead_checks import (
    check_shapes,
    describe_schur_complement,
    describe_tail,
    raise_if_any,
)

__all__ = ["Arrowhead"]


class Arrowhead:
    r"""A symmetric positive definite block arrowhead, factored once: the tails at once, the Schur complement on demand.

    Do not use it where units are coupled other than through the globals: there are no blocks for that. Do not keep one
    on a module: it holds the graph of whatever it was made of. And do not map over it by ``torch.func.vmap``, since it
    looks at values in order to refuse them: give it the batch instead.

    :param Tensor head: :math:`G`, symmetric, ``(*, d, d)``.
    :param Tensor border: :math:`C`, ``(*, N, k, d)``.
    :param Tensor tail: :math:`U`, symmetric, ``(*, N, k, k)``; unrolled formulas for k up to 3, LAPACK beyond.
    :raises NotPositiveDefiniteError: if a tail is not; the message names the unit and its smallest eigenvalue. The
        same for the Schur complement, from the first method that needs its factor.
    :raises ValueError: if the shapes do not fit.

    There may be no units, or no globals. ``*`` is any batch of arrowheads, the same for all three. Methods that take
    vectors take leading dimensions of samples before the batch, without copies of the blocks. Results are
    differentiable to any order in all three.

    Attributes besides the three: ``regression`` is :math:`W`, ``(*, N, k, d)``; ``schur_complement`` is :math:`S`,
    ``(*, d, d)``; ``local_scale_tril`` is :math:`T_i`, lower triangular, ``(*, N, k, k)``; and ``global_scale_tril`` is
    :math:`T_S`, lower triangular, ``(*, d, d)``.

    Example: two units, each a scalar, and one global::

        >>> import torch
        >>> P = Arrowhead(torch.tensor([[3.]]), torch.ones(2, 1, 1), torch.tensor([[[1.]], [[2.]]]))
        >>> P
        Arrowhead of 2 units of dimension 1 and 1 global dimension
        >>> P.to_dense()
        tensor([[3., 1., 1.],
                [1., 1., 0.],
                [1., 0., 2.]])
        >>> P.schur_complement, P.log_det().exp()
        (tensor([[1.5000]]), tensor(3.0000))
    """

    def __init__(self, head: Tensor, border: Tensor, tail: Tensor) -> None:
        check_shapes(head, border, tail)
        self.head, self.border, self.tail = head, border, tail
        self.local_scale_tril, failed = blocks.scale_tril(tail)
        raise_if_any(failed, tail, describe_tail)
        self._whitened = blocks.multiply(self.local_scale_tril.mT, border)
        flat = self._flat(self._whitened)
        explained = flat.mT @ flat
        self._explained = (explained + explained.mT) / 2  # or rounding errors make it asymmetric
        self.schur_complement = head - self._explained

    def __repr__(self) -> str:
        d = self.global_dim
        return (
            f"Arrowhead of {self.num_units} units of dimension {self.local_dim} and "
            f"{d} global dimension{'s' if d != 1 else ''}"
        )

    @property
    def global_dim(self) -> int:
        """The number of globals, d."""
        return self.border.shape[-1]

    @property
    def num_units(self) -> int:
        """The number of units, N."""
        return self.border.shape[-3]

    @property
    def local_dim(self) -> int:
        """The dimension of one unit, k."""
        return self.border.shape[-2]

    # What is made on demand and kept has a graph if the rest has one, even if it is asked for under no_grad first.

    @cached_property
    def regression(self) -> Tensor:
        """See the class."""
        with torch.enable_grad():
            return blocks.multiply(self.local_scale_tril, self._whitened)

    @cached_property
    def global_scale_tril(self) -> Tensor:
        """See the class."""
        with torch.enable_grad():
            scale, failed = blocks.scale_tril(self.schur_complement)
        raise_if_any(failed, self.schur_complement, describe_schur_complement)
        return scale

    def with_schur(self, schur: Tensor) -> Arrowhead:
        r"""Return the arrowhead of the same borders and tails with this Schur complement, hence another head.

        :param Tensor schur: positive definite, ``(*, d, d)``; a repair, or the curvature of a marginal density.
        :return: one with :math:`G = S + \sum_i C_i^\top W_i`; the tails are not factored again.
        :raises ValueError: if the shape is another.
        """
        if schur.shape != self.head.shape:
            raise ValueError(f"schur has shape {tuple(schur.shape)}; that of the head is {tuple(self.head.shape)}")
        other = self._replace(head=schur + self._explained, schur_complement=schur)
        vars(other).pop("global_scale_tril", None)
        return other

    def unscale(self, weight: float) -> Arrowhead:
        r"""Return the precision that a subsampled plate calls for, from the arrowhead of the scaled log joint.

        Pyro multiplies the terms of :math:`B` out of :math:`N` units by :math:`w = N/B`, so that their blocks come as
        :math:`wC` and :math:`wU`. :math:`S` and :math:`W` are right as they are; the conditional precision of a unit is
        :math:`U`. See :func:`~laplace_amort.subsample_information`, which does the same to a dense matrix.

        :param float weight: :math:`w`, positive.
        :return: itself if the weight is 1; else one with the same :math:`S` and :math:`W`, and :math:`C`, :math:`U`.
        :raises ValueError: if the weight is not positive.
        """
        if not weight > 0:
            raise ValueError(f"weight is {weight}; it is the number of units over that of the minibatch, and positive")
        if weight == 1:
            return self
        explained = self._explained / weight
        return self._replace(
            head=self.schur_complement + explained,
            border=self.border / weight,
            tail=self.tail / weight,
            local_scale_tril=self.local_scale_tril * weight**0.5,
            _whitened=self._whitened / weight**0.5,
            _explained=explained,
        )

    def log_det(self) -> Tensor:
        r"""Return :math:`\log|P| = \log|S| + \sum_i \log|U_i|`, of shape ``(*,)``."""
        return -blocks.log_det(self.global_scale_tril) - blocks.log_det(self.local_scale_tril).sum(-1)

    def matvec(self, global_: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
        r"""Multiply by :math:`P`.

        :param Tensor global_: ``(*, d)``, after dimensions of samples.
        :param Tensor local: ``(*, N, k)``, after the same.
        :return: the same shapes.
        """
        border = self._flat(self.border)
        head_part = blocks.matvec(self.head, global_) + blocks.matvec(border.mT, local.flatten(-2))
        return head_part, self._per_unit(blocks.matvec(border, global_)) + blocks.matvec(self.tail, local)

    def solve(self, global_: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
        r"""Multiply by :math:`P^{-1}`.

        :param Tensor global_: ``(*, d)``, after dimensions of samples.
        :param Tensor local: ``(*, N, k)``, after the same.
        :return: the same shapes.
        """
        white = blocks.matvec(self.local_scale_tril.mT, local)
        rest = global_ - blocks.matvec(self._flat(self._whitened).mT, white.flatten(-2))
        solution = blocks.matvec(self.global_scale_tril, blocks.matvec(self.global_scale_tril.mT, rest))
        return solution, self.draw_local(solution, white)

    def solve_tails(self, local: Tensor) -> Tensor:
        r"""Multiply by :math:`U^{-1}`, unit by unit.

        :param Tensor local: ``(*, N, k)``, after dimensions of samples.
        :return: the same shape.
        """
        return blocks.matvec(self.local_scale_tril, blocks.matvec(self.local_scale_tril.mT, local))

    def draw(self, noise_global: Tensor, noise_local: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return draws from :math:`N(0, P^{-1})`, made of standard normal noise.

        They are those of a dense ``MultivariateNormal`` from the same noise, in the order :math:`\theta, y_1, \dots,
        y_N`.

        :param Tensor noise_global: ``(*, d)``, after dimensions of samples.
        :param Tensor noise_local: ``(*, N, k)``, after the same.
        :return: the same shapes.
        """
        deviation = blocks.matvec(self.global_scale_tril, noise_global)
        return deviation, self.draw_local(deviation, noise_local)

    def draw_local(self, deviation: Tensor, noise: Tensor) -> Tensor:
        r"""Return draws of the units given the globals, :math:`-W_i \theta + T_i \epsilon_i`.

        They are made as :math:`T_i (\epsilon_i - V_i \theta)`, which takes less than :meth:`conditional_mean`.

        :param Tensor deviation: of the globals from their mean, ``(*, d)``, after dimensions of samples.
        :param Tensor noise: standard normal, ``(*, N, k)``, after the same.
        :return: deviations of the units from their mean, of the shape of the noise.
        """
        shift = self._per_unit(blocks.matvec(self._flat(self._whitened), deviation))
        return blocks.matvec(self.local_scale_tril, noise - shift)

    def conditional_mean(self, deviation: Tensor) -> Tensor:
        r"""Return :math:`-W_i \theta` by one matrix product for all samples.

        :param Tensor deviation: of the globals from their mean, ``(*, d)``, after dimensions of samples.
        :return: ``(*, N, k)``, after the same.
        """
        return self._per_unit(blocks.matvec(self._flat(self.regression), -deviation))

    def conditional_covariance(self) -> Tensor:
        r"""Return that of each unit given the globals, :math:`U_i^{-1}`, ``(*, N, k, k)``."""
        return blocks.multiply(self.local_scale_tril, self.local_scale_tril.mT)

    def global_covariance(self) -> Tensor:
        r"""Return :math:`S^{-1}`, ``(*, d, d)``."""
        return self.global_scale_tril @ self.global_scale_tril.mT

    def global_variance(self) -> Tensor:
        r"""Return the diagonal of :math:`S^{-1}`, ``(*, d)``."""
        return (self.global_scale_tril**2).sum(-1)

    def local_covariance(self) -> Tensor:
        r"""Return the marginal one of each unit, :math:`U_i^{-1} + W_i S^{-1} W_i^\top`, ``(*, N, k, k)``."""
        spread = self._spread()
        return self.conditional_covariance() + spread @ spread.mT

    def local_variance(self) -> Tensor:
        """Return the diagonals of :meth:`local_covariance`, ``(*, N, k)``."""
        return (self.local_scale_tril**2).sum(-1) + (self._spread() ** 2).sum(-1)

    def cross_covariance(self) -> Tensor:
        r"""Return that of each unit with the globals, :math:`-W_i S^{-1}`, ``(*, N, k, d)``."""
        return -(self._flat(self.regression) @ self.global_covariance()).reshape(self.border.shape)

    def to_dense(self) -> Tensor:
        """Return :math:`P` in full, ``(*, d + N k, d + N k)``; for tests, and for few units."""
        border = self._flat(self.border)
        identity = torch.eye(self.num_units, dtype=self.tail.dtype, device=self.tail.device)
        tail = identity[:, None, :, None] * self.tail.unsqueeze(-2)  # (*, N, k, N, k)
        tail = tail.flatten(-4, -3).flatten(-2)
        return torch.cat([torch.cat([self.head, border.mT], -1), torch.cat([border, tail], -1)], -2)

    def to(self, dtype: torch.dtype) -> Arrowhead:
        """Return the same in another dtype; nothing is factored again."""
        return self._replace(**{name: part.to(dtype) for name, part in vars(self).items() if isinstance(part, Tensor)})

    def _replace(self, **parts: Any) -> Arrowhead:
        """With other parts, and what was made on demand so far."""
        other = copy.copy(self)
        vars(other).update(parts)
        return other

    def _flat(self, border: Tensor) -> Tensor:
        """Return the border as one matrix, ``(*, N k, d)``."""
        return border.reshape(*border.shape[:-3], self.num_units * self.local_dim, self.global_dim)

    def _per_unit(self, values: Tensor) -> Tensor:
        """From ``(*, N k)`` to ``(*, N, k)``."""
        return values.unflatten(-1, (self.num_units, self.local_dim))

    def _spread(self) -> Tensor:
        """How much of the units' deviation is that of the globals: :math:`W_i T_S`, ``(*, N, k, d)``."""
        return (self._flat(self.regression) @ self.global_scale_tril).reshape(self.border.shape)
