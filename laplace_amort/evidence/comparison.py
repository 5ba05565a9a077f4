"""How far two posteriors are apart, in means and standard deviations of everything."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from laplace_amort.posterior import Posterior
from laplace_amort.types import element_name

__all__ = ["Comparison", "PosteriorComparison", "compare", "compare_globals"]


class Comparison(NamedTuple):
    """What is worst among some elements.

    :param float mean: largest difference of means, in standard deviations of the reference.
    :param float sd: largest difference of standard deviations, as a share of those of the reference.
    :param str where: the element that is worst; empty if there is none.
    """

    mean: float
    sd: float
    where: str


class PosteriorComparison(NamedTuple):
    """What is worst among globals and units.

    :param Comparison globals_: of all elements of global sites.
    :param Comparison units: of all elements of local sites.
    """

    globals_: Comparison
    units: Comparison


def compare(posterior: Posterior, reference: Posterior) -> PosteriorComparison:
    """Compare all means and standard deviations, of constrained values.

    :param Posterior posterior: of some model and data.
    :param Posterior reference: of the same.
    """
    layout = posterior.gaussian.unit_model.layout
    parts = *posterior.moments, *reference.moments
    return PosteriorComparison(
        *(_worst({name: [part[name] for part in parts] for name in sites})
          for sites in (layout.global_sites, layout.local_sites))
    )  # fmt: skip


def compare_globals(posterior: Posterior, reference: Posterior) -> Comparison:
    """Compare means and standard deviations of the globals alone, which takes no look at the units.

    :param Posterior posterior: of some model and data.
    :param Posterior reference: of the same.
    """
    parts = *posterior.global_moments, *reference.global_moments
    return _worst({name: [part[name] for part in parts] for name in posterior.gaussian.unit_model.layout.global_sites})


def _worst(sites: dict[str, list[Tensor]]) -> Comparison:
    """Find what is worst in means and standard deviations by site, and in those of the reference."""
    worst, means, sds = (-1.0, ""), [0.0], [0.0]
    for name, (mean, sd, true_mean, true_sd) in sites.items():
        if not mean.numel():
            continue
        fixed = true_sd <= torch.finfo(true_sd.dtype).eps * (1 + true_mean.abs())  # as the diagonal of a correlation
        scale = torch.where(fixed, torch.ones_like(true_sd), true_sd)
        parts = (mean - true_mean) / scale, sd / scale - 1
        # What is no number is no agreement.
        off, ratio = (
            part.abs().masked_fill(fixed, 0.0).nan_to_num(nan=torch.inf, posinf=torch.inf).reshape(-1) for part in parts
        )
        means.append(float(off.max()))
        sds.append(float(ratio.max()))
        size = off + 2 * ratio
        index = int(size.argmax())
        place = [int(i) for i in torch.unravel_index(torch.tensor(index), mean.shape)]
        worst = max(worst, (float(size[index]), element_name(name, place)))
    return Comparison(max(means), max(sds), worst[1])
