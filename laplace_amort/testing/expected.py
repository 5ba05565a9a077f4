r"""The precision that a guide should have, worked out from finite differences of the model's log joint alone.

What is here is slow, dense and simple on purpose: it shares no formula with the guides that it judges, but the repair,
which is part of what a guide is asked to be.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from laplace_amort.autodiff import observed_information, subsample_information
from laplace_amort.errors import GuideCheckError
from laplace_amort.guide import AutoLaplaceFamily, JointCurvature, MarginalCurvature
from laplace_amort.linalg import RepairFunction, SoftAbs, repair_head, repair_tails
from laplace_amort.model import LogJoint, UnitLayout, find_layout
from laplace_amort.testing.finite_differences import second_derivative

__all__ = ["DensePrecision", "Expected", "ExpectedPrecision", "JointPrecision", "MarginalPrecision", "expected_of"]


_MAX_STEPS = 100


class Expected(NamedTuple):
    """What the precision of a guide should be.

    :param Tensor precision: ``(D, D)``, in the packed order of the log joint.
    :param Tensor error: estimates of its absolute errors, ``(D, D)``.
    :param str note: what was repaired.
    """

    precision: Tensor
    error: Tensor
    note: str


class ExpectedPrecision(Protocol):
    """Turns the information of the model into the precision that a guide should have; any object with this method."""

    def __call__(self, log_joint: LogJoint, mean: Tensor, information: Tensor, error: Tensor) -> Expected:
        """Return the expected precision.

        :param LogJoint log_joint: of the model, subsampled terms scaled.
        :param Tensor mean: of the guide, packed, ``(D,)``.
        :param Tensor information: negative Hessian of the log joint there, ``(D, D)``, by finite differences.
        :param Tensor error: estimates of its absolute errors, ``(D, D)``.
        """


@dataclass(frozen=True)
class DensePrecision:
    """The observed information of all latents at once, repaired as one matrix: what a hand-written guide is asked for.

    :param repair: called with the matrix alone.
    """

    repair: RepairFunction = field(default_factory=SoftAbs)

    def __call__(self, log_joint: LogJoint, mean: Tensor, information: Tensor, error: Tensor) -> Expected:
        """Return the expected precision."""
        precision = subsample_information(information, log_joint.subsample_scale().to(mean))
        repaired, report = self.repair(precision)
        return Expected(repaired, error, f"repair of the expected precision: {report}")


@dataclass(frozen=True)
class JointPrecision:
    r"""The block arrowhead of :class:`~laplace_amort.AutoLaplaceFamily` with the joint curvature as its head.

    With blocks :math:`G, C_i, U_i` of the information, the tails are repaired unit by unit, in units of their root mean
    square over the units, then the Schur complement :math:`S = G - \sum_i C_i^\top U_i^{-1} C_i`, in units of
    :math:`\sqrt{G_{jj}^2 + 1}`. In a minibatch the conditional of a unit has the precision without the weight.

    :param str unit_plate: name of the unit plate, as the guide takes it.
    :param head_repair: of :math:`S`, called with the matrix and a scale.
    :param tail_repair: of the :math:`U_i`, likewise.
    """

    unit_plate: str | None = None
    head_repair: RepairFunction = field(default_factory=SoftAbs)
    tail_repair: RepairFunction = field(default_factory=SoftAbs)

    def __call__(self, log_joint: LogJoint, mean: Tensor, information: Tensor, error: Tensor) -> Expected:
        """Return the expected precision."""
        units = _Units(log_joint, find_layout(log_joint.sites, self.unit_plate))
        blocks, d = information[units.order][:, units.order], units.layout.global_dim
        head, border = blocks[:d, :d], blocks[d:, :d]
        tail, tail_report = self._repaired_tail(units, blocks[d:, d:])
        explained = border.mT @ torch.linalg.solve(tail, border)
        addition, addition_error = self._addition(units, mean[units.order], head - explained, head)
        schur, head_report = repair_head(self.head_repair, head - explained + addition, head)
        weight = units.layout.weight
        precision = torch.cat(
            [
                torch.cat([schur + explained / weight, border.mT / weight], dim=1),
                torch.cat([border / weight, tail / weight], dim=1),
            ]
        )
        errors = error[units.order][:, units.order].clone()
        errors[:d, :d] += addition_error
        note = f"repair of the expected precision: head {head_report}; tails {tail_report}"
        return Expected(precision[units.back][:, units.back].detach(), errors[units.back][:, units.back], note)

    def _repaired_tail(self, units: _Units, tail: Tensor) -> tuple[Tensor, Any]:
        """Repair the diagonal blocks ``(N, k, k)``; what lies beside them, if anything does, stays and will show."""
        n, k = units.layout.num_units, units.layout.local_dim
        index = torch.arange(n * k).reshape(n, k)
        where = index[:, :, None], index[:, None, :]
        repaired, report = repair_tails(self.tail_repair, tail[where])
        return tail.index_put(where, repaired), report

    def _addition(self, units: _Units, point: Tensor, schur: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is added to the Schur complement ``(d, d)``, and its error: nothing."""
        return torch.zeros_like(schur), torch.zeros_like(schur)


