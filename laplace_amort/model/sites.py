"""The latent sites of a Pyro model: where each lies in the packed vector, and how it is unconstrained.

Reads the nodes of traces that :mod:`laplace_amort.model.runs` makes; traces nothing itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro.distributions
import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import broadcast_shape
from pyro.infer.autoguide.initialization import init_to_median
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import Transform

from laplace_amort.errors import ModelError

__all__ = [
    "IDENTITY",
    "LatentSite",
    "bounds_of",
    "check_bounds",
    "check_plate_sizes",
    "feasible",
    "find_sites",
    "init_to_zero",
    "is_fixed",
    "layers_of",
    "log_abs_det",
    "plates_of",
    "refuse_boundary",
    "scaled_sites",
    "subsample_scale_of",
    "transform_of",
    "undressed",
]

IDENTITY = biject_to(constraints.real)
_CONSTANTS = tuple(vars(pyro.distributions.constraints).values())
_OF_TORCH_OR_PYRO = torch.distributions.constraints.__name__, pyro.distributions.constraints.__name__
_WRAPPERS = torch.distributions.Independent, MaskedDistribution, pyro.distributions.ExpandedDistribution


@dataclass(frozen=True)
class LatentSite:
    """One latent sample site of a model, and its place in the packed vector.

    :param str name: name of the site.
    :param torch.Size shape: of the unconstrained value, dimensions of plates included.
    :param int event_dim: rightmost dimensions of ``shape`` that belong to one draw.
    :param int start: offset of the first element in the packed vector.
    :param tuple plates: the frames of the vectorized plates around the site, outermost first.
    :param transform: from unconstrained to constrained; ``None`` where the support depends on other latents.
    :param int constrained_event_dim: rightmost dimensions of the constrained value that belong to one draw.
    :param bool weighted: whether the model has a ``poutine.scale`` or ``poutine.mask`` around the site.
    :param tuple sequential_plates: names of the plates around the site that are loops in Python.
    :param tuple bounds: of the support, as tensors, where they are the same in every run.
    """

    name: str
    shape: torch.Size
    event_dim: int
    start: int
    plates: tuple[Any, ...]
    transform: Transform | None
    constrained_event_dim: int
    weighted: bool
    sequential_plates: tuple[str, ...] = ()
    bounds: tuple[Tensor, ...] = ()

    @property
    def slice(self) -> slice:
        """Where the site lies in the packed vector."""
        return slice(self.start, self.start + self.shape.numel())

    def shape_under(self, leading: torch.Size) -> tuple[int, ...]:
        """Return the shape of an unconstrained value that has leading dimensions of enclosing plates."""
        # Pyro's function: that of torch loads its compiler the first time.
        return tuple(broadcast_shape(self.shape, leading + (1,) * self.event_dim))

    @property
    def subsample_scale(self) -> float:
        """Product of ``N / B`` over the subsampled plates around the site."""
        return subsample_scale_of(self.plates)


def layers_of(fn: Any) -> list[Any]:
    """Return a distribution and what it wraps by ``to_event``, ``expand`` and ``mask``, the plain one last."""
    layers = [fn]
    while isinstance(layers[-1], _WRAPPERS):
        layers.append(layers[-1].base_dist)
    return layers


def undressed(fn: Any) -> Any:
    """Return the plain distribution in a wrapped one: without ``to_event``, ``expand`` and ``mask``."""
    return layers_of(fn)[-1]


def init_to_zero(site: Any) -> Tensor:
    """The image of zero, which is feasible; also where Pyro's own strategies give up."""
    _refuse_unless_continuous(site)
    transform = transform_of(site)
    try:
        like = site["fn"].sample()
    except NotImplementedError:
        like = torch.zeros(())
    return transform(like.new_zeros(transform.inverse_shape(site["fn"].shape())))


