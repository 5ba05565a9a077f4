"""A fit in the form that ArviZ works on. ArviZ is imported when one is made, and not before."""

from __future__ import annotations

import importlib.metadata
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.infer import Predictive
from torch import Tensor

from laplace_amort.errors import ModelError
from laplace_amort.model import ObservedSite, observed_sites, with_data_drawn
from laplace_amort.posterior.draws import PosteriorDraws
from laplace_amort.posterior.filled import filled_in
from laplace_amort.posterior.likelihood import LogLikelihood, Pointwise
from laplace_amort.posterior.predictive import Drawn, all_units, predictive_of, refuse_minibatch

__all__ = ["Groups", "as_datatree", "export"]

_INSTALL = "python -m pip install 'laplace_amort[arviz]'"
_WITHOUT_DRAWS = "observed_data", "constant_data"


@dataclass
class Groups:
    """What ArviZ is given.

    :param dict values: arrays by group and by variable; of draws with leading dimensions ``(1, S)``.
    :param dict dims: names of the dimensions of a variable, less those of draws, by group and by variable.
    :param dict coords: labels by dimension.
    :param dict attrs: what is to be said of all of it.
    """

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    dims: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    coords: dict[str, Any] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)

    def add(self, group: str, name: str, value: Tensor, dims: Sequence[str]) -> None:
        """Put a variable into a group.

        :param str group: of the variable.
        :param str name: of the variable.
        :param Tensor value: with the draws first, if the group has any.
        :param dims: names of the other dimensions, in order.
        """
        array = value.detach().cpu().numpy()
        self.values.setdefault(group, {})[name] = array if group in _WITHOUT_DRAWS else array[None]
        self.dims.setdefault(group, {})[name] = list(dims)

    def rename(self, dims: Mapping[str, Sequence[str]]) -> None:
        """Name the dimensions of variables otherwise, in every group; of a likelihood as many as there are."""
        for group in self.dims.values():
            for name in set(group) & set(dims):
                group[name] = list(dims[name])[: len(group[name])]

    def separate(self) -> None:
        """Rename dimensions that bear the name of a variable, which xarray would take for their labels."""
        taken = {name for group in self.values.values() for name in group} | {"chain", "draw"}

        def apart(dim: str) -> str:
            return f"{dim}_dim" if dim in taken else dim

        for group in self.dims.values():
            for name, dims in group.items():
                group[name] = [apart(dim) for dim in dims]
        self.coords = {apart(dim): labels for dim, labels in self.coords.items()}

    def coords_of(self, group: str) -> dict[str, Any]:
        """Return the labels of the dimensions that a group has."""
        used = {dim for dims in self.dims[group].values() for dim in dims}
        return {dim: labels for dim, labels in self.coords.items() if dim in used}


def as_datatree(groups: Groups) -> Any:
    """Return an ``xarray.DataTree``.

    :param Groups groups: what it is to hold.
    :raises ImportError: if arviz-base is not installed.
    """
    try:
        import arviz_base
        import xarray
    except ImportError as error:
        raise ImportError(f"a DataTree needs arviz-base:\n    {_INSTALL}") from error
    datasets = {}
    for group, values in groups.values.items():
        options: dict[str, Any] = {"sample_dims": ()} if group in _WITHOUT_DRAWS else {}
        options |= {"dims": groups.dims[group], "coords": groups.coords_of(group), "attrs": groups.attrs}
        datasets[group] = arviz_base.dict_to_dataset(values, **options)
    made = xarray.DataTree.from_dict(datasets)
    made.attrs.update(groups.attrs)
    return made


def export(
    posterior: PosteriorDraws,
    *,
    num_samples: int,
    prior_samples: int,
    log_likelihood: LogLikelihood | None,
    coords: Mapping[str, Any],
    dims: Mapping[str, Sequence[str]],
    seed: int,
    attrs: Mapping[str, Any],
) -> Groups:
    """Return the groups of a posterior; see :meth:`Posterior.to_arviz`."""
    refuse_minibatch(posterior)
    log_evidence, posterior = posterior.log_evidence, posterior.refined(num_samples)
    globals_, locals_ = posterior.sample_unconstrained(num_samples, seed)
    sites = observed_sites(posterior.gaussian.unit_model)
    groups = Groups(attrs={**attrs, **_about(posterior, globals_)})
    if not math.isnan(log_evidence):
        groups.attrs["log_evidence"] = float(log_evidence)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), pyro.validation_enabled(False):
        torch.manual_seed(seed)
        values = posterior.gaussian.constrained(globals_, locals_)
        drawn = all_units(posterior, posterior.problem.rounded(values))  # the model is run as it is written
        _add_posterior(groups, drawn, posterior, sites, seed)
        if prior_samples:
            _add_prior(groups, posterior, prior_samples)
    _add_data(groups, posterior, sites)
    if log_likelihood is not None:
        names = [name for name, site in sites.items() if not site.deterministic]
        found = log_likelihood.evaluate(posterior, names, globals_, locals_)
        _add_log_likelihood(groups, found, sites)
        groups.attrs["log_likelihood"] = repr(log_likelihood)
    _add_labels(groups, posterior, dims, coords)
    return groups


def _plate_dims(name: str, shape: Sequence[int], event_dim: int, plates: Sequence[Any]) -> list[str]:
    """Names of the dimensions of a value: of plates, and else as ArviZ has them."""
    dims = [f"{name}_dim_{axis}" for axis in range(len(shape))]
    for frame in plates:
        axis = len(shape) - event_dim + frame.dim
        if axis >= 0 and shape[axis] == frame.size:
            dims[axis] = frame.name
    return dims


