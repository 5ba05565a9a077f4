"""Latents that ``obs_mask`` makes of observations: those that nothing else depends on are no latents for inference.

Pyro splits ``pyro.sample("y", fn, obs=y, obs_mask=seen)`` into ``y_observed``, masked, a latent ``y_unobserved`` with
the opposite mask, and ``y``, which has the one or the other. Given everything else, the density of the latent
integrates to one. So where nothing depends on it, it is left out, and drawn from its distribution afterwards, which may
be discrete. Where something does, as where a covariate is imputed, it stays a latent.

Its elements that were seen are nowhere used, and have no density in Pyro's model. A flat direction has no curvature;
so they are given a standard normal one, in unconstrained space, which integrates to one as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from laplace_amort.autodiff import nearby
from laplace_amort.errors import ModelError
from laplace_amort.model.missing import inside
from laplace_amort.model.sites import transform_of

__all__ = [
    "Imputation",
    "alternatives",
    "first_difference",
    "is_imputed",
    "observed_part",
    "refuse_discrete",
    "standard_normal_where_seen",
    "unseen_of",
    "whole_of",
]

_OBSERVED, _UNOBSERVED = "_observed", "_unobserved"
# What tells such a site in a trace, by which its mask is kept.
_UNSEEN = "_laplace_amort_unseen"
# Values of a discrete latent that are tried, at most, and how far from the first those of a continuous one are.
_MOST, _SCALES = 16, (1.0, 3.0, 0.3)


def whole_of(name: str) -> str:
    """Return the name of a site, from that of its unobserved part."""
    return name.removesuffix(_UNOBSERVED)


def observed_part(name: str) -> str:
    """Return the name of the observed part of a site, from that of the unobserved one."""
    return whole_of(name) + _OBSERVED


def is_imputed(node: Any) -> bool:
    """Tell whether a site is the unobserved part of another, and was left out of the latents."""
    return _UNSEEN in node.get("infer", {})


def unseen_of(node: Any) -> Tensor:
    """Return the mask of a site that was left out: true where nothing was observed."""
    mask: Tensor = node["infer"][_UNSEEN]
    return mask


class Imputation(Messenger):
    """Leave the unobserved parts of sites out of the latents: a value in their support stands there.

    It is to be the innermost handler around a model.

    :param frozenset kept: names of those that stay latents.
    :param values: by name, to stand there instead.
    """

    def __init__(self, kept: frozenset[str] = frozenset(), values: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.kept, self.values = kept, values or {}
        self._observed: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name, mask = msg["name"], msg["mask"]
        if not isinstance(mask, Tensor):
            return
        if name.endswith(_OBSERVED):
            self._observed[name] = mask
        if msg["is_observed"] or name in self.kept or not name.endswith(_UNOBSERVED):
            return
        if observed_part(name) not in self._observed:
            return
        if msg["value"] is None:
            value = self.values.get(name, inside(msg["fn"]))
            if value is None:
                return  # nothing is known of its support: a latent, as it is written
            msg["value"] = value.expand(msg["fn"].shape())
        msg["infer"] = {**msg["infer"], _UNSEEN: mask}
        msg["is_observed"], msg["mask"] = True, False


def alternatives(fn: Any) -> Iterator[Tensor]:
    """Yield values of a latent that was left out, other than the one that stands there.

    :param fn: its distribution.
    """
    shape = fn.shape()
    if fn.has_enumerate_support:
        for value in fn.enumerate_support(expand=False)[:_MOST]:
            yield value.expand(shape)
    elif fn.support.is_discrete:
        first = inside(fn)
        for more in (1, 2):
            yield (torch.zeros(shape) if first is None else first.expand(shape)) + more
        for _ in range(_MOST // 4):
            yield fn.sample()
    else:
        transform = transform_of({"name": "", "fn": fn})
        zeros = torch.zeros(transform.inverse_shape(shape))
        for seed, scale in enumerate(_SCALES):
            yield transform(nearby(zeros, scale, seed))


def first_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first site whose terms differ between two runs; None if none does.

    :param one: terms by site.
    :param other: of a run that differs in what was imputed.
    """
    for name in [*one, *(name for name in other if name not in one)]:
        if name not in one or name not in other or one[name].shape != other[name].shape:
            return name
        if not bool(((one[name] == other[name]) | (one[name].isnan() & other[name].isnan())).all()):
            return name
    return None


def refuse_discrete(node: Any, dependent: str) -> None:
    """Refuse a discrete latent that something depends on.

    :param node: of the unobserved part.
    :param str dependent: name of a site that depends on it.
    :raises ModelError: naming both.
    """
    if not (node["fn"].has_enumerate_support or node["fn"].support.is_discrete):
        return
    stem, kind = whole_of(node["name"]), type(node["fn"]).__name__
    missing = int(unseen_of(node).sum())
    raise ModelError(
        f"site '{stem}' ({kind}) has {missing} elements that obs_mask hides, and site '{dependent}' depends on their "
        "values: they are discrete latents, and a Hessian needs continuous ones. Sum them out (MixtureSameFamily), or "
        "leave these observations out of both sites:\n"
        f"    pyro.sample('{stem}', dist.{kind}(...).mask(seen), obs=data)\n"
        f"    pyro.sample('{dependent}', dist...mask(seen), obs=...)"
    )


def standard_normal_where_seen(log_density: Tensor | None, node: Any, unconstrained: Tensor, event_dim: int) -> Tensor:
    """Give the elements of a latent that were seen a standard normal density in unconstrained space.

    :param Tensor log_density: log-Jacobian of each element, in its batch shape; None of the identity.
    :param node: the message of the site; its mask is true where nothing was observed.
    :param Tensor unconstrained: its value.
    :param int event_dim: rightmost dimensions of that which belong to one draw.
    """
    normal = -0.5 * unconstrained**2 - 0.5 * math.log(2 * math.pi)
    if event_dim:
        normal = normal.flatten(-event_dim).sum(-1)
    rest = torch.zeros_like(normal) if log_density is None else log_density
    return torch.where(node["mask"], rest, normal)