def feasible(init_loc_fn: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """Return one of Pyro's ``init_to_*`` strategies, mended where it has no value, or one that is not finite."""

    def init(site: Any) -> Tensor:
        try:
            value = init_loc_fn(site)
            # The mean of a heavy tail is infinite, and Pyro takes it for a value.
            return value if value.isfinite().all() else init_to_median(site)
        except NotImplementedError:  # nothing to sample from: an improper prior
            return init_to_zero(site)

    return init


def find_sites(trace: Any) -> dict[str, LatentSite]:
    """Return the latent sites of a trace, in the order of the model.

    :raises ModelError: if there is none, or one cannot be handled.
    """
    sites: dict[str, LatentSite] = {}
    start = 0
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or node["is_observed"] or site_is_subsample(node):
            continue
        transform, constant = transform_of(node), _is_constant(node)
        constrained = node["fn"].shape()
        shape = torch.Size(transform.inverse_shape(constrained))
        sites[name] = LatentSite(
            name=name,
            shape=shape,
            event_dim=node["fn"].event_dim + len(shape) - len(constrained),
            start=start,
            plates=plates_of(node),
            transform=transform if constant else None,
            constrained_event_dim=node["fn"].event_dim,
            weighted=isinstance(node["scale"], Tensor)
            or node["scale"] != subsample_scale_of(plates_of(node))
            or node["mask"] is not None,
            sequential_plates=tuple(frame.name for frame in node["cond_indep_stack"] if not frame.vectorized),
            bounds=tuple(bound.clone() for bound in bounds_of(node["fn"].support)) if constant else (),
        )
        start += shape.numel()
    if not sites:
        raise ModelError("the model has no latent sample site: every one is observed, so there is nothing to infer")
    return sites


def scaled_sites(trace: Any) -> list[str]:
    """Return the sites whose density has a weight (``poutine.scale``) that is not that of a minibatch.

    :param trace: of the model.
    """
    return [
        name
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and not site_is_subsample(node)
        and bool((torch.as_tensor(node["scale"]) != subsample_scale_of(plates_of(node))).any())
    ]


def _refuse_unless_continuous(node: Any) -> None:
    if node["fn"].has_enumerate_support or node["fn"].support.is_discrete:
        raise ModelError(
            f"latent site '{node['name']}' is discrete ({type(node['fn']).__name__}{_within(node)}), and a Hessian "
            "needs continuous latents. If it is data, obs= is missing; if it is unknown, sum it out:\n"
            f"    pyro.sample('{node['name']}', ..., obs=data)\n"
            "    pyro.sample('observed', dist.MixtureSameFamily(dist.Categorical(probs), dist_in_each_state), obs=data)"
        )
    for frame in node["cond_indep_stack"]:
        if not frame.vectorized and frame.full_size is not None and frame.size != frame.full_size:
            raise ModelError(
                f"latent site '{node['name']}' lies in the sequential, subsampled plate '{frame.name}'; vectorize it:\n"
                f"    with pyro.plate('{frame.name}', {frame.full_size}, subsample_size={frame.size}) as indices: ..."
            )


def _within(node: Any) -> str:
    names = ", ".join(f"'{frame.name}'" for frame in node["cond_indep_stack"])
    return f", in plate {names}" if names else ""


def transform_of(node: Any) -> Transform:
    """The bijection from unconstrained space onto the support of a site; the identity is always the same object."""
    support = node["fn"].support
    if type(support).__name__ == "MixtureSameFamilyConstraint":
        support = support.base_constraint  # biject_to does not know the wrapper
    support = _with_finite_bounds(support)
    base = support
    while isinstance(base, constraints.independent):
        base = base.base_constraint
    if base is constraints.real:
        return IDENTITY
    try:
        return biject_to(support)
    except NotImplementedError as error:
        raise ModelError(
            f"the support {support} of latent site '{node['name']}' ({type(node['fn']).__name__}) has no bijection "
            "from unconstrained space. Write the site in other coordinates, for instance with pyro.infer.reparam."
        ) from error


def _with_finite_bounds(support: Any) -> Any:
    """A support without infinite bounds that are Python's numbers: torch would stretch a sigmoid over them.

    Tensors are not looked at: they may depend on latents, and a run that looks at those cannot be recorded.
    """
    if isinstance(support, constraints.independent):
        base = _with_finite_bounds(support.base_constraint)
        return constraints.independent(base, support.reinterpreted_batch_ndims)
    if type(support) is not type(constraints.unit_interval):
        return support
    below, above = (isinstance(b, float) and math.isinf(b) for b in (support.lower_bound, support.upper_bound))
    if below:
        return constraints.real if above else constraints.less_than(support.upper_bound)
    return constraints.greater_than(support.lower_bound) if above else support


def _is_constant(node: Any) -> bool:
    """Whether the support of a site is the same in every run. Bounds in a minibatch may be others in the next."""
    support = node["fn"].support
    subsampled = any(frame.size != frame.full_size for frame in plates_of(node))
    return is_fixed(support) and not (subsampled and any(bound.dim() for bound in bounds_of(support)))


def is_fixed(support: Any) -> bool:
    """Whether a support is the same in every run: in a run whose latents have a graph, its bounds have none.

    Of one that is not of torch or Pyro nothing is known.
    """
    return type(support).__module__ in _OF_TORCH_OR_PYRO and not any(b.requires_grad for b in bounds_of(support))


def bounds_of(support: Any) -> Iterator[Tensor]:
    """Yield the bounds that a support is made of, as tensors; a constant of torch or Pyro has none."""
    if any(support is constant for constant in _CONSTANTS):
        return
    for name, value in vars(support).items():
        if name.endswith("bound"):
            yield torch.as_tensor(value)
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, constraints.Constraint):  # independent, mixed, joined or stacked
                yield from bounds_of(part)


