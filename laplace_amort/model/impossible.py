"""Data that no value of the latents makes possible, refused before a fit searches for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from laplace_amort.errors import ModelError
from laplace_amort.model.messages import observed
from laplace_amort.model.missing import completed, inside, is_data, seen_elements, seen_events
from laplace_amort.model.sites import is_fixed, layers_of, undressed

__all__ = ["refuse_impossible_data"]


def refuse_impossible_data(trace: Any, beside: Callable[[], Any], arguments: Mapping[str, Any] | None = None) -> None:
    """Refuse data that no value of the latents makes possible, before a fit searches for one.

    A distribution without validation (``validate_args=False``) takes what it is given, except NaN, infinity and what
    has no density. What a mask hides is not looked at.

    :param trace: of a run of the model, with supports that may depend on latents; these are left alone.
    :param beside: makes a trace at other latents, with their graph. At zero the density of a value at the edge of a
        support may exist although it does not beside it.
    :param arguments: of the model by name, among which one that is NaN is looked for.
    :raises ModelError: naming site, index and value.
    """
    for node in observed(trace):
        if not isinstance(node["value"], Tensor):
            _refuse_no_tensor(node)
        elif is_data(node):
            _refuse_not_finite(node)
            _refuse_on_edge(node, beside)
            _refuse_outside(node)
            _refuse_nan(node, arguments or {})


def _refuse_no_tensor(node: Any) -> None:
    name, value = node["name"], node["value"]
    if hasattr(value, "__array__"):
        raise ModelError(
            f"observed site '{name}' has data that are no tensor, but {type(value).__name__}. Make one:\n"
            f"    pyro.sample('{name}', ..., obs=torch.as_tensor(data, dtype=torch.get_default_dtype()))"
        )


class _Found(NamedTuple):
    """What is wrong with the data of a site.

    :param str said: site, number, first value and its index, as the beginning of a sentence.
    :param Tensor first: the first value.
    """

    said: str
    first: Tensor


def _found(node: Any, bad: Tensor, what: str) -> _Found | None:
    """Say which values are bad, of those that are seen; None if none is."""
    seen, value = seen_elements(node), node["value"]
    bad = bad if seen is None else bad & seen
    if not bad.any():
        return None
    value = value.broadcast_to(bad.shape)
    index = bad.nonzero()[0].tolist()
    first, kind = value[tuple(index)], type(undressed(node["fn"])).__name__
    said = (
        f"observed site '{node['name']}' ({kind}) has {int(bad.sum())} of {value.numel()} values that are {what}, the "
        f"first {first.item():.6g} at index {index}"
    )
    return _Found(said, first)


# ------------------------------------------------------------------------------------------------- NaN and infinity


def _refuse_not_finite(node: Any) -> None:
    found = _found(node, ~node["value"].isfinite(), "impossible")
    if found is None:
        return
    name, fn = node["name"], node["fn"]
    missing = bool(found.first.isnan())
    seen = "~data.isnan()" if missing else "data.isfinite()"
    if name.endswith("_observed") and node["mask"] is not None:
        stem = name.removesuffix("_observed")
        raise ModelError(
            f"{found.said}, and obs_mask says that they are seen:\n"
            f"    pyro.sample('{stem}', ..., obs=data, obs_mask=seen & {seen})"
        )
    possible = inside(fn)
    fill = float("nan") if possible is None else float(possible.unique()[0])
    filled = f"data.nan_to_num({fill:.6g})" if missing else f"data.nan_to_num({fill:.6g}, {fill:.6g}, {fill:.6g})"
    masked = f"dist...mask({seen})"
    if isinstance(fn, dist.MultivariateNormal) and missing:
        raise ModelError(
            f"{found.said}. Take the distribution that leaves out what is missing:\n"
            f"    pyro.sample('{name}', dist.NanMaskedMultivariateNormal(...), obs=data)"
        )
    if fn.event_dim:
        whole = f"({seen})" + (".all(-1)" if fn.event_dim == 1 else f".flatten(-{fn.event_dim}).all(-1)")
        if undressed(fn).event_dim:  # an event of which a part is missing is no event
            masked = f"dist...mask({whole})"
            filled = f"torch.where({whole}{'[..., None]' * fn.event_dim}, data, {fill:.6g})"
        else:
            masked = f"{masked}.to_event({fn.event_dim})"
        seen = whole
    raise ModelError(
        f"{found.said}. Leave these observations out, with their covariates, or mask them; or have them drawn from "
        "what the model says of them:\n"
        f"    pyro.sample('{name}', {masked}, obs={filled})\n"
        f"    pyro.sample('{name}', dist..., obs={filled}, obs_mask={seen})"
    )


# ------------------------------------------------------------------------------------------------ edges of supports


def _refuse_on_edge(node: Any, beside: Callable[[], Any]) -> None:
    """Refuse values at a bound of the support where the density is zero or infinite: by evidence, for some are fine."""
    edge = _on_edge(node["fn"], node["value"])
    if edge is None:
        return
    found = _found(node, edge, "on the edge of the support, where the density is zero or infinite")
    if found is None or not _has_no_density(beside(), node["name"], edge):
        return
    support = _support_of_elements(node["fn"])
    line, between, kept = _moved_inside(support)
    raise ModelError(
        f"{found.said}. Values must lie {between}. Move them inside, by less than they are measured to, take a "
        f"distribution that has such values, or leave them out:\n    {line}\n"
        f"    pyro.sample('{node['name']}', dist...mask({kept}), obs=data)"
    )


def _moved_inside(support: Any) -> tuple[str, str, str]:
    """Return the line that moves data off the edges of a support, where they must lie, and which of them do."""
    lower, upper = _bounds(support)
    kept = _strictly_inside(lower, upper)
    if support is constraints.simplex:
        line = "data = (data * (len(data) - 1) + 1 / data.shape[-1]) / len(data)"
        return line, "above 0", "(data > 0).all(-1)"
    if lower is not None and upper is not None:
        line = f"data = {lower:g} + ((data - {lower:g}) * (len(data) - 1) + {(upper - lower) / 2:g}) / len(data)"
        if (lower, upper) == (0.0, 1.0):
            line = "data = (data * (len(data) - 1) + 0.5) / len(data)"
        return line, f"in ({lower:g}, {upper:g}), without the ends", kept
    if lower is not None:
        least = f"data[data > {lower:g}].min()"
        line = f"data = data.clamp(min={f'({lower:g} + {least})' if lower else least} / 2)"
        return line, f"above {lower:g}", kept
    return f"data = data.clamp(max=({upper:g} + data[data < {upper:g}].max()) / 2)", f"below {upper:g}", kept


def _strictly_inside(lower: float | None, upper: float | None) -> str:
    parts = [f"(data > {lower:g})"] if lower is not None else []
    parts += [f"(data < {upper:g})"] if upper is not None else []
    return parts[0][1:-1] if len(parts) == 1 else " & ".join(parts)


def _support_of_elements(fn: Any) -> Any:
    """The support of a distribution whose elements have one each, the same in every run; otherwise None."""
    plain = undressed(fn)
    try:
        support = plain.support
    except NotImplementedError:
        return None
    fixed = not support.is_discrete and is_fixed(support)
    return support if fixed and (not plain.event_dim or support is constraints.simplex) else None


def _bounds(support: Any) -> tuple[float | None, float | None]:
    """The bounds that all elements of a support share; None where there is none."""
    if support is constraints.simplex:
        return 0.0, None
    found = [getattr(support, name, None) for name in ("lower_bound", "upper_bound")]
    shared = [None if bound is None else torch.as_tensor(bound, dtype=torch.float64).unique() for bound in found]
    lower, upper = (float(b) if b is not None and b.numel() == 1 and b.isfinite().all() else None for b in shared)
    return lower, upper


def _on_edge(fn: Any, value: Tensor) -> Tensor | None:
    """Which values are at a bound of the support; None where it has none."""
    support = _support_of_elements(fn)
    if support is None:
        return None
    lower, upper = _bounds(support)
    if lower is None and upper is None:
        return None
    edge = torch.zeros_like(value, dtype=torch.bool)
    for bound in (lower, upper):
        if bound is not None:
            edge = edge | (value == bound)
    return edge


def _has_no_density(trace: Any, name: str, edge: Tensor) -> bool:
    """Whether densities at these values of a site, or their slopes in the latents, are infinite or NaN."""
    latents = [node["value"] for node in trace.nodes.values() if node["type"] in ("sample", "param")]
    latents = [value for value in latents if isinstance(value, Tensor) and value.requires_grad]
    node, fn = trace.nodes[name], trace.nodes[name]["fn"]
    with pyro.validation_enabled(False), torch.enable_grad():
        plain = _without_validation(fn)
        densities = plain.log_prob(completed(node))
        event = edge.broadcast_to(torch.broadcast_shapes(edge.shape, fn.shape()))
        event = event.flatten(-fn.event_dim).any(-1) if fn.event_dim else event
        there = densities[event.broadcast_to(densities.shape)]
        if not there.isfinite().all():
            return True
        if not there.requires_grad or not latents:
            return False
        slopes = torch.autograd.grad(there.sum(), latents, materialize_grads=True)
    return not all(bool(slope.isfinite().all()) for slope in slopes)


def _without_validation(fn: Any) -> Any:
    """The same distribution, which takes values outside of its support."""
    copied = fn.expand(fn.batch_shape)
    for layer in layers_of(copied):
        layer._validate_args = False
    return copied


# -------------------------------------------------------------------------------------------------- outside of them


def _refuse_outside(node: Any) -> None:
    fn, value = node["fn"], node["value"]
    *_, plain = layers_of(fn)
    # Bounds of integers are data, of real numbers they may be latents.
    validates = getattr(plain, "_validate_args", False) and not plain.event_dim
    support = getattr(plain, "support", None) if validates else None
    if support is None or not (support.is_discrete or is_fixed(support)):
        return
    found = _found(node, ~support.check(value), "impossible")
    if found is None:
        return
    name, kind, said = node["name"], type(plain).__name__, found.said
    if kind in ("Bernoulli", "Categorical") and value.min() == 1:
        raise ModelError(f"{said}. Labels begin with 0:\n    pyro.sample('{name}', ..., obs=data - 1)")
    if support.is_discrete:
        raise ModelError(
            f"{said}: the support is {support}. If the data are right, take another distribution, or one that does not "
            f"check:\n    pyro.sample('{name}', dist.{kind}(..., validate_args=False), obs=data)"
        )
    raise ModelError(
        f"{said}: the support is {support}. If the data are right, take another distribution; or leave them out:\n"
        f"    pyro.sample('{name}', dist.{kind}(...).mask({_strictly_inside(*_bounds(support))}), obs=data)"
    )


# ------------------------------------------------------------------------------------------------------- covariates


def _refuse_nan(node: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse a covariate that is NaN where a density is: with validation, Pyro has done so before."""
    missing = {name: value for name, value in arguments.items() if _has_nan(value)}
    if not missing:
        return
    with torch.no_grad():
        bad = _without_validation(node["fn"]).log_prob(completed(node)).isnan()
    seen = seen_events(node)
    bad = bad if seen is None else bad & seen
    if bad.any():
        name, value = next(iter(missing.items()))
        raise ModelError(
            f"the density of observed site '{node['name']}' is NaN at index {bad.nonzero()[0].tolist()}, and at "
            f"{int(bad.sum())} of {bad.numel()}. Argument {name} of the model is NaN at index "
            f"{value.isnan().nonzero()[0].tolist()}, as {int(value.isnan().sum())} of its {value.numel()} values are. "
            f"Leave these observations out, of all columns:\n    keep = ~{name}.isnan()\n    {name} = {name}[keep]"
        )


def _has_nan(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any())
