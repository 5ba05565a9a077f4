"""What the demos have to know of each example: the mode of its units, and what its numbers mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from laplace_amort import ClosedFormMode, NewtonMode
from laplace_amort.examples import datasets, epil, multisite, radon
from laplace_amort.examples.titles import TITLES

__all__ = ["EXAMPLES", "Estimates", "Example"]

Estimates = dict[str, tuple[Tensor, Tensor]]  # by site: an estimate for every unit, and its standard error


@dataclass(frozen=True)
class Example:
    """One example, and what its numbers mean.

    :param str title: one line on the data and the model.
    :param module: with ``data`` and ``model``.
    :param str unit: what one unit is.
    :param raw_estimates: from the arguments of the model and the reference to the units' own estimates of each local
        site, without pooling; NaN where a unit has none.
    :param labels: what the elements of a global site mean, by site.
    :param mode: how the amortized guides find the mode of a unit.
    """

    title: str
    module: Any
    unit: str
    raw_estimates: Callable[[tuple[Tensor, ...], datasets.Reference], Estimates]
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    mode: NewtonMode | ClosedFormMode = field(default_factory=NewtonMode)


def _raw_effects(args: tuple[Tensor, ...], reference: datasets.Reference) -> Estimates:
    effect, se = args
    return {"t": (effect - reference.variables["mu"].mean, se)}


def _raw_log_rates(args: tuple[Tensor, ...], reference: datasets.Reference) -> Estimates:
    x, y = args
    expected = (x @ reference.variables["beta"].mean).exp().sum(-1)
    count = y.sum(-1) + 0.5  # half a seizure keeps the logarithm of a patient without any finite
    return {"u": ((count / expected).log(), count.rsqrt())}


def _raw_lines(args: tuple[Tensor, ...], reference: datasets.Reference) -> Estimates:
    county, floor, log_radon = args
    storey, homes = torch.stack([1 - floor, floor]), torch.nn.functional.one_hot(county).to(floor)
    count = storey @ homes
    basement, ground = (storey * log_radon) @ homes / count  # NaN where there is none
    variance = reference.variables["sigma_y"].mean ** 2 / count
    return {"alpha": (basement, variance[0].sqrt()), "beta": (ground - basement, (variance[0] + variance[1]).sqrt())}


EXAMPLES = {
    "multisite": Example(
        title=TITLES["multisite"],
        module=multisite,
        unit="site",
        raw_estimates=_raw_effects,
        mode=ClosedFormMode(multisite.closed_form_mode),
    ),
    "epil": Example(
        title=TITLES["epil"],
        module=epil,
        unit="patient",
        raw_estimates=_raw_log_rates,
        labels={"beta": ("intercept", "log base", "treatment", "treatment x base", "log age", "period 4")},
    ),
    "radon": Example(
        title=TITLES["radon"],
        module=radon,
        unit="county",
        raw_estimates=_raw_lines,
    ),
}