def log_abs_det(transform: Transform, value: Tensor, constrained: Tensor, event_dim: int) -> Tensor:
    """log |dx/du| per batch element: shape of the constrained value less its event dimensions."""
    log_jacobian = transform.log_abs_det_jacobian(value, constrained)
    surplus = log_jacobian.dim() - (constrained.dim() - event_dim)
    return log_jacobian.sum(tuple(range(-surplus, 0))) if surplus else log_jacobian


def refuse_boundary(name: str, constrained: Tensor, unconstrained: Tensor) -> None:
    """Refuse a constrained value whose unconstrained image is not finite."""
    if unconstrained.isfinite().all():
        return
    index = (~unconstrained.isfinite()).nonzero()[0].tolist()
    if constrained.shape == unconstrained.shape:
        said = f"it is {constrained[tuple(index)].item():.4g}" + (f" at index {index}" if index else "")
    else:  # an event may have another shape there
        said = f"one of its elements is {constrained.flatten().tolist()[:4]}"
    raise ModelError(
        f"the value of site '{name}' lies outside its support, or on its boundary: {said}. "
        "Did it overflow, or become NaN?"
    )


def plates_of(node: Any) -> tuple[Any, ...]:
    """The frames of the vectorized plates around a site."""
    return tuple(frame for frame in node["cond_indep_stack"] if frame.vectorized)


def subsample_scale_of(plates: Iterable[Any]) -> float:
    """Product of ``N / B`` over these plates."""
    return math.prod((frame.full_size / frame.size for frame in plates), start=1.0)


def check_bounds(site: LatentSite, support: Any) -> None:
    """Refuse a support with other bounds than at set-up, such as those of a latent that was detached."""
    for before, now in zip(site.bounds, bounds_of(support), strict=True) if site.bounds else ():
        if before.shape == now.shape and not torch.equal(before, now):
            raise ModelError(
                f"the support of site '{site.name}' has bounds {now.flatten().tolist()[:4]} in this run of the model, "
                f"{before.flatten().tolist()[:4]} in another, and no graph says why. Do they depend on a latent that "
                f"was detached? Leave it attached:\n    pyro.sample('{site.name}', dist.Uniform(0., latent))"
            )


def check_plate_sizes(site: LatentSite, plates: Iterable[Any]) -> None:
    """Refuse a plate that has grown or shrunk: the indices that are fed would hide it."""
    sizes = {frame.name: frame.full_size for frame in site.plates}
    for frame in plates:
        if frame.full_size != sizes.get(frame.name):
            raise ModelError(
                f"plate '{frame.name}' around site '{site.name}' has size {frame.full_size} in this run of the model, "
                f"and had {sizes.get(frame.name)} when its sites were looked for: did the arguments of the model "
                "change size? Make a new LogJoint for them. An automatic guide does that when it sees another shape; "
                "so if the size follows from values, pass it as an argument too:\n"
                f"    def model(..., num_{frame.name}): ..."
            )