def _add_posterior(
    groups: Groups, drawn: Drawn, posterior: PosteriorDraws, sites: dict[str, ObservedSite], seed: int
) -> None:
    for name, value in drawn.values.items():
        site = posterior.gaussian.unit_model.density.sites[name]
        dims = _plate_dims(name, value.shape[1:], site.constrained_event_dim, site.plates)
        groups.add("posterior", name, value, dims)
    predictions = predictive_of(drawn, posterior)() | filled_in(posterior, drawn.values, seed)
    for name, predicted in predictions.items():
        found = sites[name]
        value = predicted.reshape(len(predicted), *found.value.shape)
        dims = _plate_dims(name, found.value.shape, found.event_dim, found.plates)
        groups.add("posterior" if found.deterministic else "posterior_predictive", name, value, dims)


def _add_prior(groups: Groups, posterior: PosteriorDraws, num_samples: int) -> None:
    model, copied = posterior.gaussian.unit_model, {}
    for group in ("posterior", "posterior_predictive"):
        for name, dims in groups.dims.get(group, {}).items():
            copied[name] = group.replace("posterior", "prior"), groups.values[group][name].shape[2:], dims
    free = with_data_drawn(posterior.problem.guide.model)
    try:
        drawn = Predictive(free, num_samples=num_samples, return_sites=list(copied))(*model.args, **model.kwargs)
    except (NotImplementedError, ValueError, RuntimeError) as error:
        # An improper prior has no draws, and those of a vague one may overflow the distribution of the data.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        groups.attrs["prior"] = f"there are no draws of the prior: {reason}"
        return
    for name, (group, shape, dims) in copied.items():
        groups.add(group, name, drawn[name].reshape(num_samples, *shape), dims)


def _add_data(groups: Groups, posterior: PosteriorDraws, sites: dict[str, ObservedSite]) -> None:
    observed = [site for site in sites.values() if not site.deterministic]
    for site in observed:
        dims = _plate_dims(site.name, site.value.shape, site.event_dim, site.plates)
        groups.add("observed_data", site.name, _what_was_seen(site), dims)
    known = {dim for dims in groups.dims.values() for names in dims.values() for dim in names}
    for argument, value in _arguments(posterior).items():
        name = f"{argument}_data" if argument in known else argument  # plates keep their names
        if not any(_same(value, site.value) for site in observed):
            groups.add("constant_data", name, value, _plate_dims(name, value.shape, 0, ()))


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same, also where values are missing in both."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _what_was_seen(site: ObservedSite) -> Tensor:
    """The data of a site, NaN where a mask hides what stands there."""
    if site.seen is None or bool(site.seen.all()):
        return site.value
    value = site.value if site.value.is_floating_point() else site.value.to(torch.get_default_dtype())
    return value.masked_fill(~site.seen, torch.nan)


def _arguments(posterior: PosteriorDraws) -> dict[str, Tensor]:
    """The tensors that the model was called with, by the names that it gives them."""
    model, function = posterior.gaussian.unit_model, posterior.problem.guide.model
    function = getattr(function, "forward", function)
    try:
        bound = inspect.signature(function).bind(*model.args, **model.kwargs)
    except (TypeError, ValueError):  # no signature to be had
        return {}
    return {name: value for name, value in bound.arguments.items() if isinstance(value, Tensor)}


def _add_log_likelihood(groups: Groups, found: Mapping[str, Pointwise], sites: Mapping[str, ObservedSite]) -> None:
    for name, (values, plates) in found.items():
        seen = sites[name].seen_events if name in sites else None
        if seen is not None and not bool(seen.all()):  # a term that is not there is none of zero, to be counted
            groups.add("log_likelihood", name, values[:, seen.broadcast_to(values.shape[1:])], [f"{name}_seen"])
            groups.coords[f"{name}_seen"] = seen.flatten().nonzero().squeeze(-1).cpu().numpy()
            continue
        known = groups.dims.get("observed_data", {}).get(name)
        if known is None:  # of units alone, wherever their plate is among others
            known = [frame.name for frame in plates]
        groups.add("log_likelihood", name, values, known[: values.dim() - 1])


def _about(posterior: PosteriorDraws, globals_: Tensor) -> dict[str, Any]:
    """Say what wrote the file, and how good the draws are."""
    found = posterior.globals_
    return {
        "inference_library": "laplace_amort",
        "inference_library_version": importlib.metadata.version("laplace_amort"),
        "weighted_draws_of_globals": len(found.draws),
        "distinct_draws_of_globals": len(torch.unique(globals_, dim=0)) if globals_.shape[1] else 1,
        "k_hat": float(found.k_hat),
    }


def _add_labels(
    groups: Groups, posterior: PosteriorDraws, dims: Mapping[str, Sequence[str]], coords: Mapping[str, Any]
) -> None:
    """Name dimensions as they are to be named, and label them: units by their numbers."""
    model = posterior.gaussian.unit_model
    groups.coords[model.layout.frame.name] = model.units.cpu().numpy()
    groups.rename(dims)
    groups.separate()
    groups.coords.update(coords)
    _check_coords(groups, coords)


def _check_coords(groups: Groups, coords: Mapping[str, Any]) -> None:
    sizes: dict[str, int] = {}
    for group, values in groups.values.items():
        for name, dims in groups.dims[group].items():
            shape = values[name].shape
            sizes.update(zip(dims, shape[len(shape) - len(dims) :], strict=True))
    for dim, labels in coords.items():
        if dim not in sizes:
            raise ModelError(f"coords has labels of '{dim}', and the dimensions are {', '.join(sorted(sizes))}")
        if len(labels) != sizes[dim]:
            raise ModelError(f"coords has {len(labels)} labels of '{dim}', which has {sizes[dim]} elements")
