"""The amortized Laplace family: the Gaussian that follows from where the globals stand."""

from __future__ import annotations

from typing import Any, Protocol

from laplace_amort.autodiff import arrowhead_information, dual_path
from laplace_amort.guide.gaussian import LaplaceGaussian
from laplace_amort.guide.heads import Head
from laplace_amort.guide.warm_start import WarmStart
from laplace_amort.linalg import Arrowhead, Repair, repair_head, repair_tails
from laplace_amort.model import UnitModel
from laplace_amort.units import Mode

__all__ = ["Family", "gaussian_of"]


class Family(Protocol):
    """Where the globals stand, and how a Gaussian is made of that: what an automatic guide consists of."""

    loc: Any  # a tensor ``(d,)``
    mode: Any
    head: Head
    head_repair: Repair
    tail_repair: Repair
    _warm_start: WarmStart


def gaussian_of(family: Family, unit_model: UnitModel, mode: Mode, head: Head) -> LaplaceGaussian:
    """Return the Gaussian that a family has for a model that is at hand, differentiable in its parameter.

    :param Family family: a guide, or its twin in double precision.
    :param UnitModel unit_model: the model.
    :param mode: how the modes of the units are found.
    :param head: which curvature stands for the globals.
    """
    theta = dual_path(family.loc)
    units = unit_model.units
    local_loc = mode.find(unit_model, theta.mean, family._warm_start.at(units, theta.mean))
    weight = unit_model.layout.weight
    blocks = arrowhead_information(unit_model.log_joint, theta.curvature, local_loc)
    tail, tail_report = repair_tails(family.tail_repair, blocks.tail)
    scaled = Arrowhead(blocks.head, blocks.border, tail)
    schur = head(unit_model.log_joint, theta.curvature, local_loc, scaled, weight)
    family._warm_start.remember(units, theta.mean, local_loc, scaled.regression)
    schur, head_report = repair_head(family.head_repair, schur, blocks.head)
    return LaplaceGaussian(
        unit_model=unit_model,
        global_loc=theta.mean,
        local_loc=local_loc,
        precision=scaled.with_schur(schur).unscale(weight),
        head_report=head_report,
        tail_report=tail_report,
    )