@dataclass(frozen=True)
class MarginalPrecision(JointPrecision):
    r"""The block arrowhead of :class:`~laplace_amort.AutoLaplaceFamily` with the marginal curvature as its head.

    To the Schur complement of :class:`JointPrecision` comes the Hessian of
    :math:`\frac12 \sum_i \log|U_i(\theta, \hat y(\theta))|`, by second differences of that sum: at every :math:`\theta`
    the modes :math:`\hat y` are searched anew, and the determinant is that of the dense information of all units.
    """

    def _addition(self, units: _Units, point: Tensor, schur: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        d = units.layout.global_dim
        theta, start = point[:d], point[d:]
        # Steps in units of the standard deviations to be, or not much longer where the curvature is about zero.
        step = torch.maximum(schur.diagonal(), 1e-2 * head.diagonal().abs()).rsqrt()

        def half_log_det(direction: Tensor, h: float) -> Tensor:
            return units.half_log_det(theta + h * direction, start).reshape(1)

        def along(i: int, j: int) -> tuple[Tensor, Tensor]:
            direction = torch.zeros_like(theta)
            direction[i] += step[i]
            if i != j:
                direction[j] += step[j]
            tolerance = torch.finfo(theta.dtype).eps ** 0.5
            return second_derivative(functools.partial(half_log_det, direction), theta.dtype, tolerance)

        values, errors = schur.new_zeros(d, d), schur.new_zeros(d, d)
        for i in range(d):
            values[i, i], errors[i, i] = along(i, i)
        for i in range(d):
            for j in range(i):
                both, error = along(i, j)  # of a sum: the two squares, and the product twice
                values[i, j] = values[j, i] = (both - values[i, i] - values[j, j]) / 2
                errors[i, j] = errors[j, i] = (error + errors[i, i] + errors[j, j]) / 2
        scale = step.unsqueeze(-1) * step
        return values / scale, errors / scale


class _Units:
    """The log joint as a function of globals ``(d,)`` and of all latents of units in one vector ``(N k,)``."""

    def __init__(self, log_joint: LogJoint, layout: UnitLayout) -> None:
        self.log_joint = log_joint
        self.layout = layout
        # Send positions through the layout to see where each element of (theta, y_1 .. y_N) lies in the packed vector.
        d, n, k = layout.global_dim, layout.num_units, layout.local_dim
        positions = torch.arange(d + n * k, dtype=torch.float64)
        there = log_joint.pack(layout.to_sites(positions[:d], positions[d:].reshape(n, k))).long()
        self.order, self.back = there.argsort(), there

    def half_log_det(self, theta: Tensor, start: Tensor) -> Tensor:
        """Return the sum of log|U_i| / 2 at the modes; in a minibatch each unit counts as often as it does there."""
        factor, info = torch.linalg.cholesky_ex(self._information(theta, self._mode(theta, start)))
        if info:
            raise GuideCheckError(
                "the search for the modes of the units ended where they have no maximum, so the marginal curvature "
                "cannot be checked. Is the guide somewhere sensible? Fit it for some steps first"
            )
        return self.layout.weight * factor.diagonal().log().sum()

    def _value(self, theta: Tensor, local: Tensor) -> Tensor:
        return self.log_joint(torch.cat([theta, local])[self.back])

    def _information(self, theta: Tensor, local: Tensor) -> Tensor:
        return observed_information(functools.partial(self._value, theta), local).detach()

    def _mode(self, theta: Tensor, local: Tensor) -> Tensor:
        """Search by damped Newton for all units at once, down to where steps are rounding errors."""
        smallest = 16 * torch.finfo(local.dtype).eps
        for _ in range(_MAX_STEPS):
            point = local.detach().requires_grad_()
            attached = self._value(theta, point)
            (gradient,) = torch.autograd.grad(attached, point)
            value = attached.detach()
            step = torch.linalg.solve(SoftAbs()(self._information(theta, local))[0], gradient)
            slope = float(gradient @ step)
            if slope <= smallest**1.5 * (1 + abs(float(value))):  # the square of its length in standard deviations
                return local + step
            share = 1.0
            # Near the mode differences of values are rounding errors, and Newton's step is right.
            while slope > smallest**0.5 and not self._value(theta, local + share * step) > value and share > 1e-6:
                share /= 2
            local = local + share * step
        raise GuideCheckError(
            f"the modes of the units were not found in {_MAX_STEPS} Newton steps, so the marginal curvature cannot be "
            "checked. Is the guide somewhere sensible? Fit it for some steps first"
        )


def expected_of(guide: object, repair: RepairFunction) -> ExpectedPrecision:
    """Return what the precision of a guide should be, by the head, repair and unit plate that an automatic one has.

    :param guide: that has run.
    :param repair: of a guide that is not automatic.
    :raises GuideCheckError: if the head is of an unknown kind.
    """
    if not isinstance(guide, AutoLaplaceFamily):
        return DensePrecision(repair)
    for head, expected in ((JointCurvature, JointPrecision), (MarginalCurvature, MarginalPrecision)):
        if isinstance(guide.head, head):
            return expected(guide.unit_plate, guide.head_repair, guide.tail_repair)
    raise GuideCheckError(
        f"no expectation is known for the head {guide.head!r}; say which precision the guide should have:\n"
        "    CheckSettings(precision=JointPrecision())"
    )
